"""LoRA-XS in transformers' Trainer: checkpoints are adapter folders, from which training resumes to the same bits."""

import copy
from pathlib import Path
from tempfile import TemporaryDirectory

import lora_xs
import torch
from digits import digits
from lora_xs.hf import LoRAXSCallback
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

x, y, test_x, test_y = digits()
rows = [{"pixel_values": row.view(1, 8, 8), "labels": label} for row, label in zip(x, y, strict=True)]
sizes = dict(image_size=8, patch_size=2, num_channels=1, hidden_size=48, intermediate_size=96, num_hidden_layers=2)
torch.manual_seed(0)
base = ViTForImageClassification(ViTConfig(**sizes, num_attention_heads=4, num_labels=10))


def train(folder: str, checkpoint: str | None = None) -> torch.nn.Module:
    model = lora_xs.inject(copy.deepcopy(base), lora_xs.LoRAXSConfig(r=16), cache=False)
    quiet = dict(report_to="none", disable_tqdm=True, logging_strategy="no", per_device_train_batch_size=64)
    args = TrainingArguments(folder, max_steps=100, save_steps=50, learning_rate=2e-2, **quiet)
    Trainer(model, args, train_dataset=rows, callbacks=[LoRAXSCallback(model)]).train(checkpoint)
    return model


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(test_x.view(-1, 1, 8, 8)).logits


with TemporaryDirectory() as folder:
    trained = logits(train(folder))
    assert torch.equal(logits(train(folder, f"{folder}/checkpoint-50")), trained)  # resumed
    fresh = lora_xs.load_adapter(copy.deepcopy(base), f"{folder}/checkpoint-100")
    assert torch.equal(logits(fresh), trained)
    size = sum(file.stat().st_size for file in Path(folder, "checkpoint-100").glob("*.safetensors"))
print(f"accuracy {(trained.argmax(-1) == test_y).float().mean():.3f}; a checkpoint's weights are {size:,} bytes")
