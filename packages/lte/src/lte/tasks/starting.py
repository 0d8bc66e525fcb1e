"""Where a model's weights come from: a fresh draw, GPT-2, nanoGPT's checkpoint, or a run of ours, its heads merged."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from memtrain_common.commands.chosen import verified
from memtrain_common.commands.configure import saved_config
from memtrain_common.data.text.bins import META, META_PICKLE, describe_tokenizer, read_tokenizer
from memtrain_common.data.text.corpus import Corpus
from memtrain_common.data.text.tokenizers import gpt2_files
from memtrain_common.errors import UserError
from memtrain_common.files import read_json
from memtrain_common.models.gpt import GPT, GPTConfig, padded_vocabulary
from memtrain_common.models.gpt_files import GPT2_NAMES, PlainGPT, download_gpt2, read_gpt2, read_nanogpt_run
from memtrain_common.runs.run_folder import RunFolder
from memtrain_common.runs.state_tree import same_shapes
from memtrain_common.training.rng import seed_all
from torch import Tensor, nn

from ..injection import inject, merged_state_dict
from .train_config import PROG, TrainConfig, check, lte_config
from .unasked import with_shorter_warmup


@dataclass(frozen=True)
class Trained:
    """A run's chosen weights as a plain model, and what the run says of itself."""

    plain: PlainGPT
    config: TrainConfig
    data: dict[str, Any]
    """The corpus: ``Corpus.describe()``."""
    step: int
    newest: int
    """Step of the newest intact checkpoint."""
    best_loss: float | None

    @property
    def tokenizer_dir(self) -> Path | None:
        """Where GPT-2's files are: the run's own --tokenizer-dir, or its data folder; None where they are not there."""
        folders = (Path(name) for name in (self.config.tokenizer_dir, self.config.data_dir) if name)
        return next((folder for folder in folders if gpt2_files(folder)), None)

    @property
    def choice(self) -> str:
        """Whose weights these are, in words."""
        return f"the model of step {self.step}" + (", the best evaluation" if self.step != self.newest else "")


def find_weights(
    init_from: str, say: Callable[[str], None] | None = None, *, select: str = ""
) -> tuple[PlainGPT, dict[str, Any] | None]:
    """The weights that a word names, and the corpus that they were trained on, where that is known; of a run with the
    "tokenizer_dir" where GPT-2's files are.

    nanoGPT's checkpoint names its data set: the corpus is known where ``data/NAME`` is there, as nanoGPT looks for it.

    Args:
        init_from: one of OpenAI's four names, a run folder, ``ckpt.pt`` or its folder, or a transformers folder. What
            exists on disk comes before a name.
        say: told where a run's weights are not those of its last step, and which checkpoints were passed over and why.
        select: of a run, as :func:`read_run` has it.

    Raises:
        UserError: if there is no such thing, or it is damaged.
    """
    path = Path(init_from)
    if path.is_file():
        return _read_nanogpts(path)
    if (path / "config.json").is_file() and _is_run(path / "config.json"):  # which may hold exports besides
        trained = read_run(path, select, say)
        if say is not None and trained.step != trained.newest:
            say(f"{init_from}: {trained.choice}")
        return trained.plain, {**trained.data, "tokenizer_dir": trained.tokenizer_dir}
    if (path / "ckpt.pt").is_file():
        return _read_nanogpts(path / "ckpt.pt")
    if (path / "config.json").is_file():
        return read_gpt2(path), None
    if init_from in GPT2_NAMES and not path.exists():
        return read_gpt2(download_gpt2(init_from)), None
    raise UserError(
        f"--init-from {init_from} is neither scratch, resume, {', '.join(GPT2_NAMES)}, nor a folder with a run, a "
        "GPT-2 or nanoGPT's ckpt.pt"
    )


def _read_nanogpts(path: Path) -> tuple[PlainGPT, dict[str, Any] | None]:
    run = read_nanogpt_run(path)
    folder = Path("data") / str(run.config.get("dataset", ""))
    there = "dataset" in run.config and any((folder / name).is_file() for name in (META, META_PICKLE, "train.bin"))
    return run.plain, {**describe_tokenizer(read_tokenizer(folder)), "folder": str(folder)} if there else None


