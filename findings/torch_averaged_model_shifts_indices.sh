#!/usr/bin/env bash
# torch 2.15.0: AveragedModel with use_buffers=True changes index tables, though the model that is averaged does not change.
#
# use_buffers=True is for batch normalisation's statistics (torchvision's training script uses it) and takes all buffers, those
# of whole numbers with them. decay * i + (1 - decay) * i is computed in float32 and may come out just below i; the whole
# number it is copied to is then i - 1. So where decay is 0.9, 0.9999 or 0.99998, a sixth to a third of the entries of a Swin
# transformer's relative_position_index point to the neighbour's bias, from the second update on; with 0.99 or 0.999 none does.
#
# Expected: an average of equal models is that model; seen: all parameters are, and the index tables are not.
set -euo pipefail
export PIP_CONFIG_FILE=/dev/null  # the versions named here, whatever this machine's own settings prefer
unset PIP_CONSTRAINT PIP_FIND_LINKS
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.15.0 torchvision==0.29.2 numpy
cat > "$folder/seen.py" <<'PYTHON'
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn
from torchvision.models import SwinTransformer

torch.manual_seed(0)
model = SwinTransformer([4, 4], 24, [2], [3], [7, 7]).eval()
attention = model.features[1][0].attn
torch.nn.init.normal_(attention.relative_position_bias_table)  # it is small before training
shares = {}
for decay in (0.9, 0.99, 0.999, 0.9999, 0.99998):
    for ways in ({"multi_avg_fn": get_ema_multi_avg_fn(decay)}, {"avg_fn": get_ema_avg_fn(decay)}):
        average = AveragedModel(model, use_buffers=True, **ways)
        for _ in range(3):
            average.update_parameters(model)
        for p, q in zip(average.module.parameters(), model.parameters()):
            assert torch.allclose(p, q, atol=1e-6)
        own = average.module.features[1][0].attn
        changed = (own.relative_position_index != attention.relative_position_index).float().mean().item()
        bias = (own.get_relative_position_bias() - attention.get_relative_position_bias()).abs().max().item()
        assert changed == shares.setdefault(decay, changed)  # both ways alike
        assert (bias > 0.1) == (changed > 0)
    print(f"decay {decay}: {100 * changed:.0f} % of the indices changed, attention biases changed by up to {bias:.2f}")
assert shares[0.99] == shares[0.999] == 0
assert min(shares[0.9], shares[0.9999], shares[0.99998]) > 0.15
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/seen.py"
