#!/usr/bin/env bash
# torch 2.15.0: asking for an optimizer's state by distributed.checkpoint's function before the first step changes the training.
#
# get_optimizer_state_dict (and get_state_dict) reads the state for a checkpoint. Where there is none yet it makes one: it takes
# a step with gradients of zero and a rate of zero. The weights stay, and so does what that step left behind: a count of 1,
# moments decayed once, Rprop's and ASGD's own step sizes. A checkpoint "of step 0" makes AdamW's first real step a quarter
# smaller; Rprop's and ASGD's hardly moves a weight.
#
# Expected: reading changes nothing, as with optimizer.state_dict(); seen: the first step with it and without differ.
set -euo pipefail
export PIP_CONFIG_FILE=/dev/null  # the versions named here, whatever this machine's own settings prefer
unset PIP_CONSTRAINT PIP_FIND_LINKS
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.15.0 numpy
cat > "$folder/seen.py" <<'PYTHON'
import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict


def first_step(optimizer_class, read):
    """The largest change of a weight in the first step, after its optimizer's state was read."""
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 4)
    optimizer = optimizer_class(model.parameters(), lr=0.1)
    read(model, optimizer)
    before = model.weight.detach().clone()
    model(torch.ones(2, 4)).square().sum().backward()
    optimizer.step()
    return (model.weight.detach() - before).abs().max().item()


ratios = {}
for name in ("SGD", "AdamW", "RAdam", "Rprop", "ASGD"):
    optimizer_class = getattr(torch.optim, name)
    untouched = first_step(optimizer_class, lambda model, optimizer: None)
    plain = first_step(optimizer_class, lambda model, optimizer: optimizer.state_dict())
    found = first_step(optimizer_class, get_optimizer_state_dict)
    ratios[name] = found / untouched
    print(f"{name}: first step {untouched:.4f}, after state_dict() {plain:.4f}, after get_optimizer_state_dict() {found:.4f}")
    assert plain == untouched
assert ratios["SGD"] == 1 and 0.7 < ratios["AdamW"] < 0.8 and ratios["RAdam"] < 0.6
assert ratios["Rprop"] < 1e-3 and ratios["ASGD"] < 1e-3
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/seen.py"
