"""What every GaLore optimizer shares: groups, bases, the order of a step. Subclasses have the update rules.

Paper: Zhao et al., "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection" (2024,
arXiv:2403.03507), Algorithm 2. One step of a projected weight W (m×n):

    every T steps:  P, Q ← leading singular vectors of G
    R = Pᵀ G Qᵀ,   N = ρ(R),   W ← W − η·α·P N Q

where ρ is the inner optimizer (Adam, 8-bit Adam, Adafactor), which sees and remembers only R.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from galore_vit import sharding
from galore_vit.basis import exact_bases, iterated_bases, overlap
from galore_vit.counters import COUNTERS, count, has_no_numbers
from galore_vit.finite import all_finite
from galore_vit.projection import Bases, Layout, layout_of, project
from galore_vit.settings import AS_PUBLISHED, GALORE_DEFAULTS, LAZY_LIMIT, Refresh, check_group


@dataclass
class Item:
    """One weight's gradient on its way through a step."""

    param: Tensor
    group: dict[str, Any]
    layout: Layout | None
    """None: not projected."""
    grad: Tensor
    """R of a projected weight, the gradient itself of a plain one."""
    new_bases: Bases | None = None
    """Put in place only when the whole step is found finite."""
    full: Tensor | None = None
    """G (m×n), kept only where the residual is used."""


