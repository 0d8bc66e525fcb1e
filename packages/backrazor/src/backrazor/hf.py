"""Back Razor in transformers' Trainer.

    RazorTrainer(model=model, args=args, train_dataset=rows, razor=Razor(0.1)).train()

    class Mine(RazorMixin, MyTrainer): ...

Each forward pass runs within the Razor; accumulation, autocast, gradient checkpointing, DDP by torchrun and resuming
are Trainer's, and hold. The Razor has no state, so a checkpoint holds nothing of it, and a resumed run needs the same
``razor=``. transformers has to be installed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import Trainer

from .errors import RazorError
from .razor import Razor


class RazorMixin:
    """For a Trainer of one's own, before it in the list of bases.

    Args:
        razor: whose settings hold for every forward pass of training; ``Razor()`` if not given.

    Raises:
        RazorError: ``torch_compile``, or several GPUs in one process (``nn.DataParallel``), which a Razor cannot enter;
            the mixin behind Trainer in a class's bases, or a ``training_step`` without
            ``compute_loss_context_manager``, where no Razor would be entered.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if Trainer in (order := cls.__mro__) and order.index(Trainer) < order.index(RazorMixin):
            raise RazorError(
                f"{cls.__name__} has RazorMixin behind Trainer, where its Razor is never entered: name the mixin first"
            )

    def __init__(self, *args: Any, razor: Razor | None = None, **kwargs: Any) -> None:
        if not isinstance(razor, Razor | None):
            raise RazorError(f"razor must be a Razor, such as Razor(keep=0.1), not {razor!r}")
        super().__init__(*args, **kwargs)
        self._entered = False
        self.razor = razor if razor is not None else Razor()
        settings: Any = self.args  # type: ignore[attr-defined]
        if settings.torch_compile:
            raise RazorError(
                "torch_compile=True and Razor do not go together: a compiled graph decides itself what it saves; "
                "leave torch_compile out"
            )
        if settings.n_gpu > 1:
            raise RazorError(
                f"{settings.n_gpu} GPUs in one process are threads (nn.DataParallel), which a Razor does not enter: "
                f"start one process a GPU with torchrun --nproc-per-node {settings.n_gpu}"
            )

    @contextmanager
    def compute_loss_context_manager(self) -> Iterator[None]:
        """What Trainer computes the loss in: the Razor, and Trainer's own autocast."""
        with self.razor, super().compute_loss_context_manager():  # type: ignore[misc]
            self._entered = True
            yield

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's, or that of one's own."""
        self._entered = False
        loss = super().training_step(*args, **kwargs)  # type: ignore[misc]
        if not self._entered:
            raise RazorError(
                f"the training_step of {type(self).__name__} has not entered the Razor: "
                "compute the loss within self.compute_loss_context_manager(), as Trainer's does"
            )
        return loss


class RazorTrainer(RazorMixin, Trainer):
    """transformers' Trainer, whose forward passes keep what a Razor keeps."""
