"""ablate as a person meets it: a small grid, an arm without memory, a kill in the middle, the report, and mistakes."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
from memtrain_apps.ablate.arm_jobs import configure_finetune
from memtrain_apps.ablate.config import GRIDS, configure
from memtrain_apps.ablate.grid import AXES
from memtrain_apps.ablate.grid_file import read_grid
from memtrain_apps.compose.axes import refusal
from memtrain_common.errors import UserError
from PIL import Image
from support import Command, assert_refused, forked_arms, run_command

ARM = ["--", "--data", "digits", "--labels", "5", "6", "--epochs", "1", "--batch-size", "64", "--log-interval", "1"]
GRID = ["ablate", "--train", "head", "lora", "--save", "all", "backrazor", "--seeds", "2", "--devices", "cpu", "cpu"]


def ablate(words, cwd):
    return run_command(words, cwd, before=forked_arms)


def results(folder):
    return {p.stem: json.loads(p.read_text()) for p in (folder / "results").glob("*.json")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Three combinations that train and one without meaning, over two seeds."""
    cwd = tmp_path_factory.mktemp("whole")
    done = ablate([*GRID, "--out", "abl", *ARM], cwd)
    assert done.returncode == 0, done.stderr
    return cwd / "abl", done


@pytest.mark.slow
def test_every_arm_has_its_result(whole):
    folder, done = whole
    found = results(folder)
    by_status = {s: sorted(n for n, r in found.items() if r["status"] == s) for s in ("done", "refused")}
    assert len(by_status["done"]) == 6
    assert len(by_status["refused"]) == 1
    assert "save backrazor would do nothing with train head" in found[by_status["refused"][0]]["why"]
    for name in by_status["done"]:
        arm = found[name]
        for category, n_bytes in arm["measured"].items():
            assert abs(arm["predicted"][category] - n_bytes) <= 0.02 * n_bytes
        assert arm["command"].startswith("finetune --train")
        assert len([r for r in arm["curve"] if r["split"] == "train"]) == arm["steps"]
        assert name in done.stdout
    assert "± " in done.stdout


@pytest.mark.slow
def test_an_arms_command_makes_the_same_run_alone(whole, tmp_path):
    folder, _ = whole
    arm = next(r for r in results(folder).values() if r["axes"]["save"] == "backrazor" and r["status"] == "done")
    done = run_command([*arm["command"].split(), "--out", "again"], tmp_path)
    assert done.returncode == 0, done.stderr
    again = json.loads((tmp_path / "again" / "result.json").read_text())
    scores = {split: numbers["accuracy"] for split, numbers in again["scores"].items()}
    assert (scores["val"], scores["test"], again["train_loss"]) == (arm["val"], arm["test"], arm["train_loss"])


@pytest.mark.slow
def test_finished_arms_are_not_repeated_and_seeds_may_be_added(whole):
    folder, _ = whole
    before = {p: p.stat().st_mtime_ns for p in (folder / "results").glob("*.json")}
    again = ablate(["ablate", "--resume", "abl"], folder.parent)
    assert again.returncode == 0, again.stderr
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert "6 are finished already" in again.stdout


class Page(HTMLParser):
    """What a report refers to, and its figures."""

    def __init__(self, text):
        super().__init__()
        self.fetched, self.figures, self.tags = [], 0, []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.figures += tag == "svg"
        for name, value in attrs:
            if name in ("src", "href") and not (value or "").startswith(("data:", "#")):
                self.fetched.append((tag, value))


@pytest.mark.slow
def test_the_report_is_one_file_with_every_figure(whole):
    folder, _ = whole
    text = (folder / "report.html").read_text()
    page = Page(text)
    assert page.fetched == []
    assert "script" not in page.tags
    assert not re.search(r"@import|url\((?!['\"]?data:)", text)
    assert page.figures >= 4
    assert "prefers-color-scheme: dark" in text
    for arm in results(folder).values():
        assert arm["command"].replace("'", "&#39;") in text
    (folder / "report.html").unlink()
    assert ablate(["ablate", "--report", "abl"], folder.parent).returncode == 0
    assert (folder / "report.html").read_text() == text


def chromium():
    names = (os.environ.get("CHROMIUM", ""), "chromium", "chromium-browser", "google-chrome", "chrome-headless-shell")
    return next((found for name in names if name and (found := shutil.which(name))), None)


