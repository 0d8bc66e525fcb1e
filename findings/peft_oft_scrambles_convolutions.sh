#!/usr/bin/env bash
# PEFT 0.21.2: an OFT adapter that was not trained yet scrambles the input of a 3x3 convolution.
#
# OFT starts as the identity. For a convolution it cuts the input into patches of the kernel's size, rotates them, and puts them
# together again before the base's convolution. The patches overlap and are added up: within the image a value counts 9 times.
# They are also put together in another order than they were cut in, so that one pixel lands in six rows of the image. It is
# this that is trained. merge_and_unload() turns the kernel instead, as the paper means it, and so gives another model:
# merging an untrained adapter gives the base back, to the bit. Kernels of 1x1 are right both ways.
#
# Expected: the base's output before training, and the same output merged; seen: neither.
set -euo pipefail
export PIP_CONFIG_FILE=/dev/null  # the versions named here, whatever this machine's own settings prefer
unset PIP_CONSTRAINT PIP_FIND_LINKS
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.15.0 peft==0.21.2 transformers==5.23.0 numpy
cat > "$folder/seen.py" <<'PYTHON'
import torch
from peft import OFTConfig, get_peft_model
from torch import nn

torch.manual_seed(0)
x = torch.randn(2, 4, 8, 8)
pixel = torch.zeros(1, 4, 8, 8)
pixel[0, 0, 4, 4] = 1
for size in (1, 3):
    conv = nn.Conv2d(4, 8, size, padding=size // 2).requires_grad_(False)
    base = conv(x)
    model = get_peft_model(nn.Sequential(conv), OFTConfig(oft_block_size=4, target_modules=["0"])).eval()
    inputs = []
    handle = conv.register_forward_pre_hook(lambda module, args, inputs=inputs: inputs.append(args[0].detach()))
    model(pixel), model(torch.ones_like(pixel))
    handle.remove()
    untrained = (model(x) - base).abs().max().item()
    model.merge_adapter()
    assert torch.equal(model(x), base)
    model.unmerge_adapter()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.normal_(std=0.01)  # a little training
    trained = model(x).detach()
    merged = model.merge_and_unload()(x)
    places, counts = inputs[0].nonzero()[:, 2:].tolist(), inputs[1][0, 0].unique().int().tolist()
    print(f"{size}x{size}: largest output {base.abs().max():.2f}; an untrained adapter changes it by {untrained:.2f}")
    print(f"    a pixel at [4, 4] reaches the convolution at {places}, and a value counts {counts} times")
    moved = [round((y - base).abs().max().item(), 2) for y in (trained, merged)]
    print(f"    a little training: the output is {moved[0]} from the base's, merged {moved[1]}")
    if size == 1:
        assert untrained == 0 and places == [[4, 4]] and torch.allclose(merged, trained, atol=1e-5)
    else:
        assert untrained > 1 and len(places) > 1 and max(counts) == 9
        assert moved[0] > 10 * moved[1]
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/seen.py"
