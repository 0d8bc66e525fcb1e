#!/usr/bin/env bash
# torch 2.15.0: on the CPU, dropout saves a mask of the activations' own type: 4 bytes an element in float32, not 1.
#
# A dropped-or-not flag is one bit, and on CUDA the fused kernel keeps a bool tensor: one byte. On the CPU dropout is a product with
# a tensor that holds 0 or 1/(1 - p), and autograd saves that tensor. So in float32 a dropout layer keeps as much as the
# activation it acts on.
#
# Expected: 1 byte an element; seen: 4 in float32, 2 in bfloat16.
set -euo pipefail
export PIP_CONFIG_FILE=/dev/null  # the versions named here, whatever this machine's own settings prefer
unset PIP_CONSTRAINT PIP_FIND_LINKS
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.15.0 numpy
cat > "$folder/seen.py" <<'PYTHON'
import torch
import torch.nn.functional as F


def saved_bytes(x, call):
    storages = {}

    def pack(t):
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = call(x)
    del y
    return sum(storages.values())


x = torch.randn(1000, 1000, requires_grad=True)
for dtype in (torch.float32, torch.bfloat16):
    n = saved_bytes(x.detach().to(dtype).requires_grad_(), lambda t: F.dropout(t, 0.1))
    print(f"torch {torch.__version__}: dropout on the CPU in {dtype} saves {n / x.numel():.2f} bytes per element")
    assert n == x.numel() * dtype.itemsize, n
PYTHON
if ! "$folder/venv/bin/python" -W ignore "$folder/seen.py"; then
    echo "changed: the mask has another size now" >&2
    exit 1
fi
echo "as described: the mask has the size of the activation"
