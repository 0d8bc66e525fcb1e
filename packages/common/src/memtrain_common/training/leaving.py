"""How a training ends before its last step: by a signal, or because another process is gone."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from ..errors import LostRankError, Stopped, lost_rank
from ..interrupts import say_from_now_on, saying
from ..runs.rescued_rows import Rows, write_rows
from .distributed import world
from .keeping import Keeper


def stop(keeper: Keeper, signum: int) -> None:
    """Save and leave because of a signal.

    Raises:
        Stopped: always.
    """
    step = keeper.progress.result.step
    message = f"stopped by {Stopped(signum, '').name} at step {step}"
    if keeper.run is None:
        raise Stopped(signum, f"{message}; nothing was saved, since there is no run folder")
    if step == 0:
        raise Stopped(signum, f"{message}; nothing was saved yet; begin it with --resume {keeper.resume_path}")
    path = keeper.run.checkpoints.path(step) if keeper.progress.saved_step == step else keeper.save()
    raise Stopped(signum, f"{message}; checkpoint {path}; resume with --resume {keeper.resume_path}")


def at_once(keeper: Keeper, name: str) -> str:
    """What is said when a second signal of the same kind ends a training without saving."""
    kept = keeper.last_kept.removesuffix(" yet")
    return f"stopped at once by a second {name} in step {keeper.progress.result.step + 1}; {kept}"


def stop_at_once(keeper: Keeper, interrupt: KeyboardInterrupt) -> None:
    """Leave on a second signal, without saving: where no command has taken the signals, it raises this.

    Raises:
        Stopped: always.
    """
    signum = interrupt.args[0] if interrupt.args else signal.SIGINT
    raise Stopped(signum, at_once(keeper, signal.Signals(signum).name)) from None


def say_after_training(step: int, folder: Path | None) -> None:
    """From now on a signal that ends the command says that the last checkpoint is there."""
    if folder is not None:
        say_from_now_on(
            lambda name: (
                f"stopped by {name} after step {step}, the last one: its checkpoint is kept, and --resume "
                f"{folder} goes on behind it"
            )
        )


@contextmanager
def rescuing(keeper: Keeper, *, every: int, since: int = 0) -> Iterator[None]:
    """When another process is lost: save what this one can vouch for, and leave. A second signal of a kind, which ends
    the command without saving, says which checkpoint there is.

    Args:
        every, since: with a model in parts, processes whose steps lie between the same multiples of ``every`` have the
            same to save, counted from step ``since``.

    Raises:
        LostRankError: naming the checkpoint to go on from.
    """
    try:
        with saying(partial(at_once, keeper)):
            yield
    except (ConnectionAbortedError, RuntimeError) as error:
        why = str(error) if isinstance(error, ConnectionAbortedError) else lost_rank(error)  # DDP's and FSDP's own
        if not why:
            raise
        run, step = keeper.run, keeper.progress.result.step
        message = f"stopped at step {step}: {why}; "
        if run is None:
            raise LostRankError(message + "nothing was saved, since there is no run folder") from None
        go_on = f"; resume with --resume {keeper.resume_path}"
        if not keeper.task.apart or not bool(keeper.progress.finite & keeper.all_finite()):
            raise LostRankError(message + keeper.last_kept + go_on) from None
        state, parts = keeper.state(alone=True), keeper.task.parts
        own = parts.own_rows(state) if parts is not None else None
        failed = write_rows(run.checkpoints.folder, world().rank, Rows(*own)) if own else ""
        mark = own[0] if own else None
        saved = run.checkpoints.rescue(step, state, best=keeper.best_step, every=every, since=since, mark=mark)
        owing = ", and what heads owe" if own else ""
        go_on = f"; what this process alone has could not be written ({failed})" * bool(failed) + go_on
        what = f"checkpoint {saved} holds" if saved else "another process saves"
        raise LostRankError(f"{message}{what} the last merged weights, for new heads{owing}{go_on}") from None
