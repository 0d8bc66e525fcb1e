#!/usr/bin/env bash
# torch 2.15.0: under saved_tensors_hooks that return what they get, an operation that saves its own output is never freed.
#
# exp, tanh, sigmoid and softmax need their output in the backward pass. Autograd saves an output without a reference to its own
# node, which would be a cycle. Hooks get a tensor that has the node; pack hooks that return it unchanged (to count bytes, say)
# put a cycle into C++ that Python's garbage collector cannot see. The graph lives on until a backward pass frees it, so a
# loss that is computed and not used leaks all its activations.
#
# Expected: hooks that change nothing change nothing; seen: the output is alive after gc.collect(). Returning t.detach() avoids it.
set -euo pipefail
export PIP_CONFIG_FILE=/dev/null  # the versions named here, whatever this machine's own settings prefer
unset PIP_CONSTRAINT PIP_FIND_LINKS
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.15.0 numpy
cat > "$folder/seen.py" <<'PYTHON'
import gc
import weakref

import torch


def is_kept(pack):
    x = torch.randn(8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = x.exp()  # its backward pass needs its own output
    alive = weakref.ref(y)
    del x, y
    gc.collect()
    return alive() is not None


x = torch.randn(8, requires_grad=True)
y = x.exp()
plain = weakref.ref(y)
del x, y
gc.collect()
print(f"torch {torch.__version__}: alive without hooks: {plain() is not None}")
print(f"alive under identity hooks: {is_kept(lambda t: t)}; under detaching hooks: {is_kept(lambda t: t.detach())}")
assert plain() is None
assert is_kept(lambda t: t)
assert not is_kept(lambda t: t.detach())
PYTHON
if ! "$folder/venv/bin/python" -W ignore "$folder/seen.py"; then
    echo "changed: identity hooks keep nothing alive now" >&2
    exit 1
fi
echo "as described: identity hooks keep the graph alive, detaching ones do not"
