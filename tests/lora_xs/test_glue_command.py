"""lora-xs glue as a person meets it: a run, its folder and metric, kills and signals, a grid, every kind of mistake."""

import hashlib
import json
import os
import re
import shutil
import signal

import pytest
import torch
from lora_xs import describe_adapter
from safetensors.torch import load_file
from support import (
    Command,
    assert_refused,
    newest_checkpoint,
    pause_at,
    rows,
    run_command,
    run_installed,
    run_light,
    run_ranks,
)

TINY = ["lora-xs", "glue", "--task", "sst2", "--tracker", "none", "--rank", "4", "--epochs", "5", "--batch-size", "8",
        "--log-interval", "5", "--eval-interval", "10", "--learning-rate", "3e-2", "--head-learning-rate", "3e-2",
        "--alpha", "16", "--out", "run"]  # fmt: skip


@pytest.fixture(scope="module")
def words(encoder, glue_dir):
    return [*TINY, "--data-dir", glue_dir, "--model", encoder]


@pytest.fixture(scope="module")
def whole(words, tmp_path_factory):
    """A run that nothing disturbed."""
    cwd = tmp_path_factory.mktemp("whole")
    done = run_command(words, cwd)
    assert done.returncode == 0, done.stderr
    return cwd / "run", done


@pytest.mark.slow
def test_a_base_in_another_precision_is_no_base_of_the_adapter(whole, tmp_path):
    run, _ = whole
    words = ["lora-xs", "merge", "--adapter", str(run / "adapter"), "--base-dtype", "bfloat16", "--out", "merged"]
    assert_refused(run_command(words, tmp_path), "in the same precision")
    assert run_command([*words[:4], *words[6:]], tmp_path).returncode == 0


@pytest.mark.slow
def test_it_learns_and_reports_the_metric(whole):
    run, done = whole
    validation = [r for r in rows(run) if r["split"] == "val"]
    assert [r["step"] for r in validation] == [0, 10, 20, 30, 40, 50]
    assert validation[-1]["accuracy"] > max(0.7, validation[0]["accuracy"])
    result = json.loads((run / "result.json").read_text())
    assert result["own"]["task"] == "sst2"
    assert result["scores"] == {"dev": {"accuracy": validation[-1]["accuracy"]}}
    assert re.search(rf"accuracy +{100 * validation[-1]['accuracy']:.2f}", done.stdout)
    assert done.stdout == (run / "log.txt").read_text()


@pytest.mark.slow
def test_what_it_trained_is_counted_and_kept(whole):
    """2 layers of 4 modules of r² = 16; the pooler that the folder lacks belongs to the head."""
    run, done = whole
    info = describe_adapter(run / "adapter")
    assert info.trained == 128
    assert info.heads == ("bert.pooler.dense", "classifier")
    head = load_file(run / "adapter" / "head.safetensors")
    assert "128 in R, 306 in the head" in done.stdout
    assert sum(t.numel() for t in head.values()) == 306
    saved = load_file(newest_checkpoint(run) / "model.safetensors")
    assert sum(t.numel() for n, t in saved.items() if t.is_floating_point()) == 128 + 306


def same_run(a, b):
    assert rows(a) == rows(b)
    for name in ("adapter.safetensors", "head.safetensors"):
        assert (a / "adapter" / name).read_bytes() == (b / "adapter" / name).read_bytes()


