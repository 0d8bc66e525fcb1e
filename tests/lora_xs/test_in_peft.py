"""LoRA-XS as a method of PEFT: its registry, its files, its operations."""

import copy

import pytest
import torch
from fresh import run_fresh
from lora_xs import CAUSAL_LM_TARGETS, ROBERTA_TARGETS, LoRAXSConfig, LoRAXSError, inject
from lora_xs.layer import layers
from safetensors.torch import load_file, save_file

peft = pytest.importorskip("peft")
from lora_xs.peft import LoRAXSPeftConfig  # noqa: E402


def ids(n=3):
    return torch.randint(3, 60, (n, 9))


def logits(model, x):
    with torch.no_grad():
        return model(x).logits


def learn(model, x, steps=3):
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-1)
    for _ in range(steps):
        model(x).logits.pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.fixture
def config():
    return LoRAXSPeftConfig(
        r=4, lora_alpha=16, target_modules=list(ROBERTA_TARGETS), modules_to_save=["classifier"],
        rank_pattern={"query": 3}, alpha_pattern={"value": 5},
    )  # fmt: skip


def test_trained_saved_and_loaded_it_gives_the_same_logits(roberta, config, tmp_path):
    base, x = roberta(), ids()
    model = peft.get_peft_model(copy.deepcopy(base), config)
    before = logits(model.eval(), x)
    torch.testing.assert_close(before, logits(base, x), rtol=1e-3, atol=1e-3)
    model = learn(model, x)
    want = logits(model, x)
    assert (want - before).abs().max() > 0.05
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert all("lora_xs_R" in n or "modules_to_save" in n for n in trained)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert torch.equal(logits(again, x), want)
    head = sum(p.numel() for p in base.classifier.parameters())
    keys = 8 * 2 * 150 + 8 * 150  # names in the header
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 4 * (head + 8 * (16 + 2)) + keys


def test_the_update_is_the_library_s(roberta, config):
    base, x = roberta().double(), ids()
    ours = LoRAXSConfig(4, 16, ROBERTA_TARGETS, rank_pattern={"query": 3}, alpha_pattern={"value": 5})
    library = inject(copy.deepcopy(base), ours)
    model = peft.get_peft_model(copy.deepcopy(base), config).eval()
    theirs = {n: m for n, m in model.named_modules() if hasattr(m, "lora_xs_R")}
    assert len(theirs) == len(layers(library)) == 8
    with torch.no_grad():
        for _, layer in layers(library):
            layer.R["default"].normal_()
            theirs[f"base_model.model.{layer.name}"].lora_xs_R["default"].copy_(layer.R["default"])
    torch.testing.assert_close(logits(model, x), logits(library, x))


def test_merging_switching_and_disabling(llama, tmp_path):
    base, x = llama(), ids()
    config = LoRAXSPeftConfig(r=4, target_modules="all-linear", r_std=0.3)
    model = peft.get_peft_model(copy.deepcopy(base), config).eval()
    assert sum(hasattr(m, "lora_xs_R") for m in model.modules()) == 2 * len(CAUSAL_LM_TARGETS)
    want = logits(model, x)
    with model.disable_adapter():
        assert torch.equal(logits(model, x), logits(base, x))
    model.add_adapter("second", LoRAXSPeftConfig(r=2, target_modules=["q_proj"], r_std=0.5, seed=1))
    model.set_adapter("second")
    second = logits(model, x)
    assert not torch.equal(second, want)
    model.set_adapter("default")
    assert torch.equal(logits(model, x), want)
    before = {n: p.clone() for n, p in model.named_parameters()}
    model.merge_adapter()
    torch.testing.assert_close(logits(model, x), want, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    model.save_pretrained(tmp_path, selected_adapters=["second"])
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "second").eval()
    assert torch.equal(logits(again, x), second)
    plain = model.merge_and_unload()
    assert not any(hasattr(m, "lora_xs_R") for m in plain.modules())
    torch.testing.assert_close(logits(plain, x), want, rtol=1e-4, atol=1e-5)


def test_conv1d_and_embedding():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=60, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    base, x = transformers.GPT2LMHeadModel(config).eval(), ids()
    model = peft.get_peft_model(base, LoRAXSPeftConfig(r=4, target_modules=["c_attn", "wte"], r_std=0.3)).eval()
    want = logits(model, x)
    torch.testing.assert_close(logits(model.merge_and_unload(), x), want, rtol=1e-4, atol=1e-5)


