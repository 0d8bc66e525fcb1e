"""The plain model that a run saves: of its own kind, with the answers of the one that was trained."""

import pytest
import torch
from memtrain_apps.compose.axes import Axes
from memtrain_apps.compose.compose import inject, merged
from memtrain_common.models.classifiers import build_classifier
from torch import nn

transformers = pytest.importorskip("transformers")


def gpt2():
    config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=16, n_positions=16, vocab_size=50)
    return transformers.GPT2LMHeadModel(config), {"input_ids": torch.randint(0, 50, (2, 8))}


def tied_llama():
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config), {"input_ids": torch.randint(0, 50, (2, 8))}


def resnet():
    model = build_classifier("resnet20", classes=5, image_size=8).model
    return model, torch.randn(2, 3, 8, 8)


def answers(model, batch):
    with torch.no_grad():
        return model.eval()(**batch).logits if isinstance(batch, dict) else model.eval()(batch)


@pytest.mark.parametrize("train", ["lora", "lora-xs", "lte"])
@pytest.mark.parametrize("made", [gpt2, tied_llama, resnet])
def test_merged_it_is_the_plain_model_again(made, train):
    model, batch = made()
    kinds = {name: type(m) for name, m in model.named_modules()}
    shapes = {name: t.shape for name, t in model.state_dict().items()}
    axes = Axes(train, rank=4, heads=2)
    trained = inject(model, axes, losses=lambda n: [])
    with torch.no_grad():
        for p in trained.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn_like(p))
    expected = answers(trained, batch)
    plain = merged(trained, axes)
    assert {name: type(m) for name, m in plain.named_modules()} == kinds
    assert {name: t.shape for name, t in plain.state_dict().items()} == shapes
    torch.testing.assert_close(answers(plain, batch), expected, atol=1e-5, rtol=1e-5)
    assert not any(hasattr(m, "plain_layer") for m in plain.modules())
    assert isinstance(plain, nn.Module)
