"""The training loop: what it computes, what it writes, and that stopping and resuming leave no trace."""

import functools
import json
import math
import os
import signal
import threading
import warnings
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from memtrain_common.errors import DivergedError, Stopped, UserError
from memtrain_common.measuring.peak import PeakMeter
from memtrain_common.runs.run_folder import RunFolder
from memtrain_common.training.loop import FitConfig, Task, fit, mean_loss
from memtrain_common.training.schedule import cosine_with_warmup
from torch import nn


def make(seed=0, dropout=0.0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 3))


def batches(i, rows=6):
    g = torch.Generator().manual_seed(i)
    return torch.randn(rows, 4, generator=g), torch.randint(0, 3, (rows,), generator=g)


def loss_fn(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def evaluate(model):
    return mean_loss(model, loss_fn, [batches(10_000 + i) for i in range(3)])


def adam(model):
    return torch.optim.AdamW(model.parameters(), lr=0.02)


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def lines(run):
    return [json.loads(text) for text in (run.path / "metrics.jsonl").read_text().splitlines()]


NAN = math.nan
CLOCKS = ("seconds", "samples_per_second")


def without_clocks(run):
    return [{k: v for k, v in row.items() if k not in CLOCKS} for row in lines(run)]


def test_it_is_the_plain_loop():
    """Same weights, bit for bit, as forward, backward, clip, step written out."""
    ours, theirs = make(), make()
    fit(
        Task(ours, batches, loss_fn, adam(ours), lr_factor=lambda s: 1 / (s + 1)), FitConfig(max_iters=7, grad_clip=0.3)
    )
    optimizer = adam(theirs)
    for i in range(7):
        optimizer.param_groups[0]["lr"] = 0.02 / (i + 1)
        loss_fn(theirs, batches(i)).backward()
        nn.utils.clip_grad_norm_(theirs.parameters(), 0.3)
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(flat(ours), flat(theirs))


@pytest.mark.parametrize("resumed", [False, True])
def test_gradients_from_before_are_no_part_of_the_first_step(tmp_path, resumed):
    results = []
    for left in (True, False):
        model = make()
        model.register_parameter("unused", nn.Parameter(torch.ones(2)))  # without a gradient, AdamW leaves it alone
        task = Task(model, batches, loss_fn, adam(model))
        run = RunFolder.create(tmp_path / str(left)) if resumed else None
        if resumed:
            fit(task, FitConfig(2, eval_interval=2), run=run)
        if left:
            loss_fn(model, batches(99)).backward()
            model.unused.grad = torch.ones(2)
        fit(task, FitConfig(4, eval_interval=2), run=run, resume=resumed)
        results.append(flat(model))
        assert model.unused.grad is None
        assert torch.equal(model.unused, torch.ones(2))
    assert torch.equal(*results)


def test_accumulation_is_the_larger_batch():
    ours, theirs = make().double(), make().double()

    def double(i):
        x, y = batches(i)
        return x.double(), y

    def joined(i):
        parts = [double(3 * i + k) for k in range(3)]
        return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])

    fit(Task(ours, double, loss_fn, adam(ours)), FitConfig(max_iters=5, gradient_accumulation_steps=3))
    fit(Task(theirs, joined, loss_fn, adam(theirs)), FitConfig(max_iters=5))
    torch.testing.assert_close(flat(ours), flat(theirs), rtol=0, atol=1e-12)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_come_in_order_for_any_number_of_workers(workers):
    seen = []

    def remember(model, batch):
        seen.append(batch[0][0, 0].item())
        return loss_fn(model, batch)

    model = make()
    fit(
        Task(model, batches, remember, adam(model)),
        FitConfig(max_iters=4, gradient_accumulation_steps=2, workers=workers),
    )
    assert seen == [batches(i)[0][0, 0].item() for i in range(8)]


def test_after_step_and_saving_are_called_where_they_should_be():
    calls = []

    class Saving:
        def __enter__(self):
            calls.append("enter")

        def __exit__(self, *_):
            calls.append("exit")

    model = make()
    config = FitConfig(max_iters=2, gradient_accumulation_steps=2)
    fit(Task(model, batches, loss_fn, adam(model), saving=Saving, after_step=lambda: calls.append("after")), config)
    assert calls == ["enter", "exit", "enter", "exit", "after"] * 2


