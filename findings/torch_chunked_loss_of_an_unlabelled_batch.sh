#!/usr/bin/env bash
# torch 2.15.0: in chunks, linear_cross_entropy has NaN as its gradients where a batch has no label; cross_entropy has zeros.
#
# A batch whose every target is ignore_index (a long prompt that was cut off before its answer, a document of padding) has no
# mean: both losses are NaN. The gradients of cross_entropy are zero all the same, and so are those of
# torch.nn.functional.linear_cross_entropy without options: such a batch changes no weight. With
# LinearCrossEntropyOptions(), which computes the gradients in the forward pass, they are NaN, and one step later so is the model.
#
# Expected: the same gradients with options and without; seen: zeros without, NaN with.
set -euo pipefail
export PIP_CONFIG_FILE=/dev/null  # the versions named here, whatever this machine's own settings prefer
unset PIP_CONSTRAINT PIP_FIND_LINKS
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.15.0 numpy
cat > "$folder/seen.py" <<'PYTHON'
import torch
from torch.nn import LinearCrossEntropyOptions
from torch.nn.functional import cross_entropy, linear, linear_cross_entropy

torch.manual_seed(0)
x, w = torch.randn(48, 32), torch.randn(200, 32)


def gradients(loss_of, targets):
    inputs = [t.clone().requires_grad_() for t in (x, w)]
    loss = loss_of(*inputs, targets)
    return loss.item(), *torch.autograd.grad(loss, inputs)


ways = {
    "cross_entropy": lambda x, w, y: cross_entropy(linear(x, w), y),
    "linear_cross_entropy": linear_cross_entropy,
    "in chunks": lambda x, w, y: linear_cross_entropy(x, w, y, options=LinearCrossEntropyOptions()),
}
few = torch.full((48,), -100)
few[5] = 7  # one label is enough: all agree
dense = gradients(ways["cross_entropy"], few)
assert all(torch.allclose(a, b, atol=1e-5) for way in ways.values() for a, b in zip(gradients(way, few)[1:], dense[1:]))
for name, way in ways.items():
    loss, dx, dw = gradients(way, torch.full((48,), -100))
    print(f"{name}: loss {loss}, largest gradients {dx.abs().max().item()} and {dw.abs().max().item()}")
    assert loss != loss
    if name == "in chunks":
        assert dx.isnan().all() and dw.isnan().all()
    else:
        assert not dx.any() and not dw.any()
PYTHON
"$folder/venv/bin/python" "$folder/seen.py"
