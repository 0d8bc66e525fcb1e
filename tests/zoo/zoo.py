"""All models, by "library family"."""

from . import language, pictures, senses
from .case import Case


def cases() -> dict[str, Case]:
    """Case by name, in the table's order."""
    found = {}
    for library, of in (
        ("torchvision", pictures.torchvision_cases()),
        ("timm", pictures.timm_cases()),
        ("transformers", {**language.cases(), **senses.cases()}),
    ):
        found |= {f"{library} {family}": of[family] for family in sorted(of)}
    return found
