"""Checkpoints under kills, full disks, flipped bits and retention."""

import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
from fresh import run_fresh
from memtrain_common.errors import UserError
from memtrain_common.runs import checkpoint as module
from memtrain_common.runs.checkpoint import Checkpoints, load, verify
from memtrain_common.runs.state_tree import decode, encode
from torch import nn


def state_of(step, seed=0):
    g = torch.Generator().manual_seed(seed + step)
    weight = torch.randn(6, 5, generator=g)
    return {
        "model": {
            "w": weight,
            "tied": weight,
            "half": torch.randn(3, generator=g).bfloat16(),
            "empty": torch.zeros(0, 2),
        },
        "optimizer": {
            "state": {0: {"step": torch.tensor(float(step)), "exp_avg": torch.randn(6, 5, generator=g).double()}},
            "param_groups": [{"lr": 0.1, "betas": (0.9, 0.95), "params": [0], "name": None}],
        },
        "progress": {"step": step, "best": math.inf, "flag": True, "list": [1, [2.5, "x"]]},
    }


def same(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return a == b and type(a) is type(b)


def test_what_is_loaded_is_what_was_saved(tmp_path):
    Checkpoints(tmp_path).save(7, state_of(7))
    step, state = Checkpoints(tmp_path).load_newest()
    assert step == 7
    assert same(state, state_of(7))
    assert state["model"]["w"] is state["model"]["tied"]  # stored once


def test_state_tree_round_trip_of_a_real_optimizer():
    model = nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters(), amsgrad=True)
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    tree, tensors = encode(optimizer.state_dict())
    again = decode(json.loads(json.dumps(tree)), tensors)
    assert same(again, optimizer.state_dict())


@pytest.mark.parametrize("value", [math.nan, -math.inf, 1e-300, 0.1, 2**60])
def test_numbers_survive_exactly(value):
    tree, _ = encode({"x": value})
    again = decode(json.loads(json.dumps(tree)), {})["x"]
    assert again == value or (math.isnan(value) and math.isnan(again))


def test_what_cannot_be_stored_is_named():
    with pytest.raises(TypeError, match=r"cannot hold optimizer\.hook, which is a function"):
        encode({"optimizer": {"hook": lambda: 0}})


def test_retention_keeps_the_newest_and_the_best(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in range(1, 7):
        checkpoints.save(step, state_of(step), best=2)
    assert checkpoints.steps() == [2, 5, 6]
    checkpoints.save(4, state_of(4), best=2)  # the run went back past 5 and 6, which were damaged
    assert checkpoints.steps() == [2, 4]
    with pytest.raises(ValueError, match="keep must be at least 2"):
        Checkpoints(tmp_path, keep=1)


def positions(path, n):
    size = path.stat().st_size
    return sorted({round(i * (size - 1) / (n - 1)) for i in range(n)})


@pytest.mark.slow
@pytest.mark.parametrize("name", [module.MODEL, module.TRAINING, module.STATE, module.MANIFEST])
def test_every_flipped_byte_is_found_and_the_one_before_is_taken(tmp_path, name):
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(step, state_of(step))
    path = checkpoints.path(2) / name
    whole = path.read_bytes()
    for position in positions(path, 50):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        said = []
        step, state = checkpoints.load_newest(said.append)
        assert step == 1, position
        assert same(state, state_of(1))
        assert len(said) == 1
        assert f"passed over checkpoint {checkpoints.path(2)}" in said[0]
    path.write_bytes(whole[:-1])
    assert checkpoints.load_newest(lambda _: None)[0] == (1 if name != module.MANIFEST else 2)
    path.unlink()
    assert verify(checkpoints.path(2)) == f"{name} is missing"
    path.mkdir()
    assert verify(checkpoints.path(2)) == f"{name} cannot be read (Is a directory)"


def test_pickles_are_not_opened(tmp_path):
    """A file that would run code if it were unpickled is refused by its hash, and never by luck: no pickle is read."""
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state_of(1))
    bomb = tmp_path / "ran"
    payload = f"cposix\nsystem\n(S'touch {bomb}'\ntR.".encode()
    (checkpoints.path(1) / module.MODEL).write_bytes(payload)
    assert checkpoints.load_newest(lambda _: None) is None
    source = Path(module.__file__).read_text()
    assert not bomb.exists()
    assert "torch.load" not in source
    assert "import pickle" not in source


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it."""


def kill_at(monkeypatch, n):
    """Let the n-th file operation of a save, and all after it, not happen. Returns the counter."""
    count = [0]

    def guarded(real):
        def call(*args, **kwargs):
            count[0] += 1
            if count[0] >= n:
                raise Killed
            return real(*args, **kwargs)

        return call

    for owner, name in (
        (module.Path, "mkdir"),
        (module, "save_file"),
        (module.Path, "write_text"),
        (module, "_fsync"),
        (module.os, "replace"),
        (module.shutil, "rmtree"),
    ):
        monkeypatch.setattr(owner, name, guarded(getattr(owner, name)))
    return count


@pytest.mark.slow
@pytest.mark.parametrize("again", [False, True], ids=["new step", "step that exists"])
def test_killed_at_any_file_operation_a_whole_checkpoint_is_left(tmp_path, monkeypatch, again):
    """Every point of a save at which a process can die; then a load, then the next save."""
    n = 0
    while True:
        n += 1
        folder = tmp_path / str(n)
        checkpoints = Checkpoints(folder)
        for step in (1, 2):
            checkpoints.save(step, state_of(step))
        target = 2 if again else 3
        with monkeypatch.context() as patch:
            counter = kill_at(patch, n)
            try:
                checkpoints.save(target, state_of(target, seed=100))
                finished = True
            except Killed:
                finished = False
        step, state = Checkpoints(folder).load_newest(lambda _: None)
        assert step in ((2,) if again else (2, 3))
        assert same(state, state_of(step)) or same(state, state_of(step, seed=100))
        Checkpoints(folder).save(4, state_of(4))
        assert Checkpoints(folder).load_newest()[0] == 4
        assert not [p for p in folder.iterdir() if p.name.startswith(".")]
        if finished:
            break
        shutil.rmtree(folder)
    assert counter[0] == n - 1 >= 10


def test_a_full_disk_leaves_the_earlier_checkpoint_intact(tmp_path):
    """A limit on file size stands for the full disk: the write fails in the middle of the tensors."""
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state_of(1))
    script = f"""
