"""``lora-xs demo``: one small pretrained ViT, adapted to new classes by several methods, side by side."""

import copy
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from memtrain_common.commands.quiet import quiet_imports
from memtrain_common.console import Console, format_bytes, format_seconds, format_table
from memtrain_common.data.order import epoch_batch
from memtrain_common.measuring.bench import write_results
from memtrain_common.models.vit_model import ViT, ViTConfig
from memtrain_common.optional import installed, without
from memtrain_common.training.loop import FitConfig, FitResult, Task, fit
from memtrain_common.training.rng import seed_all
from memtrain_common.training.schedule import schedule
from torch import Tensor, nn

from ..adapter_file import save_adapter
from ..adapters import trained
from ..config import LoRAXSConfig
from ..injection import inject
from .demo_flags import DemoConfig

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2")
BATCH = 64
HEAD_LR = 1e-2
TRAINING = ("gradients", "optimizer", "activations")  # what training needs beyond the weights


@dataclass(frozen=True)
class Digits:
    """Images (n×1×8×8) in [−1, 1] with their labels (n,)."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Arm:
    """One way to adapt, over all seeds."""

    name: str
    accuracy: list[float]
    trained: int
    """Numbers besides the head's."""
    head: int
    saved_bytes: int
    """Of what adapts the model, without the head."""
    memory_bytes: dict[str, int]
    seconds: list[float]


