"""Merging: the mean of the heads' deltas goes into the frozen weights, and training continues from there."""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from .config import LTEConfig
from .headed import Headed
from .injection import headed, replicas
from .ranks import Ranks
from .reached import Reached
from .replicas import Replicas
from .sums import sum_of_products
from .under_way import Copies, Layers, UnderWay, check_none_under_way, parts


@torch.no_grad()
def merge(
    model: nn.Module,
    *,
    ranks: Ranks | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    seed: int = 0,
    only: Collection[str] | None = None,
) -> None:
    """Merge every layer with heads and average every layer with copies, then reset what ``LTEConfig.reset`` says.

    The evaluated function does not change (unless there is outer momentum), and afterwards every head trains from it;
    with sparse merges from it and what that head still owes.

    =========  ===================  ======================  =======================================================
    reset      A, B                 offsets                 optimizer
    =========  ===================  ======================  =======================================================
    ``none``   stay                 A', B' ← A, B           its state stays
    ``B``      B ← 0                none                    forgets B, if ``LTEConfig.reset_optimizer``
    ``all``    A drawn anew, B ← 0  none                    forgets A and B, if ``LTEConfig.reset_optimizer``
    =========  ===================  ======================  =======================================================

    Args:
        ranks: the processes that hold the heads; all of them call this.
        optimizer: whose state is forgotten.
        seed: of the new A; the same on all processes, another at each merge.
        only: names of the layers to merge; None: all of them.

    Raises:
        ValueError: if the model has no heads, resets need the optimizer, or parts were injected to be merged otherwise.
        RuntimeError: if messages of an earlier merge are under way (``LTEConfig.merge_delay``).
        ConnectionAbortedError: if a process is lost; then nothing is merged here.
    """
    layers, copies = parts(model, only)
    config = _rule(model, layers, copies, optimizer)
    check_none_under_way(layers, copies)
    if config.merge_density < 1:
        _merge_messages(layers, copies, ranks)
    elif ranks is None or ranks.size == 1:
        for layer in layers.values():
            layer.take(layer.mean_delta(), layer.lora_A, layer.lora_B)
        for copy in copies.values():
            copy.take(copy.means())
    else:  # everything has arrived before anything changes: a lost process leaves a whole model behind
        arrived = _arrive(layers, ranks, "merges")
        means = _mean_copies(copies, ranks, "merges")
        for name, layer in layers.items():
            layer.take(*arrived.pop(name))
        for name, copy in copies.items():
            copy.take(means[name])
    if config.reset != "none":
        generator = torch.Generator().manual_seed(seed)
        for layer in layers.values():
            layer.reset(generator, A=config.reset == "all")
            if config.reset_optimizer and optimizer is not None:
                for factor in (layer.lora_A, layer.lora_B)[config.reset == "B" :]:
                    optimizer.state.pop(factor, None)


MERGED_ALIKE = ("reset", "reset_optimizer", "merge_density", "merge_delay")


def _rule(model: nn.Module, layers: Layers, copies: Copies, optimizer: torch.optim.Optimizer | None) -> LTEConfig:
    """What says how a merge of these goes: their configuration, in which they may differ otherwise.

    Raises:
        ValueError: if they have none, or several; or if resets need the optimizer.
    """
    if not headed(model):
        raise ValueError("the model has no LTE heads to merge: call lte.inject first")
    configs: dict[str, LTEConfig] = {name: layer.config for name, layer in layers.items()}
    configs |= {name: copy.config for name, copy in copies.items()}
    first, config = next(iter(configs.items()), ("", LTEConfig()))
    for name, other in configs.items():
        for setting in MERGED_ALIKE:
            one, two = getattr(config, setting), getattr(other, setting)
            if one != two:
                raise ValueError(
                    f"{first} was injected with {setting}={one!r} and {name} with {two!r}, and one merge has one "
                    f"{setting}: inject all parts with the same, or merge each by itself, by lte.merge with only="
                )
    if config.reset != "none" and config.reset_optimizer and optimizer is None:
        raise ValueError(f"reset={config.reset!r} lets the optimizer forget its state: pass optimizer=")
    return config