@pytest.mark.slow
def test_killed_and_resumed_it_ends_with_the_same_bytes(whole, words, tmp_path):
    run = tmp_path / "run"
    done = Command(words, tmp_path, before=pause_at(25)).end_by(signal.SIGKILL)
    assert done.returncode == -signal.SIGKILL
    done = run_command(["lora-xs", "glue", "--resume", "run"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "resumed from" in done.stdout
    same_run(run, whole[0])


@pytest.mark.slow
def test_bases_from_the_gradient_are_in_checkpoints_and_adapter(words, tmp_path):
    """They do not follow from the weights: a run that was killed takes them from its checkpoint."""
    words = [*words, "--init", "gradient", "--init-batches", "3", "--first-step", "1e-3", "--max-iters", "20"]
    assert run_command([*words, "--out", "whole"], tmp_path).returncode == 0
    done = Command(words, tmp_path, before=pause_at(15)).end_by(signal.SIGKILL)
    assert done.returncode == -signal.SIGKILL
    saved = load_file(newest_checkpoint(tmp_path / "run") / "model.safetensors")
    assert sum(name.endswith(("lora_xs.A", "lora_xs.B")) for name in saved) == 16
    done = run_command(["lora-xs", "glue", "--resume", "run"], tmp_path)
    assert done.returncode == 0, done.stderr
    same_run(tmp_path / "run", tmp_path / "whole")
    assert describe_adapter(tmp_path / "run" / "adapter").stored_bases


@pytest.mark.slow
def test_sigterm_saves_and_resumes(whole, words, tmp_path):
    run = tmp_path / "run"
    done = Command(words, tmp_path, before=pause_at(5)).end_by(signal.SIGTERM)
    assert done.returncode == 143, done.stderr
    assert "resume with --resume run" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    again = run_command(["lora-xs", "glue", "--resume", "run"], tmp_path)
    assert again.returncode == 0, again.stderr
    same_run(run, whole[0])


def counted(words, folder):
    """The command in one of several processes; a line a decomposition in a file of the process's own."""
    import lora_xs.bases
    from lora_xs.cli import dispatch

    honest, log = lora_xs.bases.svd_bases, folder / f"svd-{os.environ['RANK']}"
    log.write_text("")

    def svd_bases(W, rank, **options):
        with log.open("a") as file:
            file.write(f"{hashlib.sha256(W.numpy().tobytes()).hexdigest()}\n")
        return honest(W, rank, **options)

    lora_xs.bases.svd_bases = svd_bases
    dispatch(words[1:])


def with_dropout(encoder, p, folder):
    """A copy of the encoder that drops every hidden number and attention weight with probability p."""
    shutil.copytree(encoder, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_dropout_prob": p, "attention_probs_dropout_prob": p}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.slow
def test_two_processes_give_the_run_of_one(words, encoder, tmp_path):
    """Every weight is decomposed once, by one of the two; the losses, metrics and R are those of one process.

    Without dropout, whose masks differ between processes.
    """
    words = [*words, "--model", str(with_dropout(encoder, 0.0, tmp_path / "encoder"))]
    assert run_command([*words, "--out", "one"], tmp_path).returncode == 0
    run_ranks(2, counted, [*words, "--out", str(tmp_path / "run")], tmp_path)
    done = [(tmp_path / f"svd-{rank}").read_text().splitlines() for rank in range(2)]
    assert [len(d) for d in done] == [4, 4]
    assert len({*done[0], *done[1]}) == 8
    one, two = rows(tmp_path / "one"), rows(tmp_path / "run")
    assert [(r["step"], r["split"]) for r in one] == [(r["step"], r["split"]) for r in two]
    for a, b in zip(one, two, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], abs=1e-5 if a["step"] <= 5 else 1e-3)
    a, b = (load_file(p / "adapter" / "adapter.safetensors")["R"] for p in (tmp_path / "one", tmp_path / "run"))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-3 * float(a.abs().max()))
    assert (tmp_path / "run" / "log.txt").read_text().count("development rows, in hundredths") == 1


def in_a_process_of_several(words, folder):
    from lora_xs.cli import dispatch

    dispatch(words[1:])


@pytest.mark.slow
def test_two_processes_find_the_bases_of_one_in_the_gradient(words, encoder, tmp_path):
    """Each sees its half of the first batches; together they have one process's gradient, and so its subspaces."""
    words = [*words, "--model", str(with_dropout(encoder, 0.0, tmp_path / "encoder"))]
    words += ["--init", "gradient", "--init-batches", "2", "--first-step", "1e-3", "--max-iters", "3"]
    assert run_command([*words, "--out", "one"], tmp_path).returncode == 0
    run_ranks(2, in_a_process_of_several, [*words, "--out", str(tmp_path / "run")], tmp_path)
    one, two = (load_file(tmp_path / run / "adapter" / "adapter.safetensors") for run in ("one", "run"))
    assert one.keys() == two.keys()
    for name in ("R", *(f"{side}.{i}" for side in "AB" for i in range(8))):
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=1e-3, msg=name)
    for a, b in zip(rows(tmp_path / "one"), rows(tmp_path / "run"), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], abs=1e-4)


