"""The two ways in which a command ends early: the user can mend something, or the user stopped it."""

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


class Stopped(Exception):
    """Training ended on a signal, after a checkpoint was written; ``message`` says where it is."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.signum = signum
        self.exit_code = 128 + signum  # the shell's convention: 130 for SIGINT, 143 for SIGTERM

    @property
    def name(self) -> str:
        return signal.Signals(self.signum).name
