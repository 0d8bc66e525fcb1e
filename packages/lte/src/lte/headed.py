"""What every layer with heads is: a frozen weight W (m, n), the factors of its heads, and merges.

The delta of head h is D_h = B_h A_h − B'_h A'_h, where A', B' are the factors at the last merge, whose product is in W
already (reset-less LTE; paper, Appendix A.2). Where B is reset at merges there is nothing to take off: D_h = B_h A_h.
A merge adds s·mean_h D_h to W. With sparse merges head h owes e_h, what it has learned and no message has said: it
computes with W + s·(D_h + e_h), and evaluation with their mean.

The mean is always summed in the same order, a binary tree over the heads' numbers, so that it does not depend on how
many processes hold them.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from .bases import join_float32, materialize, quantize_4bit, split_float32
from .chunks import BatchSize, equal_chunks
from .config import LTEConfig
from .masters import staying_wide, type_after, widened
from .sparse import Sparse
from .sums import outer_step, sum_of_products, tree_sum

HEAD_TENSORS = (
    "lora_A",
    "lora_B",
    "merged_A",
    "merged_B",
    "feedback",
    "sent_message",
)  # of the heads that this process holds, in dim 0
OWN_TENSORS = (
    *HEAD_TENSORS, "weight_low", "weight_codes", "weight_absmax", "weight_delta", "all_A", "all_B", "velocity",
)  # fmt: skip


class Headed(nn.Module):
    """The base of :class:`lte.LTELinear`, :class:`lte.LTEConv2d` and :class:`lte.LTEVector`.

    Parameters and buffers, where h of the H heads are held by this process (all of them, unless told otherwise):

    - ``weight``: the frozen W in the layer's own shape; (m, n) after ``flatten(1)``. None with a 4-bit base.
    - ``lora_A`` (h, r, n), ``lora_B`` (h, m, r): the heads. B begins at 0, so the layer's function is unchanged.
    - ``merged_A``, ``merged_B``: the factors at the last merge; absent where B is reset.
    - ``feedback`` (h, m, n): e, of each head's deltas what merges have not taken yet, where they are sparse.
    - ``sent_message`` (h, bytes): with ``merge_delay``, this process's own messages, which are merged later.
    - ``weight_low``, ``weight_codes``, …: see :mod:`lte.bases`. ``velocity`` (m, n): the outer momentum.
    """

    weight: Tensor
    weight_low: Tensor
    weight_codes: Tensor
    weight_absmax: Tensor
    weight_delta: Tensor
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    merged_A: Tensor
    merged_B: Tensor
    all_A: Tensor
    all_B: Tensor
    feedback: Tensor
    sent_message: Tensor
    velocity: Tensor
    evaluated: Tensor | None
    plain_dtype: torch.dtype | None = None
    """The type that the plain layer would have; None: not known, of a model that an earlier version pickled."""
    under_way = False
    """Whether messages have been sent that are not merged yet."""
    path = ""
    """The layer's name in the model."""
    batch: BatchSize | None = None
    """What the model's input says of the batch."""

    def add_heads(self, weight: Tensor, config: LTEConfig, share: tuple[int, int] | None, base: str) -> None:
        """Take ``weight`` over as the frozen W and draw the heads.

        Args:
            share: (first, count) of the heads to hold; None holds all.
            base: of :mod:`lte.bases`.
        """
        self.config, self.base = config, base
        self.total_heads = config.heads
        self.first_head, self.heads = share or (0, config.heads)
        self.rank, self.scale = (config.rank if weight.dim() > 1 else 1), config.scale
        self.plain_dtype, master = weight.dtype, widened(weight.detach())
        if base != "float32" and master.dtype != torch.float32:
            raise ValueError(f"base {base!r} keeps float32 weights, and this layer's are {master.dtype}: use 'float32'")
        self.matrix_shape = m, n = len(master), master[0].numel()
        H, r = self.total_heads, self.rank
        self.sparse = Sparse.of(config)
        exact = not config.outer and self.sparse is None
        self.telescopes = (
            base == "4bit" and config.reset == "none" and exact and H * r * (m + n) < m * n
        )  # W is W₀ + s·mean(B'A') with the merged factors of all H heads kept, instead of a running sum
        self.evaluated = None  # W and all unmerged deltas, while lte.averaged() holds them ready
        drawn = [A for _, A in draw_A(self, master)] if self.telescopes else []
        A = torch.stack(drawn)[self._own] if drawn else master.new_empty(self.heads, r, n)
        if not drawn:
            for h, head in draw_A(self, master):
                if 0 <= h - self.first_head < self.heads:
                    A[h - self.first_head] = head
        self.lora_A, self.lora_B = nn.Parameter(A), nn.Parameter(master.new_zeros(self.heads, m, r))
        if self.telescopes:
            self.register_buffer("all_A", torch.stack(drawn))
            self.register_buffer("all_B", master.new_zeros(H, m, r))
        elif config.reset == "none":
            self.register_buffer("merged_A", A.detach().clone())
            self.register_buffer("merged_B", torch.zeros_like(self.lora_B))
        if self.sparse is not None:
            self.register_buffer("feedback", master.new_zeros(self.heads, m, n))
        if self.sparse is not None and config.merge_delay:
            size = self.sparse.size(m * n)
            self.register_buffer("sent_message", torch.zeros(self.heads, size, dtype=torch.uint8, device=master.device))
        if config.outer_momentum:
            self.register_buffer("velocity", master.new_zeros(m, n))
        self._keep(master)

    def _keep(self, master: Tensor) -> None:
        if self.base == "float32":
            self.weight = nn.Parameter(master, requires_grad=False)
        elif self.base == "bfloat16":
            high, low = split_float32(master)
            self.weight = nn.Parameter(high, requires_grad=False)
            self.register_buffer("weight_low", low)
        else:
            self.register_parameter("weight", None)
            codes, absmax = quantize_4bit(master)
            self.register_buffer("weight_codes", codes)
            self.register_buffer("weight_absmax", absmax)
            if not self.telescopes:
                self.register_buffer("weight_delta", master.new_zeros(self.matrix_shape))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """``.to(dtype)`` moves the heads and W, but does not make them bfloat16 or float16: merges would be lost."""
        own = [self._parameters.get("weight"), *(getattr(self, name, None) for name in OWN_TENSORS)]
        if self.plain_dtype is not None:
            self.plain_dtype = type_after(fn, self.plain_dtype, self.lora_A.detach())
        return super()._apply(staying_wide(fn, own, float32=self.base != "float32"), recurse)

    def in_plain_type(self, x: Tensor) -> Tensor:
        """An input as the plain layer would have met it.

        Some models cast it to the type of the layer's weight (transformers' vision towers), which is the master's here:
        float32 in a 16-bit model. What follows the layer has the model's own type, so the layer must answer in that.
        """
        seen = None if self.weight is None else self.weight.dtype
        if self.plain_dtype is None or x.dtype != seen or torch.is_autocast_enabled(x.device.type):
            return x
        return x.to(self.plain_dtype)

    def cut(self, x: Tensor) -> tuple[int, int]:
        """(chunks, rows a chunk) of a batch: one chunk a head, or all in one in sequential mode.

        Raises:
            ValueError: if it cannot be cut equally.
        """
        if self.config.mode == "sequential":
            return 1, -1
        equal_chunks(self.path, x.shape[0], self.heads, self.batch)
        return self.heads, -1

    # -- the frozen weight ------------------------------------------------------------------------------------------

    def kept(self) -> tuple[Tensor, ...]:
        """What :func:`lte.bases.materialize` makes a 4-bit base's weight of. Where heads owe something, both halves of
        a bfloat16 base's; else empty."""
        if self.base == "bfloat16" and self.sparse is not None:
            return (self.weight, self.weight_low)
        if self.base != "4bit":
            return ()
        merged = (self.all_A, self.all_B) if self.telescopes else (self.weight_delta,)
        return (self.weight_codes, self.weight_absmax, *merged)

    def master(self) -> Tensor:
        """W (m, n) with every digit that is kept."""
        if self.base == "bfloat16":
            return join_float32(self.weight, self.weight_low).flatten(1)
        if self.base == "4bit":
            return materialize(self.kept(), self.matrix_shape, self.scale / self.total_heads)
        return self.weight.reshape(self.matrix_shape)  # a view, but for a convolution in channels_last

    def _add_to_master(self, delta: Tensor) -> None:
        if self.base == "bfloat16":
            high, low = split_float32(self.master().add_(delta).view_as(self.weight))
            self.weight.copy_(high)
            self.weight_low.copy_(low)
        elif self.base == "4bit":
            self.weight_delta.add_(delta)
        else:
            self.weight.add_(delta.view_as(self.weight))

    # -- deltas and merges ------------------------------------------------------------------------------------------

    def offsets(self) -> tuple[Tensor | None, Tensor | None]:
        """A' and B' of the heads held here; None where B is reset at merges."""
        if self.telescopes:
            return self.all_A[self._own], self.all_B[self._own]
        if self.config.reset == "none":
            return self.merged_A, self.merged_B
        return None, None

    @property
    def _own(self) -> slice:
        return slice(self.first_head, self.first_head + self.heads)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Ã (h, ρ, n) and B̃ (h, m, ρ) with D_h = B̃_h Ã_h: ρ is 2r with offsets, [A; A'] and [B, −B'], else r."""
        A0, B0 = self.offsets()
        A, B = self.lora_A.detach(), self.lora_B.detach()
        if A0 is None or B0 is None:
            return A, B
        return torch.cat([A, A0], 1), torch.cat([B, -B0], 2)

    def own_sum(self) -> Tensor:
        """Σ (D_h + e_h) over the heads held here, (m, n), in the master's precision."""
        return sum_of_products(*self.factors(), None if self.sparse is None else self.feedback)

    def mean_delta(self) -> Tensor:
        """s·mean_h (D_h + e_h) over all heads, (m, n): what is not merged yet.

        Raises:
            RuntimeError: if other processes hold some of them.
        """
        if self.heads != self.total_heads:
            raise RuntimeError(
                f"this process holds {self.heads} of {self.total_heads} heads and cannot know the mean of all: "
                "evaluate within lte.averaged(model, ranks)"
            )
        return self.own_sum().mul_(self.scale / self.total_heads)

    def effective_weight(self) -> Tensor:
        """The weight that evaluation uses, in the layer's shape: W plus the mean of all unmerged deltas."""
        if self.evaluated is not None:
            return self.evaluated
        return self.in_own_shape(self.master() + self.mean_delta())

    def in_own_shape(self, matrix: Tensor) -> Tensor:
        return matrix

    @torch.no_grad()
    def merge(self) -> None:
        """W ← W + mean delta; A', B' ← A, B, or what ``reset`` says. The layer's evaluated function does not change;
        twice is once.

        That is :func:`lte.merge` for one layer, exact whatever ``merge_density`` is, so that nothing is owed any more.
        No optimizer forgets anything, and a new A is drawn from torch's global generator.

        Raises:
            RuntimeError: if messages of an earlier merge are under way (``LTEConfig.merge_delay``).
        """
        if self.under_way:
            raise RuntimeError(f"{self.path} has messages under way: its Merger takes them before it is merged again")
        self.take(self.mean_delta(), self.lora_A, self.lora_B)
        if self.sparse is not None:
            self.feedback.zero_()
        if self.config.reset != "none":  # nothing is taken off their products: they would be merged again
            self.reset(None, A=self.config.reset == "all")

    @torch.no_grad()
    def take(self, delta: Tensor, all_A: Tensor | None = None, all_B: Tensor | None = None) -> None:
        """Take a mean delta of all heads into W, with outer momentum if there is one; A', B' ← A, B.

        Args:
            delta: s·mean_h D_h (m, n).
            all_A, all_B: the factors of all H heads, where W telescopes.
        """
        if self.telescopes:
            assert all_A is not None
            assert all_B is not None
            self.all_A.copy_(all_A)
            self.all_B.copy_(all_B)
            return
        if self.config.outer:
            velocity = self.velocity if self.config.outer_momentum else None
            delta = outer_step(delta, velocity, self.config.outer_momentum, self.config.outer_lr)
        self._add_to_master(delta)
        if not self.under_way:
            self._begin_anew_from_here()

    def _begin_anew_from_here(self) -> None:
        """A', B' ← A, B."""
        if self.config.reset == "none":
            self.merged_A.copy_(self.lora_A)
            self.merged_B.copy_(self.lora_B)

    def messages(self) -> Tensor:
        """What a sparse merge sends of each head held here, (h, bytes): the largest of what it owes."""
        assert self.sparse is not None
        return torch.stack([self.sparse.pack(owed) for owed in self._owed()])

    @torch.no_grad()
    def send_messages(self) -> None:
        """Into ``sent_message``, :meth:`messages` for a merge that takes place later. Until then all is owed."""
        self.sent_message.copy_(self.messages())
        self._owe_all()
        self.under_way = True

    @torch.no_grad()
    def take_messages(self, messages: Tensor) -> None:
        """Merge the messages of all H heads, (H, bytes). What this process's own did not say it goes on to owe."""
        sparse = self.sparse
        assert sparse is not None
        total = tree_sum(lambda h: sparse.unpack(messages[h], self.feedback[0]), 0, len(messages))
        if not self.under_way:
            self._owe_all()
        for e, message in zip(self.feedback, messages[self._own], strict=True):
            e.sub_(sparse.unpack(message, e))
        self.take(total.mul_(self.scale / self.total_heads))
        self.under_way = False

    def _owe_all(self) -> None:
        """e ← e + D of each head held here; A', B' ← A, B."""
        for e, owed in zip(self.feedback, self._owed(), strict=True):
            e.copy_(owed)
        self._begin_anew_from_here()

    def _owed(self) -> Iterator[Tensor]:
        """D_h + e_h (m, n) of each head held here."""
        A, B = self.factors()
        return (sum_of_products(A[h : h + 1], B[h : h + 1]).add_(self.feedback[h]) for h in range(self.heads))

    def owed(self) -> Tensor:
        """D + e (h, m, n): all that no merge has taken yet of what this process's heads have learned."""
        return torch.stack([*self._owed()])

    @torch.no_grad()
    def reset(self, generator: torch.Generator | None, *, A: bool) -> None:
        """B ← 0, and a new A if asked: after a merge, the function of every head is W's, with what it owes."""
        self.lora_B.zero_()
        if A:
            for h, head in draw_A(self, self.lora_A, generator):
                if 0 <= h - self.first_head < self.heads:
                    self.lora_A[h - self.first_head].copy_(head)

    def extra_repr(self) -> str:
        held = "" if self.heads == self.total_heads else f" (here {self.first_head} to {self._own.stop - 1})"
        return f"heads={self.total_heads}{held}, rank={self.rank}, scale={self.scale:g}, base={self.base}"


def draw_A(layer: Headed, like: Tensor, generator: torch.Generator | None = None) -> Iterator[tuple[int, Tensor]]:
    """A new A (r, n) for each of the H heads, in order: every process draws them all, and keeps its own."""
    m, n = layer.matrix_shape
    gain = math.sqrt(m / n) if layer.config.init == "paper" else math.sqrt(n / layer.rank)
    for h in range(layer.total_heads):
        head = torch.empty(layer.rank, n, dtype=like.dtype, device=generator.device if generator else like.device)
        if not isinstance(layer, nn.Linear | nn.Conv2d):
            yield h, head.fill_(1)  # a vector's a, one number
        else:
            yield h, head if head.is_meta else nn.init.orthogonal_(head, gain, generator)
