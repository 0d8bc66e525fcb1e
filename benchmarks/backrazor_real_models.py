"""Three real pretrained models, and a small Llama, with real data: for measurements of Back Razor, and for its tests.

MiniLM-L6 (BERT) with SST-2, DINOv2-small (ViT-S/14) and EfficientNet-Lite0 with CIFAR-10 as JPEG files, stories260K
with Tiny Shakespeare. All from the folder that MEMTRAIN_DATA names.
"""

import io
import re
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from memtrain_common.models.llama2c import Llama2cTokenizer, load_llama2c
from real_data import data
from torch import Tensor, nn

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def sst2(split: str) -> list[tuple[str, int]]:
    """Sentences and labels of a split, "train" or "dev"."""
    lines = (data() / "glue" / "SST-2" / f"{split}.tsv").read_text().split("\n")[1:]
    rows = [line.rstrip("\n").split("\t") for line in lines if line]
    return [(sentence, int(label)) for sentence, label in rows]


def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(data() / "weights" / "minilm_l6")


def minilm(attention: str = "sdpa") -> nn.Module:
    """all-MiniLM-L6-v2 with a fresh classifier of two classes."""
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(
        data() / "weights" / "minilm_l6", num_labels=2, attn_implementation=attention, dtype=torch.float32
    )


