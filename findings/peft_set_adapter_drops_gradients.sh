#!/usr/bin/env bash
# PEFT 0.21.2: a loss over two adapters of one model trains the second alone, where set_adapter stands between their forward passes.
#
# set_adapter turns requires_grad of the other adapters off. Autograd looks at that when a gradient arrives, not when the graph
# was made: the first adapter's graph is run through to its end, and its gradients are then dropped without a word. So
# (loss_a + loss_b).backward() leaves None where a backward pass after each forward pass leaves both gradients. The first
# adapter's part of the loss is counted, and its time is spent.
#
# Expected: both adapters' gradients, as the graph holds both; seen: None for the adapter that was active first. A new
# requires_grad_(True) of its weights before the backward pass brings them back.
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

torch.manual_seed(0)
config = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
model = get_peft_model(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), config, adapter_name="a")
model.add_adapter("b", config)
x = torch.randn(3, 4)
weights = {name: model.base_model.model[0].lora_B[name].weight for name in "ab"}


def loss(name):
    model.set_adapter(name)
    return model(x).square().mean()


def gradients():
    found = {n: None if w.grad is None else round(w.grad.norm().item(), 4) for n, w in weights.items()}
    model.zero_grad()
    for w in weights.values():
        w.grad = None
    return found


loss("a").backward()
loss("b").backward()
each = gradients()
(loss("a") + loss("b")).backward()
together = gradients()
total = loss("a") + loss("b")
for p in model.base_model.model[0].parameters():
    p.requires_grad_(True)
total.backward()
again = gradients()
print("a backward pass after each forward pass:   ", each)
print("one backward pass of the sum:              ", together)
print("the same after requires_grad_(True) of both:", again)
assert each == again and None not in each.values()
assert together == {"a": None, "b": each["b"]}
PYTHON
"$folder/venv/bin/python" "$folder/seen.py"
