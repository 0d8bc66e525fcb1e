"""Arms as jobs: submitted, watched, submitted again and collected; by submitit here and by Ray, with kills."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from memtrain_apps.ablate import cluster
from memtrain_apps.ablate.ablate import collect, find_places, name_of, run_ablation
from memtrain_apps.ablate.cluster import RETRIES, _watch
from memtrain_apps.ablate.config import AblateConfig, Ablation, configure, saved_request
from memtrain_apps.ablate.grid_file import grid_of
from memtrain_apps.ablate.launchers import ArmCall, Needs, Ray, Submitit, launcher_of
from memtrain_apps.ablate.runner import Runner
from memtrain_common.console import Console
from memtrain_common.errors import UserError
from memtrain_common.files import write_json
from support import Command, forked_arms, run_command

ARM = ["--", "--data", "digits", "--labels", "5", "6", "--epochs", "1", "--batch-size", "64", "--log-interval", "1"]
GRID = ["ablate", "--train", "head", "--save", "all", "--seeds", "2", "--devices", "cpu"]


def begun(folder, *words):
    """An ablation's folder with a grid and nothing else, and its runner."""
    request = configure([*(words or ["--train", "full", "head", "--save", "all", "backrazor", "--seeds", "2"]), *ARM])
    folder.mkdir(exist_ok=True)
    write_json(folder / "config.json", {"config": asdict(request.grid)})
    runner = Runner(saved_request(folder), folder, Console(quiet=True), ["cpu"], None)
    runner.prepare()
    return runner


def record_of(runner, name, status="done"):
    arm = runner.arms[name]
    ledger = dict.fromkeys(("weights", "gradients", "optimizer", "activations", "buffers"), 1)
    content = {
        "metric": "accuracy", "val": 0.5, "test": 0.5, "measured": ledger, "predicted": ledger, "seconds": 1.0,
        "trained_parameters": 1, "samples_per_second": 1.0,
    }  # fmt: skip
    outcome = {"status": status, "why": None, "content": content if status == "done" else None}
    write_json(runner.result(arm), runner.record(arm, replace(runner.job(arm), device="cpu"), outcome))


class Scripted:
    """A launcher whose jobs end at once, as a script says: with a result, or without."""

    def __init__(self, runner, ends):
        self.runner, self.ends, self.submitted, self.most, self.now = runner, ends, [], 0, 0

    def submit(self, name, needs):
        self.submitted.append(name)
        self.now += 1
        self.most = max(self.most, self.now)
        status = self.ends[name].pop(0)
        if status:
            record_of(self.runner, name, status)
        return name

    def ended(self, handle):
        self.now -= 1
        return True


def test_what_ends_without_a_result_is_submitted_again(tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "PAUSE", 0)
    runner = begun(tmp_path / "a")
    lucky, again, unlucky, *rest = names = list(runner.arms)
    ends = {lucky: ["done"], again: [None, None, "done"], unlucky: [None] * RETRIES}
    ends |= {n: ["refused"] for n in rest}
    launcher = Scripted(runner, ends)
    _watch(runner, launcher, dict.fromkeys(names, Needs(1, 0, 1, 1)), most=2)
    assert launcher.submitted.count(again) == 3
    assert launcher.submitted.count(unlucky) == RETRIES
    assert launcher.most == 2
    found = {p.stem: json.loads(p.read_text())["status"] for p in runner.folder.glob("results/*.json")}
    assert (found[lucky], found[again], found[unlucky]) == ("done", "done", "killed")
    assert runner.left() == [runner.arms[unlucky]]  # --resume tries it again


def test_an_arm_that_no_machine_holds_leaves_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "PAUSE", 0)
    runner = begun(tmp_path / "a")
    large, *others = names = list(runner.arms)

    class Small(Scripted):
        def submit(self, name, needs):
            if name == large:
                raise UserError("no machine of the cluster has as much")
            return super().submit(name, needs)

    _watch(runner, Small(runner, {n: ["done"] for n in others}), dict.fromkeys(names, Needs(1, 0, 1, 1)), most=2)
    found = {p.stem: json.loads(p.read_text()) for p in runner.folder.glob("results/*.json")}
    assert {found[n]["status"] for n in others} == {"done"}
    assert (found[large]["status"], found[large]["why"]) == ("killed", "no machine of the cluster has as much")
    assert runner.left() == [runner.arms[large]]  # --resume tries it again


def test_collecting_reports_what_is_there(tmp_path, capsys):
    runner = begun(tmp_path / "a")
    first, *_ = runner.arms
    record_of(runner, first)
    found = collect(tmp_path / "a", Console())
    assert sum(len(s.runs) for s in found) == 1
    said = capsys.readouterr().out
    assert f"1 of {len(runner.arms)} arms have a result; 0 of the others have begun" in said
    assert "refused" in (tmp_path / "a" / "report.html").read_text()


