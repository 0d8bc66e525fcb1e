"""Heads over processes (gloo): the curve and the weights of one process, on any number, killed and gone on with."""

import json
import os
import re
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from lte import (
    HeadShards,
    LTEConfig,
    Merger,
    Ranks,
    averaged,
    clip_grad_norm_per_head,
    inject,
    merged_state_dict,
    param_groups,
    shared_parameters,
)
from lte.merging import sends_factors
from lte.sparse import Sparse
from lte.sums import sum_of_products, tree_sum
from memtrain_common.console import Console
from memtrain_common.data.text.corpus import Corpus, Crops
from memtrain_common.data.text.tokenizers import ByteTokenizer
from memtrain_common.errors import LostRankError, Stopped, UserError
from memtrain_common.models.gpt import GPT, GPTConfig, next_token_loss
from memtrain_common.runs.checkpoint import Checkpoints, load
from memtrain_common.runs.run_folder import RunFolder
from memtrain_common.training.distributed import launch
from memtrain_common.training.loop import FitConfig, Task, fit, mean_loss
from safetensors.torch import load_file
from support import newest_checkpoint, run_ranks

TOKENS = (np.arange(4000) ** 2 % 61).astype(np.uint8)
CORPUS = Corpus("squares", TOKENS[:3000], TOKENS[3000:], ByteTokenizer(), 4000, "")
FROZEN = {"trainable": ()}
SHARED = {"trainable": ("embeddings", "norms", "skipped")}
COPIES = {**SHARED, "replicas": ("embeddings", "norms")}
STEPS, T = 200, 20


def train(
    out,
    policy,
    *,
    steps=STEPS,
    resume=False,
    heads=4,
    every=T,
    at=None,
    patience_s=20.0,
    dtype=torch.float32,
    lr=1e-3,
    last_merge=10**9,
    **more,
):
    """Train a small GPT with this process's heads on their share of the batch; ``at`` = (rank, call of the loss,
    what to do then) disturbs it. No step after ``last_merge`` merges."""
    place, _ = launch("cpu", patience_s=patience_s)
    ranks = Ranks()
    crops = Crops(
        CORPUS, batch_size=8, block_size=8, seed=1, rank=place.rank, world_size=place.size, contiguous=True
    )  # fmt: skip
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=8, vocab_size=64, n_layer=1, n_head=2, n_embd=16)).to(dtype)
    inject(model, LTEConfig(heads=heads, rank=2, alpha=8.0, **policy, **more), ranks)
    optimizer = torch.optim.AdamW(param_groups(model, lr=lr, rest_lr=lr, weight_decay=0.1))
    merger = Merger(model, every, ranks=ranks, optimizer=optimizer)
    run = (RunFolder.open if resume else RunFolder.create)(out, writes=place.is_main)
    if not resume:
        run.write_config(FitConfig(max_iters=1), prog="test", argv=[])
    count = 0

    def loss_fn(m, batch):
        nonlocal count
        count += 1
        if at is not None and m.training and (place.rank, count) == at[:2]:
            at[2]()
        return next_token_loss(m, batch)

    def evaluate(m):
        with averaged(m, ranks):
            return mean_loss(m, next_token_loss, crops.validation(2))

    try:
        fit(
            Task(
                model,
                crops,
                loss_fn,
                optimizer,
                evaluate=evaluate,
                after_step=lambda: merger.steps < last_merge and merger.step(),
                clip=lambda limit: clip_grad_norm_per_head(model, limit, ranks),
                stateful={"merger": merger, "sent": ranks},
                parts=HeadShards(model, optimizer, ranks, merger),
            ),
            FitConfig(
                max_iters=steps,
                eval_interval=50,
                log_interval=10,
                grad_clip=1.0,
                agree_interval=every or 10,
                agree_offset=more.get("merge_delay", 0) % (every or 10),
                patience_s=patience_s,
            ),
            run=run,
            resume=resume,
            console=Console(out / f"log-{place.rank}.txt"),
        )
    except (Stopped, LostRankError, UserError) as stopped:
        (out / f"stopped-{place.rank}").write_text(str(stopped))
        return
    with averaged(model, ranks):
        plain = merged_state_dict(model)
    torch.save({k: v.clone() for k, v in plain.items()}, out / f"weights-{place.rank}.pt")
    (out / f"sent-{place.rank}.json").write_text(json.dumps({"merges": merger.merges, **ranks.sent}))


