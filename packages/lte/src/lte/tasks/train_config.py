"""The flags of ``lte-train``, its presets, and what their values must satisfy. No torch here: ``--help`` reads this."""

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from memtrain_common.commands.run_flags import LearningRate, RunFlags, StepFlags
from memtrain_common.errors import UserError

from ..config import REPLICAS, REST, VECTORS, LTEConfig

PROG = "lte-train"


@dataclass(frozen=True)
class TrainConfig(RunFlags, StepFlags):
    """Every flag of lte-train; kept in the run folder's config.json."""

    PLACES: ClassVar[tuple[str, ...]] = ("data_dir", "tokenizer_dir", "init_from", "nanogpt_run")
    NAMES: ClassVar[frozenset[str]] = frozenset({"scratch"})

    # -- input and output
    init_from: str = "scratch"
    """Weights to begin with: scratch, gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a run folder, a nanoGPT ckpt.pt (or
    its folder), a transformers GPT-2 folder. The architecture is then that of the weights."""
    data_dir: str = ""
    """Folder of text files, or of bins (lte-prepare); empty takes the source of Python's standard library."""
    tokenizer: Literal["bytes", "chars", "gpt2"] = "bytes"
    """What a token of text files is; bins know theirs, and refuse another that is asked for."""
    tokenizer_dir: str = ""
    """Folder with GPT-2's encoder.json and vocab.bpe; empty lets tiktoken download them."""
    wandb_project: str = "memtrain"
    """Project of W&B or trackio."""
    wandb_run_name: str = ""
    """The run's name there; empty takes the run folder's."""
    # -- model
    n_layer: int = 4
    """Transformer blocks."""
    n_head: int = 4
    """Attention heads a block (LTE's heads are --lte-heads)."""
    n_embd: int = 128
    """Width."""
    block_size: int = 64
    """Context length in tokens."""
    dropout: float = 0.0
    """Dropout probability."""
    bias: bool = False
    """Biases in linear layers and layer norms, as GPT-2 has them."""
    vocab_size: int = 0
    """Rows of the embedding; 0 takes the corpus's, padded to a multiple of 64 from 1000 on."""
    freeze_n: int = 0
    """Freeze the embeddings and the first n blocks, which then get no heads; 0 freezes nothing."""
    method: Literal["lte", "full"] = "lte"
    """full trains all parameters at --learning-rate, without heads."""
    # -- LTE
    lte_heads: int = 4
    """H: LoRA heads a layer, each trained on its own chunk of the batch."""
    lora_r: int = 64
    """r: rank of a head."""
    lora_alpha: float = 256.0
    """α: a head is scaled by α/r."""
    lte_merge_steps: int = 1
    """T: optimizer steps between merges; 0 never merges."""
    lte_init: Literal["paper", "upstream"] = "paper"
    """Scale of A's initial value: the paper's sqrt(m/n), or the published code's sqrt(n/r)."""
    lte_trainable: tuple[str, ...] = REST
    """What is trained besides the heads: any of embeddings norms biases skipped."""
    lte_replicas: tuple[str, ...] = ()
    """Of these, what every head has its own copy of, averaged at merges: any of embeddings norms skipped."""
    lte_vectors: tuple[str, ...] = ()
    """Of these, what gets heads as vectors, merged like matrices: any of norms biases."""
    lte_mode: Literal["parallel", "sequential"] = "parallel"
    """Each head on its own chunk of the batch, or all heads on all of it."""
    lte_base: Literal["float32", "bfloat16", "4bit"] = "float32"
    """How the frozen weights are kept."""
    lte_reset: Literal["none", "B", "all"] = "none"
    """What begins anew at a merge: nothing, every B, or every A and B (ReLoRA, with --lte-heads 1)."""
    lte_reset_optimizer: bool = True
    """The optimizer forgets its state of what is reset."""
    lte_restart_warmup_iters: int = 0
    """Steps of linear warm-up after each merge (ReLoRA's jagged schedule); 0 for none."""
    lte_outer_momentum: float = 0.0
    """Nesterov momentum over merges (DiLoCo); 0 for none."""
    lte_merge_density: float = 1.0
    """Share of each head's delta that a merge sends, its largest numbers; the head keeps the rest, computes with it and
    adds it to the next. 1 sends all, exactly."""
    lte_merge_density_replicas: float = 0.0
    """The same of copies (--lte-replicas), where they want another share; 0: --lte-merge-density."""
    lte_merge_bits: int = 4
    """Bits of each number that is sent of a share below 1; 1 sends signs."""
    lte_merge_delay: int = 0
    """Steps from the sending of a sparse merge to its merging, while training goes on; 0 waits for it."""
    lte_merge_in_turn: bool = False
    """Merge the layers in turn, each at its own every T-th step, rather than all in one step."""
    lte_outer_lr: float = 1.0
    """How much of the heads' mean delta is merged."""
    skip_attn: bool = False
    """No heads in attention."""
    skip_mlp: bool = False
    """No heads in the MLPs."""
    # -- optimizer
    learning_rate: LearningRate = 1e-3
    """Peak learning rate of the heads."""
    rest_learning_rate: float = 4e-3
    """Peak learning rate of everything else that is trained; 0 takes --learning-rate."""
    epochs: float = 0.0
    """Passes over the training tokens, instead of --max-iters; 0 leaves it to that."""
    max_iters: int = 1000
    """Optimizer steps. A resumed run may go on for more; the decay then ends where it was to end before."""
    batch_size: int = 16
    """Sequences a micro-batch, over all processes; divisible by --lte-heads."""
    weight_decay: float = 0.1
    """AdamW weight decay, for matrices other than the heads'."""
    beta1: float = 0.9
    """AdamW's β₁."""
    beta2: float = 0.95
    """AdamW's β₂."""
    grad_clip: float = 1.0
    """Largest gradient norm, of each head by itself and of the rest; 0 does not clip."""
    decay_lr: bool = True
    """Cosine decay with warm-up; else constant."""
    warmup_iters: int = 50
    """Steps of linear warm-up; in a run shorter than the default's, fewer in proportion where the flag is left out."""
    lr_decay_iters: int = 0
    """Steps until the lowest learning rate; 0 takes --max-iters."""
    min_lr_ratio: float = 0.1
    """Lowest learning rate over the peak."""
    min_lr: float = 0.0
    """Lowest learning rate itself, which then decides --min-lr-ratio; 0 leaves it. Not read with --no-decay-lr."""
    # -- evaluation and logging
    eval_interval: int = 200
    """Steps between evaluations; a checkpoint follows each."""
    eval_iters: int = 40
    """Batches an evaluation, spread evenly over the validation text."""
    always_save_checkpoint: bool = True
    """Save after each evaluation; else only where it is the best so far, and at the end, and --select is best where
    the flag is left out (heads over processes: last)."""
    eval_only: bool = False
    """Evaluate --init-from (or --resume) and stop: nothing is trained or written."""
    compare_full: bool = False
    """Also train all parameters of the same model on the same batches, and put its loss beside."""
    full_learning_rate: float = 3e-3
    """Peak learning rate of --compare-full; 0 takes --learning-rate."""
    sample_tokens: int = 200
    """Tokens to generate at the end."""
    # -- system
    parallel: Literal["heads", "ddp"] = "heads"
    """Under torchrun: each process holds its own heads and speaks at merges, or holds all and averages gradients."""
    peer_timeout: float = 40.0
    """With --parallel heads: seconds of silence after which another process counts as lost."""
    nanogpt_run: str = ""
    """A ckpt.pt of nanoGPT's train.py to go on with: weights, AdamW's state and iteration. --resume of its folder sets
    it, and out; the architecture, betas and weight decay are then those of the checkpoint, and the method is full."""
    compile: bool = False
    """Run the model through torch.compile."""
    seed: int = 1337
    """Seed of the initial weights, the data order and dropout."""


