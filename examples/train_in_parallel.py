"""LTE: train a network from scratch through LoRA heads, each on its own share of the batch, merged every few steps."""

import lte
import torch
from digits import accuracy, digits, network
from torch.nn.functional import cross_entropy

x, y, test_x, test_y = digits()
model = network()
lte.inject(model, lte.LTEConfig(heads=4, rank=32, alpha=64, exclude=("2",)))
merger = lte.Merger(model, every=10)
groups = lte.param_groups(model, lr=1e-3, rest_lr=1e-3, weight_decay=0.0)
optimizer = torch.optim.AdamW(groups)

for _ in range(300):
    rows = torch.randint(0, len(x), (64,))  # head h sees rows 16·h to 16·h + 15
    loss = cross_entropy(model(x[rows]), y[rows])
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    merger.step()

model.eval()
trained = accuracy(model, test_x, test_y)
plain = network()  # the heads are gone: the same names and shapes as before
plain.load_state_dict(lte.merged_state_dict(model))
print(f"accuracy {trained:.3f} after {merger.merges} merges; as a plain network {accuracy(plain, test_x, test_y):.3f}")