def losses(out):
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [(r["step"], r["split"]) for r in found], torch.tensor([[r["loss"], r.get("grad_norm", 0)] for r in found])


def assert_same(out, other, atol=1e-6):
    """The loss curve to 1e-5 and the weights on every process to 1e-6."""
    (rows, values), (expected_rows, expected) = losses(out), losses(other)
    assert rows == expected_rows
    torch.testing.assert_close(values, expected, rtol=0, atol=1e-5)
    one = torch.load(other / "weights-0.pt", weights_only=True)
    for path in out.glob("weights-*.pt"):
        weights = torch.load(path, weights_only=True)
        assert weights.keys() == one.keys()
        for name in one:
            torch.testing.assert_close(weights[name], one[name], rtol=0, atol=atol)


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """One process under each policy."""
    made = {}

    def get(name, policy, **more):
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name) / "one"
            train(made[name], policy, **more)
        return made[name]

    return get


@pytest.mark.slow
@pytest.mark.parametrize(("size", "name"), [(2, "shared"), (4, "copies")])
def test_any_number_of_processes_is_one_process(tmp_path, single, name, size):
    policy = {"shared": SHARED, "copies": COPIES}[name]
    one = single(name, policy)
    out = tmp_path / "many"
    run_ranks(size, train, out, policy)
    assert_same(out, one)
    sent = json.loads((out / "sent-0.json").read_text())
    assert ("shared" in sent) == (name == "shared")
    first, last = losses(one)[1][[0, -1], 0]
    assert first - last > 0.1  # it learned something


@pytest.mark.slow
def test_killed_on_four_processes_gone_on_with_on_two_and_on_one(tmp_path, single):
    """SIGKILL at step 110 and again at 170; what is left is the curve of a run that nothing disturbed."""
    one, out = single("copies", COPIES), tmp_path / "run"
    run_ranks(4, lambda: train(out, COPIES, at=(2, 111, end_all)))
    assert [p.name for p in sorted((out / "checkpoints").glob("step-*"))] == ["step-00000050", "step-00000100"]
    run_ranks(2, lambda: train(out, COPIES, resume=True, at=(1, 71, end_all)))
    train(out, COPIES, resume=True)
    assert "was made by 4 processes, not 2" in (out / "log-0.txt").read_text()
    assert_same(out, one)
    made = load_file(out / "checkpoints" / "step-00000200" / "model.safetensors")
    assert made["transformer.h.0.mlp.c_fc.lora_A"].shape == (4, 2, 16)  # all heads, in their order


