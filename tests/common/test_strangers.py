"""Files that somebody else made: refused in one sentence before they cost anything, and nothing of them is run.

Only our own guards are tried here, with harmless input: a limit is lowered rather than a large file made.
"""

import ast
import base64
import json
import os
import shutil
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from memtrain_common import files
from memtrain_common.commands.cli import run_command
from memtrain_common.console import Console, printable
from memtrain_common.data import unpacking
from memtrain_common.data.images import tree
from memtrain_common.data.images.image_set import ArrayImages
from memtrain_common.data.images.tree import Tree
from memtrain_common.data.text.documents import find_sources
from memtrain_common.data.text.glue import read_split
from memtrain_common.data.text.instruct import read_rows
from memtrain_common.errors import UserError
from memtrain_common.files import parse_json, read_json, visible_files
from memtrain_common.measuring.memory import Ledger
from memtrain_common.models import encoders
from memtrain_common.models.gpt_files import read_gpt2
from memtrain_common.models.llama2c import load_llama2c
from memtrain_common.models.vit_files import read_state_dict, read_vit
from memtrain_common.runs.run_folder import RunFolder
from support import ROOT

DEEP = "[" * 20_000 + "]" * 20_000
"""JSON that nests more deeply than Python's parser goes, which says so."""


def test_json_is_bounded_in_depth_and_size(tmp_path):
    for text in (DEEP, '{"a":' * 20_000 + "1" + "}" * 20_000):
        with pytest.raises(ValueError, match="nested too deeply"):
            parse_json(text)
    path = tmp_path / "a.json"
    path.write_text("[1, 2, 3]")
    assert read_json(path) == [1, 2, 3]
    with pytest.raises(ValueError, match="larger than 0 MiB"):
        read_json(path, most_bytes=5)


def test_no_line_is_read_beyond_its_limit(tmp_path, monkeypatch):
    for owner in ("memtrain_common.files", "memtrain_common.data.text.documents", "memtrain_common.data.text.instruct"):
        monkeypatch.setattr(f"{owner}.MOST_LINE", 100)
    long, short = "x" * 200, "y" * 20
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in (short, long)))
    (tmp_path / "b.csv").write_text(f"text\n{short}\n{long}\n")
    (tmp_path / "SST-2").mkdir()
    (tmp_path / "SST-2" / "train.tsv").write_text(f"sentence\tlabel\n{short}\t1\n{long}\t0\n")
    for name, line in (("a.jsonl", 2), ("b.csv", 3)):
        (source,) = find_sources(tmp_path / name, "text")
        with pytest.raises(UserError, match=rf"{name}, line {line} is longer than"):
            list(source.documents())
    with pytest.raises(UserError, match=r"a\.jsonl, line 2 is not JSON: it is longer than"):
        read_rows(tmp_path / "a.jsonl")
    with pytest.raises(UserError, match=r"train\.tsv, line 3 is longer than"):
        read_split("sst2", tmp_path, "train")