class Whole:
    """A model in parts, of which this process holds all."""

    apart = True
    speaks_each_step = False

    def average_gradients(self):
        pass

    def gather(self, state):
        return state


@pytest.mark.parametrize(
    ("each_step", "more", "steps"),
    [
        (False, {}, [4, 8, 12, 13]),
        (False, {"agree_offset": 3}, [3, 7, 11, 13]),
        (False, {"log_interval": 5}, [4, 5, 8, 10, 12, 13]),
        (False, {"eval_interval": 6, "checkpoint_interval": 9}, [4, 6, 8, 9, 12, 13]),
        (True, {}, [*range(1, 14)]),
    ],
)
def test_processes_with_parts_ask_for_a_signal_wherever_they_speak(monkeypatch, each_step, more, steps):
    """At their own steps, which may be far apart, at logged steps, evaluations and checkpoints, and at the last."""
    done, asked = [], []
    monkeypatch.setattr("memtrain_common.training.loop.any_rank", lambda flag: asked.append(len(done)) or flag)
    monkeypatch.setattr(Whole, "speaks_each_step", each_step)
    model = make()
    task = Task(model, batches, loss_fn, adam(model), after_step=lambda: done.append(1), parts=Whole())
    seldom = {"agree_interval": 4, "log_interval": 100, "eval_interval": 100}
    fit(task, FitConfig(max_iters=13, **{**seldom, **more}))
    assert sorted({step for step in asked if step}) == steps  # after the step, and after what was saved there


def test_the_run_folder_holds_every_logged_row(tmp_path):
    model, run = make(), RunFolder.create(tmp_path / "r")
    config = FitConfig(max_iters=5, eval_interval=2, log_interval=2, units_per_step=6, grad_clip=1.0)
    result = fit(Task(model, batches, loss_fn, adam(model), evaluate=evaluate), config, run=run)
    assert [(r["step"], r["split"]) for r in lines(run)] == [
        (0, "val"), (2, "train"), (2, "val"), (4, "train"), (4, "val"), (5, "train"), (5, "val"),
    ]  # fmt: skip
    train = lines(run)[1]
    assert set(train) == {"step", "split", "loss", "lr", "grad_norm", "samples_per_second", "seconds"}
    assert train["lr"] == 0.02
    assert result.evaluation["loss"] == lines(run)[-1]["loss"] == evaluate(model.eval())["loss"]
    assert json.loads((run.path / "memory.json").read_text())["totals"]["weights"] == 4 * flat(model).numel()
    assert run.checkpoints.steps() == [4, 5]


def test_evaluation_changes_no_random_number_and_no_mode():
    """With dropout, training is the same however often it is evaluated; frozen-in-eval modules stay so."""
    results = []
    for every in (1, 100):
        model = make(dropout=0.5)
        model[1].eval()

        def drawing(m):
            torch.rand(3), np.random.rand()  # noqa: NPY002
            assert not any(x.training for x in m.modules())
            return evaluate(m)

        torch.manual_seed(5)
        fit(Task(model, batches, loss_fn, adam(model), evaluate=drawing), FitConfig(max_iters=6, eval_interval=every))
        assert model.training
        assert not model[1].training
        results.append(flat(model))
    assert torch.equal(*results)


def test_a_model_in_eval_mode_is_trained_so_and_warned_of_once(tmp_path):
    """Nobody can know whether its modules are so on purpose; in training mode single modules are, without a word."""

    def trained(model, steps=3, **more):
        torch.manual_seed(5)
        with warnings.catch_warnings(record=True) as caught:
            warnings.filterwarnings("always", "the model is in eval mode")
            fit(
                Task(model, batches, loss_fn, adam(model), evaluate=evaluate), FitConfig(steps, eval_interval=1), **more
            )
        return flat(model), [w for w in caught if "eval mode" in str(w.message)]

    run = RunFolder.create(tmp_path / "run")
    without_dropout, warned = trained(make(dropout=0.5).eval(), run=run)
    assert [w.filename for w in warned] == [__file__]
    assert "call model.train() before fit" in str(warned[0].message)
    partly = make(dropout=0.5)
    partly[2].eval()
    weights, warned = trained(partly)
    assert torch.equal(weights, without_dropout)
    assert warned == []
    assert not torch.equal(trained(make(dropout=0.5))[0], without_dropout)
    assert trained(make(dropout=0.5).eval(), run=run, resume=True)[1] == []  # it had ended