def _is_run(path: Path) -> bool:
    try:
        content = read_json(path)
        return isinstance(content, dict) and isinstance(content.get("config"), dict)
    except ValueError:
        return False


def read_run(folder: Path, select: str = "", say: Callable[[str], None] | None = None) -> Trained:
    """The weights that a run has chosen, its heads merged: those of its newest valid checkpoint, or with ``--select
    best`` of its best evaluation so far. The run itself is left as it is.

    Args:
        select: instead of the run's own ``--select``.
        say: told which checkpoints were passed over and why.

    Raises:
        UserError: if it is no run of lte-train's, has no checkpoint that verifies or one of a newer format, or its best
            one is damaged.
    """
    run = RunFolder.open(folder, writes=False)
    content = run.read_config()
    try:
        config, data = saved_config(TrainConfig, folder, PROG), content["data"]
        config = replace(config, vocab_size=config.vocab_size or padded_vocabulary(data["vocab_size"]))
    except (TypeError, KeyError) as error:
        raise UserError(f"{folder} was not made by this version of lte-train: {error}") from None
    passed_over: list[str] = []
    found = run.checkpoints.load_newest(passed_over.append)
    if found is None:
        why = passed_over[-1] if passed_over else "there is none"
        raise UserError(f"{folder} has no intact checkpoint ({why}): train it first, or for longer")
    if say is not None:
        for line in passed_over:
            say(line)
    newest, state = found
    step, best = newest, state["progress"]["best"]
    if best and best[0] != newest and (select or config.select) == "best":
        step = best[0]
        state = verified(run, step, folder) if step else {}  # no checkpoint is written before the first step
    weights = _merged(config, state.get("model"), run.checkpoints.path(step))
    return Trained(PlainGPT(gpt_config(config), weights), config, data, step, newest, best[1] if best else None)


def _merged(config: TrainConfig, state: dict[str, Tensor] | None, path: Path) -> dict[str, Tensor]:
    """The plain model's weights out of a checkpoint's; without one, those that the run began with."""
    if state is None:
        seed_all(config.seed)
    model: nn.Module = GPT(gpt_config(config)) if state is not None else starting_gpt(config, resumed=False)
    if config.method == "lte":  # a run that was to go on with more heads may not have saved any yet
        heads = next((len(t) for name, t in (state or {}).items() if name.endswith(".lora_A")), config.lte_heads)
        inject(model, lte_config(replace(config, lte_heads=heads)))
    if state is not None:
        difference = same_shapes(state, model.state_dict())
        if difference is not None:
            raise UserError(f"{path} belongs to another model: {difference}")
        model.load_state_dict(state)
    weights = {name: value.clone() for name, value in merged_state_dict(model).items()}
    weights["lm_head.weight"] = weights["transformer.wte.weight"]
    return weights


def gpt_config(config: TrainConfig) -> GPTConfig:
    """The model of a configuration whose vocabulary is known."""
    names = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "dropout", "bias")
    return GPTConfig(**{name: getattr(config, name) for name in names})


