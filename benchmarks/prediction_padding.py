"""How much more does a padded batch keep for the backward pass than is predicted of it, of a tiny Llama?

    python benchmarks/prediction_padding.py

A prediction reads no numbers: an attention mask counts as all ones, and transformers leaves out a mask of ones. Three
rows, of which one is padded by 9 of its tokens; saved bytes, measured and predicted, on the CPU in float32.
"""

from pathlib import Path
from typing import Any

import torch
from memtrain_common.measuring.bench import write_results
from memtrain_common.measuring.memory import SavedActivations
from memtrain_common.measuring.prediction import predict
from transformers import LlamaConfig, LlamaForCausalLM

RESULT = Path(__file__).parent / "results" / "prediction_padding.json"
ROWS, PADDED = 3, 9
SIZES = {"tiny": (32, 48, 24), "tiny, 96 tokens": (32, 48, 96), "four times as wide": (128, 192, 24)}


def compare(width: int, inner: int, tokens: int) -> dict[str, Any]:
    """Bytes of activations: of a full batch, of a padded one, and predicted for either."""
    config = LlamaConfig(
        vocab_size=53, hidden_size=width, intermediate_size=inner, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)

    def loss(m: Any, padded: int) -> torch.Tensor:
        lengths = torch.tensor([[tokens]] * (ROWS - 1) + [[tokens - padded]])
        ids, mask = torch.ones(ROWS, tokens).long(), (torch.arange(tokens) < lengths).long()
        return m(input_ids=ids, attention_mask=mask, labels=ids).loss

    measured = {}
    for name, padded in (("full", 0), ("padded", PADDED)):
        with SavedActivations(model) as saved:
            held = loss(model, padded)  # and with it, what the backward pass would need
        measured[name] = sum(saved.by_layer().values())
        del held
    predicted = predict(lambda: LlamaForCausalLM(config), lambda m: loss(m, PADDED)).ledger.totals["activations"]
    more = round(measured["padded"] / predicted - 1, 4)
    return {"width": width, "tokens": tokens, "measured": measured, "predicted": predicted, "more": more}


def main() -> None:
    found = {name: compare(*sizes) for name, sizes in SIZES.items()}
    for name, row in found.items():
        print(name, row)
    write_results(
        RESULT,
        argv=["python", "benchmarks/prediction_padding.py"],
        device=torch.device("cpu"),
        seeds=[0],
        rows=ROWS,
        padded_tokens=PADDED,
        models=found,
    )


if __name__ == "__main__":
    main()
