"""What the READMEs say is so: commands exist, the tree is the tree, figures come from committed results."""

import dataclasses
import json
import re
import runpy
import shutil
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
def test_python_examples_run(readme, tmp_path, encoder):
    """The blocks of a README are one program, from its top to its end."""
    shutil.copytree(encoder, tmp_path / "MiniLM")  # stands for the model that a reader has
    examples = "\n".join(code_blocks(readme.read_text(), "python"))
    done = run_script(examples, tmp_path)
    assert done.returncode == 0, f"{readme}\n{examples}\n{done.stderr}"


def test_committed_results_say_how_they_were_made():
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.json")):
        content = json.loads(path.read_text())
        for key in ("command", "date", "device", "versions", "seeds"):
            assert content.get(key) not in (None, ""), f"{path.name} lacks {key}"
        script = next((w for w in content["command"].split() if w.endswith(".py")), None)
        assert script is None or (ROOT / script).exists(), f"{path.name} was made by {script}, which is not there"


FIRST_SCREEN = README[: README.index("\n## ")]
RESULTS = ROOT / "benchmarks" / "results"


def test_the_first_screen_is_short_and_has_what_a_reader_decides_by():
    """One sentence, code, its numbers, a figure that is drawn from results, two commands, the four packages."""
    assert len(FIRST_SCREEN) <= 2000
    (code,) = code_blocks(FIRST_SCREEN, "python")
    assert "with Razor(" in code
    (picture,) = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", FIRST_SCREEN)
    assert picture == "benchmarks/results/readme_figure.png"
    assert (ROOT / picture).read_bytes().startswith(b"\x89PNG")
    assert len(code_blocks(FIRST_SCREEN, "sh")[0].strip().splitlines()) == 2
    for member in ("backrazor", "lora_xs", "galore_vit", "lte"):
        assert f"pip install packages/{member}`" in FIRST_SCREEN


def test_every_figure_of_the_first_screen_is_in_a_result():
    """Numbers in its prose are those of readme_example.json, as the README rounds them."""
    result = json.loads((RESULTS / "readme_example.json").read_text())
    found = result["results"]
    dense, razor, checkpoint = (found[k] for k in ("dense", "Razor(keep=0.1)", "checkpoint"))
    known = {f"{way['bytes'] / 1e6:.1f}" for way in (dense, razor, checkpoint)}
    known |= {f"{way['loss']:.4f}" for way in (dense, razor)}
    known |= {f"{dense['bytes'] / razor['bytes']:.1f}", str(result["rows"]), "0.1", "6", "2"}
    prose = re.sub(r"```.*?```", "", FIRST_SCREEN, flags=re.DOTALL)
    prose = re.sub(r"\]\([^)]*\)|MiniLM-L6|SST-2", "", prose)
    for number in re.findall(r"\d+(?:\.\d+)?", prose):
        assert number in known, f"{number} on the README's first screen is in no result"
    for needed in (dense, razor, checkpoint):
        assert f"{needed['bytes'] / 1e6:.1f} MB" in FIRST_SCREEN
    assert dense["loss"] == razor["loss"]


def test_the_table_of_the_ablation_is_that_of_its_result():
    """If not: python benchmarks/readme_table.py, and paste what it prints."""
    made = runpy.run_path(str(ROOT / "benchmarks" / "readme_table.py"))
    assert made["table"]() in README
    for grid in ("dinov2", "minilm"):
        assert made["of_one_seed"](grid) in (ROOT / "apps" / "README.md").read_text()


@pytest.mark.parametrize(
    ("package", "table"),
    [("backrazor", "backrazor"), ("backrazor", "under_backrazor"), ("lora_xs", "lora_xs"), ("galore_vit", "galore_vit"),
     ("lte", "lte")],
)  # fmt: skip
def test_the_tables_of_real_models_are_those_of_their_results(package, table):
    """If not: python benchmarks/real_table.py TABLE, and paste what it prints."""
    made = runpy.run_path(str(ROOT / "benchmarks" / "real_table.py"))
    assert made["table"](table) in (ROOT / "packages" / package / "README.md").read_text()


