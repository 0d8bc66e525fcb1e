"""The ledger against bytes counted by hand."""

import os

import pytest
import torch
from memtrain_common.measuring.memory import CATEGORIES, Ledger, SavedActivations, measure
from memtrain_common.measuring.peak import PeakMeter, memory_in_use, memory_left
from memtrain_common.measuring.prediction import predict
from memtrain_common.models.gpt import GPT, GPTConfig, next_token_loss
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

FLOAT = 4


def recorded(model, loss):
    with SavedActivations(model) as saved:
        value = loss()
    return saved, value


def test_a_two_layer_model_by_hand():
    """Linear 3→5, ReLU, Linear 5→2 on 4 rows, mean squared error, AdamW: every byte of every category."""
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
    model.register_buffer("mask", torch.zeros(7))
    x, target = torch.randn(4, 3), torch.randn(4, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    saved, loss = recorded(model, lambda: nn.functional.mse_loss(model(x), target))
    activations = saved.by_layer()
    loss.backward()
    optimizer.step()
    ledger = measure(model, optimizer, activations)
    parameters = {"0": 3 * 5 + 5, "2": 5 * 2 + 2}
    assert ledger.bytes_by_layer["weights"] == {k: n * FLOAT for k, n in parameters.items()}
    assert ledger.bytes_by_layer["gradients"] == {k: n * FLOAT for k, n in parameters.items()}
    # two moments a parameter, and one float32 step counter a tensor (weight and bias)
    assert ledger.bytes_by_layer["optimizer"] == {k: (2 * n + 2) * FLOAT for k, n in parameters.items()}
    assert ledger.bytes_by_layer["buffers"] == {"(model)": 7 * FLOAT}
    # Linear 0 saves x; ReLU saves its output, which is also Linear 2's input; the loss saves output and target
    assert activations == {"0": 12 * FLOAT, "1": 20 * FLOAT, "(model)": (8 + 8) * FLOAT}
    assert ledger.totals == {c: sum(ledger.bytes_by_layer[c].values()) for c in CATEGORIES}


def test_a_dropout_mask_is_counted_once_at_its_size():
    model = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5))
    x = torch.randn(10, 6)
    saved, loss = recorded(model, lambda: model(x).sum())
    assert saved.by_layer() == {"0": 60 * FLOAT, "1": 60 * FLOAT}  # x, and the mask, which on the CPU is float32
    loss.backward()


def test_shared_storage_is_counted_once_and_a_view_with_its_whole_storage():
    base = torch.randn(8, 5)
    model = nn.Identity()
    w = torch.randn(5, requires_grad=True)
    saved, value = recorded(model, lambda: (base[2:4] * w).sum() + (base * w).sum() + (base[0] * w).sum())
    assert sum(saved.by_layer().values()) == 8 * 5 * FLOAT  # w is saved by nobody: base needs no gradient
    value.backward()


def test_tied_weights_count_once():
    model = GPT(GPTConfig(block_size=4, vocab_size=11, n_layer=1, n_head=1, n_embd=4))
    ledger = measure(model, None, {})
    assert ledger.total("weights") == FLOAT * sum(p.numel() for p in model.parameters())
    assert "lm_head" not in ledger.bytes_by_layer["weights"]


def test_what_is_freed_before_the_backward_pass_is_not_held():
    model = nn.Linear(4, 4)
    x = torch.randn(3, 4)

    def forward():
        model(torch.randn(1000, 4)).sum()  # its graph is dropped at once
        return model(x).sum()

    saved, value = recorded(model, forward)
    assert saved.by_layer() == {"(model)": 12 * FLOAT}
    value.backward()


def test_a_packing_method_is_counted_by_what_it_packs():
    class HalfSquare(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x.half())
            return x * x

        @staticmethod
        def backward(ctx, g):
            return 2 * ctx.saved_tensors[0].float() * g

    model = nn.Linear(4, 6)
    saved, value = recorded(model, lambda: HalfSquare.apply(model(torch.ones(5, 4))).sum())
    assert sum(saved.by_layer().values()) == 5 * 4 * FLOAT + 5 * 6 * 2
    value.backward()


def test_nested_checkpointing_keeps_the_layer_stack_in_order():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x):
            return self.inner(x).relu() * 2

    model = nn.Sequential(Twice(), Twice())
    x = torch.randn(3, 4)
    saved, value = recorded(model, lambda: model(x).sum())
    assert saved.by_layer() == {"0.inner": 48, "0": 48, "1.inner": 48, "1": 48}
    value.backward()


