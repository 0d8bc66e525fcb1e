"""One run: a workload under a choice on each axis, through the shared loop, with the memory predicted and measured."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from memtrain_common.commands.quiet import no_progress_bars
from memtrain_common.commands.result import Outcome
from memtrain_common.commands.session import Session
from memtrain_common.commands.summary import ledger_table
from memtrain_common.console import Console, format_bytes, format_table
from memtrain_common.measuring.fake_numbers import NotPredictedError
from memtrain_common.measuring.peak import memory_left
from memtrain_common.measuring.prediction import Prediction
from memtrain_common.training.distributed import World, parallelize
from memtrain_common.training.fit_config import FitConfig
from memtrain_common.training.rng import seed_all
from memtrain_common.training.schedule import schedule
from memtrain_common.training.whole import gather_whole, skeleton
from torch import nn

from ..compose.axes import BLOCK_FLAGS, read_settings
from ..compose.compose import compose, merged, saving
from ..compose.families import blocks
from ..compose.first_step import as_errors
from .choosing import choose_saving
from .config import MAY_CHANGE, RunConfig, usual_lr
from .explain import explain
from .predicting import predict_run
from .workload import Workload

NO_SHARDS = " that fsdp could gather one after another: choose --parallel ddp"


def run(
    config: RunConfig, make: Callable[[Any, World], Workload], argv: Sequence[str], prog: str
) -> dict[str, Any] | None:
    """Everything that ``finetune`` and ``pretrain`` do once their flags are checked; -> what an ablation keeps."""
    session = Session.begin(config, argv, prog=prog)
    device = session.device
    seed_all(config.seed)
    workload = make(config, session.place)
    workload.task.model.to(device)
    choice: dict[str, Any] = {}
    if config.budget:
        chosen = choose_saving(workload, config, device)
        session.console.say(chosen.why)
        choice = {n: getattr(chosen.axes, n) for n in ("save", *BLOCK_FLAGS.values())}
    saving(workload.task.model, replace(config, **choice))  # refuses what the model has not, before there is a folder
    sharded = config.parallel == "fsdp" and session.place.size > 1
    if sharded:
        blocks(workload.task.model, NO_SHARDS)
    if config.explain_memory:
        session.console.say(explain(workload, replace(config, **choice), device))
        return None
    session.open(workload.about)
    config, say = replace(session.config, **choice), session.console.say
    say(f"{session.folder.path}: {workload.about['name']}, {config.name}")
    for note in workload.notes:
        say(note)
    lr = config.lr or usual_lr(config)
    if not config.lr:
        say(f"learning rate {lr:g}, the usual one of train {config.train} with {config.optim}")
    # what every process would predict alike is for the first one to write down
    predicted = None
    if session.place.is_main:
        try:
            predicted = predict_run(workload, config, config, device=device)
            if short := too_little(predicted, memory_left(device)):
                say(short)
        except NotPredictedError as error:
            say(str(error))

    plain: list[nn.Module] = []  # what the whole model is gathered into where its parts lie on several processes

    def wrap(model: nn.Module) -> nn.Module:
        if config.save_model and sharded and session.place.is_main:
            plain.append(skeleton(model))
        return parallelize(model, config.parallel, device, blocks=blocks(model, NO_SHARDS).values() if sharded else ())

    # the composition: inject, wrap, build; then fit enters the saving context around each forward pass
    task = compose(
        replace(workload.task, lr_factor=_schedule(config, workload.steps)), config, lr=lr,
        head_lr=getattr(config, "head_lr", 0.0), weight_decay=config.weight_decay, say=say,
        wrap=wrap,
    )  # fmt: skip
    task = replace(task, evaluate=lambda m: workload.evaluate(m, workload.splits[0]))
    seed_all(config.seed + session.place.rank)  # dropout differs between processes; the weights above must not
    kept = session.resume_key(MAY_CHANGE, data_sha256=workload.about["sha256"], **workload.identity)
    key = {k: list(v) if isinstance(v, tuple) else v for k, v in kept.items()}
    if choice:
        key["chosen_save"] = config.save  # gradients are exact but for Back Razor's
    with as_errors():
        outcome = session.fit(
            task, _fit_config(config, workload), resume_key=key, label=config.name, select=config.select
        )
    with session.judging(outcome) as trained:
        scores = {split: workload.evaluate(trained, split) for split in workload.splits}
    content = session.finish(
        outcome,
        scores=scores,
        own={
            "axes": {"train": config.train, "save": config.save, "optim": config.optim},
            "settings": read_settings(config),
            "lr": lr,
            **(
                {"predicted": predicted.ledger.totals, "predicted_peak_bytes": predicted.peak_bytes}
                if predicted
                else {}
            ),
        },
        table=_scores_table(workload, outcome, scores),
        memory=_memory_table(outcome, predicted),
    )
    if config.save_model:
        trained = outcome.model
        if sharded:
            gather_whole(trained, plain[0] if plain else None)
            trained = plain[0] if plain else trained
        if session.place.is_main:
            _save_model(trained, config, workload, session.folder.path / "model", session.console)
    return _arm(content)


def too_little(predicted: Prediction, left: int | None) -> str:
    """A sentence where a step is predicted to need more than ``left`` bytes besides the weights, which are there."""
    need = predicted.peak_bytes - predicted.ledger.totals["weights"]
    if left is None or need <= left:
        return ""
    return (
        f"a training step is predicted to need {format_bytes(need)} besides the weights, and {format_bytes(left)} are "
        "free: memory may run out; --budget chooses what to keep, and a smaller batch needs less"
    )


def _fit_config(config: RunConfig, workload: Workload) -> FitConfig:
    return FitConfig(
        max_iters=workload.steps,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        grad_clip=config.grad_clip,
        dtype=config.dtype,
        compile=config.compile,
        eval_interval=workload.eval_interval,
        log_interval=config.log_interval,
        best_metric=workload.metric,
        higher_is_better=workload.higher_is_better,
        workers=config.workers,
        units_per_step=workload.units_per_step,
        unit=workload.unit,
        tracker=config.tracker,
    )


def _schedule(config: RunConfig, steps: int) -> Callable[[int], float]:
    return schedule(config.schedule, min(round(config.warmup_ratio * steps), steps - 1), steps)


def _arm(content: dict[str, Any]) -> dict[str, Any]:
    """A result as an ablation keeps it: the own part at the top, the metric by split, the rate named for its unit."""
    metrics = {split: numbers[content["metric"]] for split, numbers in content["scores"].items()}
    rate = {f"{content['unit']}_per_second": content["units_per_second"], "best_step": content["step"]}
    return {**content, **content["own"], **metrics, **rate}


def _scores_table(workload: Workload, outcome: Outcome, scores: dict[str, dict[str, float]]) -> str:
    rows = [(split, f"{numbers[workload.metric]:.4f}") for split, numbers in scores.items()]
    return f"{workload.metric} of the weights of step {outcome.step}\n{format_table(rows)}"


def _memory_table(outcome: Outcome, predicted: Prediction | None) -> str:
    """The ledger, measured and predicted; nothing where no step was taken."""
    ledger = outcome.result.ledger
    if ledger is None or predicted is None:
        return ""
    return ledger_table({"measured": ledger, "predicted": predicted.ledger}, times=False)


def _save_model(model: nn.Module, config: RunConfig, workload: Workload, path: Path, console: Console) -> None:
    """The plain model with what was trained merged into it: transformers' folder, or safetensors."""
    from safetensors.torch import save_model

    model = merged(model, config).to("cpu")
    if hasattr(model, "save_pretrained"):
        no_progress_bars()
        model.save_pretrained(path)  # type: ignore[operator]
        for part in workload.extra.values():
            part.save_pretrained(path)
    else:
        for tensor in (*model.parameters(), *model.buffers()):  # a file holds values, not lazy flags on them
            tensor.data = tensor.data.resolve_conj().resolve_neg()
        path.mkdir(exist_ok=True)
        save_model(model, str(path / "model.safetensors"))
    console.say(f"model {path}")
