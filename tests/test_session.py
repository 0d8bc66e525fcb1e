"""What holds of every command that trains: one way to a run folder, verified weights, refusals that leave nothing."""

import ast
import importlib.machinery
import json
import os
import shutil
import sys
import types

import pytest
from image_files import image_folder
from memtrain_common.commands.result import ended_before
from memtrain_common.files import read_json
from memtrain_common.runs import checkpoint
from memtrain_common.training.fit_config import FitResult
from support import ROOT, assert_refused, rows, run_command, run_on, run_ranks, without_pictures

SHELLS = [
    path
    for pattern in ("packages/*/src/*/tasks/*.py", "packages/*/src/*/cli.py", "apps/src/memtrain_apps/run/*.py")
    for path in sorted(ROOT.glob(pattern))
    if "memtrain_common" not in path.parts
]
BY_THE_SESSION = {
    "lte/tasks/train.py", "backrazor/tasks/train.py", "backrazor/tasks/glue.py", "galore_vit/tasks/train.py",
    "lora_xs/tasks/glue.py", "lora_xs/tasks/glue_grid.py", "lora_xs/tasks/instruct.py", "memtrain_apps/run/training.py",
}  # fmt: skip


def around_the_session(tree):
    """What a file does past the session: makes a run folder, opens one to write in it, calls the loop with one, or
    loads a checkpoint in a function that does not verify it."""
    found = []
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
    for function in functions:
        calls = [n for n in ast.walk(function) if isinstance(n, ast.Call)]
        names = {ast.unparse(c.func) for c in calls}
        for call in calls:
            name = ast.unparse(call.func)
            words = {k.arg for k in call.keywords}
            reads = any(k.arg == "writes" and ast.unparse(k.value) == "False" for k in call.keywords)
            if name.endswith(("RunFolder.create", "lock_folder")) or (name.endswith("RunFolder.open") and not reads):
                found.append(f"{function.name}: {name}")
            if name in ("fit", "loop.fit") and words & {"run", "resume"}:
                found.append(f"{function.name}: {name} with a run folder")
            if name in ("checkpoint.load", "load_checkpoint") and not names & {"checkpoint.verify", "verify"}:
                found.append(f"{function.name}: {name} without verification")
    return found


@pytest.mark.parametrize("path", SHELLS, ids=lambda p: "/".join(p.parts[-3:]))
def test_no_command_goes_around_the_session(path):
    tree = ast.parse(path.read_text())
    allowed = {"lock_folder"} if path.name == "preparing.py" else set()  # lte-prepare's bins are no run
    assert [w for w in around_the_session(tree) if w.split(": ")[1] not in allowed] == []


def test_every_training_command_uses_the_session_and_the_check_above_can_fail():
    used = {"/".join(p.parts[-3:]) for p in SHELLS if "Session.begin(" in p.read_text()}
    assert used >= BY_THE_SESSION
    bad = ast.parse("def f():\n    run = RunFolder.create(p)\n    fit(task, config, run=run)\n    checkpoint.load(p)\n")
    assert len(around_the_session(bad)) == 3


# -- every command, in a few steps ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def few_steps(tmp_path_factory, encoder, glue_dir, language_model, sums):
    """Command -> the words of a training of four steps with two evaluations, without --out."""
    pictures = str(image_folder(tmp_path_factory.mktemp("pictures") / "pets", 8))
    text = tmp_path_factory.mktemp("text")
    (text / "a.txt").write_text("".join(f"{i} times {i} is {i * i}.\n" for i in range(1000)))
    quiet = ["--tracker", "none", "--device", "cpu", "--log-interval", "1"]
    folder = ["--data", "folder", "--data-dir", pictures]
    glue = ["--task", "sst2", "--model", encoder, "--data-dir", glue_dir]
    gpt = ["--n-layer", "2", "--n-head", "2", "--n-embd", "16", "--block-size", "16", "--data-dir", str(text)]
    often = ["--eval-interval", "2", "--max-iters", "4"]
    return {
        "lte-train": ["lte-train", *gpt, *often, "--batch-size", "4", "--lte-heads", "2", "--lora-r", "2",
                      "--lte-merge-steps", "2", "--eval-iters", "1", "--sample-tokens", "0", "--warmup-iters", "1"],
        "backrazor-train": ["backrazor-train", *folder, "--image-size", "8", *often, "--batch-size", "8"],
        "backrazor-glue": ["backrazor-glue", *glue, *often, "--per-device-train-batch-size", "4",
                           "--gradient-accumulation-steps", "1", "--max-length", "16"],
        "galore-vit train": ["galore-vit", "train", *folder, "--size", "8", "--max-iters", "4", "--batch-size", "8",
                             "--galore-rank", "4", "--eval-epochs", "0.9"],
        "lora-xs glue": ["lora-xs", "glue", *glue, *often, "--batch-size", "8", "--rank", "4", "--max-length", "16"],
        "lora-xs instruct": ["lora-xs", "instruct", "--model", language_model, "--data", sums, *often, "--rank", "4",
                             "--batch-size", "4", "--gradient-accumulation-steps", "1", "--val-samples", "2"],
        "finetune": ["finetune", *folder, "--image-size", "8", "--max-iters", "4", "--batch-size", "8",
                     "--eval-epochs", "0.9", "--no-save-model"],
        "pretrain": ["pretrain", *gpt, *often, "--batch-size", "4", "--eval-iters", "1", "--no-save-model"],
    } | {"": quiet}  # fmt: skip


