#!/usr/bin/env bash
# transformers 5.23.0: AutoModel….from_config fails on the default configuration of models that have more than one class for a task.
#
# from_config takes a configuration alone and makes the task's model with random weights. DeiT, LeViT and Perceiver have two or three
# image classifiers, and Funnel two encoders. Which one is meant is read from config.architectures: that is None in every
# configuration that no from_pretrained made, and the loop over it raises before the first class of the list is taken. The
# same configurations work in from_pretrained of a folder that save_pretrained wrote, which names its class, and a ViT, which
# has one class, works both ways.
#
# Expected: the first class, as the code takes it where no name fits; seen: TypeError: 'NoneType' object is not iterable.
set -euo pipefail
export PIP_CONFIG_FILE=/dev/null  # the versions named here, whatever this machine's own settings prefer
unset PIP_CONSTRAINT PIP_FIND_LINKS
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.15.0 transformers==5.23.0
cat > "$folder/seen.py" <<'PYTHON'
import transformers as t

ViT, DeiT, Levit = t.ViTConfig(num_hidden_layers=1), t.DeiTConfig(num_hidden_layers=1), t.LevitConfig()
print("ViT:", type(t.AutoModelForImageClassification.from_config(ViT)).__name__)
for auto, config in (
    (t.AutoModelForImageClassification, DeiT),
    (t.AutoModelForImageClassification, Levit),
    (t.AutoModel, t.FunnelConfig(block_sizes=[1])),
):
    try:
        found = type(auto.from_config(config)).__name__
    except TypeError as error:
        found = f"TypeError: {error}"
    print(f"{type(config).__name__}: {found}")
    assert found == "TypeError: 'NoneType' object is not iterable", found
DeiT.architectures = ["DeiTForImageClassification"]
print("DeiTConfig that names its class:", type(t.AutoModelForImageClassification.from_config(DeiT)).__name__)
PYTHON
if ! "$folder/venv/bin/python" -W ignore "$folder/seen.py"; then
    echo "changed: from_config chooses a class of its own" >&2
    exit 1
fi
echo "as described: the default configurations of models with several classes raise"
