"""What an arm's process runs: finetune by the arm's flags, or its prediction alone. Sent by name, so importable."""

from collections.abc import Sequence
from typing import Any

from .arms import Job

UNPREDICTED = {"predicted": None, "predicted_peak_bytes": None}
"""In place of what :func:`predict_job` returns, where that cannot be said."""


def configure_finetune(words: Sequence[str]) -> Any:
    """finetune's configuration by its own flags."""
    from ..run.config import FINETUNE_PRESETS, FinetuneConfig, configure

    return configure(words, FinetuneConfig, prog="finetune", description="", presets=FINETUNE_PRESETS)


def with_device(job: Job) -> list[str]:
    """The job's flags with its place; on the CPU one thread, so that a run repeats to the bit on any machine."""
    alone = ["--threads", "1"] if job.device == "cpu" and "--threads" not in job.words else []
    return [*job.words, "--device", job.device, *alone]


def finetune_job(job: Job) -> dict[str, Any] | None:
    """Train an arm, or go on with it."""
    from ..run.finetune import run_finetune

    begun = (job.folder / "config.json").exists()
    words = ["--resume", str(job.folder)] if begun else [*with_device(job), "--out", str(job.folder)]
    return run_finetune(configure_finetune(words), words)


def predict_job(job: Job) -> dict[str, Any]:
    """What an arm that did not end would have held."""
    from memtrain_common.training.distributed import launch

    from ..run.finetune import workload_of
    from ..run.predicting import predict_run

    config = configure_finetune(with_device(job))
    world, device = launch(job.device)
    workload = workload_of(config, world)
    workload.task.model.to(device)
    predicted = predict_run(workload, config, config, device=device)
    return {"predicted": predicted.ledger.totals, "predicted_peak_bytes": predicted.peak_bytes}
