"""Sets of images in their publishers' form: what is read, and what is refused."""

import io
import json
import tarfile
import zipfile

import numpy as np
import pytest
from image_files import image_folder, random_file
from memtrain_common.data.images.folders import picture_folder
from memtrain_common.data.images.image_set import decode, fold
from memtrain_common.data.images.sets import NAMES, fetch, load_images
from memtrain_common.errors import UserError
from PIL import Image
from scipy.io import savemat
from torchvision import datasets

DRAW = np.random.default_rng(0)


def picture(path, value):
    """A small JPEG whose grey says which it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (12, 10), (value, value, value)).save(path)


def shades(split):
    return [int(split.images[i].mean().round()) for i in range(len(split))]


# -- CIFAR -----------------------------------------------------------------------------------------------------------


def cifar_records(n, label_bytes, classes):
    labels = DRAW.integers(0, classes, (n, label_bytes)).astype(np.uint8)
    return np.concatenate([labels, DRAW.integers(0, 256, (n, 3072)).astype(np.uint8)], axis=1)


def cifar10(folder):
    folder.mkdir(parents=True)
    parts = {f"data_batch_{i}.bin": cifar_records(20, 1, 10) for i in range(1, 6)}
    parts["test_batch.bin"] = cifar_records(7, 1, 10)
    for name, table in parts.items():
        (folder / name).write_bytes(table.tobytes())
    (folder / "batches.meta.txt").write_text("\n".join("abcdefghij") + "\n\n")
    return parts


@pytest.mark.parametrize("form", ["folder", "around", "archive", "folder with the archive"])
def test_cifar10_binary(tmp_path, form):
    inner = tmp_path / "cifar-10-batches-bin"
    parts = cifar10(inner)
    place = {"folder": inner, "around": tmp_path}.get(form)
    if place is None:
        place = tmp_path / "there" / "cifar-10-binary.tar.gz"
        place.parent.mkdir()
        with tarfile.open(place, "w:gz") as tar:
            tar.add(inner, "cifar-10-batches-bin")
        place = place.parent if "folder" in form else place
    found = load_images("cifar10", str(place))
    assert {k: len(s) for k, s in found.splits.items()} == {"train": 90, "val": 10, "test": 7}
    assert found.classes == tuple("abcdefghij")
    record = parts["test_batch.bin"][3]
    assert found.splits["test"].labels[3] == record[0]
    red_green_blue = [record[1 + c * 1024 + 5 * 32 + 9] for c in range(3)]  # row 5, column 9
    assert found.splits["test"].images[3][5, 9].tolist() == red_green_blue
    everything = load_images("cifar10", str(place), validate="none")
    assert {k: len(s) for k, s in everything.splits.items()} == {"train": 100, "test": 7}
    rows = np.concatenate([parts[f"data_batch_{i}.bin"] for i in range(1, 6)])
    assert sorted(p.tobytes() for p in everything.splits["train"].images.array) == sorted(
        np.ascontiguousarray(r[1:].reshape(3, 32, 32).transpose(1, 2, 0)).tobytes() for r in rows
    )


def test_cifar100_has_its_fine_labels(tmp_path):
    table = cifar_records(40, 2, 20)
    table[:, 1] = DRAW.integers(0, 100, 40)
    for name in ("train.bin", "test.bin"):
        (tmp_path / name).write_bytes(table.tobytes())
    found = load_images("cifar100", str(tmp_path))
    assert found.splits["test"].labels.tolist() == table[:, 1].tolist()
    assert len(found.classes) == 100


def test_cifar_as_pictures_in_a_zip(tmp_path):
    path = tmp_path / "cifar10_jpeg.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for split in ("train", "test"):
            for c in range(10):
                for i in range(10):
                    content = io.BytesIO()
                    Image.new("RGB", (32, 32), (25 * c, 0, 0)).save(content, "png")
                    archive.writestr(f"{split}/class{c}/{i:04d}.png", content.getvalue())
    for place in (path, tmp_path):
        found = load_images("cifar10", str(place))
        assert {k: len(s) for k, s in found.splits.items()} == {"train": 90, "val": 10, "test": 100}
        assert all((found.splits["test"].images[i][..., 0] == 25 * y).all() for i, y in
                   enumerate(found.splits["test"].labels))  # fmt: skip


def test_cifar_refusals(tmp_path):
    with pytest.raises(UserError, match=r"holds no data_batch_1\.bin"):
        load_images("cifar10", str(tmp_path))
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"")
    with pytest.raises(UserError, match="is a pickle, which may run anything"):
        load_images("cifar10", str(tmp_path))
    parts = cifar10(tmp_path / "bin")
    (tmp_path / "bin" / "data_batch_2.bin").write_bytes(parts["data_batch_2.bin"].tobytes()[:-1])
    with pytest.raises(UserError, match=r"data_batch_2\.bin has 61459 bytes, which are not records of 3073"):
        load_images("cifar10", str(tmp_path / "bin"))
    (tmp_path / "bin" / "data_batch_2.bin").unlink()
    with pytest.raises(UserError, match=r"has no data_batch_2\.bin"):
        load_images("cifar10", str(tmp_path / "bin"))
    (tmp_path / "no.tar.gz").write_bytes(b"nothing")
    with pytest.raises(UserError, match="damaged or no tar archive"):
        load_images("cifar10", str(tmp_path / "no.tar.gz"))


# -- the sets of photographs ------------------------------------------------------------------------------------------


def make_aircraft(root):
    base = root / "fgvc-aircraft-2013b" / "data"
    for i in range(90):
        picture(base / "images" / f"{i:07d}.jpg", i)
    (base / "variants.txt").write_text("707-320\nA340 600\nMD-11\n")
    for level in ("families", "manufacturers"):
        (base / f"{level}.txt").write_text("x\n")
    for k, split in enumerate(("train", "val", "test")):
        lines = [f"{i:07d} {('707-320', 'A340 600', 'MD-11')[i % 3]}\n" for i in range(30 * k, 30 * k + 30)]
        (base / f"images_variant_{split}.txt").write_text("".join(lines))


def make_cars(root):
    base = root / "stanford_cars"
    kind = np.dtype([("bbox_x1", object), ("class", object), ("fname", object)])
    for k, split in enumerate(("train", "test")):
        rows = [(1, 1 + i % 2, f"{i:05d}.jpg") for i in range(30 * k, 30 * k + 30)]
        for _, _, name in rows:
            picture(base / f"cars_{split}" / name, int(name[:5]))
        path = base / ("devkit/cars_train_annos.mat" if k == 0 else "cars_test_annos_withlabels.mat")
        path.parent.mkdir(exist_ok=True)
        savemat(path, {"annotations": np.array(rows, kind)[None]})
    savemat(base / "devkit" / "cars_meta.mat", {"class_names": np.array([["Audi A3", "VW Golf"]], object)})


def make_flowers102(root):
    base = root / "flowers-102"
    for i in range(1, 61):
        picture(base / "jpg" / f"image_{i:05d}.jpg", i)
    savemat(base / "imagelabels.mat", {"labels": (np.arange(60) % 3 + 1)[None].astype(np.uint8)})
    ids = {"trnid": np.arange(1, 21), "valid": np.arange(21, 31), "tstid": np.arange(31, 61)[::-1]}
    savemat(base / "setid.mat", {k: v[None].astype(np.uint16) for k, v in ids.items()})


def make_food101(root):
    base = root / "food-101"
    (base / "meta").mkdir(parents=True)
    (base / "meta" / "classes.txt").write_text("apple_pie\nramen\n")
    for k, split in enumerate(("train", "test")):
        names = [f"{('apple_pie', 'ramen')[i % 2]}/{i}" for i in range(30 * k, 30 * k + 30)]
        (base / "meta" / f"{split}.txt").write_text("\n".join(names) + "\n")
        (base / "meta" / f"{split}.json").write_text(json.dumps({"apple_pie": names[::2], "ramen": names[1::2]}))
        for name in names:
            picture(base / "images" / f"{name}.jpg", int(name.split("/")[1]))


def make_pets(root):
    base = root / "oxford-iiit-pet"
    (base / "annotations").mkdir(parents=True)
    for k, split in enumerate(("trainval", "test")):
        names = [f"{('Abyssinian', 'great_pyrenees')[i % 2]}_{i}" for i in range(30 * k, 30 * k + 30)]
        lines = [f"{name} {1 + i % 2} {1 + i % 2} 1\n" for i, name in enumerate(names)]
        (base / "annotations" / f"{split}.txt").write_text("".join(lines))
        for name in names:
            picture(base / "images" / f"{name}.jpg", int(name.rpartition("_")[2]))


def make_cub200(root):
    base = root / "CUB_200_2011"
    names = [f"{1 + i % 2:03d}.{('Albatross', 'Auklet')[i % 2]}/bird_{i}.jpg" for i in range(60)]
    for i, name in enumerate(names):
        picture(base / "images" / name, i)
    write = {
        "images.txt": [f"{i + 1} {n}" for i, n in enumerate(names)],
        "image_class_labels.txt": [f"{i + 1} {1 + i % 2}" for i in range(60)],
        "train_test_split.txt": [f"{i + 1} {int(i < 30)}" for i in range(60)],
        "classes.txt": ["1 001.Albatross", "2 002.Auklet"],
    }
    for name, lines in write.items():
        (base / name).write_text("\n".join(lines) + "\n")


SETS = {
    "aircraft": (make_aircraft, "FGVCAircraft", ("train", "val", "test"), 3),
    "cars": (make_cars, "StanfordCars", ("train", "test"), 2),
    "cub200": (make_cub200, None, ("train", "test"), 2),
    "flowers102": (make_flowers102, "Flowers102", ("train", "val", "test"), 3),
    "food101": (make_food101, "Food101", ("train", "test"), 2),
    "pets": (make_pets, "OxfordIIITPet", ("trainval", "test"), 2),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SETS)
def test_a_set_of_photographs_is_read_as_torchvision_reads_it(tmp_path, monkeypatch, name):
    """The same pictures with the same labels; torchvision knows no CUB-200, of which the labels are known here."""
    make, theirs, splits, classes = SETS[name]
    make(tmp_path)
    found = load_images(name, str(tmp_path))
    inner = next(p for p in tmp_path.iterdir())
    assert load_images(name, str(inner)).sha256 == found.sha256
    assert len(found.classes) == classes
    monkeypatch.setattr(datasets.Flowers102, "_check_integrity", lambda self: True)  # made-up files, other MD5s
    for split in splits:
        ours = [found.splits["train" if split == "trainval" else split]]
        if split.startswith("train") and "val" not in splits:
            ours = [found.splits["train"], found.splits["val"]]
        pairs = sorted(p for part in ours for p in zip(shades(part), part.labels.tolist(), strict=True))
        if theirs is None:
            start = 30 * (split == "test")
            assert pairs == [(i, i % 2) for i in range(start, start + 30)]
            continue
        oracle = getattr(datasets, theirs)(str(tmp_path), split)
        assert pairs == sorted((int(np.asarray(x).mean().round()), y) for x, y in oracle)
        if hasattr(oracle, "classes") and name in ("aircraft", "food101", "cars"):
            assert list(found.classes) == list(oracle.classes)
    if "val" not in splits:
        assert {k: len(s) for k, s in found.splits.items()} == {"train": 27, "val": 3, "test": 30}


def test_refused_sets(tmp_path):
    for name in SETS:
        with pytest.raises(UserError, match="--data-dir must be the folder of"):
            load_images(name, str(tmp_path))
        with pytest.raises(UserError, match="needs --data-dir"):
            load_images(name)
    make_food101(tmp_path)
    (tmp_path / "food-101" / "images" / "ramen" / "3.jpg").unlink()
    with pytest.raises(UserError, match=r"ramen/3\.jpg is not there, though the train list of food101 names it"):
        load_images("food101", str(tmp_path))
    make_flowers102(tmp_path)
    (tmp_path / "flowers-102" / "setid.mat").write_bytes(b"no matrix at all")
    with pytest.raises(UserError, match=r"setid\.mat is damaged or no MATLAB file"):
        load_images("flowers102", str(tmp_path))
    make_aircraft(tmp_path)
    path = tmp_path / "fgvc-aircraft-2013b" / "data" / "images_variant_val.txt"
    path.write_text("0000003 Concorde\n")
    with pytest.raises(UserError, match=r"'Concorde', which .*variants\.txt lacks"):
        load_images("aircraft", str(tmp_path))
    path.write_text("0000003\n")
    with pytest.raises(UserError, match="line 1: '0000003' has 1 words instead of 2"):
        load_images("aircraft", str(tmp_path))
    make_cars(tmp_path)
    kind = np.dtype([("bbox_x1", object), ("fname", object)])
    unlabelled = np.array([(1, "00030.jpg"), (1, "00031.jpg")], kind)[None]
    savemat(tmp_path / "stanford_cars" / "cars_test_annos_withlabels.mat", {"annotations": unlabelled})
    with pytest.raises(UserError, match="the one with labels is needed"):
        load_images("cars", str(tmp_path))
    with pytest.raises(UserError, match="no known set"):
        load_images("mnist", str(tmp_path))


def test_downloads_that_cannot_be(tmp_path):
    with pytest.raises(UserError, match="knows no source of cars"):
        fetch("cars", str(tmp_path))
    with pytest.raises(UserError, match="needs --data-dir"):
        fetch("pets", "")


# -- folders, zips and damaged files ----------------------------------------------------------------------------------


def zipped(folder, path, prefix=""):
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*")):
            archive.write(file, f"{prefix}{file.relative_to(folder)}")


@pytest.mark.slow
@pytest.mark.parametrize("splits", [("train", "val", "test"), ("train", "test"), ("all",)])
def test_a_zip_holds_what_its_folder_holds(tmp_path, splits):
    folder = image_folder(tmp_path / "pets", 20, splits=splits)
    zipped(folder, tmp_path / "pets.zip", "pets-1.0/")
    plain, packed = (load_images("folder", str(tmp_path / n)) for n in ("pets", "pets.zip"))
    assert plain.classes == packed.classes == ("cat", "dog")
    for name, split in plain.splits.items():
        other = packed.splits[name]
        assert np.array_equal(split.labels, other.labels)
        assert all(np.array_equal(split.images[i], other.images[i]) for i in range(len(split)))


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_damaged_pictures_are_named_and_refused_or_left_out(tmp_path, kind):
    folder = image_folder(tmp_path / "pets", 12)
    whole = (folder / "train" / "cat" / "3.png").read_bytes()
    (folder / "train" / "cat" / "3.png").write_bytes(whole[: len(whole) // 2])
    (folder / "train" / "dog" / "7.png").write_bytes(b"no picture")
    noise = Image.fromarray(DRAW.integers(0, 256, (64, 64, 3)).astype(np.uint8))
    noise.save(folder / "test" / "dog" / "x.jpg")
    content = (folder / "test" / "dog" / "x.jpg").read_bytes()
    (folder / "test" / "dog" / "x.jpg").write_bytes(content[: len(content) * 2 // 3])
    place = folder
    if kind == "zip":
        place = tmp_path / "pets.zip"
        zipped(folder, place)
    with pytest.raises(UserError, match=r"3\.png is not a picture .*\(3 such files\).*--bad-images skip"):
        load_images("folder", str(place))
    said = []
    left = load_images("folder", str(place), bad="skip", say=said.append)
    assert {k: len(s) for k, s in left.splits.items()} == {"train": 22, "val": 24, "test": 24}
    assert (np.bincount(left.splits["train"].labels) == 11).all()
    assert "left out 3 damaged pictures" in said[0]
    assert all(name in said[0] for name in ("cat/3.png", "dog/7.png", "dog/x.jpg"))
    unseen = load_images("folder", str(place), bad="unchecked")
    with pytest.raises(UserError, match=r"3\.png is not a picture that can be read: image file is truncated"):
        [unseen.splits["train"].images[i] for i in range(24)]


def test_a_damaged_zip(tmp_path):
    (tmp_path / "a.zip").write_bytes(b"PK no zip")
    with pytest.raises(UserError, match="damaged or no zip"):
        load_images("folder", str(tmp_path / "a.zip"))


def test_only_train_is_refused_and_not_cut(tmp_path):
    image_folder(tmp_path / "pets", 4, splits=("train",))
    with pytest.raises(UserError, match="has train, and needs train and test"):
        load_images("folder", str(tmp_path / "pets"))


def test_the_names(tmp_path):
    random_file(tmp_path, "bloodmnist", 30)
    found = load_images("bloodmnist", str(tmp_path), verify=False)
    assert found.size == 28
    assert found.splits["val"].images[0].shape == (28, 28, 3)
    digits = load_images("digits")
    assert digits.splits["test"].images[5].shape == (8, 8, 3)
    assert len(set(NAMES)) == 22


@pytest.mark.slow
def test_the_real_cifar10(real_data):
    """Not decoded here: tests/common/test_classifiers.py looks at some of its pictures."""
    (path,) = (real_data / "cifar10").glob("*.zip")
    found = load_images("folder", str(path), bad="unchecked")
    assert {k: len(s) for k, s in found.splits.items()} == {"train": 45000, "val": 5000, "test": 10000}
    assert found.classes[:3] == ("airplane", "automobile", "bird")
    assert (np.bincount(found.splits["val"].labels) == 500).all()


# -- in memory, and folds ----------------------------------------------------------------------------------------------


def test_digits_are_all_there_once():
    images = load_images("digits")
    counts = {name: len(s) for name, s in images.splits.items()}
    assert counts == {"train": 1197, "val": 200, "test": 400}
    rows = np.concatenate([s.images.array.reshape(len(s), -1) for s in images.splits.values()])
    from sklearn.datasets import load_digits

    theirs = np.round(load_digits().data * 255 / 16).astype(np.uint8)
    assert sorted(map(bytes, rows)) == sorted(map(bytes, theirs))
    assert images.sha256 == load_images("digits").sha256


def test_folders_in_splits_and_without(tmp_path):
    three = load_images("folder", str(image_folder(tmp_path / "three", 5)), size=8, fit=True)
    assert {n: len(s) for n, s in three.splits.items()} == {"train": 10, "val": 10, "test": 10}
    assert three.classes == ("cat", "dog")
    assert three.task == "binary-class"
    assert three.splits["test"].images.array.shape == (10, 8, 8, 3)
    bright = [three.splits["val"].images.array[three.splits["val"].labels == c].mean() for c in (0, 1)]
    assert bright[0] < 60 < 100 < bright[1]  # labels belong to their pictures
    two = load_images("folder", str(image_folder(tmp_path / "two", 20, splits=("train", "test"))), size=8, fit=True)
    assert {n: len(s) for n, s in two.splits.items()} == {"train": 36, "val": 4, "test": 40}
    flat = image_folder(tmp_path / "flat", 20, splits=("all",), classes=("a", "b", "c")) / "all"
    one = load_images("folder", str(flat), size=8, fit=True)
    assert {n: len(s) for n, s in one.splits.items()} == {"train": 48, "val": 6, "test": 6}
    assert all(set(s.labels) == {0, 1, 2} for s in one.splits.values())


@pytest.mark.parametrize("form", ["folder", "zip"])
def test_what_is_not_read_is_said(tmp_path, form):
    """Sub-folders, other endings, and pictures that lie in no class's folder; notes beside the classes are none."""
    flat = image_folder(tmp_path / "flat", 10, splits=("pets",)) / "pets"
    for name in (
        "cat/far/0.png",
        "dog/1.gif",
        "dog/notes.txt",
        "top.JPG",
        "README.md",
        "cat/.hidden.png",
        ".git/x.png",
    ):
        (flat / name).parent.mkdir(exist_ok=True)
        (flat / name).write_bytes(b"x")
    zipped(flat, tmp_path / "pets.zip")
    place, said = tmp_path / "pets.zip" if form == "zip" else flat, []
    found = load_images("folder", str(place), bad="unchecked", say=said.append)
    assert sum(map(len, found.splits.values())) == 20
    assert [line.split(";")[0] for line in said] == [
        f"left out 4 files of {place.name}: cat/far/0.png, dog/1.gif, dog/notes.txt and 1 more"
    ]
    said.clear()
    load_images("folder", str(image_folder(tmp_path / "clean", 3)), bad="unchecked", say=said.append)
    assert said == []


