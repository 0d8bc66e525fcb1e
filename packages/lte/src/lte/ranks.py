"""Heads over processes: which ones are here, what is sent when, and how many bytes it was.

Each process holds H/N of the heads and its own share of the batch. It speaks at merges (and at an evaluation between
merges), and, where some parameters are one for all heads, about their gradients at each step. A sum over processes is
the same on every one and does not depend on who was first: contributions are added in a fixed order (a tree).

How a layer's delta travels is decided by its size, the same for any number of processes:

    factors, each process's own to every other:            (N − 1)·(H/N)·ρ·(m + n) numbers sent by each
    dense, each adds up its 1/N of all sums, then shares:    2·(N − 1)/N·m·n

so factors are sent where H·ρ·(m + n) < 2·m·n, with ρ = 2r where there is an offset and r elsewhere.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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

    def __init__(self, group: Any = None) -> None:
        """``group``: a process group of torch.distributed; None takes the default one, or a single process."""
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
        return self._start_gather_flat(tree_sum(lambda i: parts[i].clone(), 0, N), purpose)()[:n]

    def gather(self, tensors: Sequence[Tensor], purpose: str) -> list[Tensor]:
        """Every process's tensors, put together along dim 0 in the order of heads."""
        return self.start_gather(tensors, purpose)()

    def start_gather(self, tensors: Sequence[Tensor], purpose: str) -> Callable[[], list[Tensor]]:
        """Begin :meth:`gather`, which goes on beside what this process does meanwhile; -> what waits for its end.

        Bytes count as sent when they have been waited for.
        """
        own = list(tensors)
        if self.size == 1:
            return lambda: own
        kinds = []
        for dtype in sorted({t.dtype for t in own}, key=str):
            places = [i for i, t in enumerate(own) if t.dtype == dtype]
            kinds.append((places, self._start_gather_flat(torch.cat([own[i].flatten() for i in places]), purpose)))

        def wait() -> list[Tensor]:
            out = list(own)
            for places, arrived in kinds:
                parts = arrived().view(self.size, -1).split([own[i].numel() for i in places], 1)
                for i, part in zip(places, parts, strict=True):
                    out[i] = part.reshape(self.size * len(own[i]), *own[i].shape[1:])
            return out

        return wait

    def _start_gather_flat(self, flat: Tensor, purpose: str) -> Callable[[], Tensor]:
        whole = flat.new_empty(self.size * flat.numel())
        with _speaking():
            work = dist.all_gather_into_tensor(whole, flat.contiguous(), group=self.group, async_op=True)

        def wait() -> Tensor:
            with _speaking():
                if work is not None:
                    work.wait()
            self.sent[purpose] += self.size * (self.size - 1) * flat.nbytes
            return whole

        return wait

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

        A parameter that this process's share of the batch did not reach counts as 0.
        """
        if self.size == 1 or not parameters:
            return
        own = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        for parameter, total in zip(parameters, self.sum(own, "shared"), strict=True):
            parameter.grad = total.div_(self.size)

    def state_dict(self) -> dict[str, int]:
        return dict(self.sent)

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.sent = Counter(state)


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