def test_collecting_before_the_first_result_says_so(tmp_path, capsys):
    runner = begun(tmp_path / "a")
    assert collect(tmp_path / "a", Console()) == []
    assert f"0 of {len(runner.arms)} arms have a result" in capsys.readouterr().out
    assert not (tmp_path / "a" / "report.html").exists()


def test_collecting_removes_and_makes_nothing(tmp_path, capsys):
    """A result that was edited stays as it is and is named; a folder without results stays without."""
    runner = begun(tmp_path / "a")
    first, second, *_ = runner.arms
    for name in (first, second):
        record_of(runner, name)
    path = runner.result(runner.arms[first])
    path.write_text(path.read_text().replace('"seed": ', '"seed": 1'))
    before = path.read_bytes()
    with pytest.raises(UserError, match=re.escape(f"{first}.json is not an arm's result")):
        collect(tmp_path / "a", Console())
    assert path.read_bytes() == before
    assert f"1 of {len(runner.arms)} arms have a result" in capsys.readouterr().out
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "config.json").rename(tmp_path / "b" / "config.json")
    assert collect(tmp_path / "b", Console()) == []
    assert [p.name for p in (tmp_path / "b").iterdir()] == ["config.json"]


def test_a_damaged_result_runs_again_and_it_is_said(tmp_path, capsys):
    runner = begun(tmp_path / "a")
    first = next(iter(runner.arms))
    record_of(runner, first)
    path = runner.result(runner.arms[first])
    path.write_text(path.read_text()[:-20])
    assert runner.arms[first] in runner.left()
    assert path.exists()
    again = Runner(runner.request, runner.folder, Console(), ["cpu"], None)
    again.prepare()
    assert f"{first} runs again: " in capsys.readouterr().out
    assert not path.exists()


def test_memory_is_asked_by_the_arms_own_prediction(tmp_path, monkeypatch):
    """Once for all seeds; on a GPU the host's part is the weights'."""
    runner = begun(tmp_path / "a")
    asked = []

    def predicted(job):
        asked.append(job.name)
        return {"predicted": {"weights": 10**9}, "predicted_peak_bytes": 7 * 10**9 + 1000 * len(asked)}

    monkeypatch.setattr(cluster, "predict_job", predicted)
    monkeypatch.setattr(cluster, "_peaks", {})
    base = Needs(cluster.LIBRARIES, 0, 5, 1)
    arms = runner.left()
    needs = [cluster._needs(runner, replace(runner.job(a), device="cpu"), base) for a in arms]
    assert len(asked) == len({a.combination.name for a in arms}) == len(arms) // 2
    assert len({n.memory_bytes for n in needs}) == len(asked)
    assert needs[0].memory_bytes == int(cluster.SPARE * (7 * 10**9 + 1000)) + cluster.LIBRARIES
    monkeypatch.setattr(cluster, "_peaks", {})
    on_gpu = cluster._needs(runner, replace(runner.job(arms[0]), device="cuda:0"), replace(base, gpus=1))
    assert on_gpu.memory_bytes == int(cluster.SPARE * 2 * 10**9) + cluster.LIBRARIES