@pytest.mark.parametrize("wrong_call", [True, False])
def test_the_hooks_are_gone_afterwards_even_after_an_error(wrong_call):
    model = nn.Linear(4, 4)
    if wrong_call:
        with pytest.raises(RuntimeError), SavedActivations(model):
            model(torch.randn(3, 5))
    else:
        recorded(model, lambda: model(torch.randn(3, 4)))
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_recording_changes_no_gradient():
    model = GPT(GPTConfig(block_size=4, vocab_size=11, n_layer=2, n_head=1, n_embd=4))
    batch = (torch.randint(0, 11, (2, 4)), torch.randint(0, 11, (2, 4)))
    next_token_loss(model, batch).backward()
    plain = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    _, loss = recorded(model, lambda: next_token_loss(model, batch))
    loss.backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), plain, strict=True))


def test_wrapper_subclasses_count_their_parts():
    class Two(torch.Tensor):
        @staticmethod
        def __new__(cls, a, b):
            return torch.Tensor._make_wrapper_subclass(cls, a.shape, dtype=a.dtype)

        def __init__(self, a, b):
            self.a, self.b = a, b

        def __tensor_flatten__(self):
            return ["a", "b"], None

        @staticmethod
        def __tensor_unflatten__(inner, meta, size, stride):
            raise NotImplementedError

        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            raise NotImplementedError

    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(3))], lr=1)
    weight = optimizer.param_groups[0]["params"][0]
    optimizer.state[weight]["moment"] = Two(torch.zeros(10, dtype=torch.uint8), torch.zeros(2))
    model = nn.Module()
    model.weight = weight
    assert measure(model, optimizer, {}).bytes_by_layer["optimizer"] == {"(model)": 10 + 8}


def test_the_file_holds_what_was_measured(tmp_path):
    ledger = measure(nn.Linear(3, 2), None, {"(model)": 5})
    ledger.save(tmp_path / "memory.json", peak_bytes={"training": 9})
    assert Ledger.read(tmp_path / "memory.json") == ledger


def test_phases_have_their_own_peaks():
    device = torch.device("cpu")
    meter = PeakMeter(device)
    meter.begin("training")
    block = torch.ones(256 << 20, dtype=torch.uint8)  # written to; the system may take other pages away meanwhile
    del block
    meter.begin("evaluation")
    meter.end()
    if meter.peak("training") is None:
        pytest.skip("this system does not let a process reset its resident peak")
    assert meter.peak("training") > meter.peak("evaluation") + (192 << 20)
    assert meter.peak("sleeping") is None
    assert memory_in_use(device) > 10 << 20


def test_operations_and_layers_that_saved_are_named():
    """A linear layer saves its input, GELU its own, a square its base."""
    model = nn.Sequential(nn.Linear(6, 10), nn.GELU(), nn.Linear(10, 4))
    recording = SavedActivations(model, by_operation=True)
    with recording:
        loss = torch.mul(*[model(torch.randn(5, 6))] * 2).sum()
    expected = {("0", "linear"): 4 * 5 * 6, ("1", "gelu"): 4 * 5 * 10, ("2", "linear"): 4 * 5 * 10,
                ("(model)", "mul"): 4 * 5 * 4}  # fmt: skip
    assert recording.by_operation() == expected
    assert recording.by_layer() == {layer: n for (layer, _), n in expected.items()}
    del loss
    assert recording.by_operation() == {}


class Selective(nn.Module):
    """Two layers in a checkpoint that keeps what matrix products give, where it is told to."""

    def __init__(self, keep):
        super().__init__()
        self.body, self.keep = nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 5)), keep

    def policy(self, context, operation, *args, **kwargs):
        kept = self.keep and operation is torch.ops.aten.addmm.default
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    def forward(self, x):
        contexts = lambda: create_selective_checkpoint_contexts(self.policy)  # noqa: E731
        return checkpoint(self.body, x, use_reentrant=False, context_fn=contexts)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:A saved_tensors_hooks context:FutureWarning")
def test_what_selective_checkpointing_keeps_is_counted_and_predicted():
    """Four rows: the input (6 wide) stays either way, the outputs of both products (9 and 5) by the policy."""

    def loss(model):
        return model(torch.randn(4, 6, requires_grad=True)).sum()

    measured = {}
    for keep in (False, True):
        model = Selective(keep)
        saved, value = recorded(model, lambda model=model: loss(model))
        measured[keep] = sum(saved.by_layer().values())
        value.backward()
        assert predict(lambda keep=keep: Selective(keep), loss).ledger.total("activations") == measured[keep]
    assert measured[True] - measured[False] == 4 * (9 + 5) * FLOAT


def test_what_is_left_is_less_than_the_machine_has():
    left = memory_left(torch.device("cpu"))
    if left is None:
        pytest.skip("this system does not tell how much memory is left")
    assert 0 < left < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
