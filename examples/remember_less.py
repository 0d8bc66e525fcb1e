"""GaLore: all weights are trained, and the optimizer's moments live in a small subspace of each gradient."""

import torch
from digits import accuracy, digits, network
from galore_vit import GaLoreAdamW, param_groups
from torch.nn.functional import cross_entropy

x, y, test_x, test_y = digits()


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    states = optimizer.state.values()
    return sum(t.nbytes for state in states for t in state.values() if isinstance(t, torch.Tensor))


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    torch.manual_seed(1)
    for _ in range(200):
        rows = torch.randint(0, len(x), (64,))
        cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
        optimizer.zero_grad()


for name in ("AdamW", "GaLore"):
    model = network()
    if name == "AdamW":
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    else:
        optimizer = GaLoreAdamW(param_groups(model, rank=16, update_proj_gap=50, scale=1.0), lr=1e-3)
    train(model, optimizer)
    print(
        f"{name:>6}: accuracy {accuracy(model, test_x, test_y):.3f}, {state_bytes(optimizer) / 1024:6.0f} KiB of state"
    )
