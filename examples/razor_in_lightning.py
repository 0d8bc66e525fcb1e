"""Back Razor in Lightning: a callback, so that a LightningModule of one's own stays as it is."""

import lightning
import torch
from backrazor import Razor
from digits import accuracy, digits, network
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

x, y, test_x, test_y = digits()


class Digits(lightning.LightningModule):  # knows nothing of Back Razor
    def __init__(self) -> None:
        super().__init__()
        self.network = network()

    def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
        return cross_entropy(self.network(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class SaveLess(lightning.Callback):
    """While it is fitted, the module's training_step runs within a Razor; the backward pass comes after it."""

    def on_fit_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        module.training_step = Razor(keep=0.1)(module.training_step)  # an attribute before the class's method

    def on_fit_end(self, trainer: lightning.Trainer, module: lightning.LightningModule, *_: BaseException) -> None:
        vars(module).pop("training_step", None)

    on_exception = on_fit_end  # only one of them is called


model, data = Digits(), DataLoader(TensorDataset(x, y), batch_size=64, shuffle=True)
quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
lightning.Trainer(max_epochs=5, accelerator="cpu", callbacks=[SaveLess()], **quiet).fit(model, data)
print(f"accuracy {accuracy(model.network.eval(), test_x, test_y):.3f}")
