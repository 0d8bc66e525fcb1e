"""Heads over processes: which ones are here, what is sent when, and how many bytes it was.

Each process holds H/N of the heads and its own share of the batch. It speaks at merges (and at an evaluation between
merges), and, where some parameters are one for all heads, about their gradients at each step. A sum over processes is
the same on every one and does not depend on who was first: contributions are added in a fixed order (a tree).

How a layer's delta travels is decided by its size, the same for any number of processes:

    factors, each process's own to every other:            (N − 1)·(H/N)·ρ·(m + n) numbers sent by each
    dense, each adds up its 1/N of all sums, then shares:    2·(N − 1)/N·m·n

so factors are sent where H·ρ·(m + n) < 2·m·n, with ρ = 2r where there is an offset and r elsewhere. With sparse merges
each process's messages go to every other, and evaluation sends dense deltas, since what is owed has no factors.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .sums import tree_sum


class Ranks:
    """This process among those that hold the heads. Its state is how much it has sent.

    Attributes:
        sent: bytes that all processes together have sent to others, by purpose: "merges", "shared" (gradients of
            parameters that are one for all heads), "evaluation", "checkpoints".
    """

    def __init__(self, group: Any = None, *, patience_s: float = 0.0) -> None:
        """
        Args:
            group: a process group of torch.distributed; None takes the default one, or a single process.
            patience_s: with :meth:`open_beside`, after which a silent process is lost; 0: torch's own.
        """
        self._beside: Any = None
        self._patience_s = patience_s
        running = dist.is_available() and dist.is_initialized()
        self.group = group
        self.rank = dist.get_rank(group) if running else 0
        self.size = dist.get_world_size(group) if running else 1
        self.sent: Counter[str] = Counter()

    @classmethod
    def alone(cls) -> "Ranks":
        """This process by itself, whatever group it is in."""
        one = cls()
        one.rank, one.size = 0, 1
        return one

    def share(self, heads: int) -> tuple[int, int]:
        """(first, count) of the heads that this process holds.

        Raises:
            ValueError: if they cannot be shared equally.
        """
        if heads % self.size:
            raise ValueError(f"{heads} heads cannot be shared equally by {self.size} processes")
        count = heads // self.size
        return self.rank * count, count

    def sum(self, tensors: Sequence[Tensor], purpose: str) -> list[Tensor]:
        """Elementwise sums over the processes of tensors that each one has; the same bits on all."""
        if self.size == 1:
            return list(tensors)
        out: list[Tensor] = list(tensors)
        for dtype in sorted({t.dtype for t in tensors}, key=str):  # one flat message a dtype
            places = [i for i, t in enumerate(tensors) if t.dtype == dtype]
            flat = torch.cat([tensors[i].flatten() for i in places])
            total = self._sum_flat(flat, purpose)
            for i, part in zip(places, total.split([tensors[i].numel() for i in places]), strict=True):
                out[i] = part.view(tensors[i].shape)
        return out

    def _sum_flat(self, flat: Tensor, purpose: str) -> Tensor:
        """Each process adds up one N-th of the numbers, in the tree's order, and sends its sums to the others."""
        n, N = flat.numel(), self.size
        padded = nn.functional.pad(flat, (0, -n % N))
        received = torch.empty_like(padded)
        with _speaking():
            dist.all_to_all_single(received, padded, group=self.group)
        self.sent[purpose] += N * (N - 1) * padded.nbytes // N
        parts = received.view(N, -1)
        return self._send([tree_sum(lambda i: parts[i].clone(), 0, N)], purpose, self.group).wait()[0][:n]

    def gather(self, tensors: Sequence[Tensor], purpose: str) -> list[Tensor]:
        """Every process's tensors, put together along dim 0 in the order of heads."""
        if self.size == 1:
            return list(tensors)
        out: list[Tensor] = list(tensors)
        for dtype in sorted({t.dtype for t in tensors}, key=str):
            places = [i for i, t in enumerate(tensors) if t.dtype == dtype]
            gathering = self._send([tensors[i] for i in places], purpose, self.group)
            for i, whole in zip(places, gathering.wait(), strict=True):
                out[i] = whole
        return out

    def open_beside(self) -> None:
        """Connections of their own for :meth:`start_gather`, so that no other word waits behind it; every process calls
        it."""
        if self.size > 1 and self._beside is None:
            patience = timedelta(seconds=self._patience_s) if self._patience_s else None
            own = dist.get_process_group_ranks(self.group or dist.group.WORLD)
            self._beside = dist.new_group(own, timeout=patience)

    def start_gather(self, tensors: Sequence[Tensor], purpose: str, *, again: bool = False) -> "Gathering":
        """Begin :meth:`gather` of tensors of one dtype, beside what this process does meanwhile.

        Args:
            again: these bytes have been sent, and counted, by a run that was killed before they were merged.
        """
        return self._send(tensors, "" if again else purpose, self._beside or self.group)

    def _send(self, tensors: Sequence[Tensor], purpose: str, group: Any) -> "Gathering":
        gathering = Gathering(tensors, self.size, group)
        if purpose:
            self.sent[purpose] += self.size * (self.size - 1) * sum(t.nbytes for t in tensors)
        return gathering

    def gather_to_first(self, tensor: Tensor, purpose: str) -> Tensor:
        """Every process's tensor, put together along dim 0 on the first process; the others get theirs back."""
        parts = [torch.empty_like(tensor) for _ in range(self.size)] if self.rank == 0 else None
        with _speaking():
            dist.gather(tensor.detach().contiguous(), parts, group=self.group, group_dst=0)
        self.sent[purpose] += (self.size - 1) * tensor.nbytes
        return tensor if parts is None else torch.cat(parts)

    @torch.no_grad()
    def average_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Make the gradient of parameters that are one for all heads the mean over the processes.

        A parameter that this process's share of the batch did not reach counts as 0; one that no share reached keeps no
        gradient, as on one process: an optimizer would decay it.
        """
        if self.size == 1 or not parameters:
            return
        own = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        reached = own[0].new_tensor([p.grad is not None for p in parameters])  # in the message of its dtype
        *totals, reached = self.sum([*own, reached], "shared")
        for parameter, total, count in zip(parameters, totals, reached.tolist(), strict=True):
            parameter.grad = total.div_(self.size) if count else None

    def state_dict(self) -> dict[str, int]:
        return dict(self.sent)

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.sent = Counter(state)


class Gathering:
    """Tensors of every process on their way to all others: :meth:`Ranks.start_gather`."""

    def __init__(self, tensors: Sequence[Tensor], size: int, group: Any) -> None:
        self._like, self._size = list(tensors), size
        self._work: Any = None
        if size > 1:
            self._own = torch.cat([t.flatten() for t in tensors])  # lives until it has been sent
            self._whole = self._own.new_empty(size * self._own.numel())
            with _speaking():
                self._work = dist.all_gather_into_tensor(self._whole, self._own, group=group, async_op=True)

    def has_ended(self) -> bool:
        """Whether there is nothing to wait for: all has arrived, or a process is lost."""
        return self._work is None or bool(self._work.is_completed())

    def wait(self) -> list[Tensor]:
        """Every process's tensors, put together along dim 0 in the order of heads.

        Raises:
            ConnectionAbortedError: if another process is lost.
        """
        if self._size == 1:
            return self._like
        with _speaking():
            self._work.wait()
        parts = self._whole.view(self._size, -1).split([t.numel() for t in self._like], 1)
        return [part.reshape(self._size * len(t), *t.shape[1:]) for part, t in zip(parts, self._like, strict=True)]


@contextmanager
def _speaking() -> Iterator[None]:
    """Around a collective.

    Raises:
        ConnectionAbortedError: if another process is lost.
    """
    try:
        yield
    except RuntimeError as error:  # gloo's and NCCL's only kind
        how = "it does not answer" if "timed out" in str(error).lower() else "its connection broke"
        raise ConnectionAbortedError(f"another process is lost ({how})") from error
