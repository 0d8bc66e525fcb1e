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
        RazorError: ``torch_compile``, or several GPUs in one process (``nn.DataParallel``), which a Razor cannot enter.
    """

    def __init__(self, *args: Any, razor: Razor | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
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
            yield


class RazorTrainer(RazorMixin, Trainer):  # type: ignore[misc]
    """transformers' Trainer, whose forward passes keep what a Razor keeps."""
