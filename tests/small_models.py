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
