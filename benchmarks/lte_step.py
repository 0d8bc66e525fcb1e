"""What do H heads cost a training step of a GPT block, beside the dense block, and what does batching them save?

    uv run python benchmarks/lte_step.py

Blocks with the same weights do one forward and backward pass on the same batch, alternately: the dense block with all
its linear layers trained, LTE's, one whose linear layers loop over the heads in Python, each with its own products, and
LTE's with sparse merges, whose heads compute with what they owe. Ratios are of neighbouring runs in one process.
"""

import argparse
import copy
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lte import LTEConfig, LTELinear, inject
from memtrain_common.measuring.bench import pairwise, write_results
from memtrain_common.models.gpt import Block, GPTConfig
from torch import Tensor, nn

RESULT = Path(__file__).parent / "results" / "lte_step.json"
BATCH = 16


class Loop(nn.Module):
    """LTE's layer with its formula written out for one head after the other."""

    def __init__(self, layer: LTELinear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        layer, out = self.layer, []
        A0, B0 = layer.offsets()
        assert A0 is not None
        assert B0 is not None
        for h, chunk in enumerate(x.chunk(layer.heads)):
            own = F.linear(F.linear(chunk, layer.lora_A[h]), layer.lora_B[h])
            merged = F.linear(F.linear(chunk, A0[h]), B0[h])
            out.append(F.linear(chunk, layer.weight, layer.bias) + layer.scale * (own - merged))
        return torch.cat(out)


def blocks(width: int, heads: int, rank: int) -> tuple[nn.Module, nn.Module, nn.Module, nn.Module]:
    """The dense block, LTE's, the looping one, and LTE's with sparse merges."""
    torch.manual_seed(0)
    dense = Block(GPTConfig(n_embd=width, n_head=width // 32, block_size=64))
    batched = inject(copy.deepcopy(dense), LTEConfig(heads=heads, rank=rank, trainable=()))
    owing = inject(copy.deepcopy(dense), LTEConfig(heads=heads, rank=rank, trainable=(), merge_density=0.03))
    for layer in [*batched.modules(), *owing.modules()]:
        if isinstance(layer, LTELinear):  # as after some training and a merge
            for t in (layer.lora_B.data, layer.merged_B, *([] if layer.sparse is None else [layer.feedback])):
                t.normal_(std=0.01)
    loop = copy.deepcopy(batched)
    for name, layer in list(loop.named_modules()):
        if isinstance(layer, LTELinear):
            parent, _, child = name.rpartition(".")
            setattr(loop.get_submodule(parent), child, Loop(layer))
    return dense, batched, loop, owing


def step(block: nn.Module, x: Tensor) -> Callable[[], None]:
    def once() -> None:
        block(x).square().mean().backward()
        block.zero_grad(set_to_none=True)

    return once


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=15)
    options = parser.parse_args()
    rows = []
    for width in (128, 384):
        for heads in (4, 16):
            dense, batched, loop, owing = blocks(width, heads, 32)
            x = torch.randn(BATCH, 64, width, requires_grad=True)
            torch.testing.assert_close(batched(x), loop(x), rtol=0, atol=1e-4)
            row: dict[str, Any] = {"width": width, "heads": heads, "rank": 32, "batch": BATCH, "tokens": BATCH * 64}
            for name, way, second in (
                ("over_dense", batched, dense), ("loop_over_lte", loop, batched), ("owing_over_lte", owing, batched),
            ):  # fmt: skip
                ratio = pairwise(step(way, x), step(second, x), pairs=options.pairs)
                row[name] = dataclasses.asdict(ratio)
                print(f"width {width}, H = {heads}: {name} {ratio}", flush=True)
            rows.append(row)
    argv = ["python", "benchmarks/lte_step.py", *sys.argv[1:]]
    write_results(
        RESULT, argv=argv, device=torch.device("cpu"), seeds=[0], threads=torch.get_num_threads(), ratios=rows
    )


if __name__ == "__main__":
    main()
