"""Pictures that cannot be read, found before the training meets them."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Literal

import numpy as np
from tqdm import tqdm

from ...errors import UserError
from .image_set import FileImages, ImageSet, decode

Bad = Literal["refuse", "skip", "unchecked"]


def without_damaged(found: ImageSet, bad: Bad, say: Callable[[str], None] = print) -> ImageSet:
    """The set after every picture was decoded once (JPEGs at an eighth of their size), on all cores.

    Args:
        found: only files are looked at.
        bad: "refuse" damaged ones, "skip" them, or leave all "unchecked" until they are used.
        say: told how many were left out, and which is the first.

    Raises:
        UserError: naming the first damaged picture and how many there are.
    """
    if bad == "unchecked":
        return found
    splits, complaints = dict(found.splits), []
    for name, split in found.splits.items():
        if not isinstance(split.images, FileImages):
            continue
        reasons = damaged(split.images, f"checking {name}")
        complaints += [r for r in reasons if r]
        splits[name] = split.take(np.array([r is None for r in reasons], bool))
    if not complaints:
        return found
    if bad == "refuse":
        more = f" ({len(complaints)} such files)" if len(complaints) > 1 else ""
        raise UserError(f"{complaints[0]}{more}; mend or remove what is damaged, or leave it out by --bad-images skip")
    say(f"left out {len(complaints)} damaged picture{'s' * (len(complaints) > 1)}: {'; '.join(complaints[:20])}")
    for name, split in splits.items():
        if not len(split):
            raise UserError(f"no picture of {found.name}'s {name} can be read")
    return replace(found, splits=splits)


def damaged(images: FileImages, label: str) -> list[str | None]:
    """For each picture None, or what is wrong with it."""

    def look(name: str) -> str | None:
        try:
            decode(images.tree.read(name), images.tree.where(name), scale=8)
        except UserError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = pool.map(look, images.names)
        return list(tqdm(results, desc=label, total=len(images), leave=False, delay=1, disable=None))