def test_rows_that_are_no_rows(tmp_path):
    path = tmp_path / "a.jsonl"
    for text, why in (
        (DEEP.replace("[", '{"a":[').replace("]", "]}") + "\n", "nested too deeply"),
        (json.dumps({"question": "half a pair \ud800", "answer": "1"}) + "\n", "half of a surrogate pair"),
        ("[1, 2]", "item 1 is not an object"),
        (DEEP, "nested too deeply"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=why):
            [row.text("question") for row in read_rows(path)]
    path.write_text('{"text": 1}\n')
    with pytest.raises(UserError, match="int, not text"):
        list(find_sources(path, "text")[0].documents())


def test_what_is_packed_is_measured_first(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("train/cat/1.png", b"0" * 5000)
    monkeypatch.setattr(tree, "MOST_PICTURE", 4000)
    monkeypatch.setattr(zipfile.ZipFile, "read", lambda *a, **k: pytest.fail("it was unpacked"))
    with pytest.raises(UserError, match=r"1\.png unpacks to 0 MiB: a picture has at most"):
        Tree(tmp_path / "a.zip").read("train/cat/1.png")
    np.savez_compressed(tmp_path / "v.npz", a=np.zeros(10_000))
    monkeypatch.setattr(os, "sysconf", lambda name: 100)  # a machine of 10,000 bytes
    monkeypatch.setattr(np, "load", lambda *a, **k: pytest.fail("it was loaded"))
    with pytest.raises(UserError, match=r"v\.npz unpacks to 0 GiB, and this machine has"):
        read_vit(tmp_path / "v.npz")
    assert unpacking.npz_reason(KeyError()) == "KeyError"


def test_objects_in_an_npz_are_refused_without_advice(tmp_path):
    np.savez(tmp_path / "v.npz", a=np.array([{"a": 1}], dtype=object))
    with pytest.raises(UserError, match="holds Python objects, which are never unpickled") as refused:
        read_vit(tmp_path / "v.npz")
    assert "allow_pickle" not in str(refused.value)


def test_an_adapters_header_is_measured_first(tmp_path, monkeypatch):
    from lora_xs import LoRAXSError, adapter_header
    from lora_xs import files as adapter_files

    text = adapter_header.pack(["m" * 5000])
    assert adapter_header.unpack(text) == ["m" * 5000]
    monkeypatch.setattr(adapter_header, "MOST_UNPACKED", 1000)
    with pytest.raises(ValueError, match="larger than"):
        adapter_header.unpack(text)
    cut = base64.b64encode(zlib.compress(b"[1]")[:-3]).decode()
    with pytest.raises(ValueError, match="incomplete"):
        adapter_header.unpack(cut)
    path = tmp_path / "adapter.safetensors"
    path.write_bytes((2**40).to_bytes(8, "little") + b"{}")
    with pytest.raises(LoRAXSError, match="claims a header of 1048576 MiB: an adapter's has at most 64 MiB"):
        adapter_files.read_header(path, "any")
    good = {"config": DEEP, "modules": adapter_header.pack([]), "base_sha256": "", "stored_bases": "1", "heads": "[]"}
    for header in (good, {**good, "config": "{}", "heads": DEEP}, {**good, "config": '"text"'}, {}):
        with pytest.raises(LoRAXSError):
            adapter_header.parse_header(path, header)


def test_layers_that_a_model_claims_are_counted_before_they_are_built(tmp_path):
    from memtrain_apps.plan.shapes import find_shape
    from safetensors.torch import save_file

    class Loader:
        def from_pretrained(self, *args, **kwargs):
            pytest.fail("it was built")

    config = {"model_type": "bert", "num_hidden_layers": 10**9}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match="claims num_hidden_layers 1000000000: no model has more than 1024"):
        encoders.from_pretrained(Loader(), str(tmp_path), "model")
    with pytest.raises(UserError, match="num_hidden_layers 1000000000"):
        find_shape(str(tmp_path))
    for text in ("[]", DEEP, '{"num_hidden_layers": "many"}', '{"num_hidden_layers": []}'):
        path.write_text(text)
        with pytest.raises(UserError, match="is not a model's configuration"):
            encoders.from_pretrained(Loader(), str(tmp_path), "model")
    gpt = {"model_type": "gpt2", "n_layer": 10**9, "n_head": 1, "n_embd": 8, "vocab_size": 9, "n_positions": 8}
    path.write_text(json.dumps(gpt))
    import torch

    save_file({"wte.weight": torch.zeros(9, 8)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="claims 1000000000 layers and holds"):
        read_gpt2(tmp_path)


# -- code that comes with a model ------------------------------------------------------------------------------------


def test_code_of_a_model_folder_never_runs_and_nobody_is_asked(tmp_path, monkeypatch):
    import transformers

    (tmp_path / "own.py").write_text("raise SystemExit('it ran')\n")
    names = {"AutoConfig": "own.OwnConfig", "AutoModel": "own.Own", "AutoTokenizer": ["own.Own", None]}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "its-own", "auto_map": names}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"auto_map": names}))
    monkeypatch.setattr("builtins.input", lambda *a: pytest.fail("it asked"))
    for loader in (transformers.AutoConfig, transformers.AutoModel, transformers.AutoTokenizer):
        with pytest.raises(UserError) as refused:
            encoders.from_pretrained(loader, str(tmp_path), "model")
        assert "trust_remote_code" not in str(refused.value)
        assert "never run" in str(refused.value) or "its-own" in str(refused.value)