def _merge_messages(layers: Layers, copies: Copies, ranks: Ranks | None) -> None:
    """Sparse merges: every process's messages go to all others, and nothing changes before the last has arrived."""
    kept = [(copy, name) for copy in copies.values() for name in copy.own_names()]
    own = [layer.messages() for layer in layers.values()] + [copy.messages(name) for copy, name in kept]
    whole = iter(own if ranks is None else ranks.gather(own, "merges"))
    for layer in layers.values():
        layer.take_messages(next(whole))
    for copy, name in kept:
        copy.take_messages(name, next(whole))


Arrived = tuple[Tensor, Tensor | None, Tensor | None]  # the mean delta; A and B of all heads where W telescopes


def _arrive(layers: Mapping[str, Headed], ranks: Ranks, purpose: str) -> dict[str, Arrived]:
    """The mean delta of every layer over all heads, from all processes."""
    by_factors = {name: layer for name, layer in layers.items() if sends_factors(layer)}
    dense = {name: layer for name, layer in layers.items() if name not in by_factors}
    out: dict[str, Arrived] = {}
    own = [t for layer in by_factors.values() for t in _factors_to_send(layer)]
    whole = iter(ranks.gather(own, purpose))
    for name, layer in by_factors.items():
        A, B = next(whole), next(whole)
        total = sum_of_products(A, B)
        if layer.telescopes:
            total -= sum_of_products(layer.all_A, layer.all_B)
        out[name] = total.mul_(layer.scale / layer.total_heads), *((A, B) if layer.telescopes else (None, None))
    sums = ranks.sum([layer.own_sum() for layer in dense.values()], purpose)
    for (name, layer), total in zip(dense.items(), sums, strict=True):
        out[name] = total.mul_(layer.scale / layer.total_heads), None, None
    return out


def sends_factors(layer: Headed) -> bool:
    """Whether the factors of a layer travel, and not its dense delta: the rule of :mod:`lte.ranks`."""
    (m, n), (A, _) = layer.matrix_shape, _factors_to_send(layer)
    return layer.sparse is None and (layer.telescopes or layer.total_heads * A.shape[1] * (m + n) < 2 * m * n)


def _factors_to_send(layer: Headed) -> tuple[Tensor, Tensor]:
    """Where W telescopes, everyone has A' and B' of all heads already."""
    return (layer.lora_A.detach(), layer.lora_B.detach()) if layer.telescopes else layer.factors()


def _mean_copies(copies: Mapping[str, Replicas], ranks: Ranks, purpose: str) -> dict[str, dict[str, Tensor]]:
    """The mean of every layer's copies over all heads; tied layers' is sent once."""
    places: dict[nn.Parameter, tuple[Tensor, int]] = {}
    for copy in copies.values():
        for name in copy.names():
            places.setdefault(copy.get_parameter(name), (copy.own_sum(name), copy.total_heads))
    sums = ranks.sum([own for own, _ in places.values()], purpose)
    means = {p: total.div_(heads) for (p, (_, heads)), total in zip(places.items(), sums, strict=True)}
    return {path: {n: means[copy.get_parameter(n)] for n in copy.names()} for path, copy in copies.items()}


@contextmanager
def averaged(model: nn.Module, ranks: Ranks | None = None) -> Iterator[None]:
    """While entered, evaluation uses weights computed once, over the heads of all processes; enter it on every one.

    It takes a copy of every weight meanwhile. In a single process it only saves computing the mean delta at each
    forward pass.
    """
    layers, copies = headed(model), replicas(model)
    with torch.no_grad():
        if ranks is None or ranks.size == 1:
            deltas = {name: layer.mean_delta() for name, layer in layers.items()}
            means = {name: copy.means() for name, copy in copies.items()}
        else:
            deltas = {name: arrived[0] for name, arrived in _arrive(layers, ranks, "evaluation").items()}
            means = _mean_copies(copies, ranks, "evaluation")
        for name, layer in layers.items():
            layer.evaluated = layer.in_own_shape(layer.master() + deltas.pop(name))
        for name, copy in copies.items():
            copy.evaluated = means[name]
    try:
        yield
    finally:
        for layer in layers.values():
            layer.evaluated = None
        for copy in copies.values():
            copy.evaluated = None


