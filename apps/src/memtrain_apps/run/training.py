"""One run: a workload under a choice on each axis, through the shared loop, with the memory predicted and measured."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from memtrain_common.console import Console, format_bytes, format_count, format_seconds, format_table
from memtrain_common.errors import UserError
from memtrain_common.files import write_json
from memtrain_common.measuring.environment import device_name
from memtrain_common.measuring.memory import CATEGORIES, Ledger
from memtrain_common.measuring.plots import plot_loss, plot_memory
from memtrain_common.measuring.prediction import Prediction
from memtrain_common.runs import checkpoint
from memtrain_common.runs.run_folder import RunFolder, default_run_path
from memtrain_common.runs.trackers import check_tracker
from memtrain_common.training.cpu_workarounds import avoid_broken_amx
from memtrain_common.training.distributed import World, gather_objects, launch, parallelize, unwrap
from memtrain_common.training.loop import DTYPES, FitConfig, FitResult, fit
from memtrain_common.training.rng import seed_all
from memtrain_common.training.schedule import cosine_with_warmup
from torch import nn

from ..compose.axes import read_settings
from ..compose.compose import Composed, compose, merged
from ..compose.families import blocks
from .config import MAY_CHANGE, RunConfig, usual_lr
from .predicting import predict_run
from .quiet import no_progress_bars, quiet_libraries
from .workload import Workload


def run(
    config: RunConfig, make: Callable[[Any, World], Workload], argv: Sequence[str], prog: str
) -> dict[str, Any] | None:
    """Everything that ``finetune`` and ``pretrain`` do once their flags are checked; -> the content of result.json."""
    quiet_libraries()
    if config.threads:
        torch.set_num_threads(config.threads)
    world, device = launch(config.device)
    if device.type == "cpu" and config.dtype == "bfloat16":
        avoid_broken_amx()
    if config.batch_size % world.size:
        raise UserError(f"--batch-size {config.batch_size} must be divisible by the {world.size} processes")
    check_tracker(config.tracker)
    seed_all(config.seed)
    workload = make(config, world)
    workload.model.to(device)
    if config.explain_memory:
        from .explain import explain

        Console(quiet=not world.is_main).say(explain(workload, config, device))
        return None
    folder, config = _open_run(config, argv, prog, workload, device, world)
    console = Console(folder.path / "log.txt" if world.is_main else None, quiet=not world.is_main)
    console.say(f"{folder.path}: {workload.about['name']}, {config.name}")
    lr = config.lr or usual_lr(config)
    if not config.lr:
        console.say(f"learning rate {lr:g}, the usual one of train {config.train} with {config.optim}")
    predicted = predict_run(workload, config, config, device=device)

    # the composition: inject, wrap, build; then fit enters the saving context around each forward pass
    composed = compose(
        workload.model, config, lr=lr, head_lr=getattr(config, "head_lr", 0.0), weight_decay=config.weight_decay,
        say=console.say, wrap=lambda m: parallelize(m, config.parallel, device, blocks=blocks(m).values()),
    )  # fmt: skip
    start = {n: p.detach().clone() for n, p in unwrap(composed.model).state_dict().items()}
    seed_all(config.seed + world.rank)  # dropout differs between processes; the weights above must not
    result = fit(
        composed.model,
        workload.batches,
        workload.loss,
        composed.optimizer,
        _fit_config(config, workload),
        evaluate=lambda m: workload.evaluate(m, workload.splits[0]),
        lr_factor=_schedule(config, workload.steps),
        saving=composed.saving,
        after_step=composed.after_step,
        clip=composed.clip,
        stateful=composed.stateful,
        run=folder,
        resume=bool(config.resume),
        resume_path=folder.path,
        identity=_identity(config, workload),
        console=console,
        label=config.name,
    )
    _take_best(composed.model, result, folder, start)
    scores = _judge(composed.model, workload, config, device)
    content = _content(config, workload, composed, result, predicted, scores, lr, prog, argv, folder)
    if world.is_main:
        write_json(folder.path / "result.json", content)
        _say(console, content, folder)
        if config.save_model:
            _save_model(unwrap(composed.model), config, workload, folder.path / "model", console)
    return content


def _open_run(
    config: RunConfig, argv: Sequence[str], prog: str, workload: Workload, device: torch.device, world: World
) -> tuple[RunFolder, RunConfig]:
    """Make the run's folder, or open it, and write its config.json."""
    if config.resume:
        folder = RunFolder.open(Path(config.resume), writes=world.is_main)
        before = folder.read_config()["data"]
        if before["sha256"] != workload.about["sha256"]:
            raise UserError(
                f"{config.resume} was trained on {before['name']} (SHA-256 {before['sha256'][:12]}…), and the data "
                f"found now have {workload.about['sha256'][:12]}…: give it the same --data-dir, or begin a new run"
            )
        config = dataclasses.replace(config, out=str(folder.path))
        folder.add_resume(config, prog=prog, argv=argv)
        return folder, config
    path = gather_objects(Path(config.out) if config.out else default_run_path(prog))[0]  # the first one's clock
    folder = RunFolder.create(path, writes=world.is_main)
    config = dataclasses.replace(config, out=str(folder.path))
    made = {"data": workload.about, "device": device_name(device), "processes": world.size}
    folder.write_config(config, prog=prog, argv=argv, **made)
    return folder, config


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
    warmup = min(round(config.warmup_ratio * steps), steps - 1)
    if config.schedule == "constant":
        return lambda step: min(1.0, (step + 1) / (warmup + 1))
    return partial(cosine_with_warmup, warmup_iters=warmup, decay_iters=steps, min_ratio=0.0)


