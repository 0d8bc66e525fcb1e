"""What the READMEs say is so: commands exist, the tree is the tree, figures come from committed results."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
from lte.tasks.train_config import TrainConfig
from support import ROOT, run_script

README = (ROOT / "README.md").read_text()
READMES = sorted(p for p in ROOT.glob("**/README.md") if ".venv" not in p.parts and "runs" not in p.parts)


def code_blocks(text, language):
    """The fenced blocks of one language, in order; "" is a fence without a language."""
    blocks, inside, name = [], None, ""
    for line in text.splitlines():
        if line.startswith("```"):
            if inside is None:
                inside, name = [], line[3:].strip()
            else:
                if name == language:
                    blocks.append("\n".join(inside) + "\n")
                inside = None
        elif inside is not None:
            inside.append(line)
    return blocks


def test_the_readme_gives_two_commands_and_ci_runs_the_second():
    """The first installs uv and trains; the second tests. ``.ci/run`` runs exactly the second."""
    first, second = code_blocks(README, "sh")[0].strip().splitlines()
    assert first == "pip install uv && uv run lte-train"
    ci = (ROOT / ".ci" / "run").read_text().splitlines()
    assert second in ci


def test_the_tree_in_the_readme_is_the_tree():
    (tree,) = [b for b in code_blocks(README, "") if "packages/" in b]
    stack = []
    seen, rooms = set(), set()
    for line in tree.strip().splitlines():
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        stack = [*stack[:depth], name]
        path = "".join(stack)
        if not (ROOT / path).exists():  # a room of the package whose folder stands above it
            package = next((ROOT / "".join(stack[:-1])).glob("src/*/"))
            assert (package / name).is_dir(), f"the README's tree has {path}, which is not there"
            rooms.add(package / name.rstrip("/"))
        seen.add(path.rstrip("/"))
    for member in (ROOT / "packages").iterdir():
        if (member / "pyproject.toml").exists():
            assert f"packages/{member.name}" in seen, f"the README's tree lacks packages/{member.name}"
    for package in (ROOT / "packages/common/src/memtrain_common", ROOT / "apps/src/memtrain_apps"):
        assert {p.parent for p in package.glob("*/__init__.py")} == {r for r in rooms if r.parent == package}


@pytest.mark.parametrize("readme", READMES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(readme):
    for target in re.findall(r"\]\(([^)#]+)", readme.read_text()):
        if not target.startswith(("http://", "https://")):
            assert (readme.parent / target).exists(), f"{readme} links to {target}"


@pytest.mark.parametrize("readme", READMES, ids=lambda p: str(p.relative_to(ROOT)))
def test_python_examples_run(readme, tmp_path):
    for example in code_blocks(readme.read_text(), "python"):
        done = run_script(example, tmp_path)
        assert done.returncode == 0, f"{readme}\n{example}\n{done.stderr}"


def test_committed_results_say_how_they_were_made():
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.json")):
        content = json.loads(path.read_text())
        for key in ("command", "date", "device", "versions", "seeds"):
            assert content.get(key) not in (None, ""), f"{path.name} lacks {key}"
        script = next((w for w in content["command"].split() if w.endswith(".py")), None)
        assert script is None or (ROOT / script).exists(), f"{path.name} was made by {script}, which is not there"


def figures_of_lte_defaults():
    arms = json.loads((ROOT / "benchmarks" / "results" / "lte_defaults.json").read_text())["arms"]
    return [f"{arm['loss']:.3f}" for arm in arms]


def test_the_lte_readme_has_the_figures_of_its_sweep():
    text = (ROOT / "packages" / "lte" / "README.md").read_text()
    for figure in figures_of_lte_defaults():
        assert figure in text, f"the README lacks {figure} of lte_defaults.json"


def test_the_default_run_is_below_the_bigram_entropy_and_near_full_training():
    """At most 8 % above tuned full training, within 3 minutes, and measured with the defaults as they are."""
    result = json.loads((ROOT / "benchmarks" / "results" / "lte_default_run.json").read_text())
    assert all(run["lte"] < result["bigram_entropy"] for run in result["runs"])
    assert result["mean_gap"] <= 0.08
    assert result["seconds_without_flags"] < 180
    defaults = json.loads(json.dumps(dataclasses.asdict(TrainConfig())))
    for name, value in result["config"].items():
        if name not in ("compare_full", "lr_decay_iters", "seed", "tracker"):
            assert value == defaults[name], f"{name} has changed: measure again"


def test_links_between_readmes_and_packages():
    for member in sorted(Path(ROOT / "packages").glob("*/README.md")):
        assert f"packages/{member.parent.name}" in README
