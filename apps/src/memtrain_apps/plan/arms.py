"""What ``plan`` answers: combinations with their forecasts, and what would make others fit."""

from dataclasses import dataclass, field

from ..compose.axes import Axes
from .config import PlanConfig
from .forecast import Forecast, Workplace
from .known import Known, Overhead, Timing


@dataclass(frozen=True)
class Remedy:
    """One change after which a combination fits."""

    flags: str
    peak: int
    time: float
    """Relative to full training, everything saved, AdamW; without what a bus takes."""
    measured: bool
    """Whether the time was measured, and not estimated."""


@dataclass
class Arm:
    """A combination with all that is known of it."""

    axes: Axes
    refused: str = ""
    """Why it has no meaning, and what to choose instead."""
    forecast: Forecast | None = None
    fits: bool = False
    time: float = 0.0
    """Matrix products of a step relative to full training, everything saved, AdamW; times a measured overhead."""
    overhead: Overhead | None = None
    timing: Timing | None = None
    """A measured time of such a step, where there is one."""
    largest: int = 0
    """Samples a micro-batch over all GPUs, at most those asked for, that surely fit; 0 if none do."""
    scores: list[Known] = field(default_factory=list)
    remedies: list[Remedy] = field(default_factory=list)

    @property
    def predicted(self) -> Forecast:
        assert self.forecast is not None
        return self.forecast


@dataclass
class Plan:
    """The answer."""

    config: PlanConfig
    place: Workplace
    arms: list[Arm]
    """Those that fit, best first; then those that do not; then the refused."""

    @property
    def fitting(self) -> list[Arm]:
        return [a for a in self.arms if a.fits]

    @property
    def lacking(self) -> list[Arm]:
        return [a for a in self.arms if not a.fits and not a.refused]

    @property
    def refused(self) -> list[Arm]:
        return [a for a in self.arms if a.refused]
