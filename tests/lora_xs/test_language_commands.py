"""lora-xs instruct, eval, merge, export-peft and info, end to end on a small Llama."""

import contextlib
import copy
import json
import re
import shutil
import signal
from pathlib import Path

import peft
import pytest
import torch
import transformers
from lora_xs import LoRAXSConfig, LoRAXSError, inject, load_adapter, save_adapter
from lora_xs.tasks.evaluate import generate
from lora_xs.tasks.models import write_task
from lora_xs.tasks.predictions import finished
from memtrain_common.data.text.answers import gsm8k_answer, gsm8k_correct
from memtrain_common.data.text.instruct import Example
from memtrain_common.data.text.instruct_batches import IGNORED, collate, loss_of, shared_batch, tokenize
from memtrain_common.errors import UserError
from memtrain_common.files import write_json
from memtrain_common.measuring.intervals import wilson
from memtrain_common.models.encoders import load_tokenizer
from safetensors.torch import load_file
from support import (
    Command,
    assert_refused,
    newest_checkpoint,
    pause_at,
    rows,
    run_command,
    run_ranks,
)

TINY = ["lora-xs", "instruct", "--tracker", "none", "--rank", "16", "--learning-rate", "2e-2", "--epochs", "30",
        "--batch-size", "8", "--gradient-accumulation-steps", "2", "--val-samples", "2", "--eval-interval", "5",
        "--log-interval", "5", "--max-length", "100", "--out", "run"]  # fmt: skip


@pytest.fixture(scope="module")
def words(language_model, sums):
    return [*TINY, "--model", language_model, "--data", sums]


@pytest.fixture(scope="module")
def tuned(words, tmp_path_factory):
    cwd = tmp_path_factory.mktemp("tuned")
    done = run_command(words, cwd)
    assert done.returncode == 0, done.stderr
    return cwd / "run", done


def test_the_loss_sees_the_response_alone(language_model):
    tokenizer = load_tokenizer(language_model)
    row = tokenize(Example("1 plus 2?", " 3"), tokenizer, 100)
    batch = collate([row, tokenize(Example("1 plus", " 3"), tokenizer, 100)], tokenizer.pad_token_id)
    seen = batch["labels"][0]
    assert tokenizer.decode(seen[seen != IGNORED]) == " 3</s>"
    assert batch["input_ids"][0, : row.prompt].tolist() == tokenizer("1 plus 2?")["input_ids"]
    n = int(batch["attention_mask"][1].sum())
    assert n < batch["labels"].shape[1]
    assert bool((batch["labels"][1, n:] == IGNORED).all())
    assert int((batch["labels"][1] != IGNORED).sum()) == 3
    assert tokenize(Example("1 plus 2?", " 3"), tokenizer, 4).ids == row.ids[:4]


@pytest.mark.slow
def test_instruct_learns(tuned):
    run, done = tuned
    losses = [r["loss"] for r in rows(run) if r["split"] == "train"]
    assert losses[-1] < 0.6 * losses[0]
    assert "14 training rows, 2 held out" in done.stdout
    saved = load_file(newest_checkpoint(run) / "model.safetensors")
    assert set(saved) == {n for n in saved if n.endswith("lora_xs.R.default")}


