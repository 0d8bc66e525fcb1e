"""What ``plan`` knows without counting: lines over batches, the user's cache; and its shorter ways."""

import contextlib
import json
import random
import re
import statistics
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from memtrain_apps.compose.axes import GALORE, Axes
from memtrain_apps.compose.optimizers import build_optimizer
from memtrain_apps.plan import command, counted, counting, known, picture, reserved, ship, table
from memtrain_apps.plan.arms import Arm
from memtrain_apps.plan.config import configure
from memtrain_apps.plan.counted import MissingError, Store, code_hash, count_law, step_key, unit_of
from memtrain_apps.plan.counting import combinations_of
from memtrain_apps.plan.depth import draw_out
from memtrain_apps.plan.forecast import Forecast, Workplace, count_step, predict_arm
from memtrain_apps.plan.lines import LEAST, Pass, StepLaw, fit, values_of
from memtrain_apps.plan.plan import _order, make_plan
from memtrain_apps.plan.step_bytes import StepBytes
from memtrain_apps.plan.step_use import _growth, composed_step, faked, passes_of, step_use_of
from memtrain_apps.plan.table import WIDTH, as_json, table_of
from memtrain_apps.plan.uses import SUMS, Cut, StepUse, rows_of
from memtrain_common.console import Console
from memtrain_common.errors import UserError
from memtrain_common.files import read_json
from small_shapes import SMALL, TINY
from support import ROOT, run_light


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """What was counted by other runs answers no test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


NO_CUT = Cut((), 0, 0, 0, 0)


def made_up(moments, units):
    """A pass whose moments are (bytes at 0, bytes a unit)."""
    values = [base + slope * units for base, slope in moments]
    sums = {n: 7 + 3 * i * units for i, n in enumerate(SUMS)}
    return Pass(StepUse(**sums, peak=max(values), beside=max(values[1:])), values, values[1:])


@pytest.mark.parametrize("seed", range(20))
def test_lines_tell_every_batch(seed):
    """Random moments: the few lines that are kept have the peak of all of them, at any batch."""
    draw = random.Random(seed)
    moments = [(draw.randrange(10**6), draw.randrange(10**4)) for _ in range(draw.randrange(2, 40))]
    lines = fit({u: made_up(moments, u) for u in (2, 3, 9)})
    one = {1: values_of(made_up(moments, 1))}
    law = StepLaw.from_json(json.loads(json.dumps(StepLaw(3, one, lines, NO_CUT).to_json())))
    assert len(law.lines["peak"]) <= len(moments)
    for units in (1, *range(2, 200), 1000, 10**6):
        assert law.at(3 * units) == made_up(moments, units).use


def test_what_lies_on_no_line_has_none():
    moments = [(100, 5), (40, 60)]
    passes = {u: made_up(moments, u) for u in (LEAST, 3, 9)}
    assert fit(passes)
    for bent in (
        replace(passes[9], rises=[*passes[9].rises, 10**9]),  # another operation
        replace(passes[9], rises=[passes[9].rises[0] + 1, *passes[9].rises[1:]]),
        replace(passes[9], use=replace(passes[9].use, activations=1)),
    ):
        assert fit({**passes, 9: bent}) == {}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "train", "save"),
    [("vit", "lte", "all"), ("bert", "full", "checkpoint"), ("gpt2", "full", "backrazor"), ("llama", "lora", "all")],
)
def test_a_law_is_the_count_of_every_batch(family, train, save):
    """At a batch that it was not made of, and cut for three processes."""
    step = replace(SMALL[family], cuda=family != "gpt2")
    step = replace(step, shape=step.shape.with_depth(5))
    axes = Axes(train, save, heads=2)
    law = StepLaw.from_json(count_law(step, axes, rows=12, known=None))
    found = law.at(8, shards=3)
    if found is None:  # Back Razor chooses its form by size, and so small a model is all thresholds
        assert save == "backrazor"
        assert not law.lines
        found = law.at(12, shards=3)
    assert found == step_use_of(step, axes, 8 if law.lines else 12, shards=3)
    least = unit_of(axes)
    again = StepLaw.from_json(count_law(step, axes, rows=least, known=law.to_json()))
    assert again.at(least) == step_use_of(step, axes, least)
    assert again.at(12) == law.at(12)


@pytest.mark.slow
def test_passes_over_one_model_are_those_over_new_ones():
    step, axes = SMALL["vit"], Axes("lora", "checkpoint", dropout=0.1)
    passes, _ = passes_of(step, axes, (3, 1, 3))
    assert [p.use for p in passes] == [step_use_of(step, axes, n) for n in (3, 1, 3)]


@pytest.mark.parametrize("shards", [2, 3, 8])
def test_shares_are_what_fsdp_cuts(shards):
    shapes = [(7, 3), (7, 3), (16,), (1, 5), ()]
    tensors = [torch.zeros(s) for s in shapes]
    cut = Cut(((7, 12, 2, 1), (16, 4, 1, 1), (1, 20, 1, 0), (1, 4, 1, 0)), 1, 2, 3, 4)
    padded = [rows_of(t.shape[0], shards) * t[:1].nbytes if t.dim() else 4 for t in tensors]
    found = cut.shares(shards)
    assert found["shard_weights"] == sum(padded)
    assert found["shard_gradients"] == padded[0] + padded[2]
    with pytest.raises(UserError, match="choose ddp"):
        NO_CUT.shares(shards)


# -- what was counted before ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_cache_is_of_a_shape_the_code_and_the_versions(tmp_path, monkeypatch):
    words = [*TINY, "--budget", "1GiB", "--train", "full", "--save", "all", "--optim", "adamw", "--workers", "1"]
    config = configure(words)
    first = as_json(make_plan(config))
    (kept,) = (tmp_path / "cache" / "memtrain" / "plan").iterdir()
    assert as_json(make_plan(config)) == first
    # of another batch nothing is counted either
    step = make_plan(replace(config, batch=52)).place.step
    assert (
        as_json(make_plan(replace(config, batch=52)))["combinations"][0]["peak_bytes"]
        < first["combinations"][0]["peak_bytes"]
    )
    store = Store(counted.cached_records(step), live=False)
    count_step(Workplace(step, 7), Axes(), store)
    with pytest.raises(MissingError):
        count_step(Workplace(replace(step, weights="bfloat16"), 7), Axes(), store)
    # nothing is imported to count either
    ((end, said),) = run_light([f"""
