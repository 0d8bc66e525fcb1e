"""How near are Back Razor's gradients to dense ones, by kind of weight, on real pretrained models? In how many bytes?

    MEMTRAIN_DATA=FOLDER python benchmarks/backrazor_gradients.py

One batch of 8 for each model; the cosine is that of a kind's gradients (all layers as one vector) with the dense ones.
 Nothing is trained. Writes results/backrazor_gradients.json.
"""

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from backrazor import Razor
from backrazor_real_models import PROBES, Probe
from memtrain_common.commands.cli import run_command
from memtrain_common.errors import UserError
from memtrain_common.measuring.bench import write_results
from memtrain_common.measuring.memory import SavedActivations
from torch import Tensor

RESULTS = Path(__file__).parent / "results" / "backrazor_gradients.json"
SETTINGS: dict[str, dict[str, Any]] = {
    "low-bit 0.125": {"keep": 0.125},
    "low-bit 0.1": {"keep": 0.1},
    "low-bit 0.09": {"keep": 0.09},
    "low-bit 0.0625": {"keep": 0.0625},
    "low-bit 0.05": {"keep": 0.05},
    "low-bit 0.03": {"keep": 0.03},
    "low-bit 0.1, attention recomputed": {"keep": 0.1, "recompute": "attention"},
    "low-bit 0.1, blocks recomputed": {"keep": 0.1, "recompute": "block"},
    "pruned 0.1": {"keep": 0.1, "mode": "pruned"},
    "paper 0.1": {"keep": 0.1, "mode": "paper"},
}


def saved_bytes(probe: Probe, context: Any) -> int:
    state = {name: t.clone() for name, t in probe.model.state_dict().items()}
    with SavedActivations(probe.model) as saved, context:
        loss = probe.loss(probe.model)
    held = sum(saved.by_layer().values())  # of what lives
    del loss
    probe.model.load_state_dict(state)
    return held


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=0))


def measure(probe: Probe) -> dict[str, Any]:
    loss, grads = probe.gradients(nullcontext())
    dense, n_dense = probe.by_kind(grads), saved_bytes(probe, nullcontext())
    found: dict[str, Any] = {"dense_bytes": n_dense}
    for name, settings in SETTINGS.items():
        same, grads = probe.gradients(Razor(**settings))
        assert same == loss
        kinds = probe.by_kind(grads)
        n = saved_bytes(probe, Razor(**settings))
        cosines = {kind: round(cosine(kinds[kind], dense[kind]), 4) for kind in dense}
        found[name] = {
            "bytes": n,
            "times_less": round(n_dense / n, 2),
            "least": min(cosines.values()),
            "cosine": cosines,
        }
        print(name, found[name], flush=True)
    return found


def main(argv: Sequence[str]) -> None:
    if argv:
        raise UserError("this takes no arguments")
    torch.set_num_threads(1)
    results = {}
    for name, make in PROBES.items():
        print(name, flush=True)
        results[name] = measure(make())
    write_results(
        RESULTS,
        argv=["python", "benchmarks/backrazor_gradients.py"],
        device=torch.device("cpu"),
        seeds=[0],
        batch=8,
        settings=SETTINGS,
        results=results,
    )


if __name__ == "__main__":
    sys.exit(run_command(main, prog="python benchmarks/backrazor_gradients.py"))
