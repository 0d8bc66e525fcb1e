"""The cache, the process group, and quantised weights."""

import copy
import socket

import lora_xs.bases
import pytest
import torch
from lora_xs import (
    LoRAXSConfig,
    LoRAXSError,
    describe_adapter,
    inject,
    load_adapter,
    merge,
    narrow,
    save_adapter,
    trained,
    unmerge,
)
from lora_xs.kinds import dense
from lora_xs.layer import layers
from lora_xs.svd import svd_bases
from support import run_ranks
from torch import nn


def big():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(512, 300), nn.Tanh(), nn.Linear(300, 512), nn.Linear(512, 20))


CONFIG = LoRAXSConfig(5, targets=("0", "2", "3"))


def bases_of(model):
    return [t for _, layer in layers(model) for t in (layer.A, layer.B)]


@pytest.fixture
def counted(monkeypatch):
    calls = []

    def count(W, rank, **options):
        calls.append(tuple(W.shape))
        return svd_bases(W, rank, **options)

    monkeypatch.setattr(lora_xs.bases, "svd_bases", count)
    return calls


def test_cache_gives_the_same_bytes_without_a_decomposition(tmp_path, counted):
    cold = inject(big(), CONFIG, cache=tmp_path)
    assert len(counted) == 3
    assert len(list(tmp_path.iterdir())) == 2  # the 20×512 one is quicker decomposed than read
    warm = inject(big(), CONFIG, cache=tmp_path)
    assert len(counted) == 4
    assert all(torch.equal(a, b) for a, b in zip(bases_of(cold), bases_of(warm), strict=True))


@pytest.mark.parametrize("change", ["rank", "svd", "weight", "dtype"])
def test_cache_is_keyed_by_all_that_matters(tmp_path, counted, change):
    inject(big(), CONFIG, cache=tmp_path)
    model, config = big(), CONFIG
    if change == "rank":
        config = LoRAXSConfig(4, targets=CONFIG.targets)
    elif change == "svd":
        config = LoRAXSConfig(5, targets=CONFIG.targets, svd="exact")
    elif change == "weight":
        model[0].weight.data[0, 0] += 1e-3
        model[2].weight.data[0, 0] += 1e-3
    else:
        model.to(torch.float16)
    before = len(counted)
    inject(model, config, cache=tmp_path)
    assert len(counted) == before + 3


def test_a_damaged_cache_file_is_replaced(tmp_path, counted):
    cold = inject(big(), CONFIG, cache=tmp_path)
    file = sorted(tmp_path.iterdir())[0]
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.warns(UserWarning, match="truncated.* computed again"):
        again = inject(big(), CONFIG, cache=tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(bases_of(cold), bases_of(again), strict=True))
    before = len(counted)
    inject(big(), CONFIG, cache=tmp_path)
    assert len(counted) == before + 1


def test_no_cache_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_XS_CACHE", str(tmp_path / "c"))
    inject(big(), CONFIG, cache=False)
    assert not (tmp_path / "c").exists()
    inject(big(), CONFIG)
    assert (tmp_path / "c").exists()


def test_a_cache_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="could not be cached"):
        inject(big(), CONFIG, cache=tmp_path / "file")


def test_progress_is_reported():
    seen = []
    inject(big(), CONFIG, progress=lambda *step: seen.append(step))
    assert seen == [(1, 3, "0"), (2, 3, "2"), (3, 3, "3")]


