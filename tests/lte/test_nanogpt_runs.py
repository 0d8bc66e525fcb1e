"""nanoGPT's own files on its own layout of data: they train, they evaluate, and its own runs go on."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from lte.cli import configure, train
from lte.tasks.sample import sample
from memtrain_common.data.text.corpus import Crops, load_corpus
from memtrain_common.data.text.nanogpt_meta import write_meta_pickle
from memtrain_common.errors import UserError
from memtrain_common.models.gpt import GPT, GPTConfig, next_token_loss
from memtrain_common.models.gpt_files import PlainGPT, write_gpt2
from memtrain_common.runs.checkpoint import load
from memtrain_common.training.schedule import cosine_with_warmup

from tests.lte.nanogpt_configs import FILES

LETTERS = "\n !abcdefghijklmnopqrstuvwxyz"
SMALL = ["--n_layer=2", "--n_head=2", "--n_embd=16", "--block_size=8", "--max_iters=2", "--eval_iters=1"]
QUICK = ["--gradient_accumulation_steps=1", "--device=cpu", "--compile=False", "--sample_tokens=0", "--tracker=none"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A working folder with nanoGPT's files and data sets, and a tiny GPT-2."""
    folder = tmp_path_factory.mktemp("nanogpt")
    (folder / "config").mkdir()
    for name, text in FILES.items():
        (folder / "config" / f"{name}.py").write_text(text)
    random = np.random.default_rng(0)
    for name, size in (("shakespeare_char", len(LETTERS)), ("shakespeare", 300), ("openwebtext", 300),
                       ("cnn_dailymail", 300)):  # fmt: skip
        data = folder / "data" / name
        data.mkdir(parents=True)
        for split, n in (("train", 600), ("val", 80)):
            random.integers(0, size, n).astype("<u2").tofile(data / f"{split}.bin")
    write_meta_pickle(folder / "data" / "shakespeare_char" / "meta.pkl", LETTERS)
    torch.manual_seed(0)
    config = GPTConfig(block_size=16, vocab_size=50257, n_layer=1, n_head=2, n_embd=8, dropout=0.0, bias=True)
    write_gpt2(folder / "gpt2-tiny", PlainGPT(config, dict(GPT(config).state_dict())))
    return folder


@pytest.fixture
def here(place, tmp_path, monkeypatch):
    """A folder of the test's own that sees them."""
    for name in ("config", "data", "gpt2-tiny"):
        (tmp_path / name).symlink_to(place / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


TRAINED = [name for name in FILES if not name.startswith("eval_")]


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED)
def test_its_own_file_trains_two_steps(name, here, capsys):
    """What the command line adds makes it small, and names weights that are here."""
    weights = ["--init_from=gpt2-tiny"] if "init_from = 'gpt2" in FILES[name].replace('"', "'") else []
    heads = [] if "lora" in name or "finetune_shakespeare" in name else ["--lora_r=2"]
    train([f"config/{name}.py", *SMALL, *QUICK, *weights, *heads, "--out_dir=run", "--wandb_log=False"])
    said = json.loads(Path("run/config.json").read_text())
    config = said["config"]
    assert config["data_dir"] == str(here / "data" / said["data"]["name"])
    assert config["tokenizer"] == ("chars" if "char" in name else "gpt2")
    assert json.loads(Path("run/result.json").read_text())["steps"] == 2
    if "lte" in name:  # its defaults, not nanoGPT's: 0 where the file says nothing
        assert config["warmup_iters"] == (100 if "warmup_iters" in FILES[name] else 0)
        assert (config["lte_mode"], config["wandb_project"]) == (
            "parallel" if "dmp" in FILES[name] else "sequential", "Parallel-Lora",
        )  # fmt: skip
    if name == "train_shakespeare_char_lte":
        assert (config["lte_heads"], config["lora_alpha"], config["lte_merge_steps"]) == (32, 4096.0, 10)
    if name == "finetune_shakespeare":
        assert (config["lte_heads"], config["decay_lr"], config["learning_rate"]) == (1, False, 3e-5)
        assert "lte_heads: 1, because 4 cannot share a batch of 1" in capsys.readouterr().out
    if name == "lora_shakespeare":
        assert (config["method"], config["lora_r"], config["lora_alpha"], config["lte_heads"]) == ("lte", 8, 32.0, 1)
        assert (config["lte_trainable"], config["skip_mlp"], config["lte_merge_steps"]) == ([], True, 0)
    if name == "train_gpt2":
        assert "the warm-up of 2000 steps is longer than the run of 2: the learning rate rises to the end" in (
            capsys.readouterr().out
        )


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("eval_")])
def test_its_evaluations_evaluate(name, here, capsys):
    train([f"config/{name}.py", *SMALL, *QUICK, "--init_from=gpt2-tiny"])
    assert "gpt2-tiny: validation loss" in capsys.readouterr().out
    assert not Path("out").exists()
    assert not Path("runs").exists()