def test_slurm_is_asked_for_what_an_arm_needs(tmp_path, monkeypatch):
    """What sbatch reads, of submitit's own making; the commands of Slurm are two lines of shell."""
    pytest.importorskip("submitit")
    for name, body in (("sbatch", 'cp "$1" "$ASKED"; echo "Submitted batch job 7"'), ("srun", ""), ("sacct", "")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("ASKED", str(tmp_path / "asked"))
    launcher = Submitit("slurm", tmp_path / "abl", {"partition": "gpu", "account": "me"})
    job = launcher.submit("an-arm", Needs(11 * 2**30 + 1, 1, 90, 150))
    assert job.job_id == "7"
    asked = (tmp_path / "asked").read_text()
    words = (
        "mem=12GB",
        "gpus-per-node=1",
        "time=90",
        "partition=gpu",
        "account=me",
        "signal=USR2@150",
        "job-name=an-arm",
    )
    for word in words:
        assert f"#SBATCH --{word}\n" in asked, asked


def test_the_signal_before_the_limit_ends_the_arm_and_requeues_it(tmp_path, monkeypatch):
    """The call's own process: its child is told to stop, and what is requeued is the same arm."""
    pytest.importorskip("submitit")
    script = """
import signal, sys
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
print("ready", flush=True)
signal.pause()
"""
    call = ArmCall(str(tmp_path), "an-arm")
    call.child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert call.child.stdout.readline() == b"ready\n"
    again = call.checkpoint()
    assert call.child.wait() == 75
    assert (again.function.folder, again.function.name, again.function.child) == (str(tmp_path), "an-arm", None)


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["--slurm", "partition=gpu"], "--slurm is for --launcher slurm"),
        (["--launcher", "slurm", "--slurm", "gpu"], "partition=gpu"),
        (["--launcher", "local", "--time-limit", "1"], "--signal-seconds 120"),
        (["--collect", "a", "--resume", "b"], "give one of them"),
        (["--collect", "a", "--train", "full"], "--collect brings its own grid"),
        (["--collect", "a", "--memory-limit", "1MiB"], "--collect runs nothing: leave out --memory-limit"),
        (["--report", "a", "--seeds", "7", "--devices", "cpu"], "--report runs nothing: leave out --seeds --devices"),
    ],
)
def test_mistakes_are_one_sentence(words, match):
    with pytest.raises(UserError, match=match):
        configure(words)


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "library"), [("local", "submitit"), ("ray", "ray")])
def test_driver_and_arm_are_killed_and_every_arm_ends_as_in_a_plain_run(launcher, library, plain, tmp_path):
    """The arm's process is killed, then the driver. What submitit was given goes on, what Ray was given ends with the
    driver; the rest is submitted by --resume. The results are a plain run's but for times."""
    pytest.importorskip(library)
    here = ["--launcher", launcher]
    driver = Command([*GRID, *here, "--out", "abl", *ARM], tmp_path)
    arms = lambda: children_of("memtrain_apps.ablate.cluster", str(tmp_path / "abl"))  # noqa: E731
    arm = wait_for(arms, driver)[0]
    os.kill(arm, signal.SIGKILL)
    wait_for(lambda: [p for p in arms() if p != arm], driver)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    if launcher == "local":
        wait_for(lambda: results_in(tmp_path / "abl"))  # nobody watches, and it ends
    else:
        wait_for(lambda: not arms())
    assert run_command(["ablate", "--collect", "abl"], tmp_path).returncode == 0
    done = run_command(["ablate", "--resume", "abl", *here], tmp_path)
    assert done.returncode == 0, done.stderr
    found = results_in(tmp_path / "abl")
    assert plain.keys() == found.keys()
    for name in plain:
        for key in ("status", "val", "test", "measured", "predicted", "command", "trained_parameters"):
            assert plain[name][key] == found[name][key], (name, key)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Results of the grid as it runs without a launcher."""
    folder = tmp_path_factory.mktemp("plain")
    done = run_command([*GRID, "--out", "plain", *ARM], folder, before=forked_arms)
    assert done.returncode == 0, done.stderr
    return results_in(folder / "plain")


class OneMachine:
    """Ray, as far as a launcher asks it: a cluster of one machine, whose tasks wait."""

    def __init__(self, offers):
        self.offers, self.asked = offers, []

    def nodes(self):
        return [{"Alive": True, "Resources": self.offers}, {"Alive": False, "Resources": {"memory": 1e15, "GPU": 8}}]

    def remote(self, function):
        return SimpleNamespace(options=lambda **words: SimpleNamespace(remote=lambda *a: self.asked.append((words, a))))


def test_ray_is_asked_for_what_an_arm_needs(tmp_path):
    launcher = Ray.__new__(Ray)
    launcher._ray, launcher._folder = OneMachine({"memory": 10.0 * 2**30, "CPU": 2.0, "GPU": 1.0}), tmp_path
    launcher.submit("an-arm", Needs(9 * 2**30, 1, 60, 120))
    ((words, called),) = launcher._ray.asked
    assert words == {"name": "an-arm", "num_cpus": 1, "num_gpus": 1, "memory": 9 * 2**30, "max_retries": 0}
    assert called == (str(tmp_path), "an-arm", os.getcwd())
    for needs in (Needs(11 * 2**30, 0, 60, 120), Needs(1, 2, 60, 120)):  # a machine that is gone offers nothing
        with pytest.raises(UserError, match="no machine of the cluster has as much"):
            launcher.submit("big", needs)


def test_a_cluster_that_does_not_answer_is_named(tmp_path, monkeypatch):
    ray = pytest.importorskip("ray")

    def nobody(**_):
        raise ConnectionError("no answer")

    monkeypatch.setattr(ray, "init", nobody)
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    with pytest.raises(UserError, match="no cluster answers at RAY_ADDRESS=head:6379: no answer"):
        Ray(tmp_path, 1)


def test_a_launcher_that_is_not_there_changes_nothing(tmp_path, monkeypatch):
    """Neither the folder of an ablation that is gone on with, nor the name of a new one."""
    pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", str(tmp_path))  # no srun
    begun(tmp_path / "old")
    before = (tmp_path / "old" / "config.json").read_bytes()
    for words in (["--resume", str(tmp_path / "old"), "--seeds", "4"], ["--out", str(tmp_path / "new"), *ARM]):
        with pytest.raises(UserError, match="--launcher slurm: there is no srun here; choose local"):
            run_ablation(configure(["--launcher", "slurm", "--devices", "cpu", *words]), words)
    assert (tmp_path / "old" / "config.json").read_bytes() == before
    assert not (tmp_path / "old" / "cluster.json").exists()
    cluster.launcher_for(AblateConfig(launcher="local"), tmp_path / "new", ["cpu"])
    assert not (tmp_path / "new").exists()


def test_a_gpu_that_is_not_there_is_named_and_another_machines_is_not_looked_for(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(UserError, match="--devices cuda:0 needs a CUDA GPU and this machine has none"):
        find_places(["cpu", "cuda:0"], 4)
    assert find_places(["cuda"], 4, here=False) == ["cuda:0"]
    assert name_of("cuda:0", AblateConfig(launcher="slurm")) == "a GPU by slurm"
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert find_places(["cuda:0", "cuda:1"], 4) == ["cuda:0", "cuda:1"]
    with pytest.raises(UserError, match="--devices cuda:2 is not one of the 2 CUDA GPUs here"):
        find_places(["cuda:2"], 4)


@pytest.mark.parametrize("told", [True, False])
def test_an_arm_out_of_memory_elsewhere_has_its_predicted_ledger(told, tmp_path, monkeypatch, capsys):
    runner = begun(tmp_path / "a")
    write_json(tmp_path / "a" / "cluster.json", {"device": "cpu", "limit_bytes": 1 << 20})
    name = next(iter(runner.arms))

    def ran(job):
        job.outcome.parent.mkdir(parents=True, exist_ok=True)
        write_json(job.outcome, {"status": "out of memory", "why": "no room"})

    def predicted(job):
        assert told, "nor can this be said"
        return {"predicted": {"weights": 7}, "predicted_peak_bytes": 9}

    monkeypatch.setattr(cluster, "live", ran)
    monkeypatch.setattr(cluster, "_end_when_orphaned", lambda: None)
    monkeypatch.setattr(cluster, "predict_job", predicted)
    assert cluster.run_arm(tmp_path / "a", name) == 0
    record = json.loads((tmp_path / "a" / "results" / f"{name}.json").read_text())
    assert (record["status"], record["why"]) == ("out of memory", "no room")
    assert record["predicted"] == ({"weights": 7} if told else None)
    assert ("nor can this be said" in capsys.readouterr().err) is not told


@pytest.mark.parametrize(("launcher", "library"), [("local", "submitit"), ("slurm", "submitit"), ("ray", "ray")])
def test_a_missing_library_is_named(launcher, library, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    config = AblateConfig(launcher=launcher)
    with pytest.raises(UserError, match=rf"--launcher {launcher} needs {library}: install .memtrain-apps\[cluster\]"):
        launcher_of(config, tmp_path, 1)


def results_in(folder):
    return {p.stem: json.loads(p.read_text()) for p in (folder / "results").glob("*.json")}


def children_of(*words):
    """Process ids whose command has all the words."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if all(any(w in part for part in command) for w in words) and "python" in command[0] and "-m" in command:
            found.append(int(path.parent.name))
    return found


