#!/usr/bin/env bash
# transformers 5.23.0: whether the texts of a packed batch see each other depends on gradient checkpointing, by way of use_cache.
#
# DataCollatorWithFlattening puts texts one after another, with position_ids that begin anew for each. From these the models make
# an attention mask that keeps the texts apart (attention "sdpa", the default, and "eager"), but only where there is no cache.
# use_cache is True by default, in training too, and then a text attends to those before it. Gradient checkpointing turns
# use_cache off: the same weights have another loss and other gradients with it than without, though it is to save memory alone. Its
# message names the cache alone. transformers' own Trainer turns use_cache off; one's own loop, and accelerate's, do not.
#
# Expected: the loss of the texts alone, with checkpointing and without; seen: 4.39 with it or with use_cache=False, 4.56 without.
set -euo pipefail
export PIP_CONFIG_FILE=/dev/null  # the versions named here, whatever this machine's own settings prefer
unset PIP_CONSTRAINT PIP_FIND_LINKS
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.15.0 transformers==5.23.0 numpy
cat > "$folder/seen.py" <<'PYTHON'
import torch
import transformers as t

torch.manual_seed(0)
small = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=50)
texts = [torch.randint(3, 50, (n,)) for n in (9, 6, 12)]
batch = t.DataCollatorWithFlattening()([{"input_ids": text.tolist()} for text in texts])


def loss_and_gradient(model, inputs, **more):
    model.zero_grad()
    loss = model(**inputs, **more).loss
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()])


for config in (t.LlamaConfig, t.Qwen3Config, t.MistralConfig):
    for attention in ("sdpa", "eager"):
        torch.manual_seed(0)
        model = t.AutoModelForCausalLM.from_config(
            config(**small, num_key_value_heads=2), attn_implementation=attention
        ).train()
        with torch.no_grad():
            for p in model.parameters():
                if p.dim() == 2:
                    p.normal_(std=0.2)  # larger than at first, so that attention looks at something
        lengths = [len(text) - 1 for text in texts]  # a text's first token is not foretold
        alone = [model(input_ids=text[None], labels=text[None]).loss.item() for text in texts]
        exact = sum(n * loss for n, loss in zip(lengths, alone)) / sum(lengths)
        plain, gradient = loss_and_gradient(model, batch)
        apart, right = loss_and_gradient(model, batch, use_cache=False)
        model.gradient_checkpointing_enable()
        saved, checkpointed = loss_and_gradient(model, batch)
        off = ((gradient - right).norm() / right.norm()).item()
        print(f"{config.__name__}, {attention}: the texts alone {exact:.4f}, packed {plain:.4f}, packed with", end=" ")
        print(f"checkpointing {saved:.4f}, with use_cache=False {apart:.4f}; gradients {100 * off:.0f} % off")
        assert abs(saved - exact) < 1e-4 and abs(apart - exact) < 1e-4
        assert torch.allclose(checkpointed, right, atol=1e-5)
        assert abs(plain - exact) > 0.01 and off > 0.1
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/seen.py"