def end_all():
    """SIGKILL for every process of the run at once, as when a machine goes down; not for what tests/fresh.py forked,
    which is in a session of its own."""
    for child in map(int, Path(f"/proc/{os.getppid()}/task/{os.getppid()}/children").read_text().split()):
        if child != os.getpid() and os.getsid(child) == os.getsid(0):
            os.kill(child, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def vanish():
    os.kill(os.getpid(), signal.SIGKILL)


def freeze():
    """SIGSTOP: the connections stay open, and nothing comes through them. It is killed when the others have ended."""
    os.kill(os.getpid(), signal.SIGSTOP)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lost", "patience_s", "sparse"),
    [
        (vanish, 20.0, {"merge_density": 0.1, "merge_bits": 4}),
        (vanish, 20.0, {"merge_density": 0.1, "merge_bits": 4, "merge_delay": 3}),
        (freeze, 6.0, {}),
    ],
)
def test_when_a_process_is_lost_the_others_save_and_stop(tmp_path, lost, patience_s, sparse):
    """The checkpoint holds the W of the last merge, exactly; new heads go on from it. Of what heads have learned and
    sparse merges have not taken, only the lost process's part is lost."""
    out, until_merge = tmp_path / "run", tmp_path / "undisturbed"
    frozen, late = {**FROZEN, **sparse}, "merge_delay" in sparse
    at = (0, 37 if late else 34, lost)
    run_ranks(4, lambda: train(out, frozen, every=10, at=at, patience_s=patience_s), frozen=(0,))
    for rank in (1, 2, 3):
        message = (out / f"stopped-{rank}").read_text()
        assert re.fullmatch(
            r"stopped at step \d+: another process is lost \(.*\); .* the last merged weights, for new heads"
            rf"{', and what heads owe' * bool(sparse)}; resume with --resume {out}",
            message,
        ), message
    train(until_merge, frozen, every=10, steps=40 if late else 30)  # where the others wait: at 40, after they sent
    expected = load_file(newest_checkpoint(until_merge) / "model.safetensors")
    saved = load_file(newest_checkpoint(out) / "model.safetensors")
    name = "transformer.h.0.mlp.c_fc"
    torch.testing.assert_close(saved[f"{name}.weight"], expected[f"{name}.weight"], rtol=0, atol=1e-6)
    assert saved[f"{name}.lora_B"].shape == (4, 64, 2)
    assert not saved[f"{name}.lora_B"].any()
    if sparse:
        _, rescued = Checkpoints(out / "checkpoints").load_newest()
        alone = load(newest_checkpoint(out))["model"]  # as sampling and exports read it
        assert all(torch.equal(alone[n], t) for n, t in rescued["model"].items())
        owed = rescued["model"][f"{name}.feedback"]
        assert not owed[0].any()
        for rank in (1, 2, 3):  # some wait for the merge at 40, some see that the first is gone a step or two before
            step = int(re.search(r"at step (\d+)", (out / f"stopped-{rank}").read_text())[1])
            learned = [owed_of(tmp_path / f"{n}", frozen, n, f"{name}.")[rank] for n in (step, step + 1)]
            assert learned[0].any()
            assert min((owed[rank] - one).abs().max().item() for one in learned) < 1e-6
    run_ranks(2, lambda: train(out, frozen, every=10, steps=100, resume=True))
    assert losses(out)[0][-1] == (100, "val")
    assert losses(out)[1][-1, 0] < losses(until_merge)[1][-1, 0]
    assert not list((out / "checkpoints").glob(".*"))


def owed_of(folder, config, steps, layer):
    """D + e of every head after so many undisturbed steps, as if the merge at 40 were not made."""
    if not folder.exists():
        train(folder, config, every=10, steps=steps, last_merge=39)
    state = Checkpoints(folder / "checkpoints").load_newest()[1]["model"]
    A, B, A0, B0, e = (state[layer + n] for n in ("lora_A", "lora_B", "merged_A", "merged_B", "feedback"))
    return e + B @ A - B0 @ A0


@pytest.mark.slow
@pytest.mark.parametrize(("policy", "every", "step"), [(FROZEN, 0, 20), (FROZEN, 1000, 20), (SHARED, 1000, 13)])
def test_a_signal_stops_all_where_they_next_speak(tmp_path, policy, every, step):
    """However far off the next merge is: SIGTERM to one process in step 13 stops both, with a checkpoint, at the next
    logged step, or at once where they share gradients at each."""
    out = tmp_path / "run"
    run_ranks(2, lambda: train(out, policy, every=every, at=(1, 13, lambda: os.kill(os.getpid(), signal.SIGTERM))))
    for rank in (0, 1):
        assert f"stopped by SIGTERM at step {step}; checkpoint" in (out / f"stopped-{rank}").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("policy", [COPIES, {**SHARED, "base": "4bit"}])
def test_a_checkpoint_of_two_heads_goes_on_with_four(tmp_path, policy):
    """Each head is copied, moments included: the evaluated model is the same. Six heads are refused. In 4 bits the
    square layer keeps the merged factors of two heads and, of four, their sum."""
    out = tmp_path / "run"
    train(out, policy, heads=2, steps=40)
    before = torch.load(out / "weights-0.pt", weights_only=True)
    run_ranks(2, lambda: train(out, policy, heads=4, steps=40, resume=True))
    after = torch.load(out / "weights-1.pt", weights_only=True)
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=0, atol=1e-6)
    run_ranks(2, lambda: train(out, policy, heads=4, steps=60, resume=True))
    assert losses(out)[0][-1] == (60, "val")
    train(out, policy, heads=6, steps=80, resume=True)
    assert "made with 4 heads, which can become a multiple of 4 but not 6" in (out / "stopped-0").read_text()


