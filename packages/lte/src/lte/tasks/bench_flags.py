"""``lte-bench``: flags, and what is trained while timing. No torch here."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING

from memtrain_common.commands.cli import parse
from memtrain_common.errors import UserError
from memtrain_common.files import check_targets

from .nanogpt import asked, translate
from .source_presets import NANOGPTS, SOURCE_PRESETS
from .train_config import TrainConfig, check
from .unasked import settle

if TYPE_CHECKING:
    from memtrain_common.models.gpt import GPT

PROG = "lte-bench"
DESCRIPTION = """Time the training that lte-train would begin with the same preset and flags, and measure its memory.

Nothing is kept. Without --data-dir the tokens are drawn at random (nanoGPT's real_data=False)."""
# Dense 16-bit tensor-core peaks in TFLOP/s, from the makers' data sheets; the first name found in the device's counts.
PEAK_TFLOPS = {
    "H200": 989.0, "H100 PCIe": 756.0, "H100": 989.0, "A100": 312.0, "L40S": 362.0, "L4": 121.0, "A10": 125.0,
    "V100": 125.0, "T4": 65.0, "RTX 4090": 165.0, "RTX 3090": 71.0, "P100": 18.7,
}  # fmt: skip


@dataclass(frozen=True)
class BenchConfig(TrainConfig):
    """lte-train's flags, and how to measure."""

    steps: int = 20
    """Optimizer steps that are timed, after the first one (which compiles and measures memory) and a warm-up."""
    warmup_steps: int = 3
    """Steps after the first that are not timed."""
    peak_tflops: float = 0.0
    """The device's 16-bit peak; 0 takes it from a table by name. Where it has none, MFU is unavailable."""
    profile: str = ""
    """Also write a trace of the last steps to this file, for chrome://tracing or Perfetto."""


def configure(argv: Sequence[str]) -> BenchConfig:
    """The flags, checked as lte-train's."""
    if "--real_data=True" in argv and not any(w.startswith(("--data-dir", "--data_dir", "--dataset")) for w in argv):
        raise UserError("real_data=True needs the data: name it with --data-dir")
    bench_py: dict[str, list[str]] = {"--real_data=True": [], "--real_data=False": [], "--profile=False": []}
    bench_py["--profile=True"] = ["--profile=trace.json"]
    named_here = any(w.replace("_", "-").startswith("--out") for w in argv)
    argv, notes = translate([word for w in argv for word in bench_py.get(w, [w])], BenchConfig)
    if not named_here:  # a file of nanoGPT's says where its training goes
        argv = [w for w in argv if not w.startswith("--out=")]
    for note in notes:
        print(note)
    presets = {name: BenchConfig(**{**asdict(p), "data_dir": ""}) for name, p in SOURCE_PRESETS.items()}
    config = parse(BenchConfig, argv, prog=PROG, description=DESCRIPTION, presets=presets)
    if config.steps < 2:
        raise UserError(f"--steps must be at least 2, got {config.steps}")
    if config.warmup_steps < 0 or not 0 <= config.peak_tflops < float("inf"):
        raise UserError("--warmup-steps and --peak-tflops must not be negative")
    for name in ("resume", "out", "eval_only", "nanogpt_run"):
        if getattr(config, name):
            raise UserError(f"--{name.replace('_', '-')} is lte-train's: {PROG} begins afresh and keeps nothing")
    name = argv[0] if argv and not argv[0].startswith("-") else "default"
    config, notes = settle(config, presets[name], asked(argv), nanogpts=name in NANOGPTS)
    for note in notes:
        print(note)
    check_targets({"--profile": config.profile})
    return check(config)  # type: ignore[return-value]


def plain_train_config(config: BenchConfig) -> TrainConfig:
    """What is trained while timing: neither decay nor evaluation, checkpoints, trackers or samples."""
    values = {f.name: getattr(config, f.name) for f in fields(TrainConfig)}
    total = 1 + config.warmup_steps + config.steps
    return replace(
        TrainConfig(**values), max_iters=total, decay_lr=False, eval_iters=1, eval_interval=total, log_interval=1,
        tracker="none", compare_full=False,
    )  # fmt: skip


def flops_per_token(model: "GPT") -> float:
    """nanoGPT's estimate, after PaLM's appendix B: 6 N + 12·L·heads·(C/heads)·T, forward and backward of full training.

    N counts all parameters but the position embedding. LTE computes less for frozen weights and more for the heads: the
    estimate is the same for both, so that their utilisations compare.
    """
    c = model.config
    n = sum(p.numel() for p in model.parameters()) - model.transformer.wpe.weight.numel()
    return 6.0 * n + 12.0 * c.n_layer * c.n_embd * c.block_size


def peak_flops(config: BenchConfig, device_name: str) -> float | None:
    """The device's 16-bit peak in FLOP/s; None where it is not known."""
    if config.peak_tflops:
        return config.peak_tflops * 1e12
    return next((tflops * 1e12 for name, tflops in PEAK_TFLOPS.items() if name in device_name), None)
