"""A GPT's weights in other tools' files: nanoGPT's ``ckpt.pt``, and transformers' GPT-2 folders.

All three use the same parameter names. transformers keeps the four projections of a block transposed (its ``Conv1D``),
always has biases, and calls our exact GELU "gelu"; OpenAI's weights were trained with its approximation "gelu_new",
which this GPT, like nanoGPT's, replaces by the exact one.
"""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..files import read_json
from .gpt import GPT, GPTConfig

GPT2_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
GPT2_VOCAB = 50257  # the last one is <|endoftext|>
_TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
_COMPUTED = {
    "activation_function": ("gelu_new", "gelu", "gelu_pytorch_tanh", "gelu_fast"),
    "layer_norm_epsilon": (1e-5,), "scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,),
    "tie_word_embeddings": (True,), "add_cross_attention": (False,),
}  # fmt: skip
"""What else a GPT-2's configuration may say, transformers' default first. All of these activations are GELU, which is
computed exactly here."""
_MASKS = (".attn.bias", ".attn.masked_bias")  # buffers of older files


@dataclass(frozen=True)
class PlainGPT:
    """A GPT without heads or wrappers: what it is, and its state dict by nanoGPT's names."""

    config: GPTConfig
    weights: dict[str, Tensor]

    def model(self, *, dropout: float = 0.0) -> GPT:
        model = GPT(replace(self.config, dropout=dropout))
        model.load_state_dict(self.weights)
        return model

    def cropped(self, block_size: int) -> "PlainGPT":
        """With the first ``block_size`` positions only, as nanoGPT's ``crop_block_size``."""
        weights = dict(self.weights)
        weights["transformer.wpe.weight"] = weights["transformer.wpe.weight"][:block_size]
        return PlainGPT(replace(self.config, block_size=block_size), weights)


# -- nanoGPT's ckpt.pt


@dataclass(frozen=True)
class NanoGPTRun:
    """All of nanoGPT's ``ckpt.pt``."""

    plain: PlainGPT
    config: Mapping[str, Any]
    """nanoGPT's globals: its flags; "dataset" names the folder in ``data/`` that has the bins."""
    iter_num: int
    """Optimizer steps done."""
    best_val_loss: float
    optimizer: Mapping[str, Any]
    """The state dict of its AdamW: one group of matrices, one of vectors, each in the order of named_parameters."""

    def adamw_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """The state dict for an AdamW with the same two groups: its moments and steps, this one's learning rates.

        Raises:
            ValueError: if it belongs to other parameters.
        """
        now = optimizer.state_dict()
        theirs, state = self.optimizer["param_groups"], self.optimizer["state"]
        if [len(g["params"]) for g in theirs] != [len(g["params"]) for g in now["param_groups"]]:
            raise ValueError("its groups have other numbers of parameters")
        order = [i for group in theirs for i in group["params"]]
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        moved: dict[int, dict[str, Tensor]] = {}
        for ours, (key, parameter) in enumerate(zip(order, parameters, strict=True)):
            if not state:  # an AdamW that has not stepped
                break
            entry = state.get(key, {})
            if any(name not in entry or entry[name].shape != parameter.shape for name in ("exp_avg", "exp_avg_sq")):
                raise ValueError(f"parameter {ours} of shape {tuple(parameter.shape)} has no moments of that shape")
            step = torch.as_tensor(entry["step"], dtype=torch.float32).cpu()  # a number, before torch 1.12
            moved[ours] = {"step": step, "exp_avg": entry["exp_avg"], "exp_avg_sq": entry["exp_avg_sq"]}
        for mine, group in zip(now["param_groups"], theirs, strict=True):
            mine.update({name: group[name] for name in ("betas", "eps", "weight_decay")})
        return {**now, "state": moved}


def read_nanogpt_run(path: Path) -> NanoGPTRun:
    """The whole of nanoGPT's ``ckpt.pt``, where it has more than the model; nothing is loaded but tensors and values.

    Raises:
        UserError: if it is no such file.
    """
    unread = True
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        unread = False  # torch's own message advises to load it without its protection
        arguments = {k: v for k, v in content["model_args"].items() if k in GPTConfig.__dataclass_fields__}
        config = GPTConfig(**arguments)
        named = {k.removeprefix("_orig_mod."): v for k, v in content["model"].items()}
    except Exception as error:  # each way of being no such file has a class of its own
        reason = "it is damaged, or holds more than tensors and plain values" if unread else _first_line(error)
        raise UserError(f"{path} is not a checkpoint of nanoGPT's ({reason})") from None
    plain = _checked(config, {k: v for k, v in named.items() if not k.endswith(_MASKS)}, path)
    said, optimizer = content.get("config"), content.get("optimizer")
    try:
        step, best = int(content.get("iter_num", 0)), float(content.get("best_val_loss", float("inf")))
    except (TypeError, ValueError) as error:
        raise UserError(f"{path} is not a checkpoint of nanoGPT's ({_first_line(error)})") from None
    return NanoGPTRun(
        plain, said if isinstance(said, dict) else {}, step, best, optimizer if isinstance(optimizer, dict) else {}
    )


