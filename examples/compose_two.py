"""Two methods at once: LoRA-XS decides what is trained, Back Razor what is kept. Neither knows of the other."""

import lora_xs
import torch
from backrazor import Razor
from digits import accuracy, digits, network
from memtrain_common.measuring.memory import SavedActivations, measure
from torch.nn.functional import cross_entropy

x, y, test_x, test_y = digits()
model = network()
config = lora_xs.LoRAXSConfig(rank=16, targets=("1.0", "1.3", "1.6", "1.9"), head=("2",))
lora_xs.inject(model, config, cache=False)  # the train axis
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)  # the optim axis

for step in range(200):
    rows = torch.randint(0, len(x), (64,))
    with Razor(keep=0.1), SavedActivations(model) as saved:  # what is saved, and how much
        loss = cross_entropy(model(x[rows]), y[rows])
    activations = saved.by_layer()
    loss.backward()
    optimizer.step()
    if step == 199:
        ledger = measure(model, optimizer, activations)
    optimizer.zero_grad()

for category, n_bytes in ledger.totals.items():
    print(f"{category:>12} {n_bytes / 1024:8.1f} KiB")
print(f"accuracy {accuracy(model, test_x, test_y):.3f}")
