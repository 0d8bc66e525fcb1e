"""Bases from the gradient: the span that a dense gradient has, one weight's gradient at a time, stored in the file."""

import copy

import pytest
import torch
import torch.nn.functional as F
from lora_xs import (
    LoRAXSConfig,
    LoRAXSError,
    describe_adapter,
    inject,
    load_adapter,
    param_groups,
    save_adapter,
)
from lora_xs.gradient import first_step
from lora_xs.layer import layers
from torch import nn

TARGETS = ("embed", "conv", "up", "down")


def batches(n=3):
    g = torch.Generator().manual_seed(7)
    return [(torch.randint(0, 31, (6, 5), generator=g), torch.randn(6, 3, 7, 8, generator=g)) for _ in range(n)]


def losses_of(model, dtype=torch.float32):
    def losses():
        for ids, image in batches():
            yield model(ids, image.to(dtype)).pow(2).mean()

    return losses


def test_bases_span_what_the_dense_gradient_s_best_do(mixed):
    full = copy.deepcopy(mixed)
    for loss in losses_of(full)():
        loss.backward()
    config = LoRAXSConfig(rank=4, targets=TARGETS, init="gradient", rank_pattern={"down": 2})
    inject(mixed, config, losses=losses_of(mixed))
    for _, layer in layers(mixed):
        G = layer.kind.to_matrix(full.get_submodule(layer.name).weight.grad)
        U, S, Vh = torch.linalg.svd(G, full_matrices=False)
        r = layer.rank
        best = (U[:, :r] * S[:r]) @ Vh[:r]
        held = layer.B @ (layer.B.t() @ G @ layer.A.t()) @ layer.A
        # Of the gradient's energy, as much as the best of this rank, but for what ten more columns do not find.
        assert held.norm() > 0.98 * best.norm()
        torch.testing.assert_close(layer.B.t() @ layer.B, torch.eye(r), rtol=0, atol=1e-5)
        torch.testing.assert_close(layer.A @ layer.A.t(), torch.eye(r), rtol=0, atol=1e-5)
    assert all(p.grad is None for p in mixed.parameters())


def test_gradients_are_never_held_together(mixed):
    """When one weight's gradient arrives, no other weight has one."""
    seen = []
    plain = torch.Tensor.register_post_accumulate_grad_hook

    def watched(parameter, hook):
        def both(p):
            seen.append(sum(q.grad is not None for q in mixed.parameters()))
            hook(p)

        return plain(parameter, both)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.Parameter, "register_post_accumulate_grad_hook", watched, raising=False)
        inject(mixed, LoRAXSConfig(rank=2, targets=TARGETS, init="gradient"), losses=losses_of(mixed))
    assert seen == [1] * (2 * 3 * len(TARGETS))


def test_files_store_the_bases(mixed, inputs, train_r, tmp_path):
    base = copy.deepcopy(mixed)
    config = LoRAXSConfig(rank=2, targets=TARGETS, init="gradient")
    model = train_r(inject(mixed, config, losses=losses_of(mixed)))
    save_adapter(model, tmp_path)
    assert describe_adapter(tmp_path).stored_bases
    assert describe_adapter(tmp_path).config == config
    assert torch.equal(load_adapter(base, tmp_path)(*inputs), model(*inputs))


def test_the_same_seed_gives_the_same_bases_whatever_came_before(mixed):
    config = LoRAXSConfig(rank=2, targets=TARGETS, init="gradient")
    models = [copy.deepcopy(mixed) for _ in range(2)]
    for i, model in enumerate(models):
        torch.manual_seed(i)
        before = torch.get_rng_state()
        inject(model, config, losses=losses_of(model))
        assert torch.equal(torch.get_rng_state(), before)
    for (_, a), (_, b) in zip(layers(models[0]), layers(models[1]), strict=True):
        assert torch.equal(a.A, b.A)
        assert torch.equal(a.B, b.B)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions(mixed, dtype):
    mixed.to(dtype)
    inject(mixed, LoRAXSConfig(rank=2, targets=TARGETS, init="gradient"), losses=losses_of(mixed, dtype))
    assert {layer.A.dtype for _, layer in layers(mixed)} == {dtype}


def test_stacked_experts(llama):
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=3,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config)
    ids = torch.randint(0, 40, (4, 9))
    wanted = LoRAXSConfig(2, targets=("experts.down_proj", "experts.gate_up_proj", "q_proj"), init="gradient")
    inject(model, wanted, losses=lambda: [model(ids, labels=ids).loss])
    assert [tuple(layer.A.shape) for _, layer in layers(model)] == [(2, 16), (3, 2, 16), (3, 2, 24)]
    model(ids, labels=ids).loss.backward()
    assert all(p.grad.abs().max() > 0 for p in param_groups(model)[0]["params"])


