"""ProxylessNAS-Mobile: beside a reference that is written from the paper's table, its weights, TinyTL's branches."""

import pytest
import torch
import torch.nn.functional as F
from backrazor.tasks.saving import first_and_last, train_only
from memtrain_common.errors import UserError
from memtrain_common.models.classifiers import build_classifier
from memtrain_common.models.proxyless import LiteResidual, ProxylessMobile, add_lite_residuals
from torch import nn

# Figure 4 of the paper, the mobile network, from the picture to the classes: MB(expansion) (kernel) outputs /stride
TABLE = """
Conv 3x3 32 /2
MB1 3x3 16
MB3 5x5 32 /2
MB3 3x3 32
MB3 7x7 40 /2
MB3 3x3 40
MB3 5x5 40
MB3 5x5 40
MB6 7x7 80 /2
MB3 5x5 80
MB3 5x5 80
MB3 5x5 80
MB6 5x5 96
MB3 5x5 96
MB3 5x5 96
MB3 5x5 96
MB6 7x7 192 /2
MB6 7x7 192
MB3 7x7 192
MB3 7x7 192
MB6 7x7 320
Conv 1x1 1280
"""
PLACES = [0, 1, 2, *range(5, 22)]  # of the blocks of the table among the published ones: two were left out


def rows():
    for line in TABLE.split("\n"):
        if line:
            kind, kernel, outputs, *stride = line.split()
            yield kind, int(kernel[0]), int(outputs), int(stride[0][1:]) if stride else 1


def norm(x, state, name):
    mean, var = state[f"{name}.running_mean"], state[f"{name}.running_var"]
    x = (x - mean[:, None, None]) / (var[:, None, None] + 1e-3).sqrt()
    return x * state[f"{name}.weight"][:, None, None] + state[f"{name}.bias"][:, None, None]


