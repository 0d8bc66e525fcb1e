"""The run folder, the trackers beside it, the console's numbers, and the pictures."""

import importlib.util
import json
import re
import sys
import types
import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from fresh import run_fresh
from memtrain_common.commands import session
from memtrain_common.commands.session import Session
from memtrain_common.console import Console, Progress, format_bytes, format_count, format_seconds, format_table
from memtrain_common.errors import UserError
from memtrain_common.files import check_targets, read_json, write_json
from memtrain_common.measuring.bench import pairwise, ratio_of, write_results
from memtrain_common.measuring.environment import versions
from memtrain_common.measuring.memory import Ledger
from memtrain_common.measuring.plots import largest_layers, plot_loss, plot_memory
from memtrain_common.runs import run_folder
from memtrain_common.runs.run_folder import RunFolder, default_run_path
from memtrain_common.runs.trackers import check_tracker, open_tracker
from memtrain_common.training.cpu_workarounds import avoid_broken_amx
from memtrain_common.training.distributed import World
from memtrain_common.training.loop import FitConfig, Task, fit
from support import assert_refused, run_command


def test_a_script_that_begins_in_the_same_way_each_time_goes_on_where_it_was(tmp_path):
    """As the README says it: open_or_create, and resume=True, at the first start and after a kill."""

    def start(folder, steps):
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2)
        batches = torch.randn(8, 5, 3, generator=torch.Generator().manual_seed(1))
        task = Task(
            model, lambda i: batches[i], lambda m, x: m(x).square().sum(), torch.optim.AdamW(model.parameters(), lr=0.1)
        )
        config = FitConfig(max_iters=steps)
        fit(task, config, run=RunFolder.open_or_create(folder, config), resume=True)
        return model.weight.detach()

    whole = start(tmp_path / "whole", 8)
    begun = start(tmp_path / "run", 5)
    assert not torch.equal(begun, whole)
    assert torch.equal(start(tmp_path / "run", 8), whole)
    content = RunFolder.open(tmp_path / "run").read_config()
    assert (content["config"]["max_iters"], len(content["resumed"])) == (8, 1)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("kept")
    with pytest.raises(UserError, match="is not empty"):
        RunFolder.open_or_create(tmp_path / "other", FitConfig(max_iters=1))
    assert [p.name for p in (tmp_path / "other").iterdir() if p.name != ".lock"] == ["mine.txt"]


def test_config_json_repeats_the_run(tmp_path):
    run = RunFolder.create(tmp_path / "a" / "b")
    run.write_config(FitConfig(max_iters=3), prog="prog", argv=["--name", "two words"], device="cpu")
    content = read_json(run.path / "config.json")
    assert content["command"] == "prog --name 'two words'"
    assert content["config"]["max_iters"] == 3
    assert content["versions"]["torch"] == versions()["torch"] == torch.__version__.split("+")[0]
    assert set(content) == {"command", "config", "date", "versions", "git_commit", "device"}
    assert RunFolder.open(run.path).read_config() == content


def test_folders_that_cannot_be_used_are_refused(tmp_path):
    run = RunFolder.create(tmp_path / "run")
    run.write_config(FitConfig(max_iters=3), prog="prog", argv=[])
    before = (run.path / "config.json").read_bytes()
    with pytest.raises(UserError, match="holds another run: choose a new --out, or resume it with --resume"):
        RunFolder.create(run.path)
    assert (run.path / "config.json").read_bytes() == before
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="is not empty"):
        RunFolder.create(tmp_path / "full")
    with pytest.raises(UserError, match="is a file"):
        RunFolder.create(tmp_path / "full" / "thesis.tex")
    with pytest.raises(UserError, match="cannot write in the folder"):
        RunFolder.create(tmp_path / "full" / "thesis.tex" / "run")
    with pytest.raises(UserError, match=r"is not a run: a run is a folder with a config\.json"):
        RunFolder.open(tmp_path / "full")
    (run.path / "config.json").write_text('{"config": 3}')
    with pytest.raises(UserError, match=r"config\.json is not the JSON object that the run wrote"):
        run.read_config()