class Interrupt(Exception):
    pass


def run_with_stops(tmp_path, stops, **changes):
    """Train 12 steps; ``stops`` are numbers of calls of the loss after which the process "dies" and is started anew."""
    config = FitConfig(max_iters=12, eval_interval=4, checkpoint_interval=3, log_interval=1, grad_clip=0.5, **changes)
    folder = tmp_path / "-".join(map(str, ["run", *stops]))
    pieces = [*stops, None]
    for k, stop in enumerate(pieces):
        model = make(dropout=0.3)
        begun = k and any((folder / "checkpoints").glob("step-*"))
        torch.manual_seed(177 if begun else 100)  # a resumed run's random state must come from the checkpoint
        calls = 0

        def counted(m, batch, stop=stop):
            nonlocal calls
            if m.training:
                if calls == stop:
                    raise Interrupt
                calls += 1
            return loss_fn(m, batch)

        optimizer = adam(model)
        run = RunFolder.open(folder) if k else RunFolder.create(folder)
        if not k:
            run.write_config(config, prog="test", argv=[])
        clock = _Clock()
        try:
            fit(
                Task(
                    model,
                    batches,
                    counted,
                    optimizer,
                    evaluate=evaluate,
                    after_step=clock.step,
                    stateful={"clock": clock},
                    lr_factor=_factor,
                ),
                config,
                run=run,
                resume=k > 0,
            )
        except Interrupt:
            continue
    return model, optimizer, run, clock


class _Clock:
    n = 0

    def step(self):
        self.n += 1

    def state_dict(self):
        return {"n": self.n}

    def load_state_dict(self, state):
        self.n = state["n"]


def _factor(step):
    return cosine_with_warmup(step, warmup_iters=2, decay_iters=12, min_ratio=0.1)


def skipped_steps(run):
    """Steps that float16's scaler left out: their gradient was not finite, which metrics.jsonl has as null."""
    return sum(r["split"] == "train" and r["grad_norm"] is None for r in lines(run))


@pytest.mark.slow
@pytest.mark.parametrize("stops", [[5], [3], [1], [7, 2, 1], [11]])
@pytest.mark.parametrize(("dtype", "workers"), [("float32", 0), ("float16", 0), ("float32", 2)])
def test_a_run_that_died_and_went_on_is_the_run_that_did_not(tmp_path, stops, dtype, workers):
    """Weights, optimizer, clock and metrics to the last bit, dropout and mid-interval stops included."""
    whole = run_with_stops(tmp_path, [], dtype=dtype)
    parts = run_with_stops(tmp_path, stops, dtype=dtype, workers=workers)
    assert torch.equal(flat(whole[0]), flat(parts[0]))
    for a, b in zip(whole[1].state.values(), parts[1].state.values(), strict=True):
        assert all(torch.equal(a[k], b[k]) for k in a)
    assert whole[3].n == parts[3].n == 12 - skipped_steps(whole[2])
    assert without_clocks(whole[2]) == without_clocks(parts[2])
    newest = [r.checkpoints.path(12) / "model.safetensors" for r in (whole[2], parts[2])]
    assert newest[0].read_bytes() == newest[1].read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
@pytest.mark.parametrize("where", ["training", "evaluation"])
def test_a_signal_leaves_a_checkpoint_and_no_trace(tmp_path, signum, where):
    def once(m, batch):
        nonlocal countdown
        if m.training == (where == "training"):
            countdown -= 1
            if countdown == 0:
                os.kill(os.getpid(), signum)
        return loss_fn(m, batch)

    def evaluating(m):
        return mean_loss(m, once, [batches(10_000 + i) for i in range(3)])

    config = FitConfig(max_iters=9, eval_interval=3, log_interval=1)
    whole, run = make(dropout=0.3), RunFolder.create(tmp_path / "whole")
    torch.manual_seed(1)
    fit(Task(whole, batches, loss_fn, adam(whole), evaluate=evaluate), config, run=run)

    countdown = 5
    model, other = make(dropout=0.3), RunFolder.create(tmp_path / "other")
    torch.manual_seed(1)
    with pytest.raises(Stopped) as stopped:
        fit(Task(model, batches, once, adam(model), evaluate=evaluating), config, run=other)
    assert stopped.value.exit_code == 128 + signum
    at = 5 if where == "training" else 3
    assert f"stopped by {signal.Signals(signum).name} at step {at}; checkpoint" in str(stopped.value)
    assert "\n" not in str(stopped.value)
    assert other.checkpoints.steps()[-1] == at
    countdown = -1
    model = make(dropout=0.3)
    fit(Task(model, batches, once, adam(model), evaluate=evaluating), config, run=other, resume=True)
    assert torch.equal(flat(whole), flat(model))
    assert without_clocks(run) == without_clocks(other)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_second_interrupt_does_not_wait():
    model = make()

    def twice(m, batch):
        signal.raise_signal(signal.SIGINT)  # in this thread, so that the two are not one
        signal.raise_signal(signal.SIGINT)
        return loss_fn(m, batch)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # which another test may have changed
    try:
        with pytest.raises(Stopped, match="stopped at once by a second SIGINT in step 1; there is no checkpoint"):
            fit(Task(model, batches, twice, adam(model)), FitConfig(max_iters=3))
    finally:
        signal.signal(signal.SIGINT, before)