def test_a_first_step_goes_where_full_training_goes(mixed, inputs):
    """What the bases are for: of dL/dW the adapter's gradient holds most, where the SVD's bases hold little."""
    held = {}
    for init in ("gradient", "svd"):
        model = copy.deepcopy(mixed)
        more = {"losses": losses_of(model)} if init == "gradient" else {}
        inject(model, LoRAXSConfig(rank=3, targets=("up", "down", "embed"), init=init), **more)
        full = copy.deepcopy(mixed)
        for loss in losses_of(full)():
            loss.backward()
        parts = []
        for _, layer in layers(model):
            G = layer.kind.to_matrix(full.get_submodule(layer.name).weight.grad)
            A = torch.linalg.qr(layer.A.t()).Q
            parts.append(float((layer.B.t() @ G @ A).norm() / G.norm()))
        held[init] = min(parts)
    assert held["gradient"] > 0.8
    assert held["gradient"] > 1.5 * held["svd"]


@pytest.mark.parametrize("alpha", [None, 12.0])
def test_the_first_step_goes_down_the_gradient(mixed, alpha):
    """(α/r)·B R A is −c times the gradient's best part of that rank, and its root mean square is η, in every weight."""
    full, eta = copy.deepcopy(mixed), 3e-3
    for loss in losses_of(full)():
        loss.backward()
    config = LoRAXSConfig(4, alpha, TARGETS, init="gradient", first_step=eta, r_std=0.0, rank_pattern={"down": 2})
    inject(mixed, config, losses=losses_of(mixed))
    for _, layer in layers(mixed):
        G = layer.kind.to_matrix(full.get_submodule(layer.name).weight.grad)
        step = layer.delta("default")
        torch.testing.assert_close(step.pow(2).mean().sqrt().item(), eta, rtol=1e-4, atol=0)
        best = layer.B @ (layer.B.t() @ G @ layer.A.t()) @ layer.A
        torch.testing.assert_close(
            torch.cosine_similarity(step.flatten(), -best.flatten(), 0).item(), 1.0, rtol=1e-4, atol=0
        )


def test_a_matrix_without_a_gradient_takes_no_first_step():
    S = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    R = first_step(S, (6, 4), 0.1)
    torch.testing.assert_close(R[0], torch.diag(torch.tensor([-0.6, -0.8])) * 0.1 * 24**0.5)
    assert torch.equal(R[1], torch.zeros(2, 2))


def test_a_first_step_is_in_the_file_only_where_there_is_one():
    some = LoRAXSConfig(2, init="gradient", first_step=1e-4)
    assert LoRAXSConfig.from_json(some.to_json()) == some
    assert "first_step" not in LoRAXSConfig(2, init="gradient").to_json()


def test_modules_that_share_a_weight_and_sparse_gradients():
    class Tied(nn.Module):
        def __init__(self, sparse):
            super().__init__()
            self.read = nn.Embedding(31, 12, sparse=sparse)
            self.again = nn.Embedding(31, 12, sparse=sparse)
            self.again.weight = self.read.weight
            self.classifier = nn.Linear(12, 6)

        def forward(self, ids):
            return self.classifier((self.read(ids) + self.again(ids.flip(1))).mean(1))

    bases = []
    for sparse in (False, True):
        torch.manual_seed(3)
        model = Tied(sparse)
        ids, y = torch.randint(0, 31, (16, 5)), torch.randint(0, 6, (16,))
        config = LoRAXSConfig(rank=2, targets=("read", "again"), init="gradient")
        inject(model, config, losses=lambda model=model, ids=ids, y=y: [F.cross_entropy(model(ids), y)])
        bases.append([t for _, layer in layers(model) for t in (layer.A, layer.B)])
    assert len(bases[0]) == 4
    for dense, sparse in zip(*bases, strict=True):
        torch.testing.assert_close(dense, sparse)


def test_running_statistics_are_as_they_were(mixed):
    mixed.conv = nn.Sequential(mixed.conv, nn.BatchNorm2d(5))
    before = {key: value.clone() for key, value in mixed.named_buffers()}
    inject(mixed, LoRAXSConfig(rank=2, targets=("up", "down"), init="gradient"), losses=losses_of(mixed))
    assert len(before) == 3
    assert all(torch.equal(value, before[key]) for key, value in mixed.named_buffers() if key in before)


def test_refusals(mixed):
    with pytest.raises(LoRAXSError, match="give both or neither"):
        inject(mixed, LoRAXSConfig(2, targets=TARGETS, init="gradient"))
    with pytest.raises(LoRAXSError, match="give both or neither"):
        inject(mixed, LoRAXSConfig(2, targets=TARGETS), losses=losses_of(mixed))
    some = LoRAXSConfig(2, targets=TARGETS, init="gradient")
    with pytest.raises(LoRAXSError, match="got no gradient for embed"):
        inject(mixed, some, losses=lambda: [mixed.down(torch.randn(3, 17)).sum()])
    assert all(p.requires_grad and p.grad is None for p in mixed.parameters())
    some = LoRAXSConfig(40, targets=("embed",), init="gradient")
    with pytest.raises(LoRAXSError, match="rank 40 is larger than embed"):
        inject(mixed, some, losses=losses_of(mixed))
