#!/usr/bin/env bash
# torch 2.15.0: under vmap an embedding's padding row has no gradient in the first model alone; in all others it is trained.
#
# Several models at once, as torch.func.stack_module_state makes them: vmap looks their embeddings up in one table, where the
# indices of model i are shifted by i times the vocabulary, and padding_idx is not. So the row is left out of the gradient in
# model 0 and in no other. With the gradient taken inside of vmap (vmap of grad) all models are right; with .backward() or
# torch.autograd.grad around it they are not, and nothing is said. Outputs and losses agree to the bit.
#
# Expected: zeros in the padding row of every model, as one model after another has them; seen: zeros in the first alone.
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
from torch.func import functional_call, grad, stack_module_state, vmap

PAD, MODELS = 3, 4
torch.manual_seed(0)
models = [nn.Embedding(11, 5, padding_idx=PAD) for _ in range(MODELS)]
tokens = torch.randint(4, 11, (MODELS, 6))
tokens[:, -2:] = PAD  # two rows of padding at the end of each model's sequence
weights, _ = stack_module_state(models)


def answer(own, ids):
    return functional_call(models[0], own, (ids,))


def padding_of(gradients):
    return [round(g[PAD].abs().sum().item(), 3) for g in gradients]


alone = [torch.autograd.grad(m(ids).sum(), m.weight)[0] for m, ids in zip(models, tokens)]
together = vmap(answer)(weights, tokens)
assert torch.equal(together, torch.stack([m(ids) for m, ids in zip(models, tokens)]))
(around,) = torch.autograd.grad(together.sum(), weights["weight"])
inside = vmap(grad(lambda own, ids: answer(own, ids).sum()))(weights, tokens)["weight"]
for name, found in (("one after another", alone), ("backward around vmap", around), ("grad inside of vmap", inside)):
    print(f"{name}: gradient of the padding row, by model: {padding_of(found)}")
assert not any(padding_of(alone)) and not any(padding_of(inside))
assert padding_of(around) == [0.0] + [10.0] * (MODELS - 1)  # two tokens of five numbers
PYTHON
"$folder/venv/bin/python" "$folder/seen.py"
