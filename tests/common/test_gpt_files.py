"""A GPT's weights through other tools' files: nanoGPT's checkpoint and transformers' GPT-2 folder, logits equal."""

import json
import math
import os

import pytest
import torch
import torch.nn.functional as F
from memtrain_common.errors import UserError
from memtrain_common.models.gpt import GPT, GPTConfig
from memtrain_common.models.gpt_files import (
    PlainGPT,
    download_gpt2,
    read_gpt2,
    read_nanogpt_run,
    write_gpt2,
    write_nanogpt,
)

SHAPE = {"block_size": 13, "vocab_size": 71, "n_layer": 3, "n_head": 3, "n_embd": 24}
ASKED = {"learning_rate": 1e-3, "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95, "dataset": "shakespeare_char"}


def plain(bias):
    """A GPT of which no parameter is what initialisation makes it."""
    model = GPT(GPTConfig(**SHAPE, bias=bias))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.2 + 0.1)
    return PlainGPT(model.config, dict(model.state_dict())), model.eval()


def written_out(weights, tokens, n_head, bias):
    """nanoGPT's forward pass without its modules: slow attention, from tensors by nanoGPT's names."""

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T + (weights[f"{name}.bias"] if bias else 0)

    def norm(x, name):
        scaled = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return scaled * weights[f"{name}.weight"] + (weights[f"{name}.bias"] if bias else 0)

    T = tokens.shape[1]
    x = weights["transformer.wte.weight"][tokens] + weights["transformer.wpe.weight"][:T]
    for i in range(sum(name.endswith("ln_1.weight") for name in weights)):
        h = f"transformer.h.{i}"
        q, k, v = linear(norm(x, f"{h}.ln_1"), f"{h}.attn.c_attn").chunk(3, dim=-1)
        parts = []
        for q1, k1, v1 in zip(*(t.chunk(n_head, dim=-1) for t in (q, k, v)), strict=True):
            scores = q1 @ k1.mT / math.sqrt(q1.shape[-1])
            scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
            parts.append(scores.softmax(-1) @ v1)
        x = x + linear(torch.cat(parts, -1), f"{h}.attn.c_proj")
        hidden = linear(norm(x, f"{h}.ln_2"), f"{h}.mlp.c_fc")
        x = x + linear(hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2))), f"{h}.mlp.c_proj")
    return norm(x, "transformer.ln_f") @ weights["lm_head.weight"].T


@pytest.mark.parametrize("bias", [False, True])
def test_a_nanogpt_checkpoint_has_what_sample_py_and_train_py_read(tmp_path, bias):
    """What nanoGPT does with the file, step by step: its names, its strict loading, its optimizer groups."""
    ours, model = plain(bias)
    path = tmp_path / "out" / "ckpt.pt"
    write_nanogpt(path, ours, iter_num=40, best_val_loss=1.5, config=ASKED, dropout=0.2)
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    assert set(checkpoint) == {"model", "optimizer", "model_args", "iter_num", "best_val_loss", "config"}
    assert checkpoint["model_args"] == {**SHAPE, "bias": bias, "dropout": 0.2}
    assert (checkpoint["iter_num"], checkpoint["best_val_loss"]) == (40, 1.5)
    assert checkpoint["config"]["dataset"] == "shakespeare_char"
    layer = ["ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"]
    kinds = ["weight", "bias"] if bias else ["weight"]
    expected = {f"transformer.h.{i}.{m}.{k}" for i in range(3) for m in layer for k in kinds}
    expected |= {"transformer.wte.weight", "transformer.wpe.weight", "lm_head.weight"}
    expected |= {f"transformer.ln_f.{k}" for k in kinds}
    assert set(checkpoint["model"]) == expected
    tokens = torch.randint(0, 71, (2, 13))
    torch.testing.assert_close(written_out(checkpoint["model"], tokens, 3, bias), model(tokens), rtol=1e-4, atol=1e-4)
    parameters = [torch.nn.Parameter(t.clone()) for t in dict(model.named_parameters()).values()]
    decay, plain_ones = ([p for p in parameters if (p.dim() >= 2) == wide] for wide in (True, False))
    optimizer = torch.optim.AdamW([{"params": decay, "weight_decay": 0.1}, {"params": plain_ones, "weight_decay": 0.0}])
    optimizer.load_state_dict(checkpoint["optimizer"])
    assert optimizer.param_groups[0]["lr"] == 1e-3


@pytest.mark.parametrize("bias", [False, True])
def test_nanogpts_checkpoint_comes_back(tmp_path, bias):
    """Also as torch.compile prefixes it, and with the attention masks that it had before SDPA."""
    ours, model = plain(bias)
    content = {
        "model_args": {**SHAPE, "bias": bias, "dropout": 0.0},
        "model": {f"_orig_mod.{k}": v for k, v in model.state_dict().items()},
        "config": ASKED, "iter_num": 3, "best_val_loss": torch.tensor(2.5), "optimizer": {},
    }  # fmt: skip
    content["model"]["_orig_mod.transformer.h.0.attn.bias"] = torch.ones(1, 1, 13, 13)
    torch.save(content, tmp_path / "ckpt.pt")
    back = read_nanogpt_run(tmp_path / "ckpt.pt").plain
    assert back.config == ours.config
    tokens = torch.randint(0, 71, (2, 13))
    assert torch.equal(back.model().eval()(tokens), model(tokens))
    short = back.cropped(7).model().eval()
    assert torch.equal(short(tokens[:, :7]), model(tokens[:, :7]))


class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/pwned-by-ckpt",)


