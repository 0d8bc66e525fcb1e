"""nanoGPT's way of saying things: its keys, its files of assignments (never run), its defaults, its configurations."""

import dataclasses
import os

import pytest
from lte.cli import configure, train
from lte.tasks.bench_flags import configure as configure_bench
from lte.tasks.nanogpt import translate
from lte.tasks.sample import configure as configure_sample
from lte.tasks.train_config import TrainConfig
from memtrain_common.errors import UserError

# Every key of nanoGPT's train.py, with a value that is not ours, and what it becomes here.
KEYS = {
    "out_dir=out-x": {"out": "out-x"},
    "eval_interval=77": {"eval_interval": 77},
    "log_interval=3": {"log_interval": 3},
    "eval_iters=11": {"eval_iters": 11},
    "eval_only=True": {"eval_only": True},
    "always_save_checkpoint=False": {"always_save_checkpoint": False},
    "init_from=gpt2-medium": {"init_from": "gpt2-medium"},
    "wandb_log=True": {"tracker": "wandb"},
    "wandb_log=False": {},
    "wandb_project=mine": {"wandb_project": "mine"},
    "wandb_run_name=first": {"wandb_run_name": "first"},
    "dataset=mine": {"data_dir": "data/mine"},
    "gradient_accumulation_steps=5": {"gradient_accumulation_steps": 5},
    "batch_size=24": {"batch_size": 24},
    "block_size=48": {"block_size": 48},
    "n_layer=3": {"n_layer": 3},
    "n_head=2": {"n_head": 2},
    "n_embd=32": {"n_embd": 32},
    "dropout=0.25": {"dropout": 0.25},
    "bias=True": {"bias": True},
    "learning_rate=0.002": {"learning_rate": 0.002},
    "max_iters=1234": {"max_iters": 1234, "lr_decay_iters": 1234},
    "weight_decay=0.01": {"weight_decay": 0.01},
    "beta1=0.8": {"beta1": 0.8},
    "beta2=0.99": {"beta2": 0.99},
    "grad_clip=0.0": {"grad_clip": 0.0},
    "decay_lr=False": {"decay_lr": False},
    "warmup_iters=7": {"warmup_iters": 7},
    "lr_decay_iters=555": {"lr_decay_iters": 555},
    "min_lr=0.0002": {"min_lr": 0.0002, "min_lr_ratio": 0.2},
    "backend=nccl": {},
    "device=cpu": {"device": "cpu"},
    "dtype=bfloat16": {"dtype": "bfloat16"},
    "compile=True": {"compile": True},
    # nanoGPT-LTE's and nanoGPT-LoRA's
    "eval_batches=9": {"eval_iters": 9},
    "vocab_size=512": {"vocab_size": 512},
    "wrap_lte=False": {"method": "full", "full_learning_rate": 1e-3},
    "wrap_lte=True": {},
    "freeze_n=2": {"freeze_n": 2},
    "skip_attn=True": {"skip_attn": True},
    "skip_mlp=True": {"skip_mlp": True},
    "skip_logit=True": {},
    "lora_r=8": {"lora_r": 8},
    "lora_rank=8": {"lora_r": 8},
    "lora_alpha=4096": {"lora_alpha": 4096.0},
    "lora_dropout=0.0": {},
    "lte_heads=8": {"lte_heads": 8},
    "lte_merge_steps=10": {"lte_merge_steps": 10},
    "lte_mode=mhlora": {"lte_mode": "sequential"},
    "lte_mode=dmp": {"lte_mode": "parallel"},
    "save_checkpoint=False": {},
    "compute_grad_memory=True": {},
}


@pytest.mark.slow
@pytest.mark.parametrize("key", KEYS)
def test_every_key_of_nanogpt_is_understood(key, capsys):
    default, found = dataclasses.asdict(configure([])), dataclasses.asdict(configure([f"--{key}"]))
    changed = {name: value for name, value in found.items() if value != default[name]}
    assert changed == {k: v for k, v in KEYS[key].items() if default[k] != v}
    said = capsys.readouterr().out
    assert bool(said) == key.startswith(("backend", "save_checkpoint", "compute_grad_memory")), said


def test_our_own_form_is_as_before():
    words = ["--n-layer", "2", "--no-decay-lr", "--lte-trainable", "norms", "biases", "--data-dir=x y", "--compile"]
    ours = configure(words)
    assert (ours.n_layer, ours.decay_lr, ours.lte_trainable, ours.data_dir, ours.compile) == (
        2, False, ("norms", "biases"), "x y", True,
    )  # fmt: skip
    assert translate(["--warmup-iters", "-5"], TrainConfig) == (["--warmup-iters=-5"], [])


