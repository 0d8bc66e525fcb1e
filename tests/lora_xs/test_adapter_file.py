"""The adapter file: small, exact, and refused wherever it does not belong."""

import copy
import os

import pytest
import torch
from fresh import run_fresh
from lora_xs import (
    ROBERTA_TARGETS,
    LoRAXSConfig,
    LoRAXSError,
    describe_adapter,
    files,
    inject,
    load_adapter,
    remove,
    save_adapter,
    set_active,
    trained,
)
from lora_xs.layer import layers
from torch import nn

TARGETS = ("embed", "conv", "up", "down")
CONFIG = LoRAXSConfig(rank=3, alpha=5, targets=TARGETS, rank_pattern={"down": 2})


@pytest.mark.parametrize("bases", [None, True])
def test_round_trip_is_exact(mixed, inputs, train_r, tmp_path, bases):
    base = copy.deepcopy(mixed)
    model = train_r(inject(mixed, CONFIG))
    for p in trained(model)["head"]:
        p.data.add_(1)
    want = model(*inputs)
    save_adapter(model, tmp_path, bases=bases)
    load_adapter(base, tmp_path)
    assert torch.equal(base(*inputs), want)
    assert {n for n, p in base.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    info = describe_adapter(tmp_path)
    assert info.config == CONFIG
    assert info.stored_bases is bool(bases)
    assert info.trained == 3 * 9 + 4
    assert info.heads == ("classifier",)
    save_adapter(base, tmp_path / "again", bases=bases)
    assert (tmp_path / "again" / "adapter.safetensors").read_bytes() == (tmp_path / "adapter.safetensors").read_bytes()


BUILD = """
import torch
from torch import nn
def build(dtype):
    torch.manual_seed(3)
    first = nn.Embedding(400, 300), nn.Linear(300, 500), nn.Tanh()
    return nn.Sequential(*first, nn.Linear(500, 300), nn.Linear(300, 7)).to(dtype)
"""

FRESH = (
    BUILD
    + """
import sys
from lora_xs import load_adapter
model = load_adapter(build(getattr(torch, sys.argv[2])), sys.argv[1], cache=False)
torch.save(model(torch.arange(400)), sys.argv[1] + "/logits.pt")
"""
)


@pytest.mark.parametrize(("dtype", "alpha"), [("float32", 9), ("bfloat16", 6)])
def test_same_logits_in_a_new_process(train_r, tmp_path, dtype, alpha):
    """R alone is stored: the new process makes the same bases again, without a cache.

    A file in bf16 loses nothing beside bf16 weights: there R is rounded before it meets activations anyway. That it is
    scaled before needs α/r to be a power of two, as in the official runs of language models.
    """
    scope = {}
    exec(BUILD, scope)
    config = LoRAXSConfig(6, alpha=alpha, targets=("0", "1", "3"), head=("4",))
    model = train_r(inject(scope["build"](getattr(torch, dtype)), config, cache=False))
    model[4].weight.data.normal_()
    save_adapter(model, tmp_path, dtype=torch.bfloat16 if dtype == "bfloat16" else None)
    want = model(torch.arange(400))
    done = run_fresh(FRESH, str(tmp_path), dtype)
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.load(tmp_path / "logits.pt"), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_bases(mixed, inputs, train_r, tmp_path, dtype):
    mixed.to(dtype)
    base = copy.deepcopy(mixed)
    model = train_r(inject(mixed, CONFIG))
    save_adapter(model, tmp_path)
    load_adapter(base, tmp_path)
    image = inputs[1].to(dtype)
    assert torch.equal(base(inputs[0], image), model(inputs[0], image))


@pytest.mark.parametrize("weight", ["up.weight", "up.bias", "embed.weight"])
def test_altered_base_weights_are_refused_by_name(mixed, tmp_path, weight):
    base = copy.deepcopy(mixed)
    save_adapter(inject(mixed, LoRAXSConfig(2, targets=("up",))), tmp_path)
    base.get_parameter(weight).data.view(-1)[3] += 1e-6 + base.get_parameter(weight).data.view(-1)[3].abs() * 1e-6
    with pytest.raises(LoRAXSError, match=f"made for other base weights: {weight} differs"):
        load_adapter(base, tmp_path)
    assert not any("lora_xs" in n for n, _ in base.named_parameters())


def test_a_head_that_differs_is_no_obstacle(mixed, inputs, tmp_path):
    base = copy.deepcopy(mixed)
    base.classifier.reset_parameters()
    model = inject(mixed, CONFIG)
    save_adapter(model, tmp_path)
    load_adapter(base, tmp_path)
    assert torch.equal(base(*inputs), model(*inputs))


def test_a_start_on_another_task(roberta, train_r, tmp_path):
    mnli = train_r(inject(roberta(labels=3), LoRAXSConfig(4, targets=ROBERTA_TARGETS)))
    save_adapter(mnli, tmp_path)
    rte = roberta(labels=2)
    rte.roberta.load_state_dict(remove(copy.deepcopy(mnli)).roberta.state_dict())
    with pytest.raises(LoRAXSError, match=r"classifier\.out_proj\.\w+ of shape \(3,.*head=False"):
        load_adapter(rte, tmp_path)
    load_adapter(rte, tmp_path, head=False)
    for (_, a), (_, b) in zip(layers(mnli), layers(rte), strict=True):
        assert torch.equal(a.R["default"], b.R["default"])
    assert rte.classifier.out_proj.weight.requires_grad


def test_an_adapter_for_another_model(roberta, llama, tmp_path):
    save_adapter(inject(roberta(), LoRAXSConfig(4, targets=ROBERTA_TARGETS)), tmp_path)
    with pytest.raises(LoRAXSError, match=r"another model: this one has no module roberta\.encoder\.layer\.0"):
        load_adapter(llama(), tmp_path)
    with pytest.raises(LoRAXSError, match=r"another model: .*query is a Linear of 64×64 here, but was .* 32×32"):
        load_adapter(roberta(hidden=64), tmp_path, head=False)


def test_a_second_adapter_beside_the_first(mixed, inputs, train_r, tmp_path):
    base = copy.deepcopy(mixed)
    for seed, name in enumerate(("one", "two")):
        torch.manual_seed(seed)
        model = train_r(inject(copy.deepcopy(base), CONFIG))
        model.classifier.weight.data.add_(seed)
        save_adapter(model, tmp_path / name)
    want = {n: load_adapter(copy.deepcopy(base), tmp_path / n)(*inputs) for n in ("one", "two")}
    model = load_adapter(copy.deepcopy(base), tmp_path / "one", name="one")
    load_adapter(model, tmp_path / "two", name="two")
    assert torch.equal(model(*inputs), want["one"])
    set_active(model, "two")
    assert torch.equal(model(*inputs), want["two"])
    with pytest.raises(LoRAXSError, match="already an adapter 'two'"):
        load_adapter(model, tmp_path / "two", name="two")
    other = inject(copy.deepcopy(base), LoRAXSConfig(2, targets=TARGETS))
    with pytest.raises(LoRAXSError, match="has rank 3 at embed, but the model's bases there have 2"):
        load_adapter(other, tmp_path / "one", name="one")
    other = inject(copy.deepcopy(base), LoRAXSConfig(3, targets=("up",)))
    with pytest.raises(LoRAXSError, match="adapts other modules"):
        load_adapter(other, tmp_path / "one", name="one")
    other = inject(copy.deepcopy(base), LoRAXSConfig(3, targets=TARGETS, rank_pattern={"down": 2}, init="random"))
    with pytest.raises(LoRAXSError, match=r"not those that .* was trained on"):
        load_adapter(other, tmp_path / "one", name="one")


def test_bases_with_other_signs_are_noticed(mixed, tmp_path, monkeypatch):
    """A machine whose decomposition turns one vector round must not run the adapter without a word."""
    import lora_xs.bases

    base = copy.deepcopy(mixed)
    save_adapter(inject(mixed, CONFIG), tmp_path)
    honest = lora_xs.bases.svd_bases

    def flipped(W, rank, *, exact):
        A, B = honest(W, rank, exact=exact)
        sign = torch.ones(rank, dtype=A.dtype)
        sign[-1] = -1
        return A * sign[:, None], B * sign

    monkeypatch.setattr(lora_xs.bases, "svd_bases", flipped)
    with pytest.raises(LoRAXSError, match=r"the bases of embed are not those .*bases=True"):
        load_adapter(base, tmp_path)


def test_random_bases_are_made_again_from_the_seed(mixed, inputs, train_r, tmp_path):
    base = copy.deepcopy(mixed)
    model = train_r(inject(mixed, LoRAXSConfig(3, targets=TARGETS, init="random", seed=5)))
    save_adapter(model, tmp_path)
    assert not describe_adapter(tmp_path).stored_bases
    assert torch.equal(load_adapter(base, tmp_path)(*inputs), model(*inputs))


def test_trained_bases_are_stored(mixed, inputs, tmp_path):
    base = copy.deepcopy(mixed)
    model = inject(mixed, LoRAXSConfig(3, targets=TARGETS, train_bases=True, r_std=1.0))
    for p in trained(model)["bases"]:
        p.data.mul_(1.5)
    with pytest.raises(LoRAXSError, match="bases of embed do not follow"):
        save_adapter(model, tmp_path, bases=False)
    save_adapter(model, tmp_path)
    assert torch.equal(load_adapter(base, tmp_path)(*inputs), model(*inputs))
    assert base.up.lora_xs.A.requires_grad


def test_other_base_weights_on_purpose(mixed, tmp_path):
    """Trained over one precision, run over another: allowed where the file holds its bases."""
    base = copy.deepcopy(mixed).to(torch.bfloat16)
    model = inject(mixed, CONFIG)
    save_adapter(model, tmp_path / "r")
    save_adapter(model, tmp_path / "all", bases=True)
    with pytest.raises(LoRAXSError, match="stores no bases"):
        load_adapter(base, tmp_path / "r", check_base=False)
    with pytest.raises(LoRAXSError, match="other base weights"):
        load_adapter(base, tmp_path / "all")
    load_adapter(base, tmp_path / "all", check_base=False)
    ids, image = torch.randint(0, 31, (2, 5)), torch.randn(2, 3, 7, 8, dtype=torch.bfloat16)
    assert base(ids, image).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["adapter.safetensors", "head.safetensors"])
