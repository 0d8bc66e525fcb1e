"""The documentation: its pages build without a warning, its links lead somewhere, and its code runs."""

import functools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from html.parser import HTMLParser
from urllib.parse import unquote, urlparse

import pytest
from support import ROOT, run_light, run_script
from test_readme import READMES, code_blocks

DOCS = sorted((ROOT / "docs").rglob("*.md"))
sys.path.insert(0, str(ROOT / "docs" / "hooks"))


def name(path):
    return str(path.relative_to(ROOT))


# -- code -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("page", [p for p in DOCS if code_blocks(p.read_text(), "python")], ids=name)
def test_python_of_a_page_runs_from_its_top_to_its_end(page, tmp_path, encoder):
    """The blocks of a page are one program; a folder named MiniLM stands for the model that a reader has."""
    shutil.copytree(encoder, tmp_path / "MiniLM")
    done = run_script("\n".join(code_blocks(page.read_text(), "python")), tmp_path)
    assert done.returncode == 0, f"{page}\n{done.stderr}"


@pytest.mark.slow
def test_the_script_of_ones_own_is_started_again(tmp_path):
    """Which the page says: the finished run is taken up, and tells the same of itself."""
    source = "\n".join(code_blocks((ROOT / "docs" / "start" / "own-loop.md").read_text(), "python"))
    first, again = run_script(source, tmp_path), run_script(source, tmp_path)
    assert (first.returncode, again.returncode) == (0, 0), again.stderr
    assert first.stdout == again.stdout
    assert "'weights': " in first.stdout


def scripts(project):
    return tomllib.loads(project.read_text())["project"].get("scripts", {})


@functools.cache
def commands():
    found = {}
    for project in [*ROOT.glob("packages/*/pyproject.toml"), ROOT / "apps" / "pyproject.toml"]:
        found |= scripts(project)
    return found


def command_lines():
    """(where, words) of every line of a shell block that calls one of our commands."""
    for page in [*DOCS, *READMES]:
        text = page.read_text()
        for block in code_blocks(text, "sh") + code_blocks(text, "bash"):
            joined = block.replace("\\\n", " ")
            for line in joined.splitlines():
                for part in re.split(r"&&|\|\||;", line.split("#")[0]):
                    words = shlex.split(part)
                    words = words[next((i for i, w in enumerate(words) if w in commands()), len(words)) :]
                    if words and not any("$" in w or w == "..." or "{" in w for w in words):
                        yield f"{name(page)}: {' '.join(words)}", words


@pytest.mark.parametrize("page", sorted((ROOT / "docs" / "start").glob("*.md")), ids=name)
def test_a_page_of_first_steps_installs_what_it_uses(page):
    """What its code imports and its commands come from stands in a pip line of the page."""
    text = page.read_text()
    installed = {
        re.sub(r"\[.*\]", "", w.strip("'\"")).split("/")[-1]
        for line in re.findall(r"pip install ([^\n`]+)", text)
        for w in line.split()
    }
    homes = {s: p.parent.name for p in ROOT.glob("packages/*/pyproject.toml") for s in scripts(p)}
    homes |= dict.fromkeys(scripts(ROOT / "apps" / "pyproject.toml"), "apps")
    used = {homes[words[0]] for where, words in command_lines() if where.startswith(f"{name(page)}:")}
    for code in code_blocks(text, "python"):
        used |= {word.split(".")[0] for word in re.findall(r"^(?:from|import) ([\w.]+)", code, re.MULTILINE)}
    ours = {p.name for p in (ROOT / "packages").iterdir()} & installed
    assert ours
    # what every package brings along, and what a package installs by itself
    assert used - installed - {"memtrain_common", "torch", "numpy", "pathlib", "collections"} == set()


_STOP_AT_WORK = """
import contextlib, importlib, io, json, os, sys
from importlib.abc import MetaPathFinder

class NoWork(MetaPathFinder):  # a command loads these when its flags are parsed and checked
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {heavy!r}:
            raise ImportError("flags were fine")

sys.meta_path.insert(0, NoWork())
os.chdir({cwd!r})
ends = []
for module, function, words in {lines!r}:
    sys.argv, said, code = words, io.StringIO(), 0
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            getattr(importlib.import_module(module), function)()
        except SystemExit as stop:
            code = stop.code
        except ImportError as error:
            code = str(error)
    ends.append([code, said.getvalue()])
sys.__stdout__.flush()
print(json.dumps(ends))
"""
HEAVY = ("torch", "numpy", "safetensors", "transformers", "datasets", "tiktoken", "huggingface_hub", "multiprocessing")
WITHOUT_FILES = re.compile(r"does not exist|is not there|no run|not a run|is no |no such", re.IGNORECASE)


