"""What does ``fit`` cost over a bare loop of forward, backward and step?

    uv run python benchmarks/loop_overhead.py [--blocks 30] [--out FILE]

Two copies of lte-train's default model are trained on the same batches in one process, one by ``fit`` and one by the
bare loop, in turn step by step: the bare step runs where ``fit`` asks for its next batch. Both cut the same batches,
clip, set the learning rate and merge; ``fit`` also logs, draws its progress bar and watches for signals (evaluation and
checkpoints do work of their own and are left out). Reported is the ratio of the two times over blocks of 10 steps, the
interval of logging, so that every block holds one logged step.
"""

import argparse
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from lte.cli import configure
from lte.injection import inject
from lte.merging import Merger
from lte.parameters import clip_grad_norm_per_head, param_groups
from lte.tasks.train_config import lte_config
from memtrain_common.console import Console
from memtrain_common.data.text.corpus import Crops, load_corpus
from memtrain_common.measuring.bench import ratio_of, write_results
from memtrain_common.models.gpt import GPT, GPTConfig, next_token_loss
from memtrain_common.runs.checkpoint import Checkpoints
from memtrain_common.runs.run_folder import RunFolder
from memtrain_common.training.loop import FitConfig, Task, fit
from memtrain_common.training.schedule import cosine_with_warmup
from torch import Tensor

RESULT = Path(__file__).parent / "results" / "loop_overhead.json"
BLOCK = 10
CONFIG = configure([])
FACTOR = partial(cosine_with_warmup, warmup_iters=50, decay_iters=1500, min_ratio=0.1)


class Training:
    """The default model with what trains it, and one step of the bare loop."""

    def __init__(self, crops: Crops) -> None:
        torch.manual_seed(CONFIG.seed)
        gpt = GPT(GPTConfig(CONFIG.block_size, 256, CONFIG.n_layer, CONFIG.n_head, CONFIG.n_embd))
        self.model = inject(gpt, lte_config(CONFIG))
        groups = param_groups(
            self.model, lr=CONFIG.learning_rate, rest_lr=CONFIG.rest_learning_rate, weight_decay=CONFIG.weight_decay
        )
        self.rates = [group["lr"] for group in groups]
        self.optimizer = torch.optim.AdamW(groups)
        self.merger = Merger(self.model, CONFIG.lte_merge_steps)
        self.crops = crops

    def bare_step(self, i: int) -> None:
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * FACTOR(i)
        loss = next_token_loss(self.model, self.crops(i))
        loss.backward()
        clip_grad_norm_per_head(self.model, CONFIG.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.merger.step()


class InTurn:
    """``fit``'s batches. At each request a step of ``fit`` has ended: note its time, then take and time a bare one."""

    def __init__(self, other: Training) -> None:
        self.other = other
        self.fit_times: list[float] = []
        self.bare_times: list[float] = []
        self._left = 0.0

    def __call__(self, i: int) -> tuple[Tensor, Tensor]:
        asked = time.perf_counter()
        if i:
            self.fit_times[-1] += asked - self._left
        batch = self.other.crops(i)
        cut = time.perf_counter()
        self.fit_times.append(cut - asked)  # cutting the batch belongs to fit's step; its rest follows when it is done
        self.other.bare_step(i)
        self._left = time.perf_counter()
        self.bare_times.append(self._left - cut)
        return batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=30)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    crops = Crops(load_corpus(), batch_size=CONFIG.batch_size, block_size=CONFIG.block_size, seed=CONFIG.seed)
    ours, in_turn = Training(crops), InTurn(Training(crops))
    steps = (options.blocks + 1) * BLOCK + 1  # a block to warm up, and a last step that is not whole
    with tempfile.TemporaryDirectory() as folder:
        run = RunFolder.create(Path(folder) / "run")
        run.checkpoints = Checkpoints(run.checkpoints.folder, writes=False)
        fit(
            Task(
                ours.model,
                in_turn,
                next_token_loss,
                ours.optimizer,
                lr_factor=FACTOR,
                after_step=ours.merger.step,
                clip=partial(clip_grad_norm_per_head, ours.model),
            ),
            FitConfig(
                max_iters=steps, grad_clip=CONFIG.grad_clip, eval_interval=10**9, log_interval=BLOCK, unit="tokens"
            ),
            run=run,
            console=Console(),
        )
    blocks = range(BLOCK, BLOCK * (options.blocks + 1), BLOCK)
    ratios = [sum(in_turn.fit_times[b : b + BLOCK]) / sum(in_turn.bare_times[b : b + BLOCK]) for b in blocks]
    ratio = ratio_of(ratios)
    bare = sum(in_turn.bare_times[BLOCK:]) / len(in_turn.bare_times[BLOCK:])
    print(f"fit over the bare loop: {ratio}; a bare step took {1000 * bare:.1f} ms")
    write_results(
        options.out,
        argv=["python", "benchmarks/loop_overhead.py", *sys.argv[1:]],
        device=torch.device("cpu"),
        seeds=[CONFIG.seed],
        threads=torch.get_num_threads(),
        steps_a_block=BLOCK,
        ratio=round(ratio.median, 4),
        quartiles=[round(ratio.low, 4), round(ratio.high, 4)],
        blocks=[round(r, 4) for r in ratios],
    )


if __name__ == "__main__":
    main()