class Merger:
    """The merge clock: ``step()`` after each optimizer step merges every T-th time.

    With ``LTEConfig.merge_delay`` d, messages c_h that are sent at one step are merged d steps later, while training
    goes on: W ← W + s·mean_h c_h. Until then head h owes c_h with the rest, and what it learns meanwhile is in its next
    message.

    Args:
        model: with heads.
        every: T, in optimizer steps (not micro-batches); 0 never merges, and needs neither heads nor an optimizer.
        ranks, optimizer: as :func:`merge` takes them.
        seed: of what resets draw.
        unreached: given the sentence that names heads without a gradient after the first step; None warns.
        in_turn: spread the layers over the T steps, each merged at its own every T-th, so that a merge's bytes are sent
            little by little and never all in one step.

    Raises:
        ValueError: if merges would be refused: see :func:`merge`.
    """

    def __init__(
        self,
        model: nn.Module,
        every: int,
        *,
        ranks: Ranks | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        seed: int = 0,
        unreached: Callable[[str], None] | None = None,
        in_turn: bool = False,
    ) -> None:
        if every < 0:
            raise ValueError(f"every must be 0 (never) or a number of optimizer steps, got {every}")
        if every:  # else the first merge would be the first to say so
            _rule(model, headed(model), replicas(model), optimizer)
        self._delay = next((layer.config.merge_delay for layer in headed(model).values()), 0)
        if every and self._delay > every:
            raise ValueError(
                f"merge_delay {self._delay} must be at most every, {every}: one merge arrives before the next"
            )
        if ranks is not None and self._delay:
            ranks.open_beside()
        self._model, self._ranks, self._optimizer, self._seed = model, ranks, optimizer, seed
        self.every, self.in_turn = every, in_turn
        self.steps = 0
        self.merges = 0
        self._under_way: list[UnderWay] = []
        self._reached = Reached(model, unreached)

    def step(self) -> bool:
        """Count an optimizer step; -> whether it merged. After the first, layers without a gradient are named."""
        self._reached.say()
        self.steps += 1
        only = self._turn()
        due = bool(only) if self.in_turn else self.every > 0 and self.steps % self.every == 0
        if self._delay:
            return self._later(only, due)
        if due:
            seed = self._seed * 1_000_003 + self.merges
            merge(self._model, ranks=self._ranks, optimizer=self._optimizer, seed=seed % 2**63, only=only)
            self.merges += 1
        return due

    def _later(self, only: list[str] | None, due: bool) -> bool:
        """Merge what was sent d steps ago, and what was sent of layers that are due again; then send what is due."""
        names = [*headed(self._model), *replicas(self._model)] if only is None else only
        sending = set(names) if due else set()
        arrived = [m for m in self._under_way if m.step + self._delay <= self.steps or sending & {*m.names}]
        for sent in arrived:
            self._take(sent)
        if due:
            self._under_way.append(UnderWay(self._model, names, self.steps, self._ranks))
        return bool(arrived)

    def _take(self, sent: UnderWay) -> None:
        sent.arrive()
        self._under_way.remove(sent)
        self.merges += 1

    def settle(self) -> None:
        """When another process is lost: merge what has arrived whole. What has not is owed by those that sent it."""
        for sent in [m for m in self._under_way if m.has_ended()]:
            with suppress(ConnectionAbortedError):
                self._take(sent)

    def _turn(self) -> list[str] | None:
        """The layers whose turn it is, in the model's order; the last ones' is where all would be merged together."""
        if not self.in_turn or not self.every:
            return None
        units = [
            name
            for name, m in self._model.named_modules()
            if isinstance(m, Headed) or (isinstance(m, Replicas) and m.own_names())
        ]
        turns = min(self.every, len(units))
        now = [g for g in range(turns) if (g + 1) * self.every // turns % self.every == self.steps % self.every]
        return [name for i, name in enumerate(units) if i * turns // len(units) in now]

    def state_dict(self) -> dict[str, Any]:
        """``under_way``: the step of each merge that is, and its layers; their messages are in the layers' buffers."""
        counts = {"steps": self.steps, "merges": self.merges}
        return counts | ({"under_way": [[m.step, m.names] for m in self._under_way]} if self._delay else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps, self.merges = state["steps"], state["merges"]
        merged: list[Headed | Replicas] = [*headed(self._model).values(), *replicas(self._model).values()]
        for m in merged:
            m.under_way = False
        self._under_way = [
            UnderWay(self._model, names, step, self._ranks, again=True) for step, names in state.get("under_way", ())
        ]