COMMANDS = (
    "lte-train", "backrazor-train", "backrazor-glue", "galore-vit train", "lora-xs glue", "lora-xs instruct",
    "finetune", "pretrain",
)  # fmt: skip
SCHEMA = {
    "command", "data", "seed", "metric", "step", "steps", "skipped_steps", "scores", "best", "evaluation", "train_loss",
    "measured",
    "peak_bytes", "trained_parameters", "parameters", "seconds", "unit", "units_per_second", "joules", "energy_source",
    "own",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_damaged_best_checkpoint_is_never_reported(few_steps, tmp_path, command):
    """The best of the evaluations is not the last: damaged, it is refused by name; --select last goes on without."""
    words = [*few_steps[command], *few_steps[""], "--out", "run", "--select", "best"]
    done = run_command(words, tmp_path)
    assert done.returncode == 0, done.stderr
    result = read_json(tmp_path / "run" / "result.json")
    assert set(result) == SCHEMA
    assert result["steps"] == 4
    head, cost = ((tmp_path / "run" / "cost.csv").read_text()).splitlines()
    assert head == "steps,seconds,joules,mean_watts,energy_source"
    steps, seconds, joules, watts, *_ = cost.split(",")
    assert (int(steps), float(seconds)) == (4, result["seconds"])
    assert (joules == watts == "unavailable") == (result["joules"] is None)
    last, best = tmp_path / "run" / "checkpoints" / "step-00000004", tmp_path / "run" / "checkpoints" / "step-00000002"
    assert checkpoint.verify(best) is None
    state = json.loads((last / "state.json").read_text())
    state["progress"]["best"] = {"__tuple__": [2, state["progress"]["best"]["__tuple__"][1]]}  # as if it were the best
    (last / "state.json").write_text(json.dumps(state))
    manifest = json.loads((last / "manifest.json").read_text())
    manifest["files"]["state.json"] = checkpoint._fingerprint(last / "state.json")
    manifest["sha256"] = checkpoint._own_hash(manifest)
    (last / "manifest.json").write_text(json.dumps(manifest))
    shutil.copytree(tmp_path / "run", tmp_path / "intact")
    weights = best / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 4
    weights.write_bytes(bytes(content))
    prog = words[: 2 if " " in command else 1]
    refused = run_command([*prog, "--resume", "run"], tmp_path)
    assert_refused(refused, "the best checkpoint run/checkpoints/step-00000002 is damaged", "that of step 4 is intact")
    assert "--resume run --select last" in refused.stderr
    for again in (["--resume", "run", "--select", "last"], ["--resume", "intact"]):
        done = run_command([*prog, *again], tmp_path)
        assert done.returncode == 0, done.stderr
    took = json.loads((tmp_path / "intact" / "result.json").read_text())
    assert took["step"] == 2
    [logged] = [r for r in rows(tmp_path / "intact") if r["split"] == "val" and r["step"] == 2]
    reported = took["scores"]["dev" if "dev" in took["scores"] else "val"]  # of these weights, not of the last step's
    assert {n: v for n, v in reported.items() if n in logged} == pytest.approx(
        {n: v for n, v in logged.items() if n in reported}
    )
    assert took["metric"] in reported
    assert json.loads((tmp_path / "run" / "result.json").read_text())["step"] == 4


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_resume_that_fails_leaves_the_run_as_it_was(few_steps, tmp_path, command):
    """What was asked of it is written down only once the checkpoint has been taken up."""
    words = [*few_steps[command], *few_steps[""], "--out", "run"]
    assert run_command(words, tmp_path).returncode == 0
    config = tmp_path / "run" / "config.json"
    before = config.read_bytes()
    manifests = {m: m.read_bytes() for m in (tmp_path / "run" / "checkpoints").glob("*/manifest.json")}
    for manifest in manifests:
        manifest.write_text("damaged")
    again = [*words[: 2 if " " in command else 1], "--resume", "run", "--tracker", "auto"]
    assert_refused(run_command(again, tmp_path), "no checkpoint in run/checkpoints is intact")
    assert config.read_bytes() == before
    for manifest, content in manifests.items():
        manifest.write_bytes(content)
    done = run_command(again, tmp_path)
    assert done.returncode == 0, done.stderr
    content = read_json(config)
    assert (content["config"]["tracker"], len(content["resumed"])) == ("auto", 1)


@pytest.fixture(scope="module")
def small_vit(tmp_path_factory):
    import transformers

    config = transformers.ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
                                    image_size=8, patch_size=4, num_labels=2)  # fmt: skip
    folder = tmp_path_factory.mktemp("small") / "vit"
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "flag"),
    [
        ("galore-vit train", "weights"), ("backrazor-train", "weights"), ("finetune", "weights"),
        ("backrazor-glue", "model"), ("lora-xs glue", "model"), ("lora-xs instruct", "model"),
    ],
)  # fmt: skip
def test_what_a_run_began_with_may_lie_elsewhere(few_steps, small_vit, tmp_path, command, flag):
    """Begun with a path from one folder, gone on with from another; where what it names has moved, it is named anew."""
    words = list(few_steps[command])
    if flag == "model":
        at = words.index("--model") + 1
        source, words[at] = words[at], "place"
    else:
        source, words = small_vit, [*words, "--weights", "place"]
    here, there, run = tmp_path / "here", tmp_path / "there", tmp_path / "run"
    there.mkdir()
    shutil.copytree(source, here / "place")
    done = run_command([*words, *few_steps[""], "--out", str(run)], here)
    assert done.returncode == 0, done.stderr
    assert read_json(run / "config.json")["config"][flag] == str(here / "place")
    again = [*words[: 2 if " " in command else 1], "--resume", "../run"]
    done = run_command(again, there)
    assert done.returncode == 0, done.stderr
    (here / "place").rename(there / "moved")
    assert run_command(again, there).returncode == 2
    done = run_command([*again, f"--{flag}", "moved"], there)
    assert done.returncode == 0, done.stderr
    assert read_json(run / "config.json")["config"][flag] == str(there / "moved")
    assert "checkpoints/step-00000004" in done.stdout
    (there / "moved").rename(tmp_path / "last")
    if command == "galore-vit train":
        assert run_command(["galore-vit", "eval", "--run", str(run)], there).returncode == 2
        done = run_command(["galore-vit", "eval", "--run", str(run), "--weights", "../last"], there)
        assert done.returncode == 0, done.stderr
    shutil.rmtree(run / "checkpoints")  # it would begin from whatever lies there
    refused = run_command([*again, f"--{flag}", "../last"], there)
    assert_refused(refused, f"has a training without a checkpoint, which begins from --{flag} {there / 'moved'}")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_tracker_that_is_not_installed_is_refused_before_anything_is_made(few_steps, tmp_path, command):
    done = run_command([*few_steps[command], "--device", "cpu", "--tracker", "wandb", "--out", "run"], tmp_path)
    assert_refused(done, "wandb")
    assert list(tmp_path.iterdir()) == []


