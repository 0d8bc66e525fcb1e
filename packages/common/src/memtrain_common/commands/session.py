"""What stands around a command's training: its run folder, opened or made."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..measuring.environment import device_name
from ..runs.run_folder import RunFolder, default_run_path
from ..training.distributed import World


def open_run(
    config: Any, argv: Sequence[str], *, prog: str, world: World, device: Any, data: dict[str, Any]
) -> tuple[RunFolder, Any]:
    """Make a command's run folder, or open the one that it resumes, and write its config.json.

    Args:
        config: a dataclass with ``out`` and ``resume``.
        argv: the words after the command's name.
        prog: the command's name; "program command" where a program has several.
        world, device: of :func:`memtrain_common.training.distributed.launch`.
        data: what tells the data from other data.

    Returns:
        The folder, and the configuration with its path as ``out``.

    Raises:
        UserError: if the folder is taken, or the run that is resumed had other data.
    """
    if config.resume:
        run = RunFolder.open(Path(config.resume), writes=world.is_main)
        before = run.read_config().get("data")
        if before != data:
            raise UserError(
                f"{config.resume} was trained on other data ({before}, and now {data}): give it the same files, or "
                "begin a new run"
            )
    else:
        from ..training.distributed import gather_objects

        path = Path(config.out) if config.out else default_run_path(prog.replace(" ", "-"))
        run = RunFolder.create(gather_objects(path)[0], writes=world.is_main)  # by the first one's clock
    config = dataclasses.replace(config, out=str(run.path))
    program, *command = prog.split(" ")
    run.write_config(
        config, prog=program, argv=[*command, *argv], data=data, device=device_name(device), processes=world.size
    )
    return run, config