def test_bins_say_what_their_tokens_are(here):
    """A tokenizer that nobody asked for yields; one that was asked for does not."""
    words = ["config/train_shakespeare_char.py", *SMALL, *QUICK]
    assert configure(words).tokenizer == "chars"
    assert configure([*words, "--dataset=openwebtext"]).tokenizer == "gpt2"
    assert configure(["--data-dir", "data/shakespeare_char"]).tokenizer == "chars"
    with pytest.raises(UserError, match="hold chars tokens, not gpt2"):
        train([*words, "--tokenizer=gpt2", "--out_dir=x"])
    assert not Path("x").exists()


def test_the_warm_up_of_a_short_run(here):
    """It is the user's, or nanoGPT's own; where nobody set it, it shrinks with the run."""
    assert configure([]).warmup_iters == 50
    assert configure(["--max-iters", "30"]).warmup_iters == 1
    assert configure(["--max-iters", "2000"]).warmup_iters == 50
    assert configure(["--max-iters", "30", "--warmup-iters", "50"]).warmup_iters == 50
    assert configure(["--max-iters", "30", "--lr-decay-iters", "900"]).warmup_iters == 50
    assert configure(["shakespeare-char", "--data-dir", "x", "--max-iters", "500"]).warmup_iters == 10
    assert configure(["config/train_gpt2.py", "--max_iters=2"]).warmup_iters == 2000
    rising = [cosine_with_warmup(t, warmup_iters=50, decay_iters=30, min_ratio=0.1) for t in range(30)]
    assert rising == pytest.approx([(t + 1) / 51 for t in range(30)])  # nanoGPT's get_lr


def test_what_the_command_line_gives_may_be_anything_in_the_file(here):
    Path("computed.py").write_text("import os\nbatch_size = int(os.environ['B'])\nn_layer = 3\nwandb_log = True\n")
    found = configure(["computed.py", "--batch_size=24", "--wandb_log=False"])
    assert (found.batch_size, found.n_layer, found.tracker) == (24, 3, "auto")
    assert configure(["computed.py", "--batch-size", "24"]).tracker == "wandb"
    with pytest.raises(UserError, match=r"line 2: batch_size must be a number.*give it as --batch_size=VALUE"):
        configure(["computed.py"])


# -- a run of nanoGPT's


SHAPE = GPTConfig(block_size=8, vocab_size=len(LETTERS), n_layer=2, n_head=2, n_embd=16, dropout=0.0, bias=False)
RATE, WARMUP, DECAY, BEFORE, AFTER = 1e-3, 3, 40, 7, 20


class ByHand:
    """nanoGPT's training, written out: torch's AdamW over its two groups, its schedule, its clipping."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(1)
        self.model = GPT(SHAPE)
        named = [p for _, p in self.model.named_parameters()]
        groups = [
            {"params": [p for p in named if p.dim() >= 2], "weight_decay": 0.2},
            {"params": [p for p in named if p.dim() < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.8, 0.97))
        self.crops = Crops(
            load_corpus(str(folder / "data" / "shakespeare_char")), batch_size=4, block_size=8, seed=1337
        )

    def steps(self, first: int, last: int) -> None:
        for t in range(first, last):
            factor = cosine_with_warmup(t, warmup_iters=WARMUP, decay_iters=DECAY, min_ratio=0.1)
            for group in self.optimizer.param_groups:
                group["lr"] = RATE * factor
            self.optimizer.zero_grad(set_to_none=True)
            next_token_loss(self.model, self.crops(t)).backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()

    def save(self, path: Path, **changed: object) -> None:
        arguments = {name: getattr(SHAPE, name) for name in SHAPE.__dataclass_fields__}
        content = {
            "model": {f"_orig_mod.{name}": value for name, value in self.model.state_dict().items()},
            "optimizer": self.optimizer.state_dict(),
            "model_args": arguments,
            "iter_num": BEFORE,
            "best_val_loss": torch.tensor(2.5),
            "config": {"dataset": "shakespeare_char", "learning_rate": RATE},
        }
        path.parent.mkdir(exist_ok=True)
        torch.save({**content, **changed}, path)


FLAGS = [
    "--dataset=shakespeare_char", "--batch_size=4", "--gradient_accumulation_steps=1", f"--learning_rate={RATE}",
    f"--min_lr={RATE / 10}", f"--warmup_iters={WARMUP}", f"--lr_decay_iters={DECAY}", f"--max_iters={BEFORE + AFTER}",
    "--eval_interval=100", "--eval_iters=1", "--device=cpu", "--sample_tokens=0", "--tracker=none",
]  # fmt: skip


@pytest.fixture(scope="module")
def nanogpts(place):
    """nanoGPT's run after a few steps, saved, and its model after twenty more."""
    by_hand = ByHand(place)
    by_hand.steps(0, BEFORE)
    by_hand.save(place / "out" / "ckpt.pt")
    by_hand.steps(BEFORE, BEFORE + AFTER)
    return place / "out", by_hand


