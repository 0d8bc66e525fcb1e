"""Sparse merges that take place some steps after their messages were sent, while training goes on."""

from collections.abc import Collection, Mapping

import torch
from torch import nn

from .headed import Headed
from .injection import headed, replicas
from .ranks import Gathering, Ranks
from .replicas import Replicas

Layers = Mapping[str, Headed]
Copies = Mapping[str, Replicas]


def parts(model: nn.Module, only: Collection[str] | None) -> tuple[Layers, Copies]:
    """What a merge merges: all, or what ``only`` names."""
    layers, copies = headed(model), replicas(model)
    if only is None:
        return layers, copies
    if unknown := set(only) - {*layers, *copies}:
        there = ", ".join([*layers, *copies][:6])
        raise ValueError(f"only names {sorted(unknown)[0]!r}, which has no heads; there are {there}, …")
    return {n: m for n, m in layers.items() if n in only}, {n: m for n, m in copies.items() if n in only}


def check_none_under_way(layers: Layers, copies: Copies) -> None:
    for name, m in [*layers.items(), *copies.items()]:
        if m.under_way:
            raise RuntimeError(f"{name} has messages under way: its Merger takes them before it is merged again")


class UnderWay:
    """Sparse merges whose messages have been sent (``LTEConfig.merge_delay``) and are merged later: :meth:`arrive`.

    Args:
        names: of the layers that are merged.
        step: at which the messages were sent.
        again: the messages are those that the layers hold, as a checkpoint left them; they travel when they arrive.
    """

    def __init__(
        self, model: nn.Module, names: Collection[str], step: int, ranks: Ranks | None, *, again: bool = False
    ) -> None:
        self.names, self.step = list(names), step
        self._ranks = ranks
        self._layers, copies = parts(model, names)
        self._copies = [(copy, name) for copy in copies.values() for name in copy.own_names()]
        if not again:
            check_none_under_way(self._layers, copies)
            for layer in self._layers.values():
                layer.send_messages()
            for copy, name in self._copies:
                copy.send_messages(name)
        merged: list[Headed | Replicas] = [*self._layers.values(), *(copy for copy, _ in self._copies)]
        for m in merged:
            m.under_way = True  # from here on what is said is owed, should a process be lost
        self._again = again
        self._messages = None if again else self._start()

    def _start(self) -> Gathering:
        own = [layer.sent_message for layer in self._layers.values()]
        own += [copy.get_buffer(f"message_{name}") for copy, name in self._copies]
        return (self._ranks or Ranks.alone()).start_gather(own, "merges", again=self._again)

    def has_ended(self) -> bool:
        """Whether :meth:`arrive` would not wait."""
        return self._messages is not None and self._messages.has_ended()

    @torch.no_grad()
    def arrive(self) -> None:
        """Wait for every process's messages, and merge them.

        Raises:
            ConnectionAbortedError: if a process is lost; then nothing is merged here.
        """
        whole = iter((self._messages or self._start()).wait())
        for layer in self._layers.values():
            layer.take_messages(next(whole))
        for copy, name in self._copies:
            copy.take_messages(name, next(whole))
        for copy, _ in self._copies:
            copy.under_way = False