@pytest.mark.slow
def test_sigterm_and_resume(tuned, words, tmp_path):
    done = Command(words, tmp_path, before=pause_at(10)).end_by(signal.SIGTERM)
    assert done.returncode == 143, done.stderr
    done = run_command(["lora-xs", "instruct", "--resume", "run"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert rows(tmp_path / "run") == rows(tuned[0])
    ours, theirs = (p / "adapter" / "adapter.safetensors" for p in (tmp_path / "run", tuned[0]))
    assert ours.read_bytes() == theirs.read_bytes()


@pytest.mark.slow
def test_two_processes_give_the_run_of_one(tuned, words, tmp_path):
    """Rows of unequal length: a token weighs the same whichever process has it."""
    from lora_xs.cli import dispatch

    run_ranks(2, dispatch, [*words[1:], "--out", str(tmp_path / "run")])
    one, two = rows(tuned[0]), rows(tmp_path / "run")
    assert len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)
    for a, b in zip(one[:3], two[:3], strict=True):
        assert b["loss"] == pytest.approx(a["loss"], abs=1e-5)


def test_the_weight_makes_the_mean_of_processes_that_of_the_batch(language_model):
    tokenizer = load_tokenizer(language_model)
    model = transformers.AutoModelForCausalLM.from_pretrained(language_model)
    batch = [tokenize(Example("1 plus 2?", " 3" * n), tokenizer, 100) for n in (1, 9, 2, 4)]
    whole = loss_of(model, collate(batch, tokenizer.pad_token_id))
    parts = [loss_of(model, shared_batch(batch, tokenizer.pad_token_id, r, 2)) for r in range(2)]
    torch.testing.assert_close(sum(parts) / 2, whole)
    assert abs(parts[0] - parts[1]) > 0.1 * whole


def test_info_reads_all_of_an_adapter(roberta, tmp_path, capsys):
    """As merge does: a flipped bit in the adapter or in its head, a head that is missing or another's."""
    from lora_xs.tasks.commands import COMMANDS

    for name in ("sound", "other"):
        torch.manual_seed(ord(name[0]))
        save_adapter(inject(roberta(), LoRAXSConfig(4), cache=False), tmp_path / name)

    def info(folder):
        COMMANDS["info"][0](["--adapter", str(folder)], "")

    info(tmp_path / "sound")
    assert "trained numbers in R" in capsys.readouterr().out
    for file in ("adapter.safetensors", "head.safetensors"):
        folder = tmp_path / f"damaged-{file}"
        shutil.copytree(tmp_path / "sound", folder)
        content = bytearray((folder / file).read_bytes())
        content[-3] ^= 1
        (folder / file).write_bytes(content)
        with pytest.raises(LoRAXSError, match=rf"{file} is damaged: its contents do not have the SHA-256"):
            info(folder)
    shutil.copy(tmp_path / "other" / "head.safetensors", folder)
    with pytest.raises(LoRAXSError, match="belongs to another adapter"):
        info(folder)
    (folder / "head.safetensors").unlink()
    with pytest.raises(LoRAXSError, match="there is no file"):
        info(folder)
    assert capsys.readouterr().out == ""


def evaluate(cwd, flags, *more):
    """lora-xs eval in this process, in a folder."""
    from lora_xs.tasks.commands import COMMANDS

    words = [word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", value)]
    with contextlib.chdir(cwd):
        COMMANDS["eval"][0]([*words, *more], "")


@pytest.mark.slow
def test_eval_scores_and_keeps_predictions(tuned, sums, tmp_path):
    run, _ = tuned
    words = ["lora-xs", "eval", "--adapter", str(run / "adapter"), "--data", sums, "--max-new-tokens", "12",
             "--batch-size", "5", "--out", "p.jsonl"]  # fmt: skip
    done = run_command(words, tmp_path)
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "p.jsonl").read_text().splitlines()
    predictions = [json.loads(line) for line in lines]
    assert len(predictions) == 16
    for p in predictions:
        assert p["answer"] == gsm8k_answer(p["output"])
        assert p["correct"] == gsm8k_correct(p["answer"], p["expected"])
    share = sum(p["correct"] for p in predictions) / 16
    assert re.search(rf"accuracy +{100 * share:.2f} \(", done.stdout)
    assert_refused(run_command(words, tmp_path), "p.jsonl exists", "--resume")
    (tmp_path / "p.jsonl").write_text("\n".join(lines[:7]) + "\n" + lines[7][:20])  # killed while writing
    again = run_command([*words, "--resume"], tmp_path)
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "p.jsonl").read_text().splitlines() == lines
    other = run_command([*words, "--resume", "--official-metric"], tmp_path)
    assert_refused(other, "other predictions", "official_metric of line 1 is False")


