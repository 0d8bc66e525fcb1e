"""What do the README's five lines save on a real pretrained model, and is the loss the same?

    MEMTRAIN_DATA=FOLDER python benchmarks/readme_example.py

MiniLM-L6 with a fresh classifier, 32 rows of SST-2, float32: bytes that a forward pass saves, and its loss, with
PyTorch alone, with Razor(keep=0.1), and with torch.utils.checkpoint around each layer.
"""

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from backrazor import Razor
from backrazor_real_models import minilm_probe
from memtrain_common.commands.cli import run_command
from memtrain_common.errors import UserError
from memtrain_common.measuring.bench import write_results
from memtrain_common.measuring.memory import SavedActivations

RESULT = Path(__file__).parent / "results" / "readme_example.json"
ROWS = 32


def forward(context: Any, checkpointed: bool = False) -> dict[str, float]:
    """-> loss and bytes of one forward pass from the same weights and rows."""
    probe = minilm_probe(ROWS)
    if checkpointed:
        probe.model.train()  # transformers checkpoints in training mode alone; this encoder's dropout is set to 0
        for module in probe.model.modules():
            if hasattr(module, "p") and type(module).__name__ == "Dropout":
                module.p = 0.0
        probe.model.gradient_checkpointing_enable({"use_reentrant": False})
    with SavedActivations(probe.model) as saved, context:
        loss = probe.loss(probe.model)
    held = sum(saved.by_layer().values())  # before the backward pass lets it go
    loss.backward()
    return {"loss": loss.item(), "bytes": held}


def main(argv: Sequence[str]) -> None:
    if argv:
        raise UserError("this takes no arguments")
    found = {
        "dense": forward(nullcontext()),
        "Razor(keep=0.1)": forward(Razor(keep=0.1)),
        "checkpoint": forward(nullcontext(), checkpointed=True),
    }
    for name, one in found.items():
        print(f"{name:16} {one['bytes'] / 1e6:6.1f} MB  loss {one['loss']:.4f}")
    write_results(
        RESULT,
        argv=["python", *sys.argv],
        device=torch.device("cpu"),
        seeds=[0],
        model="MiniLM-L6",
        rows=ROWS,
        results=found,
    )


if __name__ == "__main__":
    sys.exit(run_command(main, prog="python benchmarks/readme_example.py"))
