"""The two ways in which a command ends early: the user can mend something, or the user stopped it."""

import errno
import signal


class UserError(Exception):
    """Something that the user can mend. The message is one sentence: what is wrong and what would be right.

    :func:`memtrain_common.commands.cli.run_command` prints it without a traceback and exits with ``exit_code``.
    """

    exit_code = 2


class DivergedError(UserError):
    """The loss is no longer a number. Not bad input, so the exit code is 1."""

    exit_code = 1


class LostRankError(UserError):
    """Another process of the training is gone. Not bad input, so the exit code is 1."""

    exit_code = 1


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says so: Python's, torch's on CUDA, or torch's on the CPU."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    said = (
        "DefaultCPUAllocator: can't allocate memory", "Cannot allocate memory", "std::bad_alloc",
        "CUDA error: out of memory", "CUDA out of memory", "MPS backend out of memory",
    )  # fmt: skip
    return isinstance(error, RuntimeError) and any(words in str(error) for words in said)


def lost_rank(error: BaseException) -> str:
    """Why a collective call that raised this lost another process; "" for what is another mistake.

    gloo has no kind of error of its own: its errors are RuntimeErrors that name its sources. NCCL's and the store's are
    torch's DistError, whose name is looked at, so that nothing here imports torch.
    """
    text = str(error)
    speaks = "gloo/transport" in text or any(kind.__name__ == "DistError" for kind in type(error).__mro__)
    if not isinstance(error, RuntimeError) or not speaks:
        return ""
    how = "it does not answer" if "timed out" in text.lower() or "timeout" in text.lower() else "its connection broke"
    return f"another process is lost ({how})"


class Stopped(Exception):
    """Training ended on a signal, after a checkpoint was written; ``message`` says where it is."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.signum = signum
        self.exit_code = 128 + signum  # the shell's convention: 130 for SIGINT, 143 for SIGTERM

    @property
    def name(self) -> str:
        return signal.Signals(self.signum).name