import resource, signal, sys, torch
from pathlib import Path
from memtrain_common.runs.checkpoint import Checkpoints
from memtrain_common.errors import UserError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
try:
    Checkpoints(Path({str(tmp_path)!r})).save(2, {{"model": {{"w": torch.zeros(1 << 20)}}}})
except UserError as error:
    print(error)
    sys.exit(2)
"""
    done = run_fresh(script)
    assert done.returncode == 2, done.stderr
    assert "could not save the checkpoint of step 2" in done.stdout
    assert "earlier checkpoints are intact" in done.stdout
    assert len(done.stdout.strip().splitlines()) == 1
    assert os.listdir(tmp_path) == ["step-00000001"]
    assert same(load(checkpoints.path(1)), state_of(1))


def test_only_the_writing_process_writes(tmp_path):
    Checkpoints(tmp_path / "c", writes=False).save(1, state_of(1))
    assert not (tmp_path / "c").exists()


def test_a_quantised_tensor_is_refused_in_words(tmp_path):
    class Wrapped(torch.Tensor):
        @staticmethod
        def __new__(cls, a):
            return torch.Tensor._make_wrapper_subclass(cls, a.shape, dtype=a.dtype)

        def __init__(self, a):
            self.a = a

        def __tensor_flatten__(self):
            return ["a"], None

        @staticmethod
        def __tensor_unflatten__(inner, meta, size, stride):
            raise NotImplementedError

        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            raise NotImplementedError

    with pytest.raises(TypeError, match="which is a Wrapped"):
        Checkpoints(tmp_path).save(1, {"model": {"w": Wrapped(torch.zeros(2))}})
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="could not save"):
        Checkpoints(tmp_path / "file" / "below").save(1, state_of(1))


def test_the_quantised_state_of_torchao_is_kept_as_its_parts(tmp_path):
    optim = pytest.importorskip("torchao.optim")
    weight = torch.nn.Parameter(torch.randn(64, 96))
    optimizer = optim.AdamW8bit([weight], lr=1e-2)
    weight.grad = torch.randn(64, 96)
    with torch.compiler.set_stance("force_eager"):
        optimizer.step()
    tree, tensors = encode(optimizer.state_dict())
    back = decode(json.loads(json.dumps(tree)), {name: t.clone() for name, t in tensors.items()})
    saved, found = optimizer.state[weight]["exp_avg"], back["state"][0]["exp_avg"]
    assert type(found) is type(saved)
    assert torch.equal(found.codes, saved.codes)
    assert torch.equal(found.scale, saved.scale)
    assert found.dtype == saved.dtype == torch.float32
    with pytest.raises(ValueError, match="may hold OptimState8bit"):
        decode({"__parts__": {}, "class": "Popen", "context": []}, {})
