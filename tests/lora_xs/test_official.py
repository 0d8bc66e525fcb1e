"""The official code's bases and its checkpoints: made again, imported, started from."""

import copy
import json
import sys

import numpy as np
import pytest
import torch
from lora_xs import LoRAXSConfig, LoRAXSError, describe_adapter, import_peft, inject, load_adapter, save_adapter
from lora_xs.layer import layers
from lora_xs.svd import official_bases, svd_bases
from lora_xs.tasks import glue
from memtrain_common.training import schedule
from safetensors.torch import load_file, save_file
from support import run_command

pytest.importorskip("sklearn")
linalg = pytest.importorskip("scipy.linalg")


def realistic(out, width, seed=0):
    """A weight whose singular values fall as k^-½, without a gap anywhere (out×width)."""
    g = torch.Generator().manual_seed(seed)
    n = min(out, width)
    U = torch.linalg.qr(torch.randn(out, n, generator=g)).Q
    V = torch.linalg.qr(torch.randn(width, n, generator=g)).Q
    return (U * torch.arange(1, n + 1) ** -0.5) @ V.t()


def reference(W, rank):
    """The algorithm step by step, without scikit-learn: Halko's range finder on Wᵀ (10 iterations with LU, seed 42)."""
    X = W.t().numpy()  # in×out
    Q = np.random.RandomState(42).normal(size=(X.shape[1], rank + 10)).astype(X.dtype)
    for _ in range(10):
        Q, _ = linalg.lu(X @ Q, permute_l=True)
        Q, _ = linalg.lu(X.T @ Q, permute_l=True)
    Q, _ = linalg.qr(X @ Q, mode="economic")
    B = torch.from_numpy(linalg.svd(Q.T @ X, full_matrices=False)[2][:rank].copy()).t()  # out×r
    return B.t() @ W, B


def distance(pair, other):
    """How far B A is from another's, relatively."""
    return float((pair[1] @ pair[0] - other[1] @ other[0]).norm() / (other[1] @ other[0]).norm())


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "rank"), [((1024, 1024), 25), ((640, 1024), 4), ((96, 64), 8)])
def test_official_bases_are_made_again(shape, rank):
    W = realistic(*shape)
    A, B = official_bases(W, rank)
    assert distance((A, B), reference(W, rank)) < 1e-4
    torch.testing.assert_close(B.t() @ B, torch.eye(rank), rtol=0, atol=1e-5)
    torch.testing.assert_close(A, B.t() @ W, rtol=0, atol=1e-5)
    largest = B.gather(0, B.abs().argmax(0, keepdim=True))
    assert bool((largest > 0).all())


@pytest.mark.slow
def test_the_default_s_are_others_where_there_is_no_gap():
    """What the README says of it."""
    W = realistic(1024, 1024)
    assert 0.01 < distance(svd_bases(W, 25), official_bases(W, 25)) < 0.3


def test_inject_and_files_with_official_bases(tmp_path):
    base = torch.nn.Sequential(torch.nn.Linear(64, 96))
    base[0].weight.data.copy_(realistic(96, 64))
    model = inject(copy.deepcopy(base), LoRAXSConfig(8, svd="official", r_std=0.3))
    x = torch.randn(3, 64)
    save_adapter(model, tmp_path)
    assert not describe_adapter(tmp_path).stored_bases
    assert torch.equal(load_adapter(copy.deepcopy(base), tmp_path)(x), model(x))


