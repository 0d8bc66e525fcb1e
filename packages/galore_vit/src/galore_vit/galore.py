"""What every GaLore optimizer shares: groups, bases, the order of a step. Subclasses have the update rules.

Paper: Zhao et al., "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection" (2024,
arXiv:2403.03507), Algorithm 2. One step of a projected weight W (m×n):

    every T steps:  P, Q ← leading singular vectors of G
    R = Pᵀ G Qᵀ,   N = ρ(R),   W ← W − η·α·P N Q

where ρ is the inner optimizer (Adam, 8-bit Adam, Adafactor), which sees and remembers only R.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from galore_vit import sharding
from galore_vit.basis import drawn_bases, found_bases
from galore_vit.counters import count, counts
from galore_vit.finite import all_finite
from galore_vit.item import Item, Record
from galore_vit.loading import in_own_dtypes
from galore_vit.plain import said_of_plain
from galore_vit.projection import Bases, Layout, layout_of, project
from galore_vit.refreshing import needs_old, put_bases
from galore_vit.settings import AS_PUBLISHED, Refresh, check_refresh, check_weights, completed, fixed_keys, misspelt
from galore_vit.tensors import TensorLayout


class GaLore(Optimizer):
    """Projects gradients, refreshes bases, skips non-finite steps. Use one of its subclasses."""

    inner = ""
    """The update rule where nothing is projected, by name."""
    draws = False
    """Whether bases may be random ones, which it must not project back by."""
    whole_gradients = False
    """Whether a projected weight moves by its whole gradient."""
    _made = True
    """Whether groups that are added now come after those of the construction."""
    _frames = 4
    """From a warning of the construction to who constructs."""
    fed = False
    """Whether :class:`galore_vit.InBackward` takes the gradients, whose step it then is."""
    _gradients: Callable[[], list[Item]] | None = None
    """What the next step moves the weights by, where it is not their `.grad`."""
    later: frozenset[str] = frozenset()
    """Settings that states saved by earlier versions lack; the optimizer's own then hold."""

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
        if not isinstance(refresh, Refresh):
            raise ValueError(f"refresh must be a Refresh, such as Refresh(method='svd'), not {refresh!r}")
        check_refresh(refresh, draws=self.draws)
        self.skipped_steps = 0
        """Steps that were skipped because a gradient was NaN or Inf, since this optimizer was made. Not saved."""
        self._too_small: list[tuple[int, ...]] = []
        self._misspelt: list[str] = []
        self.process_group: dist.ProcessGroup | None = None  # set where processes must share new bases
        # A plain dict, so that a saved state holds nothing but tensors, numbers and strings.
        defaults = {**defaults, "refresh": asdict(refresh), "paper": paper, "maximize": maximize}
        self._keys = frozenset(defaults)  # torch adds keys of its own to self.defaults when a state is loaded
        self._made = False
        super().__init__(params, defaults)
        self._made = True
        self._say_what_is_plain(stacklevel=self._frames)

    # -- construction and loading -----------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group; with `rank` in it, its matrices are projected (its other keys have defaults). A key that
        nothing reads is let be, as by torch.optim, and warned of where it is nearly one that is read."""
        group = completed(param_group, residual=self.defaults.get("residual"), draws=self.draws)
        super().add_param_group(group)
        try:
            self._check_hyperparameters(self.param_groups[-1])
            self._too_small += check_weights(self.param_groups[-1])
            self._misspelt += misspelt(param_group, self.defaults)
        except ValueError:
            self.param_groups.pop()  # as before the call: the group can be added again, mended
            raise
        self._index()
        if self._made:
            self._say_what_is_plain(stacklevel=3)

    def _check_hyperparameters(self, group: dict[str, Any]) -> None:
        raise NotImplementedError

    def _say_what_is_plain(self, stacklevel: int) -> None:
        for said in (*self._misspelt, said_of_plain(self, self._too_small, projected=self._projected)):
            if said:
                warnings.warn(said, UserWarning, stacklevel=stacklevel)
        self._too_small, self._misspelt = [], []

    def _index(self) -> None:
        """What is fixed about each parameter: its group, its layout, its place among the projected ones."""
        self._records: dict[Tensor, Record] = {}
        projected = 0
        for i, group in enumerate(self.param_groups):
            for p in group["params"]:
                layout = layout_of(p.shape, group)
                self._records[p] = Record(p, i, layout, projected, sharding.is_sharded(p))
                projected += layout is not None
        self._projected = projected
        self._fixed = [fixed_keys(group) for group in self.param_groups]

    def _record(self, p: Tensor) -> Record:
        if p not in self._records:
            self._index()
        return self._records[p]

    def _check_index(self) -> None:
        """Index anew where others have replaced the groups' parameters, as accelerate does for FSDP2.

        Raises:
            ValueError: where a group's key was changed that its states' shapes depend on.
        """
        for i, (group, fixed) in enumerate(zip(self.param_groups, self._fixed, strict=False)):
            for (key, value), (_, was) in zip(fixed_keys(group), fixed, strict=True):
                if value != was:
                    raise ValueError(
                        f"param_groups[{i}][{key!r}] was changed from {was} to {value}, and the states have the shapes "
                        f"of {was}: set it back, or make a new optimizer"
                    )
        now = [p for group in self.param_groups for p in group["params"]]
        if len(now) != len(self._records) or any(a is not b for a, b in zip(now, self._records, strict=True)):
            self._index()

    def state_dict(self) -> dict[str, Any]:
        """As torch's; refused where a group no longer says what its states are (see :meth:`step`)."""
        self._check_index()
        return super().state_dict()

    def __getstate__(self) -> dict[str, Any]:
        # what a copy has beside torch's own part; a group of processes is not copied
        own = {"_keys": self._keys, "skipped_steps": self.skipped_steps, "process_group": None}
        return {**super().__getstate__(), **own, "_too_small": [], "_misspelt": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._index()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state, casting each tensor to the dtype and device that this optimizer would give it, not to the
        parameter's, which would spoil 8-bit codes and counters. The tensors given stay the caller's.

        Raises:
            ValueError: if it does not fit this optimizer, which is then as it was.
        """
        with in_own_dtypes(self):
            super().load_state_dict(state_dict)

    # -- state ------------------------------------------------------------------------------------------

    def _fresh_state(
        self, p: Tensor, group: dict[str, Any], layout: Layout | TensorLayout | None, device: torch.device
    ) -> dict[str, Tensor]:
        """The state of a weight that has taken no step: zeros on `device`, counters on the CPU."""
        state = {"step": torch.zeros((), dtype=torch.float32, device="cpu")}  # whatever torch's defaults are
        if layout is None:
            state.update(self._fresh_moments(p, group, tuple(p.shape), True, device))
        else:
            state["refresh_at"] = torch.zeros((), dtype=torch.int64, device="cpu")
            if group["refresh"]["lazy"] is not None:
                state["gap"] = torch.tensor(group["update_proj_gap"], device="cpu")
            shapes = layout.basis_shapes
            if group["refresh"]["method"] == "random":
                shapes, state["drawn_at"] = {}, torch.zeros((), dtype=torch.int64, device="cpu")
            for key, shape in shapes.items():
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
        self._check_index()
        for group in self.param_groups:
            for p in group["params"]:
                self._state_of(p, group)

    def _state_of(self, p: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        state = self.state[p]
        if not state:
            layout = self.layout(p)
            if layout is not None and layout.k > 1:
                sharding.refuse(p, "a split weight (fused qkv)", "shard q, k and v apart, or leave split out")
            if isinstance(layout, TensorLayout):
                sharding.refuse(p, "a weight with dim above 2", "leave dim out, and it is projected as a matrix")
            state.update(self._fresh_state(p, group, layout, p.device))
        return state

    def bases(self, p: Tensor) -> Bases:
        """(P, Q) of a projected weight as they stand; of a tensor one basis a mode."""
        return self._bases_in(self._record(p), self.state[p])

    def _bases_in(self, record: Record, state: dict[str, Tensor]) -> Bases:
        layout = record.layout
        if "drawn_at" in state:
            return self._drawn(record, count(state["drawn_at"]))
        return tuple(state.get(key) for key in (layout.keys if layout is not None else ("P", "Q")))

    def _drawn(self, record: Record, step: int) -> Bases:
        """The random bases that hold from `step` on."""
        assert isinstance(record.layout, Layout)
        P, Q = drawn_bases(record.layout, sharding.local(record.param), step * 1_000_003 + record.order)
        return sharding.placed(record.param, P, rows=True), sharding.placed(record.param, Q, rows=False)

    # -- what parallel and in-backward helpers ask --------------------------------------------------------

    def layout(self, p: Tensor) -> Layout | TensorLayout | None:
        """How p is projected; None where it is not."""
        return self._record(p).layout

    def group_of(self, p: Tensor) -> dict[str, Any]:
        """The parameter group that holds p."""
        return self.param_groups[self._record(p).group]

    def refresh_due(self, p: Tensor) -> bool:
        """Whether the next step will replace the basis of a projected weight."""
        state = self._state_of(p, self.group_of(p))
        return count(state["step"]) >= count(state["refresh_at"])

    def due_bases(self, p: Tensor, G: Tensor) -> Bases | None:
        """New bases of a projected weight, from its gradient G (…, m, n), where they are due; else None."""
        layout = self.layout(p)
        if layout is None or not self.refresh_due(p):
            return None
        return self._new_bases(p, self.group_of(p), layout, G)

    # -- the step ---------------------------------------------------------------------------------------

    @torch.compiler.disable(reason="a GaLore step is decided by the numbers in its counters and gradients")
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update from the gradients in `.grad`; a step with any NaN or Inf gradient changes nothing. Under
        torch.compile it runs as it is: traced, its counters would hold no numbers.

        Raises:
            RuntimeError: where an InBackward has taken the gradients.
            ValueError: where a group's rank, or what else decides its states' shapes, was changed.
        """
        if self.fed and self._gradients is None:
            raise RuntimeError(
                "InBackward takes this optimizer's gradients, so this step would move the plain parameters alone: call "
                "in_backward.step(), or in_backward.close() first"
            )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.apply((self._gradients or self._items)())
        return loss

    def step_by(self, gradients: Callable[[], list[Item]]) -> None:
        """A step from other gradients than those in `.grad`, as any other step to schedulers and hooks."""
        self._gradients = gradients
        try:
            self.step()
        finally:
            self._gradients = None

    def _items(self) -> list[Item]:
        """An item for every parameter that has a gradient."""
        self._check_index()
        having = [(r, r.param.grad) for r in self._records.values() if r.param.grad is not None]
        states = [self._state_of(r.param, self.param_groups[r.group]) for r, _ in having]
        projected = [s for s in states if "refresh_at" in s]
        steps, due = counts([s["step"] for s in projected]), counts([s["refresh_at"] for s in projected])
        is_due = iter([t >= at for t, at in zip(steps, due, strict=True)])
        return [
            self._item(r, grad, state, "refresh_at" in state and next(is_due))
            for (r, grad), state in zip(having, states, strict=True)
        ]

    @torch.no_grad()
    def item(self, p: Tensor) -> Item:
        """p's gradient, projected where p is; changes no state but fresh zeros."""
        assert p.grad is not None
        state = self._state_of(p, self.group_of(p))
        return self._item(self._record(p), p.grad, state, "refresh_at" in state and self.refresh_due(p))

    def compact_item(self, p: Tensor, R: Tensor, new_bases: Bases | None) -> Item:
        """An item of a weight whose gradient was projected before, by `new_bases` or the present ones."""
        record, group = self._record(p), self.group_of(p)
        return Item(record, group, self._state_of(p, group), -R if group["maximize"] else R, new_bases)

    def _item(self, record: Record, grad: Tensor, state: dict[str, Tensor], due: bool) -> Item:
        if grad.is_sparse:
            raise ValueError("GaLore takes dense gradients: build the embedding with sparse=False")
        group, layout = self.param_groups[record.group], record.layout
        negative = group["maximize"]
        if layout is None:
            return Item(record, group, state, -grad if negative else grad)
        G = layout.matrices(grad)
        new = self._new_bases(record.param, group, layout, G) if due else None
        R = project(G, new or self._bases_in(record, state))
        if record.sharded:
            R = sharding.reduced(R)
        full = (-G if negative else G) if self.whole_gradients or group.get("residual") else None
        return Item(record, group, state, -R if negative else R, new, full)

    def _new_bases(self, p: Tensor, group: dict[str, Any], layout: Layout | TensorLayout, G: Tensor) -> Bases | None:
        """Bases of G, the same on every process; None where G is zero or not finite and has none to give."""
        if group["refresh"]["method"] == "random":
            return self._drawn(self._record(p), count(self.state[p]["step"]))
        state = self.state[p]
        old: Bases | None = None
        warm = group["refresh"]["method"] != "svd" or layout.k > 1
        if warm and count(state["step"]) > 0 and count(state["refresh_at"]) > 0:
            old = tuple(None if b is None else sharding.gathered(b) for b in self.bases(p))
        seed = count(state["step"]) * 1_000_003 + self._record(p).order
        new = found_bases(sharding.gathered(G), layout, old, group["refresh"], seed)
        if new is None:
            return None
        if self.process_group is not None:
            new = tuple(self._first_ones(b) for b in new)
        return tuple(sharding.like(p, b, rows=key == "P") for key, b in zip(layout.keys, new, strict=True))

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
            self.skipped_steps += 1
            warnings.warn("a gradient, or its square, is NaN or Inf: the step was skipped", UserWarning, stacklevel=4)
            return
        by_group: dict[int, list[Item]] = {}
        for item in items:
            if item.new_bases is not None:
                old = self.bases(item.param) if needs_old(item) else ()
                put_bases(item, old, item.new_bases, rotate=self._rotate_moments, projected=self._projected)
            by_group.setdefault(item.record.group, []).append(item)
        steps = [item.state["step"] for item in items]
        torch._foreach_add_(steps, [steps[0].new_ones(())] * len(steps))  # a number is made a tensor for each counter
        for item, step in zip(items, counts(steps), strict=True):
            item.step = step
        for mine in by_group.values():
            self._update(mine[0].group, mine)

    def _rotate_moments(self, item: Item, old: Bases, new: Bases) -> None:
        raise NotImplementedError

    def _update(self, group: dict[str, Any], items: list[Item]) -> None:
        """The inner optimizer's step on `items`, all of one group, whose step counts are already raised."""
        raise NotImplementedError