def test_predictions_are_gone_on_with_by_what_made_them(language_model, sums, tmp_path):
    """Adapter, model, flags and answers; the refused command leaves what was there."""
    model = transformers.AutoModelForCausalLM.from_pretrained(language_model)
    for name in ("a", "b"):
        adapted = inject(copy.deepcopy(model), LoRAXSConfig(4), cache=False)
        with torch.no_grad():
            next(p for p in adapted.parameters() if p.requires_grad).add_(ord(name) * 1e-3)
        save_adapter(adapted, tmp_path / name)
        write_task(tmp_path / name, model=language_model)
    shutil.copytree(language_model, tmp_path / "moved")
    shutil.copytree(language_model, tmp_path / "other")
    with torch.no_grad():
        model.model.norm.weight.mul_(1.5)
    model.save_pretrained(tmp_path / "other")
    out, data = tmp_path / "p.jsonl", tmp_path / "sums.jsonl"
    shutil.copy(sums, data)
    words = {"adapter": "a", "data": str(data), "out": str(out), "device": "cpu", "max_new_tokens": "2", "limit": "3"}
    evaluate(tmp_path, words)
    lines = out.read_bytes().splitlines(keepends=True)
    killed = b"".join([*lines[:2], lines[2][:15]])
    about = (tmp_path / "p.jsonl.about.json").read_bytes()
    changed = (b'#### 0"', b'#### 9"')
    assert changed[0] in data.read_bytes().splitlines()[0]
    for more, expected in (
        ({"adapter": "b"}, "were made by another adapter"),
        ({"adapter": "", "model": "other"}, "were made by an adapter"),
        ({"num_beams": "2"}, "were made by --num-beams 1, not 2"),
        ({"max_new_tokens": "3"}, "were made by --max-new-tokens 2, not 3"),
        (changed, "expected of line 1 is '0', and would be '9'"),
        (about[:-9], "cannot be read"),
        (None, "there is no p.jsonl.about.json beside it"),
    ):
        out.write_bytes(killed)
        (tmp_path / "p.jsonl.about.json").write_bytes(about)
        data.write_bytes(Path(sums).read_bytes().replace(*(more if isinstance(more, tuple) else (b"", b""))))
        if isinstance(more, bytes):
            (tmp_path / "p.jsonl.about.json").write_bytes(more)
        elif more is None:
            (tmp_path / "p.jsonl.about.json").unlink()
        with pytest.raises(UserError, match=re.escape(expected)):
            evaluate(tmp_path, {**words, **(more if isinstance(more, dict) else {})}, "--resume")
        assert out.read_bytes() == killed
    data.write_bytes(Path(sums).read_bytes())
    (tmp_path / "p.jsonl.about.json").write_bytes(about)
    evaluate(tmp_path, {**words, "model": "moved", "limit": "4", "batch_size": "1"}, "--resume")
    assert out.read_bytes().splitlines(keepends=True)[:3] == lines
    assert len(out.read_bytes().splitlines()) == 4
    words |= {"adapter": "", "model": language_model, "out": str(tmp_path / "base")}
    evaluate(tmp_path, words)
    for more, expected in (
        ({"model": "other"}, "another base model ("),
        ({"adapter": "a"}, "the base model alone"),
        ({"base_dtype": "float16"}, "--base-dtype float32, not float16"),
    ):
        with pytest.raises(UserError, match=re.escape(f"were made by {expected}")):
            evaluate(tmp_path, {**words, **more}, "--resume")
    for what in ("notes", '{"a": 1}\n'):
        (tmp_path / "mine").write_text(what)
        with pytest.raises(UserError, match="mine holds other"):
            evaluate(tmp_path, {**words, "out": str(tmp_path / "mine")}, "--resume")
        assert (tmp_path / "mine").read_text() == what


@pytest.mark.parametrize("text", ['{"question": "1 + 1?", "answer": "#### 2"}\n', "[1]", "notes"])
def test_a_file_of_others_beside_the_predictions_is_not_written_over(text, tmp_path):
    """What made the predictions is written to OUT.about.json, which may be the questions' own file."""
    beside = tmp_path / "p.about.json"
    beside.write_text(text)
    with pytest.raises(UserError, match="is there already, and says of no predictions"):
        finished(tmp_path / "p", False, [])
    assert beside.read_text() == text
    write_json(beside, {"model_sha256": "0"})  # of a run that a kill ended before its first prediction
    assert finished(tmp_path / "p", False, []) == ([], 0)