def test_metrics_truncate_to_a_checkpoint_and_a_torn_line_is_left_out(tmp_path):
    run = RunFolder.create(tmp_path / "r")
    run.append_metrics([{"step": 1}, {"step": 2}])
    mark = run.metrics_mark()
    run.append_metrics([{"step": 3}])
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    assert [r["step"] for r in run.metrics()] == [1, 2, 3]
    size, sha256 = mark["metrics_bytes"], mark["metrics_sha256"]
    assert run.take_back_metrics(size, sha256)
    run.append_metrics([{"step": 9}])
    assert [r["step"] for r in run.metrics()] == [1, 2, 9]
    path = run.path / "metrics.jsonl"
    whole = path.read_bytes()
    for bad in (whole[: size - 1], whole.replace(b"2", b"3", 1)):
        path.write_bytes(bad)
        with pytest.raises(UserError, match=r"metrics\.jsonl does not have the rows that the run had logged"):
            run.take_back_metrics(size, sha256)
        assert path.read_bytes() == bad
    path.unlink()
    assert not run.take_back_metrics(size, sha256)
    assert run.take_back_metrics(0)


def test_a_sealed_object_tells_damage_and_edits(tmp_path):
    path = tmp_path / "a.json"
    content = {"b": [1.5, None, {"c": "d"}], "a": float("nan"), "3": True}
    write_json(path, content)
    assert repr(read_json(path)) == repr(content)
    text = path.read_text()
    for damaged in (text.replace("1.5", "1.7"), text.replace('"seal"', '"sdal"'), text.replace("sha256_", "sha257_"),
                    text.replace('"c": "d"', '"c": "e"'), text.replace("line and the", "line end the")):  # fmt: skip
        assert damaged != text
        path.write_text(damaged)
        with pytest.raises(ValueError, match="take out its lines seal and sha256_of_the_rest if an edit is meant"):
            read_json(path)
    path.write_text(json.dumps({"b": 2}))  # as an older version wrote it, or somebody else
    assert read_json(path) == {"b": 2}


def test_a_folder_in_use_is_refused_to_another_process(tmp_path):
    run = RunFolder.create(tmp_path / "r")
    run.write_config(FitConfig(max_iters=3), prog="prog", argv=[])
    script = f"""
import sys
from pathlib import Path
from memtrain_common.errors import UserError
from memtrain_common.runs.run_folder import RunFolder
for take in (RunFolder.create, RunFolder.open):
    try:
        take(Path({str(run.path)!r}))
    except UserError as error:
        print(error)
"""
    done = run_fresh(script)
    assert done.stdout.count("is in use by another process") == 2, done.stderr
    RunFolder.open(run.path)  # this process may


def test_what_a_kill_leaves_does_not_block_the_name(tmp_path):
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "config.json.partial").write_text("{")
    RunFolder.create(tmp_path / "r")


def test_numbers_that_json_lacks_are_null(tmp_path):
    run = RunFolder.create(tmp_path / "r")
    run.append_metrics([{"step": 1, "loss": float("nan"), "grad_norm": float("inf")}])
    assert run.metrics() == [{"step": 1, "loss": None, "grad_norm": None}]


def test_resumes_are_added_to_the_config(tmp_path):
    run = RunFolder.create(tmp_path / "r")
    run.write_config(FitConfig(max_iters=3), prog="prog", argv=["first"], device="cpu")
    run.add_resume(FitConfig(max_iters=4), prog="prog", argv=["--resume", "r"])
    content = run.read_config()
    assert content["command"] == "prog first"
    assert content["device"] == "cpu"
    assert content["config"]["max_iters"] == 4
    assert [r["command"] for r in content["resumed"]] == ["prog --resume r"]


