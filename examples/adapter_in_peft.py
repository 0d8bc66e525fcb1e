"""LoRA-XS inside PEFT: get_peft_model, train, save_pretrained; from_pretrained gives the same answers, bit for bit."""

import copy
from pathlib import Path
from tempfile import TemporaryDirectory

import lora_xs.peft  # adds the method to PEFT's tables
import peft
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


base = network()
train(base, (y < 5).nonzero()[:, 0], lr=1e-3)  # a base model that knows 0 to 4
layers = ["1.0", "1.3", "1.6", "1.9"]
config = lora_xs.peft.LoRAXSPeftConfig(r=16, target_modules=layers, modules_to_save=["2"])
model = peft.get_peft_model(copy.deepcopy(base), config)
train(model, torch.arange(len(x)), lr=1e-2)
with TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    size = Path(folder, "adapter_model.safetensors").stat().st_size
    loaded = peft.PeftModel.from_pretrained(base, folder)
    assert torch.equal(loaded(test_x), model(test_x))
print(f"accuracy {accuracy(loaded, test_x, test_y):.3f}; R and the head are {size:,} bytes")
