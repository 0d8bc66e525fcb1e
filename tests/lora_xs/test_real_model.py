"""A real pretrained language model of 1 MB: stories260K, read as a transformers Llama."""

import copy
import functools
import itertools
import os
import struct
from pathlib import Path

import pytest
import torch
from lora_xs import CAUSAL_LM_TARGETS, LoRAXSConfig, inject, load_adapter, save_adapter, trained

DATA = os.environ.get("MEMTRAIN_DATA")
pytestmark = pytest.mark.skipif(not DATA, reason="MEMTRAIN_DATA is not set: no real weights here")


@pytest.fixture(scope="module")
def stories():
    """llama2.c's first format: seven int32, then float32 tensors one after another."""
    transformers = pytest.importorskip("transformers")
    raw = (Path(DATA) / "weights/stories260K/stories260K.bin").read_bytes()
    dim, hidden, layers, heads, kv_heads, vocab, length = struct.unpack("7i", raw[:28])
    values = torch.frombuffer(bytearray(raw[28:]), dtype=torch.float32)
    config = transformers.LlamaConfig(
        vocab_size=vocab, hidden_size=dim, intermediate_size=hidden, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=length,
        rms_norm_eps=1e-5, tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    at = 0

    def take(*shape):
        nonlocal at
        size = torch.Size(shape).numel()
        at += size
        return values[at - size : at].view(shape)

    def interleave(W, n):
        """llama2.c rotates neighbours, transformers rotates halves: the rows of each head are reordered."""
        return W.view(n, -1, 2, W.shape[1]).transpose(1, 2).reshape(W.shape)

    kv = dim // heads * kv_heads
    body = model.model
    with torch.no_grad():
        body.embed_tokens.weight.copy_(take(vocab, dim))
        for names, shape in (
            ("input_layernorm", (dim,)),
            ("self_attn.q_proj", (dim, dim)),
            ("self_attn.k_proj", (kv, dim)),
            ("self_attn.v_proj", (kv, dim)),
            ("self_attn.o_proj", (dim, dim)),
            ("post_attention_layernorm", (dim,)),
            ("mlp.gate_proj", (hidden, dim)),
            ("mlp.down_proj", (dim, hidden)),
            ("mlp.up_proj", (hidden, dim)),
        ):
            for layer, W in zip(body.layers, take(layers, *shape), strict=True):
                if "q_proj" in names or "k_proj" in names:
                    W = interleave(W, heads if "q_proj" in names else kv_heads)
                layer.get_submodule(names).weight.copy_(W)
        body.norm.weight.copy_(take(dim))
    return model


def loss(model, ids):
    with torch.no_grad():
        return float(model(ids, labels=ids).loss)


@functools.cache
def tokenizer():
    """llama2.c's vocabulary: token and score of each piece."""
    raw = (Path(DATA) / "weights/stories260K/tok512.bin").read_bytes()
    at, pieces = 4, {}
    for token in range(512):
        score, size = struct.unpack_from("fi", raw, at)
        pieces.setdefault(raw[at + 8 : at + 8 + size], (token, score))
        at += 8 + size
    return pieces


def encode(line):
    """llama2.c's encoding: merge the neighbours whose joint piece scores highest, until none is known."""
    pieces = tokenizer()
    parts = [c.encode() for c in " " + line]
    while True:
        joint = [a + b for a, b in itertools.pairwise(parts)]
        known = [(pieces[piece][1], -i) for i, piece in enumerate(joint) if piece in pieces]
        if not known:
            break
        i = -max(known)[1]
        parts[i : i + 2] = [joint[i]]
    # A character without a piece is written as its bytes, whose tokens follow the three special ones.
    return [1, *(t for p in parts for t in ([pieces[p][0]] if p in pieces else [byte + 3 for byte in p]))]


def text():
    """The beginning of Tiny Shakespeare in the model's own tokens."""
    lines = (Path(DATA) / "text/tinyshakespeare.txt").read_text()[:60_000].splitlines()
    return torch.tensor([token for line in lines if line for token in encode(line)])


def test_the_weights_were_read_right(stories):
    """A story is far likelier than its words in another order; ln 512 = 6.2 would be chance."""
    story = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."
    assert loss(stories, torch.tensor([encode(story)])) < 1.5
    words = story.split()
    assert loss(stories, torch.tensor([encode(" ".join(words[::-1]))])) > 3


def test_lora_xs_lowers_the_loss_and_reloads(stories, tmp_path):
    ids = text()
    held_out = ids[-5_000:].view(-1, 100)
    train = ids[: (len(ids) - 6_000) // 800 * 800].view(-1, 8, 100)
    model = inject(copy.deepcopy(stories), LoRAXSConfig(8, targets=CAUSAL_LM_TARGETS))
    before = loss(model, held_out)
    optimizer = torch.optim.AdamW(trained(model)["R"], lr=4e-3)
    for batch in train:
        optimizer.zero_grad()
        model(batch, labels=batch).loss.backward()
        optimizer.step()
    after = loss(model, held_out)
    assert after < before - 0.3
    save_adapter(model, tmp_path)
    again = load_adapter(copy.deepcopy(stories), tmp_path)
    assert torch.equal(again(held_out[:4]).logits, model(held_out[:4]).logits)
