"""Data sets by their names on the hub: read through the ``datasets`` package, which is imported only then."""

from typing import Any

from ..errors import UserError


def hub_rows(name: str, subset: str | None, split: str, *, revision: str | None = None) -> Any:
    """The rows of one split, each a mapping by column.

    Args:
        revision: a branch of the data set; "refs/convert/parquet" is the hub's own conversion of those that have code.

    Raises:
        UserError: if the package is missing, or the data set cannot be had; ``--data-dir`` is the way without.
    """
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"{name} by its name needs the package datasets: pip install datasets, or give --data-dir"
        ) from None
    at = {"revision": revision} if revision else {}
    try:
        return datasets.load_dataset(name, subset, split=split, **at)
    except Exception as error:  # each failure of a network has a class of its own
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{name} could not be loaded by name ({reason}): give its files by --data-dir") from error
