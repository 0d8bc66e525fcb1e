"""A few tries of each kind, for every push. Moments are counted in calls, by no clock."""

import ast
import random
import signal
import threading
from pathlib import Path

import damage
import harness
import hostile
import pytest
from support import ROOT, run_script
from tqdm import tqdm

SEVERAL = [
    (0, "lte-train"),
    (3, "lte-train"),
    pytest.param(1, "lora-xs-glue", marks=pytest.mark.slow),
    pytest.param(2, "galore-vit", marks=pytest.mark.slow),
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return harness.Whole(tmp_path_factory.mktemp("chaos"))


@pytest.mark.slow
@pytest.mark.parametrize(("number", "name"), SEVERAL)
def test_killed_at_a_random_call_it_resumes_to_the_same_bytes(whole, tmp_path, number, name):
    found = harness.kill(whole, name, random.Random(number), tmp_path / "try")
    assert found.right, found


def test_a_process_that_was_killed_keeps_no_lock_of_the_others(tmp_path):
    """The progress bars' lock, held here as one that was killed would hold it: a command's bars do not wait for it."""
    held, done = threading.Event(), threading.Event()

    def hold():
        with tqdm.get_lock():
            held.set()
            done.wait()

    other = threading.Thread(target=hold)
    other.start()
    held.wait()
    try:
        assert run_script("import tqdm; list(tqdm.tqdm(range(3)))", tmp_path).returncode == 0
    finally:
        done.set()
        other.join()


@pytest.mark.slow
@pytest.mark.parametrize(("number", "name"), SEVERAL)
def test_a_signal_at_a_random_call_ends_it_with_one_line(whole, tmp_path, number, name):
    found = harness.interrupt(whole, name, random.Random(number), tmp_path / "try")
    assert found.right, found


@pytest.mark.slow
@pytest.mark.parametrize("kind", damage.KINDS)
def test_damage_is_noticed(whole, tmp_path, kind):
    for number in range(5):
        (tmp_path / str(number)).mkdir()
        found = damage.damaged(whole, kind, random.Random(number), tmp_path / str(number))
        assert found.right, found


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pictures", "labels", "tokenizer", "config", "texts", "bins"])
def test_a_changed_input_is_told(whole, tmp_path, kind):
    few = ("lte-train", "lora-xs-glue", "galore-vit", harness.ON_BINS)  # whose whole runs the tests above have made
    number = next(i for i, (k, name, _) in enumerate(damage.CHANGES) if k == kind and name in few)
    found = damage.changed(whole, number, random.Random(number), tmp_path / "try")
    assert found.right, found


FEW = [
    "rows nested deeply", "a model of a thousand million layers", "a model with code of its own",
    "an object in a file of weights", "a link out of the text folder", "a result cut short", "a ledger that is missing",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", FEW)
def test_files_from_strangers_are_refused_in_one_sentence(whole, tmp_path, name):
    number = list(hostile.TABLE).index(name)
    found = hostile.tried(whole, number, random.Random(0), tmp_path / "try", hostile.idle(tmp_path))
    assert found.right, found


def test_a_command_that_begins_a_session_is_among_them():
    """A new one is registered in ``harness.REGISTERED`` with a run that stands for it."""
    sources = [*ROOT.glob("packages/*/src/*/tasks/*.py"), *ROOT.glob("apps/src/memtrain_apps/run/*.py")]
    begins = set()
    for path in sources:
        calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
        if any(ast.unparse(c.func) == "Session.begin" for c in calls):
            begins.add("/".join(path.parts[-3:]))
    grids = {"lora_xs/tasks/glue_grid.py"}  # runs lora_xs/tasks/glue.py's training several times
    assert begins - grids == set(harness.REGISTERED)


def test_what_is_judged_wrong_is_said(tmp_path):
    """The judges can fail."""
    assert harness.judged("x", signal.SIGTERM, 143, "prog: stopped by SIGTERM at step 3\n").right
    assert harness.judged("x", signal.SIGINT, 130, "prog: stopped at once by a second SIGINT in step 3\n").right
    assert not harness.judged("x", signal.SIGTERM, 143, "Traceback\nstopped by SIGTERM\n").right
    assert not harness.judged("x", signal.SIGTERM, -15, "prog: stopped by SIGTERM\n").right
    file = Path(tmp_path / "a")
    file.write_bytes(bytes(100))
    for number in range(20):
        before = file.read_bytes()
        damage.damage(file, random.Random(number))
        assert file.read_bytes() != before
        file.write_bytes(bytes(100))
