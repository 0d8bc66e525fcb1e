"""Several adapters, a different one for each row, none for a while, merging and taking off."""

import copy

import pytest
import torch
from lora_xs import (
    LoRAXSConfig,
    LoRAXSError,
    add,
    disable,
    inject,
    merge,
    param_groups,
    remove,
    rows,
    set_active,
    trained,
    unmerge,
)
from lora_xs.layer import layers
from torch import nn

TARGETS = ("embed", "conv", "up", "down")
CONFIG = LoRAXSConfig(rank=3, alpha=5, targets=TARGETS)


def three(model, train_r):
    inject(model, CONFIG)
    add(model, "b")
    add(model, "c", alpha=9, seed=4)
    for name in ("default", "b", "c"):
        train_r(model, name)
        set_active(model, name)
        with torch.no_grad():
            for p in trained(model)["head"]:
                p.copy_(torch.randn_like(p))
    set_active(model, "default")
    return model


def test_a_batch_of_eight_rows_with_three_adapters_equals_each_row_alone(mixed, train_r):
    model = three(mixed.double().eval(), train_r)
    ids, image = torch.randint(0, 31, (8, 5)), torch.randn(8, 3, 7, 8, dtype=torch.float64)
    names = ["default", "b", "c", "b", None, "c", "c", "default"]
    with rows(model, names):
        together = model(ids, image)
    for i, name in enumerate(names):
        if name is None:
            with disable(model):
                alone = model(ids[i : i + 1], image[i : i + 1])
        else:
            set_active(model, name)
            alone = model(ids[i : i + 1], image[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-12, atol=1e-12)
    assert len({tuple(row) for row in together.tolist()}) == 8


def test_rows_on_a_transformer(roberta, train_r):
    model = roberta().double()
    inject(model, LoRAXSConfig(rank=4, targets=("query", "value", "output.dense")))
    add(model, "b")
    add(model, "c")
    for name in ("default", "b", "c"):
        train_r(model, name, scale=1.0)
    ids = torch.randint(3, 60, (8, 9))
    names = ["default", "b", "c", "b", "default", "c", "c", "b"]
    with torch.no_grad():
        with rows(model, names):
            together = model(ids).logits
        for i, name in enumerate(names):
            set_active(model, name)
            torch.testing.assert_close(model(ids[i : i + 1]).logits[0], together[i], rtol=1e-10, atol=1e-10)


def test_rows_are_counted_and_known(mixed, inputs, train_r):
    model = three(mixed, train_r)
    with (
        rows(model, ["b"] * 5),
        pytest.raises(LoRAXSError, match="got 6 rows, but adapters were given for 5"),
    ):
        model(*inputs)
    with pytest.raises(LoRAXSError, match="no adapter 'x'; the model has default, b, c"), rows(model, ["x"]):
        pass
    model(*inputs)  # the context was left in order


def test_gradients_reach_every_row_adapter(mixed, inputs, train_r):
    model = three(mixed, train_r)
    for p in trained(model, "b")["R"]:
        p.requires_grad_(True)
    with rows(model, ["default", "b", "default", "b", "b", "default"]):
        model(*inputs).sum().backward()
    for name in ("default", "b"):
        assert all(float(p.grad.abs().max()) > 0 for p in trained(model, name)["R"])


def test_switching_changes_r_alpha_head_and_what_trains(mixed, inputs, train_r):
    model = three(mixed, train_r)
    outputs = {}
    for name in ("default", "b", "c"):
        set_active(model, name)
        outputs[name] = model(*inputs)
        names = {n for n, p in model.named_parameters() if p.requires_grad}
        assert {n for n in names if ".R." in n} == {f"{t}.lora_xs.R.{name}" for t in TARGETS}
        assert {id(p) for p in trained(model)["head"]} <= {id(p) for p in model.parameters() if p.requires_grad}
    assert not torch.equal(outputs["b"], outputs["c"])
    assert model.down.lora_xs.scale("c") == 3
    set_active(model, "default")
    assert torch.equal(model(*inputs), outputs["default"])
    set_active(model, None)
    assert not any(p.requires_grad for p in model.parameters())
    with pytest.raises(LoRAXSError, match="no adapter is active"):
        trained(model)


def test_a_new_adapter_starts_from_the_untrained_head(mixed, train_r):
    start = copy.deepcopy(mixed.classifier.state_dict())
    model = inject(mixed, CONFIG)
    model.classifier.weight.data.add_(1)
    add(model, "b")
    head = dict(model.classifier.lora_xs_head.parameters_of(model.classifier, "b"))
    assert torch.equal(head["weight"], start["weight"])
    assert len(trained(model)["head"]) == 2


def test_disable_is_the_base_model(mixed, inputs, train_r):
    want = mixed(*inputs)
    model = train_r(inject(mixed, CONFIG))
    adapted = model(*inputs)
    with disable(model):
        assert torch.equal(model(*inputs), want)
    assert torch.equal(model(*inputs), adapted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_unmerge_restores_the_bytes(mixed, inputs, train_r, dtype):
    mixed.to(dtype)
    before = {k: v.clone() for k, v in mixed.state_dict().items()}
    model = train_r(inject(mixed, CONFIG), scale=1.0)
    image = inputs[1].to(dtype)
    adapted = model(inputs[0], image)
    merge(model)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.1, torch.float16: 0.01}[dtype]
    torch.testing.assert_close(model(inputs[0], image), adapted, rtol=tolerance, atol=tolerance)
    assert not torch.equal(model.down.weight, before["down.weight"])
    with pytest.raises(LoRAXSError, match="adapter 'default' is merged"):
        merge(model)
    with pytest.raises(LoRAXSError, match="call unmerge before set_active"):
        set_active(model, "default")
    unmerge(model)
    for key, value in before.items():
        assert torch.equal(model.state_dict()[key].view(torch.uint8), value.view(torch.uint8)), key
    assert torch.equal(model(inputs[0], image), adapted)
    with pytest.raises(LoRAXSError, match="no adapter is merged"):
        unmerge(model)


def test_merge_for_good_leaves_a_plain_model(mixed, inputs, train_r):
    keys = list(mixed.state_dict())
    model = train_r(inject(mixed, CONFIG))
    want = model(*inputs)
    merge(model, keep=False)
    assert list(model.state_dict()) == keys
    assert not any(m._forward_hooks for m in model.modules())
    torch.testing.assert_close(model(*inputs), want)
    inject(model, CONFIG)


def test_merge_refuses_what_is_not_finite_and_changes_nothing(mixed, train_r):
    model = train_r(inject(mixed, CONFIG))
    model.down.lora_xs.R["default"].data[0, 0] = float("inf")
    before = {k: v.clone() for k, v in model.state_dict().items() if k.endswith("weight")}
    with pytest.raises(LoRAXSError, match="into down gives weights that are not finite"):
        merge(model)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(23, 8)
        self.mid = nn.Linear(8, 8)
        self.lm_head = nn.Linear(8, 23, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, ids):
        return self.lm_head(self.mid(self.embed(ids)))


@pytest.mark.parametrize("targets", [("embed",), ("lm_head",), ("embed", "lm_head", "mid")])
def test_tied_weights(targets, train_r):
    model = Tied().double()
    ids = torch.arange(23)[None]
    base = model(ids)
    train_r(inject(model, LoRAXSConfig(rank=3, targets=targets)))
    want = model(ids)
    assert not torch.equal(want, base)
    assert model.lm_head.weight is model.embed.weight  # adapted apart, stored once
    with pytest.warns(UserWarning, match="shared its weight"):
        merge(model)
    torch.testing.assert_close(model(ids), want, rtol=1e-12, atol=1e-12)
    unmerge(model)
    assert model.lm_head.weight is model.embed.weight
    remove(model)
    assert torch.equal(model(ids), base)


def test_remove_restores_the_base(mixed, inputs, train_r):
    want, keys = mixed(*inputs), list(mixed.state_dict())
    model = remove(train_r(inject(mixed, CONFIG)))
    assert torch.equal(model(*inputs), want)
    assert list(model.state_dict()) == keys
    with pytest.raises(LoRAXSError, match="no LoRA-XS adapters"):
        layers(model)


def test_names_are_checked(mixed):
    model = inject(mixed, CONFIG)
    with pytest.raises(LoRAXSError, match="already an adapter 'default'"):
        add(model, "default")
    with pytest.raises(LoRAXSError, match=r"contain a dot"):
        add(model, "a.b")
    with pytest.raises(LoRAXSError, match="already has LoRA-XS adapters"):
        inject(model, CONFIG)


def test_trained_bases_are_not_shared(mixed):
    model = inject(mixed, LoRAXSConfig(rank=2, targets=("up",), train_bases=True))
    with pytest.raises(LoRAXSError, match="no second one can share"):
        add(model, "b")


def test_state_dict_resumes_exactly(mixed, inputs, train_r):
    model = three(mixed, train_r)
    state = copy.deepcopy(model.state_dict())
    want = model(*inputs)
    train_r(model)
    assert not torch.equal(model(*inputs), want)
    model.load_state_dict(state)
    assert torch.equal(model(*inputs), want)


def test_param_groups_are_an_optimizers_and_hold_all_that_is_trained(mixed):
    model = inject(mixed, LoRAXSConfig(rank=3, targets=TARGETS, train_bases=True))
    groups = param_groups(model, lr=1e-3, head_lr=5e-4)
    assert [(g["name"], g["lr"]) for g in groups] == [("R", 1e-3), ("bases", 1e-3), ("head", 5e-4)]
    everything = {id(p) for p in model.parameters() if p.requires_grad}
    assert {id(p) for g in groups for p in g["params"]} == everything
    assert [g["lr"] for g in param_groups(model, lr=1.0, bases_lr=2.0)] == [1.0, 2.0, 1.0]
    plain = inject(torch.nn.Sequential(nn.Linear(4, 4)), LoRAXSConfig(rank=2))
    optimizer = torch.optim.SGD(param_groups(plain), lr=0.7)  # no bases, no head: one group; no rate: the optimizer's
    assert [(g["name"], g["lr"]) for g in optimizer.param_groups] == [("R", 0.7)]


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("active", ["default", "b"])
@pytest.mark.parametrize("merged", ["default", "b", "c"])
def test_a_merged_adapter_answers_with_its_own_head(mixed, inputs, train_r, merged, active, keep):
    model = three(mixed.double().eval(), train_r)
    inputs = (inputs[0], inputs[1].double())
    set_active(model, merged)
    expected = model(*inputs)
    set_active(model, active)
    before = model(*inputs)
    merge(model, merged, keep=keep)
    torch.testing.assert_close(model(*inputs), expected)
    if keep:
        assert torch.equal(unmerge(model)(*inputs), before)


@pytest.mark.parametrize("end", [lambda m: merge(m, keep=False), remove])
def test_a_model_that_was_adapted_trains_as_any_other(mixed, inputs, train_r, end):
    inject(mixed, CONFIG)
    train_r(mixed)
    end(mixed)
    mixed.requires_grad_(True)
    mixed(*inputs).sum().backward()
    assert all(p.grad is not None for p in mixed.parameters())


@pytest.mark.parametrize("name", ["train", "eval", "keys", "values", "get", "copy", "type", "training", "to"])
def test_a_name_that_torchs_modules_have_is_refused_and_changes_nothing(mixed, inputs, name):
    inject(mixed, CONFIG)
    before = mixed(*inputs)
    with pytest.raises(LoRAXSError, match=f"{name!r} is the name of an attribute"):
        add(mixed, name)
    set_active(mixed, "default")
    assert torch.equal(mixed(*inputs), before)


def test_a_head_that_holds_a_weight_of_the_base_is_refused(mixed):
    mixed.decoder = nn.Linear(12, 31, bias=False)
    mixed.decoder.weight = mixed.embed.weight
    with pytest.raises(LoRAXSError, match=r"decoder.weight is also the model's embed.weight.*untie"):
        inject(mixed, LoRAXSConfig(rank=3, targets=("up",), head=("decoder",)))
    with pytest.raises(LoRAXSError, match="untie"):  # before anything is computed
        inject(
            mixed,
            LoRAXSConfig(rank=3, targets=("up",), head=("decoder",), init="gradient"),
            losses=lambda: pytest.fail("asked for losses"),
        )
    assert all(p.requires_grad for p in mixed.parameters())
    inject(mixed, LoRAXSConfig(rank=3, targets=("up",), head=("classifier",)))


def test_running_statistics_that_no_adapter_file_holds_are_said(mixed, inputs):
    mixed.conv = nn.Sequential(mixed.conv, nn.BatchNorm2d(5))
    config = LoRAXSConfig(rank=3, targets=("up",))
    inject(mixed, config)
    with pytest.warns(UserWarning, match=r"conv.1 \(1 such modules\) updates its running statistics"):
        mixed(*inputs).sum().backward()
    remove(mixed)
    mixed.conv[1].eval()
    inject(mixed, config)
    mixed(*inputs).sum().backward()  # a warning would be an error


def test_what_was_trained_before_is_trained_again_when_the_adapter_is_off(mixed, inputs):
    mixed.conv.requires_grad_(False)
    before = {name: p.requires_grad for name, p in mixed.named_parameters()}
    twin = copy.deepcopy(mixed)
    inject(mixed, CONFIG)
    assert sum(p.requires_grad for p in mixed.embed.parameters(recurse=False)) == 0
    assert {n: p.requires_grad for n, p in remove(mixed).named_parameters()} == before
    merge(inject(twin, CONFIG), keep=False)
    assert {n: p.requires_grad for n, p in twin.named_parameters()} == before


def test_a_merged_model_moves_to_another_type_with_the_weights_that_come_back(mixed, inputs, train_r):
    model = train_r(inject(mixed, CONFIG))
    tied = nn.Linear(17, 9, bias=False)
    tied.weight = model.down.weight
    model.tied = tied
    ids, image = inputs
    want = model(*inputs)
    merge(model)
    model.double()
    merged = model(ids, image.double())
    unmerge(model)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert model.down.weight is model.tied.weight
    torch.testing.assert_close(model(ids, image.double()), want.double(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(merged, want.double(), rtol=1e-4, atol=1e-5)


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(6, 8)
        self.classifier = nn.Sequential(nn.Linear(8, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))

    def forward(self, x):
        return self.classifier(self.body(x))


def test_training_one_adapter_leaves_the_statistics_of_anothers_head():
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.out = nn.BatchNorm1d(8), nn.Linear(8, 2)

        def forward(self, x):
            return self.out(self.norm(x))

    model = Normed()
    model.classifier = Head()
    inject(model, LoRAXSConfig(2, targets=("body",)))
    model(torch.randn(7, 6)).sum().backward()  # the first one's own
    add(model, "b")
    before = {k: v.clone() for k, v in model.classifier.norm.state_dict().items()}
    set_active(model, "b")
    refused = pytest.raises(LoRAXSError, match="classifier has running statistics, and training 'b' would change those")
    with refused:
        model(torch.randn(7, 6))
    with refused, rows(model, [None, "b"]):
        model(torch.randn(2, 6))
    for key, value in model.classifier.norm.state_dict().items():
        assert torch.equal(value, before[key])
    model.eval()(torch.randn(7, 6)).sum().backward()
    assert model.classifier.lora_xs_head.copies["b"].out.weight.grad is not None


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_checkpointed_pass_that_is_repeated_outside_of_rows_is_refused(use_reentrant, train_r):
    model = Normed()
    inject(model, LoRAXSConfig(2, targets=("body",), head=()))
    add(model, "b")
    for name in ("default", "b"):
        train_r(model, name)
    x, names = torch.randn(3, 6, requires_grad=True), ["b", None, "default"]
    R = [R for _, layer in layers(model) for R in layer.R.values()]

    def loss():
        return torch.utils.checkpoint.checkpoint(model, x, use_reentrant=use_reentrant).square().sum()

    with rows(model, names):
        found = [model(x).square().sum(), loss()]
        wanted = torch.autograd.grad(found[0], [p for p in R if p.requires_grad])
        found[1].backward()
    torch.testing.assert_close([p.grad for p in R if p.requires_grad], list(wanted))
    for around in (lambda: rows(model, names), lambda: disable(model)):
        with around():
            late = loss()
        with pytest.raises(LoRAXSError, match="body is checkpointed, and other adapters are in use in the backward"):
            late.backward()


@pytest.mark.parametrize("init", ["svd", "random"])
def test_the_numbers_that_are_drawn_do_not_follow_torchs_default_type(init, mixed):
    twin = copy.deepcopy(mixed)
    config = LoRAXSConfig(rank=3, targets=TARGETS, init=init)
    inject(mixed, config)
    torch.set_default_dtype(torch.float64)
    try:
        inject(twin, config)
    finally:
        torch.set_default_dtype(torch.float32)
    for (_, a), (_, b) in zip(layers(mixed), layers(twin), strict=True):
        assert torch.equal(a.A, b.A)
        assert torch.equal(a.B, b.B)
        assert torch.equal(a.R["default"], b.R["default"])


def test_many_adapters_have_heads_of_their_own_alone(mixed):
    inject(mixed, CONFIG)
    for i in range(12):
        add(mixed, f"a{i}")
    copies = mixed.classifier.lora_xs_head.copies
    assert not any(copy._forward_hooks or copy._forward_pre_hooks for copy in copies.values())
    assert sum(1 for m in mixed.modules() if isinstance(m, nn.Linear) and m.out_features == 4) == 13


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_reference_pass_between_a_checkpointed_one_and_its_backward(use_reentrant, train_r):
    """As DPO makes it: the base model answers in between."""
    model = Normed()
    inject(model, LoRAXSConfig(2, targets=("body",), head=()))
    train_r(model)
    model.eval()
    x = torch.randn(3, 6, requires_grad=True)
    R = model.body.lora_xs.R["default"]
    (wanted,) = torch.autograd.grad(model(x).square().sum(), R)
    for _ in range(2):
        answer = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=use_reentrant)
        with torch.no_grad(), disable(model):
            model(x)
        R.grad = None
        answer.square().sum().backward()
        torch.testing.assert_close(R.grad, wanted)


def test_a_frozen_norm_in_a_head_stops_no_second_adapter():
    model = Normed()
    inject(model, LoRAXSConfig(2, targets=("body",), head=("classifier.0",)))
    add(model, "b")
    set_active(model, "b")
    model.train()
    model(torch.randn(7, 6)).sum().backward()


def test_a_part_of_a_model_is_given_back_as_it_was(mixed):
    whole = nn.Sequential(mixed, nn.Linear(4, 2))
    whole[1].bias.requires_grad_(False)
    mixed.classifier.requires_grad_(False)
    before = {name: p.requires_grad for name, p in whole.named_parameters()}
    inject(whole[0], CONFIG)
    assert whole[1].weight.requires_grad
    remove(whole)
    assert {name: p.requires_grad for name, p in whole.named_parameters()} == before


def test_a_model_that_an_earlier_version_pickled_whole_runs_trains_and_is_taken_apart(mixed, inputs, train_r):
    """Its layers lack what forward passes note today."""
    model = train_r(inject(mixed, CONFIG))
    want = model(*inputs)
    for _, layer in layers(model):
        for name in ("trained_before", "watched", "answered", "repeated"):
            layer.__dict__.pop(name, None)
    model(*inputs).sum().backward()
    torch.testing.assert_close(model(*inputs), want)
    add(model, "b")
    set_active(model, "b")
    remove(model)(*inputs)
