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
from trainer_runs import Killed, kill_at, small_bert, token_rows  # noqa: E402


def trainer(folder, adapter, killed_at=None):
    """Back Razor with GaLore, or with LoRA-XS's adapters."""

    transformers.set_seed(0)
    args = transformers.TrainingArguments(
        str(folder), max_steps=6, save_steps=2, per_device_train_batch_size=4, gradient_accumulation_steps=2,
        learning_rate=1e-2, report_to="none", disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    model, more, callbacks = small_bert(32), {}, [kill_at(killed_at)]
    if adapter:
        inject(model, LoRAXSConfig(rank=4), cache=False)
        callbacks.append(LoRAXSCallback(model))
    else:
        more["optimizers"] = (galore_optimizer(model, args, rank=4, update_proj_gap=2), None)
    return RazorTrainer(model, args, train_dataset=token_rows(), callbacks=callbacks, razor=Razor(0.1), **more)


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
