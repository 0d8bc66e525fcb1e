#!/usr/bin/env bash
# torch 2.15.0: on the CPU, dropout_p > 0 makes scaled_dot_product_attention keep what grows with the square of the length.
#
# scaled_dot_product_attention is chosen so that the matrix of probabilities is never kept. On the CPU its fused kernel has no
# dropout: with dropout_p=0.1, a usual value in fine-tuning, the call is answered by the written-out attention, which saves
# the probabilities and the mask. No warning says so.
#
# Expected: a mask more at the most; seen: 95 times the bytes at 1,024 tokens, and 16 times as many for 4 times the length.
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


def saved_bytes(length, dropout):
    q, k, v = (torch.randn(1, 4, length, 32, requires_grad=True) for _ in range(3))
    storages = {}

    def pack(t):
        storages[t.untyped_storage().data_ptr()] = (t.untyped_storage().nbytes(), t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
    own = {t.untyped_storage().data_ptr() for t in (q, k, v)}
    return sum(n for p, (n, _) in storages.items() if p not in own), y


for length in (256, 512, 1024):
    plain, dropped = saved_bytes(length, 0.0)[0], saved_bytes(length, 0.1)[0]
    print(f"{length:5} tokens: {plain:>10,} bytes saved without dropout, {dropped:>11,} with dropout 0.1 ({dropped / plain:.0f}x)")
short, long = saved_bytes(256, 0.1)[0], saved_bytes(1024, 0.1)[0]
assert long > 12 * short, (short, long)  # quadratic: 16 times for 4 times the length
assert saved_bytes(1024, 0.0)[0] < 5 * saved_bytes(256, 0.0)[0]  # linear
PYTHON
if ! "$folder/venv/bin/python" -W ignore "$folder/seen.py"; then
    echo "changed: attention dropout keeps memory linear now" >&2
    exit 1
fi
echo "as described: memory is quadratic with dropout and linear without"
