"""Changed contents of every kind are noticed, whatever stays the same beside them; and the cache is only a help."""

import json
import os
import shutil
import sqlite3
import zipfile

import numpy as np
import pytest
from image_files import image_folder, random_file
from memtrain_common.data import fingerprint
from memtrain_common.data.fingerprint import by_file_or_folder, changed_meaning, changed_part, file_digests
from memtrain_common.data.images.sets import load_images
from memtrain_common.errors import UserError

LONG_AGO = 1_600_000_000_000_000_000  # ns


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "memtrain" / "fingerprints.sqlite"


@pytest.fixture
def hashed(monkeypatch):
    """Names of the files that were read, in order."""
    names, real = [], fingerprint._hash
    monkeypatch.setattr(fingerprint, "_hash", lambda path, *rest: (names.append(path.name), real(path, *rest))[1])
    return names


def write(path, content, mtime_ns=LONG_AGO):
    path.write_bytes(content)
    os.utime(path, ns=(mtime_ns, mtime_ns))
    return path


# -- files and their cache


def test_every_file_is_hashed_once(tmp_path, hashed):
    import hashlib

    content = {f"{i}.bin": np.random.default_rng(i).bytes(i * 300_000) for i in range(6)}
    paths = [write(tmp_path / name, c) for name, c in content.items()]
    expected = [hashlib.sha256(c).hexdigest() for c in content.values()]
    assert file_digests(paths) == expected
    assert sorted(hashed) == sorted(content)
    assert file_digests(paths[::-1]) == expected[::-1]
    assert len(hashed) == 6
    write(paths[2], content["2.bin"][:-1] + b"?", LONG_AGO + 1)  # of the same size
    again = file_digests(paths)
    assert hashed[6:] == ["2.bin"]
    assert [a == b for a, b in zip(again, expected, strict=True)] == [True, True, False, True, True, True]
    other = write(tmp_path / "other", content["3.bin"])
    os.replace(other, paths[3])  # another inode of the same size and time
    file_digests(paths)
    assert hashed[7:] == ["3.bin"]


def test_what_changed_just_now_is_not_trusted(tmp_path, hashed):
    """A file system's clock may tick slower than files are written."""
    path = tmp_path / "new.bin"
    path.write_bytes(b"one")
    first = file_digests([path])
    stat = path.stat()
    path.write_bytes(b"two")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert file_digests([path]) != first
    assert len(hashed) == 2


def test_a_damaged_cache_is_begun_anew(tmp_path, own_cache, hashed):
    paths = [write(tmp_path / "a.bin", b"a" * 9)]
    for damage in (b"no data base at all" * 99, b"", None):
        own_cache.parent.mkdir(parents=True, exist_ok=True)
        if damage is None:
            own_cache.unlink()
            with sqlite3.connect(own_cache) as base:
                base.execute("CREATE TABLE files (path TEXT)")  # some other form
            base.close()
        else:
            own_cache.write_bytes(damage)
        before = len(hashed)
        first = file_digests(paths)
        assert file_digests(paths) == first
        assert len(hashed) == before + 1
    with sqlite3.connect(own_cache) as base:
        base.execute("UPDATE files SET sha256 = 'nonsense'")
    base.close()
    assert file_digests(paths) == first


def test_without_a_place_for_the_cache(tmp_path, own_cache, hashed):
    path = write(tmp_path / "a.bin", b"a" * 9)
    own_cache.parent.parent.write_text("a file where the folder should be")
    assert file_digests([path]) == file_digests([path])
    assert len(hashed) == 2
    assert own_cache.parent.parent.read_text() == "a file where the folder should be"


def test_a_cache_that_cannot_be_written(tmp_path, own_cache, hashed, monkeypatch):
    one, two = write(tmp_path / "a.bin", b"a"), write(tmp_path / "b.bin", b"b")
    file_digests([one])
    real = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda path, **more: real(f"file:{path}?mode=ro", uri=True, **more))
    assert file_digests([one, two]) == file_digests([one, two])
    assert hashed == ["a.bin", "b.bin", "b.bin"]


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"gone\.bin cannot be read: No such file"):
        file_digests([tmp_path / "gone.bin"])


