"""``--eval-only``: the validation loss of weights that exist, as nanoGPT's ``eval_only``."""

from contextlib import closing

import torch
from memtrain_common.console import Console
from memtrain_common.data.batches import to_device
from memtrain_common.data.text.corpus import Corpus, Crops
from memtrain_common.models.gpt import next_token_loss
from memtrain_common.training.distributed import World
from memtrain_common.training.loop import DTYPES

from .starting import plain_model, starting_gpt
from .train_config import TrainConfig


@torch.no_grad()
def evaluate_only(config: TrainConfig, corpus: Corpus, crops: Crops, device: torch.device, world: World) -> None:
    """Say the validation loss of ``--resume`` or ``--init-from``; nothing is trained or written."""
    if not world.is_main:
        return
    console = Console()
    what = config.resume or config.init_from
    if config.resume:
        model, _ = plain_model(what, console.say, select=config.select)
    else:
        model = starting_gpt(config, resumed=False)
    model = model.to(device).eval()
    dtype = DTYPES[config.dtype]
    losses, tokens = [], 0
    with closing(console.progress(config.eval_iters, label="evaluating")) as bar:
        for batch in crops.validation(config.eval_iters):
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                losses.append(next_token_loss(model, to_device(batch, device)).item())
            tokens += batch[1].numel()
            bar.update()
    unit = {"bytes": "byte", "chars": "character", "gpt2": "token"}[corpus.tokenizer.name]
    mean = sum(losses) / len(losses)
    console.say(f"{what}: validation loss {mean:.4f} nats per {unit} on {tokens:,} {unit}s of {corpus.name}")
