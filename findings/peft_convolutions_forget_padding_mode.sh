#!/usr/bin/env bash
# PEFT 0.21.2: LoRA on a convolution with padding_mode="reflect" or "circular" pads its own part with zeros.
#
# The adapter's first convolution is made with the base's kernel, stride and padding, but not with its padding_mode or its
# dilation. So the model that is trained is base(x) + LoRA(x, padded with zeros), while merge_and_unload() adds the product to the
# base's kernel, which pads as it always did: the merged model is another one. With dilation=2 the forward pass raises. Plain
# zero padding and a stride are right both ways.
#
# Expected: merging changes no output, as for linear layers; seen: an eighth to a third of it, where nothing warns.
set -euo pipefail
export PIP_CONFIG_FILE=/dev/null  # the versions named here, whatever this machine's own settings prefer
unset PIP_CONSTRAINT PIP_FIND_LINKS
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.15.0 peft==0.21.2 transformers==5.23.0 numpy
cat > "$folder/seen.py" <<'PYTHON'
import torch
from peft import LoraConfig, get_peft_model
from torch import nn


@torch.no_grad()
def apart(layer, x):
    config = LoraConfig(r=4, target_modules=["0"], init_lora_weights=False)
    model = get_peft_model(nn.Sequential(layer), config).eval()
    y = model(x)
    merged = model.merge_and_unload()(x)
    return ((y - merged).norm() / merged.norm()).item()


torch.manual_seed(0)
for layer, x in ((nn.Conv2d, torch.randn(2, 4, 8, 8)), (nn.Conv1d, torch.randn(2, 4, 8))):
    for settings in ({}, {"stride": 2}, {"padding_mode": "reflect"}, {"padding_mode": "circular"}):
        found = apart(layer(4, 8, 3, padding=1, **settings), x)
        print(f"{layer.__name__} {settings or 'as it comes'}: merging changes the output by {found:.1e} of its norm")
        assert found > 0.1 if "padding_mode" in settings else found < 1e-5
    try:
        apart(layer(4, 8, 3, padding=2, dilation=2), x)
    except RuntimeError as error:
        print(f"{layer.__name__} dilation=2: RuntimeError: {error}")
    else:
        raise SystemExit("dilation works now")
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/seen.py"