def test_a_split_of_another_name_is_said(tmp_path):
    folder, said = image_folder(tmp_path / "x", 2, splits=("train", "val", "test", "extra")), []
    load_images("folder", str(folder), size=8, fit=True, say=said.append)
    assert said[0].startswith("left out 4 files of x: extra/cat/0.png, extra/cat/1.png, extra/dog/0.png and 1 more; ")


def test_refused_folders(tmp_path):
    with pytest.raises(UserError, match="needs --data-dir"):
        load_images("folder")
    with pytest.raises(UserError, match="not a folder"):
        load_images("folder", str(tmp_path / "none"))
    with pytest.raises(UserError, match="no two folders of pictures side by side"):
        load_images("folder", str(tmp_path))
    lacking = image_folder(tmp_path / "lacking", 2)
    (lacking / "val" / "dog").rename(lacking / "val" / "wolf")
    with pytest.raises(UserError, match="differ in the class 'dog'"):
        load_images("folder", str(lacking))
    broken = image_folder(tmp_path / "broken", 2)
    (broken / "train" / "cat" / "0.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"0\.png is not a picture"):
        load_images("folder", str(broken), fit=True)
    empty = image_folder(tmp_path / "empty", 2)
    for path in (empty / "test" / "dog").iterdir():
        path.unlink()
    with pytest.raises(UserError, match="holds no picture"):
        load_images("folder", str(empty))
    no_test = image_folder(tmp_path / "no_test", 2, splits=("train", "val"))
    with pytest.raises(UserError, match="needs train and test"):
        load_images("folder", str(no_test))


def test_folds_validate_on_everything_once():
    images = load_images("digits")
    seen = []
    for k in range(4):
        part = fold(images, k, 4)
        assert len(part.splits["train"]) + len(part.splits["val"]) == 1397
        assert part.splits["test"] is images.splits["test"]
        seen += [
            bytes(i) + bytes([y])
            for i, y in zip(part.splits["val"].images.array, part.splits["val"].labels, strict=True)
        ]
    both = [images.splits["train"], images.splits["val"]]
    assert sorted(seen) == sorted(
        bytes(i) + bytes([y]) for s in both for i, y in zip(s.images.array, s.labels, strict=True)
    )
    with pytest.raises(UserError, match="2000 folds"):
        fold(images, 0, 2000)


@pytest.mark.parametrize("ending", ["png", "tiff"])
def test_grey_of_16_bits_is_scaled_and_not_cut_off(ending):
    grey = DRAW.integers(0, 65536, (9, 7)).astype(np.uint16)
    content = io.BytesIO()
    Image.fromarray(grey).save(content, ending)
    found = decode(content.getvalue(), "x")
    assert np.array_equal(found, np.repeat(np.round(grey / 257).astype(np.uint8)[..., None], 3, -1))


@pytest.mark.parametrize(("kind", "said"), [(np.float32, "floating-point numbers"), (np.int32, "ones of 32 bits")])
def test_pictures_whose_range_nothing_says_are_refused(kind, said):
    content = io.BytesIO()
    Image.fromarray(DRAW.integers(0, 2, (9, 7)).astype(kind)).save(content, "tiff")
    with pytest.raises(UserError, match=said):
        decode(content.getvalue(), "x")


def pictures_in(folder, splits, classes="ab", each=3):
    for split in splits:
        for c in classes:
            (folder / split / c).mkdir(parents=True)
            for i in range(each):
                Image.new("RGB", (4, 4), (i, 0, 0)).save(folder / split / c / f"{i}.png")


@pytest.mark.parametrize("word", ["valid", "validation", "dev", "Val"])
def test_a_split_has_any_usual_name(tmp_path, word):
    pictures_in(tmp_path, ("train", word, "test"))
    assert {k: len(s) for k, s in picture_folder(tmp_path).splits.items()} == {"train": 6, "val": 6, "test": 6}
    pictures_in(tmp_path, ("eval", "VALID" if word != "Val" else "dev"))
    with pytest.raises(UserError, match="which mean the same split"):
        picture_folder(tmp_path)


@pytest.mark.parametrize(
    "classes", [("training", "swimming"), ("dev", "ops"), ("validation", "other"), ("Test", "Control")]
)
def test_classes_may_be_called_as_splits_are(tmp_path, classes):
    for folder in (tmp_path / "bare", tmp_path / "wrapped" / "Training"):
        pictures_in(folder, [""], classes=classes, each=10)
    for folder in ("bare", "wrapped"):
        found = picture_folder(tmp_path / folder)
        assert found.classes == tuple(sorted(classes))
        assert {k: len(s) for k, s in found.splits.items()} == {"train": 16, "val": 2, "test": 2}


def test_val_itself_goes_before_other_names(tmp_path):
    pictures_in(tmp_path, ("train", "test", "val"))
    pictures_in(tmp_path, ("dev",), each=5)
    assert len(picture_folder(tmp_path).splits["val"]) == 6


def test_too_few_pictures_to_cut_are_refused(tmp_path):
    pictures_in(tmp_path, [""], each=1)
    with pytest.raises(UserError, match="has too few pictures for"):
        picture_folder(tmp_path)


def test_a_class_of_which_nothing_is_left_to_train_on_is_refused(tmp_path):
    pictures_in(tmp_path, [""], classes="abc", each=1)
    with pytest.raises(UserError, match=r"too few pictures of '[abc]', of which none is left for train"):
        picture_folder(tmp_path)


def test_one_class_alone_is_refused(tmp_path):
    pictures_in(tmp_path, [""], classes="a")
    with pytest.raises(UserError, match="no two folders of pictures side by side"):
        picture_folder(tmp_path)