CHAR = TrainConfig(
    tokenizer="chars", n_layer=6, n_head=6, n_embd=384, block_size=256, batch_size=64, dropout=0.2, max_iters=5000,
    warmup_iters=100, eval_iters=200, lora_r=96, lora_alpha=384.0,
    learning_rate=1e-3, rest_learning_rate=1e-3, full_learning_rate=1e-3,
)  # fmt: skip
PRESETS = {
    "default": TrainConfig(),
    "shakespeare-char": CHAR,
    "shakespeare-char-cpu": replace(
        CHAR,
        n_layer=4,
        n_head=4,
        n_embd=128,
        block_size=64,
        batch_size=12,
        dropout=0.0,
        max_iters=2000,
        eval_iters=20,
        lora_r=64,
        lora_alpha=256.0,
    ),
}
# What a resumed run may do otherwise than it began: go on for longer, add the comparison, find the same text elsewhere.
MAY_CHANGE = {
    "out",
    "resume",
    "data_dir",
    "tokenizer_dir",
    "max_iters",
    "compare_full",
    "full_learning_rate",
    "tracker",
    "sample_tokens",
    "device",
    "parallel",
    "peer_timeout",
    "lte_heads",  # to a multiple: each head is copied
    "wandb_project",
    "wandb_run_name",
    "always_save_checkpoint",
    "eval_only",
    "select",
    "data_changed",
}