def wait_for(look, driver=None, seconds=900):
    deadline = time.monotonic() + seconds
    while not (found := look()):
        assert driver is None or driver.poll() is None, "the driver ended"
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


def test_an_arm_that_cannot_be_begun_is_refused_and_the_others_are_submitted(tmp_path, monkeypatch):
    """What a job needs is predicted here: an arm whose data are missing must not end the others."""
    grid = grid_of({"train": ["full", "lora"], "seeds": 1, "finetune": {"data": "digits"}})
    runner = Runner(Ablation(AblateConfig(), grid, 0), tmp_path, Console(quiet=True), ["cpu"], None)
    runner.prepare()

    def needs(_, job, base):
        if "lora" in job.name:
            raise UserError("later is not a folder")
        return base

    monkeypatch.setattr(cluster, "_needs", needs)
    base = Needs(0, 0, 1, 1)
    found = cluster._needs_of(runner, runner.left(), "cpu", base)
    assert found == {"full+all+adamw-seed0": base}
    record = json.loads((tmp_path / "results" / "lora-rank8+all+adamw-seed0.json").read_text())
    assert (record["status"], record["why"]) == ("refused", "later is not a folder")
    assert [arm.name for arm in runner.left()] == ["full+all+adamw-seed0"]
    assert len(runner.left(again=("refused",))) == 2
