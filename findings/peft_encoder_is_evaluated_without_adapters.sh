#!/usr/bin/env bash
# PEFT 0.21.2: LoRA on the linear layers of nn.TransformerEncoder is trained, and in evaluation it is not used at all.
#
# In evaluation nn.TransformerEncoderLayer has a fused path that never calls its linear layers: it takes linear1.weight and
# linear2.weight. LoRA's layer has these attributes too and passes the base's weights on; they are frozen, so even autograd
# that is switched on does not keep the fused path away. After .eval() the model answers as the base model did, to the bit,
# whatever was learned. No warning says so. merge_adapter() before, or torch.backends.mha.set_fastpath_enabled(False), helps.
#
# Expected: in evaluation the loss that training reached (there is no dropout here); seen: 0.57 in training, 2.01 in evaluation.
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
layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
base = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
x, target = torch.randn(16, 8, 32), torch.randn(16, 8, 32)
with torch.no_grad():
    before = base.eval()(x)
model = get_peft_model(base, LoraConfig(r=8, target_modules=["linear1", "linear2"])).train()
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def loss():
    return (model(x) - target).square().mean()


for _ in range(100):
    optimizer.zero_grad()
    loss().backward()
    optimizer.step()
trained = loss().item()
model.eval()
evaluated, answer = loss().item(), model(x).detach()
model.merge_adapter()
merged = loss().item()
model.unmerge_adapter()
torch.backends.mha.set_fastpath_enabled(False)
slow = loss().item()
print(f"loss before training {(before - target).square().mean():.4f}, after it {trained:.4f}")
print(f"the same data after .eval(): {evaluated:.4f}; merged: {merged:.4f}; without the fused path: {slow:.4f}")
print("the answer is the base model's:", torch.equal(answer, before))
assert torch.equal(answer, before)
assert trained < 0.7 and evaluated > 1.9
assert abs(merged - trained) < 1e-3 and abs(slow - trained) < 1e-3
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/seen.py"
