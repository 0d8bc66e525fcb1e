"""How a training ends before its last step: by a signal, or because another process is gone."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import LostRankError, Stopped
from .keeping import Keeper
from .training_state import all_finite


def stop(keeper: Keeper, signum: int) -> None:
    """Save and leave because of a signal.

    Raises:
        Stopped: always.
    """
    step = keeper.progress.result.step
    message = f"stopped by {Stopped(signum, '').name} at step {step}"
    if keeper.run is None:
        raise Stopped(signum, f"{message}; nothing was saved, since there is no run folder")
    path = keeper.run.checkpoints.path(step) if keeper.progress.saved_step == step else keeper.save()
    raise Stopped(signum, f"{message}; checkpoint {path}; resume with --resume {keeper.resume_path}")


def stop_at_once(keeper: Keeper) -> None:
    """Leave on a second Ctrl-C, without saving.

    Raises:
        Stopped: always.
    """
    kept = keeper.last_kept.removesuffix(" yet")
    message = f"stopped at once by a second SIGINT in step {keeper.progress.result.step + 1}; {kept}"
    raise Stopped(signal.SIGINT, message) from None


@contextmanager
def rescuing(keeper: Keeper, *, every: int) -> Iterator[None]:
    """When another process is lost: save what this one can vouch for, and leave.

    Args:
        every: with a model in parts, processes whose steps lie between the same multiples of it have the same to save.

    Raises:
        LostRankError: naming the checkpoint to go on from.
    """
    try:
        yield
    except ConnectionAbortedError as error:
        run, step = keeper.run, keeper.progress.result.step
        message = f"stopped at step {step}: {error}; "
        if run is None:
            raise LostRankError(message + "nothing was saved, since there is no run folder") from None
        go_on = f"; resume with --resume {keeper.resume_path}"
        if not keeper.task.apart or not bool(keeper.progress.finite & all_finite(keeper.model)):
            raise LostRankError(message + keeper.last_kept + go_on) from None
        saved = run.checkpoints.rescue(step, keeper.state(alone=True), best=keeper.best_step, every=every)
        what = f"checkpoint {saved} holds" if saved else "another process saves"
        raise LostRankError(f"{message}{what} the last merged weights, for new heads{go_on}") from None
