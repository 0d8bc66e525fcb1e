#!/usr/bin/env bash
# torch 2.15.0: within torch.device("cpu"), or after torch.set_default_device, an evaluated nn.TransformerEncoder has other outputs.
#
# In evaluation, with batch_first, frozen weights and a padding mask, the encoder takes a fused path on nested tensors, and what it
# gives for padded positions is 0. It leaves that path wherever a TorchFunctionMode is open, and torch.device(...) as a context and
# torch.set_default_device(...) are such modes, of the device where everything is already. Padded positions then have the numbers
# that the layers compute of them. Other positions agree. A mean over all positions, a usual head, so depends on a line that
# says where new tensors are made.
#
# Expected: a default device that is the model's own changes no output; seen: half of the mean's norm.
set -euo pipefail
export PIP_CONFIG_FILE=/dev/null  # the versions named here, whatever this machine's own settings prefer
unset PIP_CONSTRAINT PIP_FIND_LINKS
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.15.0 numpy
cat > "$folder/seen.py" <<'PYTHON'
import torch
from torch import nn

torch.manual_seed(0)
layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
model = nn.TransformerEncoder(layer, 2).eval().requires_grad_(False)
x = torch.randn(3, 5, 16)
padded = torch.tensor([[False] * 5, [False] * 4 + [True], [False] * 3 + [True] * 2])
plain = model(x, src_key_padding_mask=padded)
with torch.device("cpu"):
    within = model(x, src_key_padding_mask=padded)
torch.set_default_device("cpu")
after = model(x, src_key_padding_mask=padded)
print(f"largest output at padded positions: {plain[padded].abs().max():.2f}, within torch.device {within[padded].abs().max():.2f}")
print(f"largest difference at the others: {(plain - within)[~padded].abs().max():.1e}")
means = plain.mean(1), within.mean(1)
part = ((means[0] - means[1]).norm() / means[0].norm()).item()
print(f"the mean over positions differs by {part:.2f} of its norm")
assert not plain[padded].any() and within[padded].abs().max() > 1 and torch.equal(within, after)
assert (plain - within)[~padded].abs().max() < 1e-5 and part > 0.2
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/seen.py"
