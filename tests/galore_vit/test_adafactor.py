"""GaLoreAdafactor beyond parity: refused options, bfloat16, rotation."""

import problems
import pytest
import torch
from galore_vit import GaLoreAdafactor, Refresh


@pytest.mark.parametrize(("options", "match"), [
    ({"lr": 1e-3}, "relative_step"), ({"relative_step": False}, "lr"),
    ({"relative_step": False, "lr": 1e-3, "warmup_init": True}, "warmup_init"), ({"beta1": 1.0}, "beta1"),
    ({"clip_threshold": 0.0}, "clip_threshold"),
])  # fmt: skip
def test_refused_options(options, match):
    with pytest.raises(ValueError, match=match):
        GaLoreAdafactor(problems.weights((8, 8)), **options)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("proj_type", ["std", "full"])
@pytest.mark.parametrize("rotate", [True, False])
def test_learns(plain_bfloat16, dtype, proj_type, rotate):
    params = problems.weights((24, 16), (16, 40), (8, 2, 3, 3), (7,), dtype=dtype)
    options = {"lr": 1e-1, "relative_step": False, "scale_parameter": False}
    refresh = Refresh(rotate=rotate)
    optimizer = GaLoreAdafactor(
        [{"params": params, **problems.KEYS, "proj_type": proj_type}], **options, refresh=refresh
    )
    problems.set_grads(params, 0)
    size = sum(p.grad.norm() for p in params)
    problems.train(optimizer, params, 0, 120)
    problems.set_grads(params, 0)
    assert sum(p.grad.norm() for p in params) < 0.9 * size
    assert all(s["exp_avg_sq_row"].dtype == torch.float32 for p, s in optimizer.state.items() if p.ndim > 1)


def test_rotation_keeps_the_energy_of_the_factors():
    """The column factor keeps its sum within one subspace: a squared rotation is doubly stochastic."""
    [W] = problems.weights((24, 16))
    optimizer = GaLoreAdafactor([{"params": [W], **problems.KEYS}])
    problems.train(optimizer, [W], 0, 3)
    state = optimizer.state[W]
    col = state["exp_avg_sq_col"].clone()
    turn = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(0))).Q
    problems.set_grads([W], 3)
    item = optimizer.item(W)
    optimizer._rotate_moments(item, (None, state["Q"]), (None, turn @ state["Q"]))
    assert not torch.allclose(state["exp_avg_sq_col"], col, rtol=1e-2)
    assert state["exp_avg_sq_col"].sum() == pytest.approx(float(col.sum()), rel=1e-5)
