"""Two methods at once in transformers' Trainer: a killed run that is resumed ends with the same bytes."""

import pytest
import torch
from backrazor import Razor
from galore_vit import GaLoreAdamW
from lora_xs import LoRAXSConfig, inject

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")

from backrazor.hf import RazorTrainer  # noqa: E402
from galore_vit.hf import galore_optimizer  # noqa: E402
from lora_xs.hf import LoRAXSCallback  # noqa: E402


class Killed(Exception):
    pass


def bert():
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=16,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def rows():
    draw = torch.Generator().manual_seed(2)
    tokens = torch.randint(0, 40, (40, 8), generator=draw)
    return [{"input_ids": t, "labels": int(t.sum() % 2)} for t in tokens]


def trainer(folder, adapter, killed_at=None):
    """Back Razor with GaLore, or with LoRA-XS's adapters."""

    class Kill(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == killed_at:
                raise Killed

    transformers.set_seed(0)
    args = transformers.TrainingArguments(
        str(folder), max_steps=6, save_steps=2, per_device_train_batch_size=4, gradient_accumulation_steps=2,
        learning_rate=1e-2, report_to="none", disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    model, more, callbacks = bert(), {}, [Kill()]
    if adapter:
        inject(model, LoRAXSConfig(rank=4), cache=False)
        callbacks.append(LoRAXSCallback(model))
    else:
        more["optimizers"] = (galore_optimizer(model, args, rank=4, update_proj_gap=2), None)
    return RazorTrainer(model, args, train_dataset=rows(), callbacks=callbacks, razor=Razor(0.1), **more)


@pytest.mark.parametrize("adapter", [False, True], ids=["backrazor+galore", "backrazor+lora-xs"])
def test_a_killed_run_is_resumed_to_the_same_bytes(adapter, tmp_path):
    straight = trainer(tmp_path / "straight", adapter)
    straight.train()
    with pytest.raises(Killed):
        trainer(tmp_path / "killed", adapter, killed_at=3).train()
    resumed = trainer(tmp_path / "killed", adapter)
    begun = {n: p.clone() for n, p in resumed.model.state_dict().items()}
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6
    trained = {n for n, p in resumed.model.named_parameters() if p.requires_grad}
    for name, p in straight.model.state_dict().items():
        assert torch.equal(p, resumed.model.state_dict()[name]), name
        changed = not torch.equal(p, begun[name])
        assert changed == (name in trained) or "token_type" in name, name
    kind = torch.optim.AdamW if adapter else GaLoreAdamW
    assert isinstance(resumed.optimizer.optimizer, kind)
