"""Count what comes with the package: ``python -m memtrain_apps.plan.ship [MODEL …]`` writes ``shipped/``.

A shape a file; without names, all of :data:`MODELS`. Every choice at every batch, by one process and by FSDP on 2, 4
and 8.
"""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import date
from functools import partial
from typing import Any

from memtrain_common.commands.quiet import quiet_libraries
from memtrain_common.errors import UserError
from tqdm import tqdm

from ..compose.axes import OPTIM, SAVE, TRAIN, Axes, refusal
from .config import PlanConfig, planned_shape
from .counted import SHIPPED, Records, Store, library_versions, shape_id, unit_of
from .forecast import Workplace, count_optimizers, count_step
from .uses import Step

MODELS = (
    "google-bert/bert-base-uncased", "google/vit-large-patch16-224", "meta-llama/Llama-2-7b",
    "mistralai/Mistral-7B-v0.1",
)  # fmt: skip
"""With the flags' own lengths and dtypes, on CUDA."""
SHARDS = (1, 2, 4, 8)
ROWS = (32, 1, 2, 4, 8, 16)
"""The first tells every batch, where bytes are a line in the rows; of a large Llama those of Back Razor are none."""


def step_of(model: str) -> Step:
    """A model's step as the flags' defaults have it."""
    config = PlanConfig(model=model)
    shape, tokens = planned_shape(config)
    return Step(shape, tokens, config.weights, config.dtype, cuda=True)


def tasks_of(step: Step) -> Iterator[Callable[[Store], Any]]:
    """What counts every record of a step, one after another."""
    place = Workplace(step, ROWS[0])
    for train in TRAIN:
        optims = [o for o in OPTIM if refusal(Axes(train, "all", o)) is None]
        for shards in SHARDS if train != "lte" else (1,):
            cut = replace(place, processes=shards, parallel="ddp" if shards == 1 else "fsdp")
            yield partial(count_optimizers, cut, Axes(train), optims)
        for save in SAVE:
            axes = Axes(train, save, "sgd")
            if refusal(axes) is None:
                for rows in ROWS:
                    if rows % unit_of(axes) == 0:
                        yield partial(count_step, replace(place, rows=rows), axes)


def counted(step: Step, label: str) -> Records:
    """All records of a step."""
    store = Store({})
    for count in tqdm(list(tasks_of(step)), desc=label):
        with contextlib.suppress(UserError):  # a refusal is a record too
            count(store)
    return store.records


def ship(model: str) -> None:
    """Write a model's file, a record a line."""
    step = step_of(model)
    head = {
        "command": f"python -m memtrain_apps.plan.ship {model}", "date": f"{date.today()}",
        "libraries": library_versions(),
    }  # fmt: skip
    lines = ",\n".join(
        f"{json.dumps(key)}: {json.dumps(record, separators=(',', ':'))}"
        for key, record in sorted(counted(step, model).items())
    )
    SHIPPED.mkdir(exist_ok=True)
    path = SHIPPED / f"{shape_id(step)}.json"
    path.write_text(f'{json.dumps(head, indent=1)[:-2]},\n "records": {{\n{lines}\n}}}}\n')


if __name__ == "__main__":
    quiet_libraries()
    import torch

    torch.set_num_threads(1)
    for name in sys.argv[1:] or MODELS:
        ship(name)
