"""The paper's parameter counts at full size on the meta device, and the bytes of the files."""

import pytest
import torch
from lora_xs import (
    CAUSAL_LM_TARGETS,
    ROBERTA_TARGETS,
    LoRAXSConfig,
    inject,
    load_adapter,
    save_adapter,
    trained,
)

transformers = pytest.importorskip("transformers")


def roberta_large(width=1024):
    return transformers.RobertaForSequenceClassification(
        transformers.RobertaConfig(
            vocab_size=50265 if width == 1024 else 60, hidden_size=width, num_hidden_layers=24,
            num_attention_heads=16, intermediate_size=4 * width, max_position_embeddings=514,
        )
    )  # fmt: skip


def mistral_7b(width=4096):
    return transformers.MistralForCausalLM(
        transformers.MistralConfig(
            vocab_size=32000 if width == 4096 else 60, hidden_size=width, intermediate_size=width * 7 // 2,
            num_hidden_layers=32, num_attention_heads=32 if width == 4096 else 4,
            num_key_value_heads=8 if width == 4096 else 2,
        )
    )  # fmt: skip


def count(model, rank, targets):
    inject(model, LoRAXSConfig(rank, targets=targets))
    assert all(p.is_meta for p in model.parameters())
    return sum(p.numel() for p in trained(model)["R"])


ROBERTA = {4: 1_536, 8: 6_144, 12: 13_824, 16: 24_576, 20: 38_400, 25: 60_000}
MISTRAL = {16: 57_344, 32: 229_376, 64: 917_504}


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "expected"), ROBERTA.items())
def test_roberta_large_counts(rank, expected):
    with torch.device("meta"):
        model = roberta_large()
    assert count(model, rank, ROBERTA_TARGETS) == expected
    assert sum(p.numel() for p in trained(model)["head"]) == 1024 * 1024 + 1024 + 2 * 1024 + 2


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "expected"), MISTRAL.items())
def test_mistral_7b_counts(rank, expected):
    with torch.device("meta"):
        model = mistral_7b()
    assert count(model, rank, CAUSAL_LM_TARGETS) == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "targets", "rank", "dtype", "limit"),
    [
        (roberta_large, ROBERTA_TARGETS, 4, None, 10_000),
        (mistral_7b, CAUSAL_LM_TARGETS, 16, torch.bfloat16, 130_000),
    ],
    ids=["RoBERTa-large r=4", "Mistral-7B r=16 bf16"],
)
def test_file_sizes(tmp_path, make, targets, rank, dtype, limit):
    """All layers with their real names, but narrow: neither R nor the header depends on the width."""
    torch.manual_seed(0)
    model = make(64).to(dtype or torch.float32)
    inject(model, LoRAXSConfig(rank, alpha=16, targets=targets))
    save_adapter(model, tmp_path, dtype=dtype)
    assert (tmp_path / "adapter.safetensors").stat().st_size <= limit
    assert (tmp_path / "head.safetensors").exists() == (make is roberta_large)
    torch.manual_seed(0)
    load_adapter(make(64).to(dtype or torch.float32), tmp_path)
