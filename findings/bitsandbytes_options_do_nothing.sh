#!/usr/bin/env bash
# bitsandbytes 0.50.2: SGD's nesterov and dampening, RMSprop's momentum and Adam's amsgrad do nothing, and LARS8bit is SGD.
#
# The optimizers take these options by torch's names and describe them as torch does, and no update looks at them: with
# nesterov=True, dampening=0.9, momentum=0.9 or amsgrad=True the weights are those without it, to the bit. (RMSprop refuses
# centered=True and Adam8bit refuses amsgrad=True.) LARS has a max_unorm of 0.02 that limits an update to 2 % of its weight's
# norm; updates of 8-bit state have no limit, and LARS8bit is SGD8bit to the bit, whatever max_unorm is. LAMB8bit says so of
# itself, LARS8bit does not. Run on the CPU here; nesterov, amsgrad and the limit for 8-bit state reach no device's code.
#
# Expected: torch's steps for the same options, as they are without them; seen: RMSprop's with momentum are less than a fifth of
# torch's, and LARS8bit's 50 times LARS's.
set -euo pipefail
export PIP_CONFIG_FILE=/dev/null  # the versions named here, whatever this machine's own settings prefer
unset PIP_CONSTRAINT PIP_FIND_LINKS
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.15.0 bitsandbytes==0.50.2 numpy
cat > "$folder/seen.py" <<'PYTHON'
import bitsandbytes.optim as b
import torch
import torch.optim as t

torch.manual_seed(0)
start = torch.randn(64, 64)  # 4,096 numbers: enough for 8-bit state
gradients = [torch.randn(64, 64) * 0.7**i for i in range(8)]  # they get smaller, which amsgrad looks at


def moved(optimizer_class, **options):
    """How far eight steps with the same gradients move each number."""
    p = torch.nn.Parameter(start.clone())
    optimizer = optimizer_class([p], lr=0.01, **options)
    for gradient in gradients:
        p.grad = gradient.clone()
        optimizer.step()
    return p.detach() - start


def mean(x):
    return x.abs().mean().item()


for ours, torchs, options, more in (
    (b.SGD, t.SGD, {"momentum": 0.9}, {"nesterov": True}),
    (b.SGD, t.SGD, {"momentum": 0.9}, {"dampening": 0.9}),
    (b.SGD8bit, None, {"momentum": 0.9}, {"nesterov": True, "dampening": 0.0}),
    (b.RMSprop, t.RMSprop, {}, {"momentum": 0.9}),
    (b.RMSprop8bit, None, {}, {"momentum": 0.9}),
    (b.Adam, t.Adam, {"betas": (0.9, 0.9)}, {"amsgrad": True}),
):
    without, added = moved(ours, **options), moved(ours, **options, **more)
    print(f"{ours.__name__}: mean move {mean(without):.4f}, and {mean(added):.4f} with {more}", end="")
    assert torch.equal(without, added)
    if torchs is not None:
        should = moved(torchs, **options, **more)
        print(f"; torch's {mean(moved(torchs, **options)):.4f}, and {mean(should):.4f}")
        assert torch.allclose(without, moved(torchs, **options), atol=1e-5)
        assert abs(mean(should) / mean(added) - 1) > 0.05
    else:
        print()
lars, sgd8 = moved(b.LARS, momentum=0.9), moved(b.SGD8bit, momentum=0.9)
print(f"LARS: mean move {mean(lars):.4f}", end="")
for limit in (0.02, 0.0001):
    lars8 = moved(b.LARS8bit, momentum=0.9, max_unorm=limit)
    print(f"; LARS8bit with max_unorm={limit}: {mean(lars8):.4f}", end="")
    assert torch.equal(lars8, sgd8) and mean(lars8) > 10 * mean(lars)
print(f"; SGD8bit: {mean(sgd8):.4f}")
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/seen.py"