def test_damaged_files_are_refused(mixed, tmp_path, name):
    base = copy.deepcopy(mixed)
    save_adapter(inject(mixed, CONFIG), tmp_path)
    whole = (tmp_path / name).read_bytes()
    for keep in (0, 4, 40, len(whole) // 2, len(whole) - 1):
        (tmp_path / name).write_bytes(whole[:keep])
        with pytest.raises(LoRAXSError, match="truncated"):
            load_adapter(base, tmp_path)
    generator = torch.Generator().manual_seed(1)
    for at in torch.randint(8, len(whole), (60,), generator=generator).tolist():
        flipped = bytearray(whole)
        flipped[at] ^= 1
        (tmp_path / name).write_bytes(flipped)
        with pytest.raises(LoRAXSError):
            load_adapter(base, tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(LoRAXSError, match="there is no file"):
        load_adapter(base, tmp_path)
    assert not any("lora_xs" in n for n, _ in base.named_parameters())
    (tmp_path / name).write_bytes(whole)
    load_adapter(base, tmp_path)


def test_an_interrupted_save_leaves_the_old_file(mixed, tmp_path, monkeypatch):
    model = inject(mixed, CONFIG)
    save_adapter(model, tmp_path)
    before = (tmp_path / "adapter.safetensors").read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        save_adapter(model, tmp_path)
    assert (tmp_path / "adapter.safetensors").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter.safetensors", "head.safetensors"]


def test_a_file_holds_values_and_not_flags_on_memory(tmp_path):
    """A lazy negative is a flag that a file cannot hold; a dtype that it has no name for is refused by name."""
    z = torch.randn(3, 4, dtype=torch.complex64)
    lazy = z.conj().imag
    assert lazy.is_neg()
    files.write(tmp_path / "a", {"R": lazy}, {}, "test")
    assert torch.equal(files.read(tmp_path / "a", "test")[0]["R"], -z.imag)
    for odd in (z, torch.eye(3).to_sparse()):
        with pytest.raises(LoRAXSError, match=r"layer\.R cannot be written: it is "):
            files.write(tmp_path / "b", {"layer.R": odd}, {}, "test")
    assert not (tmp_path / "b").exists()


def test_a_save_that_fails_leaves_the_older_pair_of_files(mixed, inputs, tmp_path, monkeypatch):
    base = copy.deepcopy(mixed)
    inject(mixed, CONFIG)
    save_adapter(mixed, tmp_path)
    want, before = mixed(*inputs), {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    for p in (p for ps in trained(mixed).values() for p in ps):
        p.data.add_(1)
    real = files._write

    def full(path, tensors, header):
        real(path, tensors, header)
        if "adapter" in path.name:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "_write", full)
    with pytest.raises(OSError, match="No space left"):
        save_adapter(mixed, tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    assert torch.equal(load_adapter(base, tmp_path)(*inputs), want)


def test_a_head_that_was_saved_with_other_numbers_is_refused(mixed, tmp_path):
    base = copy.deepcopy(mixed)
    inject(mixed, CONFIG)
    save_adapter(mixed, tmp_path)
    old = (tmp_path / "adapter.safetensors").read_bytes()
    for p in (p for ps in trained(mixed).values() for p in ps):
        p.data.add_(1)
    save_adapter(mixed, tmp_path)
    (tmp_path / "adapter.safetensors").write_bytes(old)  # as a kill between two renames leaves them
    with pytest.raises(LoRAXSError, match=r"head\.safetensors belongs to another adapter"):
        load_adapter(base, tmp_path)
    load_adapter(base, tmp_path, head=False)


def test_a_head_with_fewer_numbers_than_the_models_is_refused(mixed, tmp_path):
    wider = copy.deepcopy(mixed)
    mixed.classifier = nn.Linear(14, 4, bias=False)
    inject(mixed, CONFIG)
    save_adapter(mixed, tmp_path)
    with pytest.raises(LoRAXSError, match=r"lacks classifier\.bias, which this model's head has; head=False"):
        load_adapter(wider, tmp_path)
    assert not any("lora_xs" in name for name, _ in wider.named_modules())