def test_other_processes_write_nothing(tmp_path):
    run = RunFolder.create(tmp_path / "r", writes=False)
    run.append_metrics([{"step": 1}])
    run.write_config(FitConfig(max_iters=3), prog="prog", argv=[])
    assert not run.path.exists()


def test_default_names_do_not_collide(tmp_path):
    first = default_run_path("prog", str(tmp_path))
    first.mkdir()
    assert default_run_path("prog", str(tmp_path)) != first


def test_tensorboard_gets_every_number(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracker = open_tracker("tensorboard", tmp_path, {})
    for step in (1, 2):
        tracker.log({"step": step, "split": "train", "loss": 0.5 * step, "note": "text"})
    tracker.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["train/loss"]
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 0.5), (2, 1.0)]


@pytest.fixture
def calls(monkeypatch):
    """What stand-ins for wandb and trackio were called with."""
    found = []
    fake = types.SimpleNamespace(
        init=lambda **given: found.append(given),
        log=lambda row, step: found.append((step, row)),
        finish=lambda: found.append("finish"),
    )
    for library in ("wandb", "trackio"):
        monkeypatch.setitem(sys.modules, library, fake)
    return found


@pytest.mark.parametrize("library", ["wandb", "trackio"])
def test_online_trackers_are_imported_only_when_named(tmp_path, calls, library):
    (tmp_path / "my-run").mkdir()
    tracker = open_tracker(library, tmp_path / "my-run", {"a": 1})
    tracker.log({"step": 3, "split": "val", "loss": 1.0})
    tracker.close()
    assert (calls[0]["name"], calls[0]["config"]) == ("my-run", {"a": 1})
    assert calls[1:] == [(3, {"val/loss": 1.0}), "finish"]


def test_a_resumed_run_is_the_same_one_of_the_online_trackers(tmp_path, calls):
    """W&B knows it by an id, trackio by its name; a new run is another one in both."""
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
    open_tracker("wandb", one, {})
    open_tracker("wandb", one, {}, resume_step=7)
    open_tracker("wandb", two, {})
    ids = [given["id"] for given in calls]
    assert ids[0] == ids[1] != ids[2]
    assert {given["resume"] for given in calls} == {"allow"}
    calls.clear()
    open_tracker("trackio", one, {}, resume_step=7)  # it begins there, where another run may have this name
    open_tracker("trackio", one, {}, resume_step=9, name="other")
    open_tracker("wandb", one, {}, resume_step=9)
    assert [(given["name"], given["resume"]) for given in calls[:2]] == [("one", "never"), ("one", "allow")]
    assert calls[2]["id"] == ids[0]
    (one / "tracker.json").write_text('{"wandb": 1}')
    with pytest.raises(UserError, match=r"tracker\.json is damaged"):
        open_tracker("wandb", one, {}, resume_step=9)


