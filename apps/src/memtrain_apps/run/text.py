"""Text to pre-train on, by nanoGPT's GPT or a Llama of the same size."""

import math
from functools import partial
from typing import Any

import torch
from memtrain_common.data.text.corpus import Crops, load_corpus
from memtrain_common.models.gpt import GPT, GPTConfig, next_token_loss, padded_vocabulary
from memtrain_common.training.distributed import World
from memtrain_common.training.loop import mean_loss
from memtrain_common.training.task import Task
from torch import Tensor, nn

from .config import PretrainConfig
from .workload import Workload


def text_workload(config: PretrainConfig, world: World) -> Workload:
    """The corpus and a model with random weights, from torch's generator."""
    corpus = load_corpus(config.data_dir or None, config.tokenizer, config.tokenizer_dir or None)
    crops = Crops(
        corpus,
        batch_size=config.batch_size,
        block_size=config.block_size,
        seed=config.seed,
        rank=world.rank,
        world_size=world.size,
    )
    vocab = padded_vocabulary(corpus.tokenizer.vocab_size)
    loss = next_token_loss if config.model == "gpt" else llama_loss
    tokens = config.gradient_accumulation_steps * config.batch_size * config.block_size
    return Workload(
        task=Task(language_model(config, vocab), crops, loss),
        evaluate=partial(_evaluate, crops, config.eval_iters, loss),
        metric="loss",
        higher_is_better=False,
        steps=max(1, math.ceil(config.epochs * len(corpus.train) / tokens)) if config.epochs else config.max_iters,
        eval_interval=config.eval_interval,
        about={**corpus.describe()},
        splits=("val",),
        unit="tokens",
        units_per_step=tokens,
    )


def language_model(config: PretrainConfig, vocab: int) -> nn.Module:
    """GPT or Llama of the flags' size."""
    if config.model == "gpt":
        return GPT(
            GPTConfig(
                block_size=config.block_size, vocab_size=vocab, n_layer=config.n_layer, n_head=config.n_head,
                n_embd=config.n_embd, bias=config.bias,
            )
        )  # fmt: skip
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab,
            hidden_size=config.n_embd,
            intermediate_size=(8 * config.n_embd // 3 + 31) // 32 * 32,  # Llama's 8/3, rounded up
            num_hidden_layers=config.n_layer,
            num_attention_heads=config.n_head,
            max_position_embeddings=config.block_size,
            attention_bias=config.bias,
            mlp_bias=config.bias,
            use_cache=False,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


def llama_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean cross-entropy of the next token: (B, T) tokens and (B, T) targets."""
    logits = model(input_ids=batch[0]).logits  # (B, T, vocabulary)
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch[1].flatten())


@torch.no_grad()
def _evaluate(crops: Crops, batches: int, loss: Any, model: nn.Module, split: str) -> dict[str, float]:
    return mean_loss(model, loss, crops.validation(batches))
