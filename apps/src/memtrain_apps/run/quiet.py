"""Remarks of other libraries that tell a user of these commands nothing, kept off the console."""

import logging
import warnings


def quiet_libraries() -> None:
    """Call it once, before they are imported; what they call an error is still shown."""
    for name in ("torch.utils._pytree", "bitsandbytes", "transformers"):  # deprecations; optional kernels; fresh heads
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    warnings.filterwarnings(
        "ignore", message="Accessing the data pointer of FakeTensor"
    )  # PEFT, when memory is predicted


def no_progress_bars() -> None:
    """transformers' own bars, for what takes a moment."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