def test_many_files_are_kept_by_folder():
    few = {f"train/cat/{i}.png": str(i) for i in range(3)}
    assert by_file_or_folder(few, most=3) == few
    many = {f"train/{c}/{i}.png": f"{c}{i}" for c in ("cat", "dog") for i in range(3)}
    found = by_file_or_folder(many, most=5)
    assert list(found) == ["train/cat", "train/dog"]
    swapped = by_file_or_folder({**many, "train/dog/1.png": "dog2", "train/dog/2.png": "dog1"}, most=5)
    assert found["train/cat"] == swapped["train/cat"]
    assert found["train/dog"] != swapped["train/dog"]


# -- what a run keeps


def test_a_run_is_compared_by_the_rule_that_it_was_begun_with():
    now = {"name": "pets", "sha256": "names and sizes", "parts": {"a.png": "1", "b.png": "2"}}
    assert changed_part(json.loads(json.dumps(now)), now) is None
    earlier = {"name": "pets", "sha256": "names and sizes"}
    assert changed_part(earlier, now) is None
    other = changed_part({**earlier, "sha256": "other"}, now)
    assert other == "pets (SHA-256 other…) before, and now pets (SHA-256 names and si…)"
    assert changed_part({}, now) is not None
    assert changed_part({**now, "sha256": "other"}, now) == other  # texts that give the same tokens


def test_what_has_changed_is_named():
    def of(parts):
        return {"name": "pets", "sha256": "names and sizes", "parts": parts}

    before = of({"a.png": "1", "b.png": "2"})
    assert changed_part(before, of({"b.png": "2", "a.png": "1"})) is None
    assert changed_part(before, of({"a.png": "1", "b.png": "3"})) == "b.png has another content"
    assert changed_part(before, of({"a.png": "1"})) == "b.png is gone"
    assert changed_part(before, of({"a.png": "2", "b.png": "1"})) == (
        "a.png has another content (and 1 more have changed)"
    )
    assert changed_part(before, of({"a.png": "1", "b.png": "2", "c.png": "3"})) == "c.png is new"


def test_other_classes_and_other_tokens_are_another_meaning():
    def of(*classes, **tokens):
        return {"sha256": "x", "classes": list(classes), **tokens}

    before = of("cat", "dog", "fox")
    assert changed_meaning(before, {**before, "sha256": "other", "train": 5}) is None
    assert changed_meaning(before, of("dog", "cat", "fox")) == "the classes are others (in another order)"
    assert changed_meaning(before, of("dog", "fox", "kitten")) == "the classes are others (not cat but kitten)"
    assert changed_meaning(before, of("cat", "dog")) == "the classes are others (not fox)"
    assert changed_meaning({"classes": 3}, before) is None  # of a version that kept their number
    assert changed_meaning({"classes": 2}, before) == "the classes are 3 and were 2"
    letters = {"tokenizer": "chars", "characters": "ab"}
    assert changed_meaning(letters, letters) is changed_meaning({}, letters) is changed_meaning({}, before) is None
    assert changed_meaning(letters, {**letters, "characters": "ba"}) == "the tokens are other characters"
    assert changed_meaning({"tokenizer": "gpt2"}, letters) == "the tokens are chars and were gpt2"


def data_of(images):
    return {**images.describe(), "parts": images.parts()}


def exchanged(folder, one, two):
    """The contents of two folders change places; names, sizes and times stay."""
    for path in sorted((folder / one).iterdir()):
        other = folder / two / path.name
        a, b, times = path.read_bytes(), other.read_bytes(), [p.stat().st_mtime_ns for p in (path, other)]
        path.write_bytes(b)
        other.write_bytes(a)
        for p, t in zip((path, other), times, strict=True):
            os.utime(p, ns=(t, t + 1))


def bitmaps(folder):
    from PIL import Image

    image_folder(folder, 3)
    for path in sorted(folder.rglob("*.png")):
        Image.open(path).save(path.with_suffix(".bmp"))
        path.unlink()
    return folder


