"""What the commands wrote before the rooms goes on, loads and reports with the code of today.

``fixtures/runs_before_rooms`` holds finished runs and what they read; its make.py says how they were made.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from before_rooms import COMMANDS, FOLDER, resumed_by
from memtrain_common.models.vit import load_vit
from memtrain_common.runs import checkpoint
from safetensors.torch import load_file
from support import rows, run_command

TURNED = {"galore-vit": [f"vit.layers.0.attention.{x}_proj.weight" for x in "qk"]}
"""Their first gradients have singular values so close that another processor's rounding finds another basis for GaLore:
they then end 0.08 and 0.11 of the way elsewhere. What a lost moment or another batch does is as long as the way."""


@pytest.fixture
def here(tmp_path):
    """A folder like that of the fixture, in which a test may write: the runs are copied into it when they are used."""
    (tmp_path / "inputs").symlink_to(FOLDER / "inputs")
    (tmp_path / "runs").mkdir()
    return tmp_path


def copied(here, name):
    return Path(shutil.copytree(FOLDER / "runs" / name, here / "runs" / name))


def checkpoints(run):
    return [checkpoint.load(p)["model"] for p in sorted((run / "checkpoints").glob("step-*"))[-2:]]


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_a_run_of_then_goes_on_from_its_middle_to_the_same_end(name, here):
    """Rows and weights: what is left between them is far smaller than what the second half of training moved.

    On another processor than the fixture's it is up to 0.01 of that, but for the weights of ``TURNED``.
    """
    run = copied(here, name)
    middle, end = checkpoints(run)
    last = max((run / "checkpoints").glob("step-*"))
    shutil.rmtree(last)
    before = rows(run)
    done = run_command([*resumed_by(name), f"runs/{name}"], here)
    assert done.returncode == 0, done.stderr
    assert "resumed from" in done.stdout
    again = rows(run)
    assert [(r["step"], r["split"]) for r in again] == [(r["step"], r["split"]) for r in before]
    assert [r["loss"] for r in again] == pytest.approx([r["loss"] for r in before], rel=1e-3)
    found = checkpoint.load(last)["model"]
    assert found.keys() == end.keys()
    moved = max(float((end[n] - middle[n]).abs().max()) for n in end if end[n].is_floating_point())
    assert moved > 0
    for tensor in end:
        of_move = 0.2 if tensor in TURNED.get(name, ()) else 0.02
        torch.testing.assert_close(found[tensor], end[tensor], rtol=0, atol=of_move * moved)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in COMMANDS if n.startswith(("lora-xs", "galore-vit"))])
def test_a_finished_run_of_then_is_reported(name, here):
    copied(here, name)
    words = {
        "galore-vit": ["galore-vit", "eval", "--run", f"runs/{name}"],
        "galore-vit-melo": ["galore-vit", "eval", "--run", f"runs/{name}"],
        "lora-xs-glue": ["lora-xs", "info", "--adapter", f"runs/{name}/adapter"],
        "lora-xs-instruct": ["lora-xs", "info", "--adapter", f"runs/{name}/adapter"],
    }[name]
    done = run_command(words, here)
    assert done.returncode == 0, done.stderr
    if name.startswith("galore-vit"):
        (trial,) = json.loads((FOLDER / "runs" / name / "result.json").read_text())["trials"]
        assert f"{trial['test']['AUC']:.4f}" in done.stdout
        assert f"{trial['test']['ACC']:.4f}" in done.stdout
    else:
        assert "rank" in done.stdout


def test_a_run_of_lte_then_is_compared_and_sampled(here):
    copied(here, "lte-train")
    done = run_command(["lte-train", "--figures", "runs/lte-train", "--out", "figures"], here)
    assert done.returncode == 0, done.stderr
    final = [r for r in rows(here / "runs" / "lte-train") if r["split"] == "val"][-1]["loss"]
    assert f"{final:.4f}" in done.stdout or f"{final:.3f}" in done.stdout, done.stdout
    words = ["lte-sample", "runs/lte-train", "--num-samples", "1", "--max-new-tokens", "5", "--start", "1", "--device"]
    done = run_command([*words, "cpu"], here)
    assert done.returncode == 0, done.stderr
    assert "1" in done.stdout


@pytest.mark.parametrize("name", ["lora-xs-glue", "lora-xs-instruct"])
def test_an_adapter_of_then_is_what_its_run_had_trained(name, here, monkeypatch):
    """R of the adapter is that of the last checkpoint, and its product with the bases changes the model's output."""
    from lora_xs.tasks.models import load_adapted

    run = copied(here, name)
    monkeypatch.chdir(here)
    monkeypatch.setenv("LORA_XS_CACHE", str(here / "cache"))
    model, base = load_adapted(str(run / "adapter"))
    state = model.state_dict()
    trained = checkpoints(run)[-1]
    Rs = [n for n in trained if ".lora_xs.R." in n or n.endswith("R.default")]
    assert Rs
    for n in Rs:
        torch.testing.assert_close(state[n], trained[n], rtol=0, atol=0)
        assert bool(trained[n].any())
    assert base == f"inputs/{'bert' if name == 'lora-xs-glue' else 'llama'}"
    assert bool(model(input_ids=torch.full((1, 4), 7)).logits.isfinite().all())


def test_a_melo_adapter_of_then_is_read(here):
    from galore_vit.melo_file import read_melo

    run = copied(here, "galore-vit-melo")
    model, _ = load_vit(FOLDER / "inputs" / "vit", image_size=8, classes=2)
    state = read_melo(model, run / "adapter.safetensors").eval().state_dict()
    file = load_file(run / "adapter.safetensors")
    assert {n.split("_")[0] for n in file} == {"w", "fc"}
    for name, tensor in file.items():
        kind = "lora_A" if name.startswith("w_a") else "lora_B" if name.startswith("w_b") else "classifier"
        assert any(kind in n and torch.equal(t, tensor) for n, t in state.items() if t.shape == tensor.shape), name


@pytest.mark.parametrize("name", ["finetune", "finetune-galore"])
def test_a_saved_model_of_then_loads(name):
    model, kept = load_vit(FOLDER / "runs" / name / "model", image_size=8, classes=2)
    assert kept
    assert bool(model.eval()(torch.randn(2, 3, 8, 8)).logits.isfinite().all())


@pytest.mark.slow
def test_an_ablation_of_then_is_reported_and_has_nothing_left_to_do(here):
    folder = copied(here, "ablation")
    (folder / "report.html").unlink(missing_ok=True)
    done = run_command(["ablate", "--report", "runs/ablation"], here)
    assert done.returncode == 0, done.stderr
    (arm,) = [json.loads(p.read_text()) for p in (folder / "results").glob("*.json")]
    assert arm["command"] in (folder / "report.html").read_text()
    assert f"{100 * arm['test']:.1f} %" in done.stdout
    done = run_command(["ablate", "--resume", "runs/ablation"], here)
    assert done.returncode == 0, done.stderr
    assert "1 are finished already" in done.stdout
