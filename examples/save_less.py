"""Back Razor: keep a tenth of each activation for the backward pass, by one line around the forward pass."""

import torch
from backrazor import Razor
from digits import accuracy, digits, network
from memtrain_common.measuring.memory import SavedActivations
from torch.nn.functional import cross_entropy

x, y, test_x, test_y = digits()
model = network()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

held = {}
for name, keep in (("everything", None), ("a tenth", 0.1)):
    with SavedActivations(model) as saved:  # counts the bytes that the backward pass needs
        if keep is None:
            loss = cross_entropy(model(x), y)
        else:
            with Razor(keep=keep):
                loss = cross_entropy(model(x), y)
    held[name] = sum(saved.by_layer().values())
    print(f"{name:>10}: {held[name] / 1024:7.0f} KiB saved for the backward pass")

for _ in range(200):
    rows = torch.randint(0, len(x), (64,))
    with Razor(keep=0.1):
        loss = cross_entropy(model(x[rows]), y[rows])
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
print(f"accuracy {accuracy(model, test_x, test_y):.3f}, {held['everything'] / held['a tenth']:.1f} times less saved")
