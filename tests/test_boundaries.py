"""The rules of the design that imports can break: layers, and commands that answer quickly."""

import ast
import functools
import re
import tomllib
from pathlib import Path

import pytest
from support import BIN, ROOT, run_light, run_script

SOURCES = (*ROOT.glob("packages/*/src/*"), *ROOT.glob("apps/src/*"))
MODULES = {p.name: p for p in sorted(SOURCES) if (p / "__init__.py").exists()}
COMMON = "memtrain_common"
APPS = "memtrain_apps"
METHODS = [name for name in MODULES if name not in (COMMON, APPS)]


@functools.cache
def files(root):
    return sorted(root.rglob("*.py"))


@functools.cache
def text_of(path):
    return path.read_text()


@functools.cache
def imports_of(path):
    """A file's docstring, and the import statements anywhere in it: each file is parsed once."""
    tree = ast.parse(text_of(path))
    return ast.get_docstring(tree), [n for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom)]


def imported(path, *, package_root):
    """Top-level names that a file imports, wherever in the file; relative imports are of its own package."""
    names = set()
    for node in imports_of(path)[1]:
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        else:
            names.add(node.module.split(".")[0] if node.level == 0 else package_root.name)
    return names


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


# Rooms, the uppermost first: a file imports from its own room and from those below it.
ROOMS = {
    COMMON: ("commands", "training", "runs", "models", "measuring", "data"),
    APPS: ("ablate", "plan", "run", "compose"),
}
# Beside the rooms: what every room may import, and what stands over all of them.
GROUND = {COMMON: {"errors", "files", "console", "interrupts", "optional"}, APPS: set()}
ROOF = {COMMON: {"hf"}, APPS: {"cli", "scripts"}}
BESIDE_EACH_OTHER = {("ablate", "plan"), ("plan", "ablate")}


def modules(root):
    """Dotted names of a package's modules (without the package's own) -> their files; a room's __init__ is the room."""
    names = {}
    for path in files(root):
        parts = path.relative_to(root).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


@functools.cache
def arrows(root):
    """Module -> modules of the same package that it imports anywhere in it, ``TYPE_CHECKING`` included."""
    known = modules(root)
    found = {}
    for name, path in known.items():
        here = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
        targets = set()
        for node in imports_of(path)[1]:
            if isinstance(node, ast.Import):
                words = [a.name.split(".") for a in node.names]
            else:
                words = [(node.module or "").split(".") if node.module else []]
                if node.level:
                    words = [[root.name, *[p for p in here if p][: len(here) - node.level + 1], *words[0]]]
                words = [[*words[0], alias.name] for alias in node.names]
            for word in words:
                if word[:1] == [root.name]:
                    inside = word[1:]
                    while inside and ".".join(inside) not in known:
                        inside = inside[:-1]
                    targets.add(".".join(inside))
        found[name] = targets - {name, ""}
    return found


def upward(package, found):
    """(module, imported) of each import that points upwards, or past what a room may see."""
    rooms, ground, roof = ROOMS[package], GROUND[package], ROOF[package]
    wrong = []
    for name, targets in found.items():
        room = name.split(".")[0]
        for target in targets:
            other = target.split(".")[0]
            if other in ground or room in roof or name == "":
                continue
            level = rooms.index(room) if room in rooms else len(rooms)
            if (
                other not in rooms
                or rooms.index(other) < level
                or (room, other) in BESIDE_EACH_OTHER
                or (room == "data" and name.split(".")[1] == "images" and target.split(".")[1] == "text")
                or (room == "data" and name.split(".")[1] == "text" and target.split(".")[1] == "images")
            ):
                wrong.append((name, target))
    return sorted(wrong)


def circles(found):
    """Groups of modules that import each other (strongly connected, more than one)."""
    reach = {}
    for start in found:
        seen, queue = set(), [start]
        while queue:
            for target in found.get(queue.pop(), ()):
                if target not in seen:
                    seen.add(target)
                    queue.append(target)
        reach[start] = seen
    groups = {frozenset({a, *(b for b in reach[a] if a in reach[b])}) for a in reach if a in reach[a]}
    return sorted(sorted(g) for g in groups if len(g) > 1)


@pytest.mark.parametrize("package", ROOMS)
def test_every_file_has_a_room_and_every_room_says_what_it_is_for(package):
    root = MODULES[package]
    for name, path in modules(root).items():
        first = name.split(".")[0]
        assert first in {*ROOMS[package], *GROUND[package], *ROOF[package], ""}, f"{path} stands in no room"
        if path.name == "__init__.py" and name:
            assert imports_of(path)[0], path
            assert len(text_of(path).splitlines()) == 1, (
                f"{path} holds more than the line that says what the room is for"
            )


@pytest.mark.parametrize("package", ROOMS)
def test_no_import_points_upwards(package):
    assert upward(package, arrows(MODULES[package])) == []


@pytest.mark.parametrize("package", MODULES)
def test_no_package_has_a_circle_of_imports(package):
    assert circles(arrows(MODULES[package])) == []