@pytest.mark.slow
@pytest.mark.skipif(chromium() is None, reason="no Chromium: put one on PATH, or name it in CHROMIUM")
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_draws_it_without_a_scroll_bar_or_a_complaint(whole, tmp_path, width):
    """A frame of the wanted width says in its title how wide the page inside is, and what is not drawn."""
    folder, _ = whole
    shutil.copy(folder / "report.html", tmp_path / "report.html")
    (tmp_path / "frame.html").write_text(
        f"""<iframe id=f src=report.html width={width} height=900></iframe><script>
        f.onload = () => {{ const d = f.contentDocument, e = d.documentElement;
          const shown = [...d.querySelectorAll('svg')].filter(s => getComputedStyle(s).display != 'none'
            && s.getBoundingClientRect().width > 0);
          const empty = shown.filter(s => s.getBoundingClientRect().height < 8).length;
          document.title = `scroll ${{e.scrollWidth - e.clientWidth}} shown ${{shown.length}} empty ${{empty}}`; }}
        </script>"""
    )
    words = [chromium(), "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"]
    words += ["--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=4000"]
    dom = subprocess.run(
        [*words, "--dump-dom", f"file://{tmp_path / 'frame.html'}"], capture_output=True, text=True, timeout=120
    )
    scroll, shown, empty = map(int, re.search(r"<title>scroll (-?\d+) shown (\d+) empty (\d+)", dom.stdout).groups())
    assert scroll <= 0
    assert shown >= 4
    assert empty == 0
    assert "CONSOLE" not in dom.stderr
    picture = tmp_path / "report.png"
    subprocess.run(
        [*words, f"--window-size={width},2400", f"--screenshot={picture}", f"file://{tmp_path / 'report.html'}"],
        capture_output=True,
        timeout=120,
        check=True,
    )
    assert picture.stat().st_size > 20_000


@pytest.mark.slow
def test_an_arm_without_memory_is_recorded_and_the_others_finish(tmp_path):
    """What a process has free before the limit is set is not counted, so the two arms must lie far apart: a ViT-S has
    weights of 82 MiB, and trained whole gradients and moments three times as large, and activations."""
    words = ["ablate", "--train", "full", "head", "--seeds", "1", "--memory-limit", "450MiB", "--devices", "cpu"]
    arm = ["--", "--data", "digits", "--labels", "5", "6", "--max-iters", "1", "--batch-size", "240"]
    arm += ["--image-size", "32", "--model", "vit-s-16"]
    done = ablate([*words, "--out", "abl", *arm], tmp_path)
    assert done.returncode == 0, done.stderr
    by_train = {r["axes"]["train"]: r for r in results(tmp_path / "abl").values()}
    assert by_train["full"]["status"] == "out of memory", by_train["full"].get("why")
    assert sum(by_train["full"]["predicted"].values()) > 450 << 20
    assert by_train["head"]["status"] == "done"
    assert "out of memory" in (tmp_path / "abl" / "report.html").read_text()


@pytest.mark.slow
def test_data_that_are_not_there_end_it_at_once_and_a_refused_arm_is_tried_again(tmp_path):
    (tmp_path / "g.toml").write_text(
        'seeds = 1\ntrain = ["full", "head"]\n'
        '[finetune]\ndata = "folder"\ndata_dir = "later"\nimage_size = 16\nmax_iters = 1\n'
    )
    words = ["ablate", "g.toml", "--devices", "cpu", "--memory-limit", "4GiB", "--out", "abl"]
    assert_refused(ablate(words, tmp_path), "later is not a folder")
    assert not (tmp_path / "abl").exists()
    for c in "ab":
        (tmp_path / "later" / c).mkdir(parents=True)
        for i in range(12):
            Image.new("RGB", (16, 16), (9 * i, 0, 0)).save(tmp_path / "later" / c / f"{i}.png")
    assert ablate(words, tmp_path).returncode == 0
    (tmp_path / "later").rename(tmp_path / "away")
    for path in (tmp_path / "abl" / "results").glob("*.json"):
        path.unlink()
    gone = ablate(["ablate", "--resume", "abl", "--devices", "cpu"], tmp_path)
    assert gone.returncode == 2
    assert {r["status"] for r in results(tmp_path / "abl").values()} == {"refused"}
    (tmp_path / "away").rename(tmp_path / "later")
    again = ablate(["ablate", "--resume", "abl", "--devices", "cpu"], tmp_path)
    assert again.returncode == 0, again.stderr
    found = results(tmp_path / "abl").values()
    assert {r["status"] for r in found} == {"done"}
    assert {r["memory_limit_bytes"] for r in found} == {4 << 30}  # the one that it was begun with
    collected = ablate(["ablate", "--collect", "abl"], tmp_path)
    assert "2 of 2 arms have a result" in collected.stdout
    for path in (tmp_path / "abl" / "results").glob("*.json"):
        path.unlink()
    assert ablate(["ablate", "--resume", "abl", "--devices", "cpu", "--memory-limit", "none"], tmp_path).returncode == 0
    assert {r["memory_limit_bytes"] for r in results(tmp_path / "abl").values()} == {0}