@pytest.mark.slow
def test_the_best_weights_are_kept_on_request(words, tmp_path):
    done = run_command([*words, "--keep", "best", "--epochs", "3"], tmp_path)
    assert done.returncode == 0, done.stderr
    best = max(r["accuracy"] for r in rows(tmp_path / "run") if r["split"] == "val")
    assert json.loads((tmp_path / "run" / "result.json").read_text())["scores"]["dev"]["accuracy"] == best


@pytest.mark.slow
def test_another_adapter_is_a_start(whole, words, tmp_path):
    """R comes from the adapter; the head begins anew, for a task with scores."""
    start = str(whole[0] / "adapter")
    options = ["--task", "stsb", "--from-adapter", start, "--learning-rate", "1e-12", "--epochs", "1"]
    done = run_command([*words, *options], tmp_path)
    assert done.returncode == 0, done.stderr
    old, new = (load_file(p / "adapter.safetensors")["R"] for p in (whole[0] / "adapter", tmp_path / "run" / "adapter"))
    torch.testing.assert_close(new, old, atol=1e-6, rtol=0)
    assert float(old.abs().max()) > 1e-3
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert set(result["scores"]["dev"]) == {"pearson", "spearman"}
    refused = run_command([*words, "--from-adapter", start, "--rank", "5", "--out", "other"], tmp_path)
    assert_refused(refused, "--rank 5", "which is 4")


@pytest.mark.slow
def test_a_folder_of_peft_or_the_official_code_is_a_start(whole, words, tmp_path):
    """Their matrices lie in the SVD's bases here, so R comes back; the head begins anew."""
    started = run_command(["lora-xs", "export-peft", "--adapter", str(whole[0] / "adapter"), "--out", "peft"], tmp_path)
    assert started.returncode == 0, started.stderr
    options = ["--task", "stsb", "--from-adapter", "peft", "--learning-rate", "1e-12", "--max-iters", "1"]
    done = run_command([*words, *options], tmp_path)
    assert done.returncode == 0, done.stderr
    old, new = (load_file(p / "adapter.safetensors")["R"] for p in (whole[0] / "adapter", tmp_path / "run" / "adapter"))
    torch.testing.assert_close(new, old, atol=1e-5, rtol=1e-4)
    assert describe_adapter(tmp_path / "run" / "adapter").heads == ("bert.pooler.dense", "classifier")


