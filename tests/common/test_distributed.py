"""Two processes (gloo) see the batches of one and compute what one computes."""

import json
import os
import re
import signal

import numpy as np
import pytest
import torch
from memtrain_common.console import Console
from memtrain_common.data.text.corpus import Corpus, Crops
from memtrain_common.data.text.tokenizers import ByteTokenizer
from memtrain_common.errors import LostRankError, Stopped, UserError
from memtrain_common.models.gpt import GPT, GPTConfig, next_token_loss
from memtrain_common.runs.run_folder import RunFolder
from memtrain_common.training.distributed import launch, parallelize, unwrap
from memtrain_common.training.loop import FitConfig, Task, fit, mean_loss
from support import run_ranks

TOKENS = (np.arange(4000) ** 2 % 251).astype(np.uint8)
CORPUS = Corpus("squares", TOKENS[:3000], TOKENS[3000:], ByteTokenizer(), 4000, "")


def train(out, mode, steps, *, resume=False, signal_at=None, signum=signal.SIGTERM):
    """Train a small GPT on this process's share; rank 1 may send itself a signal in the middle."""
    world, device = launch("cpu")
    crops = Crops(CORPUS, batch_size=8, block_size=16, seed=1, rank=world.rank, world_size=world.size)
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(block_size=16, vocab_size=256, n_layer=2, n_head=2, n_embd=16)).to(device)
    model = parallelize(gpt, mode, device, blocks=list(gpt.transformer.h))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    run = (RunFolder.open if resume else RunFolder.create)(out, writes=world.is_main)
    if not resume:
        run.write_config(FitConfig(max_iters=1), prog="test", argv=[])
    config = FitConfig(max_iters=steps, eval_interval=4, log_interval=1, grad_clip=1.0, gradient_accumulation_steps=2)
    count = 0

    def loss_fn(m, batch):
        nonlocal count
        count += 1
        if count == signal_at and world.rank == 1:
            os.kill(os.getpid(), signum)
        return next_token_loss(m, batch)

    try:
        fit(
            Task(
                model, crops, loss_fn, optimizer, evaluate=lambda m: mean_loss(m, next_token_loss, crops.validation(4))
            ),
            config,
            run=run,
            resume=resume,
            console=Console(out / f"log-{world.rank}.txt"),
        )
    except Stopped as stopped:
        (out / f"stopped-{world.rank}").write_text(str(stopped))
        return
    state = unwrap(model).state_dict()
    whole = {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in state.items()}
    if world.is_main:
        torch.save({k: v.clone() for k, v in whole.items()}, out / "whole.pt")


def losses(out):
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [(r["step"], r["split"]) for r in rows], torch.tensor([r["loss"] for r in rows])


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    out = tmp_path_factory.mktemp("ranks") / "one"
    train(out, "ddp", 8)
    return out


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_two_processes_train_like_one_and_resume(tmp_path, single, mode):
    """The same loss curve and weights; stopped by a signal to one process, both exit, and resuming leaves no trace."""
    out = tmp_path / mode

    def stopped():
        train(out, mode, 8, signal_at=7)

    def resumed():
        train(out, mode, 8, resume=True)

    run_ranks(2, stopped)
    for rank in (0, 1):
        assert "stopped by SIGTERM at step 4; checkpoint" in (out / f"stopped-{rank}").read_text()
    run_ranks(2, resumed)
    rows, values = losses(out)
    expected_rows, expected = losses(single)
    assert rows == expected_rows
    torch.testing.assert_close(values, expected, rtol=0, atol=1e-5)
    whole, one = (torch.load(p / "whole.pt", weights_only=True) for p in (out, single))
    for name in one:
        torch.testing.assert_close(whole[name], one[name], rtol=0, atol=1e-4)
    sharded = json.loads((out / "memory.json").read_text())["totals"]
    replicated = json.loads((single / "memory.json").read_text())["totals"]
    share = 2 if mode == "fsdp" else 1
    assert sharded["weights"] == pytest.approx(replicated["weights"] / share, rel=0.01)
    assert sharded["optimizer"] == pytest.approx(replicated["optimizer"] / share, rel=0.01)
    assert sharded["activations"] == pytest.approx(replicated["activations"] / 2, rel=0.1)  # half of the batch


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_a_process_that_dies_in_a_step_ends_the_other_in_a_sentence(tmp_path, mode):
    """DDP and FSDP2 speak by themselves, within the backward pass."""

    def lost():
        try:
            train(tmp_path / "out", mode, 8, signal_at=11, signum=signal.SIGKILL)
        except LostRankError as error:
            (tmp_path / "lost").write_text(str(error))

    run_ranks(2, lost, frozen=[1])
    said = (tmp_path / "lost").read_text()
    kept = "the last checkpoint is that of step 4; resume with --resume .+"
    assert re.fullmatch(rf"stopped at step 5: another process is lost \(.+\); {kept}", said), said


@pytest.mark.slow
def test_one_process_goes_on_with_a_checkpoint_of_two(tmp_path, single):
    out = tmp_path / "elastic"
    run_ranks(2, lambda: train(out, "fsdp", 4))
    train(out, "ddp", 8, resume=True)
    assert "was made by 2 processes, not 1" in (out / "log-0.txt").read_text()
    _, values = losses(out)
    _, expected = losses(single)
    torch.testing.assert_close(values, expected, rtol=0, atol=1e-5)


def test_refusals(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="needs a CUDA GPU and this machine has none"):
        launch("cuda")
    with pytest.raises(UserError, match="unknown device 'gpu': choose auto, cpu"):
        launch("gpu")
    with pytest.raises(UserError, match="unknown parallel mode"):
        parallelize(torch.nn.Linear(1, 1), "zero", torch.device("cpu"))