def test_outside_the_main_thread_signals_are_left_alone():
    model, done = make(), []
    thread = threading.Thread(
        target=lambda: done.append(fit(Task(model, batches, loss_fn, adam(model)), FitConfig(max_iters=2)))
    )
    thread.start()
    thread.join()
    assert done[0].step == 2


@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_divergence_stops_the_run_and_saves_nothing_bad(tmp_path, poison):
    model, run = make(), RunFolder.create(tmp_path / "r")
    steps = 0

    def going_wrong(m, batch):
        nonlocal steps
        steps += 1
        loss = loss_fn(m, batch)
        if steps == 5 and poison == "loss":
            return loss * math.nan
        if steps == 6 and poison == "gradient":  # the loss is finite, the weights after this step are not
            model[0].weight.register_hook(lambda g: g * math.inf)
        return loss

    config = FitConfig(max_iters=20, eval_interval=2, log_interval=50)
    with pytest.raises(DivergedError, match=r"diverged: .* last good checkpoint is that of step (4|6)"):
        fit(Task(model, batches, going_wrong, adam(model)), config, run=run)
    step, state = run.checkpoints.load_newest()
    assert step == 4
    assert all(t.isfinite().all() for t in state["model"].values())


@pytest.mark.parametrize("evaluated", [False, True])
def test_weights_that_the_last_step_spoils_are_told_without_a_run_folder(evaluated):
    """No loss follows that would show it."""
    model = make()
    gradients = iter([1.0, 1.0, math.nan])
    model[0].weight.register_hook(lambda g: g * next(gradients))
    task = Task(model, batches, loss_fn, adam(model), evaluate=(lambda m: {"loss": 0.0}) if evaluated else None)
    with pytest.raises(DivergedError, match="the loss or a weight was no longer finite by step 3; there is no check"):
        fit(task, FitConfig(3))


def test_checkpoints_of_something_else_are_refused(tmp_path):
    model, run = make(), RunFolder.create(tmp_path / "r")
    config = FitConfig(max_iters=2, eval_interval=2)
    identity = {"width": 8}
    fit(Task(model, batches, loss_fn, adam(model)), config, run=run, resume_key=identity)
    with pytest.raises(UserError, match="was made with width=8, and this run has width=9"):
        fit(Task(make(), batches, loss_fn, adam(make())), config, run=run, resume=True, resume_key={"width": 9})
    wider = nn.Sequential(nn.Linear(4, 9), nn.Tanh(), nn.Dropout(0.0), nn.Linear(9, 3))
    with pytest.raises(UserError, match=r"belongs to another model: its 0\.weight is \(8, 4\), not \(9, 4\)"):
        fit(Task(wider, batches, loss_fn, adam(wider)), config, run=run, resume=True, resume_key=identity)
    for step in run.checkpoints.steps():
        (run.checkpoints.path(step) / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"no checkpoint in .* is intact"):
        fit(Task(model, batches, loss_fn, adam(model)), config, run=run, resume=True)


def test_resuming_before_the_first_checkpoint_begins_anew(tmp_path):
    run = RunFolder.create(tmp_path / "r")
    run.append_metrics([{"step": 1, "split": "train", "loss": 9.0}])
    model = make()
    fit(Task(model, batches, loss_fn, adam(model)), FitConfig(max_iters=2, log_interval=1), run=run, resume=True)
    assert [r["step"] for r in lines(run)] == [1, 2]
    assert lines(run)[0]["loss"] != 9.0