def with_architecture(config: TrainConfig, corpus: Corpus, say: Callable[[str], None] | None = None) -> TrainConfig:
    """The configuration with the vocabulary of the corpus, or all of the architecture of the weights to begin with.

    Args:
        say: as :func:`find_weights` has it.

    Raises:
        UserError: if the weights do not fit the corpus, the block or the frozen blocks; or if the tokens that
            --eval-only looks at are not those that the run knows.
    """
    vocab = corpus.tokenizer.vocab_size
    config = replace(config, tokenizer=corpus.tokenizer.name)  # type: ignore[arg-type]
    if config.resume and config.eval_only:
        before = RunFolder.open(Path(config.resume), writes=False).read_config().get("data") or {}
        if before.get("sha256") != corpus.sha256:
            _check_tokens(config.resume, before, corpus)
    if config.init_from == "scratch" or config.resume:
        if 0 < config.vocab_size < vocab:
            raise UserError(f"--vocab-size {config.vocab_size} is below the {vocab} tokens of {corpus.name}")
        return replace(config, vocab_size=config.vocab_size or padded_vocabulary(vocab))
    plain, data = find_weights(config.init_from, say)
    theirs = plain.config
    known = data or ({"tokenizer": "gpt2"} if theirs.vocab_size in (50257, 50304) else {})
    _check_tokens(config.init_from, known, corpus)
    if theirs.vocab_size < vocab:
        raise UserError(f"{config.init_from} knows {theirs.vocab_size} tokens and {corpus.name} has {vocab}")
    if config.block_size > theirs.block_size:
        raise UserError(
            f"--block-size {config.block_size} is longer than the {theirs.block_size} positions of {config.init_from}"
        )
    if config.method == "lte" and config.freeze_n >= theirs.n_layer:
        raise UserError(f"--freeze-n {config.freeze_n} leaves none of the {theirs.n_layer} blocks for heads")
    if config.freeze_n > theirs.n_layer:
        raise UserError(f"--freeze-n {config.freeze_n} is more than the {theirs.n_layer} blocks of {config.init_from}")
    shape = {name: getattr(theirs, name) for name in ("n_layer", "n_head", "n_embd", "bias", "vocab_size")}
    return replace(config, **shape)


def _check_tokens(run: str, data: dict[str, Any], corpus: Corpus) -> None:
    """Refuse a corpus whose tokens are not those that a run was trained on.

    Args:
        data: the run's corpus, as far as it is known.
    """
    tokenizer = data.get("tokenizer", corpus.tokenizer.name)
    if tokenizer != corpus.tokenizer.name:
        raise UserError(
            f"{run} reads {tokenizer} tokens and {corpus.name} has {corpus.tokenizer.name}: prepare the text for it "
            f"(--tokenizer {tokenizer}, or lte-prepare)"
        )
    if "tokenizer" in data and data.get("characters") != corpus.describe().get("characters"):
        raise UserError(f"{run} was trained on other characters than {corpus.name} has: its tokens differ")


def with_length(config: TrainConfig, corpus: Corpus, *, keep_warmup: bool = True) -> TrainConfig:
    """The configuration with ``--epochs`` as steps; the decay ends with them where nothing else was asked for.

    Args:
        keep_warmup: else it shrinks with the run, where the decay does.
    """
    if not config.epochs:
        return config
    tokens = config.gradient_accumulation_steps * config.batch_size * config.block_size
    steps = max(1, math.ceil(config.epochs * len(corpus.train) / tokens))
    decay = config.lr_decay_iters
    if decay == config.max_iters:
        decay = steps
        config = config if keep_warmup else with_shorter_warmup(config, steps, config.max_iters)
    return check(replace(config, epochs=0.0, max_iters=steps, lr_decay_iters=decay))


def starting_gpt(config: TrainConfig, *, resumed: bool) -> GPT:
    """The model to begin with; ``resumed`` leaves the weights to the checkpoint that will be loaded."""
    model = GPT(gpt_config(config))
    if config.init_from != "scratch" and not resumed:
        plain, _ = find_weights(config.init_from)
        model.load_state_dict(plain.cropped(config.block_size).weights)
    return model


def freeze(model: nn.Module, blocks: int) -> None:
    """Freeze the embeddings and the first ``blocks`` blocks (nanoGPT-LTE's ``freeze_n``); 0 freezes nothing."""
    if blocks:
        frozen = ["transformer.wte", "transformer.wpe", *(f"transformer.h.{i}" for i in range(blocks))]
        for name in frozen:
            model.get_submodule(name).requires_grad_(False)


def plain_model(
    name: str, say: Callable[[str], None] | None = None, *, select: str = ""
) -> tuple[GPT, dict[str, Any] | None]:
    """A plain GPT in eval mode with the weights that a word names, and its corpus where that is known; ``say`` and
    ``select`` as :func:`find_weights` has them."""
    plain, data = find_weights(name, say, select=select)
    return plain.model().eval(), data