class GaLore(Optimizer):
    """Projects gradients, refreshes bases, skips non-finite steps. Use one of its subclasses."""

    def __init__(
        self,
        params: Iterable[Any],
        defaults: dict[str, Any],
        *,
        refresh: Refresh | None,
        paper: bool,
        maximize: bool,
    ) -> None:
        if paper and refresh is not None:
            raise ValueError("paper=True fixes how bases are refreshed: leave refresh out, or leave paper out")
        if refresh is None:
            refresh = AS_PUBLISHED if paper else Refresh()
        self._too_small: list[tuple[int, ...]] = []
        self.process_group: dist.ProcessGroup | None = None  # set where processes must share new bases
        # A plain dict, so that a saved state holds nothing but tensors, numbers and strings.
        super().__init__(params, {**defaults, "refresh": asdict(refresh), "paper": paper, "maximize": maximize})
        self._say_what_is_plain()

    # -- construction and loading -----------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group; with `rank` in it, its matrices are projected (its other keys have defaults)."""
        group = dict(param_group)
        if "rank" in group:
            group = {**GALORE_DEFAULTS, **group}
        elif stray := sorted(GALORE_DEFAULTS.keys() & group.keys()):
            raise ValueError(f"a parameter group has {', '.join(stray)} but no rank: add rank, or drop them")
        check_group(group)
        super().add_param_group(group)
        group = self.param_groups[-1]
        self._check_hyperparameters(group)
        for p in group["params"]:
            if p.is_complex():
                raise ValueError("GaLore takes real parameters, and one is complex")
            if p.ndim >= 2 and "rank" in group and layout_of(p.shape, group) is None:
                self._too_small.append(tuple(p.shape))
        self._index()

    def _check_hyperparameters(self, group: dict[str, Any]) -> None:
        raise NotImplementedError

    def _say_what_is_plain(self) -> None:
        if self._too_small:
            shapes = ", ".join("×".join(map(str, s)) for s in sorted(set(self._too_small))[:4])
            warnings.warn(
                f"{len(self._too_small)} weights ({shapes}) have no side above their rank: they are updated "
                "without projection and without scale; choose a smaller rank to project them",
                UserWarning,
                stacklevel=4,
            )
            self._too_small = []

    def _index(self) -> None:
        """Which group a parameter is in, how it is projected, and its place among the projected ones."""
        self._where: dict[Tensor, int] = {}
        self._layouts: dict[Tensor, Layout | None] = {}
        self._order: dict[Tensor, int] = {}
        for i, group in enumerate(self.param_groups):
            for p in group["params"]:
                self._where[p] = i
                self._layouts[p] = layout_of(p.shape, group)
                if self._layouts[p] is not None:
                    self._order[p] = len(self._order)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_too_small", [])
        self.__dict__.setdefault("process_group", None)
        self._index()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state, casting each tensor to the dtype and device that this optimizer would give it.

        torch's own rule casts everything to the parameter's dtype, which would spoil 8-bit codes and
        counters. Nothing is aliased: the tensors given stay the caller's.
        """
        for saved_group in state_dict["param_groups"]:
            if missing := sorted(self.defaults.keys() - saved_group.keys()):
                raise ValueError(f"this state was saved by another optimizer: its groups have no {', '.join(missing)}")
        super().load_state_dict(state_dict)
        saved_ids = [i for g in state_dict["param_groups"] for i in g["params"]]
        own = [(p, g) for g in self.param_groups for p in g["params"]]
        for i, (p, group) in zip(saved_ids, own, strict=True):
            saved = state_dict["state"].get(i)
            if saved is None:
                continue
            fresh = self._fresh_state(p, group, self._layouts[p], device=torch.device("meta"))
            if saved.keys() != fresh.keys() or any(saved[k].shape != fresh[k].shape for k in fresh):
                raise ValueError(
                    f"the saved state of parameter {i} does not fit its shape {tuple(p.shape)}: it was saved "
                    "by another optimizer or for another model"
                )
            self.state[p] = {
                k: v.to(device="cpu" if k in COUNTERS else p.device, dtype=fresh[k].dtype, copy=True)
                for k, v in saved.items()
            }

    # -- state ------------------------------------------------------------------------------------------

    def _fresh_state(
        self, p: Tensor, group: dict[str, Any], layout: Layout | None, device: torch.device
    ) -> dict[str, Tensor]:
        """The state of a weight that has taken no step: zeros on `device`, counters on the CPU."""
        state = {"step": torch.zeros(())}
        if layout is None:
            state.update(self._fresh_moments(p, group, tuple(p.shape), True, device))
        else:
            state["refresh_at"] = torch.zeros((), dtype=torch.int64)
            if group["refresh"]["lazy"] is not None:
                state["gap"] = torch.tensor(group["update_proj_gap"])
            for key, shape in layout.basis_shapes.items():
                state[key] = sharding.zeros(p, shape, rows=key == "P", dtype=p.dtype, device=device)
            rows = not layout.left  # R keeps the weight's rows, and with them its sharding
            state.update(self._fresh_moments(p, group, layout.compact_shape, rows, device))
        return state

    def _fresh_moments(
        self, p: Tensor, group: dict[str, Any], shape: tuple[int, ...], rows: bool, device: torch.device
    ) -> dict[str, Tensor]:
        """The inner optimizer's tensors for a gradient (compact or full) of `shape`."""
        raise NotImplementedError

    def init_state(self) -> None:
        """Allocates the state of every parameter now; on the meta device this costs no memory."""
        for group in self.param_groups:
            for p in group["params"]:
                self._state_of(p, group)

    def _state_of(self, p: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        state = self.state[p]
        if not state:
            layout = self._layouts[p]
            if layout is not None and layout.k > 1:
                sharding.refuse(p, "a split weight (fused qkv)", "shard q, k and v apart, or leave split out")
            state.update(self._fresh_state(p, group, layout, p.device))
        return state

    def bases(self, p: Tensor) -> Bases:
        """(P, Q) of a projected weight as they stand."""
        state = self.state[p]
        return state.get("P"), state.get("Q")

    # -- what parallel and in-backward helpers ask --------------------------------------------------------

    def layout(self, p: Tensor) -> Layout | None:
        """How p is projected; None where it is not."""
        return self._layouts[p]

    def group_of(self, p: Tensor) -> dict[str, Any]:
        """The parameter group that holds p."""
        return self.param_groups[self._where[p]]

    def refresh_due(self, p: Tensor) -> bool:
        """Whether the next step will replace the basis of a projected weight."""
        state = self._state_of(p, self.group_of(p))
        return count(state["step"]) >= count(state["refresh_at"])

    def due_bases(self, p: Tensor, G: Tensor) -> Bases | None:
        """New bases of a projected weight, from its gradient G (…, m, n), where they are due; else None."""
        if not self.refresh_due(p):
            return None
        layout = self._layouts[p]
        assert layout is not None
        return self._new_bases(p, self.group_of(p), layout, G)

    # -- the step ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update from the gradients in `.grad`; a step with any NaN or Inf gradient changes nothing."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.apply([self.item(p) for group in self.param_groups for p in group["params"] if p.grad is not None])
        return loss

    @torch.no_grad()
    def item(self, p: Tensor, grad: Tensor | None = None) -> Item:
        """p's gradient (`.grad` unless given), projected where p is; changes no state but fresh zeros."""
        grad = p.grad if grad is None else grad
        assert grad is not None
        if grad.is_sparse:
            raise ValueError("GaLore takes dense gradients: build the embedding with sparse=False")
        group = self.group_of(p)
        state = self._state_of(p, group)
        layout = self._layouts[p]
        sign = -1.0 if group["maximize"] else 1.0
        if layout is None:
            return Item(p, group, None, grad if sign > 0 else -grad)
        G = layout.matrices(grad)
        new = self.due_bases(p, G)
        bases = (state.get("P"), state.get("Q")) if new is None else new
        R = sharding.reduced(project(G, bases))
        return Item(p, group, layout, R if sign > 0 else -R, new, G * sign if group.get("residual") else None)

    def _new_bases(self, p: Tensor, group: dict[str, Any], layout: Layout, G: Tensor) -> Bases | None:
        """Bases of G, the same on every process; None where G is zero or not finite and has none to give."""
        whole = sharding.gathered(G)
        largest = 1.0 if has_no_numbers(whole) else float(whole.abs().max())
        if largest == 0.0 or not math.isfinite(largest):
            return None
        refresh, state = group["refresh"], self.state[p]
        if refresh["method"] == "svd":
            new = exact_bases(whole, layout)
        else:
            step = count(state["step"])
            old: Bases | None = None
            if step > 0 and count(state["refresh_at"]) > 0:
                P, Q = self.bases(p)
                old = (
                    None if P is None else sharding.gathered(P),
                    None if Q is None else sharding.gathered(Q),
                )
            new = iterated_bases(
                whole / largest,  # products with GᵀG must neither overflow nor vanish
                layout,
                old,
                iterations=refresh["iterations"] + (old is None),
                oversample=refresh["oversample"],
                seed=step * 1_000_003 + self._order[p],
            )
        if self.process_group is not None:
            new = (self._first_ones(new[0]), self._first_ones(new[1]))
        return sharding.like(p, new[0], rows=True), sharding.like(p, new[1], rows=False)

    def _first_ones(self, basis: Tensor | None) -> Tensor | None:
        """The first process's basis: two kinds of device may round one gradient's basis apart."""
        if basis is not None:
            basis = basis.contiguous()
            dist.broadcast(basis, group_src=0, group=self.process_group)
        return basis

    @torch.no_grad()
    def apply(self, items: list[Item]) -> None:
        """Updates the weights of `items`, or, where any gradient is NaN or Inf, none of them."""
        if not items:
            return
        if not all_finite([i.grad for i in items]):
            warnings.warn("a gradient is NaN or Inf: the step was skipped", UserWarning, stacklevel=4)
            return
        by_group: dict[int, list[Item]] = {}
        for item in items:
            if item.new_bases is not None:
                self._put_bases(item, item.new_bases)
            by_group.setdefault(self._where[item.param], []).append(item)
        torch._foreach_add_([self.state[item.param]["step"] for item in items], 1.0)
        for mine in by_group.values():
            self._update(mine[0].group, mine)

    def _put_bases(self, item: Item, new: Bases) -> None:
        p, state, refresh = item.param, self.state[item.param], item.group["refresh"]
        step, base_gap = count(state["step"]), item.group["update_proj_gap"]
        first = count(state["refresh_at"]) == 0
        old = self.bases(p)
        if refresh["rotate"] and not first:
            self._rotate_moments(item, old, new)
        gap = base_gap
        if refresh["lazy"] is not None:
            if not first:
                kept = 1.0 if has_no_numbers(state["gap"]) else float(sharding.gathered(overlap(old, new)))
                if kept >= refresh["lazy"]:
                    gap = min(2 * count(state["gap"]), LAZY_LIMIT * base_gap)
            state["gap"].fill_(gap)
        for key, value in zip("PQ", new, strict=True):
            if value is not None:
                state[key].copy_(value)
        phase = self._order[p] * base_gap // len(self._order) if first and refresh["stagger"] else 0
        state["refresh_at"].fill_(step + (phase or gap))

    def _rotate_moments(self, item: Item, old: Bases, new: Bases) -> None:
        raise NotImplementedError

    def _update(self, group: dict[str, Any], items: list[Item]) -> None:
        """The inner optimizer's step on `items`, all of one group, whose step counts are already raised."""
        raise NotImplementedError