def stand_in(**functions):
    """A ``before``: the package wandb, with functions of these names."""

    def before():
        module = types.ModuleType("wandb")
        module.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
        module.__dict__.update(functions)
        sys.modules["wandb"] = module

    return before


def refuse(**_):
    raise RuntimeError("No API key configured.")


NOBODY = stand_in(login=refuse)
NO_INIT = stand_in(login=lambda: True, init=refuse)
SAID = "--tracker wandb does not open (No API key configured)"


@pytest.mark.parametrize("command", COMMANDS)
def test_a_tracker_without_a_login_is_refused_before_anything_is_read(few_steps, tmp_path, command):
    nowhere = ["--data-dir", "nowhere"] if "--data-dir" in few_steps[command] else ["--model", "nowhere"]
    words = [*few_steps[command], *nowhere, "--device", "cpu", "--tracker", "wandb", "--out", "run"]
    assert_refused(run_command(words, tmp_path, before=NOBODY), SAID)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("wandb", [NOBODY, NO_INIT], ids=["login", "init"])
def test_every_process_refuses_a_tracker_that_does_not_open(few_steps, tmp_path, wandb):
    words = [*few_steps["pretrain"], "--device", "cpu", "--tracker", "wandb", "--out", "run"]
    for done in run_on(2, words, tmp_path, wandb):
        assert_refused(done, SAID)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_resumed_run_whose_tracker_does_not_open_stays_as_it_was(few_steps, tmp_path):
    words = [*few_steps["pretrain"], *few_steps[""], "--out", "run"]
    assert run_command(words, tmp_path).returncode == 0
    before = {p.name: p.read_bytes() for p in (tmp_path / "run").glob("*.json*")}
    done = run_command(["pretrain", "--resume", "run", "--tracker", "wandb"], tmp_path, before=NO_INIT)
    assert_refused(done, SAID)
    assert {p.name: p.read_bytes() for p in (tmp_path / "run").glob("*.json*")} == before


