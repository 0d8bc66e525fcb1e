"""What was counted before: numbers that come with the package, and the user's cache. No torch here.

A record is what a model of a shape uses: a :class:`~memtrain_apps.plan.lines.StepLaw` of one choice of train and save,
or the :class:`~memtrain_apps.plan.uses.OptimizerUse` of a shallow model. Its key is everything that the number depends
on. It is kept beside the versions of the libraries and a hash of the code that counted: another version, or a changed
line, and it is counted anew. What comes with the package, for a few well-known shapes (``shipped/``, made by
``python -m memtrain_apps.plan.ship``), holds for the versions that counted it; a test counts a part of it again.
"""

import contextlib
import hashlib
import importlib.util
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from memtrain_common.errors import UserError
from memtrain_common.files import read_json, write_json

from ..compose.axes import USED_BY, Axes, Optim
from .depth import Passes
from .lines import StepLaw, fit, values_of
from .uses import OptimizerUse, Step, StepUse

LIBRARIES = ("torch", "transformers", "peft", "torchao", "timm")
"""Their versions decide what an operation saves and a step keeps."""
CODE = ("memtrain_apps", "memtrain_common", "backrazor", "galore_vit", "lora_xs", "lte")
SHIPPED = Path(__file__).with_name("shipped")
Records = dict[str, Any]


class MissingError(Exception):
    """What is asked for was not counted yet."""


class Store:
    """Records of one shape, and what counts those that it lacks.

    Args:
        records: by key; what is counted is added, and to ``new`` too.
        live: False raises :class:`MissingError` instead of counting.
    """

    def __init__(self, records: Records, live: bool = True) -> None:
        self.records, self.live = records, live
        self.new: Records = {}

    def add(self, records: Records) -> None:
        self.records.update(records)
        self.new.update(records)

    def step(self, step: Step, axes: Axes, rows: int, shards: int) -> StepUse:
        """Of the whole model. Raises :class:`UserError` if the combination has no meaning for it."""
        key = step_key(step, axes)
        for again in (False, True):
            record = self.records.get(key)
            if isinstance(record, str):
                raise UserError(record)
            found = StepLaw.from_json(record).at(rows, shards) if record else None
            if found is not None:
                return found
            if again or not self.live:
                break
            self.add({key: count_law(step, axes, rows, record)})
        raise MissingError(key)

    def optimizers(
        self, step: Step, axes: Axes, optims: Sequence[Optim], shards: int
    ) -> dict[Optim, OptimizerUse | str]:
        """Of a model at the step's depth; a sentence where one is refused."""
        keys = {o: optimizer_key(step, axes, o, shards) for o in optims}
        missing = [o for o, key in keys.items() if key not in self.records]
        if missing and not self.live:
            raise MissingError(keys[missing[0]])
        if missing:
            from .step_use import optimizer_use_of

            found: dict[Optim, OptimizerUse | str]
            try:
                found = optimizer_use_of(step, axes, missing, shards)
            except UserError as error:  # of the choice of train: of every optimizer
                found = dict.fromkeys(missing, str(error))
            self.add({keys[o]: u if isinstance(u, str) else list(asdict(u).values()) for o, u in found.items()})
        records = {o: self.records[key] for o, key in keys.items()}
        return {o: r if isinstance(r, str) else OptimizerUse(*r) for o, r in records.items()}


