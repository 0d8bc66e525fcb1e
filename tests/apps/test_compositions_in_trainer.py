"""Two methods at once in transformers' Trainer: a killed run that is resumed has the same bytes; on two ranks too."""

import pytest
import torch
import torch.distributed as dist
from backrazor import Razor
from galore_vit import GaLoreAdamW
from lora_xs import LoRAXSConfig, inject

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")

from backrazor.hf import RazorTrainer  # noqa: E402
from galore_vit.hf import galore_optimizer  # noqa: E402
from lora_xs import files  # noqa: E402
from lora_xs.hf import LoRAXSCallback  # noqa: E402
from memtrain_common.hf import MemoryLedgerCallback  # noqa: E402
from trainer_runs import Kill, on_two, small_bert, token_rows, train_killed  # noqa: E402

pytestmark = pytest.mark.usefixtures("libraries_frozen")


def trainer(folder, adapter, steps=6):
    """Back Razor with GaLore, or with LoRA-XS's adapters."""

    transformers.set_seed(0)
    args = transformers.TrainingArguments(
        str(folder), max_steps=steps, save_steps=2, per_device_train_batch_size=4, gradient_accumulation_steps=2,
        learning_rate=1e-2, report_to="none", disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    model, more, callbacks = small_bert(32), {}, []
    if adapter:
        inject(model, LoRAXSConfig(rank=4), cache=False)
        callbacks.append(LoRAXSCallback(model))
    else:
        more["optimizers"] = (galore_optimizer(model, args, rank=4, update_proj_gap=2), None)
    return RazorTrainer(model, args, train_dataset=token_rows(), callbacks=callbacks, razor=Razor(0.1), **more)


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [False, True], ids=["backrazor+galore", "backrazor+lora-xs"])
def test_a_killed_run_is_resumed_to_the_same_bytes(adapter, tmp_path):
    straight = trainer(tmp_path / "straight", adapter)
    straight.train()
    train_killed(lambda: trainer(tmp_path / "killed", adapter), 3)
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


def watched(owner, name):
    """The calls of a function from now on."""
    calls, function = [], getattr(owner, name)
    setattr(owner, name, lambda *args, **words: (calls.append(args), function(*args, **words))[1])
    return calls


def on_a_rank(folder):
    """A run that nothing disturbs, and one that goes on: both end alike, on both processes."""
    of_adapter = watched(files, "write_together")
    ends = []
    for part in ("straight", "killed"):
        run = trainer(folder / part, adapter=True, steps=4)
        ledger = MemoryLedgerCallback(run)
        run.add_callback(ledger)
        run.train(resume_from_checkpoint=part == "killed")
        assert (run.args.world_size, run.state.global_step) == (2, 4)
        ends.append(torch.cat([p.detach().flatten() for p in run.model.parameters()]))
        assert ledger.ledger.total("activations") > 0
    others = [torch.empty_like(ends[0]) for _ in range(2)]
    dist.all_gather(others, ends[0])
    assert all(torch.equal(end, ends[0]) for end in (ends[-1], *others))
    assert bool(of_adapter) == (dist.get_rank() == 0)
    if dist.get_rank() == 0:
        assert (folder / "straight" / "checkpoint-4" / "adapter.safetensors").exists()
        assert (folder / "straight" / "memory.json").exists()


def killed_on_a_rank(folder):
    run = trainer(folder, adapter=True, steps=4)
    run.add_callback(Kill(3))
    run.train()


@pytest.mark.slow
def test_on_two_processes_a_killed_run_is_resumed_to_the_same_bytes(tmp_path):
    """DDP by torchrun: one adapter is written, by the first process. GaLore: tests/galore_vit/test_parallel.py."""
    assert all(done.returncode for done in on_two(killed_on_a_rank, tmp_path / "killed"))
    assert (tmp_path / "killed" / "checkpoint-2").exists()
    for done in on_two(on_a_rank, tmp_path):
        assert done.returncode == 0, done.stderr