def test_a_finished_run_resumes_to_its_end_and_can_be_prolonged(tmp_path):
    longer = make()
    fit(Task(longer, batches, loss_fn, adam(longer)), FitConfig(max_iters=6))
    model, run = make(), RunFolder.create(tmp_path / "r")
    fit(Task(model, batches, loss_fn, adam(model), evaluate=evaluate), FitConfig(max_iters=4), run=run)
    again = make(seed=3)
    result = fit(
        Task(again, batches, loss_fn, adam(again), evaluate=evaluate), FitConfig(max_iters=4), run=run, resume=True
    )
    assert torch.equal(flat(again), flat(model))
    assert result.evaluation == {"loss": lines(run)[-1]["loss"]}
    assert [r["step"] for r in lines(run) if r["split"] == "val"] == [0, 4]
    more = make(seed=4)
    fit(Task(more, batches, loss_fn, adam(more), evaluate=evaluate), FitConfig(max_iters=6), run=run, resume=True)
    assert torch.equal(flat(more), flat(longer))


def test_a_finished_run_that_is_resumed_tells_what_the_one_before_did(tmp_path, monkeypatch):
    """Not what a call without a step measures, which is nothing."""
    peaks = {"training": 9 << 20, "evaluation": 5 << 20}
    monkeypatch.setattr(PeakMeter, "peak", lambda self, phase: peaks and peaks[phase])
    run, config = RunFolder.create(tmp_path / "r"), FitConfig(max_iters=4, units_per_step=6)

    def once(resume):
        model = make()
        return fit(Task(model, batches, loss_fn, adam(model), evaluate=evaluate), config, run=run, resume=resume)

    first, written = once(resume=False), (run.path / "memory.json").read_bytes()
    peaks = None
    again = once(resume=True)
    assert again.ledger == first.ledger
    assert again.peak_bytes == first.peak_bytes == {"training": 9 << 20, "evaluation": 5 << 20}
    assert again.units_per_second == first.units_per_second > 0
    assert again.seconds == first.seconds
    assert (again.joules is None, again.energy_source) == (first.joules is None, first.energy_source)
    assert (run.path / "memory.json").read_bytes() == written
    (run.path / "memory.json").write_text("{}")
    with pytest.raises(UserError, match=r"memory.json is not a memory ledger"):
        once(resume=True)


def test_no_steps_at_all(tmp_path):
    model, run = make(), RunFolder.create(tmp_path / "r")
    before = flat(model).clone()
    result = fit(Task(model, batches, loss_fn, adam(model), evaluate=evaluate), FitConfig(max_iters=0), run=run)
    assert torch.equal(flat(model), before)
    assert result.step == 0
    assert result.evaluation


def test_the_best_checkpoint_stays(tmp_path):
    losses = iter([5.0, 4.0, 1.0, 3.0, 2.0, 2.0])
    model, run = make(), RunFolder.create(tmp_path / "r")
    result = fit(
        Task(model, batches, loss_fn, adam(model), evaluate=lambda m: {"loss": next(losses)}),
        FitConfig(max_iters=5, eval_interval=1),
        run=run,
    )
    assert result.best == (2, 1.0)
    assert run.checkpoints.steps() == [2, 4, 5]


def test_the_best_checkpoint_stays_whatever_the_interval_of_saving(tmp_path):
    losses = iter([5.0, 4.0, 1.0, 3.0, 2.0, 2.0, 2.0])
    model, run = make(), RunFolder.create(tmp_path / "r")
    config = FitConfig(max_iters=12, eval_interval=2, checkpoint_interval=3)
    fit(Task(model, batches, loss_fn, adam(model), evaluate=lambda m: {"loss": next(losses)}), config, run=run)
    assert run.checkpoints.steps() == [4, 9, 12]


