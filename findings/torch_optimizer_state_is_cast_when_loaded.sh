#!/usr/bin/env bash
# torch 2.15.0: Optimizer.load_state_dict casts an optimizer's float32 state to the type of a bfloat16 parameter.
#
# Optimizers for bfloat16 weights keep their moments in float32. state_dict() returns and torch.save stores them so; load_state_dict
# casts every floating-point tensor of a parameter's state (other than "step") to the parameter's type. A resumed run has
# moments of 8 bits of precision, in a tensor of another type, without a warning.
#
# Expected: state is loaded as it was saved; seen: float32 becomes bfloat16.
set -euo pipefail
export PIP_CONFIG_FILE=/dev/null  # the versions named here, whatever this machine's own settings prefer
unset PIP_CONSTRAINT PIP_FIND_LINKS
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.15.0 numpy
cat > "$folder/seen.py" <<'PYTHON'
import torch


class Momentum(torch.optim.Optimizer):
    """Keeps its one moment in float32, whatever the weights are in."""

    def __init__(self, params):
        super().__init__(params, {})

    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state.setdefault("moment", torch.zeros(p.shape, dtype=torch.float32)).add_(p.grad.float() / 3)


weight = torch.nn.Parameter(torch.randn(64, dtype=torch.bfloat16))
weight.grad = torch.randn(64).bfloat16()
first = Momentum([weight])
first.step()
saved = first.state_dict()
second = Momentum([weight])
second.load_state_dict(saved)
before, after = saved["state"][0]["moment"], second.state[weight]["moment"]
print(f"torch {torch.__version__}: saved as {before.dtype}, loaded as {after.dtype}")
print(f"largest relative change of a moment: {((after.float() - before) / before).abs().max():.2e}")
assert before.dtype == torch.float32
assert after.dtype == torch.bfloat16
assert not torch.equal(after.float(), before)
PYTHON
if ! "$folder/venv/bin/python" -W ignore "$folder/seen.py"; then
    echo "changed: state keeps its type when it is loaded now" >&2
    exit 1
fi
echo "as described: state is cast to the type of the weights"
