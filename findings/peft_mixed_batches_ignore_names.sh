#!/usr/bin/env bash
# PEFT 0.21.2: model(..., adapter_names=[...]) is taken and ignored by all but a few kinds of adapters.
#
# For LoRA adapter_names gives each row of a batch its own adapter. A model of IA3, VeRA, LoHa, LoKr, OFT, HRA, RandLoRA or
# LN tuning takes the argument too, and computes every row with the active adapter: the answer for a row that names
# another is the active one's, without an error or a warning. A server that mixes requests so answers them with one model.
#
# Expected: the named adapter's answer, or a refusal; seen: the active adapter's.
set -euo pipefail
export PIP_CONFIG_FILE=/dev/null  # the versions named here, whatever this machine's own settings prefer
unset PIP_CONSTRAINT PIP_FIND_LINKS
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.15.0 peft==0.21.2 transformers==5.23.0 numpy
cat > "$folder/seen.py" <<'PYTHON'
import peft
import torch
from transformers import BertConfig, BertForSequenceClassification

SHAPE = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
SETTINGS = {
    "LoraConfig": {}, "IA3Config": {"feedforward_modules": []}, "VeraConfig": {}, "LoHaConfig": {}, "LoKrConfig": {},
    "OFTConfig": {"oft_block_size": 8}, "HRAConfig": {}, "RandLoraConfig": {}, "LNTuningConfig": {"target_modules": ["LayerNorm"]},
}


@torch.no_grad()
def second_row(name):
    """How far the second row's answer, asked of adapter b, is from b's and from the active adapter's."""
    torch.manual_seed(0)
    config = getattr(peft, name)(**{"target_modules": ["query", "value"], **SETTINGS[name]})
    model = peft.get_peft_model(BertForSequenceClassification(BertConfig(**SHAPE)), config)
    model.add_adapter("b", config)
    model.eval()
    for parameter_name, p in model.named_parameters():
        if ".default" in parameter_name or parameter_name.endswith(".b") or ".b." in parameter_name:
            p.normal_(std=0.3)
    ids = torch.randint(0, 50, (2, 6))
    model.set_adapter("b")
    b = model(input_ids=ids).logits
    model.set_adapter("default")
    active = model(input_ids=ids).logits
    mixed = model(input_ids=ids, adapter_names=["default", "b"]).logits
    whole = (b - active)[1].norm()
    return ((mixed - b)[1].norm() / whole).item(), ((mixed - active)[1].norm() / whole).item()


for name in SETTINGS:
    from_b, from_active = second_row(name)
    print(f"{name}: the row that names b is {from_b:.2f} from b, {from_active:.2f} from the active one (1: as far as they are apart)")
    assert from_b < 0.01 < 0.9 < from_active if name == "LoraConfig" else from_active == 0
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/seen.py" 2> /dev/null
