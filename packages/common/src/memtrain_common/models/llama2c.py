"""Small Llama models in llama2.c's first format (stories260K and its like), read as transformers models.

The file is seven int32 (width, hidden width, layers, heads, key-value heads, vocabulary, context), then float32
tensors one after another, each kind for all layers at once. The vocabulary is a file of its own.
"""

import heapq
import struct
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError


def load_llama2c(path: Path) -> Any:
    """A ``LlamaForCausalLM`` with the file's weights, in eval mode.

    Raises:
        UserError: if the file is shorter than its header says.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    raw = path.read_bytes()
    if len(raw) < 28:
        raise UserError(f"{path} is no llama2.c model: it has {len(raw)} bytes")
    dim, hidden, layers, heads, kv_heads, vocab, length = struct.unpack("7i", raw[:28])
    shared, vocab = vocab > 0, abs(vocab)  # a negative one says that the output has a matrix of its own
    if min(dim, hidden, layers, heads, kv_heads, vocab, length) < 1 or dim % heads:
        raise UserError(f"{path} is no llama2.c model: its header has the sizes {struct.unpack('7i', raw[:28])}")
    kv = dim // heads * kv_heads
    kinds = (
        ("input_layernorm", (dim,)),
        ("self_attn.q_proj", (dim, dim)),
        ("self_attn.k_proj", (kv, dim)),
        ("self_attn.v_proj", (kv, dim)),
        ("self_attn.o_proj", (dim, dim)),
        ("post_attention_layernorm", (dim,)),
        ("mlp.gate_proj", (hidden, dim)),
        ("mlp.down_proj", (dim, hidden)),
        ("mlp.up_proj", (hidden, dim)),
    )
    angles = length * (dim // heads)  # cosines and sines, which nobody reads
    needed = vocab * dim + layers * sum(torch.Size(s).numel() for _, s in kinds) + dim
    needed += 0 if shared else angles + vocab * dim
    if len(raw) < 28 + 4 * needed:
        raise UserError(f"{path} is cut short: its header asks for {28 + 4 * needed} bytes, and it has {len(raw)}")
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=dim,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=length,
        rms_norm_eps=1e-5,
        tie_word_embeddings=shared,
    )
    model = LlamaForCausalLM(config).eval()
    values = torch.frombuffer(bytearray(raw[28:]), dtype=torch.float32)
    counts = [vocab * dim, *(layers * torch.Size(s).numel() for _, s in kinds), dim]
    counts += [] if shared else [angles, vocab * dim]
    pieces = iter(values.split([*counts, len(values) - needed]))
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(next(pieces).view(vocab, dim))
        for name, shape in kinds:
            for layer, W in zip(model.model.layers, next(pieces).view(layers, *shape), strict=True):
                if name.endswith(("q_proj", "k_proj")):
                    W = _halves(W, heads if name.endswith("q_proj") else kv_heads)
                layer.get_submodule(name).weight.copy_(W)
        model.model.norm.weight.copy_(next(pieces))
        if not shared:
            next(pieces)
            model.lm_head.weight.copy_(next(pieces).view(vocab, dim))
    return model


def _halves(W: Tensor, heads: int) -> Tensor:
    """llama2.c rotates neighbouring rows of a head, transformers its two halves: the rows are reordered."""
    return W.view(heads, -1, 2, W.shape[1]).transpose(1, 2).reshape(W.shape)


def save_llama2c(model: Path, vocabulary: Path, folder: Path) -> None:
    """Write a transformers folder, tokenizer included: what any command's ``--model`` takes."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, normalizers, processors

    llama = load_llama2c(model)
    llama.config.bos_token_id, llama.config.eos_token_id = 1, 2
    llama.generation_config = transformers.GenerationConfig(bos_token_id=1, eos_token_id=2)
    llama.save_pretrained(folder)
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces = Llama2cTokenizer(vocabulary, llama.config.vocab_size).pieces
    vocab = {name: token for token, name in enumerate(names)}
    vocab |= {piece.decode().replace(" ", "▁"): token for piece, (token, _) in pieces.items() if token >= len(names)}
    # A pair that makes a piece merges; the better the piece's score, the earlier.
    merges = [
        (left, right)
        for piece, token in sorted(vocab.items(), key=lambda item: -_score(pieces, item[0]))
        if token >= len(names)
        for left, right in ((piece[:i], piece[i:]) for i in range(1, len(piece)))
        if left in vocab and right in vocab
    ]
    bpe = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bpe.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.save_pretrained(folder)


def _score(pieces: dict[bytes, tuple[int, float]], piece: str) -> float:
    return pieces.get(piece.replace("▁", " ").encode(), (0, -1e9))[1]


class Llama2cTokenizer:
    """llama2.c's vocabulary: an int32, then score (float32), length (int32) and bytes of each piece."""

    def __init__(self, path: Path, size: int = 512) -> None:
        raw = path.read_bytes()
        at = 4
        self.pieces: dict[bytes, tuple[int, float]] = {}
        for token in range(size):
            score, length = struct.unpack_from("fi", raw, at)
            self.pieces.setdefault(raw[at + 8 : at + 8 + length], (token, score))
            at += 8 + length

    def encode(self, line: str) -> list[int]:
        """Token 1, then pieces: the neighbours whose joint piece scores highest merge, as long as there is one."""
        pieces = self.pieces
        parts: list[bytes | None] = [c.encode() for c in " " + line]  # what has merged with its left neighbour is None
        after = list(range(1, len(parts) + 1))
        before = list(range(-1, len(parts) - 1))
        waiting: list[tuple[float, int, bytes, bytes]] = []  # of equal scores the leftmost is first

        def propose(i: int) -> None:
            if i >= 0 and after[i] < len(parts):
                left, right = parts[i], parts[after[i]]
                assert left is not None
                assert right is not None
                if left + right in pieces:
                    heapq.heappush(waiting, (-pieces[left + right][1], i, left, right))

        for i in range(len(parts)):
            propose(i)
        while waiting:
            _, i, left, right = heapq.heappop(waiting)
            j = after[i]
            if parts[i] != left or j >= len(parts) or parts[j] != right:
                continue  # one of them has merged meanwhile
            parts[i], parts[j], after[i] = left + right, None, after[j]
            if after[i] < len(parts):
                before[after[i]] = i
            propose(before[i])
            propose(i)
        # A character without a piece is written as its bytes, whose tokens follow the three special ones.
        return [
            1,
            *(t for p in parts if p is not None for t in ([pieces[p][0]] if p in pieces else [byte + 3 for byte in p])),
        ]
