#!/usr/bin/env bash
# transformers 5.23.0: with gradient_accumulation_steps=8, Trainer takes 8 times the gradient of BERT's and T5's loss.
#
# Trainer hands the count of labels in all batches of a step to models whose forward takes **kwargs, and does not divide their
# losses by the number of batches any more. In this release most models' forward takes **kwargs, but many compute their loss as
# a mean over their own batch and drop the count: BERT's and Llama's classifiers, BERT as a masked model, T5. The means are
# then added up. The logged loss and grad_norm are 8 times too large; with SGD so is the step, and with AdamW clipping at
# max_grad_norm cuts where it should not. Llama's language model, whose loss uses the count, is right.
#
# Expected: the same loss and gradient norm for one batch of 16 as for 8 batches of 2; seen: 8 times both.
set -euo pipefail
export PIP_CONFIG_FILE=/dev/null  # the versions named here, whatever this machine's own settings prefer
unset PIP_CONSTRAINT PIP_FIND_LINKS
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.15.0 transformers==5.23.0 accelerate==1.15.0 numpy
cat > "$folder/seen.py" <<'PYTHON'
import tempfile

import torch
import transformers as t

small = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=50)
bert = t.BertConfig(**small, num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
llama = t.LlamaConfig(**small, num_key_value_heads=2, num_labels=3, pad_token_id=0)
t5 = t.T5Config(
    d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2, vocab_size=50, dropout_rate=0.0, decoder_start_token_id=0
)
torch.manual_seed(0)
ids, classes = torch.randint(3, 50, (16, 6)), torch.randint(3, (16,))


def first_step(model_class, config, labels, batches):
    """The loss and the gradient norm that Trainer logs for one step over the same 16 samples."""
    torch.manual_seed(0)
    data = [{"input_ids": i, "labels": y} for i, y in zip(ids, labels)]
    with tempfile.TemporaryDirectory() as output:
        args = t.TrainingArguments(
            output,
            per_device_train_batch_size=16 // batches,
            gradient_accumulation_steps=batches,
            max_steps=1,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = t.Trainer(model_class(config), args, train_dataset=data)
        trainer.train()
    return [trainer.state.log_history[0][key] for key in ("loss", "grad_norm")]


for model_class, config, labels, factor in (
    (t.LlamaForCausalLM, llama, ids, 1),
    (t.BertForSequenceClassification, bert, classes, 8),
    (t.BertForMaskedLM, bert, ids, 8),
    (t.LlamaForSequenceClassification, llama, classes, 8),
    (t.T5ForConditionalGeneration, t5, ids, 8),
):
    one, eight = (first_step(model_class, config, labels, batches) for batches in (1, 8))
    print(f"{model_class.__name__}: loss and gradient norm {one[0]:.3f}, {one[1]:.3f}; of 8 batches {eight[0]:.3f}, {eight[1]:.3f}")
    assert all(abs(b / a / factor - 1) < 0.01 for a, b in zip(one, eight)), (one, eight)
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/seen.py"