def test_every_rate_of_a_study_is_what_its_search_ends_with(monkeypatch):
    """If not: python benchmarks/real_study.py TASK:ARM goes on with the search and trains again what has another."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from real_rates import HEAD_RATE, Rates, confirmed, search
    from real_study import ADAPTED, ARMS

    def missing(*asked):
        raise AssertionError(f"{path}: {asked} was not tried")

    for path in sorted((RESULTS / "real").glob("*/*.json")):
        arm = json.loads(path.read_text())
        if "runs" in arm:
            grid = json.loads((path.parent / f"rates_{arm['way'].replace(' ', '_')}.json").read_text())
            tried = {Rates.read(key): score for key, score in grid["held_out"].items()}
            least = arm["metric"] == "nats"
            heads = ARMS[arm["arm"]].grid in ADAPTED and path.parent.name.startswith("minilm")
            best = search([], tried, missing, heads, least)
            if heads:
                further = {Rates.read(key): scores for key, scores in grid["held_out_of_further_seeds"].items()}
                best = confirmed(tried, further, missing, least)
            assert best == Rates(arm["learning_rate"], arm.get("head_learning_rate", HEAD_RATE)), path


def test_the_tables_of_smaller_models_are_those_of_their_results():
    """If not: python benchmarks/real_table.py smaller and smaller_pruned, and paste what they print."""
    made = runpy.run_path(str(ROOT / "benchmarks" / "real_table.py"))
    text = (ROOT / "packages" / "backrazor" / "README.md").read_text()
    assert made["smaller"]("low-bit") in text
    assert made["smaller"]("pruned", "_pruned") in text


def test_the_index_of_benchmarks_is_true():
    """Each result has a row, with its command as it states it."""
    text = (ROOT / "benchmarks" / "README.md").read_text()
    rows = re.findall(r"^\| .+ \| `(.+)` \| \[(.+\.json)\]\(results/.+\) \|$", text, re.MULTILINE)
    assert len(rows) >= 30
    for command, name in rows:
        assert json.loads((RESULTS / name).read_text())["command"] == command, name
    assert {name for _, name in rows} == {path.name for path in RESULTS.glob("*.json")}


def test_the_shared_packages_readme_has_the_figures_of_its_results():
    """Tries of the chaos benchmark, and what a padded batch keeps besides."""
    text = (ROOT / "packages" / "common" / "README.md").read_text()
    tried = json.loads((RESULTS / "chaos.json").read_text())
    table = text[text.index("| what happened | right is | tries | right |") :].split("\n\n")[0]
    found = [tuple(map(int, row)) for row in re.findall(r"\| (\d+) \| (\d+) \|$", table, re.MULTILINE)]
    families = ("kills", "signals", "damage", "changed", "hostile")
    assert found == [(tried[f]["tried"], tried[f]["right"]) for f in families]
    strangers, damaged = tried["hostile"], tried["damage"]
    assert f"at most {strangers['most_mib_above_idle']:.0f} MiB above the idle command" in table
    assert f"code of theirs ran {strangers['code_ran']} times" in table
    assert f"{len(strangers['kinds'])} kinds of files from strangers" in table
    assert f"one of {len(damaged['kinds'])} kinds of files that the project wrote" in table
    padded = json.loads((RESULTS / "prediction_padding.json").read_text())["models"]
    for name in ("tiny", "tiny, 96 tokens"):
        assert f"{100 * padded[name]['more']:.1f} %" in text


def test_the_lte_readme_says_how_far_curves_part():
    text = (ROOT / "packages" / "lte" / "README.md").read_text()
    for way, largest in json.loads((RESULTS / "lte_curve.json").read_text())["largest"].items():
        assert f"part by {_scientific(largest)}" in text, way


def _scientific(value):
    """1.0e-5 as READMEs write it; 0 is 0."""
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{mantissa}e{int(exponent)}" if value else "0"


def test_the_citation_has_this_software_and_five_papers():
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    found = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(found)
    assert len(found["references"]) == 5
    for paper in found["references"]:
        assert {"type", "title", "authors"} <= set(paper)
        assert all({"family-names", "given-names"} <= set(a) for a in paper["authors"])
    for file in [*ROOT.glob(".github/ISSUE_TEMPLATE/*.yml"), ROOT / ".pre-commit-config.yaml"]:
        assert yaml.safe_load(file.read_text())
    assert "://" not in (ROOT / ".pre-commit-config.yaml").read_text()  # no address: hooks run by uv


def test_the_makefile_has_five_targets_and_runs_what_contributing_says():
    text = (ROOT / "Makefile").read_text()
    assert re.findall(r"^(\w+):", text, re.MULTILINE) == ["setup", "test", "quick", "lint", "docs"]


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


@pytest.mark.parametrize("package", ["backrazor", "lora_xs", "galore_vit", "lte"])
def test_a_methods_readme_goes_from_use_to_details(package):
    """What it is, how to install and use it, with which tools, what was measured; whatever else comes after."""
    text = (ROOT / "packages" / package / "README.md").read_text()
    install, use, tools, measured, *_ = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert (install, use, measured) == ("Install", "Use", "Measured")
    assert tools.startswith("With ")
    assert f"`pip install packages/{package}`" in text[text.index("## Install") : text.index("## Use")]
    assert code_blocks(text[text.index("## Use") : text.index(f"## {tools}")], "python")


def test_links_between_readmes_and_packages():
    for member in sorted(Path(ROOT / "packages").glob("*/README.md")):
        assert f"packages/{member.parent.name}" in README
