"""Small models that every test file of lora_xs shares."""

import pytest
import torch
from torch import nn


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("LORA_XS_CACHE", str(tmp_path_factory.mktemp("cache")))


class Conv1D(nn.Module):
    """transformers' Conv1D in three lines: weight (in×out)."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf) / nx**0.5)
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x):
        return x @ self.weight + self.bias


class Mixed(nn.Module):
    """One module of each kind, odd sizes, and a task head."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(31, 12)
        self.conv = nn.Conv2d(3, 5, (3, 2), stride=2, padding=1, padding_mode="reflect")
        self.up = Conv1D(17, 12)
        self.down = nn.Linear(17, 9, bias=False)
        self.classifier = nn.Linear(9 + 5, 4)

    def forward(self, ids, image):
        """ids (b×t), image (b×3×7×8) → (b×4)"""
        text = self.down(torch.tanh(self.up(self.embed(ids)))).mean(1)
        return self.classifier(torch.cat([text, self.conv(image).mean((2, 3))], dim=1))


@pytest.fixture
def mixed():
    return Mixed()


@pytest.fixture
def inputs():
    return torch.randint(0, 31, (6, 5)), torch.randn(6, 3, 7, 8)


@pytest.fixture
def train_r():
    """Give every R of the model values that matter."""
    from lora_xs.layer import layers

    def run(model, name="default", scale=0.3):
        with torch.no_grad():
            for _, layer in layers(model):
                layer.R[name].copy_(torch.randn(layer.rank, layer.rank) * scale)
        return model

    return run


@pytest.fixture
def roberta():
    transformers = pytest.importorskip("transformers")

    def make(hidden=32, layers=2, labels=2, cls="RobertaForSequenceClassification", **more):
        config = transformers.RobertaConfig(
            vocab_size=60, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=4,
            intermediate_size=2 * hidden, max_position_embeddings=40, num_labels=labels, **more,
        )  # fmt: skip
        return getattr(transformers, cls)(config).eval()

    return make


@pytest.fixture
def llama():
    transformers = pytest.importorskip("transformers")

    def make(**more):
        config = transformers.LlamaConfig(
            vocab_size=61, hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, **more,
        )  # fmt: skip
        return transformers.LlamaForCausalLM(config).eval()

    return make