@pytest.mark.parametrize(("here", "kept"), [(None, (7.5, "RAPL package-0")), (9.0, (9.0, "NVML gpu 0"))])
def test_a_run_that_had_ended_keeps_its_joules_where_there_is_no_counter(tmp_path, here, kept):
    before = {"command": "x", "steps": 4, "joules": 7.5, "energy_source": "RAPL package-0"}
    (tmp_path / "result.json").write_text(json.dumps(before))
    result = FitResult(step=4, joules=here, energy_source="NVML gpu 0" if here else "unavailable")
    assert ended_before(tmp_path, result) == before
    assert (result.joules, result.energy_source) == kept


def _dispatch(words, folder):
    """A command as one of torchrun's processes runs it."""
    from importlib import metadata

    os.chdir(folder)
    without_pictures()
    import sys

    sys.argv = words
    (entry,) = metadata.entry_points(group="console_scripts", name=words[0])
    try:
        entry.load()()
    except SystemExit as stop:
        if stop.code:
            raise RuntimeError(f"exit code {stop.code}") from None


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_two_processes_share_a_folder_that_nobody_named_and_resume_it(few_steps, tmp_path, command):
    """Without --out every process must get the first one's folder; resumed, one process takes the lock for all."""
    words = [*few_steps[command], *few_steps[""]]
    run_ranks(2, _dispatch, words, tmp_path)
    [run] = (tmp_path / "runs").iterdir()
    newest = run / "checkpoints" / "step-00000004"
    before = (newest / "model.safetensors").read_bytes()
    (newest / "manifest.json").write_text("damaged")
    prog = words[: 2 if " " in command else 1]
    run_ranks(2, _dispatch, [*prog, "--resume", str(run.relative_to(tmp_path))], tmp_path)
    assert [p.name for p in (tmp_path / "runs").iterdir()] == [run.name]
    assert (newest / "model.safetensors").read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize("command", ["backrazor-train", "finetune", "pretrain"])
def test_other_data_are_refused_or_gone_on_with_and_noted(few_steps, tmp_path, command):
    words = [*few_steps[command], *few_steps[""], "--out", "run"]
    assert run_command(words, tmp_path).returncode == 0
    newest = tmp_path / "run" / "checkpoints" / "step-00000004"
    (newest / "manifest.json").write_text("damaged")
    if command == "pretrain":
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "a.txt").write_text("".join(f"{i} plus {i} is {2 * i}.\n" for i in range(1000)))
        other = tmp_path / "other"
    else:
        other = image_folder(tmp_path / "other", 8, seed=1)
    again = [words[0], "--resume", "run", "--data-dir", str(other)]
    assert_refused(run_command(again, tmp_path), "was trained on other data", "--data-changed ok")
    done = run_command([*again, "--data-changed", "ok"], tmp_path)
    assert done.returncode == 0, done.stderr
    noted = json.loads((tmp_path / "run" / "config.json").read_text())
    assert noted["data"]["sha256"] != noted["data_before"]["sha256"]