@pytest.mark.slow
def test_random_bases_are_not_those_of_the_svd(words, tmp_path):
    done = run_command([*words, "--init", "random", "--epochs", "1"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert describe_adapter(tmp_path / "run" / "adapter").config.init == "random"


@pytest.mark.slow
def test_a_grid_is_stopped_resumed_and_tabled(encoder, glue_dir, tmp_path):
    grid = ["lora-xs", "glue", "scratch", "--task", "sst2", "--model", encoder, "--data-dir", glue_dir, "--grid",
            "--grid-ranks", "2", "4", "--grid-learning-rates", "1e-3", "--grid-head-learning-rates", "5e-3",
            "--grid-seeds", "0", "1", "--epochs", "2", "--tracker", "none", "--out", "grid"]  # fmt: skip
    folder = tmp_path / "grid"
    second = pause_at(0, "r2-lr0.001-head0.005-seed1")
    stopped = Command(grid, tmp_path, before=second).end_by(signal.SIGTERM)
    assert stopped.returncode == 143, stopped.stderr
    assert "--resume grid" in stopped.stderr
    first = (folder / "r2-lr0.001-head0.005-seed0" / "result.json").stat().st_mtime_ns
    done = run_command(["lora-xs", "glue", "--resume", "grid"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert (folder / "r2-lr0.001-head0.005-seed0" / "result.json").stat().st_mtime_ns == first  # left alone
    table = json.loads((folder / "table.json").read_text())
    assert [(r["rank"], len(r["scores"]["accuracy"])) for r in table] == [(2, 2), (4, 2)]
    for row in table:
        a, b = row["scores"]["accuracy"]
        half = 12.706 * abs(a - b) / 2  # t(0.975, 1 degree of freedom) · s/√2, s = |a − b|/√2
        assert f"{50 * (a + b):.2f} ± {100 * half:.2f}"[:-1] in (folder / "table.txt").read_text()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--task", "snli"], ["--task", "cola, sst2", "snli"]),
        (["--model", "/no/such"], ["/no/such", "--model"]),
        (["--data-dir", "nowhere"], ["nowhere", "SST-2/train.tsv"]),
        (["--rank", "17"], ["17", "16"]),
        (["--targets", "querry"], ["querry", "query"]),
        (["--from-adapter", "missing"], ["missing"]),
        (["--init-batches", "4"], ["--init-batches 4", "--init gradient"]),
        (["--first-step", "1e-4"], ["--first-step 0.0001", "--init gradient"]),
        (["--init", "gradient", "--from-adapter", "missing"], ["--init gradient", "--from-adapter"]),
        (["--warmup-ratio", "1"], ["--warmup-ratio", "below 1"]),
        (["--ranks", "4"], ["--ranks", "did you mean"]),
        (["--batch-size", "none"], ["none"]),
        (["--grid"], ["--rank", "--grid-ranks"]),
        (["--resume", "missing"], ["missing", "not a run"]),
    ],
)
def test_mistakes_are_one_sentence(options, expected, words, tmp_path):
    assert_refused(run_command([*words, *options], tmp_path), *expected)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_mistakes_about_runs_and_adapters(whole, words, glue_dir, tmp_path):
    run, _ = whole
    (tmp_path / "run").symlink_to(run)
    assert_refused(run_command(words, tmp_path), "run holds another run", "--resume")
    assert_refused(run_command(["lora-xs", "glue", "--resume", "run", "--rank", "8"], tmp_path), "--rank 4", "8")
    assert_refused(run_command(["lora-xs", "instruct", "--resume", "run"], tmp_path), "another command")
    short = tmp_path / "short"
    short.mkdir()
    (short / "adapter.safetensors").write_bytes((run / "adapter" / "adapter.safetensors").read_bytes()[:700])
    assert_refused(run_command([*words, "--from-adapter", "short", "--out", "x"], tmp_path), "short", "truncated")
    assert_refused(run_command(["lora-xs", "glu"], tmp_path), "glu", "did you mean glue")


def test_every_commands_help_loads_nothing_heavy():

    from lora_xs.cli import COMMANDS

    script = f"""
import sys, io, contextlib
from lora_xs.cli import dispatch
for name in {list(COMMANDS)!r}:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        try:
            dispatch([name, "--help"])
        except SystemExit as stop:
            assert not stop.code
    assert f"usage: lora-xs {{name}}" in out.getvalue(), out.getvalue()
    assert "--out" in out.getvalue() or name == "info"
loaded = {{"torch", "numpy", "transformers", "datasets", "peft", "sklearn"}} & set(sys.modules)
assert not loaded, loaded
"""
    ((code, said),) = run_light([script])
    assert not code, said


def test_the_installed_command_lists_its_commands(tmp_path):
    done = run_installed(["lora-xs"], tmp_path)
    assert done.returncode == 0
    for name in ("glue", "instruct", "eval", "merge", "export-peft", "info", "demo"):
        assert f"  {name} " in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("task", "metric"), [("cola", "matthews"), ("rte", "accuracy"), ("sst2", "accuracy")])
def test_the_real_files_go_all_the_way(task, metric, encoder, real_data, tmp_path):
    few = ["--max-train-samples", "64", "--max-eval-samples", "40", "--epochs", "1", "--max-length", "32"]
    words = ["lora-xs", "glue", "--task", task, "--model", encoder, "--data-dir", str(real_data / "glue"), *few]
    done = run_command([*words, "--tracker", "none", "--rank", "4", "--out", "run"], tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert set(result["scores"]["dev"]) == {metric}
    assert f"{100 * result['scores']['dev'][metric]:.2f}" in done.stdout


def test_the_encoders_dropout_is_on_while_it_trains(encoder, glue_dir, tmp_path):
    from lora_xs.tasks.glue import adapted_model, prepare
    from lora_xs.tasks.glue_flags import PROG, GlueConfig
    from memtrain_common.commands.session import Session

    folder = with_dropout(encoder, 0.5, tmp_path / "dropping")
    config = GlueConfig(task="sst2", model=str(folder), data_dir=str(glue_dir), rank=2, tracker="none")
    model = adapted_model(Session.begin(config, [], prog=PROG), prepare(config))
    assert all(m.training for m in model.modules())
    ids = torch.full((2, 5), 7)
    assert not torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
