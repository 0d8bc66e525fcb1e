"""ablate: grids and their mistakes, arms that fail in every way, going on after a kill, the same numbers twice."""

import dataclasses
import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import memtrain_apps.ablate as ablate_module
import pytest
import torch
from memtrain_apps.ablate import ArmsFailedError, find_places, run_ablation
from memtrain_apps.ablate_config import GRIDS, AblateConfig, configure
from memtrain_apps.arms import Job, is_out_of_memory, memory_limit, run_jobs
from memtrain_apps.axes import USED_BY, Axes, names, refusal
from memtrain_apps.grid import grid_of, read_grid
from memtrain_common.errors import DivergedError, UserError
from support import Command, assert_refused, run_command

FORK = multiprocessing.get_context("fork")  # this process has loaded torch; the forking server would load it again


# -- grids ---------------------------------------------------------------------------------------------------------


def test_a_product_has_every_combination_and_only_settings_that_are_read():
    grid = grid_of(
        {"train": ["full", "lora"], "save": ["all", "backrazor"], "rank": [4, 8], "keep": [0.05, 0.1], "seeds": 2}
    )
    expected = {
        (train, save, rank, keep)
        for train in ("full", "lora")
        for save in ("all", "backrazor")
        for rank in ((4, 8) if train == "lora" else (Axes().rank,))
        for keep in ((0.05, 0.1) if save == "backrazor" else (Axes().keep,))
    }
    found = [(c.axes.train, c.axes.save, c.axes.rank, c.axes.keep) for c in grid.combinations()]
    assert len(found) == len(set(found)) == 9
    assert set(found) == expected
    arms = grid.arms()
    assert len({a.name for a in arms}) == len(arms) == 18
    assert [a.seed for a in arms] == [0] * 9 + [1] * 9  # every combination once before any is repeated
    words = next(c for c in grid.combinations() if c.name == "lora-rank4+backrazor-keep0.05+adamw").words
    expected_words = "--train lora --save backrazor --optim adamw --rank 4 --keep 0.05"
    assert words == expected_words.split()


def test_several_products_share_what_stands_above_them_and_hold_nothing_twice():
    grid = grid_of(
        {
            "save": ["all", "checkpoint"],
            "rank": 16,
            "grid": [{"train": ["full", "lora"]}, {"train": "lora", "optim": "sgd"}, {"train": "lora", "save": "all"}],
        }
    )
    assert [c.name for c in grid.combinations()] == [
        "full+all+adamw",
        "full+checkpoint+adamw",
        "lora-rank16+all+adamw",
        "lora-rank16+checkpoint+adamw",
        "lora-rank16+all+sgd",
        "lora-rank16+checkpoint+sgd",
    ]
    assert grid.seeds == (0, 1, 2)