def test_without_scikit_learn_it_says_which_line_to_type(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.decomposition", None)
    with pytest.raises(LoRAXSError, match="pip install scikit-learn"):
        official_bases(torch.randn(8, 8), 2)


def official_folder(base, folder, rank=8, labels=None, seed=0):
    """A checkpoint as the official code writes it, for query and value of `base`; and the model that it stands for."""
    want, tensors = copy.deepcopy(base), {}
    torch.manual_seed(seed)
    for name, module in base.named_modules():
        if name.endswith((".query", ".value", ".q_proj", ".v_proj")):
            A, B = reference(module.weight.detach(), rank)
            R = torch.randn(rank, rank) * 0.5
            key = f"base_model.model.{name}"
            tensors |= {f"{key}.lora_A.weight": A, f"{key}.lora_B.weight": B}
            tensors[f"{key}.default_lora_latent_mapping.weight"] = R
            with torch.no_grad():
                want.get_submodule(name).weight.add_(16 / rank * B @ R @ A)
    if labels:
        for name, p in want.classifier.named_parameters():
            tensors[f"base_model.model.classifier.{name}"] = p.data.add_(0.1).clone()
    folder.mkdir(exist_ok=True)
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 16, "target_modules": ["query", "value"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "adapter_model.safetensors")
    return want


def spread(model):
    """Weights with a realistic spectrum, in which an update of the official code does not lie in our bases."""
    for i, module in enumerate(m for m in model.modules() if isinstance(m, torch.nn.Linear)):
        module.weight.data.copy_(realistic(*module.weight.shape, seed=i))
    return model


@pytest.fixture(scope="module")
def encoder():
    transformers = pytest.importorskip("transformers")
    config = transformers.RobertaConfig(
        vocab_size=60, hidden_size=160, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=40, num_labels=3,
    )  # fmt: skip
    torch.manual_seed(0)
    return spread(transformers.RobertaForSequenceClassification(config).eval())


@pytest.mark.parametrize("bases", ["file", "official", "auto"])
def test_an_official_folder_gives_the_same_logits(encoder, tmp_path, bases):
    want = official_folder(encoder, tmp_path, labels=3)
    ids = torch.randint(3, 60, (3, 9))
    model = import_peft(copy.deepcopy(encoder), tmp_path, bases=bases)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, want(ids).logits, rtol=0, atol=1e-5)
        assert (want(ids).logits - encoder(ids).logits).abs().max() > 0.05
    save_adapter(model, tmp_path / "ours")
    info = describe_adapter(tmp_path / "ours")
    assert info.stored_bases is (bases == "file")
    assert info.config.svd == ("randomized" if bases == "file" else "official")


def test_auto_takes_the_file_s_where_nothing_else_is_exact(encoder, tmp_path):
    official_folder(encoder, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = {k: v + 0.05 * torch.randn_like(v) if "lora_A" in k else v for k, v in load_file(file).items()}
    save_file(tensors, file)
    model = import_peft(copy.deepcopy(encoder), tmp_path, bases="auto")
    assert not any(layer.regenerable for _, layer in layers(model))
    with pytest.raises(LoRAXSError, match=r"lies outside the SVD bases .*bases=\"file\""):
        import_peft(copy.deepcopy(encoder), tmp_path, bases="official")


def test_a_start_on_another_task_keeps_its_head(encoder, tmp_path):
    official_folder(encoder, tmp_path, labels=3)
    other = copy.deepcopy(encoder)
    other.classifier.out_proj = torch.nn.Linear(160, 2)
    before = {n: p.clone() for n, p in other.classifier.named_parameters()}
    import_peft(other, tmp_path, bases="auto", head=("classifier",))
    trained = dict(other.classifier.named_parameters())
    assert all(torch.equal(trained[n], p) and trained[n].requires_grad for n, p in before.items())


@pytest.mark.slow
def test_the_command_makes_an_adapter(encoder, tmp_path):
    base, out = tmp_path / "base", tmp_path / "adapter"
    encoder.save_pretrained(base)
    want = official_folder(encoder, tmp_path / "official", labels=3)
    words = ["lora-xs", "import", "official", "--model", "base", "--out", "adapter"]
    done = run_command(words, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "by the SVD (official), not stored" in done.stdout
    ids = torch.randint(3, 60, (3, 9))
    model = load_adapter(copy.deepcopy(encoder), out).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, want(ids).logits, rtol=0, atol=1e-5)
    assert json.loads((out / "task.json").read_text())["num_labels"] == 3
    assert (out / "adapter.safetensors").stat().st_size < 3000
    again = run_command(words, tmp_path)
    assert again.returncode == 2
    assert "is not empty" in again.stderr
    stored = run_command([*words[:-1], "stored", "--bases", "file"], tmp_path)
    assert "from the file, stored" in stored.stdout


def test_warm_up_is_rounded_as_each_official_run_does():
    assert [glue.warmup_steps(0.06, n) for n in (16, 17, 50, 160)] == [0, 1, 3, 9]
    assert [schedule.warmup_steps(0.02, n) for n in (50, 51, 1562)] == [1, 2, 32]
