"""Unmodified models of several libraries: the same loss, all gradients, and an order less saved."""

import contextlib
import warnings

import pytest
import timm
import torch
import torchvision
from backrazor import Razor
from memtrain_common.measuring.memory import SavedActivations
from memtrain_common.models.gpt import GPT, GPTConfig
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

IDS = torch.arange(3 * 40).view(3, 40) % 17
CLASSES = torch.tensor([0, 1, 1])
BODY = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}


def _vit(attention):
    config = ViTConfig(**BODY, image_size=32, patch_size=4, attn_implementation=attention)
    return ViTForImageClassification(config), {"pixel_values": torch.randn(3, 3, 32, 32), "labels": CLASSES}


def _bert(attention):
    config = BertConfig(vocab_size=17, **BODY, attn_implementation=attention)
    mask = (torch.arange(40) < torch.tensor([[40], [30], [9]])).long()
    return BertForSequenceClassification(config), {"input_ids": IDS, "attention_mask": mask, "labels": CLASSES}


def _gpt2(attention):
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    config = GPT2Config(
        vocab_size=17, n_embd=48, n_layer=2, n_head=4, n_positions=40, attn_implementation=attention, **ends
    )
    return GPT2LMHeadModel(config), {"input_ids": IDS, "labels": IDS}


def _llama(attention):
    config = LlamaConfig(vocab_size=17, **BODY, num_key_value_heads=2, attn_implementation=attention)
    return LlamaForCausalLM(config), {"input_ids": IDS, "labels": IDS}


class Classifier(nn.Module):
    """A body's output, averaged over what stands between batch and features, against classes."""

    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x):
        y = self.body(x)
        loss = nn.functional.cross_entropy(y.mean(1) if y.dim() == 3 else y, CLASSES)
        return {"loss": loss}


def _images(model):
    return Classifier(model(num_classes=4)), {"x": torch.randn(3, 3, 64, 64)}


def _timm(name, **settings):
    return _images(lambda num_classes: timm.create_model(name, num_classes=num_classes, **settings))


def _encoder(_):
    layer = nn.TransformerEncoderLayer(48, 4, 96, activation="gelu", batch_first=True, norm_first=True)
    return Classifier(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)), {"x": torch.randn(3, 40, 48)}


class Tokens(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, tokens):
        return {"loss": nn.functional.cross_entropy(self.body(tokens).flatten(0, 1), tokens.flatten())}


def _nanogpt(_):
    model = GPT(GPTConfig(vocab_size=17, block_size=40, n_layer=2, n_head=4, n_embd=48, dropout=0.1))
    return Tokens(model), {"tokens": IDS}


MODELS = {
    "vit eager": (lambda: _vit("eager"), 8),
    "vit sdpa": (lambda: _vit("sdpa"), 8),
    "bert eager": (lambda: _bert("eager"), 8),
    "bert sdpa": (lambda: _bert("sdpa"), 8),
    "gpt2 eager": (lambda: _gpt2("eager"), 8),
    "gpt2 sdpa": (lambda: _gpt2("sdpa"), 8),
    "llama eager": (lambda: _llama("eager"), 6),
    "llama sdpa": (lambda: _llama("sdpa"), 5),
    "torchvision resnet18": (lambda: _images(torchvision.models.resnet18), 8),
    "torchvision mobilenet_v2": (lambda: _images(torchvision.models.mobilenet_v2), 10),
    "torchvision mobilenet_v3": (lambda: _images(torchvision.models.mobilenet_v3_small), 7),
    "timm vit": (lambda: _timm("vit_tiny_patch16_224", img_size=64, depth=2), 8),
    "timm convnext": (lambda: _timm("convnext_atto"), 4),
    "timm efficientnet": (lambda: _timm("efficientnet_b0"), 5),
    "timm resnet, group norm": (lambda: _timm("resnet18", norm_layer="groupnorm"), 4),
    "nn.TransformerEncoder": (lambda: _encoder(None), 8),
    "nanoGPT": (lambda: _nanogpt(None), 8),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_the_loss_is_the_same_and_less_is_saved(name):
    make, ratio = MODELS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, batch = make()
    model.train()
    names = [n for n, _ in model.named_parameters()]

    def run(context):
        torch.manual_seed(5)
        with context, SavedActivations(model) as saved:
            loss = model(**batch)["loss"]
        held = sum(saved.by_layer().values())
        gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        return loss.detach(), dict(zip(names, gradients, strict=True)), held

    state = {n: b.clone() for n, b in model.named_buffers()}
    plain, expected, dense = run(contextlib.nullcontext())
    model.load_state_dict(state, strict=False)
    same, close, _ = run(Razor(1))
    model.load_state_dict(state, strict=False)
    loss, got, held = run(Razor(0.1))
    assert plain == same == loss
    assert dense / held > ratio
    norm = sum(g.norm() ** 2 for g in expected.values() if g is not None) ** 0.5
    for n, g in expected.items():
        assert (g is None) == (got[n] is None), n
        if g is not None:
            assert (close[n] - g).norm() < 1e-4 * norm, n
            assert got[n].isfinite().all(), n
    error = sum((got[n] - g).norm() ** 2 for n, g in expected.items() if g is not None) ** 0.5
    assert error < 1.05 * norm


def test_a_model_wrapped_by_peft_trains_its_adapters_alone():
    from peft import LoraConfig, get_peft_model

    model, batch = _vit("sdpa")
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "query", "value"]))
    plain = model(**batch).loss
    expected = [(p, *torch.autograd.grad(plain, p, retain_graph=True)) for p in model.parameters() if p.requires_grad]
    with SavedActivations(model) as saved, Razor(0.1):
        loss = model(**batch).loss
    held = sum(saved.by_layer().values())
    with SavedActivations(model) as all_of_it:
        kept = model(**batch).loss
    assert loss == plain == kept
    assert held < sum(all_of_it.by_layer().values()) / 5
    loss.backward()
    assert expected
    for parameter, gradient in expected:
        assert parameter.grad.shape == gradient.shape
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
