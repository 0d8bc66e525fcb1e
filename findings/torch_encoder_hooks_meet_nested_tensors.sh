#!/usr/bin/env bash
# torch 2.15.0: in evaluation nn.TransformerEncoder hands nested tensors to its layers, so a forward hook of a layer in it fails.
#
# With batch_first, a padding mask, evaluation and frozen weights the encoder turns the batch into a nested tensor. When a layer in
# it has a forward hook, that layer leaves its fused path but still gets the nested tensor, and its hooks see nested outputs. An
# adapter that adds a dense tensor to a linear layer's output (what LoRA implementations by hooks do) works in training and
# raises in evaluation. enable_nested_tensor=False at construction avoids it.
#
# Expected: y + b in a hook works in evaluation as in training; seen: RuntimeError on nested and non-nested operands.
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


def encoder(**more):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    model = nn.TransformerEncoder(layer, 2, **more).requires_grad_(False)
    bias = nn.Parameter(torch.zeros(32))
    model.layers[1].linear1.register_forward_hook(lambda module, args, y: y + bias)
    return model


x = torch.randn(2, 5, 16)
padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
print(f"torch {torch.__version__}: training: {tuple(encoder().train()(x, src_key_padding_mask=padding).shape)}")
model = encoder(enable_nested_tensor=False).eval()
print(f"evaluation without nested tensors: {tuple(model(x, src_key_padding_mask=padding).shape)}")
try:
    encoder().eval()(x, src_key_padding_mask=padding)
except RuntimeError as error:
    print(f"evaluation: RuntimeError: {error}")
else:
    raise SystemExit(1)
PYTHON
if ! "$folder/venv/bin/python" -W ignore "$folder/seen.py"; then
    echo "changed: hooks meet dense tensors now" >&2
    exit 1
fi
echo "as described: the hook works in training and raises in evaluation"