def check(config: TrainConfig) -> TrainConfig:
    """The configuration itself, with 0 and empty defaults filled in.

    Raises:
        UserError: naming the flag and what would be right.
    """
    config = _filled_in(config)
    at_least = {
        "n_layer": 1, "n_head": 1, "n_embd": 1, "block_size": 1, "lte_heads": 1, "lora_r": 1, "lte_merge_steps": 0,
        "max_iters": 0, "batch_size": 1, "gradient_accumulation_steps": 1, "weight_decay": 0, "grad_clip": 0,
        "epochs": 0, "warmup_iters": 0, "lr_decay_iters": 0, "min_lr_ratio": 0, "eval_interval": 1, "eval_iters": 1,
        "lte_restart_warmup_iters": 0, "lte_outer_momentum": 0, "peer_timeout": 1,
        "log_interval": 1, "sample_tokens": 0, "dropout": 0, "beta1": 0, "beta2": 0, "vocab_size": 0, "freeze_n": 0,
    }  # fmt: skip
    for name, least in at_least.items():
        if not getattr(config, name) >= least:
            raise UserError(f"{_flag(name)} must be at least {least}, got {getattr(config, name)}")
    for name in ("learning_rate", "rest_learning_rate", "full_learning_rate", "lora_alpha", "lte_outer_lr"):
        if not 0 < getattr(config, name) < math.inf:
            raise UserError(f"{_flag(name)} must be positive and finite, got {getattr(config, name)}")
    for name in ("weight_decay", "grad_clip", "epochs"):
        if getattr(config, name) == math.inf:
            raise UserError(f"{_flag(name)} must be finite, got inf")
    if config.min_lr_ratio > 1:
        raise UserError(f"--min-lr-ratio must be at most 1, got {config.min_lr_ratio}")
    if config.method == "full" and config.compare_full:
        raise UserError("--method full is the full training that --compare-full would add: drop one of them")
    if config.method == "lte" and config.init_from == "scratch" and config.freeze_n >= config.n_layer:
        raise UserError(f"--freeze-n {config.freeze_n} leaves none of the {config.n_layer} blocks for heads")
    if config.init_from == "scratch" and config.freeze_n > config.n_layer:
        raise UserError(f"--freeze-n {config.freeze_n} is more than the model's {config.n_layer} blocks")
    if not 0 <= config.seed < 2**63:
        raise UserError(f"--seed must be from 0 to 2^63 − 1, got {config.seed}")
    if config.tokenizer_dir and config.tokenizer != "gpt2":
        raise UserError("--tokenizer-dir is for --tokenizer gpt2: give both or neither")
    for name in ("dropout", "beta1", "beta2", "lte_outer_momentum"):
        if not getattr(config, name) < 1:
            raise UserError(f"{_flag(name)} must be below 1, got {getattr(config, name)}")
    if config.n_embd % config.n_head:
        raise UserError(f"--n-embd {config.n_embd} must be a multiple of --n-head {config.n_head}")
    if config.method == "lte" and config.lte_mode == "parallel" and config.batch_size % config.lte_heads:
        raise UserError(
            f"--batch-size {config.batch_size} must be divisible by --lte-heads {config.lte_heads}: every head gets an "
            "equal chunk of the batch"
        )
    if config.skip_attn and config.skip_mlp:
        raise UserError("--skip-attn and --skip-mlp together leave no layer for heads: drop one of them")
    for name, words in (("lte_trainable", REST), ("lte_replicas", REPLICAS), ("lte_vectors", VECTORS)):
        if not set(getattr(config, name)) <= set(words):
            raise UserError(f"{_flag(name)} takes any of {' '.join(words)}, got {' '.join(getattr(config, name))}")
    try:
        lte_config(config)
    except ValueError as error:  # what does not go together; its words are the flags' without their prefix
        raise UserError(f"--lte-… flags: {error}") from None
    if config.lte_merge_density == 1 and config.lte_merge_bits != TrainConfig.lte_merge_bits:
        raise UserError("--lte-merge-bits is for a --lte-merge-density below 1: all of a delta is sent exactly")
    if config.lte_merge_in_turn and config.lte_merge_steps < 2:
        raise UserError(
            f"--lte-merge-in-turn spreads the layers over --lte-merge-steps, which is {config.lte_merge_steps}: give 2 "
            "or more, or leave it out"
        )
    if config.lte_merge_delay and config.lte_restart_warmup_iters:
        raise UserError(
            "--lte-restart-warmup-iters warms up after each merge, and --lte-merge-delay merges later than that: drop "
            "one of the two"
        )
    if config.lte_merge_delay > config.lte_merge_steps:
        raise UserError(
            f"--lte-merge-delay {config.lte_merge_delay} must be at most --lte-merge-steps {config.lte_merge_steps}: "
            "one merge arrives before the next is sent"
        )
    if config.lte_restart_warmup_iters and not config.lte_merge_steps > config.lte_restart_warmup_iters:
        raise UserError(
            f"--lte-restart-warmup-iters {config.lte_restart_warmup_iters} must be below --lte-merge-steps "
            f"{config.lte_merge_steps}"
        )
    return config


