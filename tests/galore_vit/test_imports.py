"""What importing the package must not load, and that the optimizers need torch alone."""

import ast
import sys
from pathlib import Path

import galore_vit
from support import run_light

SOURCE = Path(galore_vit.__file__).parent
TORCH_ONLY = [
    "adafactor", "adamw", "adamw8bit", "basis", "block8bit", "counters", "data_parallel", "factored", "finite",
    "galore", "groups", "growth", "in_backward", "internals", "item", "loading", "plain", "projection", "refreshing",
    "scaled", "settings", "sharding", "stand_ins", "state_size", "tensors",
]  # fmt: skip


def test_import_is_light():
    ((code, said),) = run_light(["import sys, galore_vit; assert 'torch' not in sys.modules"])
    assert not code, said


def test_every_export_is_there():
    for name in galore_vit.__all__:
        assert getattr(galore_vit, name).__name__ == name


def test_optimizers_import_torch_and_nothing_else():
    for name in TORCH_ONLY:
        for node in ast.walk(ast.parse((SOURCE / f"{name}.py").read_text())):
            modules = []
            if isinstance(node, ast.ImportFrom) and node.module == "galore_vit":
                modules = [f"galore_vit.{a.name}" for a in node.names]
            elif isinstance(node, ast.ImportFrom):
                modules = [node.module]
            modules += [a.name for a in node.names] if isinstance(node, ast.Import) else []
            for module in modules:
                top = module.split(".")[0]
                assert top in ("torch", "galore_vit") or top in sys.stdlib_module_names, f"{name}.py imports {module}"
                assert top != "galore_vit" or module.split(".")[1] in TORCH_ONLY
