"""LoRA-XS: train r×r numbers a layer between frozen SVD bases, and save them in a small file."""

from pathlib import Path
from tempfile import TemporaryDirectory

import lora_xs
import torch
from digits import accuracy, digits, network
from torch.nn.functional import cross_entropy

x, y, test_x, test_y = digits()


def train(model: torch.nn.Module, rows: torch.Tensor, lr: float) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    for _ in range(200):
        some = rows[torch.randint(0, len(rows), (64,))]
        cross_entropy(model(x[some]), y[some]).backward()
        optimizer.step()
        optimizer.zero_grad()


model = network()
train(model, (y < 5).nonzero()[:, 0], lr=1e-3)  # a base model that knows 0 to 4
base = {name: weight.clone() for name, weight in model.state_dict().items()}
before = accuracy(model, test_x, test_y)

config = lora_xs.LoRAXSConfig(rank=16, targets=("1.0", "1.3", "1.6", "1.9"), head=("2",))
lora_xs.inject(model, config, cache=False)
train(model, torch.arange(len(x)), lr=1e-2)
after = accuracy(model, test_x, test_y)
with TemporaryDirectory() as folder:
    lora_xs.save_adapter(model, folder)
    size = (Path(folder) / "adapter.safetensors").stat().st_size
    fresh = network()
    fresh.load_state_dict(base)
    lora_xs.load_adapter(fresh, folder)
assert accuracy(fresh, test_x, test_y) == after
print(f"accuracy {before:.3f} before, {after:.3f} after; 4 × 16² numbers and the head trained, adapter {size:,} bytes")
