"""Files of images as their publishers lay them out, small and random."""

import numpy as np
from memtrain_common.data.images.medmnist_sets import SETS
from PIL import Image


def random_file(folder, flag, n, seed=0, absent=None):
    """An npz of a set's form with n samples a split, every class but ``absent`` there; returns the test labels."""
    known, draw = SETS[flag], np.random.default_rng(seed)
    arrays = {}
    for split in ("train", "val", "test"):
        if known.task.startswith("multi-label"):
            labels = draw.integers(0, 2, (n, known.classes))
            labels[:2] = [[0], [1]]
        else:
            labels = draw.permutation(np.arange(n) % known.classes)[:, None]
        if absent is not None and known.task.startswith("multi-label"):
            labels[:, absent] = 0
        elif absent is not None:
            labels[labels == absent] = 0
        shape = (n, 28, 28) if known.channels == 1 else (n, 28, 28, 3)
        arrays |= {f"{split}_images": draw.integers(0, 256, shape).astype(np.uint8)}
        arrays |= {f"{split}_labels": labels.astype(np.uint8)}
    np.savez(folder / f"{flag}.npz", **arrays)
    return arrays["test_labels"]


def image_folder(folder, n, classes=("cat", "dog"), splits=("train", "val", "test"), size=9, seed=0):
    """``folder/split/class/i.png``: n images a class and split, each class brighter than the one before."""
    draw = np.random.default_rng(seed)
    for split in splits:
        for c, name in enumerate(classes):
            place = folder / split / name
            place.mkdir(parents=True)
            for i in range(n):
                low = 200 * c // len(classes)
                pixels = draw.integers(low, low + 50, (size, size + 2, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(place / f"{i}.png")
    return folder


def google_file(path, model, **changed):
    """A ViT's tensors as Google's JAX code saves them; ``changed`` arrays instead of the model's."""
    state = {n: t.numpy() for n, t in model.state_dict().items()}
    heads = model.config.num_attention_heads
    out = {
        "cls": state["vit.embeddings.cls_token"],
        "Transformer/posembed_input/pos_embedding": state["vit.embeddings.position_embeddings"],
        "embedding/kernel": state["vit.embeddings.patch_embeddings.projection.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": state["vit.embeddings.patch_embeddings.projection.bias"],
        "Transformer/encoder_norm/scale": state["vit.layernorm.weight"],
        "Transformer/encoder_norm/bias": state["vit.layernorm.bias"],
        "head/kernel": state["classifier.weight"].T,
        "head/bias": state["classifier.bias"],
    }
    for i in range(model.config.num_hidden_layers):
        ours, theirs = f"vit.layers.{i}", f"Transformer/encoderblock_{i}"
        attention = f"{theirs}/MultiHeadDotProductAttention_1"
        for a, b in (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value")):
            weight = state[f"{ours}.attention.{a}.weight"].T
            out[f"{attention}/{b}/kernel"] = weight.reshape(weight.shape[0], heads, -1)
            out[f"{attention}/{b}/bias"] = state[f"{ours}.attention.{a}.bias"].reshape(heads, -1)
        weight = state[f"{ours}.attention.o_proj.weight"].T
        out[f"{attention}/out/kernel"] = weight.reshape(heads, -1, weight.shape[1])
        out[f"{attention}/out/bias"] = state[f"{ours}.attention.o_proj.bias"]
        for a, b in (("fc1", "Dense_0"), ("fc2", "Dense_1")):
            out[f"{theirs}/MlpBlock_3/{b}/kernel"] = state[f"{ours}.mlp.{a}.weight"].T
            out[f"{theirs}/MlpBlock_3/{b}/bias"] = state[f"{ours}.mlp.{a}.bias"]
        for a, b in (("layernorm_before", "LayerNorm_0"), ("layernorm_after", "LayerNorm_2")):
            out[f"{theirs}/{b}/scale"] = state[f"{ours}.{a}.weight"]
            out[f"{theirs}/{b}/bias"] = state[f"{ours}.{a}.bias"]
    np.savez(path, **{**out, **changed})
    return path
