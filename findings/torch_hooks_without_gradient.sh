#!/usr/bin/env bash
# torch 2.15.0: hooks of a parameter are called although no gradient for it was computed, with None.
#
# A torch.autograd.Function may return None for an input that needs a gradient: this backward pass has none for it. The
# parameter's hooks run all the same. Tensor.register_hook, documented as called "every time a gradient with respect to the
# Tensor is computed" with a Tensor, is handed None, and register_post_accumulate_grad_hook finds .grad to be None.
#
# Expected: no call; seen: both are called once. A hook that scales or projects its gradient, as optimizers that step inside
# the backward pass have, raises there.
set -euo pipefail
export PIP_CONFIG_FILE=/dev/null  # the versions named here, whatever this machine's own settings prefer
unset PIP_CONSTRAINT PIP_FIND_LINKS
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.15.0 numpy
cat > "$folder/seen.py" <<'PYTHON'
import torch


class InputAlone(torch.autograd.Function):
    """A product whose backward pass gives the input's gradient, and the weight's elsewhere."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(w)
        return x @ w

    @staticmethod
    def backward(ctx, dy):
        (w,) = ctx.saved_tensors
        return dy @ w.T, None


heard = []
x = torch.randn(2, 3, requires_grad=True)
w = torch.nn.Parameter(torch.randn(3, 3))
unused = torch.nn.Parameter(torch.randn(3, 3))
for name, p in (("w", w), ("unused", unused)):
    p.register_hook(lambda gradient, name=name: heard.append((name, "hook", gradient)))
    p.register_post_accumulate_grad_hook(lambda p, name=name: heard.append((name, "post-accumulate hook", p.grad)))
InputAlone.apply(x, w).sum().backward()
for call in heard:
    print(*call)
assert x.grad is not None and w.grad is None
assert heard == [("w", "hook", None), ("w", "post-accumulate hook", None)], heard
PYTHON
"$folder/venv/bin/python" "$folder/seen.py"