@pytest.mark.parametrize("library", ["wandb", "trackio", "tensorboard"])
def test_a_tracker_that_does_not_open_is_refused_in_one_sentence(tmp_path, monkeypatch, library):
    def refuse(*_, **__):
        raise RuntimeError("No API key configured.\nUse the Force.")

    monkeypatch.setitem(sys.modules, library, types.SimpleNamespace(init=refuse))
    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter", refuse)
    said = rf"^--tracker {library} does not open \(No API key configured\): mend that, or use another tracker$"
    with pytest.raises(UserError, match=said):
        open_tracker(library, tmp_path, {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("console", [True, False])
@pytest.mark.parametrize("fails", ["log", "finish"])
def test_a_tracker_that_fails_ends_no_training_and_is_said_once(tmp_path, calls, capsys, monkeypatch, fails, console):
    def fail(*_, **__):
        calls.append("failed")
        raise ConnectionError("no route")

    monkeypatch.setattr(sys.modules["wandb"], fails, fail)
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    task = Task(model, lambda i: torch.ones(2, 3), lambda m, x: m(x).square().mean(), torch.optim.SGD([model.weight]))
    run, config = RunFolder.create(tmp_path / "r"), FitConfig(max_iters=3, log_interval=1, tracker="wandb")
    with nullcontext() if console else pytest.warns(RuntimeWarning, match="--tracker wandb failed") as told:
        fit(task, config, run=run, console=Console() if console else None)
    assert [row["step"] for row in run.metrics()] == [1, 2, 3]
    assert run.checkpoints.steps() == [3]
    assert calls.count("failed") == 1
    assert ("finish" in calls) == (fails == "log")  # it is closed, too
    said = capsys.readouterr().out if console else str(told[0].message)
    assert said.count("--tracker wandb failed (no route): the run goes on without it") == 1


@pytest.mark.parametrize("library", ["wandb", "trackio"])
def test_a_tracker_that_is_not_installed_is_refused_before_a_run_is_made(monkeypatch, library):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=f"--tracker {library} needs the package {library}"):
        check_tracker(library)


def test_lines_go_to_the_terminal_and_the_log(tmp_path, capsys):
    console = Console(tmp_path / "log.txt")
    console.say("one")
    console.say("two")
    quiet = Console(quiet=True)
    quiet.say("nothing")
    assert capsys.readouterr().out == "one\ntwo\n"
    assert (tmp_path / "log.txt").read_text() == "one\ntwo\n"
    assert quiet.progress(3).disable


def test_numbers_with_units():
    assert [format_bytes(n) for n in (0, 1023, 1024, 1536, 5 << 30, 3 << 40)] == [
        "0 B", "1023 B", "1.0 KiB", "1.5 KiB", "5.0 GiB", "3.0 TiB",
    ]  # fmt: skip
    assert [format_count(n) for n in (7, 999, 1000, 813568, 2.5e9)] == ["7", "999", "1k", "814k", "2.5G"]
    assert [format_seconds(n) for n in (0.25, 61, 7260)] == ["0.2 s", "1 min 1 s", "2 h 1 min"]
    assert format_table([("a", "1"), ("bcd", "22", "x")]) == "  a     1\n  bcd  22  x"


@pytest.mark.slow
def test_pictures_are_drawn(tmp_path):
    rows = [{"step": s, "split": split, "loss": 5.0 / (s + 1)} for s in range(20) for split in ("train", "val")]
    plot_loss({"a": rows, "b": rows[:10]}, tmp_path / "loss.png", ylabel="loss", levels={"entropy": 2.0})
    layers = {f"h.{i}": 1000 * i for i in range(20)}
    plot_memory(Ledger({**Ledger().bytes_by_layer, "weights": layers}), tmp_path / "memory.png")
    plot_memory(Ledger(), tmp_path / "empty.png")
    assert largest_layers(layers | {"head": 190_000}) == "h.* (20×) 50%, head 50%"
    assert largest_layers({}) == ""
    long = {f"base_model.model.vit.layers.{i}.attention.{q}.lora_A.default": 9 for i in range(3) for q in "qk"}
    short = "….attention.q.lora_A.default (3×) 50%, ….attention.k.lora_A.default (3×) 50%"
    assert largest_layers(long) == short
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a long line must leave the bars their room
        plot_memory(Ledger({c: long for c in Ledger().bytes_by_layer}), tmp_path / "long.png")
    for name in ("loss", "memory", "empty"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_pairwise_ratios_and_results_that_name_their_making(tmp_path):
    now, last = 0.0, 0.0

    def taking(seconds, more_after_another=0.0):
        def call():
            nonlocal now, last
            now += seconds + (more_after_another if last != seconds else 0.0)
            last = seconds

        return call

    ratio = pairwise(taking(6.0), taking(2.0), pairs=5, clock=lambda: now)
    assert (ratio.low, ratio.median, ratio.high, ratio.pairs) == (3.0, 3.0, 3.0, 5)
    assert pairwise(taking(6.0, 4.0), taking(2.0), pairs=5, clock=lambda: now).high > 3
    settled = pairwise(taking(6.0, 4.0), taking(2.0), pairs=5, settle=True, clock=lambda: now)
    assert (settled.least, settled.greatest) == (3.0, 3.0)
    assert str(ratio_of([1.0, 2.0, 3.0])) == "2.000 (quartiles 1.000 to 3.000, 3 pairs)"
    path = tmp_path / "results" / "x.json"
    write_results(path, argv=["python", "b.py"], device=torch.device("cpu"), seeds=[1], ratio=2.0)
    content = json.loads(path.read_text())
    assert set(content) == {"command", "date", "device", "versions", "git_commit", "seeds", "ratio"}


@pytest.mark.parametrize(
    ("flags", "dies", "expected"), [("avx2", True, False), ("amx_bf16", False, False), ("amx_bf16", True, True)]
)
def test_amx_is_avoided_only_where_it_is_announced_and_dies(monkeypatch, tmp_path, flags, dies, expected):
    from memtrain_common.training import cpu_workarounds as processor

    (tmp_path / "cpuinfo").write_text(f"flags : fpu {flags}\n")
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA")
    monkeypatch.setattr(processor, "Path", lambda _: tmp_path / "cpuinfo")
    monkeypatch.setattr(processor, "_TRIAL", "import os; os.kill(os.getpid(), 4)" if dies else "pass")
    said = []
    assert avoid_broken_amx(said.append) is expected
    assert bool(said) is expected


def test_without_a_terminal_progress_is_told_every_ten_seconds_or_two_percent():
    now, lines = 0.0, []
    bar = Progress(total=1000, initial=100, desc="", disable=True, lines=lines.append, clock=lambda: now)
    bar.set_postfix_str("loss 1.5000", refresh=False)
    for seconds, done in ((0.5, 50), (0.6, 0), (8.0, 1), (2.5, 1)):  # soon: none; 2 % in a second; less; 10 s later
        now += seconds
        bar.update(done)
    bar.close()
    assert lines == [
        "step 150/1000 (15%), loss 1.5000, 18.7 s left",
        "step 152/1000 (15%), loss 1.5000, 3 min 9 s left",
    ]
    Progress(total=10, disable=True, lines=None).update(10)


# -- a run on other data


@dataclass(frozen=True)
class Flags:
    out: str
    resume: str = ""
    data_changed: str = "refuse"


def test_no_flag_goes_on_with_data_of_another_meaning(tmp_path):
    """Of other pictures a run may go on with --data-changed ok; of other classes a head knows nothing."""
    data = {"name": "pets", "sha256": "1", "parts": {"cat": "1", "dog": "2"}, "classes": ["cat", "dog"]}
    out = tmp_path / "run"
    Session(Flags(str(out)), [], "prog", World(), torch.device("cpu")).open(data)
    for other, allowed in (
        ({"parts": {"cat": "1", "dog": "3"}}, True),
        ({"sha256": "2", "classes": ["cat", "fox"]}, False),
    ):
        for changed in ("refuse", "ok"):
            again = Session(Flags("", resume=str(out), data_changed=changed), [], "prog", World(), torch.device("cpu"))
            if allowed and changed == "ok":
                again.open({**data, **other})
                continue
            with pytest.raises(UserError, match="was trained on other data: ") as error:
                again.open({**data, **other})
            assert ("--data-changed ok" in str(error.value)) == allowed
            assert ("not dog but fox" in str(error.value)) != allowed


# -- one process of several writes


@pytest.mark.parametrize("rank", [0, 1])
def test_only_the_first_process_of_a_session_writes(tmp_path, monkeypatch, rank):
    """A new run, one that is resumed, and a training beside it: the others' folders write nothing and take no lock."""
    monkeypatch.setattr(session, "gather_objects", lambda own: [own, own])
    place, cpu, out = World(rank, 2, rank, 2), torch.device("cpu"), tmp_path / "run"
    locked = []
    monkeypatch.setattr(run_folder, "lock_folder", locked.append)
    first = Session(Flags(str(out)), [], "prog", World(), cpu)
    first.open({"sha256": "of nothing"})
    first.beside("full", Flags(""))
    locked.clear()
    resumed = Session(Flags("", resume=str(out)), [], "prog", place, cpu)
    resumed.open({"sha256": "of nothing"})
    again = resumed.beside("full", Flags("", resume=str(out)))
    new = Session(Flags(str(tmp_path / "new")), [], "prog", place, cpu)
    new.open({"sha256": "of nothing"})
    assert [s.folder.writes for s in (resumed, again, new)] == [rank == 0] * 3
    assert [s.folder.checkpoints.writes for s in (resumed, again, new)] == [rank == 0] * 3
    assert len(locked) == (3 if rank == 0 else 0)
    assert (tmp_path / "new").exists() == (rank == 0)


def test_files_that_cannot_be_written_are_refused_before_the_work(tmp_path, monkeypatch):
    """Nothing is made by the look; a folder that a command makes itself may be missing."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "here").mkdir()
    (tmp_path / "link").symlink_to("here")
    before = sorted(tmp_path.rglob("*"))
    for targets, wrong in (
        ({"--out": "."}, "--out . is a folder"),
        ({"--out": "link"}, "--out link is a folder"),
        ({"--out": "new/"}, "--out new/ is a folder"),
        ({"--out": "no/x"}, f"--out no/x has no folder to be in: make {tmp_path}/no first"),
        ({"--out": "file/x"}, f"--out file/x lies in {tmp_path}/file, which is a file"),
        ({"--out": "/dev/null"}, "--out /dev/null is no plain file"),
        ({"--out": "here/x", "--json": "link/x"}, "--out and --json name the same file, link/x"),
        ({"--out": "file", "--json": str(tmp_path / "file")}, "--out and --json name the same file"),
    ):
        with pytest.raises(UserError, match=re.escape(wrong)):
            check_targets(targets)
    check_targets({"--out": "x", "--json": "", "--more": "", "--png": "here/x", "--old": "file"})
    check_targets({"--out": "no/deep/x"}, makes_folders=True)
    with pytest.raises(UserError, match="file/deep/x lies in"):
        check_targets({"--out": "file/deep/x"}, makes_folders=True)
    monkeypatch.setattr("os.access", lambda path, mode: Path(path).name != "here")  # root may write everywhere
    with pytest.raises(UserError, match="--out here/x cannot be written, as "):
        check_targets({"--out": "here/x"})
    monkeypatch.setattr("os.access", lambda path, mode: Path(path).name != "file")
    with pytest.raises(UserError, match="--out file may not be written over"):
        check_targets({"--out": "file"})
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "words",
    [
        ["plan", "--model", "bert-base-uncased", "--budget", "8GiB", "--png", "no/x.png"],
        ["lora-xs", "demo", "--out", "file/x.json"],
        ["lora-xs", "eval", "--model", "m", "--data", "gsm8k", "--out", "file/x.jsonl"],
        ["lora-xs", "eval", "--model", "m", "--data", "gsm8k", "--out", "folder"],
        ["lte-bench", "--profile", "folder"],
        ["lte-export", "run", "--out", "file/ckpt.pt"],
        ["galore-vit", "eval", "--run", "run", "--out", "file/scores"],
        ["lora-xs", "merge", "--adapter", "nothing", "--out", "file/merged"],
        ["backrazor-memory", "vit-mini", "--json", "folder"],
    ],
    ids=" ".join,
)
def test_every_command_refuses_a_file_that_it_could_not_write(words, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    assert_refused(run_command(words, tmp_path), f"{words[-2]} {words[-1]} ")
    assert (tmp_path / "file").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "folder"]
