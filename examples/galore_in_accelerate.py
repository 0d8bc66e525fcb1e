"""GaLore in a loop of one's own with accelerate: prepared, accumulated, clipped, saved and loaded."""

from tempfile import TemporaryDirectory

import torch
from accelerate import Accelerator
from digits import accuracy, digits, network
from galore_vit import GaLoreAdamW, param_groups
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

x, y, test_x, test_y = digits()
accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
model = network()
optimizer = GaLoreAdamW(param_groups(model, rank=8, update_proj_gap=20, scale=1.0), lr=3e-3, weight_decay=0.01)
loader = DataLoader(TensorDataset(x, y), batch_size=32, shuffle=True, generator=torch.Generator().manual_seed(0))
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)


def epoch() -> None:
    for pixels, labels in loader:
        with accelerator.accumulate(model):
            accelerator.backward(cross_entropy(model(pixels), labels))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()


for _ in range(4):
    epoch()
with TemporaryDirectory() as folder:
    accelerator.save_state(folder)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    epoch()
    accelerator.load_state(folder)  # the optimizer's bases and moments too
assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
epoch()
print(f"accuracy {accuracy(model, test_x, test_y):.3f}, {optimizer.optimizer.skipped_steps} steps skipped")
