"""The composition behind ``lora-xs merge``, ``export-peft``, ``import`` and ``info``."""

import warnings
from pathlib import Path
from typing import Any

import torch
from memtrain_common.console import Console, format_bytes, format_table
from memtrain_common.errors import UserError
from memtrain_common.files import check_target_folder
from memtrain_common.models.encoders import load_tokenizer

from ..adapter_file import describe_adapter, save_adapter, verify_adapter
from ..adapter_header import ADAPTER, HEAD_FILE
from ..adapters import trained
from ..config import CAUSAL_LM_TARGETS, ROBERTA_TARGETS, LoRAXSConfig, matches
from ..injection import inject
from ..merging import merge
from ..peft_export import export_peft
from ..peft_import import import_peft
from .adapter_flags import ExportConfig, ImportConfig, InfoConfig, MergeConfig
from .models import DTYPES, labels_of, load_adapted, load_for_import, load_skeleton, read_task, write_task


def run_merge(config: MergeConfig) -> None:
    """Base model and adapter into one model folder."""
    out = _new_folder(config.out)
    model, name = load_adapted(config.adapter, config.model, config.base_dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a tie that merging cuts is recorded below
        merge(model, keep=False)
    embedding, output = (getattr(model, f"get_{kind}_embeddings")() for kind in ("input", "output"))
    if embedding is not None and output is not None and embedding.weight is not output.weight:
        model.config.tie_word_embeddings = False  # type: ignore[union-attr]
    model.save_pretrained(out)  # type: ignore[operator]
    load_tokenizer(name).save_pretrained(out)
    size = sum(p.stat().st_size for p in out.glob("*.safetensors"))
    Console().say(f"merged {config.adapter} into {name}: {out}, {format_bytes(size)} of weights")


def run_export(config: ExportConfig) -> None:
    """The adapter as a plain LoRA."""
    out = _new_folder(config.out)
    model, name = load_adapted(config.adapter, config.model, config.base_dtype)
    export_peft(model, out, base_model=name, dtype=DTYPES[config.dtype])
    size = sum(p.stat().st_size for p in out.glob("*.safetensors"))
    ours = (Path(config.adapter) / ADAPTER).stat().st_size
    Console().say(f"exported {config.adapter}: {out}, {size:,} bytes as a plain LoRA (as LoRA-XS {ours:,})")


def run_import(config: ImportConfig) -> None:
    """A checkpoint of the official code, or a LoRA of PEFT's, as an adapter."""
    out = _new_folder(config.out)
    labels = labels_of(config.folder)
    model = load_for_import(config.model, labels, config.base_dtype)
    import_peft(model, config.folder, bases=config.bases)
    save_adapter(model, out)
    source = str(Path(config.model).resolve()) if Path(config.model).exists() else config.model
    write_task(out, command="import", model=source, **({"num_labels": labels} if labels else {}))
    info = describe_adapter(out)
    theirs = sum(p.stat().st_size for p in Path(config.folder).glob("adapter_model.*"))
    ours = (out / ADAPTER).stat().st_size
    bases = "from the file, stored" if info.stored_bases else f"by the SVD ({info.config.svd}), not stored"
    Console().say(f"imported {config.folder}: {out}, {ours:,} bytes (there {theirs:,}); bases {bases}")


def _new_folder(name: str) -> Path:
    path = Path(name)
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise UserError(f"{path} is not empty: --out needs a new or empty folder")
    check_target_folder("--out", name)
    return path


def run_info(config: InfoConfig) -> None:
    if config.adapter:
        _describe(config)
    else:
        _count(config)


def _describe(config: InfoConfig) -> None:
    """What an adapter's files say; with a model, whether they fit it."""
    folder = Path(config.adapter)
    info, task = verify_adapter(folder), read_task(folder)
    xs = info.config
    ranks = sorted({m.rank for m in info.modules})
    rows: list[tuple[str, Any]] = [
        ("rank", ", ".join(map(str, ranks))),
        ("alpha", f"{xs.alpha_of('') if len(ranks) == 1 else 'by module'}"),
        ("targets", xs.targets if isinstance(xs.targets, str) else ", ".join(xs.targets)),
        ("modules", len(info.modules)),
        ("trained numbers in R", f"{info.trained:,}"),
        ("bases", f"{xs.init}, {'stored' if info.stored_bases else 'made again from the base weights'}"),
        ("adapter file", f"{(folder / ADAPTER).stat().st_size:,} bytes"),
        ("base weights, SHA-256", info.base_sha256),
    ]
    if info.heads:
        rows.append(("task head", f"{', '.join(info.heads)}: {(folder / HEAD_FILE).stat().st_size:,} bytes"))
    rows += [(name, task[name]) for name in ("task", "data", "model") if name in task]
    if config.model:
        load_adapted(config.adapter, config.model)  # refused by name, if it is for another
        rows.append(("fits", config.model))
    Console().say("\n".join(f"  {name:21}  {value}" for name, value in rows))


def _count(config: InfoConfig) -> None:
    """Trained numbers by rank, without allocating the model."""
    rows = [("rank", "modules", "trained in R", "in float32", "LoRA at this rank")]
    for rank in config.ranks:
        model = load_skeleton(config.model)
        names = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
        usual = next((f for f in (CAUSAL_LM_TARGETS, ROBERTA_TARGETS) if any(matches(n, f[:1]) for n in names)), None)
        xs = LoRAXSConfig(rank, targets=config.targets or usual or "all-linear", init="random", head=())
        shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
        inject(model, xs, cache=False)
        R = trained(model)["R"]
        adapted = [n.removesuffix(".lora_xs") for n, _ in model.named_modules() if n.endswith(".lora_xs")]
        lora = sum(rank * sum(shapes[f"{n}.weight"][:2]) for n in adapted)
        numbers = sum(r.numel() for r in R)
        rows.append((str(rank), str(len(R)), f"{numbers:,}", format_bytes(4 * numbers), f"{lora:,}"))
    Console().say(format_table(rows))
