"""A model of a shape, with random weights, and a batch and a loss for it, as ``finetune`` has them."""

from typing import Any

import torch
from memtrain_common.errors import UserError
from memtrain_common.training.loop import DTYPES
from memtrain_common.training.task import Task
from torch import Tensor, nn

from .shapes import Shape, timm_size
from .uses import Step

TRANSFORMERS = ("vit", "deit", "swin", "swinv2", "beit", "eva02", "cait", "mixer")
"""First words of timm's models that are made for one size of pictures."""


def build_model(shape: Shape, weights: str = "float32") -> nn.Module:
    """The model, in training mode; fake within :func:`memtrain_common.measuring.prediction.fake_step`.

    Raises:
        UserError: if transformers refuses the configuration.
    """
    if shape.family in ("cnn", "timm") and weights != "float32":
        raise UserError(f"--weights {weights} is for transformers: of {shape.name} leave it float32")
    if shape.family == "timm":
        import timm

        words: dict[str, Any] = {"num_classes": int(shape.config["num_labels"])}
        if shape.image_size != timm_size(shape.name) and shape.name.split("_")[0] in TRANSFORMERS:
            words["img_size"] = shape.image_size
        return timm.create_model(shape.name, **words).train()
    if shape.family == "cnn":
        from memtrain_common.models.classifiers import build_classifier

        classes, size = int(shape.config.get("num_labels", 1000)), int(shape.config["image_size"])
        return build_classifier(shape.name, classes, image_size=size).model
    import transformers

    kind = {
        "pictures": transformers.AutoModelForImageClassification,
        "text": transformers.AutoModelForSequenceClassification,
        "language": transformers.AutoModelForCausalLM,
        "pairs": transformers.AutoModelForSeq2SeqLM,
    }[shape.task]
    try:
        config = transformers.AutoConfig.for_model(shape.family, **shape.config)
        config.architectures = config.architectures or []  # None breaks the choice of DeiT's class (transformers 5.23)
        if shape.task == "pairs" and getattr(config, "decoder_start_token_id", None) is None:  # T5's, if none is given
            config.decoder_start_token_id = getattr(config, "pad_token_id", None) or 0
        return kind.from_config(config, dtype=DTYPES[weights]).train()
    except (ValueError, TypeError, ZeroDivisionError, AssertionError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise UserError(f"{shape.name} is no {shape.family} that transformers builds: {reason}") from None
    except Exception as error:  # huggingface_hub checks a configuration's fields by exceptions of its own
        if "Validation" not in type(error).__name__:
            raise
        reason = " ".join(str(error).split()).rstrip(".")
        raise UserError(f"{shape.name} is no {shape.family} that transformers builds: {reason}") from None


def make_batch(step: Step, rows: int) -> Any:
    """A micro-batch; texts have one row shorter than the others, so that there is a mask, as there mostly is."""
    shape = step.shape
    if shape.task == "pictures":
        size, channels = shape.image_size, int(shape.config.get("num_channels", 3))
        pixels = torch.randn(rows, channels, size, size, dtype=DTYPES[step.weights])
        return pixels, torch.zeros(rows, dtype=torch.long)
    mask = torch.ones(rows, step.tokens, dtype=torch.long)
    mask[0, -1] = 0
    ids = torch.randint(3, int(shape.config.get("vocab_size", 1000)), (rows, step.tokens))
    labels = torch.zeros(rows, dtype=torch.long) if shape.task == "text" else ids.clone()
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    if shape.family in ("bert", "electra"):  # its tokenizer tells two texts apart
        batch["token_type_ids"] = torch.zeros_like(ids)
    return batch


def loss_of(step: Step, model: nn.Module, batch: Any) -> Tensor:
    """The mean loss of a micro-batch, under autocast where it is wanted."""
    from memtrain_common.data.text.glue_batches import model_loss
    from memtrain_common.data.text.instruct_batches import loss_of as instruct_loss
    from memtrain_common.models.classifiers import classification_loss

    losses: dict[str, Any] = {
        "pictures": classification_loss,
        "text": model_loss,
        "language": instruct_loss,
        "pairs": instruct_loss,
    }
    dtype = DTYPES[step.autocast]
    device = next(model.parameters()).device.type
    with torch.autocast(device, dtype, enabled=dtype != torch.float32):
        return losses[step.shape.task](model, batch)


def plain_task(step: Step, model: nn.Module, rows: int = 1) -> Task:
    """The step as a task that a composition can choose for."""
    return Task(model, lambda _: make_batch(step, rows), lambda m, batch: loss_of(step, m, batch))