def test_learning_rates_of_a_train_of_a_pair_and_as_arms():
    grid = grid_of({"train": ["full", "lora"], "optim": ["sgd", "adamw"], "lr": {"full": 1e-3, "full+sgd": 0.1}})
    assert {c.name: c.lr for c in grid.combinations()} == {
        "full+all+sgd": 0.1,
        "full+all+adamw": 1e-3,
        "lora-rank8+all+sgd": 0.0,
        "lora-rank8+all+adamw": 0.0,
    }
    listed = grid_of({"train": "bitfit", "lr": [0.1, 0.01]}).combinations()
    assert [c.name for c in listed] == ["bitfit+all+adamw+lr0.1", "bitfit+all+adamw+lr0.01"]
    assert listed[1].words[-2:] == ["--lr", "0.01"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trian = 'lora'", r"unknown key 'trian' \(did you mean train\?\)"),
        ("train = 'lorra'", r"train 'lorra' is unknown \(did you mean lora\?\): choose from full, head"),
        ("train = []", "train lists nothing"),
        ("train = ['full', 'full']", "train lists 'full' twice"),
        ("train = 'lora'\nrank = 'x'", "rank must be whole numbers, got 'x'"),
        ("train = 'lora'\nrank = 2.5", "rank must be whole numbers, got 2.5"),
        ("train = 'lora'\nrank = [true]", "rank must be whole numbers, got True"),
        ("keep = 0.1", "keep would do nothing: it belongs to save backrazor"),
        ("[[grid]]\nsave = 'all'\nkeep = 0.1", r"keep in \[\[grid\]\] number 1 would do nothing"),
        ("[[grid]]\nsvae = 'all'", r"unknown key 'svae' in \[\[grid\]\] number 1 \(did you mean save\?\)"),
        ("grid = 3", r"grid must be tables, each begun by \[\[grid\]\]"),
        ("save = 'backrazor'\nrazor-mode = 'papr'", "razor_mode 'papr' is unknown: choose from default, paper"),
        ("seeds = 0", "seeds must be how many, at least 1"),
        ("seeds = [1, 1]", "seeds must be how many"),
        ("seeds = true", "seeds must be how many"),
        ("lr = 0", "lr must be above 0, got 0"),
        ("[lr]\nlorra = 1e-3", r"\[lr\] has the key 'lorra'"),
        ("[lr]\nlora = 'x'", "lr lora must be numbers"),
        ("[finetune]\nepoch = 3", r"unknown key 'epoch' in \[finetune\] \(did you mean epochs\?\)"),
        ("[finetune]\nrank = 3", r"rank in \[finetune\] is compared, not fixed"),
        ("[finetune]\nseed = 3", r"unknown key 'seed' in \[finetune\]"),
        ("[finetune.data]\nx = 3", r"data in \[finetune\] must be a value, not a table"),
        ("train = ", "is not TOML"),
    ],
)
def test_a_mistake_in_a_grid_names_the_file_and_the_key(text, message, tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(text + "\n")
    with pytest.raises(UserError, match=message) as error:
        read_grid(path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


def test_flags_list_what_a_file_lists_and_words_after_the_dashes_go_to_finetune(tmp_path):
    assert {f.name for f in dataclasses.fields(AblateConfig)} >= set(names())
    (tmp_path / "g.toml").write_text(
        "train = 'bitfit'\nseeds = 2\n[lr]\nbitfit = 0.1\n[finetune]\nlabels = [1, 2]\nepochs = 9\n[pretrain]\nepochs = 1\n"
    )
    file = str(tmp_path / "g.toml")
    plain = configure([file]).grid
    assert (len(plain.combinations()), plain.seeds, plain.pretrain) == (1, (0, 1), {"epochs": 1})
    words = "--train full lora --save all backrazor --keep 0.05 0.1 --seeds 3 --lr 0.5".split()
    grid = configure([file, *words]).grid
    assert len(grid.combinations()) == 6
    assert (grid.seeds, grid.finetune) == ((0, 1, 2), plain.finetune)
    assert all(c.lr == 0.5 for c in grid.combinations())

    shorter = configure([file, "--", "--epochs", "2", "--no-compile"]).grid
    assert shorter.finetune == {"labels": [1, 2], "epochs": ["2"], "compile": False}
    assert shorter.pretrain == plain.pretrain
    other = configure([file, "--", "--data=folder", "--data-dir", "pets"]).grid
    assert (other.finetune, other.pretrain, other.lr) == ({"data": ["folder"], "data_dir": ["pets"]}, None, {})
    with pytest.raises(UserError, match="unexpected word '3' after --"):
        configure([file, "--", "3"])
    with pytest.raises(UserError, match="rank in .finetune. is compared"):
        configure([file, "--", "--rank", "3"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["digit"], "unknown grid 'digit': name a TOML file, or one of digits"),
        (["none.toml"], "cannot read the grid none.toml: No such file"),
        (["--train", "head", "--save", "backrazor"], "no combination of the grid has a meaning: save backrazor would"),
        (["--keep", "0.5"], "keep would do nothing"),
        (["--save", "backrazor", "--keep", "1.5"], "--keep must be above 0 and at most 1, got 1.5"),
        (["--train", "lte", "--heads", "3"], "--batch-size 64 must be divisible by --heads 3"),
        (["--seeds", "-1"], "--seeds must be how many"),
        (["--devices", "gpu"], "--devices gpu is unknown"),
        (["--devices", "auto", "cpu"], "auto stands alone"),
        (["--memory-limit", "8G"], "8GiB"),
        (["--resume", "x", "--out", "y"], "give one of them"),
        (["--resume", "x", "--train", "full"], "--resume brings its own grid: leave out --train"),
        (["--resume", "x"], "x is not a run"),
        (["--report", "x"], "x holds no results of an ablation"),
        (["--", "--batch-size", "0"], "--batch-size must be at least 1, got 0"),
    ],
)
def test_bad_input_is_one_sentence_before_anything_is_made(words, message, tmp_path):
    assert_refused(run_command(["ablate", *words], tmp_path, before=fork_arms), message)
    assert not (tmp_path / "runs").exists()


def test_the_default_grid_has_ten_combinations_and_names_a_meaningless_one():
    grid = read_grid(GRIDS / "digits.toml")
    refused = [c for c in grid.combinations() if refusal(c.axes)]
    assert len(grid.combinations()) - len(refused) >= 10
    assert refused
    assert len(grid.seeds) == 3
    assert {c.axes.train for c in grid.combinations()} >= {"full", "head", "bitfit", "lora", "lora-xs", "lte"}
    trained = {c.axes.train for c in grid.combinations() if not refusal(c.axes)}
    assert trained <= set(grid.lr), "each train has its searched learning rate"
    assert set(USED_BY) <= set(names())


# -- arms ----------------------------------------------------------------------------------------------------------


def ends(job):
    """An arm that ends as its first word says."""
    how = job.words[0]
    if how == "memory":
        torch.zeros(256 << 20, dtype=torch.uint8)
    if how == "bad_alloc":
        os.write(2, b"terminate called after throwing an instance of 'std::bad_alloc'\n")
        os.kill(os.getpid(), signal.SIGABRT)
    if how == "diverge":
        raise DivergedError("training diverged: the loss was no longer finite by step 3")
    if how == "refuse":
        raise UserError("optim adamw8bit would keep nothing in 8 bits; choose optim adamw")
    if how == "bug":
        raise ValueError("a shape\nthat nobody foresaw")
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "exit":
        os._exit(7)
    began = time.monotonic()
    if how == "sleep":
        time.sleep(0.3)
    return {"device": job.device, "interval": [began, time.monotonic()]}


def run_all(folder, words, places=("cpu",), limit=0):
    found = {}
    jobs = [
        Job(f"{i}-{w}", ends, (w,), log=folder / f"{i}.txt", outcome=folder / f"{i}.json", limit_bytes=limit)
        for i, w in enumerate(words)
    ]
    run_jobs(jobs, list(places), on_end=lambda job, outcome: found.update({job.name: outcome}) or (), context=FORK)
    return found


def test_every_end_of_an_arm_has_its_name_and_the_next_one_goes_on(tmp_path):
    words = ["memory", "bad_alloc", "diverge", "refuse", "bug", "kill", "exit", "well"]
    found = run_all(tmp_path, words, limit=128 << 20)
    assert [o["status"] for o in found.values()] == [
        "out of memory", "out of memory", "diverged", "refused", "failed", "killed", "failed", "done",
    ]  # fmt: skip
    assert "no longer finite" in found["2-diverge"]["why"]
    assert found["4-bug"]["why"] == "ValueError: a shape"
    assert "Traceback" in (tmp_path / "4.txt").read_text()
    assert "SIGKILL" in found["5-kill"]["why"]
    assert "code 7" in found["6-exit"]["why"]
    without = run_all(tmp_path, ["memory"])
    assert without["0-memory"]["status"] == "done"


def test_each_place_has_one_arm_at_a_time(tmp_path):
    found = run_all(tmp_path, ["sleep"] * 5, places=["cpu", "cpu"])
    spans = sorted(tuple(o["content"]["interval"]) for o in found.values())
    for moment, _ in spans:
        assert sum(a <= moment < b for a, b in spans) <= 2
    assert any(sum(a <= moment < b for a, b in spans) == 2 for moment, _ in spans)
    assert find_places(["cuda", "cuda:1", "cpu"], arms=9) == ["cuda:0", "cuda:1", "cpu"]
    assert len(find_places(["auto"], arms=1)) == 1


def test_a_memory_limit_counts_from_what_the_process_has_and_ends_with_the_arm():
    with memory_limit(64 << 20, "cpu"):
        torch.zeros(32 << 20, dtype=torch.uint8)
        with pytest.raises(RuntimeError) as error:
            torch.zeros(128 << 20, dtype=torch.uint8)
    assert is_out_of_memory(error.value)
    torch.zeros(128 << 20, dtype=torch.uint8)
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert not is_out_of_memory(RuntimeError("shapes differ"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_memory_limit_on_cuda(tmp_path):
    with memory_limit(64 << 20, "cuda:0"), pytest.raises(torch.OutOfMemoryError) as error:
        torch.zeros(128 << 20, dtype=torch.uint8, device="cuda:0")
    torch.cuda.set_per_process_memory_fraction(1.0, 0)
    assert is_out_of_memory(error.value)


# -- whole ablations, on real arms ---------------------------------------------------------------------------------

TINY = """
seeds = 2
[[grid]]
train = ["full", "head", "lora-xs"]
save = ["all", "backrazor"]
keep = 0.1
[[grid]]
train = ["lora"]
rank = 4
optim = ["galore-adamw"]
galore_rank = 2
[lr]
full = 1e-3
[finetune]
labels = [5, 6]
epochs = 1.2
batch-size = 32
[pretrain]
labels = [0, 1]
epochs = 0.5
"""


def fork_arms():
    ablate_module.server = lambda: FORK


def go(words, cwd):
    """ablate in this process, its arms forked from it."""
    before = os.getcwd()
    os.chdir(cwd)
    try:
        return run_ablation(configure(words), words, context=FORK)
    finally:
        os.chdir(before)


def records(folder):
    return {p.stem: json.loads(p.read_text()) for p in (Path(folder) / "results").glob("*.json")}


def scores(folder):
    return {n: (r["val"], r["test"], r["train_loss"]) for n, r in records(folder).items() if r["status"] == "done"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished ablation."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "tiny.toml").write_text(TINY)
    go(["tiny.toml", "--out", "all", "--devices", "cpu", "cpu"], folder)
    return folder / "all"


def test_an_ablation_has_a_result_an_arm_and_a_report(whole):
    found = records(whole)
    done = {n for n, r in found.items() if r["status"] == "done"}
    names = ["full+all+adamw", "full+backrazor-keep0.1+adamw", "head+all+adamw", "lora-xs-rank8+all+adamw"]
    names += ["lora-xs-rank8+backrazor-keep0.1+adamw", "lora-rank4+all+galore-adamw-galore-rank2"]
    assert done == {f"{n}-seed{s}" for n in names for s in (0, 1)}
    (refused,) = (r for r in found.values() if r["status"] == "refused")
    assert refused["axes"] == {"train": "head", "save": "backrazor", "optim": "adamw"}
    assert refused["why"] == refusal(Axes("head", "backrazor"))
    record = found["full+backrazor-keep0.1+adamw-seed1"]
    assert record["command"] == (
        "finetune --train full --save backrazor --optim adamw --keep 0.1 --lr 0.001 --tracker none --no-save-model "
        "--labels 5 6 --epochs 1.2 --batch-size 32 --weights all/pretrained/model --seed 1 --device cpu --threads 1"
    )
    assert record["lr"] == 1e-3
    assert [row["split"] for row in record["curve"]].count("val") >= 2
    assert not list((whole / "runs").glob("*/checkpoints"))
    for name in done:
        assert refused["why"] in (whole / "report.html").read_text()
        assert found[name]["command"] in (whole / "report.html").read_text()


def test_ledgers_are_predicted_within_two_percent(whole):
    for name in scores(whole):
        record = records(whole)[name]
        for category, measured in record["measured"].items():
            assert record["predicted"][category] == pytest.approx(measured, rel=0.02), (name, category)


def test_the_same_seed_gives_the_same_accuracies_and_the_exact_command_too(whole, tmp_path):
    (tmp_path / "tiny.toml").write_text(TINY)
    go(["tiny.toml", "--out", "all", "--seeds", "1", "--devices", "cpu"], tmp_path)
    again = scores(tmp_path / "all")
    assert len(again) == 6
    assert again == {n: v for n, v in scores(whole).items() if n in again}
    record = records(whole)["lora-xs-rank8+all+adamw-seed1"]
    done = run_command([*record["command"].split(), "--out", str(tmp_path / "alone")], whole.parent)
    assert done.returncode == 0, done.stderr
    alone = json.loads((tmp_path / "alone" / "result.json").read_text())
    assert {k: alone[k] for k in ("val", "test", "train_loss")} == {k: record[k] for k in ("val", "test", "train_loss")}


def test_the_report_is_drawn_again_from_results(whole, tmp_path):
    before = (whole / "report.html").read_text()
    (whole / "report.html").unlink()
    go(["--report", str(whole)], tmp_path)
    assert (whole / "report.html").read_text() == before


def started(command, folder, arms=1):
    """Wait until so many arms have logged a step."""
    deadline = time.monotonic() + 60
    while len([p for p in folder.glob("runs/*/metrics.jsonl") if '"train"' in p.read_text()]) < arms:
        assert command.poll() is None, command.wait().stderr
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL], ids=["SIGTERM", "SIGKILL"])
def test_a_killed_ablation_goes_on_where_it_was(whole, tmp_path, signum):
    (tmp_path / "tiny.toml").write_text(TINY)
    words = ["ablate", "tiny.toml", "--out", "all", "--seeds", "1", "--devices", "cpu", "--", "--log-interval", "1"]
    command = Command(words, tmp_path, before=fork_arms)
    started(command, tmp_path / "all", arms=2)
    command.send_signal(signum)
    done = command.wait()
    assert done.returncode in (-signum, 128 + signum), done.stderr
    if signum == signal.SIGTERM:
        assert "go on with --resume all" in done.stderr
    finished = {p: p.read_text() for p in (tmp_path / "all" / "results").glob("*.json")}
    begun = len(list((tmp_path / "all" / "runs").glob("*/config.json")))
    assert 1 <= len(scores(tmp_path / "all")) < 6
    done = run_command(["ablate", "--resume", "all", "--devices", "cpu"], tmp_path, before=fork_arms)
    assert done.returncode == 0, done.stderr
    assert all(p.read_text() == text for p, text in finished.items()), "a finished arm was trained again"
    assert begun > len(scores(tmp_path / "all")) - 6
    expected = {n: v for n, v in scores(whole).items() if n.endswith("seed0")}
    assert {n: v[:2] for n, v in scores(tmp_path / "all").items()} == {n: v[:2] for n, v in expected.items()}


def test_arms_beyond_the_memory_limit_are_named_with_their_ledger_and_the_others_finish(whole, tmp_path):
    """A batch of 1,024 needs far more than the head alone: the limit lies between."""
    words = ["--train", "head", "full", "--seeds", "1", "--devices", "cpu", "--out", "all", "--memory-limit", "150MiB"]
    flags = ["--", "--model", "vit-mini", "--batch-size", "1024", "--epochs", "1"]
    found = go([*words, *flags], tmp_path)
    by_train = {s.axes["train"]: s for s in found}
    assert by_train["head"].runs
    out = by_train["full"].first
    assert (out["status"], out["memory_limit_bytes"]) == ("out of memory", 150 << 20)
    assert out["predicted"]["activations"] > 150 << 20
    assert out["predicted_peak_bytes"] > sum(out["predicted"].values()) / 2
    assert "out of memory" in (tmp_path / "all" / "report.html").read_text()
    # the same limit finds the same; a higher one is worth another try
    before = os.stat(tmp_path / "all" / "results" / f"{out['name']}.json").st_mtime_ns
    go(["--resume", "all", "--devices", "cpu", "--memory-limit", "150MiB"], tmp_path)
    assert os.stat(tmp_path / "all" / "results" / f"{out['name']}.json").st_mtime_ns == before


def test_a_resumed_ablation_may_get_more_seeds_and_nothing_else(whole, tmp_path, monkeypatch):
    monkeypatch.chdir(whole.parent)
    grid = configure(["--resume", "all", "--seeds", "4"]).grid
    assert grid.seeds == (0, 1, 2, 3)
    assert grid.products == configure(["tiny.toml"]).grid.products
    with pytest.raises(UserError, match="--resume may only add some"):
        configure(["--resume", "all", "--seeds", "1"])
    assert_refused(run_command(["ablate", "tiny.toml", "--out", "all"], whole.parent, before=fork_arms), "another run")


def test_an_arm_that_ends_without_a_result_is_said_and_tried_again(tmp_path, monkeypatch):
    trained = ablate_module.finetune_job

    def killed_at_first(job):
        if "head" in job.words and not (tmp_path / "once").exists():
            (tmp_path / "once").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return trained(job)

    monkeypatch.setattr(ablate_module, "finetune_job", killed_at_first)
    words = ["--train", "head", "bitfit", "--seeds", "1", "--devices", "cpu", "--out", "all"]
    flags = ["--", "--data", "digits", "--epochs", "0.2"]
    with pytest.raises(ArmsFailedError, match="1 of 2 arms ended without a result") as error:
        go([*words, *flags], tmp_path)
    assert error.value.exit_code == 1
    found = records(tmp_path / "all")
    assert found["head+all+adamw-seed0"]["status"] == "killed"
    assert found["head+all+adamw-seed0"]["predicted"]["weights"] > 0
    assert found["bitfit+all+adamw-seed0"]["status"] == "done"
    assert all(s.runs for s in go(["--resume", "all", "--devices", "cpu"], tmp_path))