@pytest.mark.slow
def test_every_model_is_loaded_without_its_code():
    """from_pretrained of transformers is called in one place, which says so."""
    calls = []
    for source in (ROOT / "packages").rglob("src/**/*.py"):
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                if node.func.attr == "from_pretrained":
                    words = {k.arg: ast.unparse(k.value) for k in node.keywords}
                    calls.append((source.name, words.get("trust_remote_code")))
                assert "trust_remote_code" not in [k.arg for k in node.keywords if ast.unparse(k.value) != "False"]
    assert calls == [("encoders.py", "False")]


def test_a_refused_pickle_does_not_repeat_how_to_load_it_anyway(tmp_path):
    import torch
    from memtrain_common.models.gpt_files import read_nanogpt_run

    torch.save({"model": Path("/")}, tmp_path / "a.pth")
    for read in (read_state_dict, read_nanogpt_run):
        with pytest.raises(UserError, match="more than tensors") as refused:
            read(tmp_path / "a.pth")
        assert "weights_only" not in str(refused.value)


# -- folders and names -----------------------------------------------------------------------------------------------


def test_links_out_of_a_text_folder_are_refused_and_those_within_are_followed(tmp_path):
    folder = tmp_path / "texts"
    (folder / "a").mkdir(parents=True)
    (folder / "a" / "one.txt").write_text("one")
    (folder / "two.txt").symlink_to(folder / "a" / "one.txt")
    (folder / "again").symlink_to(folder / "a")
    (folder / ".hidden").symlink_to(tmp_path)
    assert sorted(p.name for p in visible_files(folder)) == ["one.txt", "two.txt"]
    (tmp_path / "link").symlink_to(folder)  # a folder may be named by a link
    assert len(list(visible_files(tmp_path / "link"))) == 2
    (tmp_path / "secret.txt").write_text("not yours")
    for target in (tmp_path / "secret.txt", tmp_path):
        (folder / "out").symlink_to(target)
        for call in (lambda: list(visible_files(folder)), lambda: find_sources(folder, "text")):
            with pytest.raises(UserError, match=r"texts/out is a link that leads out of .*texts: put a copy there"):
                call()
        (folder / "out").unlink()


def test_control_characters_are_shown_and_not_obeyed(tmp_path, capsys):
    name = "a\x1b[31m\x07\u202e\ud800.txt"
    shown = "a\\x1b[31m\\x07\\u202e\\ud800.txt"
    assert printable(f"{name}\n\tü×") == f"{shown}\n\tü×"
    Console(tmp_path / "log.txt").say(name)
    assert capsys.readouterr().out == shown + "\n"
    assert (tmp_path / "log.txt").read_text() == shown + "\n"

    def refuse(argv):
        raise UserError(f"{name} is wrong")

    assert run_command(refuse, prog="prog", argv=[]) == 2
    assert capsys.readouterr().err == f"prog: error: {shown} is wrong\n"


# -- a run's own files -----------------------------------------------------------------------------------------------


def test_what_cannot_be_used_is_one_sentence(tmp_path, capsys):
    for error, said in (
        (FileNotFoundError(2, "No such file or directory", str(tmp_path / "gone")), "is it gone, or was it renamed"),
        (PermissionError(13, "Permission denied", str(tmp_path / "theirs")), "look at what lies there"),
    ):

        def main(argv, error=error):
            raise error

        assert run_command(main, prog="prog", argv=[]) == 2
        line = capsys.readouterr().err
        assert line == f"prog: error: cannot use {error.filename} ({error.strerror}): {said}\n"


