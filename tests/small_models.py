"""Small models that are not ours, as several methods meet them: subclasses of linear layers, a mixture of experts."""

from typing import Any

import pytest
from torch import Tensor, nn


class Own(nn.Linear):
    """As Falcon's: the same answer by another way."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + self.bias


class Doubled(nn.Linear):
    """Another answer, whose weight is no linear layer's."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


def mixtral(experts: int) -> Any:
    """Two blocks with stacks of ``experts`` matrices; the test is skipped where transformers is missing."""
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        vocab_size=30, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=experts, max_position_embeddings=16,
    )  # fmt: skip
    return transformers.MixtralForCausalLM(config)


def published_lite0(model):
    """The tensors of timm's tf_efficientnet_lite0 as the published file names them."""
    names, flat = {}, [block for stage in model.blocks for block in stage]
    for n, t in model.state_dict().items():
        parts = n.split(".")
        if parts[0] == "blocks":
            number = sum(len(stage) for stage in list(model.blocks)[: int(parts[1])]) + int(parts[2])
            inside = ["_expand_conv", "_bn0", "_depthwise_conv", "_bn1", "_project_conv", "_bn2"]
            order = ["conv_pw", "bn1", "conv_dw", "bn2", "conv_pwl", "bn3"]
            if not hasattr(flat[number], "conv_pwl"):
                inside, order = inside[2:], ["conv_dw", "bn1", "conv_pw", "bn2"]
            n = f"_blocks.{number}.{inside[order.index(parts[3])]}.{parts[4]}"
        else:
            top = {
                "conv_stem": "_conv_stem",
                "bn1": "_bn0",
                "conv_head": "_conv_head",
                "bn2": "_bn1",
                "classifier": "_fc",
            }
            n = f"{top[parts[0]]}.{parts[1]}"
        names[n] = t
    return names
