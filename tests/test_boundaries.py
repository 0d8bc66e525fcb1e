"""The rules of the design that imports can break: layers, and commands that answer quickly."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from support import BIN, ROOT

SOURCES = (*ROOT.glob("packages/*/src/*"), *ROOT.glob("apps/src/*"))
MODULES = {p.name: p for p in sorted(SOURCES) if (p / "__init__.py").exists()}
COMMON = "memtrain_common"
APPS = "memtrain_apps"
METHODS = [name for name in MODULES if name not in (COMMON, APPS)]


def imported(path, *, package_root):
    """Top-level names that a file imports, wherever in the file; relative imports are of its own package."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0] if node.level == 0 else package_root.name)
    return names


def files(root):
    return sorted(root.rglob("*.py"))


def is_shell(path, root):
    """cli.py and tasks/ join a method to the shared package; everything else is the method's mathematics."""
    inside = path.relative_to(root)
    return inside.name == "cli.py" or inside.parts[0] == "tasks"


def test_there_is_something_to_check():
    assert COMMON in MODULES
    assert "lte" in METHODS


@pytest.mark.parametrize("method", METHODS)
def test_a_method_imports_no_other_method_and_its_mathematics_only_torch(method):
    root = MODULES[method]
    for path in files(root):
        names = imported(path, package_root=root)
        assert not names & (set(METHODS) - {method}), f"{path} imports another method"
        assert APPS not in names, f"{path} imports the apps"
        if not is_shell(path, root):
            assert COMMON not in names, f"{path} imports {COMMON}; only cli.py and tasks/ may"


def test_the_shared_package_imports_no_method():
    for path in files(MODULES[COMMON]):
        names = imported(path, package_root=MODULES[COMMON])
        assert not names & {*METHODS, APPS}, f"{path} imports a method"


def test_the_mathematics_of_lte_needs_torch_alone():
    """Everything but the command works where nothing but torch is installed."""
    script = """
import sys
class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"memtrain_common", "tyro", "tqdm", "safetensors", "matplotlib", "tiktoken"}:
            raise ImportError(name)
sys.meta_path.insert(0, Nothing())
import torch, lte
model = lte.inject(torch.nn.Sequential(torch.nn.Linear(3, 3)), lte.LTEConfig(heads=2, rank=2))
model(torch.randn(4, 3)).sum().backward()
lte.Merger(model, 1).step()
assert set(lte.merged_state_dict(model)) == {"0.weight", "0.bias"}
assert sorted(lte.__all__) == lte.__all__ and all(getattr(lte, n) for n in lte.__all__)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def commands():
    found = []
    for member in sorted(ROOT.glob("*/*/pyproject.toml")) + sorted(ROOT.glob("apps/pyproject.toml")):
        found += [
            (name, entry) for name, entry in tomllib.loads(member.read_text())["project"].get("scripts", {}).items()
        ]
    return found


def test_every_package_imports_without_torch():
    for name in MODULES:
        script = f"import sys, {name}; assert 'torch' not in sys.modules, 'torch'"
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert done.returncode == 0, (name, done.stderr)


@pytest.mark.parametrize(("command", "entry"), commands())
def test_help_of_every_command_does_not_load_torch(command, entry):
    """A console script imports its package first, so this covers ``__init__`` as well."""
    module, function = entry.split(":")
    heavy = {"torch", "transformers", "datasets", "matplotlib", "numpy", "peft", "timm"}
    script = f"""
import sys
sys.argv = [{command!r}, "--help"]
from {module} import {function}
try:
    {function}()
except SystemExit as stop:
    assert not stop.code, stop.code
loaded = {heavy!r} & set(sys.modules)
assert not loaded, loaded
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage: " + command in done.stdout
    assert (BIN / command).exists()


def test_nothing_is_unpickled_in_the_packages():
    for root in MODULES.values():
        for path in files(root):
            text = path.read_text()
            assert "weights_only=False" not in text, path
            assert not re.search(r"import pickle\b|pickle\.loads?\b|Unpickler\b", text), path
            assert set(re.findall(r"from pickle import (.*?)(?:  #.*)?$", text, re.M)) <= {
                "dumps",
                "UnpicklingError",
            }, path
            for line in text.splitlines():
                assert "torch.load(" not in line or "weights_only=True" in line, f"{path}: {line}"


def test_files_stay_readable():
    for root in MODULES.values():
        for path in files(root):
            lines = len(path.read_text().splitlines())
            assert lines <= 450, f"{path} has {lines} lines: split it by what is in it"
            assert ast.get_docstring(ast.parse(path.read_text())) or path.read_text() == "", f"{path} says nothing"
    assert Path(MODULES[COMMON] / "py.typed").exists()
