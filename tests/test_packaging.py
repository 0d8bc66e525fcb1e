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
from support import ROOT, pip_environment

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
            assert dependency == f"{name} @ {{root:parent:uri}}/{'packages/' if apps else ''}{folder}"


def test_the_root_depends_on_every_member():
    content = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert set(content["project"]["dependencies"]) == OURS
    assert content["tool"]["uv"]["sources"] == {name: {"workspace": True} for name in sorted(OURS)}
    assert content["tool"]["uv"]["package"] is False
    assert "exclude-newer" in content["tool"]["uv"]


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
