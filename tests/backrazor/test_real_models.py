"""On real pretrained models the gradient of every kind of weight is near the dense one, in a twelfth of the bytes."""

import contextlib
import os
import sys
from pathlib import Path

import pytest
import torch
from backrazor import Razor
from memtrain_common.measuring.memory import SavedActivations

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from backrazor_real_models import dino_probe, efficientnet_probe, minilm_probe, stories_probe

pytestmark = pytest.mark.skipif("MEMTRAIN_DATA" not in os.environ, reason="MEMTRAIN_DATA is not set: no real weights")

PROBES = {
    "MiniLM": (minilm_probe, 0.1, 0.95, 12),
    "DINOv2": (dino_probe, 0.1, 0.95, 12),
    "EfficientNet": (efficientnet_probe, 0.1, 0.85, 8),
    "stories260K": (stories_probe, 0.1, 0.9, 7),
    "stories260K, 0.05": (stories_probe, 0.05, 0.9, 8),  # its blocks are recomputed, but for the rotated Q and K
}


class Counting:
    """A context, and the bytes that are saved within it."""

    def __init__(self, model, context):
        self.saved, self.context = SavedActivations(model), context

    def __enter__(self):
        self.saved.__enter__()
        self.context.__enter__()

    def __exit__(self, *error):
        self.context.__exit__(*error)
        self.saved.__exit__(*error)
        self.bytes = sum(self.saved.by_layer().values())


@pytest.mark.slow
@pytest.mark.parametrize("name", PROBES)
def test_gradients_of_every_kind_of_weight(name):
    make, keep, least, times = PROBES[name]
    probe = make(6)
    dense = Counting(probe.model, contextlib.nullcontext())
    loss, grads = probe.gradients(dense)
    expected = probe.by_kind(grads)
    small = Counting(probe.model, Razor(keep))
    same, grads = probe.gradients(small)
    assert same == loss
    assert dense.bytes > times * small.bytes
    found = probe.by_kind(grads)
    assert {kind for kind, _ in probe.kinds} == set(found)
    cosines = {kind: float(torch.cosine_similarity(g, expected[kind], dim=0)) for kind, g in found.items()}
    assert min(cosines.values()) > least, cosines