def layer(x, state, name, stride=1, depthwise=False, act=True):
    w = state[f"{name}.conv.weight"]
    x = F.pad(x, [w.shape[-1] // 2] * 4)
    if depthwise:  # each channel apart
        x = torch.cat([F.conv2d(x[:, c : c + 1], w[c : c + 1], stride=stride) for c in range(x.shape[1])], 1)
    else:
        x = F.conv2d(x, w, stride=stride)
    x = norm(x, state, f"{name}.bn")
    return x.clamp(0, 6) if act else x


def reference(state, x):
    """The network by its published tensors, row by row."""
    table = list(rows())
    x = layer(x, state, "first_conv", table[0][3])
    for place, (kind, kernel, outputs, stride) in zip(PLACES, table[1:-1], strict=True):
        name = f"blocks.{place}.mobile_inverted_conv"
        y = x
        if kind != "MB1":
            assert state[f"{name}.inverted_bottleneck.conv.weight"].shape[0] == int(kind[2:]) * x.shape[1]
            y = layer(y, state, f"{name}.inverted_bottleneck")
        assert state[f"{name}.depth_conv.conv.weight"].shape[-1] == kernel
        y = layer(y, state, f"{name}.depth_conv", stride, depthwise=True)
        y = layer(y, state, f"{name}.point_linear", act=False)
        assert y.shape[1] == outputs
        x = y + x if place > 0 and y.shape == x.shape else y
    x = layer(x, state, "feature_mix_layer").flatten(2).mean(2)
    return x @ state["classifier.linear.weight"].T + state["classifier.linear.bias"]


@pytest.fixture(scope="module")
def published():
    """Weights in the published form, of random numbers."""
    torch.manual_seed(0)
    model = ProxylessMobile(1000)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if ".bn." in name and value.is_floating_point():
                value.uniform_(0.5, 1.5)
    named = {n.replace(".conv.", ".mobile_inverted_conv.", 1) if n.startswith("blocks.") else n: t.clone()
             for n, t in model.state_dict().items()}  # fmt: skip
    return {n: t for n, t in named.items() if not n.endswith("num_batches_tracked")}


def test_it_has_the_published_number_of_parameters():
    assert sum(p.numel() for p in ProxylessMobile(1000).parameters()) == 4_080_512


@pytest.mark.slow
def test_it_is_the_papers_table(published, tmp_path):
    """Read in the published form, outputs on fixed inputs are those of the reference."""
    torch.save({"state_dict": published}, tmp_path / "proxyless_mobile.pth")
    made = build_classifier("proxyless_mobile", 1000, weights=str(tmp_path / "proxyless_mobile.pth"))
    assert (made.image_size, made.head, made.head_kept) == (224, "classifier.linear", True)
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(made.model.eval()(x), reference(published, x), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_other_classes_have_a_fresh_head_and_other_files_are_named(published, tmp_path):
    torch.save(published, tmp_path / "p.pth")
    made = build_classifier("proxyless_mobile", 10, weights=str(tmp_path / "p.pth"))
    assert not made.head_kept
    less = {n: t for n, t in published.items() if "blocks.7." not in n}
    torch.save(less, tmp_path / "less.pth")
    with pytest.raises(UserError, match=r"not of a proxyless_mobile: it has no blocks\.7\.conv"):
        build_classifier("proxyless_mobile", 10, weights=str(tmp_path / "less.pth"))
    with pytest.raises(UserError, match="name the published file"):
        build_classifier("proxyless_mobile", 10, weights="imagenet")


def test_a_lite_residual_begins_as_nothing_and_is_tinytls(published):
    """The function is at first the network's; then main(x) + up(norm(conv(relu(norm(conv(pool(x)))))))."""
    torch.manual_seed(2)
    model = ProxylessMobile(10).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        before = model(x)
        add_lite_residuals(model.eval())
        torch.testing.assert_close(model.eval()(x), before, rtol=0, atol=0)
        found = [m for m in model.modules() if isinstance(m, LiteResidual)]
        assert len(found) == 19  # every block but the first and those left out
        assert [m.lite_residual["conv1"].kernel_size[0] for m in found] == [5] * 15 + [3] * 4
        branch = found[2]  # 32 -> 40 channels, stride 2
        for part in ("bn1", "final_bn"):
            branch.lite_residual[part].weight.uniform_(0.5, 2)
            branch.lite_residual[part].bias.uniform_(-1, 1)
        y = torch.randn(2, 32, 16, 16)
        state = branch.state_dict()
        pooled = y.unfold(2, 2, 2).unfold(3, 2, 2).mean((-1, -2))
        w = state["lite_residual.conv1.weight"]
        halves = [F.conv2d(p, k, stride=2, padding=2) for p, k in zip(pooled.chunk(2, 1), w.chunk(2), strict=True)]
        z = torch.cat(halves, 1)
        z = norm(z, state, "lite_residual.bn1").clamp(min=0)
        z = norm(F.conv2d(z, state["lite_residual.conv2.weight"]), state, "lite_residual.final_bn")
        wanted = branch.main_branch(y) + F.interpolate(z, (8, 8), mode="bilinear", align_corners=False)
        torch.testing.assert_close(branch(y), wanted, rtol=1e-4, atol=1e-5)


def test_what_the_lite_modes_train():
    model = ProxylessMobile(10)
    add_lite_residuals(model)
    train_only(model, ("classifier.linear",), "lite-residual")
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert all(".lite_residual." in n or n.startswith("classifier.") for n in trained)
    assert sum(".lite_residual.conv1" in n for n in trained) == 19
    train_only(model, ("classifier.linear",), "lite-residual+bias")
    more = {n for n, p in model.named_parameters() if p.requires_grad}
    assert "first_conv.bn.bias" in more
    assert not any(n.endswith("final_bn.bias") for n in more)


@pytest.mark.slow
def test_tinytls_own_weights_are_read(tmp_path):
    """Group norms, standardised convolutions, lite residuals: known by the names of the tensors."""
    torch.manual_seed(3)
    model = ProxylessMobile(1000, plain=False)
    add_lite_residuals(model)
    with torch.no_grad():
        for module in [m for m in model.modules() if isinstance(m, LiteResidual)]:
            module.lite_residual["final_bn"].weight.fill_(0.3)
    assert model.first_conv.bn.num_groups == 4
    torch.save({"state_dict": model.state_dict()}, tmp_path / "tinytl")
    again = build_classifier("proxyless_mobile", 1000, weights=str(tmp_path / "tinytl")).model
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(again.eval()(x), model.eval()(x))
    conv = model.first_conv.conv
    w = conv.weight.detach()
    scale = torch.stack([c.std() for c in w])[:, None, None, None]
    wanted = F.conv2d(x, (w - w.mean((1, 2, 3), keepdim=True)) / (scale + 1e-5), stride=2, padding=1)
    torch.testing.assert_close(conv(x).detach(), wanted, rtol=1e-4, atol=1e-4)


def test_the_first_and_the_last_of_a_model():
    assert first_and_last(ProxylessMobile(10), "classifier.linear") == ("first_conv.conv", "classifier.linear")
    made = build_classifier("vit-mini", 10, image_size=28)
    names = first_and_last(made.model, made.head)
    assert isinstance(made.model.get_submodule(names[0]), nn.Conv2d)
    assert names[1:] == ("vit.layernorm", "classifier")
