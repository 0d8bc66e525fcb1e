"""Checkpoints among what is none: files, links, folders that cannot be read or removed, other steps, other formats."""

import fcntl
import json
import os
import shutil

import pytest
import torch
from memtrain_common.errors import UserError
from memtrain_common.runs import checkpoint as module
from memtrain_common.runs.checkpoint import FORMAT, MANIFEST, Checkpoints, verify
from memtrain_common.runs.rescued_rows import Rows, write_rows
from memtrain_common.runs.state_tree import check, decode, encode
from torch import nn


def state_of(step):
    return {"model": {"w": torch.full((3,), float(step))}, "progress": {"step": step}}


def rewrite(path, **changed):
    """Change a manifest as a newer version of the project would have written it; None takes a key away."""
    manifest = {**json.loads((path / MANIFEST).read_text()), **changed}
    manifest = {k: v for k, v in manifest.items() if v is not None}
    if "sha256" in manifest:
        manifest["sha256"] = module._own_hash(manifest)
    (path / MANIFEST).write_text(json.dumps(manifest))


def test_a_folder_under_another_steps_name_is_passed_over(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(step, state_of(step))
    shutil.copytree(checkpoints.path(1), checkpoints.path(9))
    said = []
    assert checkpoints.load_newest(said.append)[0] == 2
    assert said == [f"passed over checkpoint {checkpoints.path(9)}: manifest.json is that of step 1"]


def test_a_newer_format_is_refused_by_name_and_an_older_folder_loads(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(step, state_of(step))
    assert json.loads((checkpoints.path(2) / MANIFEST).read_text())["format"] == FORMAT
    rewrite(checkpoints.path(2), format=None, sha256=None)  # as before there was a format
    assert checkpoints.load_newest()[0] == 2
    rewrite(checkpoints.path(1), format=FORMAT + 1)
    assert checkpoints.load_newest()[0] == 2  # not needed, so not in the way
    shutil.rmtree(checkpoints.path(2))
    with pytest.raises(UserError, match=rf"step-00000001 is of a newer format .*\({FORMAT + 1}; this version knows"):
        checkpoints.load_newest()


@pytest.mark.parametrize("changed", [{"step": None}, {"files": []}, {"files": None}, {"format": "1"}, {"step": "2"}])
def test_a_manifest_that_says_something_else_is_passed_over(tmp_path, changed):
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(step, state_of(step))
    rewrite(checkpoints.path(2), **changed)
    assert checkpoints.load_newest(lambda _: None)[0] == 1
    (checkpoints.path(2) / MANIFEST).write_text("[" * 100_000)
    assert verify(checkpoints.path(2)) == "manifest.json cannot be read"
    (checkpoints.path(2) / MANIFEST).write_text(json.dumps([1]))
    assert verify(checkpoints.path(2)) == "manifest.json cannot be read"


def test_a_checkpoint_with_right_hashes_and_other_content_is_passed_over(tmp_path):
    """Hashes tell damage; who made the files may have put anything into them."""
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(step, state_of(step))
    for text in ("[" * 100_000, '{"model": {"w": {"__tensor__": "nobody"}}}', '{"__parts__": {}, "class": "Popen"}'):
        (checkpoints.path(2) / module.STATE).write_text(text)
        files = {n: module._fingerprint(checkpoints.path(2) / n) for n in (module.MODEL, module.TRAINING, module.STATE)}
        rewrite(checkpoints.path(2), files=files)
        assert verify(checkpoints.path(2)) is None
        said = []
        assert checkpoints.load_newest(said.append)[0] == 1
        assert "are not a checkpoint's" in said[0]


def test_files_and_links_among_checkpoints_end_no_save(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    folder = tmp_path / "checkpoints"
    checkpoints = Checkpoints(folder)
    for step in (1, 2):
        checkpoints.save(step, state_of(step))
    shutil.move(checkpoints.path(1), elsewhere)
    checkpoints.path(1).symlink_to(elsewhere)  # moved to a larger disk, say
    checkpoints.path(3).write_text("a file")
    checkpoints.path(4).symlink_to(tmp_path / "nowhere")
    (folder / "step-1").mkdir()
    for name in (".partial-step-00000007", ".replaced-step-00000002", ".rescue-0"):
        (folder / name).write_text("a file")
    (folder / ".partial-link").symlink_to(elsewhere)
    assert checkpoints.steps() == [1, 2]
    for step in (3, 4, 5):  # over the file, over the link, and with the link to step 1 gone from the newest two
        checkpoints.save(step, state_of(step))
    assert checkpoints.steps() == [4, 5]
    assert not checkpoints.path(1).is_symlink()
    assert (elsewhere / MANIFEST).exists()  # the link went, not what it led to
    assert checkpoints.load_newest()[0] == 5
    assert sorted(p.name for p in folder.iterdir()) == ["step-00000004", "step-00000005", "step-1"]


def test_what_may_not_be_removed_or_read_ends_no_save(tmp_path, monkeypatch):
    """Folders of another user: rmtree fails, and so does reading. (Root may do both, so neither is left to modes.)"""
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(step, state_of(step))
    stale = [".partial-step-00000003", ".replaced-step-00000002"]
    for name in stale:
        (tmp_path / name).mkdir()
        (tmp_path / name / "kept").touch()
    theirs = {str(tmp_path / name) for name in [*stale, "step-00000001"]}
    rmtree, fingerprint = shutil.rmtree, module._fingerprint

    def refusing(path, ignore_errors=False):
        if str(path) in theirs:
            if not ignore_errors:
                raise PermissionError(13, "Permission denied", str(path))
        else:
            rmtree(path, ignore_errors=ignore_errors)

    monkeypatch.setattr(shutil, "rmtree", refusing)
    for step in (2, 3):
        checkpoints.save(step, state_of(step))
    assert checkpoints.steps() == [1, 2, 3]

    def unreadable(path):
        if path.parent == checkpoints.path(3):
            raise PermissionError(13, "Permission denied", str(path))
        return fingerprint(path)

    monkeypatch.setattr(module, "_fingerprint", unreadable)
    said = []
    assert checkpoints.load_newest(said.append)[0] == 2
    assert said == [
        f"passed over checkpoint {checkpoints.path(3)}: model.safetensors cannot be read (Permission denied)"
    ]


def test_a_stale_rescue_never_blocks_the_next_one(tmp_path):
    checkpoints = Checkpoints(tmp_path, writes=False)
    (tmp_path / ".rescue-0").touch()  # of a process that was killed while it saved
    assert checkpoints.rescue(5, state_of(5), best=None, every=10) == checkpoints.path(5)
    (tmp_path / ".rescue-0" / "folder").mkdir(parents=True)
    assert checkpoints.rescue(6, state_of(6), best=None, every=10) == checkpoints.path(6)
    with (tmp_path / ".rescue-1").open("w") as theirs:  # one that is at it
        fcntl.flock(theirs, fcntl.LOCK_EX)
        assert checkpoints.rescue(15, state_of(15), best=None, every=10) is None
        assert checkpoints.rescue(22, state_of(22), best=None, every=10, since=3) is None
        assert checkpoints.rescue(12, state_of(12), best=None, every=10, since=3) == checkpoints.path(12)
    assert (tmp_path / ".rescue-1").exists()
    Checkpoints(tmp_path).load_newest()
    assert not list(tmp_path.glob(".rescue-*"))


def rescued(folder, rank, *, mark=4, step=13):
    """As one of three processes with a head each: rows of its own, zeros for the others'."""
    owed = torch.zeros(3, 2)
    owed[rank] = rank + 1
    state = {"model": {"owed": owed, "w": torch.ones(2)}}
    own = Rows(mark, {"owed": (rank, owed[rank : rank + 1])})
    checkpoints = Checkpoints(folder, writes=False)
    assert write_rows(folder, rank, own) == ""
    return checkpoints.rescue(step, state, best=None, every=10, mark=mark)


def test_rows_that_cannot_be_written_say_why(tmp_path):
    (tmp_path / "checkpoints").touch()
    own = Rows(1, {"owed": (0, torch.ones(1, 2))})
    assert write_rows(tmp_path / "checkpoints", 0, own) == "File exists"
    assert write_rows(tmp_path / "gone" / "checkpoints", 0, own) == "No such file or directory"


def test_survivors_rows_come_together_whoever_saves_and_whoever_comes_late(tmp_path):
    with (tmp_path / ".rescue-1").open("w") as theirs:  # another process saves
        fcntl.flock(theirs, fcntl.LOCK_EX)
        assert rescued(tmp_path, 2) is None
    assert rescued(tmp_path, 0) == Checkpoints(tmp_path).path(13)
    assert load_owed(tmp_path) == ([[1, 1], [0, 0], [3, 3]], [])  # rank 1 is lost
    assert rescued(tmp_path, 2, step=14) is not None  # it heard of the loss after the first had saved
    assert load_owed(tmp_path) == ([[1, 1], [0, 0], [3, 3]], [])


def load_owed(folder):
    said = []
    _, state = Checkpoints(folder).load_newest(said.append)
    return state["model"]["owed"].tolist(), said


def test_rows_of_another_merge_are_not_taken(tmp_path):
    rescued(tmp_path, 2, mark=3)
    rescued(tmp_path, 0, mark=4, step=15)
    assert load_owed(tmp_path) == ([[1, 1], [0, 0], [0, 0]], [])


@pytest.mark.parametrize("damage", ["flip", "cut", "gone", "note", "rows"])
def test_damaged_rows_are_told_and_passed_over(tmp_path, damage):
    rescued(tmp_path, 2)
    rescued(tmp_path, 0)
    path = tmp_path / "rows-00000004-2.safetensors"
    note = path.with_suffix(".json")
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[-1] ^= 1
        path.write_bytes(content)
    elif damage == "cut":
        path.write_bytes(content[:-3])
    elif damage == "gone":
        path.unlink()
    elif damage == "note":
        note.write_text(note.read_text().replace("first_rows", "first_rowz"))
    else:  # of a model with other shapes
        write_rows(tmp_path, 2, Rows(4, {"owed": (2, torch.ones(4, 2))}))
    owed, said = load_owed(tmp_path)
    assert owed == [[1, 1], [0, 0], [0, 0]]
    assert len(said) == 1
    assert said[0].startswith(f"passed over {path}, what one process was owed: ")


def test_rows_stay_as_long_as_their_checkpoint(tmp_path):
    rescued(tmp_path, 2)
    rescued(tmp_path, 0)
    checkpoints = Checkpoints(tmp_path)
    (tmp_path / "rows-notes.txt").touch()  # somebody's own
    checkpoints.save(20, state_of(20))
    assert len(list(tmp_path.glob("rows-00000004-*"))) == 4
    checkpoints.save(30, state_of(30))
    assert [p.name for p in tmp_path.glob("rows-*")] == ["rows-notes.txt"]


def test_without_locks_the_file_is_the_claim(tmp_path, monkeypatch):
    def no_locks(handle, how):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    checkpoints = Checkpoints(tmp_path, writes=False)
    assert checkpoints.rescue(5, state_of(5), best=None, every=10) is not None
    (tmp_path / ".rescue-0").touch()
    assert checkpoints.rescue(6, state_of(6), best=None, every=10) is None
    Checkpoints(tmp_path).load_newest()
    assert checkpoints.rescue(6, state_of(6), best=None, every=10) is not None


def test_a_run_folder_that_is_gone_is_not_made_again(tmp_path):
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints")
    with pytest.raises(UserError, match=r"the run folder .*run was removed or renamed"):
        checkpoints.save(1, state_of(1))
    with pytest.raises(UserError, match="was removed or renamed"):
        checkpoints.rescue(1, state_of(1), best=None, every=1)
    assert os.listdir(tmp_path) == []


# -- what tensors hold, and not how they lie in memory -------------------------------------------------------------


def round_trip(state, folder):
    Checkpoints(folder).save(1, state)
    return Checkpoints(folder).load_newest()[1]


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128, torch.complex32])
def test_lazy_conjugates_and_negatives_are_stored_with_their_values(tmp_path, dtype):
    z = torch.randn(3, 4, dtype=torch.complex64).to(dtype)
    views = {"z": z, "conj": z.conj(), "H": z.conj().T, "tied": z.conj(), "neg": z.conj().imag, "one": z[0, 0].conj()}
    assert views["conj"].is_conj()
    assert views["neg"].is_neg()
    found = round_trip({"model": dict(views)}, tmp_path)["model"]
    for name, value in views.items():
        assert found[name].dtype == value.dtype
        torch.testing.assert_close(found[name], value.resolve_conj().resolve_neg(), rtol=0, atol=0)
    assert found["conj"] is found["tied"] or dtype != torch.complex64
    assert found["z"].imag.tolist() == (-found["conj"].imag).tolist() != found["conj"].imag.tolist()


def test_views_that_overlap_are_stored_each_with_its_values(tmp_path):
    flat = torch.arange(12.0)
    views = {
        "flat": flat, "matrix": flat.view(3, 4), "left": flat[:7], "right": flat[5:], "row": flat.view(3, 4)[1],
        "column": flat.view(3, 4)[:, 1], "spread": flat[:1].expand(5), "bits": flat.view(torch.int32),
    }  # fmt: skip
    found = round_trip({"model": dict(views)}, tmp_path)["model"]
    for name, value in views.items():
        assert torch.equal(found[name], value), name

    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            both = torch.randn(4, 3)
            self.a, self.b = nn.Parameter(both[:3]), nn.Parameter(both[1:])

    first, second = Shared(), Shared()
    second.load_state_dict(round_trip({"model": first.state_dict()}, tmp_path / "module")["model"])
    assert torch.equal(second.a, first.a)
    assert torch.equal(second.b, first.b)


@pytest.mark.parametrize(
    ("tensor", "why"),
    [
        (torch.eye(3).to_sparse(), r"which is torch\.sparse_coo: make it a plain dense tensor"),
        (torch.zeros(2, device="meta"), "is on the device meta and has no values"),
        (torch.empty(2, dtype=torch.float8_e8m0fnu), r"which is of torch\.float8_e8m0fnu"),
    ],
)
def test_what_no_checkpoint_can_hold_is_named_before_the_first_step(tensor, why, tmp_path):
    from memtrain_common.runs.run_folder import RunFolder
    from memtrain_common.training.fit_config import FitConfig
    from memtrain_common.training.loop import fit
    from memtrain_common.training.task import Task

    for call in (check, encode):
        with pytest.raises(TypeError, match=rf"cannot hold model\.odd, {why}|cannot hold model\.odd, which {why}"):
            call({"model": {"odd": tensor}})
    model = nn.Linear(2, 1)
    model.register_buffer("odd", tensor)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    steps = []

    def loss(m, batch):
        steps.append(1)
        return m(batch[0]).square().mean()

    task = Task(model, lambda i: (torch.ones(2, 2),), loss, optimizer)
    with pytest.raises(UserError, match=r"a checkpoint cannot hold model\.odd"):
        fit(task, FitConfig(max_iters=2), run=RunFolder.create(tmp_path / "run"))
    assert not steps


def test_a_check_copies_nothing():
    tensors = {"w": torch.zeros(1000)}
    check({"model": tensors})
    tree, stored = encode({"model": tensors})
    assert decode(tree, stored)["model"]["w"].data_ptr() == tensors["w"].data_ptr()  # nor does encoding, on the CPU