def test_a_runs_damaged_files_are_named(tmp_path):
    run = RunFolder.create(tmp_path / "run")
    path = tmp_path / "run" / "metrics.jsonl"
    for bad in ("{", "[1]", '{"step": "5"}', "{}", DEEP):
        path.write_text(f'{{"step": 1, "split": "train", "loss": 1.0}}\n{bad}\n{{"step": 3, "spl')
        with pytest.raises(UserError, match=r"metrics\.jsonl, line 2 is damaged"):
            run.metrics()
    ledger = tmp_path / "memory.json"
    for bad in ("", "{}", '{"by_layer": []}', '{"by_layer": {"weights": {"a": "many"}}}', DEEP):
        ledger.write_text(bad)
        with pytest.raises(UserError, match="is not a memory ledger"):
            Ledger.read(ledger)
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(FileNotFoundError) as gone:  # which a command says in one sentence
        run.append_metrics([{"step": 1}])
    assert gone.value.filename == str(path)


def test_text_where_a_number_belongs_in_a_runs_configuration(tmp_path):
    from lte.tasks.train_config import TrainConfig
    from memtrain_common.commands.configure import saved_config

    run = RunFolder.create(tmp_path / "run")
    run.write_config(TrainConfig(), prog="lte-train", argv=[])
    assert saved_config(TrainConfig, run.path, "lte-train") == TrainConfig()
    path = run.path / "config.json"
    content = read_json(path)
    for name, value, kind in (("max_iters", "8", "a whole number"), ("dropout", "x", "a number"), ("out", 3, "text")):
        path.write_text(json.dumps({**content, "config": {**content["config"], name: value}}))
        with pytest.raises(UserError, match=rf"config\.json has {name} .*: it must be {kind}"):
            saved_config(TrainConfig, run.path, "lte-train")
    for text in ("", "[]", DEEP, json.dumps({"config": 3}), json.dumps({**content, "config": {"no_such": 1}})):
        path.write_text(text)
        with pytest.raises(UserError):
            saved_config(TrainConfig, run.path, "lte-train")


# -- an ablation's results and report --------------------------------------------------------------------------------

ARM = {
    "name": "a", "combination": "full+all+adamw", "axes": {"train": "full", "save": "all", "optim": "adamw"},
    "settings": {}, "seed": 0, "command": "finetune <script>alert(1)</script>", "status": "done", "why": None,
    "metric": "accuracy", "val": 0.5, "test": 0.5, "seconds": 1.0, "trained_parameters": 5, "parameters": 9,
    "samples_per_second": 3.0, "predicted": None, "joules": None, "energy_source": "<b>none</b>", "device": "cpu",
    "measured": {"weights": 1, "gradients": 1, "optimizer": 1, "activations": 1, "buffers": 0},
    "curve": [{"step": 1, "split": "train", "loss": 1.0}],
}  # fmt: skip


def write(folder, **changed):
    (folder / "results").mkdir(parents=True, exist_ok=True)
    record = {k: v for k, v in {**ARM, **changed}.items() if v != "missing"}
    (folder / "results" / "a.json").write_text(json.dumps(record))
    return folder


