"""The step that was planned, run in earnest: its ledger and its peak, to set beside the prediction."""

import torch
from memtrain_common.data.batches import to_device
from memtrain_common.measuring.memory import SavedActivations, measure
from memtrain_common.measuring.prediction import LiveBytes

from ..compose.axes import Axes
from ..compose.compose import compose
from .forecast import Workplace
from .shape_models import build_model, loss_of, make_batch, plain_task


def measure_place(place: Workplace, axes: Axes, device: torch.device) -> tuple[dict[str, int], int]:
    """Train two optimizer steps on one device.

    LoRA-XS starts from random bases, which have the bytes of those of a decomposition and do not take its minutes.

    Returns:
        bytes by category, and the peak: on the CPU the most that live tensors hold, on CUDA the allocator's
        ``max_memory_allocated``.
    """
    torch.manual_seed(0)
    cuda = device.type == "cuda"
    ledger: dict[str, int] = {}
    with LiveBytes() as live:
        model = build_model(place.step.shape, place.step.weights).to(device)
        composed = compose(plain_task(place.step, model, place.rows), axes, lr=1e-4, predicting=True)
        model, optimizer = composed.model, composed.needed_optimizer()
        live.restart()
        if cuda:
            torch.cuda.reset_peak_memory_stats(device)
        for step in range(2):
            saved = 0
            for micro in range(place.micro_batches):
                batch = to_device(make_batch(place.step, place.rows), device)
                recording = SavedActivations(model, by_layer=False)
                with composed.saving(), recording:
                    value = loss_of(place.step, model, batch)
                if step == micro == 0:
                    saved = sum(recording.by_layer().values())
                del recording
                (value / place.micro_batches).backward()
                del value
            optimizer.step()
            if step == 0:
                ledger = measure(model, optimizer, {"(model)": saved}).totals
            optimizer.zero_grad(set_to_none=True)
            if composed.after_step is not None:
                composed.after_step()
        peak = torch.cuda.max_memory_allocated(device) if cuda else live.peak_bytes
    return ledger, peak
