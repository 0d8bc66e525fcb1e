"""Each package installs alone, by plain pip, from a clean clone; and what is committed keeps the repository's rules."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest
from memtrain_common.optional import PACKAGES
from support import ROOT, pip_environment, run_command

MEMBERS = [*sorted(p.parent for p in ROOT.glob("packages/*/pyproject.toml")), ROOT / "apps"]
OURS = {tomllib.loads((m / "pyproject.toml").read_text())["project"]["name"] for m in MEMBERS}


def git(*words):
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("this is not a git checkout, so there is no clean clone to test")
    return done.stdout


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """What git tracks, as it is in the working tree, elsewhere."""
    folder = tmp_path_factory.mktemp("clone")
    for name in git("ls-files", "-co", "--exclude-standard").splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def stocked(tmp_path_factory):
    """This environment's site-packages without our own packages: as if torch and the rest were installed already."""
    folder = tmp_path_factory.mktemp("stocked")
    ours = {n.replace("-", "_") for n in OURS}
    for entry in Path(sysconfig.get_paths()["purelib"]).iterdir():
        stem = re.split(r"[-.]", entry.name.lstrip("_"))[0]
        if not any(stem == o or entry.name.startswith((f"_{o}", f"__editable__.{o}")) for o in ours):
            (folder / entry.name).symlink_to(entry)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("member", MEMBERS, ids=lambda m: m.name)