@pytest.mark.parametrize("form", ["folder", "zip"])
def test_classes_that_changed_places_are_noticed(tmp_path, form):
    folder = bitmaps(tmp_path / "pets")

    def load():
        if form == "folder":
            return load_images("folder", str(folder))
        with zipfile.ZipFile(tmp_path / "pets.zip", "w") as archive:
            for file in sorted(folder.rglob("*.bmp")):
                archive.write(file, str(file.relative_to(folder)))
        return load_images("folder", str(tmp_path / "pets.zip"))

    first = load()
    before = data_of(first)
    assert changed_part(before, data_of(load())) is None
    exchanged(folder, "train/cat", "train/dog")
    now = load()
    if form == "folder":
        assert now.describe() == first.describe()  # names and sizes are the same: why there is more than these
    assert changed_part(before, data_of(now)) == "train/cat/0.bmp has another content (and 5 more have changed)"


def test_labels_and_arrays_are_part_of_it(tmp_path):
    random_file(tmp_path, "bloodmnist", 24)
    before = data_of(load_images("bloodmnist", str(tmp_path), verify=False))
    for name in ("val_labels", "test_images"):
        random_file(tmp_path, "bloodmnist", 24)
        arrays = dict(np.load(tmp_path / "bloodmnist.npz"))
        arrays[name] = arrays[name][::-1].copy()
        np.savez(tmp_path / "bloodmnist.npz", **arrays)
        now = load_images("bloodmnist", str(tmp_path), verify=False)
        assert changed_part(before, data_of(now)) == f"{name.replace('_', ' ')} has another content".replace(
            "labels has", "labels has"
        )


# -- tokens and models


def swapped_words(folder):
    """Two words of a tokenizer change their numbers."""
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    vocab = content["model"]["vocab"]
    vocab[" good"], vocab[" bad"] = vocab[" bad"], vocab[" good"]
    path.write_text(json.dumps(content))


def test_another_tokenizer_or_other_labels_are_noticed(encoder, glue_dir, tmp_path):
    from memtrain_common.data.text.glue_batches import prepare_glue
    from memtrain_common.models.encoders import load_tokenizer

    def data(model, folder=glue_dir, **more):
        tokenizer = load_tokenizer(str(model))
        for name, value in more.items():
            setattr(tokenizer, name, value)
        found = prepare_glue("sst2", str(folder), tokenizer, max_length=16)
        return {"name": "sst2", "sha256": found.sha256, "parts": found.parts}

    before = data(encoder)
    assert changed_part(before, data(encoder)) is None
    shutil.copytree(encoder, tmp_path / "model")
    swapped_words(tmp_path / "model")
    now = data(tmp_path / "model")
    assert now["sha256"] == before["sha256"]  # the texts are the same: why there is more than these
    assert changed_part(before, now) == "train tokens has another content (and 1 more have changed)"
    assert changed_part({"name": "sst2", "sha256": before["sha256"]}, now) is None  # of a version without parts
    shutil.copytree(glue_dir, tmp_path / "glue")
    path = tmp_path / "glue" / "SST-2" / "dev.tsv"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:5], lines[5][:-1] + str(1 - int(lines[5][-1])), *lines[6:]]) + "\n")
    assert changed_part(before, data(encoder, tmp_path / "glue")) == "dev tokens has another content"
    assert changed_part(before, data(encoder, padding_side="left")) == "padding has another content"


def test_another_activation_is_noticed(encoder, tmp_path):
    from memtrain_common.models.encoders import model_parts

    before = {"sha256": "of texts", "parts": model_parts(encoder)}
    shutil.copytree(encoder, tmp_path / "model")

    def changed(**values):
        path = tmp_path / "model" / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
        return changed_part(before, {**before, "parts": model_parts(str(tmp_path / "model"))})

    assert changed(transformers_version="99.0") is None
    assert changed(hidden_act="relu") == "the base model's config.json has another content"
    (tmp_path / "model" / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json cannot be read"):
        model_parts(str(tmp_path / "model"))
