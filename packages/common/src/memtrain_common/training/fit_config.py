"""What :func:`memtrain_common.training.loop.fit` is asked, and what it answers."""

from dataclasses import dataclass, field
from typing import Literal

import torch

from ..measuring.memory import Ledger

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class FitConfig:
    """How long to train and when to look; every interval is in optimizer steps."""

    max_iters: int
    gradient_accumulation_steps: int = 1
    """Micro-batches an optimizer step: step s uses batches s·g … s·g + g − 1, and the mean of their losses."""
    grad_clip: float = 0.0
    """Largest norm of the gradient; 0 does not clip."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Autocast's dtype; float16 adds a gradient scaler."""
    compile: bool = False
    """Run the model through torch.compile."""
    eval_interval: int = 100
    log_interval: int = 10
    checkpoint_interval: int = 0
    """0: as often as evaluation. A new best evaluation is saved besides."""
    best_metric: str = "loss"
    """The evaluation's number that decides which checkpoint is the best and stays; every evaluation must have it."""
    higher_is_better: bool = False
    workers: int = 0
    """Processes that prepare batches ahead; 0 prepares them in the loop."""
    units_per_step: int = 0
    """Tokens or samples in an optimizer step over all processes, for the rate; 0 gives none."""
    unit: str = "samples"
    tracker: str = "none"
    """"tensorboard", "wandb", "trackio" or "none"; metrics.jsonl is always written."""
    tracker_project: str = "memtrain"
    """W&B's and trackio's project."""
    tracker_name: str = ""
    """The run's name there; empty takes the run folder's."""
    max_skipped: int = 10
    """Steps skipped in a row (NaN or Inf in a gradient) after which the training counts as diverged; 0 never does."""
    agree_interval: int = 1
    """With ``parts``: steps between those at which every process comes to have the same: between two of them each can
    save for all when one is lost."""
    agree_offset: int = 0
    """They leave this remainder when divided by ``agree_interval``."""
    patience_s: float = 0.0
    """With ``parts``: seconds of silence after which another process counts as lost; 0 does not listen."""

    def __post_init__(self) -> None:
        """Raises:
        ValueError: naming a number that is too small.
        """
        for name in ("gradient_accumulation_steps", "eval_interval", "log_interval", "agree_interval"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("max_iters", "checkpoint_interval", "workers", "max_skipped"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, not {getattr(self, name)}")

    def processes_speak(self, step: int) -> bool:
        """With ``parts``: whether they do at this step anyway, so that to ask for a stop signal holds up nobody."""
        looks = (self.log_interval, self.eval_interval, self.checkpoint_interval or self.eval_interval)
        looked_at = step >= self.max_iters or any(step % every == 0 for every in looks)
        return looked_at or (step - self.agree_offset) % self.agree_interval == 0


@dataclass
class FitResult:
    """What a finished run has to tell."""

    step: int = 0
    seconds: float = 0.0
    """Seconds of training, evaluation and saving left out; earlier parts of a resumed run included."""
    evaluation: dict[str, float] = field(default_factory=dict)
    """The last evaluation."""
    best: tuple[int, float] | None = None
    """Step and value of the best evaluation."""
    units_per_second: float = 0.0
    """Mean over the steps of this process after the first (which measures memory, and compiles); where it took no
    other, that of the process before."""
    ledger: Ledger | None = None
    """Of this process's first step; of a run that had ended, what its ``memory.json`` says, peaks included."""
    peak_bytes: dict[str, int | None] = field(default_factory=dict)
    """Of "training" and "evaluation", apart."""
    skipped_steps: int = 0
    """Steps that float16's scaler or the optimizer left out because a gradient was NaN or Inf."""
    joules: float | None = None
    metered_seconds: float = 0.0
    """Over which the joules were counted: evaluation and saving too, and steps that a kill lost."""
    energy_source: str = "unavailable"

    def note_rate(self, units_per_step: int, first: int, timed_from: float) -> None:
        """Set ``units_per_second``: over the steps after this process's first; where it timed none it stays what the
        checkpoint has, or is that over all steps.

        Args:
            first: step that this process began with.
            timed_from: seconds of training at the end of its first step.
        """
        timed = self.step - first - 1
        if timed > 0:
            self.units_per_second = timed * units_per_step / (self.seconds - timed_from)
        elif self.seconds > 0 and not self.units_per_second:
            self.units_per_second = self.step * units_per_step / self.seconds
