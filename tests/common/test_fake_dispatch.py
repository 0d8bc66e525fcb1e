"""Remembered operations on fake tensors give what torch gives: every output of many models' steps, compared."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from memtrain_common.measuring import fake_dispatch
from memtrain_common.measuring.prediction import fake_step, predict
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor


def described(value, args):
    """All that is known of an output, and which argument it is or shares its memory with."""
    if isinstance(value, list | tuple):
        return type(value), [described(v, args) for v in value]
    if type(value) is not FakeTensor:
        return value if not isinstance(value, torch.Tensor) else type(value)
    same = [i for i, a in enumerate(args) if a is value]
    storage = value.untyped_storage()
    shared = [i for i, a in enumerate(args) if type(a) is FakeTensor and a.untyped_storage()._cdata == storage._cdata]
    return (
        value.shape, value.stride(), value.storage_offset(), value.dtype, value.fake_device, storage.nbytes(), same,
        shared, value.requires_grad, value.is_contiguous(), value.constant is None, sorted(vars(value)),
    )  # fmt: skip


@pytest.fixture
def compared(monkeypatch):
    """-> how often an operation was answered from memory; each time torch is asked too."""
    real, answered = fake_dispatch.run, []

    def run(mode, func, args, kwargs):
        before = len(fake_dispatch._known)
        mine = real(mode, func, args, kwargs)
        if func.namespace != "aten" or func.overloadpacket.__name__ in ("resize_", "set_"):  # a second time is another
            return mine
        theirs = func(*args, **kwargs)
        assert described(mine, args) == described(theirs, args), (func, args, kwargs)
        answered.append(len(fake_dispatch._known) == before)
        return mine

    monkeypatch.setattr(fake_dispatch, "_known", {})
    monkeypatch.setattr(fake_dispatch, "run", run)
    return answered


class Odd(nn.Module):
    """Views, views of views, parts, in-place operations, types, indices, and outputs that are inputs."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 12)
        self.norm = nn.GroupNorm(3, 12)
        self.conv = nn.Conv1d(12, 12, 3, padding=1, groups=3)
        self.lstm = nn.LSTM(12, 7, batch_first=True)
        self.drop = nn.Dropout(0.0)
        self.out = nn.Linear(7, 5)
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x):
        self.seen.add_(1)
        h = self.embed(x)
        h = self.conv(self.norm(h.transpose(1, 2)).relu_()).mT
        a, b, c = h.chunk(3, -1)
        h = torch.cat([c, a.double().float(), b.flip(-1)], -1)[:, ::2].contiguous()
        h = torch.where(h > 0, h, h.detach() * 0.5) + h.mean(1, keepdim=True).expand_as(h)
        h, _ = self.lstm(self.drop(h))
        h = h.unflatten(1, (-1, 1)).squeeze(2).unbind(1)[0].clone().masked_fill_(torch.ones(7) > 2, 3.0)
        spectrum = torch.fft.rfft(h).abs().sum(-1, keepdim=True)
        top, places = self.out(h).topk(2)
        return (top.cumsum(1) + places).sum() + spectrum.sum() + torch.tensor(2.0)


class Pictures(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.SiLU(inplace=True), nn.MaxPool2d(2), nn.Conv2d(8, 8, 1)
        )
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        h = self.body(x.to(memory_format=torch.channels_last)).flatten(2).mT
        h = h + self.attention(h, h, h, need_weights=False)[0]
        return F.cross_entropy(self.head(F.adaptive_avg_pool1d(h.mT, 1).flatten(1)), torch.tensor([0, 2, 1]))


@pytest.mark.slow
def test_every_output_is_as_torch_has_it(compared):
    for _ in range(2):
        predict(Odd, lambda m: m(torch.zeros(3, 9, dtype=torch.long)), lambda m: torch.optim.AdamW(m.parameters()))
        predict(Pictures, lambda m: m(torch.zeros(3, 3, 23, 19)), lambda m: torch.optim.SGD(m.parameters(), 0.1, 0.9))
    assert sum(compared) > 0.7 * len(compared)  # most come from memory


