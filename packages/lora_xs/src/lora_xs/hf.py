"""LoRA-XS in transformers' Trainer: checkpoints that hold the adapter instead of the model.

lora_xs.inject(model, config)
trainer = Trainer(model, args, train_dataset=rows, callbacks=[LoRAXSCallback(model)])
trainer.train(resume_from_checkpoint=…)
lora_xs.load_adapter(base, "out/checkpoint-500")  # onto the base model, anywhere
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback

from . import files
from .adapter_checks import PROBE_TOLERANCE, base_digests, probe
from .adapter_file import describe_adapter, save_adapter, state_key
from .adapter_header import ADAPTER, HEAD_FILE
from .adapters import chosen
from .config import LoRAXSConfig
from .errors import LoRAXSError
from .head import ATTRIBUTE as HEAD
from .head import heads
from .layer import ATTRIBUTE, is_adapted, layers

BUFFERS_FILE, BUFFERS_FORMAT = "buffers.safetensors", "lora-xs buffers 1"
INDEX_FILE = "model.safetensors.index.json"
"""Where Trainer looks for the files of a checkpoint's weights."""

MISSING = "the base weights are not in this folder, load them and then lora_xs.load_adapter(model, folder).safetensors"
"""The file of weights that a checkpoint's config.json names: `from_pretrained` says that there is none of this name."""

STATE = "lora_xs"
"""What Trainer's state calls the adapter's configuration, among the states of its callbacks."""

TRAINED = "_lora_xs_trained"
"""Attribute of a model: the adapter that its newest callback is for."""


class LoRAXSCallback(TrainerCallback):
    """Trainer's checkpoints as adapter folders.

    Each is what :func:`lora_xs.save_adapter` writes, beside Trainer's own optimizer, scheduler and random states:
    `load_adapter` reads it onto a base model, and `resume_from_checkpoint` and `load_best_model_at_end` go on from it.
    `from_pretrained` refuses it by an error that says what is missing.

    Args:
        model: as it is given to Trainer, with its adapter.
        full_model: let Trainer write the whole model too, and put the adapter into `adapter` beside it.
        name: of the adapter; None is the active one.
    """

    def __init__(self, model: nn.Module, *, full_model: bool = False, name: str | None = None) -> None:
        if not is_adapted(model):
            raise LoRAXSError("the model has no LoRA-XS adapters; call lora_xs.inject before LoRAXSCallback")
        self.full_model = full_model
        self.name = chosen(model, name, "LoRAXSCallback")
        self.model = model
        setattr(model, TRAINED, self.name)
        model.register_load_state_dict_pre_hook(_check)
        if full_model:
            return
        if isinstance(model, PreTrainedModel):
            model.save_pretrained = _Saving(model, self.name)
        # What Trainer need not find in a checkpoint; it then ties weights anew.
        model._keys_to_ignore_on_save = set(model.state_dict()) - set(_trained(model, self.name))  # type: ignore
        if not hasattr(model, "tie_weights"):
            model.tie_weights = _nothing  # type: ignore[assignment]

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Is this the model that is trained, at the scale α/r of the checkpoint that it goes on from?"""
        trained = kwargs.get("model", self.model)
        while trained is not self.model and isinstance(inner := _within(trained), nn.Module):
            trained = inner
        if trained is not self.model:
            raise LoRAXSError("Trainer trains another model than LoRAXSCallback was made for: give it the same one")
        if state.global_step and (then := _config_then(args, state)) is not None:
            _check_scale(self.model, self.name, then)
        # Trainer writes it into trainer_state.json, and reads it from the folder that it resumes from.
        now = layers(self.model)[0][1].configs[self.name]
        state.stateful_callbacks[STATE] = {"config": now.to_json()}

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the adapter where `save_pretrained` has not done so."""
        folder = _folder(args, state)
        if state.is_world_process_zero and self.full_model:
            save_adapter(self.model, folder / "adapter", name=self.name)
        elif state.is_world_process_zero and not isinstance(self.model, PreTrainedModel):
            write_checkpoint(self.model, folder, self.name)
            (folder / "model.safetensors").unlink(missing_ok=True)


def write_checkpoint(model: nn.Module, folder: str | Path, name: str | None = None) -> Path:
    """An adapter folder that Trainer resumes from: what :func:`lora_xs.save_adapter` writes, the model's buffers where
    it has some (a batch norm's statistics), and an index by the parameters' names."""
    name = chosen(model, name, "write_checkpoint")
    folder = save_adapter(model, folder, name=name, named=True)
    places = _trained(model, name)
    buffers = {key: value for key, value in model.state_dict().items() if places.get(key) == BUFFERS_FILE}
    if buffers:
        files.write(folder / BUFFERS_FILE, buffers, {}, BUFFERS_FORMAT)
    index = json.dumps({"metadata": {}, "weight_map": places}, indent=0, sort_keys=True)
    (folder / INDEX_FILE).write_text(index + "\n")
    if isinstance(model, PreTrainedModel):
        config = {
            **model.config.to_diff_dict(),
            "architectures": [type(model).__name__],
            "transformers_weights": MISSING,
        }
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True, default=str) + "\n")
    return folder