def count_law(step: Step, axes: Axes, rows: int, known: Mapping[str, Any] | None) -> dict[str, Any] | str:
    """A record of a step: by passes of two, three and ``rows``; or the sentence that refuses it. Of a single row, which
    is asked where no more will fit, that pass alone."""
    before = StepLaw.from_json(known) if known else None
    unit = unit_of(axes)
    passes = Passes(step, axes)
    try:
        if rows > unit and before is None:
            units = sorted({2, 3, 7 if rows // unit <= 3 else rows // unit})
            checked = fit(dict(zip(units, passes.shallow([u * unit for u in units]), strict=True)))
            if checked:
                found, cut = passes.whole([u * unit for u in units[:2]])
                lines = fit(dict(zip(units[:2], found, strict=True)))
                if lines:
                    return StepLaw(unit, {}, lines, cut).to_json()
        (alone,), cut = passes.whole([rows])
    except UserError as error:
        return str(error)
    law = before or StepLaw(unit, {}, {}, cut)
    return replace(law, known={**law.known, rows // unit: values_of(alone)}).to_json()


def unit_of(axes: Axes) -> int:
    """Rows of a micro-batch come in this many."""
    return axes.heads if axes.train == "lte" else 1


# -- keys ----------------------------------------------------------------------------------------------------------


def step_key(step: Step, axes: Axes) -> str:
    """Of a choice of train and save, at a depth."""
    words = [axes.train, axes.save, *_settings(axes, "train", "save")]
    return _key(step, words, step.tokens, step.autocast)


def optimizer_key(step: Step, axes: Axes, optim: Optim, shards: int) -> str:
    """Of a choice of train and optim, at a depth. GaLore is not cut."""
    axes = replace(axes, optim=optim)
    cut = 1 if optim.startswith("galore") else shards
    return _key(step, [axes.train, optim, *_settings(axes, "train", "optim"), f"shards {cut}"])


def _settings(axes: Axes, *of: str) -> list[str]:
    """What the choices read, but for what changes no byte."""
    free = ("alpha", "init", "init_batches", "first_step", "merge_steps", "gap", "galore_scale")
    return [
        f"{n} {getattr(axes, n)}"
        for n, (axis, choices) in USED_BY.items()
        if axis in of and n not in free and getattr(axes, axis) in choices
    ]  # fmt: skip


def _key(step: Step, words: Sequence[str], *more: Any) -> str:
    """Readable, but for fields of the configuration in which two steps of one shape may differ."""
    shape = step.shape
    own = {k: v for k, v in shape.config.items() if k in ("image_size", "num_labels")}
    depth = f"depth {shape.depth}" if shape.uniform else "whole"
    parts = [*words, depth, f"weights {step.weights}", "cuda" if step.cuda else "cpu", *map(str, more)]
    return "; ".join([*parts, *(f"{k} {v}" for k, v in own.items())])


# -- files ---------------------------------------------------------------------------------------------------------


def shape_id(step: Step) -> str:
    """What tells a shape whatever its depth, input and head."""
    shape = step.shape
    plain = shape.with_depth(1).config if shape.uniform else shape.config
    config = {k: v for k, v in plain.items() if k not in ("image_size", "num_labels")}
    text = json.dumps(
        [shape.family, shape.name if shape.family in ("cnn", "timm") else "", config], sort_keys=True, default=str
    )
    return f"{shape.family}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def library_versions() -> dict[str, str]:
    """Without what a build adds ("+cpu")."""
    found = {}
    for name in LIBRARIES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name).partition("+")[0]
    return found


@cache
def code_hash() -> str:
    """Of every source file that may take part in counting, found without importing anything."""
    digest = hashlib.sha256()
    for name in CODE:
        spec = importlib.util.find_spec(name)
        for place in sorted(spec.submodule_search_locations or [] if spec else []):
            for path in sorted(Path(place).rglob("*.py")):
                digest.update(path.relative_to(place).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def known_records(step: Step) -> Records:
    """All that was counted for a shape."""
    return {**shipped_records(step), **cached_records(step)}


def shipped_records(step: Step) -> Records:
    """What comes with the package for a shape and the installed versions; nothing for others."""
    content = _read(SHIPPED / f"{shape_id(step)}.json")
    return dict(content["records"]) if content.get("libraries") == library_versions() else {}


def cached_records(step: Step) -> Records:
    """What was counted here for a shape, by this very code."""
    return dict(_read(_cache_file(step)).get("records", {}))


def keep(step: Step, new: Mapping[str, Any]) -> None:
    """Add to the user's cache; where that cannot be written, nothing is kept."""
    if not new:
        return
    path = _cache_file(step)
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"records": {**cached_records(step), **new}})


def _cache_file(step: Step) -> Path:
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "memtrain" / "plan"
    made_by = hashlib.sha256(json.dumps([library_versions(), code_hash()]).encode()).hexdigest()[:12]
    return base / f"{shape_id(step)}-{made_by}.json"


def _read(path: Path) -> dict[str, Any]:
    try:
        content = read_json(path)
    except (OSError, ValueError):  # counted anew
        return {}
    return content if isinstance(content, dict) else {}