def test_other_base_weights_are_refused_by_name(roberta, config, tmp_path):
    base = roberta()
    peft.get_peft_model(copy.deepcopy(base), config).save_pretrained(tmp_path)
    base.roberta.encoder.layer[1].output.dense.weight.data.mul_(torch.rand(32, 64))
    with pytest.raises(LoRAXSError, match=r"the bases of roberta\.encoder\.layer\.1\.output\.dense are not those"):
        peft.PeftModel.from_pretrained(base, tmp_path)


def test_half_precision(llama):
    base, x = llama().to(torch.bfloat16), ids()
    model = peft.get_peft_model(base, LoRAXSPeftConfig(r=4, target_modules=["q_proj"]))
    Rs = [p for n, p in model.named_parameters() if "lora_xs_R" in n]
    assert {p.dtype for p in Rs} == {torch.float32}
    assert {p.dtype for p in model.to(torch.bfloat16).parameters() if p.requires_grad} == {torch.float32}
    model(x).logits.float().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in Rs)


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16, torch.float64])
def test_a_model_that_is_cast_after_training_loads_onto_a_base_that_is_cast(roberta, config, tmp_path, cast):
    base, x = roberta(), ids()
    model = learn(peft.get_peft_model(copy.deepcopy(base), config), x)
    exact = {n: b for n, b in model.named_buffers() if "lora_xs_probe" in n}
    model.to(cast)
    assert all(torch.equal(b, exact[n]) for n, b in model.named_buffers() if n in exact)
    want = logits(model, x)
    for folder, low in ((tmp_path / "one", False), (tmp_path / "two", True)):
        model.save_pretrained(folder)
        fresh = copy.deepcopy(base).to(cast)
        model = peft.PeftModel.from_pretrained(fresh, folder, low_cpu_mem_usage=low).eval()
        assert torch.equal(logits(model, x), want)
    other = copy.deepcopy(base).to(cast)
    with torch.no_grad():
        other.roberta.encoder.layer[1].output.dense.weight.copy_(torch.rand(32, 64))
    with pytest.raises(LoRAXSError, match=r"the bases of roberta\.encoder\.layer\.1\.output\.dense are not those"):
        peft.PeftModel.from_pretrained(other, tmp_path / "one")


def test_a_rounded_probe_of_an_earlier_version_is_read(roberta, config, tmp_path):
    base, x = roberta(), ids()
    model = learn(peft.get_peft_model(copy.deepcopy(base), config), x)
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    state = {n: t.bfloat16() if "probe" in n else t for n, t in load_file(file).items()}
    assert not any("bases" in name for name in state)
    save_file(state, file, {"format": "pt"})
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert torch.equal(logits(again, x), logits(model, x))


def test_refusals(roberta):
    with pytest.raises(LoRAXSError, match="rank must be a whole number"):
        LoRAXSPeftConfig(r=0)
    with pytest.raises(LoRAXSError, match=r"LayerNorm is a LayerNorm.*exclude_modules"):
        peft.get_peft_model(roberta(), LoRAXSPeftConfig(r=2, target_modules=["LayerNorm"]))


@pytest.mark.parametrize("call", ["model", "generate", "layer"])
def test_adapter_names_for_a_mixed_batch_are_refused(llama, call):
    """PEFT drops the word where a method has nothing to do with it, and every row would have the active adapter."""
    model = peft.get_peft_model(llama(), LoRAXSPeftConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")).eval()
    model.add_adapter("second", LoRAXSPeftConfig(r=2, target_modules=["q_proj"], r_std=0.5))
    names = ["default", "second", "__base__"]
    layer = next(m for m in model.modules() if hasattr(m, "lora_xs_R"))
    calls = {
        "model": lambda: model(ids(), adapter_names=names),
        "generate": lambda: model.generate(input_ids=ids(), max_new_tokens=1, adapter_names=names),
        "layer": lambda: layer(torch.randn(3, 2, 32), adapter_names=names),
    }
    with pytest.raises(LoRAXSError, match=r"one adapter for a batch.*lora_xs\.rows gives each row an adapter"):
        calls[call]()
    model(ids(), adapter_names=None)


@pytest.mark.slow
def test_without_the_import_peft_refuses_the_file(roberta, config, tmp_path):
    """It does not load a LoRA in its place."""
    peft.get_peft_model(roberta(), config).save_pretrained(tmp_path)
    script = f"import peft; peft.PeftConfig.from_pretrained({str(tmp_path)!r})"
    done = run_fresh(script)
    assert done.returncode != 0
    assert "LORA_XS" in done.stderr