def _trained(model: nn.Module, name: str) -> dict[str, str]:
    """Keys of the state dict that a checkpoint holds, and the file of each."""
    places = {}
    for key, module in model.named_modules():
        for leaf, buffer in module._buffers.items():
            if buffer is not None and leaf not in module._non_persistent_buffers_set:
                places[f"{key}.{leaf}" if key else leaf] = BUFFERS_FILE
    for _, layer in layers(model):
        places[state_key(layer, name)] = ADAPTER
    for module, head in heads(model):
        if head.of(module, name) is module:
            keys = [key for key in module.state_dict() if not key.startswith(HEAD + ".")]
            places |= {f"{head.name}.{key}": HEAD_FILE for key in keys}
        else:
            raise LoRAXSError(f"Trainer's checkpoints hold the adapter that {head.first!r} is, not {name!r}")
    return places


class _Saving:
    """`save_pretrained` of a model with adapters. An object, whose attributes follow where the model is copied: what a
    function has enclosed would stay the first model's."""

    def __init__(self, model: PreTrainedModel, name: str) -> None:
        self.model = model
        self.name = name
        self.whole = model.save_pretrained
        self.ignored = getattr(model, "_keys_to_ignore_on_save", None)

    def __call__(self, save_directory: str | Path, is_main_process: bool = True, **options: Any) -> None:
        """The adapter alone, as a folder that Trainer resumes from; the whole model once its adapter is merged."""
        model = self.model
        if is_adapted(model) and all(layer.merged is None for _, layer in layers(model)):
            if is_main_process:
                write_checkpoint(model, save_directory, self.name)
            return
        before = model._keys_to_ignore_on_save
        model._keys_to_ignore_on_save = self.ignored
        try:
            self.whole(save_directory, is_main_process=is_main_process, **options)
        finally:
            model._keys_to_ignore_on_save = before


def _folder(args: Any, state: Any) -> Path:
    """Trainer's checkpoint of the last step."""
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def _within(model: nn.Module) -> Any:
    """What DDP or torch.compile has wrapped."""
    return getattr(model, "module", None) or getattr(model, "_orig_mod", None)


def _config_then(args: Any, state: Any) -> LoRAXSConfig | None:
    """What the checkpoint that Trainer goes on from was trained with. One from before 2026-12 says it in its adapter's
    header alone, which is found in the output folder."""
    if (stored := state.stateful_callbacks.get(STATE)) is not None:
        return LoRAXSConfig.from_json(stored["config"])
    folder = _folder(args, state)
    found = [one for one in (folder, folder / "adapter") if (one / ADAPTER).exists()]
    return describe_adapter(found[0]).config if found else None


def _check_scale(model: nn.Module, name: str, then: LoRAXSConfig) -> None:
    for _, layer in layers(model):
        now = layer.configs[name].scale_of(layer.name)
        if now != then.scale_of(layer.name):
            raise LoRAXSError(
                f"the checkpoint was trained at a scale α/r of {then.scale_of(layer.name):g} for {layer.name}, and "
                f"this model has {now:g}: inject with the same alpha"
            )


def _nothing() -> None:
    """A plain module has no weights to tie."""


@torch.no_grad()
def _check(model: nn.Module, state: dict[str, Tensor], prefix: str, *others: Any) -> None:
    """Before a checkpoint's file is read into the model: is it for this adapter, these base weights and these bases?"""
    if prefix or not is_adapted(model):
        return
    _check_adapter(model, state)
    if "probe" not in state or "digests" not in state:
        return
    digests, probes = state.pop("digests"), state.pop("probe")
    _, short = base_digests(model, reuse=True)
    if short.shape != digests.shape or not torch.equal(short, digests):
        raise LoRAXSError("the checkpoint was made for other base weights: load those before inject")
    for i, (_, layer) in enumerate(layers(model)):
        if f"A.{i}" in state:
            layer.A.copy_(state.pop(f"A.{i}"))
            layer.B.copy_(state.pop(f"B.{i}"))
        elif not bool(((probe(layer.A, layer.B) - probes[i]).abs() <= PROBE_TOLERANCE).all()):
            raise LoRAXSError(f"the bases of {layer.name} are not those that the checkpoint was trained on")


def _check_adapter(model: nn.Module, state: dict[str, Tensor]) -> None:
    """What a file lacks, Trainer would train on from its untrained start."""
    wanted = getattr(model, TRAINED)
    ours = {state_key(layer, "").removesuffix(".") for _, layer in layers(model)}
    names = {name for place, _, name in (key.rpartition(".") for key in state) if place in ours}
    if names and wanted not in names:
        raise LoRAXSError(
            f"the checkpoint holds the adapter {', '.join(sorted(names))!r}, and this model trains {wanted!r}: "
            "inject it under the checkpoint's name"
        )
    theirs = {key.rpartition(".")[0] for key in state} - {"", "A", "B"}
    if "probe" in state and theirs and theirs != ours:
        one = min(theirs ^ ours).partition(f".{ATTRIBUTE}.")[0]
        where = "the checkpoint" if min(theirs ^ ours) in theirs else "this model"
        raise LoRAXSError(f"only {where} has an adapter at {one}: inject with the same targets as the checkpoint's")