@pytest.mark.slow
def test_a_nanogpt_run_goes_on_as_it_would_have(here, nanogpts, capsys):
    """Twenty steps from its ckpt.pt, in two parts, and torch's AdamW that was never stopped: the same weights."""
    folder, by_hand = nanogpts
    shutil.copytree(folder, "out")
    train(["--init_from=resume", "--out_dir=out", *FLAGS[:-6], "--max_iters=15", *FLAGS[-5:]])
    assert "goes on with out/ckpt.pt after its 7 iterations" in capsys.readouterr().out
    config = json.loads(Path("out/config.json").read_text())["config"]
    assert (config["method"], config["beta1"], config["beta2"], config["weight_decay"]) == ("full", 0.8, 0.97, 0.2)
    train(["--init_from=resume", "--out_dir=out", f"--max_iters={BEFORE + AFTER}"])  # now a run of ours
    state = load(Path("out/checkpoints") / f"step-{BEFORE + AFTER:08d}")
    for name, value in by_hand.model.state_dict().items():
        torch.testing.assert_close(state["model"][name], value, rtol=1e-6, atol=1e-6)
    moments = by_hand.optimizer.state_dict()["state"]
    assert len(moments) == len(state["optimizer"]["state"]) > 0
    for key, entry in moments.items():
        torch.testing.assert_close(state["optimizer"]["state"][key]["exp_avg_sq"], entry["exp_avg_sq"])
        assert state["optimizer"]["state"][key]["step"] == BEFORE + AFTER
    assert Path("out/ckpt.pt").is_file()


@pytest.mark.slow
def test_killed_before_its_first_checkpoint_it_still_goes_on_from_nanogpts(here, nanogpts):
    folder, by_hand = nanogpts
    shutil.copytree(folder, "out")
    train(["--init_from=resume", "--out_dir=out", *FLAGS])
    shutil.rmtree("out/checkpoints")
    train(["--resume", "out"])
    state = load(Path("out/checkpoints") / f"step-{BEFORE + AFTER:08d}")
    for name, value in by_hand.model.state_dict().items():
        torch.testing.assert_close(state["model"][name], value, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_a_nanogpt_run_that_cannot_go_on_is_one_sentence(here, nanogpts):
    _, by_hand = nanogpts
    state = by_hand.optimizer.state_dict()
    entries = {**state["state"], 3: {**state["state"][3], "exp_avg": torch.zeros(2, 2)}}
    for name, changed, expected in (
        ("none", {"optimizer": None}, "holds no AdamW as nanoGPT's train.py makes it"),
        ("sgd", {"optimizer": torch.optim.SGD(by_hand.model.parameters(), 0.1).state_dict()}, "holds no AdamW"),
        ("shape", {"optimizer": {**state, "state": entries}}, "parameter 3 of shape"),
        ("code", {"config": Path("x")}, "is not a checkpoint of nanoGPT's"),
    ):
        by_hand.save(Path(name) / "ckpt.pt", **changed)
        with pytest.raises(UserError, match=expected):
            train(["--init_from=resume", f"--out_dir={name}", *FLAGS])
    by_hand.save(Path("heads") / "ckpt.pt")
    with pytest.raises(UserError, match="begin heads on its weights by --init-from heads"):
        train(["--init_from=resume", "--out_dir=heads", "--method=lte", *FLAGS])


def test_samples_know_the_vocabulary_by_the_name_of_the_data_set(here, nanogpts, capsys):
    folder, by_hand = nanogpts
    sample([f"--out_dir={folder}", "--num_samples=1", "--max_new_tokens=5", "--start=ab", "--device=cpu"])
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("ab")
    assert set("".join(said[:-1])) <= set(LETTERS)
    by_hand.save(Path("other") / "ckpt.pt", config={"dataset": "elsewhere"})
    with pytest.raises(UserError, match="name the folder of its bins"):
        sample(["other", "--start=ab"])
