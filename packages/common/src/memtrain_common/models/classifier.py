"""An image classifier with what it must be given."""

from dataclasses import dataclass

from torch import nn

from ..data.images.batches import Normalize


@dataclass(frozen=True)
class Classifier:
    """A model with what it must be given."""

    model: nn.Module
    image_size: int
    """Pixels of its input's side."""
    head: str
    """Path of the last layer, whose outputs are the classes."""
    normalize: Normalize
    head_kept: bool = False
    """Whether the head is the weights' own."""
    fresh: tuple[str, ...] = ()
    """Paths of other parts that the weights lack, and that begin at random."""