@pytest.mark.slow
def test_of_foreach_fused_and_lists(compared):
    for _ in range(2):
        for words in ({"foreach": True}, {"amsgrad": True}, {"fused": True}):
            adamw = partial(torch.optim.AdamW, **words)
            predict(Pictures, lambda m: m(torch.zeros(3, 3, 23, 19)), lambda m, adamw=adamw: adamw(m.parameters()))
        predict(Pictures, lambda m: m(torch.zeros(3, 3, 23, 19)), lambda m: torch.optim.Adafactor(m.parameters()))
    assert sum(compared) > 0.5 * len(compared)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_of_transformers(name, compared):
    transformers = pytest.importorskip("transformers")
    small = {"vocab_size": 40, "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2}
    if name == "bert":
        config = transformers.BertConfig(**small, num_attention_heads=2)
        made = partial(transformers.BertForSequenceClassification, config)
        words = {"labels": torch.zeros(3, dtype=torch.long)}
    elif name == "llama":
        config = transformers.LlamaConfig(**small, num_attention_heads=4, num_key_value_heads=2)
        made = partial(transformers.LlamaForCausalLM, config)
        words = {"labels": torch.zeros(3, 7, dtype=torch.long)}
    else:
        config = transformers.T5Config(
            vocab_size=40, d_model=24, d_kv=8, d_ff=48, num_layers=2, num_heads=3, decoder_start_token_id=0
        )
        made = partial(transformers.T5ForConditionalGeneration, config)
        words = {"labels": torch.zeros(3, 5, dtype=torch.long)}

    def loss(model):
        batch = {k: torch.zeros(v.shape, dtype=v.dtype) for k, v in words.items()}
        with torch.autocast("cpu", torch.bfloat16):
            return model(input_ids=torch.zeros(3, 7, dtype=torch.long), **batch).loss

    for _ in range(2):
        predict(made, loss, lambda m: torch.optim.AdamW(m.parameters()))
    assert sum(compared) > 0.6 * len(compared)


@pytest.mark.slow
def test_a_prediction_is_the_same_with_and_without(monkeypatch):
    def found():
        return predict(
            Odd, lambda m: m(torch.zeros(3, 9, dtype=torch.long)), lambda m: torch.optim.AdamW(m.parameters())
        )

    found()
    fast = found()
    monkeypatch.setattr(fake_dispatch, "run", lambda mode, func, args, kwargs: func(*args, **kwargs))
    assert found() == fast


def test_what_resizes_or_takes_another_memory_is_never_remembered():
    with fake_step():
        for n in (3, 5, 3):
            x = torch.zeros(4)
            x.resize_(n)
            assert x.shape == (n,)
            y = torch.zeros(2, 2)
            x.set_(y)
            assert x.untyped_storage()._cdata == y.untyped_storage()._cdata
            x.t_()
            x.unsqueeze_(0)
            assert x.shape == (1, 2, 2)


def test_numbers_of_one_value_and_different_types_are_told_apart():
    with fake_step():
        for _ in range(2):
            x = torch.zeros(3, dtype=torch.int32)
            assert [(x + n).dtype for n in (1, 1.0, True)] == [torch.int32, torch.float32, torch.int32]
            assert torch.full((2,), 1).dtype == torch.int64
            assert torch.full((2,), 1.0).dtype == torch.float32
            assert torch.full((2,), True).dtype == torch.bool


def test_a_default_dtype_of_another_moment_is_not_taken():
    before = torch.get_default_dtype()
    try:
        for dtype in (torch.float32, torch.float64, torch.float32):
            torch.set_default_dtype(dtype)
            with fake_step():
                assert torch.zeros(2).dtype == dtype
                assert (torch.arange(3) / 2).dtype == dtype
    finally:
        torch.set_default_dtype(before)


def test_views_share_the_memory_of_their_own_argument():
    with fake_step():
        for _ in range(3):
            x, y = torch.zeros(6, 4), torch.zeros(6, 4)
            for view in (
                y.mT,
                y[1:],
                y.view(-1),
                y.detach(),
                y.split(2)[1],
                y.unbind(0)[2],
                torch.ops.aten._unsafe_view(y, [24]),
            ):
                assert view.untyped_storage()._cdata == y.untyped_storage()._cdata != x.untyped_storage()._cdata
            assert y.clone().untyped_storage()._cdata != y.untyped_storage()._cdata


def test_one_mode_does_not_make_tensors_of_another():
    modes = []
    for _ in range(2):
        with fake_step():
            modes.append((torch.zeros(3) + 1).fake_mode)
    assert modes[0] is not modes[1]


def test_a_mode_outside_sees_every_operation():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Seen(TorchDispatchMode):
        names: list = []  # noqa: RUF012

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.names.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    for _ in range(2):
        with Seen(), fake_step() as live:
            assert live.mode is None
            torch.zeros(3).mul_(2)


def test_memory_is_bounded(monkeypatch):
    monkeypatch.setattr(fake_dispatch, "_known", {})
    monkeypatch.setattr(fake_dispatch, "_MOST", 7)
    with fake_step():
        for n in range(1, 40):
            torch.zeros(n).add_(1)
            assert len(fake_dispatch._known) <= 7