class Dino(nn.Module):
    """DINOv2-small with a fresh head on the class token."""

    def __init__(self, attention: str = "sdpa", classes: int = 10) -> None:
        super().__init__()
        from transformers import Dinov2Model

        self.vit = Dinov2Model.from_pretrained(
            data() / "weights" / "dinov2_small", attn_implementation=attention, dtype=torch.float32
        )
        self.classifier = nn.Linear(384, classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.classifier(self.vit(x).last_hidden_state[:, 0])
        return out


def efficientnet() -> nn.Module:
    """EfficientNet-Lite0 with a fresh head: the published tensors have timm's order and shapes, and other names.

    They are TensorFlow's: timm's ``efficientnet_lite0`` would take them too, and pads and normalises otherwise.
    """
    import timm

    model: Any = timm.create_model("tf_efficientnet_lite0", num_classes=1000)
    found = torch.load(next((data() / "weights" / "efficientnet_lite0").glob("*.pth")), weights_only=True)
    own = model.state_dict()
    model.load_state_dict({name: t.view_as(own[name]) for name, t in zip(own, found.values(), strict=True)})
    model.classifier = nn.Linear(model.classifier.in_features, 10)
    model.drop_rate = 0.0
    return model


def pictures(split: str, chosen: Callable[[int], list[int]], size: int) -> tuple[Tensor, Tensor]:
    """Pictures (N, 3, size, size) and labels of CIFAR-10 as JPEG files; ``chosen`` of how many there are."""
    from PIL import Image

    with zipfile.ZipFile(data() / "cifar10" / "cifar10_jpeg_full.zip") as archive:
        names = sorted(n for n in archive.namelist() if f"{split}/" in n and n.endswith(".jpg"))
        classes = sorted({n.split("/")[-2] for n in names})
        mine = [names[i] for i in chosen(len(names))]
        images = [Image.open(io.BytesIO(archive.read(n))).convert("RGB").resize((size, size), 3) for n in mine]
    x = torch.stack([torch.from_numpy(np.array(image)) for image in images]).permute(0, 3, 1, 2).float() / 255
    return normalized(x), torch.tensor([classes.index(n.split("/")[-2]) for n in mine])


def normalized(x: Tensor) -> Tensor:
    """Pictures in [0, 1] as ImageNet's models are trained to see them."""
    return (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def some(n: int, seed: int) -> Callable[[int], list[int]]:
    """n different numbers below the argument."""
    return lambda among: torch.randperm(among, generator=torch.Generator().manual_seed(seed))[:n].tolist()


@dataclass(frozen=True)
class Probe:
    """A model, the loss of one batch, and which kind of weight a parameter is."""

    model: nn.Module
    loss: Callable[[nn.Module], Tensor]
    kinds: tuple[tuple[str, str], ...]
    """(kind, pattern of its parameters' names): the first that is found decides."""

    def gradients(self, context: Any) -> tuple[float, dict[str, Tensor]]:
        """The loss, and the gradient by parameter, of a forward pass within ``context``."""
        state = {name: t.clone() for name, t in self.model.state_dict().items()}
        with context:
            loss = self.loss(self.model)
        named = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        grads = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
        self.model.load_state_dict(state)  # a batch norm's running statistics
        return loss.item(), {n: g for (n, _), g in zip(named, grads, strict=True) if g is not None}

    def by_kind(self, grads: dict[str, Tensor]) -> dict[str, Tensor]:
        """Gradients of one kind of weight as one vector."""
        parts: dict[str, list[Tensor]] = {}
        for name, g in grads.items():
            kind = next((kind for kind, pattern in self.kinds if re.search(pattern, name)), None)
            if kind is not None:
                parts.setdefault(kind, []).append(g.flatten())
        return {kind: torch.cat(vectors) for kind, vectors in parts.items()}


BERT_KINDS = (
    ("embeddings", r"embeddings\.\w+_embeddings"),
    ("q", r"query\.weight"),
    ("k", r"key\.weight"),
    ("v", r"value\.weight"),
    ("o", r"attention\.output\.dense\.weight"),
    ("fc1", r"intermediate\.dense\.weight"),
    ("fc2", r"output\.dense\.weight"),
    ("norms", "LayerNorm"),
    ("head", r"(pooler\.dense|classifier)\.weight"),
)
DINO_KINDS = (
    ("embeddings", "embeddings"),
    ("q", r"q_proj\.weight|query\.weight"),
    ("k", r"k_proj\.weight|key\.weight"),
    ("v", r"v_proj\.weight|value\.weight"),
    ("o", r"o_proj\.weight|attention\.output\.dense\.weight"),
    ("fc1", r"fc1\.weight"),
    ("fc2", r"fc2\.weight"),
    ("norms", "norm"),
    ("layer scale", "lambda1"),
    ("head", r"classifier\.weight"),
)
LLAMA_KINDS = (
    ("embeddings, head", "embed_tokens|lm_head"),
    ("q", r"q_proj\.weight"),
    ("k", r"k_proj\.weight"),
    ("v", r"v_proj\.weight"),
    ("o", r"o_proj\.weight"),
    ("gate", r"gate_proj\.weight"),
    ("up", r"up_proj\.weight"),
    ("down", r"down_proj\.weight"),
    ("norms", "norm"),
)
EFFICIENTNET_KINDS = (
    ("stem", r"conv_stem\.weight"),
    ("batch norm γ", r"bn\d\.weight"),
    ("depthwise", r"conv_dw\.weight"),
    ("project", r"conv_pwl\.weight|blocks\.0\.0\.conv_pw\.weight"),
    ("expand", r"conv_pw\.weight|conv_head\.weight"),
    ("fc", r"classifier\.weight"),
)


def minilm_probe(rows: int = 8, attention: str = "sdpa") -> Probe:
    torch.manual_seed(0)
    found = sst2("train")
    mine = [found[i] for i in some(rows, 0)(len(found))]
    batch = tokenizer()([text for text, _ in mine], padding=True, return_tensors="pt")
    labels = torch.tensor([label for _, label in mine])
    model = minilm(attention).eval()
    return Probe(model, lambda m: F.cross_entropy(m(**batch).logits, labels), BERT_KINDS)


def dino_probe(n: int = 8, attention: str = "sdpa") -> Probe:
    torch.manual_seed(0)
    x, y = pictures("train", some(n, 0), 98)
    return Probe(Dino(attention).eval(), lambda m: F.cross_entropy(m(x), y), DINO_KINDS)


def efficientnet_probe(n: int = 8) -> Probe:
    """With batch norms in training mode."""
    torch.manual_seed(0)
    x, y = pictures("train", some(n, 0), 96)
    return Probe(efficientnet().train(), lambda m: F.cross_entropy(m(x), y), EFFICIENTNET_KINDS)


def stories_probe(n: int = 8) -> Probe:
    """n pieces of 256 tokens; a Llama turns Q and K by their places after it has projected them."""
    folder = data() / "weights" / "stories260K"
    text = (data() / "text" / "tinyshakespeare.txt").read_text()[:10_000]
    tokens = torch.tensor(Llama2cTokenizer(folder / "tok512.bin").encode(text))
    x = torch.stack([tokens[256 * i : 256 * i + 257] for i in range(n)])
    model = load_llama2c(folder / "stories260K.bin").train()
    return Probe(model, lambda m: F.cross_entropy(m(x[:, :-1]).logits.flatten(0, 1), x[:, 1:].flatten()), LLAMA_KINDS)


PROBES: dict[str, Callable[[], Probe]] = {
    "MiniLM-L6, SST-2": minilm_probe,
    "DINOv2-small, CIFAR-10 at 98 px": dino_probe,
    "EfficientNet-Lite0, CIFAR-10 at 96 px": efficientnet_probe,
    "stories260K (Llama), Tiny Shakespeare": stories_probe,
}


def batches(n: int, size: int, steps: int, seed: int) -> Iterator[list[int]]:
    """``steps`` lists of ``size`` of n rows, epoch after epoch in a new order."""
    generator = torch.Generator().manual_seed(seed)
    waiting: list[int] = []
    for _ in range(steps):
        while len(waiting) < size:
            waiting += torch.randperm(n, generator=generator).tolist()
        yield waiting[:size]
        waiting = waiting[size:]