def test_plain_pip_installs_a_package_alone(member, clone, stocked, tmp_path):
    """pip resolves, builds and installs the package and the shared one; no index knows our names, so none is asked."""
    project = tomllib.loads((member / "pyproject.toml").read_text())["project"]
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    python = venv / "bin" / "python"
    (site,) = venv.glob("lib/*/site-packages")
    (site / "stocked.pth").write_text(f"{stocked}\n")
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-index"]
    done = subprocess.run(
        [*install, "--no-build-isolation", clone / member.relative_to(ROOT)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=pip_environment(),
    )
    assert done.returncode == 0, done.stderr
    installed = {p.name.split("-")[0] for p in site.glob("*.dist-info")}
    expected = OURS if member.name == "apps" else {project["name"], "memtrain-common"}
    assert installed == {n.replace("-", "_") for n in expected}
    module = project["name"].replace("-", "_")
    check = f"import {module}; assert {str(site)!r} in {module}.__file__, {module}.__file__"
    subprocess.run([python, "-c", check], check=True, cwd=tmp_path)
    for command in project.get("scripts", {}):
        shown = subprocess.run([venv / "bin" / command, "--help"], capture_output=True, text=True, cwd=tmp_path)
        assert shown.returncode == 0, shown.stderr
        assert f"usage: {command}" in shown.stdout
    assert (site / module / "py.typed").exists()
    shared = {"memtrain_common": ROOT / "packages" / "common"} | {module: member}
    for name, folder in shared.items():  # every module, also in a folder whose name the repository ignores
        source = folder / "src" / name
        missing = [p for p in source.rglob("*.py") if not (site / name / p.relative_to(source)).exists()]
        assert not missing, f"{missing[0]} is not installed"


def test_the_settings_of_this_machines_pip_do_not_reach_a_test(monkeypatch):
    """Neither a variable nor a file of configuration: pip's own list has only the empty file that is named."""
    monkeypatch.setenv("PIP_CONSTRAINT", "/a/constraint.txt")
    monkeypatch.setenv("PIP_FIND_LINKS", "/a/folder")
    words = [sys.executable, "-m", "pip", "config", "list"]
    shown = subprocess.run(words, capture_output=True, text=True, env=pip_environment(), check=True)
    assert shown.stdout.split() == [f":env:.config-file='{os.devnull}'"]


@pytest.mark.parametrize("member", MEMBERS, ids=lambda m: m.name)
def test_a_member_follows_the_design(member):
    content = tomllib.loads((member / "pyproject.toml").read_text())
    project = content["project"]
    assert content["build-system"]["build-backend"] == "hatchling.build"
    assert project["requires-python"] == ">=3.11"
    assert project["license"] == "Apache-2.0"
    assert (member / "README.md").read_text().startswith("# ")
    names = {re.split(r"[ @>=<\[]", d)[0] for d in project["dependencies"]}
    siblings = names & OURS
    apps = member.name == "apps"
    assert siblings == OURS - {project["name"]} if apps else siblings <= {"memtrain-common"}
    folders = {n: p.name for p in ROOT.glob("packages/*") for n in OURS if n.replace("-", "_") == p.name}
    for dependency in project["dependencies"]:
        name = re.split(r"[ @>=<\[]", dependency)[0]
        if name in OURS:  # a bare name could be a stranger's
            folder = "common" if name == "memtrain-common" else folders[name]
            wanted = f"{name}{'[all]' if apps else ''} @ {{root:parent:uri}}/{'packages/' if apps else ''}{folder}"
            assert dependency == wanted


def required(member):
    """Names of what a plain `pip install` of a member asks for."""
    project = tomllib.loads((member / "pyproject.toml").read_text())["project"]
    return {re.split(r"[ @>=<\[]", d)[0] for d in project["dependencies"]}


NEEDED = {  # of what is optional elsewhere: the packages' embedded default needs it
    "backrazor": {"pillow", "scikit-learn", "torchvision"},
    "galore_vit": {"pillow", "scikit-learn"},
    "lora_xs": {"scikit-learn"},
}


@pytest.mark.parametrize("member", MEMBERS[:-1], ids=lambda m: m.name)
def test_what_only_some_paths_need_comes_by_extras(member):
    project = tomllib.loads((member / "pyproject.toml").read_text())["project"]
    extras = dict(project["optional-dependencies"])
    (everything,) = extras.pop("all")
    assert everything == f"{project['name']}[{','.join(sorted(extras))}]"
    assert required(member) & set(PACKAGES.values()) == NEEDED.get(member.name, set())
    for wanted in (d for words in extras.values() for d in words):
        assert re.split(r"[>=]", wanted)[0] in PACKAGES.values(), f"{wanted} is optional, so {PACKAGES=} should say it"


LIGHT = {  # a command on its embedded default -> the package that is installed alone
    "backrazor-train --max-iters 2 --eval-interval 2 --batch-size 8": "backrazor",
    "galore-vit train --max-iters 2 --batch-size 8": "galore_vit",
    "lora-xs demo --pretrain-steps 2 --steps 2 --seeds 1 --ranks 2": "lora_xs",
    "lte-train --max-iters 2 --eval-iters 1 --batch-size 4 --block-size 16 --n-layer 1 --sample-tokens 0 "
    "--warmup-iters 1": "lte",
}


@pytest.mark.slow
@pytest.mark.parametrize("words", LIGHT)
def test_the_main_command_trains_on_its_embedded_default_without_any_extra(words, tmp_path):
    needed = NEEDED.get(LIGHT[words], set()) | ({"scipy"} if LIGHT[words] in NEEDED else set())  # scikit-learn's own
    missing = [module for module, package in PACKAGES.items() if package not in needed | {"sympy"}]  # torch has sympy

    def lightly():
        for name in [n for n in sys.modules if n.partition(".")[0] in missing]:
            del sys.modules[name]
        sys.modules.update(dict.fromkeys(missing))

    out = [] if words.startswith("lora-xs") else ["--out", "run", "--device", "cpu"]
    done = run_command([*words.split(), *out], tmp_path, before=lightly, pictures=True)
    assert done.returncode == 0, done.stderr
    if out:
        assert "without pictures, since matplotlib is not installed: pip install matplotlib" in done.stdout
        assert "without TensorBoard's events" in done.stdout
        assert (tmp_path / "run" / "result.json").exists()
        assert not list((tmp_path / "run").glob("*.png"))
    else:
        assert "without plain LoRA beside it, since peft is not installed: pip install peft" in done.stdout


def test_the_root_depends_on_every_member():
    content = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = {re.split(r"\[", d)[0]: d.endswith("[all]") for d in content["project"]["dependencies"]}
    assert extras == {name: name != "memtrain-apps" for name in OURS}  # everything, where the workspace is
    assert content["tool"]["uv"]["sources"] == {name: {"workspace": True} for name in sorted(OURS)}
    assert content["tool"]["uv"]["package"] is False
    assert "exclude-newer" in content["tool"]["uv"]


@pytest.mark.slow
def test_nothing_is_committed_that_must_not_be():
    tracked = git("ls-files").splitlines()
    assert not [n for n in tracked if Path(n).name in ("uv.lock", "poetry.lock")]
    weights = (".pt", ".pth", ".safetensors", ".npz", ".bin", ".parquet")
    fixture = [n for n in tracked if n.startswith("tests/fixtures/runs_before_rooms/")]  # runs of an earlier version
    assert sum((ROOT / n).stat().st_size for n in fixture) < 1_400_000
    assert not [n for n in tracked if (n.endswith(weights) and n not in fixture) or n.startswith("runs/")]
    too_large = [n for n in tracked if (ROOT / n).exists() and (ROOT / n).stat().st_size > 1 << 20]
    assert not too_large
    index = re.compile(r"(index-url|index|registry)\s*=[^#\n]*https?://", re.IGNORECASE)
    for name in tracked:
        path = ROOT / name
        if path.suffix in (".py", ".toml", ".md", ".json", ".yml", "") and path.is_file():
            assert not index.search(path.read_text()), f"{name} holds the address of a package index"
