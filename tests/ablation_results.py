"""Made-up results of an ablation, for the tests of its report."""

MIB = 1 << 20


def result(train, save="all", seed=0, test=0.9, memory=8 * MIB, **more):
    """An arm's record with half its memory in activations."""
    ledger = {"weights": memory // 4, "gradients": memory // 8, "optimizer": memory // 8, "activations": memory // 2}
    record = {
        "name": f"{train}+{save}+adamw-seed{seed}",
        "combination": f"{train}+{save}+adamw",
        "axes": {"train": train, "save": save, "optim": "adamw"},
        "settings": {},
        "seed": seed,
        "command": f"finetune --train {train} --save {save} --seed {seed}",
        "status": "done",
        "why": None,
        "device": "cpu",
        "memory_limit_bytes": 0,
        "metric": "accuracy",
        "val": test,
        "test": test,
        "measured": {**ledger, "buffers": 0},
        "predicted": {**ledger, "buffers": 0},
        "trained_parameters": 1000,
        "seconds": 2.0,
        "samples_per_second": 100.0,
        "joules": None,
        "energy_source": "unavailable",
        "curve": [{"step": s, "split": split, "loss": 1.0 / s} for s in (10, 20) for split in ("train", "val")],
    }
    return record | more


CONFIG = {
    "command": "ablate",
    "date": "2026-11-21T06:00:00",
    "device": "a processor",
    "versions": {"torch": "2"},
    "git_commit": "0" * 40,
    "places": ["cpu", "cpu"],
    "config": {"pretrain": None},
}


def page():
    out = {"predicted_peak_bytes": 9 * MIB, "memory_limit_bytes": 4 * MIB, "curve": []}
    return [
        *(result("full", seed=i, test=0.95 + i / 100, memory=32 * MIB) for i in range(3)),
        *(result("lora", "backrazor", seed=i, test=0.93 - i / 100, memory=6 * MIB) for i in range(3)),
        result("lte", status="out of memory", why="you tried to allocate <b>9</b> bytes", **out),
        result("head", "backrazor", status="refused", why="save backrazor would do nothing & so on"),
        result("bitfit", status="diverged", why="the loss was no longer finite by step 7"),
    ]
