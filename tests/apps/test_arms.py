"""Arms in processes of their own: every way to end has its name, places, the memory limit, runs after a kill."""

import faulthandler
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest
from memtrain_apps.ablate.arms import Job, is_out_of_memory, memory_limit, run_jobs, wait_until_free
from memtrain_common.errors import DivergedError, UserError

FORK = multiprocessing.get_context("fork")  # quicker here than the server of the commands


def ends(job):
    """An arm that ends as its first word says."""
    how = job.words[0]
    if how == "memory":
        bytearray(256 << 20)
    if how == "bad_alloc":
        faulthandler.disable()  # pytest's would write its own lines into the suite's output
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_each_place_has_one_arm_at_a_time(tmp_path):
    found = run_all(tmp_path, ["sleep"] * 5, places=["cpu", "cpu"])
    spans = sorted(tuple(o["content"]["interval"]) for o in found.values())
    for moment, _ in spans:
        assert sum(a <= moment < b for a, b in spans) <= 2
    assert any(sum(a <= moment < b for a, b in spans) == 2 for moment, _ in spans)


def test_a_memory_limit_counts_from_what_the_process_has_and_ends_with_the_arm():
    with memory_limit(64 << 20, "cpu"):
        bytearray(32 << 20)
        with pytest.raises(MemoryError) as error:
            bytearray(256 << 20)
    assert is_out_of_memory(error.value)
    bytearray(256 << 20)
    assert is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"))
    assert not is_out_of_memory(RuntimeError("shapes differ"))
    for said in ("can't start new thread", "could not execute a primitive"):
        assert is_out_of_memory(RuntimeError(said), limited=True)
        assert not is_out_of_memory(RuntimeError(said))
    assert is_out_of_memory(SystemError("error return without exception set"), limited=True)
    assert not is_out_of_memory(ValueError("out of memory"))


def test_an_arm_waits_for_the_folder_that_another_process_holds(tmp_path):
    (tmp_path / ".lock").touch()
    script = (
        "import fcntl, sys, time; f = open(sys.argv[1], 'a'); fcntl.flock(f, fcntl.LOCK_EX); print('held', flush=True)"
    )
    words = [sys.executable, "-c", f"{script}; time.sleep(60)", tmp_path / ".lock"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="is in use by another process"):
            wait_until_free(tmp_path, seconds=0.3)
        holder.kill()
    wait_until_free(tmp_path, seconds=0.3)
    wait_until_free(tmp_path / "absent", seconds=0.3)