def test_resuming_in_nanogpts_words():
    """init_from=resume goes on with what lies in out_dir, by default "out"."""
    assert translate(["--init_from=resume", "--out_dir=there"], TrainConfig)[0] == ["--resume=there"]
    assert translate(["--init_from=resume"], TrainConfig)[0] == ["--resume=out"]
    with pytest.raises(UserError, match="there is not a run"):
        configure(["--init_from=resume", "--out_dir=there"])


# nanoGPT's config/train_shakespeare_char.py and finetune_shakespeare.py, in their own form
CHAR = '''# train a miniature character-level model
"""with a docstring"""
import time
out_dir = 'out-shakespeare-char'
eval_interval = 250 # keep frequent
always_save_checkpoint = False
wandb_log = False # override via command line
wandb_run_name = 'ft-' + str(time.time())
dataset = 'shakespeare_char'
gradient_accumulation_steps = 5 * 8
batch_size = 64
learning_rate = 1e-3
max_iters = 5000
lr_decay_iters = max_iters
min_lr = learning_rate / 10
beta2 = 0.99
dropout = -(-0.2)
'''


def test_a_file_of_assignments_is_read(tmp_path, capsys):
    path = tmp_path / "train_char.py"
    path.write_text(CHAR)
    found = configure([str(path), "--max_iters=100", "--lr-decay-iters", "200", "--warmup_iters=9"])
    assert (found.out, found.eval_interval, found.always_save_checkpoint) == ("out-shakespeare-char", 250, False)
    assert (found.gradient_accumulation_steps, found.batch_size, found.dropout) == (40, 64, 0.2)
    assert (found.max_iters, found.lr_decay_iters) == (100, 200)  # the command line comes after the file
    assert found.data_dir == "data/shakespeare_char"
    assert found.min_lr_ratio == pytest.approx(0.1)
    assert found.rest_learning_rate == found.full_learning_rate == 1e-3
    # what the file leaves open is nanoGPT's default, not ours
    assert (found.n_layer, found.n_embd, found.block_size, found.weight_decay) == (12, 768, 1024, 0.1)
    assert "wandb_run_name is computed there and left out" in capsys.readouterr().out
    on_a_preset = configure(["shakespeare-char-cpu", str(path), "--data-dir", "x", "--batch_size=12"])
    assert (on_a_preset.n_layer, on_a_preset.batch_size, on_a_preset.max_iters) == (4, 12, 5000)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("batch_size = 12\nimport os\nos.system('touch pwned')\n", ["line 3 is not an assignment"]),
        ("batch_size = __import__('os').system('touch pwned')\n", ["line 1: batch_size must be a number", "not run"]),
        ("for i in range(3):\n    n_layer = i\n", ["line 1 is not an assignment"]),
        ("n_layer = [1, 2]\n", ["line 1: n_layer must be"]),
        ("n_layer = unknown + 1\n", ["line 1: n_layer must be"]),
        ("n_layer = 'x' * 10**9\n", ["line 1: n_layer must be"]),
        ("n_layer = 9**9**9\n", ["line 1: n_layer must be"]),
        ("n_layer = 1 / 0\n", ["line 1: n_layer must be"]),
        ("n_layer = 3 +\n", ["is not a file of assignments"]),
        ("n_layer = f'{1 + 1}'\n", ["line 1: n_layer must be", "give it as --n_layer=VALUE"]),
        ("n_layers = 3\n", ["unknown flag --n-layers", "did you mean --n-layer?"]),
        ("n_layer = 'three'\n", ["three"]),
    ],
)
def test_a_file_is_never_run(tmp_path, monkeypatch, source, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.py").write_text(source)
    with pytest.raises(UserError) as error:
        configure(["x.py"])
    for part in expected:
        assert part in str(error.value)
    assert "\n" not in str(error.value)
    assert not os.path.exists("pwned")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["nowhere.py"], ["cannot read the configuration nowhere.py"]),
        (["--skip_logit=False"], ["skip_logit can only be True", "tied"]),
        (["--lora_dropout=0.1"], ["lora_dropout can only be 0.0"]),
        (["--min_lr=1.0"], ["--min-lr must be from 0 to --learning-rate 0.001, got 1.0"]),
        (["--compile=maybe"], ["--compile takes True or False, got maybe"]),
        (["--freeze_n=4"], ["--freeze-n 4 leaves none of the 4 blocks for heads"]),
        (["--wrap_lte=False", "--compare-full"], ["--method full is the full training"]),
        (["--lte_mode=vmap"], ["vmap"]),
        (["gpt2-news"], ["data/cnn_dailymail does not exist: lte-prepare cnn-dailymail makes it"]),
    ],
)
def test_what_cannot_be_had_is_one_sentence(words, expected):
    with pytest.raises(UserError) as error:
        train(words)
    for part in expected:
        assert part in str(error.value)


