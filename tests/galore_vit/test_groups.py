"""Which weights param_groups chooses, and when it refuses."""

import pytest
import torch
from galore_vit import GaLoreAdamW, Refresh, param_groups
from galore_vit.projection import Layout
from small_models import mixtral
from torch import nn


def names(model, group):
    by_id = {id(p): n for n, p in model.named_parameters()}
    return {by_id[id(p)] for p in group["params"]}


def hf_vit():
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=16,
        patch_size=8,
    )
    return transformers.ViTForImageClassification(config)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.qkv = nn.Linear(16, 48)
        self.proj = nn.Linear(16, 16)


class Timmish(nn.Module):
    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 4, 4)
        self.pos = nn.Parameter(torch.zeros(1, 5, 16))
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(16, 10)


def test_transformers_vit_blocks_are_projected_and_the_rest_is_plain():
    model = hf_vit()
    plain, projected = param_groups(model, 4, 50, 1.0, "full")
    chosen = names(model, projected)
    assert len(chosen) == 2 * 6
    assert all(".0." in n or ".1." in n for n in chosen)
    assert {"classifier.weight"} < names(model, plain)
    assert names(model, plain) | chosen == {n for n, _ in model.named_parameters()}
    assert [projected[k] for k in ("rank", "update_proj_gap", "scale", "proj_type")] == [4, 50, 1.0, "full"]


def test_fused_qkv_is_split_and_convolutions_are_on_demand():
    model = Timmish()
    plain, whole, fused = param_groups(model, 4)
    assert names(model, fused) == {"blocks.0.qkv.weight", "blocks.1.qkv.weight"}
    assert fused["split"] == 3
    assert names(model, whole) == {"blocks.0.proj.weight", "blocks.1.proj.weight"}
    assert {"patch.weight", "pos", "head.weight"} < names(model, plain)
    _, whole, _ = param_groups(model, 4, conv=True)
    assert "patch.weight" in names(model, whole)
    groups = param_groups(model, 4, split_qkv=False)
    assert len(groups) == 2
    GaLoreAdamW(param_groups(model, 4, conv=True))


@pytest.mark.parametrize("heads", [1, 3, 4])
def test_ltes_factors_are_stacks_of_matrices(heads):
    """Every head of A (H, r, n) and B (H, m, r) is projected apart, and moves as it would alone."""
    lte = pytest.importorskip("lte")
    torch.manual_seed(0)
    model = nn.Sequential()
    model.blocks = nn.ModuleList([nn.Linear(24, 16), nn.Linear(16, 24)])
    model = lte.inject(model, lte.LTEConfig(heads=heads, rank=8, alpha=8.0, targets=("blocks.0", "blocks.1")))
    by_default = param_groups(model, 4)
    groups = param_groups(model, 4, targets=r"\.lora_[AB]$")
    assert [{n.rpartition(".")[2] for n in names(model, g)} for g in groups if "rank" in g] == [{"lora_A", "lora_B"}]
    assert names(model, by_default[-1]) == names(model, groups[-1])
    factors = groups[-1]["params"]
    assert [p.shape[0] for p in factors] == [heads] * 4
    alone = [[nn.Parameter(p.detach()[h].clone()) for h in range(heads)] for p in factors]
    exact = Refresh(method="svd", stagger=False)
    optimizers = [GaLoreAdamW(groups, lr=1e-2, refresh=exact)]
    keys = {"rank": 4, "update_proj_gap": 200, "scale": 0.25}
    optimizers.append(GaLoreAdamW([{"params": [w for ws in alone for w in ws], **keys}], lr=1e-2, refresh=exact))
    for _ in range(5):
        for p, own in zip(factors, alone, strict=True):
            p.grad = torch.randn_like(p)
            for h, w in enumerate(own):
                w.grad = p.grad[h].clone()
        for optimizer in optimizers:
            optimizer.step()
    for p, own in zip(factors, alone, strict=True):
        assert torch.allclose(p, torch.stack(list(own)), atol=1e-6)
        assert optimizers[0].state[p]["exp_avg"].numel() == p.numel() // 2  # of r = 8, rank 4


