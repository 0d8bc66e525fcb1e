"""Gradients projected during the backward pass, so that full ones never stand side by side.

Each projected weight's gradient is reduced to R as soon as autograd has finished it, added to what earlier
micro-batches left, and freed. Projection is linear, so the sum of the projected micro-batches is the
projected sum. The weights move in `step()`, after the last micro-batch; until then nothing has changed, and
clipping, loss scaling and learning-rate schedules work as with any optimizer.

What stands for the gradients is a set of parameters whose `.grad` are the compact gradients: hand
`in_backward.parameters()` to `clip_grad_norm_` and `in_backward` itself to `GradScaler`.

The norm that clipping needs is that of the full gradients, and R has only the part inside the subspace. The part
that projection dropped, D = Σ(Gₖ − P Rₖ Q), therefore has a stand-in beside each R. Of one micro-batch in one process
its norm is known when G is freed, and a number says it all. Over several, the dropped parts add up to something that
no small memory can know exactly: ‖D‖² has the products of all pairs of micro-batches in it. `norm` chooses:

    "exact"      D itself, m×n: the true norm, for the memory that plain accumulation takes
    "sketch"     DΩ, m×16, with a random Ω drawn anew each step: E‖DΩ‖² = ‖D‖²
    "projected"  nothing: the norm of the projected gradients alone, which is what moves the weights

Of a linear layer, R follows from the layer's inputs and the gradient of its outputs by two thin products
(`factored.py`). Where the model is given, G itself is made only where a basis is due.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn

from galore_vit import sharding
from galore_vit.counters import count
from galore_vit.factored import Factors, Receiver, hand_over, projected_from, take_back
from galore_vit.galore import GaLore
from galore_vit.internals import backward_pass, without_autocast
from galore_vit.item import Item
from galore_vit.projection import Bases, Layout, project, project_back
from galore_vit.stand_ins import add, check_processes, claim, give_up, linears_of, stand_in
from galore_vit.tensors import TensorLayout

Norm = Literal["exact", "sketch", "projected"]
SKETCH = 16
"""Columns of the random map."""


class InBackward:
    """Feeds an optimizer from inside the backward pass. Stands in for it in a training loop:

        in_backward = InBackward(GaLoreAdamW(groups), micro_batches=4)
        for part in parts: (loss(part) / 4).backward()
        clip_grad_norm_(in_backward.parameters(), 1.0)
        in_backward.step(); in_backward.zero_grad()

    A due basis is found from the first micro-batch's gradient alone: the sum is not yet known then.
    Schedulers and checkpoints belong to the optimizer, which keeps all of the state.

    Args:
        optimizer: a GaLore optimizer without residual (which needs the full gradient).
        micro_batches: backward passes per step; more or fewer are refused at the step. In one process a weight may be
            left out of some of them.
        process_group: average gradients over these processes, compact ones where projected. The model
            must then not be wrapped in DistributedDataParallel. `dist.group.WORLD` for all processes.
        norm: which norm `clip_grad_norm_(in_backward.parameters())` finds. "exact": the full gradients'; with
            micro_batches above 1 or a process group it keeps (and sends) a tensor of each weight's size
            between micro-batches. "sketch": an estimate without bias from 16 numbers a row, where exactness is
            not free. "projected": the projected gradients'. Without clipping, take "projected".
        model: in its `nn.Linear` layers a projected weight's gradient is not made but at the step of a refresh: its
            projection comes from the layer's inputs X and the gradient of its outputs. Where Q alone is used and
            norm is "projected", the layer keeps X Qᵀ for the backward pass, and not X. `factored` says of which
            weights. The numbers are the same but for rounding. Not with norm="exact", which needs G. What is no
            plain training pass of a plain layer goes the ordinary way (the README lists it).

    Raises:
        ValueError: a setting or an optimizer that cannot be, a model none of whose linear layers has a projected
            weight, or weights whose gradients another InBackward takes.

    Warns:
        UserWarning: where there are several processes and no process_group.
    """

    def __init__(
        self,
        optimizer: GaLore,
        micro_batches: int = 1,
        *,
        process_group: dist.ProcessGroup | None = None,
        norm: Norm = "exact",
        model: nn.Module | None = None,
    ) -> None:
        if not isinstance(optimizer, GaLore):
            raise TypeError(f"InBackward feeds a GaLore optimizer, not {type(optimizer).__name__}")
        if type(micro_batches) is not int or micro_batches < 1:
            raise ValueError(f"micro_batches must be a whole number of at least 1, not {micro_batches!r}")
        if norm not in get_args(Norm):
            raise ValueError(f"norm must be one of {', '.join(get_args(Norm))}, not {norm!r}")
        if model is not None and norm == "exact":
            raise ValueError(
                'norm="exact" needs gradients, which are not made where a model is given: take "sketch" or "projected"'
            )
        check_processes(model, process_group)
        self.optimizer = optimizer
        self.micro_batches = micro_batches
        self.process_group = process_group
        adds_up = micro_batches > 1 or process_group is not None or model is not None
        self._norm: Norm | Literal["number"] = norm if adds_up or norm == "projected" else "number"
        self._compact: dict[Tensor, nn.Parameter] = {}
        self._dropped: dict[Tensor, nn.Parameter] = {}
        self._index: dict[Tensor, int] = {}
        self._new_bases: dict[Tensor, Bases | None] = {}
        self._passes: dict[Tensor, int] = {}
        self._last_pass: dict[Tensor, int] = {}
        self._reduced = False
        for group in optimizer.param_groups:
            if optimizer.whole_gradients:
                raise ValueError(
                    f"{type(optimizer).__name__} moves weights by full gradients, which InBackward frees: use it alone"
                )
            if group.get("residual"):
                raise ValueError("the residual needs full gradients, which InBackward frees: set residual=False")
            for p in group["params"]:
                sharding.refuse(p, "a weight inside the backward pass", "FSDP2 frees its gradients itself")
                layout = optimizer.layout(p)
                if isinstance(layout, TensorLayout):
                    raise ValueError("InBackward projects matrices: leave out dim, or use the optimizer without it")
                if layout is None or not p.requires_grad:
                    continue
                self._index[p] = len(self._index)
                self._compact[p] = stand_in(p, layout.compact_shape)
                if self._norm != "projected":
                    self._dropped[p] = stand_in(p, self._dropped_shape(layout))
        self._linears = linears_of(model, self._compact) if model is not None else []
        claim(self._compact, self)
        optimizer.process_group, optimizer.fed = process_group, True
        self._hooks = [p.register_post_accumulate_grad_hook(self._take) for p in self._compact]
        for linear in self._linears:
            hand_over(linear, Receiver(self))

    @property
    def factored(self) -> list[Tensor]:
        """The weights whose gradients are made only at a refresh."""
        return list(dict.fromkeys(linear.weight for linear in self._linears))

    def close(self) -> None:
        """Removes the hooks: the optimizer can be used alone again."""
        for hook in self._hooks:
            hook.remove()
        for linear in self._linears:
            take_back(linear)
        self._linears, self._hooks = [], []
        give_up(self._compact, self)
        self.optimizer.process_group, self.optimizer.fed = None, False

    def _dropped_shape(self, layout: Layout) -> tuple[int, ...]:
        if self._norm == "number":
            return ()
        if self._norm == "sketch":
            return layout.stacked(layout.n if layout.left else layout.m, SKETCH)
        return layout.stacked(layout.m, layout.n)

    # -- what a training loop and GradScaler use -----------------------------------------------------------

    def parameters(self) -> Iterator[Tensor]:
        """What has the gradients now: plain parameters, and the stand-ins of projected ones.

        Between the last backward pass and the step of several processes they are averaged first (:meth:`reduce`), so
        that clipping and loss scaling see the same on every process: every one must ask then.
        """
        if self._passes and max(self._passes.values()) == self.micro_batches:
            self.reduce()
        yield from self._held()

    def _held(self) -> Iterator[Tensor]:
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                if p in self._compact:
                    yield self._compact[p]
                    if p in self._dropped:
                        yield self._dropped[p]
                else:
                    yield p

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """One group of `parameters()`; the learning rates are in the optimizer's own groups."""
        return [{"params": list(self.parameters())}]

    @property
    def skipped_steps(self) -> int:
        """The optimizer's."""
        return self.optimizer.skipped_steps

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops all gradients, compact ones included."""
        self.optimizer.zero_grad(set_to_none)
        for held in (*self._compact.values(), *self._dropped.values()):
            held.grad = None
        self._new_bases.clear()
        self._passes.clear()
        self._last_pass.clear()
        self._reduced = False

    @torch.no_grad()
    def reduce(self) -> None:
        """Averages what is held over the processes; `step` does it unless called before, for clipping."""
        self._check_passes()
        if self.process_group is None or self._reduced:
            return
        grads = [p.grad for p in self._held() if p.grad is not None]
        for dtype in {g.dtype for g in grads}:
            alike = [g for g in grads if g.dtype == dtype]
            flat = torch.cat([g.reshape(-1) for g in alike])
            dist.all_reduce(flat, group=self.process_group)
            flat /= self.process_group.size()
            for g, piece in zip(alike, flat.split([g.numel() for g in alike]), strict=True):
                g.copy_(piece.view(g.shape))
        self._reduced = True

    @torch.compiler.disable(reason="a GaLore step is decided by the numbers in its counters and gradients")
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Moves the weights by what the micro-batches left."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.reduce()
        self.optimizer.step_by(self._items)
        return loss

    def _items(self) -> list[Item]:
        items = []
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                if p not in self._compact:
                    if p.grad is not None:
                        items.append(self.optimizer.item(p))
                    continue
                if p.grad is not None:
                    raise RuntimeError(
                        f"a projected weight {tuple(p.shape)} has a gradient that no backward pass gave: "
                        "InBackward takes those of backward() alone, so add a penalty to the loss, or close() it"
                    )
                if (R := self._compact[p].grad) is not None:
                    items.append(self.optimizer.compact_item(p, R, self._new_bases.get(p)))
        return items

    # -- inside the backward pass ----------------------------------------------------------------------------

    @torch.no_grad()
    def _take(self, p: Tensor) -> None:
        """Projects p's finished gradient into the stand-in and frees it."""
        G = p.grad
        if G is None:  # it came by its factors
            return
        if G.is_sparse:
            raise ValueError("GaLore takes dense gradients: build the embedding with sparse=False")
        p.grad = None
        layout = self.optimizer.layout(p)
        assert isinstance(layout, Layout)
        matrix = layout.matrices(G)
        # a first micro-batch whose gradient was 0 had no basis to give, and left nothing
        if p not in self._passes or (self._new_bases.get(p) is None and self.optimizer.refresh_due(p)):
            mean = matrix
            if self.process_group is not None and self.optimizer.refresh_due(p):
                mean = matrix.clone()
                dist.all_reduce(mean, group=self.process_group)
                mean /= self.process_group.size()
            self._new_bases[p] = self.optimizer.due_bases(p, mean)
        self._count_pass(p)
        with without_autocast(p):
            bases = self._bases_now(p)
            R = project(matrix, bases)
            add(self._compact[p], R)
            if self._norm == "exact":
                add(self._dropped[p], matrix - project_back(R, bases))
            elif self._norm == "number":
                dropped = matrix.float().square().sum() - R.float().square().sum()
                add(self._dropped[p], dropped.clamp_min(0.0).sqrt().to(R.dtype))
            elif self._norm == "sketch":
                omega = self._random_map(p, layout)
                self._add_sketch(p, layout, (matrix.mT if layout.left else matrix) @ omega, R, bases, omega)

    def makes_no_gradient(self, p: Tensor) -> bool:
        """Whether the next gradient of p need not be made; it must be in a step that finds a basis, and for a tensor
        that stands in the place of a weight."""
        return p in self._compact and not self.optimizer.refresh_due(p)

    def kept_basis(self, p: Tensor) -> Tensor | None:
        """Q where X Qᵀ is all that is needed of a layer's inputs X, and is smaller."""
        layout = self.optimizer.layout(p)
        assert isinstance(layout, Layout)
        if layout.left or self._norm != "projected" or layout.k * layout.rank >= layout.n:
            return None
        return self._bases_now(p)[1]

    @torch.no_grad()
    def take(self, p: Tensor, Y: Tensor, X: Tensor, projected: bool) -> None:
        """Projects p's gradient Yᵀ X, which is not made, into the stand-in; of `projected` X it is X Qᵀ."""
        layout = self.optimizer.layout(p)
        assert isinstance(layout, Layout)
        if not self._linears:
            raise RuntimeError(
                "InBackward was closed between a forward pass and its backward pass: close it after a step"
            )
        if p not in self._passes and self.optimizer.refresh_due(p):
            raise RuntimeError(
                "the optimizer's state was replaced, or a step taken, between a forward pass and its backward pass, "
                "and now a basis is due: run the forward pass again"
            )
        self._count_pass(p)
        with without_autocast(p):
            if projected:
                add(self._compact[p], projected_from(Y, X, layout.k, p.dtype))
                return
            factors, bases = Factors.of(Y, X, layout.k), self._bases_now(p)
            R = factors.project(bases)
            add(self._compact[p], R)
            if self._norm == "sketch":
                omega = self._random_map(p, layout)
                sketch = factors.transposed_times(omega) if layout.left else factors.times(omega)
                self._add_sketch(p, layout, sketch, R, bases, omega)

    def _bases_now(self, p: Tensor) -> Bases:
        """The ones that this step's gradients are projected by."""
        return self._new_bases.get(p) or self.optimizer.bases(p)

    def _count_pass(self, p: Tensor) -> None:
        """One more, unless this backward pass gave a part of p's gradient before: a layer may stand at two places."""
        now = backward_pass()
        if self._last_pass.get(p) != now:
            self._last_pass[p] = now
            self._passes[p] = self._passes.get(p, 0) + 1

    def _add_sketch(self, p: Tensor, layout: Layout, whole: Tensor, R: Tensor, bases: Bases, omega: Tensor) -> None:
        """(G − PRQ)Ω where Q is used, or its transpose's, from GΩ or GᵀΩ: the dropped part itself is not built."""
        if layout.left:
            R, bases = R.mT, _transposed(bases)
        P, Q = bases
        inside = R if P is None else P @ R
        add(self._dropped[p], whole - (inside @ (Q @ omega) if Q is not None else 0))

    def _random_map(self, p: Tensor, layout: Layout) -> Tensor:
        """Ω (n×s, m×s where P is used) of ±1/√s: ‖XΩ‖² is ‖X‖² on average. Fixed within a step, drawn anew for each."""
        step = count(self.optimizer.state[p]["step"])
        draw = torch.Generator().manual_seed(step * 1_000_003 + self._index[p])
        shape = (layout.m if layout.left else layout.n, SKETCH)
        signs = torch.randint(0, 2, shape, generator=draw, dtype=torch.int8, device="cpu")
        return (signs.to(p) * 2 - 1) / SKETCH**0.5

    def _check_passes(self) -> None:
        """In one process a layer may be left out of some micro-batches, as experts are; several would then send to each
        other what does not belong together."""
        found = set(self._passes.values()) or {self.micro_batches}
        wrong = found - {self.micro_batches}
        passes = max(found) if self.process_group is None or not wrong else wrong.pop()
        if passes != self.micro_batches:
            raise RuntimeError(
                f"{passes} backward passes since the last zero_grad, and micro_batches is "
                f"{self.micro_batches}: run exactly that many, and zero_grad after each step (one pass may count twice "
                "for a layer at two places under checkpoint(use_reentrant=True): take use_reentrant=False)"
            )


def _transposed(bases: Bases) -> Bases:
    P, Q = bases
    return None if Q is None else Q.mT, None if P is None else P.mT
