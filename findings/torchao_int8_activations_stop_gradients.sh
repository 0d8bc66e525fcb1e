#!/usr/bin/env bash
# torchao 0.18.0 with PEFT 0.21.2: a layer with int8 weights and activations passes no gradient on, so LoRA below it stands still.
#
# Int8DynamicActivationInt8WeightConfig quantises a layer's input on the fly. Nothing takes the gradient back through that: no
# error, and no gradient for the input, though the output seems to have a graph. Under a LoRA adapter it is the adapter's own
# branch that makes the output differentiable, and in the first step that branch passes on nothing, since B is zero: all adapters
# but the last layer's get exactly zero. Later they get a part of the gradient. PEFT says of such layers that "forward and
# training will work", transformers counts the configuration among those that can be trained on, and with int8 weights alone
# all is right.
#
# Expected: about the gradients of the model that is not quantised; seen: 0 for all adapters but the last.
set -euo pipefail
export PIP_CONFIG_FILE=/dev/null  # the versions named here, whatever this machine's own settings prefer
unset PIP_CONSTRAINT PIP_FIND_LINKS
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.15.0 torchao==0.18.0 peft==0.21.2 transformers==5.23.0 numpy
cat > "$folder/seen.py" <<'PYTHON'
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_


def gradients(config):
    """Norms of the gradients of three layers' LoRA matrices B in the first step."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(3)))
    if config is not None:
        quantize_(model, config)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["0", "1", "2"]))
    model(torch.randn(32, 64)).sub(1).square().mean().backward()
    return [model.base_model.model[i].lora_B["default"].weight.grad.norm().item() for i in range(3)]


def input_gradient(config):
    torch.manual_seed(0)
    layer = nn.Linear(64, 64)
    quantize_(layer, config)
    x = torch.randn(2, 64, requires_grad=True)
    layer(x).sum().backward()
    return x.grad


found = {}
for config in (None, Int8WeightOnlyConfig(), Int8DynamicActivationInt8WeightConfig()):
    name = "not quantised" if config is None else type(config).__name__
    found[name] = gradients(config)
    print(f"{name}: gradients of the first, second and last adapter: {[round(g, 4) for g in found[name]]}")
    if config is not None:
        print(f"{name}: the input of a layer alone has a gradient: {input_gradient(config) is not None}")
exact, weights_alone, dynamic = found.values()
assert all(abs(a / b - 1) < 0.05 for a, b in zip(weights_alone, exact))
assert dynamic[0] == dynamic[1] == 0 and abs(dynamic[2] / exact[2] - 1) < 0.05
assert input_gradient(Int8WeightOnlyConfig()) is not None
assert input_gradient(Int8DynamicActivationInt8WeightConfig()) is None
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/seen.py"
