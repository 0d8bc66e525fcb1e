"""Two gloo processes against one: DistributedDataParallel, InBackward with a process group, FSDP2."""

import parallel_worker
import problems
import pytest
import torch
from galore_vit import GaLoreAdamW, GaLoreAdamW8bit, projected_all_reduce
from support import run_ranks

KINDS = ["std", "full"]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What the two processes found, by mode and projection type: one start for all cases."""
    folder = tmp_path_factory.mktemp("two")
    run_ranks(2, parallel_worker.both_modes_and_kinds, str(folder / "meet"), str(folder))
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.fixture(scope="module", params=KINDS)
def alone(request):
    """The same training in one process on whole batches: (type, weights, gradient norms)."""
    model = problems.mlp().double()
    optimizer = GaLoreAdamW(problems.mlp_groups(model, proj_type=request.param), lr=1e-2)
    norms = []
    for step in range(parallel_worker.STEPS):
        problems.backward(model, step, 2 * parallel_worker.HALF)
        norms.append(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]))
        optimizer.step()
        optimizer.zero_grad()
    return request.param, list(model.parameters()), torch.stack(norms)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "in_backward", "in_backward_exact", "in_backward_factored", "fsdp"])
def test_two_processes_equal_one(two, alone, mode):
    kind, weights, _ = alone
    first, second = (found[f"{mode} {kind}"] for found in two)
    assert problems.same(first["weights"], second["weights"])
    assert problems.same(first["bases"], second["bases"])
    # in_backward sends whole gradients for a basis, and finds it from the same mean
    assert problems.same(first["weights"], weights, rtol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "in_backward"])
def test_the_projected_gradient_is_what_is_reduced(two, mode):
    model = problems.mlp()
    matrices = [p for p in model.parameters() if p.ndim == 2]
    plain = sum(p.numel() for p in model.parameters() if p.ndim < 2)
    full = sum(p.numel() for p in matrices)
    compact = sum(5 * max(p.shape) for p in matrices)
    sketches = sum(16 * max(p.shape) for p in matrices) if mode == "in_backward" else 0
    refreshed = 3 * full  # in 25 steps with a gap of 20 a basis is found at the first, and at one or two later
    sent = two[0][f"{mode} std"]["sent"]
    assert sent <= parallel_worker.STEPS * (plain + compact + sketches) + refreshed
    if mode == "ddp":
        assert sent < 0.7 * parallel_worker.STEPS * (plain + full)


@pytest.mark.slow
def test_norm_over_processes(two, alone):
    kind, _, norms = alone
    found = two[0][f"in_backward {kind}"]["norms"]
    assert ((found / norms - 1).abs() < 0.25).all()  # a sketch of three small matrices
    assert abs(float((found / norms).mean()) - 1) < 0.05
    assert torch.allclose(two[0][f"in_backward_exact {kind}"]["norms"], norms, rtol=1e-9)


@pytest.mark.slow
def test_fsdp_shards_the_state_and_saves_it_whole(two):
    model = problems.mlp()
    optimizer = GaLoreAdamW(problems.mlp_groups(model), lr=1e-2)
    problems.backward(model, 0)
    optimizer.step()
    whole = sum(v.numel() for s in optimizer.state.values() for k, v in s.items() if k not in ("step", "refresh_at"))
    assert two[0]["fsdp std"]["local_state"] < 0.75 * whole
    assert two[0]["fsdp std"]["saved"] == ["Q", "exp_avg", "exp_avg_sq", "refresh_at", "step"]


@pytest.mark.slow
@pytest.mark.parametrize("optimizer_type", parallel_worker.WIDE)
def test_8_bit_and_factored_moments_are_sharded_too(two, optimizer_type):
    alone = parallel_worker.wide(optimizer_type, None)
    first, second = (found[f"wide {optimizer_type.__name__}"] for found in two)
    assert problems.same(first["weights"], second["weights"])
    assert problems.same(first["weights"], alone["weights"], rtol=1e-5)
    assert first["keys"] == alone["keys"]
    undisturbed = two[0][f"wide {optimizer_type.__name__}, undisturbed"]
    assert problems.same(first["weights"], undisturbed["weights"])  # to the bit, on two processes
    if optimizer_type is GaLoreAdamW8bit:
        assert sum("exp_avg_codes" in keys for keys in alone["keys"]) == 3
        # R of the wide weight, its basis and the plain weight's moments
        assert first["local_bytes"] < 0.7 * alone["local_bytes"]


@pytest.mark.slow
@pytest.mark.parametrize("optimizer_type", parallel_worker.ONE_ROW)
def test_weights_of_one_row_are_sharded_too(two, optimizer_type):
    alone = parallel_worker.one_row(optimizer_type, None)
    for found in two:
        assert problems.same(found[f"one row {optimizer_type.__name__}"], alone, rtol=1e-6)


@pytest.mark.slow
def test_moments_that_do_not_shard_in_blocks_stay_fp32_and_say_so(two):
    (warning,) = two[0]["uneven"]
    assert "130×32" in warning
    assert "fp32" in warning


@pytest.mark.slow
def test_fsdp_refuses_what_it_cannot_shard(two):
    refused = two[0]["fsdp std"]["refused"]
    words = ["residual", "residual", "split"]
    assert all(w in m and "sharded by FSDP2" in m for w, m in zip(words, refused, strict=True))


def test_processes_that_nobody_averages_are_named(two):
    warned, refused = two[0]["ddp std"]["said"]
    assert "one of 2 processes" in warned
    assert "each trains a model of its own" in warned
    assert "give the model that is in it, and process_group" in refused


def test_residual_is_refused():
    optimizer = GaLoreAdamW(problems.mlp_groups(problems.mlp()), residual=True)
    with pytest.raises(ValueError, match="residual"):
        projected_all_reduce(optimizer)