def _identity(config: RunConfig, workload: Workload) -> dict[str, Any]:
    """What a checkpoint must agree in: all that the weights depend on."""
    kept = {k: v for k, v in dataclasses.asdict(config).items() if k not in MAY_CHANGE}
    kept = {k: list(v) if isinstance(v, tuple) else v for k, v in kept.items()}
    return {**kept, "data_sha256": workload.about["sha256"]}


def _take_best(model: nn.Module, result: FitResult, folder: RunFolder, start: dict[str, torch.Tensor]) -> None:
    """Put the weights of the best evaluation into the model."""
    assert result.best is not None
    step = result.best[0]
    if step == result.step:
        return
    from memtrain_common.runs.state_tree import shard_like

    inner = unwrap(model)
    state = start
    if step:
        wrong = checkpoint.verify(folder.checkpoints.path(step))
        if wrong is not None:
            raise UserError(f"the best checkpoint {folder.checkpoints.path(step)} is damaged: {wrong}; train anew")
        state = checkpoint.load(folder.checkpoints.path(step))["model"]
    inner.load_state_dict(shard_like(state, inner.state_dict()))


def _judge(
    model: nn.Module, workload: Workload, config: RunConfig, device: torch.device
) -> dict[str, dict[str, float]]:
    """Every split's numbers, in eval mode."""
    inner = unwrap(model)
    inner.eval()
    with torch.no_grad(), torch.autocast(device.type, DTYPES[config.dtype], enabled=config.dtype != "float32"):
        return {split: workload.evaluate(inner, split) for split in workload.splits}


def _content(
    config: RunConfig, workload: Workload, composed: Composed, result: FitResult, predicted: Prediction,
    scores: dict[str, dict[str, float]], lr: float, prog: str, argv: Sequence[str], folder: RunFolder,
) -> dict[str, Any]:  # fmt: skip
    """What ``result.json`` says."""
    measured = result.ledger or Ledger.read(folder.path / "memory.json")
    inner = unwrap(composed.model)
    last = [row for row in folder.metrics() if row["split"] == "train"][-1:]
    return {
        "axes": {"train": config.train, "save": config.save, "optim": config.optim},
        "settings": read_settings(config),
        "lr": lr,
        "seed": config.seed,
        "command": " ".join([prog, *argv]),
        "data": workload.about["name"],
        "metric": workload.metric,
        "best_step": result.best and result.best[0],
        **{split: numbers[workload.metric] for split, numbers in scores.items()},
        "scores": scores,
        "train_loss": last[0]["loss"] if last else None,
        "measured": measured.totals,
        "predicted": predicted.ledger.totals,
        "predicted_peak_bytes": predicted.peak_bytes,
        "peak_bytes": result.peak_bytes,
        "trained_parameters": sum(p.numel() for p in inner.parameters() if p.requires_grad),
        "parameters": sum(p.numel() for p in inner.parameters()),
        "steps": result.step,
        "seconds": result.seconds,
        f"{workload.unit}_per_second": result.units_per_second,
        "joules": result.joules,
        "energy_source": result.energy_source,
    }


def _say(console: Console, content: dict[str, Any], folder: RunFolder) -> None:
    """The run's end: scores, the ledger predicted and measured, what it cost; and the pictures."""
    console.say()
    console.say(f"{content['metric']} of the checkpoint of step {content['best_step']}")
    console.say(format_table([(s, f"{n[content['metric']]:.4f}") for s, n in content["scores"].items()]))
    console.say("memory of a training step")
    rows: list[tuple[str, ...]] = [("", "measured", "predicted")]
    rows += [(c, format_bytes(content["measured"][c]), format_bytes(content["predicted"][c])) for c in CATEGORIES]
    rows.append(("total", *(format_bytes(sum(content[k].values())) for k in ("measured", "predicted"))))
    console.say(format_table(rows))
    peaks = ", ".join(
        f"{k} {'unavailable' if v is None else format_bytes(v)}" for k, v in content["peak_bytes"].items()
    )
    joules = content["joules"]
    rate = next((k, v) for k, v in content.items() if k.endswith("_per_second"))
    unit = rate[0].removesuffix("_per_second")
    facts = [
        ("trained", f"{content['trained_parameters']:,} of {content['parameters']:,} parameters"),
        ("peak memory", peaks),
        ("speed", f"{format_count(rate[1])} {unit}/s, {format_seconds(content['seconds'])} of training"),
        ("energy", "unavailable" if joules is None else f"{joules:.0f} J ({content['energy_source']})"),
    ]
    console.say("run")
    console.say("\n".join(f"  {name:12} {value}" for name, value in facts))
    plot_memory(Ledger.read(folder.path / "memory.json"), folder.path / "memory.png")
    plot_loss({"": folder.metrics()}, folder.path / "loss.png", ylabel="loss, nats")
    console.say(f"run folder {folder.path}")


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
        path.mkdir(exist_ok=True)
        save_model(model, str(path / "model.safetensors"))
    console.say(f"model {path}")