@pytest.mark.slow
def test_every_command_line_has_valid_flags(tmp_path):
    """Each is parsed and checked by its command, up to the moment that it would load torch or read a file."""
    lines = dict(command_lines())
    assert len(lines) > 60
    calls = [(*commands()[words[0]].split(":"), words) for words in lines.values()]
    ((code, said),) = run_light([_STOP_AT_WORK.format(heavy=HEAVY, cwd=str(tmp_path), lines=calls)])
    assert code == 0, said
    ends = json.loads(said.splitlines()[-1])
    wrong = {
        where: end
        for where, end in zip(lines, ends, strict=True)
        if end[0] not in (0, "flags were fine") and not WITHOUT_FILES.search(end[1])
    }
    assert wrong == {}


# -- pages ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", DOCS, ids=name)
def test_links_between_written_pages_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page} links to {target}"


@pytest.mark.slow
def test_every_result_has_a_page_with_its_command_device_and_numbers():
    import measurements

    for path in sorted((ROOT / "benchmarks" / "results").glob("*.json")):
        content, text = json.loads(path.read_text()), measurements.measurement(path)
        assert content["command"].split("|")[0] in text
        assert content["device"] in text
        for shown in leaves({k: v for k, v in content.items() if k not in measurements.HEAD}):
            assert shown in text, f"{path.name}: {shown} is in no table"
        assert path.name in measurements.index([path])


def leaves(value):
    """Every number of a result as its table writes it; of a long list the first ones."""
    import measurements

    if isinstance(value, dict):
        for inner in value.values():
            yield from leaves(inner)
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        for inner in value:
            yield from leaves(inner)
    else:
        yield measurements.cell(value)


class Links(HTMLParser):
    def __init__(self):
        super().__init__()
        self.links, self.fetched, self.ids = [], [], set()

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.ids.add(given.get("id"))
        if tag == "a" and given.get("href"):
            self.links.append(given["href"])
        if tag in ("script", "img", "iframe", "source") and given.get("src"):
            self.fetched.append(given["src"])
        if tag == "link" and given.get("rel") in ("stylesheet", "icon", "preconnect"):
            self.fetched.append(given["href"])


@functools.cache
def links(path):
    parser = Links()
    parser.feed(path.read_text())
    return parser


@pytest.mark.slow
def test_the_site_builds_strictly_and_needs_no_network(tmp_path):
    """No warning; links and fragments lead somewhere; nothing is fetched from elsewhere; the search has all pages."""
    pytest.importorskip("mkdocs", reason="the group docs is not installed")
    pytest.importorskip("mkdocstrings", reason="the group docs is not installed")
    site = tmp_path / "site"
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}  # the theme's notice about another program's next version
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env=quiet)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stderr
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 60
    for page in pages:
        for source in links(page).fetched:
            assert not urlparse(source).netloc, f"{page} fetches {source}"
        if page.name == "404.html":
            continue  # its links are those of the site's root, wherever it is served
        for link in links(page).links:
            url = urlparse(link)
            if url.scheme or url.netloc:
                continue
            target = (page.parent / unquote(url.path)).resolve() if url.path else page
            target = target / "index.html" if target.is_dir() else target
            assert target.exists(), f"{page}: {link}"
            if url.fragment and target.suffix == ".html":
                assert unquote(url.fragment) in links(target).ids, f"{page}: {link}"
    found = (site / "search" / "search_index.json").read_text()
    for text in ("RazorTrainer", "GaLoreAdamW", "--galore-rank", "lte_wire", "LoRAXSConfig"):
        assert text in found


def test_the_written_pages_are_in_the_navigation():
    text = (ROOT / "mkdocs.yml").read_text()
    import pages

    for page in DOCS:
        relative = str(page.relative_to(ROOT / "docs"))
        assert relative in text or relative in pages.OPTIONAL, f"{relative} is in no menu"
    assert "font: false" in text