def test_the_source_projects_configurations(monkeypatch):
    """nanoGPT-LTE's config/*.py, value by value."""
    data = ["--data-dir", "somewhere"]
    news = configure(["gpt2-news", *data])
    assert (news.n_layer, news.n_head, news.n_embd, news.block_size, news.bias) == (12, 12, 768, 512, True)
    assert (news.batch_size, news.gradient_accumulation_steps, news.max_iters, news.warmup_iters) == (8, 1, 401, 100)
    assert (news.lora_r, news.lora_alpha, news.lte_heads, news.lte_merge_steps) == (32, 128.0, 4, 10)
    assert (news.skip_mlp, news.skip_attn, news.lte_mode, news.rest_learning_rate) == (True, False, "parallel", 6e-4)
    tuned = configure(["finetune-gpt2-news", *data])
    assert (tuned.init_from, tuned.batch_size, tuned.max_iters) == ("gpt2", 4, 401)
    assert (tuned.lte_mode, tuned.lte_merge_steps) == ("sequential", 0)
    baby = configure(["babygpt-news", *data])
    assert (baby.n_layer, baby.n_embd, baby.block_size, baby.batch_size, baby.dropout) == (6, 384, 1024, 16, 0.2)
    assert (baby.max_iters, baby.gradient_accumulation_steps) == (101, 40)
    char = configure(["shakespeare-char-lte", *data])
    assert (char.lora_r, char.lora_alpha, char.lte_heads, char.max_iters) == (32, 4096.0, 32, 1000)
    assert char.min_lr_ratio == pytest.approx(0.1)
    plain = configure(["nanogpt", *data])
    assert (plain.batch_size, plain.gradient_accumulation_steps, plain.max_iters) == (12, 40, 600_000)


def test_a_bench_takes_files_that_say_where_their_training_goes(tmp_path):
    """It keeps nothing; --out on its own command line is a mistake."""
    (tmp_path / "x.py").write_text("out_dir = 'out-x'\nn_layer = 3\nn_embd = 48\nn_head = 6\n")
    file = str(tmp_path / "x.py")
    bench = configure_bench([file, "--batch_size=4"])
    assert (bench.n_layer, bench.batch_size, bench.out) == (3, 4, "")
    for word in ("--out_dir=mine", "--out=mine"):
        with pytest.raises(UserError, match="--out is lte-train's"):
            configure_bench([file, word])


def test_the_flags_of_nanogpts_sample_py_and_bench_py():
    found = configure_sample(
        ["--init_from=resume", "--out_dir=out-x", "--num_samples=3", "--top_k=5", "--compile=False"]
    )
    assert (found.init_from, found.num_samples, found.top_k, found.compile) == ("out-x", 3, 5, False)
    assert configure_sample(["--out_dir=out-x"]).init_from == "out-x"
    assert configure_sample(["--init_from=gpt2-xl", "--start=What?"]).init_from == "gpt2-xl"
    assert configure_sample(["runs/a", "--temperature", "1.5"]).init_from == "runs/a"
    for words, expected in (
        ([], "name what to sample from"),
        (["x", "--temperature=0"], "--temperature must be positive"),
        (["x", "--num_samples=0"], "--num-samples must be at least 1"),
        (["x", "--stat=a"], "did you mean --start?"),
    ):
        with pytest.raises(UserError, match=expected):
            configure_sample(words)
    words = [
        "--batch_size=4",
        "--block_size=32",
        "--bias=False",
        "--real_data=False",
        "--profile=False",
        "--compile=True",
    ]
    bench = configure_bench(["gpt2-news", *words])
    assert (bench.batch_size, bench.block_size, bench.compile, bench.data_dir, bench.profile) == (4, 32, True, "", "")
    for words, expected in (
        (["--real_data=True"], "name it with --data-dir"),
        (["--steps=1"], "--steps must be at least 2"),
        (["--out=x"], "--out is lte-train's"),
    ):
        with pytest.raises(UserError, match=expected):
            configure_bench(words)