def test_a_bad_checkpoint_is_one_sentence_and_never_run(tmp_path):
    _, model = plain(False)
    weights = dict(model.state_dict())
    args = {**SHAPE, "bias": False}
    short = {k: v for k, v in weights.items() if k != "transformer.h.1.mlp.c_fc.weight"}
    cases = {
        "evil": {"model": Evil(), "model_args": args},
        "list": [1, 2],
        "args": {"model": weights, "model_args": {**args, "n_head": 5}},
        "short": {"model": short, "model_args": args},
        "shape": {"model": weights, "model_args": {**args, "n_layer": 2}},
        "extra": {"model": {**weights, "transformer.h.0.attn.lora_A": torch.ones(2)}, "model_args": args},
    }
    for name, content in cases.items():
        path = tmp_path / f"{name}.pt"
        torch.save(content, path)
        with pytest.raises(UserError) as error:
            read_nanogpt_run(path)
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)
    (tmp_path / "noise.pt").write_bytes(b"not a zip file at all")
    with pytest.raises(UserError, match=r"noise\.pt is not a checkpoint of nanoGPT's"):
        read_nanogpt_run(tmp_path / "noise.pt")
    assert not os.path.exists("/tmp/pwned-by-ckpt")


@pytest.mark.parametrize("bias", [False, True])
def test_transformers_gives_the_same_logits(tmp_path, bias):
    transformers = pytest.importorskip("transformers")
    ours, model = plain(bias)
    write_gpt2(tmp_path / "gpt2", ours)
    theirs, loading = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "gpt2", output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    tokens = torch.randint(0, 71, (2, 13))
    with torch.no_grad():
        torch.testing.assert_close(theirs.eval()(tokens).logits, model(tokens), rtol=1e-5, atol=1e-5)
    back = read_gpt2(tmp_path / "gpt2")
    assert back.config == GPTConfig(**SHAPE, bias=True)
    torch.testing.assert_close(back.model().eval()(tokens), model(tokens), rtol=1e-5, atol=1e-5)


def test_a_folder_that_transformers_wrote_comes_back(tmp_path):
    """As OpenAI's upload has it, too: without the prefix, with masks."""
    transformers = pytest.importorskip("transformers")
    from safetensors.torch import load_file, save_file

    config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=12, vocab_size=40, n_positions=9,
                                     activation_function="gelu")  # fmt: skip
    theirs = transformers.GPT2LMHeadModel(config).eval()
    theirs.save_pretrained(tmp_path / "a")
    tokens = torch.randint(0, 40, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(read_gpt2(tmp_path / "a").model().eval()(tokens), theirs(tokens).logits)
    old = {k.removeprefix("transformer."): v for k, v in load_file(tmp_path / "a" / "model.safetensors").items()}
    old["h.0.attn.bias"] = torch.ones(1, 1, 9, 9)
    save_file(old, tmp_path / "a" / "model.safetensors")
    with torch.no_grad():
        torch.testing.assert_close(read_gpt2(tmp_path / "a").model().eval()(tokens), theirs(tokens).logits)


def test_a_bad_folder_is_one_sentence(tmp_path):
    ours, _ = plain(True)
    for name, change, expected in (
        ("bert", {"model_type": "bert"}, "holds the model type 'bert'"),
        ("half", {"n_embd": None}, "n_embd"),
        ("wide", {"n_embd": 48}, "should be (71, 48) and is (71, 24)"),
    ):
        write_gpt2(tmp_path / name, ours)
        path = tmp_path / name / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
        with pytest.raises(UserError) as error:
            read_gpt2(tmp_path / name)
        assert expected in str(error.value) or name == "half"
        assert "\n" not in str(error.value)
    (tmp_path / "bert" / "model.safetensors").unlink()
    (tmp_path / "bert" / "config.json").write_text(json.dumps({"model_type": "gpt2", **{k: 1 for k in (
        "n_layer", "n_head", "n_embd", "vocab_size", "n_positions")}}))  # fmt: skip
    with pytest.raises(UserError, match=r"has no model\.safetensors"):
        read_gpt2(tmp_path / "bert")


def test_without_a_network_a_name_is_one_sentence(monkeypatch):
    import huggingface_hub

    def offline(*args, **kwargs):
        raise ConnectionError("no route to the hub\nand more lines")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(UserError, match="gpt2-medium could not be downloaded \\(no route to the hub\\): name a folder"):
        download_gpt2("gpt2-medium")


def test_generation_stays_inside_the_vocabulary_and_counts():
    _, model = plain(False)
    counted = []
    start = torch.zeros(1, 1, dtype=torch.long)
    tokens = model.generate(start, 40, temperature=5.0, vocab_size=7, each=lambda: counted.append(1))
    assert len(counted) == 40
    assert int(tokens.max()) < 7
    assert len(set(tokens[0].tolist())) > 3
    with torch.no_grad():  # one likely token: the same as taking the largest
        greedy = model.generate(start, 3, top_k=1)
        assert int(greedy[0, 1]) == int(F.softmax(model(start)[0, -1], -1).argmax())


@pytest.mark.parametrize(
    ("name", "value"),
    [("activation_function", "relu"), ("layer_norm_epsilon", 1e-2), ("scale_attn_weights", False),
     ("scale_attn_by_inverse_layer_idx", True), ("tie_word_embeddings", False)],
)  # fmt: skip
def test_a_gpt2_that_computes_something_else_is_refused(tmp_path, name, value):
    given, _ = plain(True)
    write_gpt2(tmp_path / "gpt2", given)
    path = tmp_path / "gpt2" / "config.json"
    said = json.loads(path.read_text())
    assert read_gpt2(tmp_path / "gpt2").config == given.config
    path.write_text(json.dumps({**said, name: value}))
    with pytest.raises(UserError, match=f"has {name} {value!r}, and this GPT takes"):
        read_gpt2(tmp_path / "gpt2")