def test_a_file_in_the_wrong_room_and_an_arrow_upwards_are_found():
    """The checks above can fail: the loop moved to the data, a run that knows the loop, and a circle."""
    found = arrows(MODULES[COMMON])
    assert ("data.loop", "runs.run_folder") in upward(COMMON, {"data.loop": found["training.loop"]})
    assert upward(COMMON, {"runs.run_folder": {"training.loop"}}) == [("runs.run_folder", "training.loop")]
    assert upward(COMMON, {"data.text.corpus": {"data.images.sets"}})
    assert upward(APPS, {"run.training": {"plan.plan"}, "plan.plan": {"ablate.grid"}}) != []
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]


# A first use of each method, where nothing but torch can be imported of what its command needs besides.
ALONE = {
    "backrazor": ("""
import backrazor
model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.GELU(), torch.nn.Linear(64, 1))
with backrazor.Razor(keep=0.1):
    model(torch.randn(4, 64)).sum().backward()
assert all(p.grad is not None for p in model.parameters())
""", set()),
    "galore_vit": ("""
import galore_vit
model = torch.nn.ModuleDict({"blocks": torch.nn.ModuleList([torch.nn.Linear(32, 32)])})
layer = model["blocks"][0]
optimizer = galore_vit.GaLoreAdamW(galore_vit.param_groups(model, rank=4), lr=1e-2)
before = layer.weight.detach().clone()
layer(torch.randn(4, 32)).square().sum().backward()
optimizer.step()
assert not torch.equal(layer.weight, before)
""", {"numpy"}),
    "lora_xs": ("""
import lora_xs
model = torch.nn.Sequential(torch.nn.Linear(60, 30), torch.nn.Linear(30, 8))
lora_xs.inject(model, lora_xs.LoRAXSConfig(4, targets=("0",), head=("1",)), cache=False)
model(torch.randn(2, 60)).sum().backward()
""", {"safetensors"}),
    "lte": ("""
import lte
model = lte.inject(torch.nn.Sequential(torch.nn.Linear(3, 3)), lte.LTEConfig(heads=2, rank=2))
model(torch.randn(4, 3)).sum().backward()
lte.Merger(model, 1).step()
assert set(lte.merged_state_dict(model)) == {"0.weight", "0.bias"}
""", set()),
}  # fmt: skip
# What the commands need besides torch. numpy is left in: torch itself tries it.
BESIDES = {
    "memtrain_common",
    "tyro",
    "tqdm",
    "safetensors",
    "matplotlib",
    "tiktoken",
    "transformers",
    "peft",
    "sklearn",
}


@pytest.mark.parametrize("method", METHODS)
def test_the_mathematics_needs_torch_alone(method, tmp_path):
    """Everything but the command works where nothing but torch is installed (safetensors too, for adapters' files)."""
    use, allowed = ALONE[method]
    script = f"""
import sys
absent = {BESIDES - allowed!r}
for name in [n for n in sys.modules if n.split(".")[0] in absent | {{{method!r}}}]:
    del sys.modules[name]  # this process was forked from one that has them
class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in absent:
            raise ImportError(name)
sys.meta_path.insert(0, Nothing())
import torch
{use}
import {method} as module
assert all(getattr(module, name) for name in module.__all__)
assert not absent & {{n.split(".")[0] for n in sys.modules}}
"""
    done = run_script(script, tmp_path)
    assert done.returncode == 0, done.stderr


def commands():
    found = []
    for member in sorted(ROOT.glob("*/*/pyproject.toml")) + sorted(ROOT.glob("apps/pyproject.toml")):
        found += [
            (name, entry) for name, entry in tomllib.loads(member.read_text())["project"].get("scripts", {}).items()
        ]
    return found


def test_every_package_imports_without_torch():
    scripts = [f"import sys, {name}; assert 'torch' not in sys.modules, 'torch'" for name in MODULES]
    for name, (code, said) in zip(MODULES, run_light(scripts), strict=True):
        assert code == 0, (name, said)


HEAVY = {"torch", "transformers", "datasets", "matplotlib", "numpy", "peft", "timm"}


@pytest.fixture(scope="module")
def helps():
    """Every command's --help as its console script gives it, each in a process that has loaded nothing: (end, text)."""
    scripts = [
        f"""
import sys
sys.argv = [{command!r}, "--help"]
from {module} import {function}
try:
    {function}()
except SystemExit as stop:
    assert not stop.code, stop.code
loaded = {HEAVY!r} & set(sys.modules)
assert not loaded, loaded
"""
        for command, (module, function) in ((c, e.split(":")) for c, e in commands())
    ]
    return dict(zip((c for c, _ in commands()), run_light(scripts), strict=True))


@pytest.mark.parametrize("command", [c for c, _ in commands()])
def test_help_of_every_command_does_not_load_torch(command, helps):
    """A console script imports its package first, so this covers ``__init__`` as well."""
    code, said = helps[command]
    assert code == 0, said
    assert "usage: " + command in said
    assert (BIN / command).exists()


def test_nothing_is_unpickled_in_the_packages():
    for root in MODULES.values():
        for path in files(root):
            text = text_of(path)
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
        most = 300 if root.name in ROOMS else 380  # an optimizer or an operation's mathematics stays together
        for path in files(root):
            lines = len(text_of(path).splitlines())
            assert lines <= most, f"{path} has {lines} lines: split it by what is in it"
            assert imports_of(path)[0] or text_of(path) == "", f"{path} says nothing"
    assert Path(MODULES[COMMON] / "py.typed").exists()
