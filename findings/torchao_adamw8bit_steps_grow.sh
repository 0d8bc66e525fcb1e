#!/usr/bin/env bash
# torchao 0.18.0 with torch 2.15.0: AdamW8bit's steps grow to 20 to 60 times AdamW's where gradients of one block differ much.
#
# Its second moment V is kept as 8-bit codes with one scale for 256 numbers. The least code above zero is 3e-7 of the block's
# largest V: a gradient below 1/1800 of the block's largest has V rounded to zero, while its first moment M stays. The step
# M / (sqrt(V) + eps) then divides by the present gradient alone. Such blocks are met in practice: a small vision
# transformer had them from its first steps on, and did not learn.
#
# Expected: about AdamW's steps, whose size does not depend on the gradient's; seen: equal to a ratio of 500 within a block,
# from 2,000 on 20 times AdamW's and more.
set -euo pipefail
export PIP_CONFIG_FILE=/dev/null  # the versions named here, whatever this machine's own settings prefer
unset PIP_CONSTRAINT PIP_FIND_LINKS
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.15.0 torchao==0.18.0 numpy
cat > "$folder/seen.py" <<'PYTHON'
import torch
from torchao.optim import AdamW8bit

BLOCKS, SIZE, STEPS, RATE = 16, 256, 200, 1e-3


def last_steps(optimizer_class, rate, ratio):
    """Mean size of the last 20 steps of the numbers with small gradients, in units of the rate."""
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.zeros(BLOCKS * SIZE))
    spread = torch.full((BLOCKS, SIZE), 1 / ratio)
    spread[:, 0] = 1.0
    optimizer = optimizer_class([p], lr=rate, weight_decay=0.0)
    sizes = []
    for _ in range(STEPS):
        p.grad = (spread * torch.randn(BLOCKS, SIZE)).flatten()
        before = p.detach().clone()
        optimizer.step()
        sizes.append(((p.detach() - before).view(BLOCKS, SIZE)[:, 1:].abs().mean() / RATE).item())
    return sum(sizes[-20:]) / 20


torch.compiler.set_stance("force_eager")  # the same rule without a compiler
found = {}
for ratio in (100, 500, 2_000, 10_000, 100_000):
    plain = last_steps(torch.optim.AdamW, RATE, ratio)
    eight = last_steps(AdamW8bit, torch.tensor(RATE), ratio)
    found[ratio] = eight / plain
    print(f"one gradient of 256 is {ratio:>7,} times the others: AdamW {plain:.2f}, AdamW8bit {eight:.2f} rates a step")
assert found[100] < 1.3 and found[500] < 1.3, found
assert min(found[2_000], found[10_000], found[100_000]) > 10, found
print("the second moment of small gradients is zero")
PYTHON
"$folder/venv/bin/python" "$folder/seen.py"