# -- what is sent


def exchange(out):
    place, _ = launch("cpu")
    ranks = Ranks()
    generator = torch.Generator().manual_seed(place.rank)
    own = [torch.randn(*shape, generator=generator, dtype=dtype) for shape, dtype in SHAPES]
    sums = ranks.sum(own, "sum")
    whole = ranks.gather(own, "gather")
    with pytest.raises(ValueError, match=f"7 heads cannot be shared equally by {place.size} processes"):
        ranks.share(7)
    torch.save((own, sums, whole, dict(ranks.sent)), out / f"{place.rank}.pt")


SHAPES = [((3, 5), torch.float32), ((7,), torch.float64), ((1, 2, 3), torch.float32)]


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_sums_are_the_same_bits_everywhere_and_every_byte_is_counted(tmp_path, size):
    run_ranks(size, exchange, tmp_path)
    own, sums, whole, sent = zip(*(torch.load(tmp_path / f"{r}.pt") for r in range(size)), strict=True)
    for i in range(len(SHAPES)):
        assert all(torch.equal(sums[0][i], s[i]) for s in sums)
        torch.testing.assert_close(sums[0][i], sum(o[i] for o in own))
        assert all(torch.equal(w[i], torch.cat([o[i] for o in own])) for w in whole)
    n32, n64 = 15 + 6, 7
    each = sum(-(-n // size) * bytes_ for n, bytes_ in ((n32, 4), (n64, 8)))  # one N-th, padded
    assert sent[0]["sum"] == size * 2 * (size - 1) * each
    assert sent[0]["gather"] == size * (size - 1) * (n32 * 4 + n64 * 8)


class Partly(torch.nn.Module):
    """One scale is reached by no batch, one by the rows of a marked one alone."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = torch.nn.Linear(8, 8), torch.nn.LayerNorm(8)
        self.unused, self.seldom = torch.nn.Parameter(torch.ones(4, 4)), torch.nn.Parameter(torch.ones(8, 1))

    def forward(self, x):
        y = self.norm(self.first(x))
        return y @ self.seldom if x[0, 0] > 90 else y


def partly(out):
    """Three steps of AdamW; the first row is marked: of several processes the first alone reaches ``seldom``."""
    place, _ = launch("cpu")
    torch.manual_seed(0)
    ranks = Ranks()
    model = inject(Partly(), LTEConfig(heads=2, rank=2), ranks)
    optimizer = torch.optim.AdamW(param_groups(model, lr=1e-2, rest_lr=1e-2, weight_decay=0.5))
    shared = shared_parameters(model)
    for step in range(3):
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(step))
        x[0, 0] = 99.0
        n = 4 // ranks.size
        model(x[ranks.rank * n : (ranks.rank + 1) * n]).square().sum().backward()
        ranks.average_gradients(shared)
        optimizer.step()
        optimizer.zero_grad()
    numbers = sum(p.numel() for p in shared) + len(shared)
    torch.save((model.unused.detach(), model.seldom.detach(), dict(ranks.sent), numbers), out / f"{place.rank}.pt")


def test_a_parameter_that_no_batch_reaches_is_left_alone(tmp_path):
    """As on one process; one that a single process reaches has the same gradient on both. Every byte is counted."""
    partly(tmp_path)
    alone, *_ = torch.load(tmp_path / "0.pt")
    run_ranks(2, partly, tmp_path)
    for rank in (0, 1):
        unused, seldom, sent, numbers = torch.load(tmp_path / f"{rank}.pt")
        assert torch.equal(unused, torch.ones(4, 4))
        assert torch.equal(unused, alone)
        assert torch.equal(seldom, torch.load(tmp_path / "0.pt")[1])
        assert (seldom != 1).all()
        assert sent["shared"] == 3 * 2 * 2 * -(-numbers // 2) * 4


def overlap(out):
    """Process 0 begins a gathering and then asks for a sum, process 1 the other way round."""
    place, _ = launch("cpu")
    ranks = Ranks()
    ranks.open_beside()
    own, begun = torch.full((2, 3), place.rank, dtype=torch.uint8), None
    if place.rank == 0:
        begun = ranks.start_gather([own], "merges")
    (total,) = ranks.sum([torch.ones(5)], "shared")
    (whole,) = (begun or ranks.start_gather([own], "merges")).wait()
    torch.save((total, whole, dict(ranks.sent)), out / f"{place.rank}.pt")


def test_what_goes_on_beside_the_training_holds_up_no_other_word(tmp_path):
    run_ranks(2, overlap, tmp_path)
    for rank in (0, 1):
        total, whole, sent = torch.load(tmp_path / f"{rank}.pt")
        assert torch.equal(total, torch.full((5,), 2.0))
        assert torch.equal(whole, torch.tensor([0, 0, 1, 1], dtype=torch.uint8)[:, None].expand(4, 3))
        assert sent["merges"] == 2 * 6


@pytest.mark.parametrize(("rank", "by_factors"), [(1, True), (16, False)])
def test_the_smaller_of_factors_and_dense_delta_is_sent(rank, by_factors):
    model = inject(torch.nn.Sequential(torch.nn.Linear(32, 32)), LTEConfig(heads=4, rank=rank))
    assert sends_factors(model[0]) == by_factors
    assert (4 * 2 * rank * 64 < 2 * 32 * 32) == by_factors


def test_the_tree_is_the_same_however_it_is_cut():
    """Bits: eight heads in one process, or two or four or eight parts of it added as processes add them."""
    A, B = torch.randn(8, 3, 11), torch.randn(8, 7, 3)
    whole = sum_of_products(A, B)
    for parts in (2, 4, 8):
        sums = [sum_of_products(a, b) for a, b in zip(A.chunk(parts), B.chunk(parts), strict=True)]
        assert torch.equal(tree_sum(lambda i, sums=sums: sums[i].clone(), 0, parts), whole)
    torch.testing.assert_close(whole, torch.einsum("hmr,hrn->mn", B, A))


# -- sparse merges

SPARSE = {"merge_density": 0.03, "merge_bits": 3, "outer_momentum": 0.3}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("delay", "more", "forms"),
    [
        (0, {}, (Sparse(8, 3), Sparse(8, 3))),
        (3, {"merge_bits": 1, "merge_density_replicas": 0.08}, (Sparse(8, 1), Sparse(10, 1, 128))),
    ],
    ids=["at once", "later, in signs"],
)
def test_sparse_merges_are_those_of_one_process_and_what_is_owed_survives_a_kill(tmp_path, delay, more, forms):
    """Killed on four processes, gone on with on two: curve, weights and every head's feedback of one process; with
    messages under way in the checkpoint, too."""
    one, out = tmp_path / "one", tmp_path / "run"
    options = {"steps": 100, "every": 10, "merge_delay": delay, **SPARSE, **more}
    train(one, COPIES, **options)
    run_ranks(4, lambda: train(out, COPIES, at=(2, 71, end_all), **options))
    assert [p.name for p in sorted((out / "checkpoints").glob("step-*"))] == ["step-00000050"]
    run_ranks(2, lambda: train(out, COPIES, resume=True, **options))
    assert_same(out, one, atol=1e-5)
    owed = [load_file(newest_checkpoint(run) / "model.safetensors") for run in (out, one)]
    found = [name for name in owed[0] if "feedback" in name]
    copies = [name for name in owed[0] if "anchor_" in name]
    assert "transformer.h.0.mlp.c_fc.feedback" in found
    assert "transformer.wte.anchor_weight" in copies
    for name in found + copies:
        assert owed[1][name].any()
        torch.testing.assert_close(owed[0][name], owed[1][name], rtol=0, atol=1e-5)
    sent = json.loads((out / "sent-0.json").read_text())
    heads, kept = forms
    each = sum(heads.size(owed[0][name][0].numel()) for name in found)  # bytes that a head says at a merge
    each += sum(kept.size(owed[0][name].numel()) for name in copies)
    assert sent["merges"] == 5 * 4 * 3 * each + 5 * 2 * 1 * 2 * each
