"""Remarks of other libraries that tell a user of these commands nothing, kept off the console."""

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator


def quiet_libraries() -> None:
    """Call it before they are imported, as every command does; what they call an error is still shown."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # transformers sets its logger's level when it is imported
    for name in ("torch.utils._pytree", "bitsandbytes", "transformers"):  # deprecations; optional kernels; fresh heads
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    warnings.filterwarnings(
        "ignore", message="Accessing the data pointer of FakeTensor"
    )  # PEFT, when memory is predicted


def no_progress_bars() -> None:
    """transformers' own bars, for what takes a moment; where it is not loaded there are none."""
    if "transformers" in sys.modules:
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()


@contextlib.contextmanager
def quiet_imports() -> Iterator[None]:
    """Without what other packages say of their own deprecations and of kernels that are not there."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