def write_nanogpt(
    path: Path, plain: PlainGPT, *, iter_num: int, best_val_loss: float, config: Mapping[str, Any], dropout: float
) -> None:
    """Write ``ckpt.pt`` for nanoGPT's ``sample.py``, and for its ``train.py`` to resume: with a fresh AdamW.

    Args:
        config: nanoGPT's globals; its "dataset" tells ``sample.py`` where ``meta.pkl`` is.
    """
    model = plain.model()
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config["weight_decay"]},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=config["learning_rate"], betas=(config["beta1"], config["beta2"]))
    content = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "model_args": {**asdict(plain.config), "dropout": dropout},
        "iter_num": iter_num,
        "best_val_loss": best_val_loss,
        "config": dict(config),
    }
    partial = path.with_name(path.name + ".partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(partial, "wb") as file:  # torch's own error of a place that cannot be written names nothing
        torch.save(content, file)
    os.replace(partial, path)


# -- transformers' GPT-2


def read_gpt2(folder: Path) -> PlainGPT:
    """A GPT-2 folder as transformers writes it: ``config.json`` and safetensors.

    Raises:
        UserError: if it is another architecture, has no safetensors, or they do not fit.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        said = read_json(folder / "config.json")
        if said.get("model_type") != "gpt2":
            raise UserError(f"{folder} holds the model type {said.get('model_type')!r}: only gpt2 can be taken up")
        for name, computed in _COMPUTED.items():
            if said.get(name, computed[0]) not in computed:
                raise UserError(
                    f"{folder} has {name} {said[name]!r}, and this GPT takes {' or '.join(map(repr, computed))}"
                )
        shape = {ours: said[theirs] for ours, theirs in _SHAPE.items()}
        config = GPTConfig(**shape, bias=True)
        named: dict[str, Tensor] = {}
        for path in sorted(folder.glob("model*.safetensors")):
            named.update(load_file(path))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise UserError(f"{folder} is not a GPT-2 folder of transformers' ({_first_line(error)})") from None
    if not named:
        raise UserError(f"{folder} has no model.safetensors: other formats of weights are not read")
    weights = {}
    for name, value in named.items():
        if name.endswith(_MASKS):
            continue
        full = name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"
        weights[full] = value.T.contiguous() if full.endswith(_TRANSPOSED) else value
    return _checked(config, weights, folder)


def write_gpt2(folder: Path, plain: PlainGPT, *, tokenizer: tuple[Path, Path] | None = None) -> None:
    """Write a folder that ``GPT2LMHeadModel.from_pretrained`` loads: the same logits. It must not exist yet.

    Args:
        tokenizer: GPT-2's ``encoder.json`` and ``vocab.bpe``, which go along under transformers' names.
    """
    from safetensors.torch import save_file

    config = plain.config
    tensors = {}
    for name, value in plain.weights.items():
        if name == "lm_head.weight":  # tied: transformers ties it again
            continue
        tensors[name] = (value.T if name.endswith(_TRANSPOSED) else value).float().resolve_neg().contiguous().clone()
        if not config.bias and name.endswith(".weight") and not name.endswith(("wte.weight", "wpe.weight")):
            tensors[name.removesuffix("weight") + "bias"] = torch.zeros(value.shape[0])
    end = GPT2_VOCAB - 1 if config.vocab_size >= GPT2_VOCAB else None
    said = {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "activation_function": "gelu",
        **{theirs: getattr(config, ours) for ours, theirs in _SHAPE.items()}, "n_inner": None,
        "layer_norm_epsilon": 1e-5, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
        "tie_word_embeddings": True, "bos_token_id": end, "eos_token_id": end, "dtype": "float32",
    }  # fmt: skip
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
    (partial / "config.json").write_text(json.dumps(said, indent=2) + "\n")
    if tokenizer is not None:
        shutil.copyfile(tokenizer[0], partial / "vocab.json")
        shutil.copyfile(tokenizer[1], partial / "merges.txt")
        length = {"tokenizer_class": "GPT2Tokenizer", "model_max_length": config.block_size}
        (partial / "tokenizer_config.json").write_text(json.dumps(length, indent=2) + "\n")
    os.replace(partial, folder)


def download_gpt2(name: str) -> Path:
    """The folder of one of OpenAI's four models, from the hub or its cache.

    Raises:
        UserError: if it cannot be had.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UserError(
            f"{name} by its name needs the package huggingface_hub: pip install huggingface_hub, or name a folder"
        ) from None
    try:
        where = snapshot_download(f"openai-community/{name}", allow_patterns=["config.json", "model.safetensors"])
    except Exception as error:  # each failure of a network has a class of its own
        raise UserError(
            f"{name} could not be downloaded ({_first_line(error)}): name a folder that holds it in transformers' form"
        ) from None
    return Path(where)


_SHAPE = {
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_embd": "n_embd",
    "vocab_size": "vocab_size",
    "block_size": "n_positions",
}


def _checked(config: GPTConfig, weights: dict[str, Tensor], where: Path) -> PlainGPT:
    """The weights under both names of the tied one, if they are those of such a GPT."""
    if config.n_layer > len(weights):  # before so many layers are built
        raise UserError(f"{where} claims {config.n_layer} layers and holds {len(weights)} tensors: it is no whole GPT")
    weights.setdefault("lm_head.weight", weights.get("transformer.wte.weight", torch.empty(0)))
    with torch.device("meta"):
        wanted = {k: v.shape for k, v in GPT(config).state_dict().items()}
    for name, shape in wanted.items():
        if name not in weights or weights[name].shape != shape:
            there = tuple(weights[name].shape) if name in weights else "missing"
            raise UserError(f"{where} is no whole GPT: {name} should be {tuple(shape)} and is {there}")
    extra = next((name for name in weights if name not in wanted), None)
    if extra is not None:
        raise UserError(f"{where} is another model: a GPT has no {extra}")
    return PlainGPT(config, {k: v.float() for k, v in weights.items()})


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:200] or type(error).__name__
