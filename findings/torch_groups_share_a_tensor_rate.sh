#!/usr/bin/env bash
# torch 2.15.0: parameter groups that take a learning rate given as a tensor share that one tensor, and each change of it hits all.
#
# A rate may be a tensor, so that a compiled step need not be compiled anew when it changes. Groups without a rate of their own
# (weights with and without decay, say) get the same tensor, not a copy. Schedulers write into it: ReduceLROnPlateau cuts it once
# for each group, so two groups quarter the rate where a half was asked for, and of LambdaLR's functions the last one's rate is
# everybody's. So does group["lr"] *= 0.5 in a loop. Two optimizers made with one tensor share it too. With a number
# for a rate, or a tensor for each group, all is as asked.
#
# Expected: the rates that a number gives; seen: others, without a warning.
set -euo pipefail
export PIP_CONFIG_FILE=/dev/null  # the versions named here, whatever this machine's own settings prefer
unset PIP_CONSTRAINT PIP_FIND_LINKS
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.15.0 numpy
cat > "$folder/seen.py" <<'PYTHON'
import torch
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau


def plateau(optimizer):
    scheduler = ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    scheduler.step(1.0)
    scheduler.step(1.0)  # no better: one cut


def two_functions(optimizer):
    LambdaLR(optimizer, [lambda epoch: 1.0, lambda epoch: 0.1])


def by_hand(optimizer):
    for group in optimizer.param_groups:
        group["lr"] *= 0.5


def rates_after(change, rate, own=False):
    """The rates of a group with weight decay and one without, after the change."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(4, 4)
    groups = [{"params": [layer.weight], "weight_decay": 0.1}, {"params": [layer.bias], "weight_decay": 0.0}]
    if own:
        for group in groups:
            group["lr"] = rate.clone()
    optimizer = torch.optim.AdamW(groups, lr=rate)
    change(optimizer)
    return [round(float(group["lr"]), 4) for group in optimizer.param_groups]


for change, asked, shared in (
    (plateau, [0.5, 0.5], [0.25, 0.25]),
    (two_functions, [1.0, 0.1], [0.1, 0.1]),
    (by_hand, [0.5, 0.5], [0.25, 0.25]),
):
    number, one, own = (
        rates_after(change, 1.0),
        rates_after(change, torch.tensor(1.0)),
        rates_after(change, torch.tensor(1.0), own=True),
    )
    print(f"{change.__name__}: rates {number} from a number, {own} from a tensor for each, {one} from one tensor")
    assert number == own == asked and one == shared
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/seen.py"
