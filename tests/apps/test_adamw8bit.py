"""8-bit AdamW: its steps beside AdamW's, where gradients of one block differ by many decades."""

import pytest
import torch

pytest.importorskip("torchao")


def weights(optimizer, scale, steps, **options):
    """(2, 64×128): the weight before the last step and after it, under gradients of random sign times ``scale``."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(64, 128))
    made = optimizer([weight], lr=1.0, weight_decay=0.0, **options)
    for _ in range(steps):
        before = weight.detach().clone()
        weight.grad = torch.randn(64, 128, generator=draw) * scale
        made.step()
    return torch.stack([before, weight.detach()]), made


def test_no_step_explodes_where_gradients_of_a_block_span_eight_decades():
    from memtrain_apps.compose.adamw8bit import AdamW8bit

    scale = 10 ** -(torch.rand(64, 128, generator=torch.Generator().manual_seed(1)) * 8)
    (before, after), made = weights(AdamW8bit, scale, steps=20)
    (exact_before, exact_after), _ = weights(torch.optim.AdamW, scale, steps=20)
    assert (after - before).abs().max() < 2 * (exact_after - exact_before).abs().max()
    assert (made.state[made.param_groups[0]["params"][0]]["exp_avg_sq"].codes > 0).all()

    from torchao.optim import AdamW8bit as AsPublished

    with torch.compiler.set_stance("force_eager"):
        (before, after), _ = weights(AsPublished, scale, steps=20)
    assert (after - before).abs().max() > 5 * (exact_after - exact_before).abs().max()  # what is mended here


def test_the_steps_are_adamws_where_gradients_are_alike():
    from memtrain_apps.compose.adamw8bit import AdamW8bit

    (_, ours), _ = weights(AdamW8bit, 1.0, steps=20)
    (_, exact), _ = weights(torch.optim.AdamW, 1.0, steps=20)
    assert (ours - exact).norm() < 0.05 * exact.norm()


def test_what_never_had_a_gradient_stays():
    from memtrain_apps.compose.adamw8bit import AdamW8bit

    scale = torch.ones(64, 128)
    scale[:2] = 0  # one whole block of 256
    scale[5, ::2] = 0  # and parts of another
    (_, after), _ = weights(AdamW8bit, scale, steps=5)
    assert (after[scale == 0] == 0).all()
    assert (after[scale == 1] != 0).all()


@pytest.mark.parametrize(("compiled", "stance"), [(False, "force_eager"), (True, "default")])
def test_on_the_cpu_a_step_is_compiled_only_where_asked(monkeypatch, compiled, stance):
    from memtrain_apps.compose.adamw8bit import AdamW8bit

    real, asked = torch.compiler.set_stance, []
    monkeypatch.setattr(torch.compiler, "set_stance", lambda s: asked.append(s) or real("force_eager"))
    monkeypatch.setattr(AdamW8bit, "compiled_on_cpu", compiled)
    weights(AdamW8bit, 1.0, steps=1)
    assert asked == [stance]