def test_a_kill_in_the_first_batch_loses_no_prediction(language_model, sums, tmp_path, monkeypatch):
    words = {"model": language_model, "data": sums, "out": str(tmp_path / "p"), "device": "cpu", "max_new_tokens": "1"}
    evaluate(tmp_path, {**words, "limit": "3"})
    before = (tmp_path / "p").read_bytes()
    seen = []

    def killed(*_, **__):
        seen.append((tmp_path / "p").read_bytes())
        raise KeyboardInterrupt

    monkeypatch.setattr("lora_xs.tasks.evaluate.generate", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluate(tmp_path, words, "--resume")
    assert seen == [before]


@pytest.mark.slow
def test_eval_goes_on_with_questions_that_hold_unicodes_own_line_ends(tuned, tmp_path):
    run, _ = tuned
    asked = [{"question": f"Add 1{end}and {i}.", "answer": f"#### {i + 1}"} for i, end in enumerate("\u2028\u2029\x85")]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in asked)
    (tmp_path / "q.jsonl").write_text(text, encoding="utf-8")
    words = ["lora-xs", "eval", "--adapter", str(run / "adapter"), "--data", "q.jsonl", "--max-new-tokens", "4",
             "--batch-size", "1", "--out", "p.jsonl"]  # fmt: skip
    done = run_command(words, tmp_path)
    assert done.returncode == 0, done.stderr
    whole = (tmp_path / "p.jsonl").read_bytes()
    assert whole.count(b"\n") == 3
    (tmp_path / "p.jsonl").write_bytes(whole[: whole.index(b"\n", whole.index(b"\n") + 1) + 1])
    again = run_command([*words, "--resume"], tmp_path)
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "p.jsonl").read_bytes() == whole


@pytest.mark.parametrize("beams", [1, 2])
def test_an_answer_does_not_depend_on_its_neighbours(language_model, beams):
    """A model of 128 positions: beside a prompt that fills them a short one has its own room all the same."""
    tokenizer = load_tokenizer(language_model)
    tokenizer.padding_side = "left"
    model = transformers.AutoModelForCausalLM.from_pretrained(language_model).eval()
    prompts = ["1 plus 2?" * n for n in (1, 20, 3, 24, 2, 23)]
    assert 110 < len(tokenizer(prompts[3])["input_ids"]) < 128
    alone = [generate(model, tokenizer, [p], beams=beams, longest=100)[0] for p in prompts]
    lengths = [len(tokenizer(text)["input_ids"]) for text in alone]
    assert max(lengths) > 20  # more than the longest one leaves
    assert generate(model, tokenizer, prompts, beams=beams, longest=100) == alone
    stop = alone[0][30:40]
    for asked in ([prompts[0]], [prompts[0], prompts[3]]):
        ended = generate(model, tokenizer, asked, beams=beams, longest=100, stops=(stop,))[0]
        assert ended == alone[0][: alone[0].find(stop)]


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("own", [None, 7, [7, 8]])
def test_an_answer_ends_at_the_tokenizers_end_token_too(language_model, own, beams, monkeypatch):
    """The one that training teaches; the model's generation_config.json may name another, or none."""
    tokenizer = load_tokenizer(language_model)
    tokenizer.padding_side = "left"
    model = transformers.AutoModelForCausalLM.from_pretrained(language_model).eval()
    model.generation_config.eos_token_id = own
    script = {0: 30, 1: 31, 2: tokenizer.eos_token_id}  # and then 40 for ever, where nothing stops it
    prompt = tokenizer(["1 plus 2?"], return_tensors="pt")["input_ids"].shape[1]
    forward = type(model).forward

    def scripted(self, *args, **kwargs):
        out = forward(self, *args, **kwargs)
        cache = kwargs["past_key_values"].get_seq_length() - prompt
        wanted = 7 if cache == 1 and ended_by_model else script.get(cache, 40)
        out.logits[:, -1] = torch.nn.functional.one_hot(torch.tensor(wanted), out.logits.shape[-1]) * 1e4
        return out

    monkeypatch.setattr(type(model), "forward", scripted)
    for ended_by_model in (False, True):
        said = tokenizer.decode([30] if ended_by_model and own else [30, 7] if ended_by_model else [30, 31])
        assert generate(model, tokenizer, ["1 plus 2?"], beams=beams, longest=20) == [said]


