"""A copy of a layer for each head, averaged at merges: the paper's rule for embeddings, and one policy for whatever
else is trained besides the heads.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .chunks import BatchSize, ScaleGradient, equal_chunks
from .config import LTEConfig
from .hooks import without_numbers
from .masters import staying_wide, type_after
from .sparse import Sparse
from .sums import outer_step, tree_sum


class Replicas(nn.Module):
    """A layer (embedding, norm, linear, …) in as many copies as there are heads; made by :func:`lte.inject`.

    Each parameter p of the layer is here, under its name, as (h, \\*p.shape), where h of the H heads are held by this
    process; what was frozen is one for all, as it was. In training, chunk h of the batch goes through copy h, whose
    gradient is that of its own chunk's mean loss. In evaluation there is one layer with the mean of all copies, and an
    exact merge makes all copies that mean. Copies of a 16-bit layer, whose mean 16 bits could not hold, are float32 and
    are rounded where the layer computes.

    A sparse merge moves every copy by what the mean of all messages c says beyond its own: p_h ← p_h + mean c − c_h. So
    the mean of all copies stays, and p_h less ``anchor_p`` is what copy h has learned and not said yet.

    Buffers: with outer momentum or sparse merges ``anchor_p``, what merges have made of the parameter; with outer
    momentum ``velocity_p``; with ``merge_delay`` ``message_p`` (h, bytes), this process's own messages.
    """

    under_way = False
    """Whether messages have been sent that are not merged yet."""
    path = ""
    """The layer's name in the model."""
    batch: BatchSize | None = None
    """What the model's input says of the batch."""
    fixed: frozenset[str] = frozenset()
    """The names of what was frozen."""
    plain_dtypes: dict[str, torch.dtype] | None = None
    """The types that the plain layer's parameters would have; None: those of the copies (a model that an earlier
    version pickled)."""

    def __init__(
        self,
        layer: nn.Module,
        parameters: dict[str, nn.Parameter],
        config: LTEConfig,
        share: tuple[int, int] | None = None,
        tied: frozenset[str] = frozenset(),
    ) -> None:
        """``parameters``: of :func:`lte.copying.stacked`; ``tied``: those of them that another layer merges."""
        super().__init__()
        self.config, self.total_heads = config, config.heads
        self.first_head, self.heads = share or (0, config.heads)
        self._layer = [without_numbers(layer)]  # in a list: its parameters are not this module's
        self._tied, self.sparse = tied, Sparse.of(config, copies=True)
        self.evaluated: dict[str, Tensor] | None = None  # the means, while lte.averaged() holds them ready
        own = dict(layer.named_parameters(recurse=False))
        self.fixed = frozenset(own) - frozenset(parameters)
        self.plain_dtypes = {name: own[name].dtype for name in parameters}
        for name in own:
            self.register_parameter(name, parameters.get(name, own[name]))
        for name, parameter in parameters.items():
            if name in tied:
                continue
            if config.outer or self.sparse is not None:
                self.register_buffer(f"anchor_{name}", parameter.detach()[0].clone())
            if config.outer_momentum:
                self.register_buffer(f"velocity_{name}", torch.zeros_like(parameter.detach()[0]))
            if self.sparse is not None and config.merge_delay:
                size = self.sparse.size(parameter[0].numel())
                message = torch.zeros(self.heads, size, dtype=torch.uint8, device=parameter.device)
                self.register_buffer(f"message_{name}", message)
        self.train(layer.training)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """``.to(dtype)`` leaves copies and what merges made of them float32 where they would become 16-bit."""
        moments = [t for name, t in self.named_buffers(recurse=False) if not name.startswith("message_")]
        stacks = [self.get_parameter(name) for name in self.names()]
        if self.plain_dtypes is None:
            return super()._apply(fn, recurse)
        like = stacks[0].detach()
        self.plain_dtypes = {name: type_after(fn, dtype, like) for name, dtype in self.plain_dtypes.items()}
        return super()._apply(staying_wide(fn, [*stacks, *moments]), recurse)

    def forward(self, x: Tensor) -> Tensor:  # (N, …) -> (N, …)
        layer = self._layer[0].train(self.training)
        fixed = {name: self.get_parameter(name) for name in self.fixed}
        if not self.training:
            return functional_call(layer, {n: self._typed(n, p) for n, p in self.means().items()} | fixed, (x,))
        H = self.heads
        if x.dim() < 2 and isinstance(layer, nn.Embedding):
            raise ValueError(
                "the copies of an embedding need indices (batch, …): these have no batch to cut into chunks"
            )
        equal_chunks(self.path, x.shape[0], H, self.batch)
        own = {n: self._typed(n, ScaleGradient.apply(self.get_parameter(n), float(H))) for n in self.names()}
        chunks = x.reshape(H, -1, *x.shape[1:])

        def one(copy: dict[str, Tensor], chunk: Tensor) -> Any:
            return functional_call(layer, copy | fixed, (chunk,))

        y = torch.vmap(one, randomness="different")(own, chunks)
        if isinstance(layer, nn.Embedding) and layer.padding_idx is not None:  # vmap knows the first copy's alone
            y = torch.where((chunks == layer.padding_idx)[..., None], y.detach(), y)
        return y.flatten(0, 1)

    def _typed(self, name: str, value: Tensor) -> Tensor:
        return value if self.plain_dtypes is None else value.to(self.plain_dtypes[name])

    def own_sum(self, name: str) -> Tensor:
        """The sum of parameter ``name`` over the copies held here."""
        stack = self.get_parameter(name).detach()
        return tree_sum(lambda h: stack[h].clone(), 0, self.heads)

    def means(self) -> dict[str, Tensor]:
        """The mean over all copies, by the parameter's name.

        Raises:
            RuntimeError: if other processes hold some of them.
        """
        if self.evaluated is not None:
            return self.evaluated
        if self.heads != self.total_heads:
            raise RuntimeError(
                f"this process holds {self.heads} of {self.total_heads} copies and cannot know the mean of all: "
                "evaluate within lte.averaged(model, ranks)"
            )
        return {name: self.own_sum(name).div_(self.heads) for name in self.names()}

    def names(self) -> list[str]:
        """The parameters that there are copies of."""
        return [name for name, _ in self.named_parameters(recurse=False) if name not in self.fixed]

    def head_tensors(self) -> list[str]:
        """The names of what has a copy a row."""
        return [
            *self.names(),
            *(n for n, _ in self.named_buffers(recurse=False) if n.startswith("message_")),
        ]

    def own_names(self) -> list[str]:
        """The parameters that no other layer merges."""
        return [name for name in self.names() if name not in self._tied]

    def messages(self, name: str) -> Tensor:
        """What a sparse merge sends of each copy of a parameter held here, (h, bytes)."""
        assert self.sparse is not None
        owed = self.get_parameter(name).detach() - self.get_buffer(f"anchor_{name}")
        return torch.stack([self.sparse.pack(e) for e in owed])

    @torch.no_grad()
    def send_messages(self, name: str) -> None:
        """Into ``message_p``, :meth:`messages` for a merge that takes place later."""
        self.get_buffer(f"message_{name}").copy_(self.messages(name))

    @torch.no_grad()
    def take_messages(self, name: str, messages: Tensor) -> None:
        """Merge the messages of all H copies, (H, bytes). What this process's own did not say stays in its copies, and
        so does what they have learned since their messages were sent."""
        sparse, copies, anchor = self.sparse, self.get_parameter(name), self.get_buffer(f"anchor_{name}")
        assert sparse is not None
        step = tree_sum(lambda h: sparse.unpack(messages[h], anchor), 0, len(messages)).div_(self.total_heads)
        if self.config.outer:
            velocity = dict(self.named_buffers(recurse=False)).get(f"velocity_{name}")
            step = outer_step(step, velocity, self.config.outer_momentum, self.config.outer_lr)
        anchor.add_(step)
        for copy_, own in zip(copies, messages[self.first_head : self.first_head + self.heads], strict=True):
            copy_.add_(step).sub_(sparse.unpack(own, anchor))

    @torch.no_grad()
    def take(self, means: dict[str, Tensor]) -> None:
        """Make every copy the mean of all, moved on by outer momentum if there is one."""
        buffers: dict[str, Any] = dict(self.named_buffers(recurse=False))
        for name, mean in means.items():
            if name in self._tied:
                continue
            if self.config.outer:
                anchor, velocity = buffers[f"anchor_{name}"], buffers.get(f"velocity_{name}")
                step = outer_step(mean - anchor, velocity, self.config.outer_momentum, self.config.outer_lr)
                mean = anchor.add_(step)
            self.get_parameter(name).copy_(mean.expand_as(self.get_parameter(name)))

    def extra_repr(self) -> str:
        return f"{self._layer[0]}, heads={self.total_heads}"