def test_a_report_escapes_everything_and_forbids_what_it_does_not_need(tmp_path):
    from memtrain_apps.ablate.ablate import draw

    evil = '"><script>alert(1)</script>'
    folder = write(tmp_path, combination=f"full{evil}", name=evil)
    (folder / "config.json").write_text(json.dumps({"command": evil, "device": evil, "versions": {evil: evil}}))
    draw(folder, Console(quiet=True))
    page = (folder / "report.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    rules = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    policy = f'<meta http-equiv="Content-Security-Policy" content="{rules}">'
    assert page.index(policy) < page.index("<title>")


@pytest.mark.parametrize(
    "changed",
    [
        {"axes": {"train": '"><script>', "save": "all", "optim": "adamw"}}, {"axes": "full"}, {"axes": "missing"},
        {"status": "fine"}, {"seed": "0"}, {"val": "0.5"}, {"measured": {}}, {"measured": None}, {"seconds": "missing"},
        {"predicted": {"weights": "1"}}, {"curve": [{"step": "x"}]}, {"settings": {"no such": 1}}, {"name": 3},
    ],
    ids=str,
)  # fmt: skip
def test_a_result_that_lacks_something_is_named(tmp_path, changed):
    from memtrain_apps.ablate.ablate import draw

    with pytest.raises(UserError, match=r"results/a\.json is not an arm's result"):
        draw(write(tmp_path, **changed), Console(quiet=True))


def test_a_damaged_result_is_named(tmp_path):
    from memtrain_apps.ablate.grid_file import read_grid
    from memtrain_apps.ablate.results import read_results

    folder = write(tmp_path)
    path = folder / "results" / "a.json"
    whole = path.read_text()
    for text in (whole[:-20], "", "[]", DEEP, "\udcff"):
        path.write_text(text, errors="surrogateescape")
        with pytest.raises(UserError, match=r"a\.json is not an arm's result"):
            read_results(folder)
    (folder / "grid.toml").write_text("seeds = " + DEEP)
    with pytest.raises(UserError, match="is not TOML: it is nested too deeply"):
        read_grid(folder / "grid.toml")


def test_the_limits_are_what_the_readme_says():
    assert (files.MOST_LINE, unpacking.MOST_PICTURE, encoders.MOST_LAYERS) == (64 << 20, 256 << 20, 1024)


@pytest.mark.parametrize("shared", [True, False])
def test_a_llama2c_file_with_an_output_matrix_of_its_own(tmp_path, shared):
    """Written as llama2.c's export does it: all layers of a kind, the angles, an output matrix where there is one."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=19, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=10, rms_norm_eps=1e-5, tie_word_embeddings=shared,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()

    def neighbours(W, heads):
        return W.view(heads, 2, -1, W.shape[1]).transpose(1, 2).reshape(W.shape)

    layers = model.model.layers
    tensors = [model.model.embed_tokens.weight, *(b.input_layernorm.weight for b in layers)]
    tensors += [neighbours(b.self_attn.q_proj.weight, 4) for b in layers]
    tensors += [neighbours(b.self_attn.k_proj.weight, 2) for b in layers]
    for name in ("self_attn.v_proj", "self_attn.o_proj", "post_attention_layernorm", "mlp.gate_proj", "mlp.down_proj"):
        tensors += [b.get_submodule(name).weight for b in layers]
    tensors += [*(b.mlp.up_proj.weight for b in layers), model.model.norm.weight, torch.randn(2, 10, 2)]
    tensors += [] if shared else [model.lm_head.weight]
    header = struct.pack("7i", 16, 24, 2, 4, 2, 19 if shared else -19, 10)
    numbers = torch.cat([t.detach().flatten() for t in tensors]).numpy().tobytes()
    (tmp_path / "model.bin").write_bytes(header + numbers)
    found = load_llama2c(tmp_path / "model.bin")
    tokens = torch.randint(0, 19, (3, 7))
    torch.testing.assert_close(found(tokens).logits, model(tokens).logits)
    (tmp_path / "short.bin").write_bytes(header + numbers[: -4 if not shared else -4 * 41])
    with pytest.raises(UserError, match="is cut short"):
        load_llama2c(tmp_path / "short.bin")
    (tmp_path / "zero.bin").write_bytes(struct.pack("7i", 16, 24, 2, 0, 2, 19, 10) + numbers)
    with pytest.raises(UserError, match="its header has the sizes"):
        load_llama2c(tmp_path / "zero.bin")


@pytest.mark.parametrize(
    "array", [np.zeros((2, 4, 4), np.float32), np.zeros((2, 4, 4), np.uint16), np.zeros((4, 4), np.uint8)]
)
def test_pictures_whose_range_nothing_says_are_refused(array):
    with pytest.raises(ValueError, match="must be uint8"):
        ArrayImages(array)