def test_the_interval_of_a_share():
    """Against the definition: the shares p whose z-test does not reject what was seen."""
    for right, n in ((0, 100), (7, 16), (16, 16)):
        low, high = wilson(right, n)
        for p in (low, high):
            assert p in (0.0, 1.0) or abs(right / n - p) == pytest.approx(1.96 * (p * (1 - p) / n) ** 0.5)
        assert 0 <= low <= right / n <= high <= 1
        assert high - low > 0.03


def test_eval_of_commonsense_by_beams_and_base_model(language_model, tmp_path):
    (tmp_path / "boolq").mkdir()
    items = [{"instruction": "true or false?", "input": "", "output": "the correct answer is true", "answer": a}
             for a in ("true", "false", "true")]  # fmt: skip
    (tmp_path / "boolq" / "test.json").write_text(json.dumps(items))
    words = [
        "lora-xs",
        "eval",
        "--model",
        language_model,
        "--data",
        "commonsense:boolq",
        "--data-dir",
        ".",
        "--out",
        "p",
    ]
    done = run_command([*words, "--max-new-tokens", "4", "--official-metric"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "4 beams, up to 4 tokens, official metric" in done.stdout
    assert [json.loads(x)["expected"] for x in (tmp_path / "p").read_text().splitlines()] == ["true", "false", "true"]


def logits(model):
    """In float64: what differs is then what was stored, and not the order of float32's sums."""
    with torch.no_grad():
        return model.double().eval()(input_ids=torch.arange(10, 30)[None]).logits


@pytest.mark.slow
def test_merge_and_export_give_the_adapters_logits(tuned, language_model, tmp_path):
    run, _ = tuned
    base = transformers.AutoModelForCausalLM.from_pretrained(language_model)
    plain = logits(copy.deepcopy(base))
    ours = logits(load_adapter(base, run / "adapter"))
    assert float((ours - plain).abs().max()) > 0.1
    for command in ("merge", "export-peft"):
        done = run_command(["lora-xs", command, "--adapter", str(run / "adapter"), "--out", command], tmp_path)
        assert done.returncode == 0, done.stderr
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merge")
    torch.testing.assert_close(logits(merged), ours, atol=1e-5, rtol=0)
    transformers.AutoTokenizer.from_pretrained(tmp_path / "merge")
    fresh = transformers.AutoModelForCausalLM.from_pretrained(language_model)
    exported = peft.PeftModel.from_pretrained(fresh, str(tmp_path / "export-peft"))
    torch.testing.assert_close(logits(exported), ours, atol=1e-5, rtol=0)
    again = run_command(["lora-xs", "merge", "--adapter", str(run / "adapter"), "--out", "merge"], tmp_path)
    assert_refused(again, "merge is not empty")


def test_merging_an_embedding_unties_the_saved_model(language_model, tmp_path):
    from lora_xs import LoRAXSConfig, inject, save_adapter

    model = inject(
        transformers.AutoModelForCausalLM.from_pretrained(language_model),
        LoRAXSConfig(4, targets=("embed_tokens",), r_std=1.0, head=()),
    )
    save_adapter(model, tmp_path / "adapter")
    ours = logits(model)
    words = ["lora-xs", "merge", "--adapter", "adapter", "--model", language_model, "--out", "merged"]
    done = run_command(words, tmp_path)
    assert done.returncode == 0, done.stderr
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.config.tie_word_embeddings is False
    torch.testing.assert_close(logits(merged), ours, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_info_describes_and_counts(tuned, language_model, tmp_path):
    run, _ = tuned
    done = run_command(["lora-xs", "info", "--adapter", str(run / "adapter"), "--model", language_model], tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(rf"trained numbers in R +{14 * 256:,}\n", done.stdout)
    assert re.search(rf"fits +{re.escape(language_model)}", done.stdout)
    transformers.RobertaConfig(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096,
        architectures=["RobertaForMaskedLM"],
    ).save_pretrained(tmp_path / "large")  # fmt: skip
    counted = run_command(["lora-xs", "info", "--model", "large", "--ranks", "4", "25"], tmp_path)
    assert counted.returncode == 0, counted.stderr
    assert re.search(r"\n +4 +96 +1,536 ", counted.stdout)
    assert re.search(r"\n +25 +96 +60,000 ", counted.stdout)


@pytest.mark.slow
def test_mistakes_are_one_sentence(tuned, words, language_model, sums, tmp_path):
    run, _ = tuned
    adapter = str(run / "adapter")
    (tmp_path / "bad.jsonl").write_text('{"query": "1", "response": "2"}\n{"query": "1", "answer": "2"}\n')
    bad = [*words, "--data", "bad.jsonl"]
    assert_refused(run_command(bad, tmp_path), "bad.jsonl, line 2", "'response'")
    assert_refused(run_command([*bad, "--fields", "query", "reply"], tmp_path), "bad.jsonl, line 1", "'reply'")
    (tmp_path / "cut.jsonl").write_text('{"query": "1", "response": "2"}\n{"query": ')
    assert_refused(run_command([*words, "--data", "cut.jsonl"], tmp_path), "cut.jsonl, line 2", "not JSON")
    assert_refused(run_command([*words, "--data", "none.jsonl"], tmp_path), "none.jsonl", "metamathqa")
    assert_refused(run_command([*words, "--rank", "33"], tmp_path), "33", "32")
    assert_refused(run_command([*words, "--max-length", "5"], tmp_path), "--max-length 5")
    assert_refused(run_command([*words, "--keep", "best", "--val-samples", "0"], tmp_path), "--val-samples")
    assert not (tmp_path / "run").exists()
    evaluate = ["lora-xs", "eval", "--adapter", adapter, "--out", "p.jsonl", "--data"]
    assert_refused(run_command([*evaluate, "commonsense:bool"], tmp_path), "commonsense:bool", "boolq")
    (tmp_path / "gold.jsonl").write_text('{"question": "1 plus 1?", "answer": "2"}\n')
    assert_refused(run_command([*evaluate, "gold.jsonl"], tmp_path), "gold.jsonl, line 1", "####")
    other = transformers.AutoModelForCausalLM.from_pretrained(language_model)
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight[0, 0] += 1
    other.save_pretrained(tmp_path / "other")
    altered = run_command(["lora-xs", "merge", "--adapter", adapter, "--model", "other", "--out", "m"], tmp_path)
    assert_refused(altered, "layers.1.mlp.up_proj.weight", "other base weights")
    assert not (tmp_path / "m").exists()


@pytest.mark.slow
def test_a_target_that_the_model_never_calls_ends_the_run_after_one_step(language_model, sums, tmp_path):
    load_tokenizer(language_model).save_pretrained(tmp_path / "mamba")
    config = transformers.MambaConfig(
        vocab_size=len(load_tokenizer(language_model)), hidden_size=32, num_hidden_layers=2, time_step_rank=16
    )
    transformers.MambaForCausalLM(config).save_pretrained(tmp_path / "mamba")
    words = [*TINY, "--model", "mamba", "--data", sums, "--targets", "x_proj", "dt_proj"]
    done = run_command(words, tmp_path)
    assert done.returncode == 2
    *_, sentence = done.stderr.strip().splitlines()  # after what transformers says of its kernels
    assert "trained nothing at backbone.layers.*.mixer.dt_proj (2)" in sentence
    assert "UserWarning" not in done.stderr