import sys
from memtrain_apps.plan.command import run_plan
from memtrain_apps.plan.config import configure
run_plan(configure({[*words, "--batch", "52"]!r}))
assert "torch" not in sys.modules and "transformers" not in sys.modules
"""])  # fmt: skip
    assert not end, said
    assert "fits (1)" in said
    # what the cache says is what plan says, and --recount does not look there
    content = read_json(kept)
    key = step_key(step, Axes())
    content["records"][key] = "no such thing"
    kept.write_text(json.dumps(content))
    with pytest.raises(UserError, match="no such thing"):
        make_plan(config)
    assert as_json(make_plan(replace(config, recount=True))) == first
    monkeypatch.setattr(counted, "code_hash", lambda: "another")
    assert counted.cached_records(step) == {}


# -- its shorter ways ------------------------------------------------------------------------------------------------


def nvml(free, visible=None, monkeypatch=None):
    module = SimpleNamespace(
        NVMLError=RuntimeError, nvmlInit=lambda: None, nvmlDeviceGetCount=lambda: len(free),
        nvmlDeviceGetHandleByIndex=lambda i: free[i], nvmlDeviceGetHandleByUUID=lambda uuid: free[int(uuid[-1])],
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(free=handle),
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "pynvml", module)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)


def test_without_a_budget_it_is_what_is_free_on_the_gpus(monkeypatch):
    free = [24 * 2**30, 80 * 2**30, 16 * 2**30]
    nvml(free, None, monkeypatch)
    assert configure(["--model", "gpt2"]).budget_bytes == free[0]
    assert configure(["--model", "gpt2", "--gpus", "2", "--batch", "2"]).budget_bytes == free[0]
    assert configure(["--model", "gpt2", "--gpus", "3", "--batch", "3"]).budget_bytes == free[2]
    nvml(free, "1,GPU-2", monkeypatch)
    assert configure(["--model", "gpt2"]).budget_bytes == free[1]
    assert configure(["--model", "gpt2", "--gpus", "2", "--batch", "2"]).budget_bytes == free[2]
    with pytest.raises(UserError, match="this machine has 2"):
        configure(["--model", "gpt2", "--gpus", "3", "--batch", "3"])
    nvml(free, "", monkeypatch)
    with pytest.raises(UserError, match="no GPU is found"):
        configure(["--model", "gpt2"])


@pytest.fixture(scope="module")
def small_plan():
    words = [*TINY, "--budget", "30MiB", "--train", "full", "--optim", "adamw", "galore-adamw", "--recount"]
    return make_plan(configure([*words, "--save", "all", "checkpoint", "--workers", "1"]))


@pytest.mark.slow
def test_tables_keep_to_a_hundred_columns(small_plan):
    text = table_of(small_plan)
    assert max(map(len, text.splitlines())) <= WIDTH
    for words in ("not measured", "fits (", "does not fit (", "in MiB"):
        assert words in text


@pytest.mark.slow
def test_the_picture_shows_the_best(small_plan, tmp_path):
    picture.draw_plan(small_plan, tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match=r"\.png"):
        configure([*TINY, "--budget", "30MiB", "--png", "plan.pdf"])


@pytest.mark.slow
def test_without_a_model_several_are_planned(small_plan, monkeypatch):
    asked = []
    monkeypatch.setattr(command, "make_plan", lambda config, console: asked.append(config) or small_plan)
    text = command.overview(configure(["--budget", "24GiB", "--batch", "64"]), Console(quiet=True))
    assert [(c.model, c.batch) for c in asked] == list(zip(command.WELL_KNOWN, (64, 64, 8, 8), strict=True))
    assert all(len(line) <= WIDTH for line in text.splitlines())
    best = small_plan.fitting[0].axes.name
    assert len(re.findall(rf"\S+ +{re.escape(best)} .* of \d+$", text, re.MULTILINE)) == 4


def test_measured_times_are_of_the_same_task():
    *_, timings = known.read()
    found = known.timing_of(Axes("full", "checkpoint"), "text", timings)
    assert found.study.startswith("bert-base")
    assert found.factor > 1.1
    assert known.timing_of(Axes("full", "checkpoint"), "language", timings).study.startswith("gpt2")
    assert known.timing_of(Axes("full", "checkpoint", "galore-adamw"), "text", timings) is None
    assert known.timing_of(Axes("lora", "checkpoint"), "text", timings) is None
    # a time is of the settings that it was measured with
    others = {"rank": 3, "adapt": "attention", "dropout": 0.5, "heads": 2, "keep": 0.01, "razor_mode": "paper",
              "recompute": "none", "galore_rank": 3, "checkpoint_blocks": "1", "razor_blocks": "1"}  # fmt: skip
    for t in timings:
        axes = Axes(t.train, t.save, t.optim or "sgd", **t.settings)
        assert known.timing_of(axes, t.task, [t]) is t
        for name in t.settings.keys() & others.keys():
            assert known.timing_of(replace(axes, **{name: others[name]}), t.task, [t]) is None


@pytest.mark.parametrize(
    ("choices", "task", "settings"),
    [
        (("full", "backrazor", "adamw"), "text", {"keep": 0.01}),
        (("full", "backrazor", "adamw"), "text", {"razor_mode": "pruned"}),
        (("full", "backrazor", "adamw"), "text", {"recompute": "block"}),
        (("full", "backrazor", "adamw"), "text", {"razor_blocks": "3"}),
        (("lora", "all", "adamw"), "text", {"adapt": "attention"}),
        (("lora", "all", "adamw"), "text", {"dropout": 0.5}),
        (("lte", "all", "adamw"), "language", {"heads": 32}),
    ],
)
def test_a_score_is_of_the_settings_that_are_planned(choices, task, settings):
    scores, *_ = known.read()
    assert known.scores_of(Axes(*choices), scores, task)
    assert known.scores_of(Axes(*choices, **settings), scores, task) == []


def test_the_nearest_rank_is_named_beside_its_score():
    scores, *_ = known.read()

    def told(axes):
        sources = []
        cell = table._score(Arm(axes, scores=known.scores_of(axes, scores, "text")), sources)
        assert cell.endswith("[1]")
        return sources[0]

    assert " by --" not in told(Axes("lora"))
    assert ", by --rank 8 (plain arm there" in told(Axes("lora", rank=256))
    assert ", by --galore-rank 4 (plain" in told(Axes("full", "all", "galore-adamw", galore_rank=512))
    only = [k for k in scores if k.source == "lte_default_run.json"]
    sources = []
    table._score(Arm(Axes("lte"), scores=only), sources)
    assert "by --rank 64 --alpha 256 --merge-steps 1 --lte-rest trained (plain" in sources[0]
    # which blocks are checkpointed changes no score, and is not told beside it
    assert " by --" not in told(Axes("full", "checkpoint", checkpoint_blocks="4"))


@pytest.mark.parametrize(
    ("low", "median", "high", "factor"),
    [(0.948, 0.972, 1.011, 1.0), (0.99, 1.02, 1.05, 1.0), (0.9, 0.95, 0.99, 0.95), (1.01, 1.2, 1.3, 1.2)],
)
def test_a_ratio_that_is_no_difference_is_1(low, median, high, factor, tmp_path):
    over = {"median": median, "low": low, "high": high, "pairs": 8}
    content = {"result": {"model": "ViT-S", "rank": 64, "time_over_adamw": over}}
    (tmp_path / "galore_train.json").write_text(json.dumps(content))
    (found,) = known._overheads(tmp_path)
    assert found.factor == factor
    assert f"quartiles {low:.3f} to {high:.3f}" in found.study


def test_what_takes_as_long_stands_in_the_optimizers_order_then_by_memory():
    def arm(optim, time, peak):
        forecast = Forecast(Axes(optim=optim), 1, 1, {}, 0, 0, 0, peak, 1, 7, 7)
        return Arm(Axes(optim=optim), forecast=forecast, fits=True, time=time)

    arms = [arm("galore-adamw", 0.999, 9), arm("adamw", 1.0, 8), arm("adamw", 1.001, 7), arm("sgd", 0.9, 5)]
    for order in ("best", "time"):
        found = sorted(arms, key=lambda a: _order(a, order))
        assert [(a.axes.optim, a.forecast.peak) for a in found] == [
            ("sgd", 5), ("adamw", 7), ("adamw", 8), ("galore-adamw", 9)
        ]  # fmt: skip


def test_a_choice_that_is_named_twice_is_planned_once():
    words = ["--train", "full", "full", "--save", "all", "all", "--optim", "sgd", "adamw", "sgd"]
    config = configure(["--model", "gpt2", "--budget", "8GiB", *words])
    assert [a.name for a in combinations_of(config)] == ["full+all+sgd", "full+all+adamw"]


@pytest.mark.slow
@pytest.mark.parametrize("save", ["all", "backrazor"])
def test_what_is_reserved_is_the_steps_own_allocations_replayed(save):
    """The tensors' peak is the plan's but for what falls into single steps; each storage is rounded up by less than 512
    bytes, and segments hold what is allocated."""
    place = Workplace(replace(SMALL["vit"], cuda=True), rows=4)
    axes = Axes("lora", save)
    found = reserved.replay(place, axes)
    assert found.live == pytest.approx(predict_arm(place, axes).peak, rel=2e-3)
    assert found.live < found.allocated < 1.2 * found.live
    assert found.allocated <= min(found.reserved, found.expandable)
    assert found.expandable % (2 * 2**20) == 0
    assert reserved.replay(place, axes) == found


@pytest.mark.slow
@pytest.mark.parametrize("optim", GALORE)
def test_galores_first_step_holds_what_its_second_would(optim):
    """Beside its state, of which the first makes all; so the second is not counted."""
    step = SMALL["vit"]
    with faked(live := StepBytes(), step.cuda):
        model, _ = composed_step(replace(step, shape=step.shape.with_depth(1)), Axes(optim="sgd"))
        optimizer = build_optimizer(
            model, Axes(optim=optim), lr=1e-3, head_lr=1e-3, weight_decay=0.0, say=lambda _: None
        )
        for p in model.parameters():
            p.grad = torch.empty_like(p)
        before = live.bytes
        first, between, second = _growth(live, optimizer.step), live.bytes, _growth(live, optimizer.step)
    assert first - (between - before) == second > 0


# -- depth -----------------------------------------------------------------------------------------------------------


def made_of_blocks(draw, kinds, repeat, depth, rows):
    """Moments of a step whose blocks are a first one, alike ones and a last one, forwards and backwards."""
    steps = [*kinds["in"], *kinds["first"], *(kinds["block"] * (depth - 2)), *kinds["last"], *kinds["loss"]]
    steps += [*kinds["last back"], *(kinds["back"] * (depth - 2)), *kinds["first back"], *kinds["out"]]
    now, found = repeat * depth, [repeat * depth]
    for base, slope in steps:
        now += base + slope * rows
        found.append(now)
    return found


@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize("seed", range(10))
def test_blocks_are_repeated_as_often_as_they_are_missing(seed, alike):
    """Random steps: the drawn-out moments have the peak of all moments of the deep step. First and last blocks that are
    as the others need two blocks, others need three."""
    draw = random.Random(seed)
    make = lambda: [(draw.randrange(-50, 90), draw.randrange(-5, 9)) for _ in range(draw.randrange(1, 6))]  # noqa: E731
    kinds = {k: make() for k in ("in", "first", "block", "last", "loss", "last back", "back", "first back", "out")}
    if alike:
        kinds |= {"first": kinds["block"], "last": kinds["block"], "first back": kinds["back"]}
        kinds["last back"] = kinds["back"]
    passes = lambda depth: [  # noqa: E731
        Pass(
            StepUse(**dict.fromkeys(SUMS, depth * n), peak=0, beside=0), *[made_of_blocks(draw, kinds, 7, depth, n)] * 2
        )
        for n in (2, 5)
    ]
    low = 2 if alike else 3
    if not alike:
        assert draw_out(passes(2), passes(3), 4) is None
    for more in (1, 2, 9):
        drawn = draw_out(passes(low), passes(low + 1), more)
        assert drawn is not None
        for found, whole in zip(drawn, passes(low + 1 + more), strict=True):
            assert (max(found.rises), max(found.besides)) == (max(whole.rises), max(whole.besides))
            assert found.use.activations == whole.use.activations
    # a moment that only the deeper one has is no block
    longer = [replace(p, rises=[*p.rises[:3], 10**6, *p.rises[3:]]) for p in passes(low + 1)]
    assert draw_out(passes(low), longer, 1) is None


def test_the_readme_has_the_errors_of_prediction():
    found = read_json(ROOT / "benchmarks" / "results" / "prediction_error.json")
    text = (ROOT / "apps" / "README.md").read_text()
    assert len(found["models"]) >= 25
    for kind in {m["kind"] for m in found["models"].values()}:
        models = [m for m in found["models"].values() if m["kind"] == kind]
        errors = [abs(a["error"]["peak"]) for m in models for a in m["arms"] if "error" in a]
        row = f"| {kind} | {len(models)} | {len(errors)} | {statistics.median(errors):.3%} | {max(errors):.2%} |"
        assert row.replace("%", " %") in text, row
    for name, model in found["models"].items():
        exact = (
            ("weights", "gradients", "optimizer")
            if name == "bart-mini"
            else ("weights", "gradients", "optimizer", "activations")
        )
        assert all(model["largest_error"][c] < 5e-5 for c in exact), name
    peak = found["summary"]["peak"]
    assert peak["worst"] < 0.02
    assert f"{peak['arms']} predictions, the peak's median error is {peak['median']:.3%}".replace("%", " %") in text
    assert f"the worst {peak['worst']:.2%}".replace("%", " %") in text


@pytest.mark.slow
def test_what_comes_with_the_package_is_what_this_code_counts():
    """Another part of it for each state of the code: of every model a step of Back Razor, whose code moves most, and
    any step, or optimizers."""
    draw = random.Random(code_hash())
    for model in ship.MODELS:
        step = ship.step_of(model)
        shipped = counted.shipped_records(step)
        assert shipped, f"{model}: python -m memtrain_apps.plan.ship {model}"
        again = Store({})
        steps = [task for task in ship.tasks_of(step) if task.func is count_step]
        others = [task for task in ship.tasks_of(step) if task.func is not count_step]
        saving = [task for task in steps if task.args[1].save == "backrazor"]
        for task in (draw.choice(saving), draw.choice(draw.choice([steps, others]))):
            with contextlib.suppress(UserError):
                task(again)
        assert again.records
        for key, record in again.records.items():
            mine = shipped[key]
            if isinstance(record, dict):  # of a single batch the shipped one may hold more batches
                mine = {**mine, "known": {n: v for n, v in mine["known"].items() if n in record["known"]}}
                if not record["lines"]:
                    mine = {**mine, "lines": record["lines"]}
            assert json.loads(json.dumps(record)) == mine, key


@pytest.mark.slow
def test_well_known_models_are_answered_without_counting(tmp_path, monkeypatch):
    """Every combination, by one process, by DDP and by FSDP; nothing is kept in the cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(counting, "_processes", None)  # what counts
    for model in ship.MODELS:
        for batch, *more in (("8",), ("16", "--gpus", "4"), ("64", "--gpus", "8", "--parallel", "fsdp")):
            plan = make_plan(configure(["--model", model, "--batch", batch, "--budget", "60GiB", *more]))
            assert len(plan.arms) == 7 * 4 * 7
            assert sum(a.forecast is not None for a in plan.arms) > 70
    assert not list(tmp_path.rglob("*.json"))


