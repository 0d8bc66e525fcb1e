"""LTE's part in a training: heads, optimizer groups, merge clock, and what the loop must know of several processes."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from memtrain_common.errors import UserError
from memtrain_common.files import write_json
from memtrain_common.runs.run_folder import RunFolder
from memtrain_common.training.distributed import World
from memtrain_common.training.schedule import cosine_with_warmup
from memtrain_common.training.task import Task
from torch import Tensor, nn

from ..injection import inject, merged_state_dict
from ..merging import Merger, averaged
from ..parameters import clip_grad_norm_per_head, copied_parameters, head_parameters, param_groups
from ..ranks import Ranks
from ..shards import HeadShards
from .starting import freeze
from .train_config import TrainConfig, lte_config


@dataclass(frozen=True)
class Heads:
    """A model with heads and what belongs to it."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    merger: Merger
    ranks: Ranks | None
    """The processes that hold the heads; None where each holds all."""
    shards: HeadShards

    def join(self, task: Task) -> Task:
        """The task with what belongs to heads: their merges, their norms, their state, their place on processes."""
        return replace(
            task,
            optimizer=self.optimizer,
            after_step=self.merger.step,
            clip=partial(clip_grad_norm_per_head, self.model, ranks=self.ranks),
            stateful={"merger": self.merger, "sent": self.ranks or Ranks.alone()},
            parts=self.shards,
        )

    def plain(self) -> dict[str, Tensor]:
        """The merged model's state dict; every process calls it."""
        with averaged(self.model, self.ranks):
            return merged_state_dict(self.model)

    def trained(self) -> int:
        """Trained numbers, those of all processes."""
        own = {*head_parameters(self.model), *copied_parameters(self.model)}
        times = self.ranks.size if self.ranks is not None else 1
        return sum(p.numel() * (times if p in own else 1) for p in self.model.parameters() if p.requires_grad)


def add_heads(config: TrainConfig, model: nn.Module, world: World) -> Heads:
    """Inject heads, of which this process holds its share, and make their optimizer."""
    apart = world.size > 1 and config.parallel == "heads"
    ranks = Ranks(patience_s=config.peer_timeout) if apart else None
    inject(model, lte_config(config), ranks)
    freeze(model, config.freeze_n)
    groups = param_groups(
        model, lr=config.learning_rate, rest_lr=config.rest_learning_rate, weight_decay=config.weight_decay
    )
    optimizer = torch.optim.AdamW(groups, betas=(config.beta1, config.beta2))
    merger = Merger(
        model,
        config.lte_merge_steps,
        ranks=ranks,
        optimizer=optimizer,
        seed=config.seed,
        unreached=_refuse,
        in_turn=config.lte_merge_in_turn,
    )
    return Heads(model, optimizer, merger, ranks, HeadShards(model, optimizer, ranks, merger))


def _refuse(sentence: str) -> None:
    raise UserError(sentence)


def check_world(config: TrainConfig, world: World) -> None:
    """Whether so many processes can train so.

    Raises:
        UserError: naming the flags.
    """
    if world.size == 1:
        return
    if config.parallel == "ddp" or config.method == "full":
        heads = config.lte_heads if config.method == "lte" and config.lte_mode == "parallel" else 1
        if config.batch_size % (heads * world.size):
            raise UserError(
                f"--batch-size {config.batch_size} must be divisible by --lte-heads {heads} times {world.size} "
                "processes"
            )
        return
    if config.select == "best":
        raise UserError("--select best needs every head in each process: give --select last, or --parallel ddp")
    if config.lte_mode == "sequential":
        raise UserError(
            "--lte-mode sequential gives every head the whole batch: on several processes add --parallel ddp"
        )
    if config.lte_heads % world.size:
        raise UserError(
            f"--lte-heads {config.lte_heads} cannot be shared equally by {world.size} processes: give a multiple of "
            f"{world.size}, or --parallel ddp"
        )


def lr_factor(config: TrainConfig) -> Callable[[int], float] | None:
    """The learning rates' factor at a step: cosine with warm-up, and a short warm-up after each merge if asked."""
    T, restart = config.lte_merge_steps, config.lte_restart_warmup_iters
    cosine = partial(
        cosine_with_warmup,
        warmup_iters=config.warmup_iters,
        decay_iters=config.lr_decay_iters,
        min_ratio=config.min_lr_ratio,
    )
    if not restart:
        return cosine if config.decay_lr else None

    def factor(step: int) -> float:
        restarted = 1.0 if step < T else min(1.0, (step % T + 1) / (restart + 1))
        return restarted * (cosine(step) if config.decay_lr else 1.0)

    return factor


def sent_facts(heads: Heads, run: RunFolder, tokens: int, full_parameters: int) -> dict[str, str]:
    """What the processes have sent each other, for the summary; written to communication.json besides.

    Args:
        tokens: trained on so far.
        full_parameters: of the plain model, for what DDP's gradients would be (a ring all-reduce, float32).
    """
    ranks = heads.ranks
    if ranks is None or not tokens:
        return {}
    steps = max(heads.merger.steps, 1)
    ddp = 2 * (ranks.size - 1) * 4 * full_parameters * steps
    training = ranks.sent["merges"] + ranks.sent["shared"]
    content = {
        "processes": ranks.size,
        "tokens": tokens,
        "bytes_sent": dict(ranks.sent),
        "bytes_per_token": round(training / tokens, 3),
        "ddp_bytes_per_token_computed": round(ddp / tokens, 3),
    }
    if run.writes:
        write_json(run.path / "communication.json", content)
    parts = " at merges, ".join(f"{ranks.sent[k] / tokens:,.1f}" for k in ("merges", "shared"))
    return {
        "sent": f"{training / tokens:,.1f} bytes a token ({parts} for shared parameters); DDP of the full model would "
        f"send {ddp / tokens:,.1f}"
    }