def test_stacks_of_experts_are_projected():
    model = mixtral(experts=5)
    _, whole, stacks = param_groups(model, 4)
    assert {n.rpartition(".")[2] for n in names(model, stacks)} == {"gate_up_proj", "down_proj"}
    assert (stacks["split"], len(stacks["params"]), len(whole["params"])) == (5, 4, 8)
    in_blocks = sum(p.numel() for n, p in model.named_parameters() if ".layers." in n)
    assert sum(p.numel() for g in (whole, stacks) for p in g["params"]) > 0.95 * in_blocks
    before = [p.detach().clone() for p in stacks["params"]]
    optimizer = GaLoreAdamW(param_groups(model, 4), lr=1e-2)
    ids = torch.randint(0, 30, (4, 12))
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    assert not any(map(torch.equal, before, stacks["params"]))
    down = stacks["params"][-1]  # (5, 16, 32), whose moments are (5, 4, 32)
    assert optimizer.state[down]["exp_avg"].numel() == 5 * 4 * 32

    model = nn.Sequential(nn.Linear(8, 8))
    model[0].pair = nn.Parameter(torch.zeros(2, 8, 8))  # of a linear layer's own
    model.append(nn.Module())
    model[1].q = nn.Parameter(torch.zeros(8, 2, 4))  # XLNet's, which is no stack
    groups = param_groups(model, 2)
    assert "1.q" in names(model, groups[0])


def test_a_convolutions_weight_is_no_stack():
    model = nn.ModuleList([nn.Conv1d(12, 16, 3)])
    [_, projected] = param_groups(model, 4, conv=True)
    assert "split" not in projected
    assert GaLoreAdamW([projected]).layout(model[0].weight) == Layout(1, 16, 36, 4, left=True, right=False)


def test_targets_by_name_and_frozen_weights():
    model = Timmish()
    model.blocks[0].requires_grad_(False)
    plain, projected = param_groups(model, 4, targets=r"proj|head\.weight")
    assert names(model, projected) == {"blocks.1.proj.weight", "head.weight"}
    assert not any("blocks.0" in n for n in names(model, plain))


def test_a_rank_that_projects_nothing_is_refused():
    with pytest.raises(ValueError, match=r"rank 512 is not below .* 16 at most"):
        param_groups(Timmish(), 512)
    with pytest.raises(ValueError, match="no weight to project"):
        param_groups(nn.Sequential(nn.LayerNorm(4)), 2)
    with pytest.raises(ValueError, match="rank must be"):
        param_groups(Timmish(), 0)


def test_torchvisions_attention_is_projected_and_its_heads_are_not():
    models = pytest.importorskip("torchvision.models")
    with torch.device("meta"):
        vit = models.VisionTransformer(32, 8, 3, 4, 16, 32, num_classes=5)
        net = models.convnext_tiny(num_classes=5)
        mobile = models.mobilenet_v2(num_classes=5)
    chosen = set().union(*(names(vit, g) for g in param_groups(vit, 4)[1:]))
    kinds = {n.split("encoder_layer_", 1)[-1].split(".", 1)[-1] for n in chosen}
    wanted = {"self_attention.in_proj_weight", "self_attention.out_proj.weight", "mlp.0.weight", "mlp.3.weight"}
    assert kinds == wanted
    assert len(chosen) == 3 * 4
    plain, *rest = param_groups(net, 4)
    assert "classifier.2.weight" in names(net, plain)
    assert all(n.startswith("features.") for g in rest for n in names(net, g))
    with pytest.raises(ValueError, match="but the head's lies in a numbered block"):
        param_groups(mobile, 4)
    assert param_groups(mobile, 4, targets="classifier")
    with torch.device("meta"):
        alex = models.alexnet(num_classes=5)
    plain, fc = param_groups(alex, 4)
    assert names(alex, fc) == {"classifier.1.weight", "classifier.4.weight"}
    assert "classifier.6.weight" in names(alex, plain)