def digits(first: int, last: int) -> tuple[Digits, Digits]:
    """Digits ``first`` to ``last`` of scikit-learn's bundled set, relabelled from 0: three quarters, and the rest."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x = torch.from_numpy(images).float().view(-1, 1, 8, 8) / 8 - 1
    y = torch.from_numpy(labels)
    picked = (y >= first) & (y <= last)
    x, y = x[picked], y[picked] - first
    test = torch.arange(len(y)) % 4 == 0
    return Digits(x[~test], y[~test]), Digits(x[test], y[test])


def vit(classes: int) -> nn.Module:
    return ViT(ViTConfig(64, 3, 4, 128, 8, 2, classes, num_channels=1, layer_norm_eps=1e-12))


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    images, labels = batch
    return nn.functional.cross_entropy(model(images).logits, labels)


def accuracy(model: nn.Module, data: Digits) -> float:
    model.eval()
    with torch.no_grad():
        return float((model(data.images).logits.argmax(-1) == data.labels).float().mean())


def learn(model: nn.Module, groups: list[dict[str, Any]], data: Digits, steps: int, seed: int) -> FitResult:
    def batches(i: int) -> tuple[Tensor, Tensor]:
        rows = torch.from_numpy(epoch_batch(seed, i, batch=BATCH, size=len(data.labels)))
        return data.images[rows], data.labels[rows]

    model.train()
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    warm = min(10, steps - 1)
    return fit(Task(model, batches, loss_of, optimizer, lr_factor=schedule("linear", warm, steps)), FitConfig(steps))


def run_demo(config: DemoConfig, argv: Sequence[str]) -> list[Arm]:
    """Pretrain once, adapt by each method with each seed, and print the table."""
    console = Console()
    began = time.perf_counter()
    old, old_test = digits(0, 4)
    new, new_test = digits(5, 9)
    seed_all(0)
    base = vit(5)
    result = learn(base, [{"params": list(base.parameters()), "lr": 1e-3}], old, config.pretrain_steps, seed=0)
    n = sum(p.numel() for p in base.parameters())
    console.say(
        f"pretrained a ViT of {n:,} parameters on the digits 0 to 4: {100 * accuracy(base, old_test):.1f} % of "
        f"{len(old_test.labels)} right, {format_seconds(result.seconds)}"
    )
    console.say(f"adapting it to the digits 5 to 9: {len(new.labels)} images, {config.steps} steps of {BATCH}")
    methods: list[tuple[str, Callable[[nn.Module, int], Prepared]]] = [("head alone", _head)]
    methods += [(f"LoRA-XS r={r}", lambda model, seed, r=r: _lora_xs(model, seed, r)) for r in config.ranks]  # type: ignore[misc]
    if installed("peft"):
        methods.append((f"LoRA r={config.lora_rank}", lambda model, seed: _lora(model, config.lora_rank)))
    else:
        console.say(without("plain LoRA beside it", "peft"))
    methods.append(("full", _full))
    arms = []
    for name, prepare in methods:
        arms.append(_arm(name, prepare, base, new, new_test, config))
        console.say(f"  {name}: {100 * statistics.mean(arms[-1].accuracy):.1f} %")
    console.say()
    console.say(table(arms))
    console.say(f"accuracy: mean over {config.seeds} seeds, least and greatest; memory: {', '.join(TRAINING)}")
    console.say(f"every method also trains and saves the head of {arms[0].head:,} numbers")
    seconds = time.perf_counter() - began
    console.say(f"{format_seconds(seconds)} in all")
    if config.out:
        write_results(
            Path(config.out),
            argv=["lora-xs", "demo", *argv],
            device=torch.device("cpu"),
            seeds=range(config.seeds),
            seconds=round(seconds, 1),
            arms=[asdict(arm) for arm in arms],
        )
    return arms


@dataclass(frozen=True)
class Prepared:
    """A model ready to be trained, and how many bytes it takes to keep what was trained."""

    model: nn.Module
    own: list[nn.Parameter]
    """What the method trains, without the head."""
    head: list[nn.Parameter]
    lr: float
    saved: Callable[[Path], int]


def _arm(
    name: str,
    prepare: Callable[[nn.Module, int], Prepared],
    base: nn.Module,
    new: Digits,
    test: Digits,
    config: DemoConfig,
) -> Arm:
    scores, seconds = [], []
    for seed in range(config.seeds):
        seed_all(seed)
        model = copy.deepcopy(base)
        model.classifier = nn.Linear(64, 5)
        made = prepare(model, seed)
        groups = [{"params": made.own, "lr": made.lr}, {"params": made.head, "lr": HEAD_LR}]
        result = learn(made.model, [g for g in groups if g["params"]], new, config.steps, seed)
        scores.append(accuracy(made.model, test))
        seconds.append(result.seconds)
    assert result.ledger is not None
    with tempfile.TemporaryDirectory() as folder:
        size = made.saved(Path(folder))
    own, head = (sum(p.numel() for p in ps) for ps in (made.own, made.head))
    return Arm(name, scores, own, head, size, result.ledger.totals, seconds)


def _head(model: nn.Module, seed: int) -> Prepared:
    model.requires_grad_(False)
    head = list(model.classifier.requires_grad_(True).parameters())  # type: ignore[union-attr]
    return Prepared(model, [], head, 0.0, lambda folder: 0)


def _lora_xs(model: nn.Module, seed: int, rank: int) -> Prepared:
    inject(model, LoRAXSConfig(rank, targets=TARGETS, seed=seed), cache=False)
    groups = trained(model)

    def saved(folder: Path) -> int:
        save_adapter(model, folder)
        return (folder / "adapter.safetensors").stat().st_size

    return Prepared(model, groups["R"], groups["head"], 1e-2, saved)


def _lora(model: nn.Module, rank: int) -> Prepared:
    with quiet_imports():
        import peft

    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(TARGETS), modules_to_save=["classifier"])
    with quiet_imports():  # it looks for kernels that plain LoRA does not need
        wrapped = peft.get_peft_model(model, config)
    named = [(n, p) for n, p in wrapped.named_parameters() if p.requires_grad]
    own = [p for n, p in named if "lora_" in n]

    def saved(folder: Path) -> int:
        wrapped.save_pretrained(str(folder))
        head = sum(p.numel() * p.element_size() for n, p in named if "lora_" not in n)
        return (folder / "adapter_model.safetensors").stat().st_size - head

    return Prepared(wrapped, own, [p for n, p in named if "lora_" not in n], 3e-3, saved)


def _full(model: nn.Module, seed: int) -> Prepared:
    head = list(model.classifier.parameters())  # type: ignore[union-attr]
    own = [p for n, p in model.named_parameters() if not n.startswith("classifier.")]
    return Prepared(model, own, head, 1e-3, lambda folder: sum(p.numel() * p.element_size() for p in own))


def table(arms: list[Arm]) -> str:
    """One line a method."""
    rows = [("", "accuracy", "trained", "adapter", "memory", "time")]
    for arm in arms:
        a = arm.accuracy
        rows.append(
            (
                arm.name,
                f"{100 * statistics.mean(a):.1f} % ({100 * min(a):.1f} to {100 * max(a):.1f})",
                f"{arm.trained:,}",
                format_bytes(arm.saved_bytes),
                format_bytes(sum(arm.memory_bytes[c] for c in TRAINING)),
                format_seconds(statistics.mean(arm.seconds)),
            )
        )
    return format_table(rows)
