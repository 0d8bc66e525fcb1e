"""Every example runs, and does what it says in its first line."""

import re
from pathlib import Path

import pytest
from support import run_script

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def output(tmp_path):
    """What an example of a name says."""

    def run(name):
        done = run_script((EXAMPLES / name).read_text(), tmp_path, file=EXAMPLES / name)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def accuracy(text):
    return float(re.findall(r"accuracy (\d\.\d+)", text)[-1])


@pytest.mark.parametrize("script", sorted(p.name for p in EXAMPLES.glob("*.py")))
def test_an_example_is_short(script):
    assert len((EXAMPLES / script).read_text().splitlines()) <= 40


@pytest.mark.slow
def test_save_less(output):
    text = output("save_less.py")
    assert float(re.search(r"([\d.]+) times less saved", text)[1]) > 10
    assert accuracy(text) > 0.85


@pytest.mark.slow
def test_train_less(output):
    before, after = map(float, re.search(r"accuracy ([\d.]+) before, ([\d.]+) after", output("train_less.py")).groups())
    assert before < 0.55
    assert after > 0.85


@pytest.mark.slow
def test_train_in_parallel(output):
    text = output("train_in_parallel.py")
    trained, plain = re.search(r"accuracy ([\d.]+) after 30 merges; as a plain network ([\d.]+)", text).groups()
    assert trained == plain
    assert float(trained) > 0.85


@pytest.mark.slow
def test_remember_less(output):
    adam, galore = re.findall(r"accuracy ([\d.]+), +(\d+) KiB", output("remember_less.py"))
    assert int(adam[1]) > 5 * int(galore[1])
    assert float(galore[0]) > float(adam[0]) - 0.05


@pytest.mark.slow
def test_compose_two(output):
    text = output("compose_two.py")
    assert accuracy(text) > 0.85
    assert float(re.search(r"activations +([\d.]+)", text)[1]) < 952 / 6  # 952 KiB densely


@pytest.mark.slow
def test_adapter_in_trainer(output):
    text = output("adapter_in_trainer.py")  # it asserts that resuming and loading give the same logits
    assert int(re.search(r"weights are ([\d,]+) bytes", text)[1].replace(",", "")) < 30_000
    assert accuracy(text) > 0.4


@pytest.mark.slow
def test_adapter_in_peft(output):
    text = output("adapter_in_peft.py")  # it asserts that the loaded adapter gives the same answers
    assert int(re.search(r"are ([\d,]+) bytes", text)[1].replace(",", "")) < 20_000
    assert accuracy(text) > 0.85


FIT_AGAIN = """
def fails(self, batch, _):
    raise ZeroDivisionError

works, Digits.training_step = Digits.training_step, fails
module, data = Digits(), DataLoader(TensorDataset(x[:64], y[:64]), batch_size=64)
for again in (False, True):
    Digits.training_step = works if again else fails
    try:
        lightning.Trainer(max_epochs=1, accelerator="cpu", callbacks=[SaveLess()], **quiet).fit(module, data)
        print("fitted")
    except ZeroDivisionError:
        print("failed", "training_step" in vars(module))
"""
HOOKS = """
class Trainer:  # of Lightning's, what it calls
    def __init__(self, callbacks, **_):
        [self.callback] = callbacks

    def fit(self, module, data):
        try:
            self.callback.on_fit_start(self, module)
            for i, batch in enumerate(data):
                module.training_step(batch, i).backward()
        except BaseException as error:
            self.callback.on_exception(self, module, error)
            raise
        self.callback.on_fit_end(self, module)

import sys, torch, types
sys.modules["lightning"] = types.SimpleNamespace(LightningModule=torch.nn.Module, Callback=object, Trainer=Trainer)
"""


@pytest.mark.slow
def test_a_fit_in_lightning_that_failed_leaves_the_module_as_it_was(tmp_path):
    file = EXAMPLES / "razor_in_lightning.py"
    classes, [quiet] = (
        file.read_text().split("\nmodel, data = ")[0],
        re.findall("^quiet = .*", file.read_text(), re.MULTILINE),
    )
    done = run_script("\n".join((HOOKS, classes, quiet, FIT_AGAIN)), tmp_path, file=file)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["failed False", "fitted"]


@pytest.mark.slow
def test_razor_in_lightning(output):
    pytest.importorskip("lightning", reason="lightning is not installed")
    assert accuracy(output("razor_in_lightning.py")) > 0.85