def test_the_readme_has_the_times_of_plan():
    calls = read_json(ROOT / "benchmarks" / "results" / "plan_time.json")["calls"]
    text = (ROOT / "apps" / "README.md").read_text()
    assert len(calls) == 4
    for found in calls.values():
        seconds = statistics.median(r["clock"] for r in found["runs"])
        row = f"| {seconds:.2f} s | {found['recounted']['clock']:.0f} s | {found['other']['clock']:.0f} s |"
        assert f"{row} {found['times_faster_by_clock']:.0f} |" in text, row
        assert found["times_faster_by_clock"] >= 10
        assert max(r["clock"] for r in found["runs"]) < 3


def test_the_readme_has_what_save_auto_chooses_below_exact_choices():
    equal, different = read_json(ROOT / "benchmarks" / "results" / "save_auto_razor.json")["models"].values()
    text = " ".join((ROOT / "apps" / "README.md").read_text().split())
    assert equal["least_part_found"] == equal["budgets"] == 8
    assert f"at {different['least_part_found']} of {different['budgets']} for different ones" in text
    assert f"with {different['worst_more_part']:.1%} more".replace("%", " %") in text
    assert f"at {different['none_found']} of them it found none" in text
    assert equal["above_the_budget"] == different["above_the_budget"] == 0