def _work(rank, port, folder):
    import os

    import torch.distributed as dist

    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "LORA_XS_CACHE": f"{folder}/cache"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    calls = []
    honest = lora_xs.bases.svd_bases

    def skewed(W, r, **options):
        """As a machine would whose last bits differ."""
        calls.append(1)
        A, B = honest(W, r, **options)
        return A + rank * 1e-4, B + rank * 1e-4

    lora_xs.bases.svd_bases = skewed
    model = inject(big(), CONFIG)
    torch.save({"bases": bases_of(model), "calls": len(calls)}, f"{folder}/{rank}.pt")
    bad = big()
    bad[2].weight.data[0] = float("nan")  # the layer of process 1
    try:
        inject(bad, CONFIG, cache=False)
        message = "nothing was raised"
    except LoRAXSError as error:
        message = str(error)
    with open(f"{folder}/{rank}.txt", "w") as file:
        file.write(message)
    parallel = nn.parallel.DistributedDataParallel(model)
    x = torch.full((2, 512), float(rank + 1))
    parallel(x).sum().backward()
    torch.save([p.grad for p in trained(model)["R"]], f"{folder}/grad{rank}.pt")
    with torch.no_grad():
        for R in trained(model)["R"]:
            R.copy_(torch.randn(R.shape, generator=torch.Generator().manual_seed(2)) + rank * 1e-5)
    with pytest.raises(LoRAXSError, match="wrap it anew"):
        narrow(parallel, 2)
    narrow(model, 2)
    torch.save([*bases_of(model), *trained(model)["R"]], f"{folder}/narrow{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_share_the_work_and_the_bytes(tmp_path):
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    context = torch.multiprocessing.get_context("fork")
    processes = [context.Process(target=_work, args=(rank, port, tmp_path)) for rank in range(2)]
    for p in processes:
        p.start()
    for p in processes:
        p.join(120)
    assert [p.exitcode for p in processes] == [0, 0]
    a, b = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert (a["calls"], b["calls"]) == (2, 1)
    assert all(torch.equal(x, y) for x, y in zip(a["bases"], b["bases"], strict=True))
    for rank in range(2):
        assert (
            "process 1 could not make its bases: LoRAXSError: 2 has weights" in (tmp_path / f"{rank}.txt").read_text()
        )
    ga, gb = (torch.load(tmp_path / f"grad{rank}.pt") for rank in range(2))
    assert all(torch.equal(x, y) and float(x.abs().max()) > 0 for x, y in zip(ga, gb, strict=True))
    na, nb = (torch.load(tmp_path / f"narrow{rank}.pt") for rank in range(2))
    assert all(torch.equal(x, y) for x, y in zip(na, nb, strict=True))


def _sharded():
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(50, 32), nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 33), nn.Linear(33, 3))
    inject(model, LoRAXSConfig(4, targets=("0", "1", "3"), r_std=0.5, head=("4",)), cache=False)
    whole, ids = copy.deepcopy(model), torch.arange(10)
    want = whole(ids)
    want.pow(2).sum().backward()
    for module in (model[1], model[3], model):
        fully_shard(module)
    out = model(ids)
    out.pow(2).sum().backward()
    assert torch.equal(out, want)
    for group, parameters in trained(model).items():
        for p, q in zip(parameters, trained(whole)[group], strict=True):
            assert type(p) is not type(q)
            torch.testing.assert_close(p.grad.full_tensor(), q.grad)
    with pytest.raises(LoRAXSError, match="before fully_shard"):
        narrow(model, 2)


@pytest.mark.slow
def test_fully_sharded_it_gives_the_same_output_and_gradients():
    run_ranks(2, _sharded)


def quantize(model, bits):
    quantization = pytest.importorskip("torchao.quantization")
    config = {
        8: quantization.Int8WeightOnlyConfig,
        4: lambda: quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4),
    }[bits]()
    quantization.quantize_(model.requires_grad_(False), config)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantised_bases(tmp_path, train_r, bits, dtype):
    base = quantize(big().to(dtype), bits)
    plain = copy.deepcopy(base)
    x = torch.randn(6, 512, dtype=dtype)
    model = inject(base, CONFIG)
    for module, layer in layers(model):
        W = dense(module.weight).float()
        assert layer.A.dtype == dtype
        tolerance = 1e-4 if dtype is torch.float32 else 2e-2
        torch.testing.assert_close(layer.A.float(), layer.B.float().t() @ W, rtol=tolerance, atol=tolerance)
    train_r(model, scale=0.1)
    want = model(x)
    want.float().pow(2).sum().backward()
    assert all(float(p.grad.abs().max()) > 0 for p in trained(model)["R"])
    with torch.autocast("cpu", torch.bfloat16):
        loose = model(x)
    torch.testing.assert_close(loose.float(), want.float(), rtol=0.1, atol=0.1)

    # Against ordinary weights with the same values.
    dequantised = copy.deepcopy(plain)
    for module in dequantised:
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(dense(module.weight), requires_grad=False)
    inject(dequantised, CONFIG)
    for (_, a), (_, b) in zip(layers(dequantised), layers(model), strict=True):
        a.R["default"].data.copy_(b.R["default"])
    torch.testing.assert_close(dequantised(x), want, rtol=2e-2, atol=2e-2 if dtype is torch.bfloat16 else 1e-3)

    merge(model)
    assert type(model[0].weight) is nn.Parameter
    torch.testing.assert_close(model(x), want, rtol=5e-2, atol=5e-2 if dtype is torch.bfloat16 else 1e-3)
    unmerge(model)
    assert torch.equal(model(x), want)

    save_adapter(model, tmp_path)
    assert describe_adapter(tmp_path).stored_bases
    with pytest.raises(LoRAXSError, match="do not follow from the base weights"):
        save_adapter(model, tmp_path, bases=False)
    assert torch.equal(load_adapter(copy.deepcopy(plain), tmp_path)(x), want)
    with pytest.raises(LoRAXSError, match="other base weights"):
        load_adapter(big().to(dtype), tmp_path)