@pytest.mark.slow
def test_a_limit_too_small_for_the_threads_is_out_of_memory_too(tmp_path):
    words = ["ablate", "--train", "head", "--seeds", "1", "--memory-limit", "2MiB", "--devices", "cpu", "--out", "abl"]
    done = ablate([*words, "--", "--data", "digits", "--labels", "5", "6", "--epochs", "1"], tmp_path)
    assert done.returncode == 1, done.stderr
    assert "no arm has a result (head+all+adamw-seed0: out of memory" in done.stderr
    assert "with --memory-limit 2.0 MiB" in done.stderr
    (record,) = results(tmp_path / "abl").values()
    assert record["status"] == "out of memory", record["why"]
    assert sum(record["predicted"].values()) > 0
    assert "predicted peak of a step" in (tmp_path / "abl" / "report.html").read_text()


@pytest.mark.slow
def test_a_killed_ablation_goes_on_where_it_was(whole, tmp_path):
    """Of the grid two arms, one after the other: one has ended, and the other is killed with the whole."""
    folder, _ = whole
    words = ["ablate", "--train", "lora", "--save", "all", "backrazor", "--seeds", "1", "--devices", "cpu"]
    command = Command([*words, "--out", "abl", *ARM], tmp_path)
    while command.poll() is None and not list(tmp_path.glob("abl/results/*seed0.json")):
        time.sleep(0.05)
    command.send_signal(signal.SIGKILL)
    command.wait()
    first = {p: p.stat().st_mtime_ns for p in (tmp_path / "abl" / "results").glob("*.json")}
    done = ablate(["ablate", "--resume", "abl"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert {p: p.stat().st_mtime_ns for p in first} == first
    a, b = results(folder), results(tmp_path / "abl")
    assert len(b) == 2
    numbers = ("status", "val", "test", "train_loss", "measured")
    assert {n: [a[n].get(k) for k in numbers] for n in b} == {n: [r.get(k) for k in numbers] for n, r in b.items()}


MISTAKES = {
    'train = ["full", "ful"]': ("'ful'", "full"),
    'trains = ["full"]': ("'trains'", "train"),
    'train = ["lora"]\nkeep = [0.1]': ("keep", "backrazor"),
    "seeds = 0": ("seeds",),
    'train = ["full"]\n[finetune]\nepoch = 3': ("'epoch'", "epochs"),
    'train = ["full"]\n[finetune]\nrank = 3': ("rank", "list it"),
    'train = ["full"]\n[lr]\nful = 1e-3': ("'ful'",),
    "train = [": ("grid.toml",),
}


@pytest.mark.parametrize("text", MISTAKES, ids=[t.replace("\n", " ") for t in MISTAKES])
def test_mistakes_in_a_grid_are_one_sentence(text, tmp_path):
    (tmp_path / "grid.toml").write_text(text)
    with pytest.raises(UserError) as error:
        read_grid(tmp_path / "grid.toml")
    message = str(error.value)
    assert "\n" not in message
    assert "grid.toml" in message
    assert all(word in message for word in MISTAKES[text]), message


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["nowhere"], ("unknown grid 'nowhere'", "digits")),
        (["--memory-limit", "8G"], ("8GB", "8GiB")),
        (["--devices", "gpu"], ("--devices gpu",)),
        (["--resume", "nowhere"], ("nowhere",)),
        (["--report", "nowhere"], ("nowhere",)),
        (["--resume", "x", "--train", "full"], ("brings its own grid", "--train")),
        (["--seeds", "-1"], ("--seeds",)),
        (["--", "--epoch", "3"], ("epoch",)),
        (["--train", "head", "--save", "backrazor"], ("no combination of the grid has a meaning",)),
    ],
)
def test_mistakes_on_the_command_line_are_one_sentence(words, expected, tmp_path):
    assert_refused(ablate(["ablate", *words], tmp_path), *expected)


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(GRIDS.glob("*.toml")), ids=lambda p: p.stem)
def test_every_grid_that_ships_is_one(path):
    """Each combination has a rate, and words that finetune takes; only the default grid has one that is refused."""
    grid = configure([path.stem]).grid
    assert grid.products == read_grid(path).products
    for combination in grid.combinations():
        why = refusal(combination.axes)
        assert combination.lr > 0
        if why is not None:
            assert path.stem == "digits", (combination.name, why)
            continue
        parsed = configure_finetune(grid.words(combination))
        assert (parsed.train, parsed.save, parsed.optim) == tuple(getattr(combination.axes, a) for a in AXES)


def test_the_grid_without_arguments_has_ten_combinations_and_more():
    grid = configure([]).grid
    assert len(grid.combinations()) >= 10
    assert len(grid.seeds) == 3
    assert Path("digits").name == grid.finetune["data"] == grid.pretrain["data"]
