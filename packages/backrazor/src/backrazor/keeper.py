"""What operations ask of a Razor: its settings, and to keep a tensor in the form that they name."""

from collections.abc import Callable

import torch
from torch import Tensor

from .chains import Chains, ScoresInSight
from .coded import Levels, code, rounding
from .derived import derive
from .errors import RazorError
from .groups import groups_for
from .internals import is_wrapper
from .saved import Dense, Geometry, Saved, eight_bit, low_bit, low_bit_norm, low_bit_normal, prune, prune_as_paper
from .store import Held, Holder, Store
from .values import FORMATS
from .weights import PARAMETER, rank
from .widths import LOWEST, width_of

SETTINGS = ("keep", "mode", "attention", "values", "derivative_bits", "recompute")
MODES = ("low-bit", "pruned", "paper")
ATTENTION = ("pruned", "exact")
RECOMPUTED: dict[str | None, frozenset[str]] = {
    "auto": frozenset(),
    None: frozenset(),
    "attention": frozenset(("query", "key", "value")),
    "block": frozenset(("query", "key", "value", "activation")),
}
"""Kinds of tensors that, where they are a linear layer's output, are made from its input again."""


class Keeper:
    """Keeps tensors for the backward pass, each once. The settings are those of :class:`.razor.Razor`.

    Raises:
        RazorError: a setting that is none of these.
    """

    def __init__(
        self, keep: float, mode: str, attention: str, values: str, derivative_bits: int, recompute: str | None
    ) -> None:
        super().__init__()
        if not isinstance(keep, int | float) or not 0 < keep <= 1:
            raise RazorError(f"keep={keep!r} is not in (0, 1]: it is the fraction of each activation that is kept")
        for name, value, known in (
            ("mode", mode, MODES),
            ("attention", attention, ATTENTION),
            ("values", values, FORMATS),
        ):
            if value not in known:
                raise RazorError(f"{name}={value!r} is not one of {', '.join(known)}")
        if derivative_bits not in (2, 3, 4):
            raise RazorError(f"derivative_bits={derivative_bits!r} is not 2, 3 or 4")
        self.keep, self.mode, self.attention, self.values = float(keep), mode, attention, values
        if recompute not in RECOMPUTED:
            raise RazorError(f"recompute={recompute!r} is not one of auto, None, attention, block")
        if recompute == "auto":
            recompute = "block" if mode == "low-bit" and self.keep < LOWEST else None
        self.derivative_bits, self.recompute = derivative_bits, recompute
        self._recomputed = RECOMPUTED[recompute]
        self.chains, self.scores = Chains(), ScoresInSight()
        self._groups = groups_for(self.keep) if keep < 1 else None
        self._store = Store()

    @property
    def fuses_loss(self) -> bool:
        """Whether logits and their cross-entropy are one operation (:mod:`.ops.loss`)."""
        return self.keep < 1 and self.mode != "paper"

    def forget(self) -> None:
        """What is stored stays in the graphs that need it, and is not shared any more."""
        self._store.clear()
        self.chains.clear()
        self.scores.clear()

    def unshare(self, x: Tensor) -> None:
        """Nothing that is known of ``x`` holds any more: it may be changed where its version does not tell."""
        if rank(x) != PARAMETER and not is_wrapper(x):
            self._store.unshare(x)
            self.chains.clear()
            self.scores.clear()

    def hold(
        self,
        x: Tensor,
        kind: str = "input",
        channels: tuple[int, ...] = (-1,),
        *,
        values: str | None = None,
        probabilities: bool = False,
        own: bool = False,
        rstd: tuple[Tensor, float] | None = None,
    ) -> Held:
        """What stands for ``x``; stored once for all operations that save it. A weight is kept by reference.

        Args:
            kind: which of :data:`.widths.EXTRA` tells its bits in the mode "low-bit".
            channels: dimensions whose indices are different channels, in the mode "low-bit".
            values: the mode "paper"'s format for this operation; float16 if not given.
            probabilities: of a softmax: kept in 8 bits where values are in 16.
            own: not shared.
            rstd: of a norm whose x̂ this is, with its ε.
        """
        if rank(x) == PARAMETER:
            return Held(Holder(Saved((x,), Dense(Geometry.of(x)))), None)
        if self.mode == "low-bit":
            again = self._store.find(x, "recomputed") if kind in self._recomputed else None
            return again or self._store.hold(x, "kept", lambda: self.low_bit(x, kind, channels, rstd))
        if self.mode == "paper" and not probabilities:
            found = self._store.find(x, "kept") if not own and x.is_contiguous() else None
            return found if found is not None else Held(Holder(self.prune(x, values=values)), None)
        return self._store.hold(x, "kept", lambda: self.prune(x, values=values, probabilities=probabilities))

    def prune(self, x: Tensor, *, values: str | None = None, probabilities: bool = False) -> Saved:
        """``x``, pruned and not remembered."""
        if self.mode == "paper":
            return prune_as_paper(x, self.keep, values or "fp16")
        short = probabilities and self.values in ("bf16", "fp16")
        return prune(x, self._groups, "int8" if short else self.values)

    def low_bit(
        self, x: Tensor, kind: str, channels: tuple[int, ...], rstd: tuple[Tensor, float] | None = None
    ) -> Saved:
        """``x`` in the bits of its kind, and not remembered; ``x`` itself at keep = 1."""
        if self.keep == 1:
            return Saved((x,), Dense(Geometry.of(x)))
        width = width_of(kind, self.keep)
        return low_bit(x, width, channels) if rstd is None else low_bit_normal(x, width, channels, *rstd)

    def hold_norm(self, x: Tensor, at: tuple[Tensor | None, Tensor], dims: tuple[int, ...], eps: float) -> Held | None:
        """What stands for a norm's x̂ = (x − mean) · rstd, with both ``at`` each row; None where x̂ itself is needed."""
        if self.mode != "low-bit" or self.keep == 1 or x.dtype != torch.float32 or x.device.type != "cpu":
            return None
        return Held(Holder(low_bit_norm(x, at, width_of("norm", self.keep), dims, eps)), None)

    def hold_eight_bit(self, x: Tensor) -> Held:
        """What stands for ``x``, every element in 8.125 bits; ``x`` itself at keep = 1."""
        if self.keep == 1:
            return Held(Holder(Saved((x,), Dense(Geometry.of(x)))), None)
        return self._store.hold(x, "8 bits", lambda: eight_bit(x))

    def hold_coded(self, x: Tensor, levels: Levels) -> Held:
        """``x``, every element rounded to one of a few levels; ``x`` itself at keep = 1. Not remembered."""
        saved = Saved((x,), Dense(Geometry.of(x))) if self.keep == 1 else code(x, rounding(levels), levels)
        return Held(Holder(saved), None)

    def find(self, x: Tensor) -> Held | None:
        """What stands for ``x``, pruned, if it is stored."""
        return self._store.find(x, "kept")

    def share(self, y: Tensor, saved: Saved, base: Held) -> None:
        """Let the next operation that saves ``y`` make it from ``saved``, which uses the tensors of ``base``."""
        base.holder.shared.append(self._store.put(y, "kept", saved, base.holder.rebuilt).holder)

    def derive(
        self,
        y: Tensor,
        make: Callable[..., Tensor],
        parts: tuple[Held, ...],
        references: tuple[Tensor, ...] = (),
        kind: str = "kept",
        least: torch.dtype | None = None,
    ) -> Held:
        """Let the next operation that saves ``y`` make it, by ``make``, from what is kept of its parts, in the type
        that is asked for and ``least`` promote to."""
        held = self._store.put(y, kind, derive(y, make, parts, references, least))
        parts[0].holder.shared.append(held.holder)
        return held

    def same_geometry(self, held: Held, *tensors: Tensor) -> bool:
        """Whether what is kept is rebuilt with the shape and strides that all these tensors have."""
        geometry = held.saved.recipe.geometry
        return all(tuple(t.shape) == geometry.shape and tuple(t.stride()) == geometry.stride for t in tensors)

    def samples_at_once(self, batch: int, sample_size: int, limit: int) -> int:
        """Samples whose probabilities together are no larger than ``limit`` elements; at least one."""
        return max(1, min(batch, limit // max(sample_size, 1)))