def _filled_in(config: TrainConfig) -> TrainConfig:
    """The configuration with what takes its value from another flag."""
    rate = config.learning_rate
    if config.min_lr < 0 or (config.decay_lr and config.min_lr and not config.min_lr <= rate):
        raise UserError(f"--min-lr must be from 0 to --learning-rate {rate}, got {config.min_lr}")
    return replace(
        config,
        lr_decay_iters=config.lr_decay_iters or config.max_iters,
        rest_learning_rate=config.rest_learning_rate or rate,
        full_learning_rate=rate if config.method == "full" else config.full_learning_rate or rate,
        min_lr_ratio=config.min_lr / rate if config.decay_lr and config.min_lr and rate > 0 else config.min_lr_ratio,
    )


def lte_config(config: TrainConfig) -> LTEConfig:
    """The part of the flags that is LTE's own."""
    targets = tuple(
        suffix
        for skipped, suffixes in (
            (config.skip_attn, ("attn.c_attn", "attn.c_proj")),
            (config.skip_mlp, ("mlp.c_fc", "mlp.c_proj")),
        )
        if not skipped
        for suffix in suffixes
    )
    return LTEConfig(
        heads=config.lte_heads,
        rank=config.lora_r,
        alpha=config.lora_alpha,
        init=config.lte_init,
        mode=config.lte_mode,
        targets=targets,
        exclude=("lm_head", *(f"transformer.h.{i}.{t}" for i in range(config.freeze_n) for t in targets)),
        trainable=config.lte_trainable,
        replicas=config.lte_replicas,
        vectors=config.lte_vectors,
        base=config.lte_base,
        reset=config.lte_reset,
        reset_optimizer=config.lte_reset_optimizer,
        outer_momentum=config.lte_outer_momentum,
        merge_density=config.lte_merge_density,
        merge_density_replicas=config.lte_merge_density_replicas or None,
        merge_bits=config.lte_merge_bits,
        merge_delay=config.lte_merge_delay,
        outer_lr=config.lte_outer_lr,
    )


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