def test_a_signal_while_saving_is_not_lost(tmp_path, monkeypatch):
    model, run = make(), RunFolder.create(tmp_path / "r")
    save = type(run.checkpoints).save

    def interrupted(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        return save(*args, **kwargs)

    monkeypatch.setattr(type(run.checkpoints), "save", interrupted)
    with pytest.raises(Stopped, match=r"stopped by SIGTERM at step 4; checkpoint .*step-00000004"):
        fit(Task(model, batches, loss_fn, adam(model)), FitConfig(max_iters=4), run=run)


def test_an_evaluation_left_by_a_signal_leaves_the_random_numbers_alone(tmp_path):
    """Interrupted after drawing in the evaluation of step 3, and resumed: dropout goes on as if nothing had been."""
    results = []
    for interrupted in (False, True):
        calls = 0

        def drawing(m, interrupted=interrupted):
            nonlocal calls
            calls += 1
            torch.rand(7)
            if interrupted and calls == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return {"loss": 1.0}

        model, run = make(dropout=0.4), RunFolder.create(tmp_path / str(interrupted))
        torch.manual_seed(2)
        config = FitConfig(max_iters=6, eval_interval=3)
        if interrupted:
            with pytest.raises(Stopped):
                fit(Task(model, batches, loss_fn, adam(model), evaluate=drawing), config, run=run)
            torch.manual_seed(99)
            model = make(dropout=0.4)
        fit(Task(model, batches, loss_fn, adam(model), evaluate=drawing), config, run=run, resume=True)
        results.append(flat(model))
    assert torch.equal(*results)


def test_an_evaluation_that_is_not_finite_is_divergence_and_not_the_best(tmp_path):
    model, run = make(), RunFolder.create(tmp_path / "r")
    with pytest.raises(DivergedError):
        fit(
            Task(model, batches, loss_fn, adam(model), evaluate=lambda m: {"loss": math.nan}),
            FitConfig(max_iters=2),
            run=run,
        )
    assert not (run.path / "metrics.jsonl").exists()


def test_a_step_that_the_scaler_skipped_is_not_counted(tmp_path):
    """float16: the first losses overflow; after_step and the ledger wait for a step that was taken."""
    model, run, calls = make(), RunFolder.create(tmp_path / "r"), []

    def huge(m, batch):
        return loss_fn(m, batch) * 3e3

    config = FitConfig(max_iters=12, dtype="float16", log_interval=1, grad_clip=1.0)
    result = fit(Task(model, batches, huge, adam(model), after_step=lambda: calls.append(1)), config, run=run)
    skipped = skipped_steps(run)
    assert skipped > 0
    assert len(calls) == 12 - skipped
    assert result.ledger.total("optimizer") > 0


def test_the_ledger_sees_what_saving_hooks_pack_and_leaves_them_at_work():
    class Halved(torch.autograd.graph.saved_tensors_hooks):
        packed = 0

        def __init__(self):
            super().__init__(self.pack, lambda t: t.float() if t.is_floating_point() else t)

        def pack(self, tensor):
            Halved.packed += 1
            return tensor.half() if tensor.is_floating_point() else tensor

    def activations(saving):
        model = make()
        one = FitConfig(max_iters=1)
        return fit(Task(model, batches, loss_fn, adam(model), saving=saving), one).ledger.total("activations")

    plain, offloaded, halved = (activations(s) for s in (nullcontext, torch.autograd.graph.save_on_cpu, Halved))
    assert Halved.packed > 0
    assert offloaded == plain
    # x, the hidden layer and the log-probabilities of 6 rows, their labels, and the loss's total weight
    assert plain == 4 * 6 * (4 + 8 + 3) + 8 * 6 + 4
    assert plain / 2 < halved < plain


def test_the_schedule_is_nanogpts():
    def nanogpt(it, lr=6e-4, warmup=10, decay=100, low=6e-5):
        if it < warmup:
            return lr * (it + 1) / (warmup + 1)
        if it > decay:
            return low
        ratio = (it - warmup) / (decay - warmup)
        return low + 0.5 * (1.0 + math.cos(math.pi * ratio)) * (lr - low)

    for step in range(120):
        ours = 6e-4 * cosine_with_warmup(step, warmup_iters=10, decay_iters=100, min_ratio=0.1)
        assert ours == pytest.approx(nanogpt(step), rel=1e-12)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_trains_with_float32_weights(dtype):
    model = make()
    seen = set()

    def watching(m, batch):
        out = m(batch[0])
        seen.add(out.dtype)
        return nn.functional.cross_entropy(out, batch[1])

    before = evaluate(model)["loss"]
    first = batches(0)
    fit(Task(model, lambda i: first, watching, adam(model)), FitConfig(max_iters=60, dtype=dtype))
    assert seen == {torch.bfloat16 if dtype == "bfloat16" else torch.float16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert loss_fn(model, first) < 0.5 * before


@pytest.mark.slow
def test_a_compiled_model_trains_as_the_plain_one(tmp_path, monkeypatch):
    """Traced with the ledger in its first step, evaluation and accumulation in between; eager kernels, for speed."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    results = []
    for compiled in (False, True):
        model = make()
        config = FitConfig(max_iters=4, compile=compiled, eval_interval=2, gradient_accumulation_steps=2)
        run = RunFolder.create(tmp_path / str(compiled))
        result = fit(Task(model, batches, loss_fn, adam(model), evaluate=evaluate), config, run=run)
        results.append(flat(model))
        assert result.ledger.total("activations") > 0
        assert list(run.checkpoints.load_newest()[1]["model"]) == list(make().state_dict())
    torch.testing.assert_close(*results, rtol=0, atol=1e-6)


class LeavesAlone(torch.optim.SGD):
    """Skips the steps that it is told to, as GaLore does where a gradient is NaN."""

    def __init__(self, params, skip):
        super().__init__(params, lr=1e-2)
        self.skip, self.calls, self.skipped_steps = skip, 0, 0

    def step(self, closure=None):
        self.calls += 1
        if self.calls in self.skip:
            self.skipped_steps += 1
            return None
        return super().step(closure)


def test_skipped_steps_are_counted_kept_and_said(tmp_path):
    model, run = make(), RunFolder.create(tmp_path / "r")
    task = Task(model, batches, loss_fn, LeavesAlone(model.parameters(), {2, 3, 5}))
    assert fit(task, FitConfig(max_iters=6, log_interval=1), run=run).skipped_steps == 3
    assert [row.get("skipped", 0) for row in lines(run)] == [0, 1, 2, 2, 3, 3]
    model = make(seed=5)
    task = Task(model, batches, loss_fn, LeavesAlone(model.parameters(), {2}))
    assert fit(task, FitConfig(max_iters=9, log_interval=1), run=run, resume=True).skipped_steps == 4


def test_steps_skipped_in_a_row_are_divergence(tmp_path):
    """Ten by default; as many with one good step between them are none."""
    model, run = make(), RunFolder.create(tmp_path / "r")
    task = Task(model, batches, loss_fn, LeavesAlone(model.parameters(), set(range(4, 14))))
    with pytest.raises(DivergedError, match=r"the last 10 steps, up to step 13, were skipped .* is that of step 12;"):
        fit(task, FitConfig(max_iters=20, checkpoint_interval=3), run=run)
    model = make()
    task = Task(model, batches, loss_fn, LeavesAlone(model.parameters(), set(range(4, 20)) - {9}))
    assert fit(task, FitConfig(max_iters=18)).skipped_steps == 14
    model = make()
    task = Task(model, batches, loss_fn, LeavesAlone(model.parameters(), set(range(99))))
    assert fit(task, FitConfig(max_iters=12, max_skipped=0)).skipped_steps == 12


def simple(model, **more):
    return Task(model, batches, loss_fn, more.pop("optimizer", None) or adam(model), evaluate=evaluate, **more)


def test_a_run_is_not_begun_in_the_folder_of_another(tmp_path):
    """Its first checkpoint would replace those of the run that is there."""
    config = FitConfig(8, eval_interval=2, log_interval=2)
    fit(simple(make()), config, run=RunFolder.open_or_create(tmp_path / "run", config))
    before = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    rows = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"run holds a run with checkpoints: go on with it \(resume=True\)"):
        fit(simple(make(1)), config, run=RunFolder.open_or_create(tmp_path / "run", config))
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == before
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == rows


def test_a_mask_of_minus_infinity_is_no_divergence(tmp_path):
    model = make()
    model.register_buffer("mask", torch.full((3, 3), -math.inf).triu(1))
    config = FitConfig(3, eval_interval=1)
    assert fit(simple(model), config, run=RunFolder.create(tmp_path / "run")).step == 3
    model.register_buffer("running", torch.zeros(2))
    task = simple(model, after_step=lambda: model.running.fill_(math.inf))
    with pytest.raises(DivergedError):
        fit(task, config, run=RunFolder.create(tmp_path / "other"))


def test_a_complex_weight_that_is_not_finite_is_not_saved(tmp_path):
    model = make()
    model.register_parameter("phase", nn.Parameter(torch.ones(2, dtype=torch.cfloat)))
    task = simple(model, after_step=lambda: model.phase.data.fill_(complex(math.nan, 0)))
    with pytest.raises(DivergedError):
        fit(task, FitConfig(3, eval_interval=1), run=RunFolder.create(tmp_path / "run"))


def test_left_in_the_first_evaluation_nothing_is_said_to_be_kept(tmp_path):
    def interrupted(model):
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(model)

    task = Task(model := make(), batches, loss_fn, adam(model), evaluate=interrupted)
    with pytest.raises(Stopped, match=r"at step 0; nothing was saved yet; begin it with --resume"):
        fit(task, FitConfig(3), run=RunFolder.create(tmp_path / "run"))


def test_numbers_of_other_kinds_are_written(tmp_path):
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.02))
    task = Task(
        model, batches, lambda m, b: loss_fn(m, b).reshape(1), optimizer,
        evaluate=lambda m: {"loss": np.float32(evaluate(m)["loss"]), "hits": np.int64(3)},
    )  # fmt: skip
    run = RunFolder.create(tmp_path / "run")
    fit(task, FitConfig(4, log_interval=1, eval_interval=2), run=run)
    found = lines(run)
    assert all(row["lr"] == pytest.approx(0.02) for row in found if row["split"] == "train")
    assert all(row["hits"] == 3.0 for row in found if row["split"] == "val")
    assert not any("samples_per_second" in row for row in found)  # nobody said how many samples a step has


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: {"optimizer": torch.optim.LBFGS(m.parameters())}, "LBFGS computes the loss several times"),
        (lambda m: {"optimizer": torch.optim.SGD(list(m.requires_grad_(False).parameters()))}, "nothing would be"),
        (lambda m: {"loss": lambda model, b: model(b[0])}, r"shape \(6, 3\), and must be one number: take its mean"),
    ],
)
def test_what_cannot_be_trained_is_refused_in_words(change, said):
    model = make()
    words = {"model": model, "batches": batches, "loss": loss_fn, "optimizer": adam(model), **change(model)}
    with pytest.raises(ValueError, match=said):
        fit(Task(**words), FitConfig(2))


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (
            {"accuracy": 0.5, "f1": 0.4},
            "evaluate returns 'accuracy', 'f1', and the best checkpoint is chosen by 'loss'",
        ),
        ({}, "evaluate returns no number, and"),
        (0.5, r"evaluate must return numbers by name, as \{'loss': …\}, not a float"),
    ],
)
def test_an_evaluation_without_the_best_metric_is_refused_in_words(tmp_path, found, said):
    model, run = make(), RunFolder.create(tmp_path / "run")
    with pytest.raises(ValueError, match=said):
        fit(Task(model, batches, loss_fn, adam(model), evaluate=lambda m: found), FitConfig(2), run=run)
    assert model.training  # as it was
    assert not (run.path / "metrics.jsonl").exists()


def test_a_layer_without_a_size_is_refused_in_words():
    model = nn.Sequential(nn.LazyLinear(3))
    with pytest.raises(ValueError, match=r"0\.weight has no size yet"):
        fit(Task(model, batches, loss_fn, torch.optim.SGD(model.parameters())), FitConfig(2))


@pytest.mark.parametrize(
    "wrong", [{"gradient_accumulation_steps": 0}, {"eval_interval": 0}, {"log_interval": 0}, {"workers": -1}]
)
def test_a_configuration_that_cannot_be_is_refused(wrong):
    [(name, value)] = wrong.items()
    with pytest.raises(ValueError, match=rf"{name} must be at least \d, not {value}"):
        FitConfig(2, **wrong)


class WithoutRate(torch.optim.Optimizer):
    """As Adafactor is, where its steps follow from the weights."""

    def __init__(self, params):
        super().__init__(params, {"lr": None})

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            p.sub_(0.01 * p.grad.sign())


def test_an_optimizer_with_steps_of_its_own_has_no_rate_to_log(tmp_path):
    model = make()
    run = RunFolder.create(tmp_path / "run")
    fit(Task(model, batches, loss_fn, WithoutRate(model.parameters())), FitConfig(2, log_interval=1), run=run)
    assert [row["lr"] for row in lines(run)] == [None, None]
