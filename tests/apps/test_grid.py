"""Grids: products, settings that are read, learning rates, names; and mistakes that name the file and the key."""

import dataclasses

import pytest
from memtrain_apps.ablate.config import AblateConfig, configure
from memtrain_apps.ablate.grid_file import grid_of, read_grid
from memtrain_apps.compose.axes import Axes, names
from memtrain_common.errors import UserError


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
        ("save = 'backrazor'\nrazor-mode = 'papr'", "razor_mode 'papr' is unknown: choose from low-bit, pruned, paper"),
        ("seeds = 0", "seeds must be how many, at least 1"),
        ("seeds = [1, 1]", "seeds must be how many"),
        ("seeds = true", "seeds must be how many"),
        ("seeds = 10001", "at most 10,000"),
        ("seeds = [9223372036854775808]", r"below 2\^63"),
        ("rank = 100000000000000000000000", "rank is out of range"),
        ("alpha = 1" + 400 * "0", "alpha is out of range"),
        ("save = 'checkpoint'\ncheckpoint_blocks = 'a/b'", "checkpoint_blocks 'a/b' names no blocks: give 4 for the"),
        ("save = 'checkpoint'\ncheckpoint_blocks = ['2', '" + "0," * 32 + "0']", "at most 64 characters"),
        ("save = 'backrazor'\nrazor_blocks = '../../up'", "razor_blocks '../../up' names no blocks"),
        ("lr = 0", "lr must be above 0, got 0"),
        ("[lr]\nlorra = 1e-3", r"\[lr\] has the key 'lorra'"),
        ("[lr]\nlora = 'x'", "lr lora must be numbers"),
        ("[finetune]\nepoch = 3", r"unknown key 'epoch' in \[finetune\] \(did you mean epochs\?\)"),
        ("[finetune]\nrank = 3", r"rank in \[finetune\] is compared, not fixed"),
        ("[finetune]\nseed = 3", r"seed in \[finetune\] is ablate's own: it sets that flag"),
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
        "train = 'bitfit'\nseeds = 2\n[lr]\nbitfit = 0.1\n"
        "[finetune]\nlabels = [1, 2]\nepochs = 9\n[pretrain]\nepochs = 1\n"
    )
    file = str(tmp_path / "g.toml")
    plain = configure([file]).grid
    assert (len(plain.combinations()), plain.seeds, plain.pretrain) == (1, (0, 1), {"epochs": 1})
    words = ["--train", "full", "lora", "--save", "all", "backrazor", "--keep", "0.05", "0.1", "--seeds", "3"]
    words += ["--lr", "0.5"]
    grid = configure([file, *words]).grid
    assert len(grid.combinations()) == 6
    assert (grid.seeds, grid.finetune) == ((0, 1, 2), plain.finetune)
    assert all(c.lr == 0.5 for c in grid.combinations())

    shorter = configure([file, "--", "--epochs", "2", "--no-compile"]).grid
    assert shorter.finetune == {"labels": [1, 2], "epochs": ["2"], "compile": False}
    assert shorter.pretrain == plain.pretrain
    other = configure([file, "--", "--data=folder", "--data-dir", "pets"]).grid
    assert (other.finetune, other.pretrain, other.lr) == ({"data": ["folder"], "data_dir": ["pets"]}, None, {})
    elsewhere = configure([file, "--", "--model", "resnet18"]).grid
    assert (elsewhere.finetune["model"], elsewhere.pretrain, elsewhere.lr) == (["resnet18"], None, {})
    with pytest.raises(UserError, match="unexpected word '3' after --"):
        configure([file, "--", "3"])
    with pytest.raises(UserError, match=r"rank in \[finetune\] is compared"):
        configure([file, "--", "--rank", "3"])


@pytest.mark.parametrize("name", ["minilm", "dinov2"])
def test_a_grid_that_comes_without_a_model_has_its_rates_for_the_one_that_is_named(name):
    """They were searched for that model; a head alone has its own, not that of a head beside something else."""
    grid = configure([name, "--", "--model", "FOLDER"]).grid
    assert grid.lr
    for combination in grid.combinations():
        words = grid.words(combination)
        rate = grid.lr.get(f"{combination.axes.train}+{combination.axes.optim}", grid.lr.get(combination.axes.train))
        if not combination.lr_listed and rate:
            assert words[words.index("--lr") + 1] == f"{rate:g}"
        assert "--lr" in words, combination.name
        assert ("--head-lr" in words) == (combination.axes.train != "head")
    digits = configure(["digits", "--", "--model", "resnet18"]).grid
    assert digits.lr == {}, "the file pretrains a model of its own, which its rates were for"


def test_blocks_and_close_learning_rates_are_arms_of_their_own():
    grid = grid_of({"save": "checkpoint", "checkpoint_blocks": ["2", "0-1"], "train": "full"})
    assert [c.axes.checkpoint_blocks for c in grid.combinations()] == ["2", "0-1"]
    with pytest.raises(UserError, match="checkpoint_blocks must be words"):
        grid_of({"save": "checkpoint", "checkpoint_blocks": [0.5]})
    close = grid_of({"lr": [1.2345678e-4, 1.2345679e-4], "seeds": 1})
    assert len({arm.name for arm in close.arms()}) == 2
    assert [float(c.words[-1]) for c in close.combinations()] == [1.2345678e-4, 1.2345679e-4]
