"""LoRA-XS on GLUE's real files, with a small encoder that is pretrained here: CoLA, SST-2 and RTE.

1. An encoder of BERT-tiny's shape (2 layers, width 128): word embeddings from the co-occurrences of two million
   tokens (the training sentences of the three tasks, and news), then masked language modelling on the same text. BERT
   saw three billion words, so expect what such an encoder can do and no more.
2. From it, with several seeds: LoRA-XS with SVD bases and with random ones (both by `lora-xs glue` itself), the head
   alone, and full fine-tuning. Every method trains pooler and classifier too.

Each method's learning rate is chosen from RATES by one run on SST-2's first training rows, scored on rows of the last
tenth of its training file, and then used for all tasks. The development set is only reported.

    MEMTRAIN_DATA=… uv run python benchmarks/lora_xs_glue.py
"""

import csv
import dataclasses
import itertools
import json
import os
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
import tyro
from lora_xs import describe_adapter
from lora_xs.svd import svd_bases
from lora_xs.tasks.glue import plain_task, prepare, run_glue
from lora_xs.tasks.glue_flags import GlueConfig
from lora_xs.tasks.models import load_classifier
from memtrain_common.console import Console, format_table
from memtrain_common.data.order import epoch_batch
from memtrain_common.data.text.glue import TASKS, load_glue
from memtrain_common.measuring.bench import write_results
from memtrain_common.measuring.intervals import mean_and_ci
from memtrain_common.training.distributed import World
from memtrain_common.training.loop import FitConfig, Task, fit
from memtrain_common.training.rng import seed_all
from memtrain_common.training.schedule import schedule
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn

OUT = Path(__file__).parent / "results" / "lora_xs_glue.json"
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
ROW, BATCH = 64, 32  # tokens, rows of pretraining
RANK = 16
# task: (passes over the training rows, rows used; 0 is all)
LENGTHS = {"cola": (2.0, 0), "sst2": (1.0, 20_000), "rte": (2.0, 0)}
TUNING_ROWS = 6_000
# method: learning rates of what it trains besides the head; the head's is always HEAD_RATE, unless it is all there is
RATES = {
    "LoRA-XS": (4e-3, 1.6e-2, 6.4e-2),
    "LoRA-XS, random bases": (4e-3, 1.6e-2, 6.4e-2),
    "head alone": (1e-3, 5e-3, 2e-2),
    "full": (3e-4, 1e-3, 3e-3),
}
HEAD_RATE = 5e-3
TUNING_SEED = 100


# -- the encoder ---------------------------------------------------------------------------------------------------


def small_tokenizer(vocabulary: Path, texts: Iterable[str], size: int) -> Any:
    """BERT's WordPiece with the most frequent pieces of ``texts``; a word that lost its piece is split further."""
    pieces = vocabulary.read_text().split("\n")

    def build(vocab: Iterable[str]) -> Tokenizer:
        tokenizer = Tokenizer(models.WordPiece({p: i for i, p in enumerate(vocab)}, unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        return tokenizer

    counts = Counter(t for e in build(pieces).encode_batch(list(texts)) for t in e.tokens)
    single = [p for p in pieces if len(p.removeprefix("##")) == 1 and p.isascii()]
    frequent = [p for p, _ in counts.most_common() if p not in (*SPECIAL, *single)]
    tokenizer = build([*SPECIAL, *single, *frequent][:size])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=128, **dict(zip(names, SPECIAL, strict=True))
    )


def packed(tokenizer: Any, texts: list[str]) -> Tensor:
    """Sentences one after another, each ending in [SEP], cut into rows (n×ROW) that begin with [CLS]."""
    sep, cls = tokenizer.sep_token_id, tokenizer.cls_token_id
    ids = [
        t
        for row in tokenizer(texts, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]
        for t in (*row, sep)
    ]
    body = torch.tensor(ids[: len(ids) // (ROW - 1) * (ROW - 1)]).view(-1, ROW - 1)
    return torch.cat([torch.full((len(body), 1), cls), body], dim=1)


def embeddings(rows: Tensor, vocabulary: int, width: int, window: int = 4) -> Tensor:
    """U_r S_r^½ of the words' positive pointwise mutual information (Levy and Goldberg 2014): (vocabulary×width)."""
    counts = torch.zeros(vocabulary, vocabulary)
    for distance in range(1, window + 1):
        left, right = rows[:, :-distance].flatten(), rows[:, distance:].flatten()
        words = (left >= len(SPECIAL)) & (right >= len(SPECIAL))
        pairs = left[words] * vocabulary + right[words]
        counts.view(-1).add_(torch.bincount(pairs, minlength=vocabulary**2) / distance)
    counts += counts.t().clone()
    often = counts.sum(1)
    context = often**0.75 / (often**0.75).sum()
    information = torch.log(counts / (often[:, None] * context).clamp_min(1e-30)).clamp_min(0)
    A, B = svd_bases(information, width)
    vectors = B * torch.linalg.vector_norm(A, dim=1).sqrt()
    return vectors / vectors.std() * 0.05


def masked(ids: Tensor, seed: int, tokenizer: Any) -> tuple[Tensor, Tensor]:
    """Input, and where the loss looks (15 % of the tokens: 80 % become [MASK], 10 % another token), as in BERT."""
    draw = torch.Generator().manual_seed(seed)
    chosen = (torch.rand(ids.shape, generator=draw) < 0.15) & (ids >= len(SPECIAL))
    fate = torch.rand(ids.shape, generator=draw)
    other = torch.randint(len(SPECIAL), len(tokenizer), ids.shape, generator=draw)
    x = torch.where(chosen & (fate < 0.8), tokenizer.mask_token_id, ids)
    return torch.where(chosen & (fate >= 0.9), other, x), chosen


def masked_loss(model: Any, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Mean cross entropy of the chosen tokens; the output layer sees no others."""
    x, chosen, ids = batch
    hidden = model.bert(x).last_hidden_state[chosen]  # chosen×width
    return nn.functional.cross_entropy(model.cls(hidden), ids[chosen])


def pretrain(folder: Path, data: Path, epochs: float, vocabulary: int, console: Console) -> dict[str, Any]:
    """Make the encoder in ``folder``; -> what it took, and its masked loss on rows held out."""
    texts = [s for task in LENGTHS for pair in load_glue(task, data / "glue")["train"].texts for s in pair]
    tokenizer = small_tokenizer(data / "tokenizers/bert-base-uncased/vocab.txt", texts, vocabulary)
    with (data / "cnn_dailymail/validation_subset_1000.csv").open(newline="") as file:
        news = [line for row in csv.DictReader(file) for line in row["article"].split("\n") if line.strip()]
    rows = torch.cat([packed(tokenizer, texts), packed(tokenizer, news)])
    held = torch.arange(len(rows)) % 50 == 0
    train, validation = rows[~held], rows[held]
    seed_all(0)
    config = transformers.BertConfig(
        vocab_size=len(tokenizer), hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=512,
        max_position_embeddings=128, pad_token_id=0, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = transformers.BertForMaskedLM(config)
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight.copy_(embeddings(train, len(tokenizer), config.hidden_size))
    steps = round(epochs * len(train) / BATCH)

    def batches(i: int) -> tuple[Tensor, Tensor, Tensor]:
        ids = train[torch.from_numpy(epoch_batch(0, i, batch=BATCH, size=len(train)))]
        return *masked(ids, i, tokenizer), ids

    def evaluate(m: nn.Module) -> dict[str, float]:
        parts = [(*masked(ids, i, tokenizer), ids) for i, ids in enumerate(validation.split(BATCH))]
        counts = [int(chosen.sum()) for _, chosen, _ in parts]
        losses = [float(masked_loss(m, part)) * n for part, n in zip(parts, counts, strict=True)]
        return {"loss": sum(losses) / sum(counts)}

    result = fit(
        Task(
            model,
            batches,
            masked_loss,
            torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01),
            evaluate=evaluate,
            lr_factor=schedule("linear", steps // 20, steps),
        ),
        FitConfig(steps, grad_clip=1.0, eval_interval=max(1, steps // 4)),
        console=console,
        label="pretraining",
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    about = {
        "shape": "BERT-tiny: 2 layers, width 128, 2 heads, 512 inside",
        "parameters": sum(p.numel() for p in model.parameters()),
        "vocabulary": len(tokenizer),
        "training_tokens": train.numel(),
        "steps": steps,
        "batch": [BATCH, ROW],
        "masked_loss_on_rows_held_out": result.evaluation["loss"],
        "seconds": round(result.seconds),
    }
    (folder / "pretraining.json").write_text(json.dumps(about))
    return about


# -- the methods ---------------------------------------------------------------------------------------------------


def scores_of(method: str, config: GlueConfig) -> tuple[dict[str, float], int]:
    """The task's metrics after training, and the numbers trained besides pooler and classifier."""
    if method.startswith("LoRA-XS"):
        scores = run_glue(dataclasses.replace(config, init="random" if "random" in method else "svd"), ["(benchmark)"])
        return scores, describe_adapter(Path(config.out) / "adapter").trained
    prepared = prepare(config)
    seed_all(config.seed)
    model, head = load_classifier(config.model, TASKS[config.task].num_labels)
    inside = tuple(f"{name}." for name in head)
    named = list(model.named_parameters())
    groups = [{"params": [p for n, p in named if n.startswith(inside)], "lr": config.head_learning_rate}]
    own = [p for n, p in named if not n.startswith(inside)]
    if method == "full":
        groups.append({"params": own, "lr": config.learning_rate})
    else:
        for p in own:
            p.requires_grad_(False)
    task, fit_config = plain_task(config, prepared, model.train(), World())
    optimizer = torch.optim.AdamW(groups, weight_decay=config.weight_decay)
    result = fit(dataclasses.replace(task, optimizer=optimizer), fit_config)
    scores = {name: result.evaluation[name] for name in TASKS[config.task].metrics}
    return scores, sum(p.numel() for p in own) if method == "full" else 0


def with_rate(config: GlueConfig, method: str, rate: float) -> GlueConfig:
    """Where the head is all that is trained, the rate is the head's."""
    if method == "head alone":
        return dataclasses.replace(config, head_learning_rate=rate)
    return dataclasses.replace(config, learning_rate=rate, head_learning_rate=HEAD_RATE)


def held_out_sst2(data: Path, folder: Path) -> Path:
    """SST-2 whose training file is the first nine tenths of the real one, and whose dev file is the rest."""
    first, *lines = (data / "glue/SST-2/train.tsv").read_text().rstrip("\n").split("\n")
    cut = len(lines) * 9 // 10
    (folder / "SST-2").mkdir(parents=True)
    for name, part in (("train", lines[:cut]), ("dev", lines[cut : cut + 2_000])):
        (folder / "SST-2" / f"{name}.tsv").write_text("\n".join([first, *part]) + "\n")
    return folder


def majority(task: str, data: Path) -> float:
    """The metric of always answering the commonest class."""
    if TASKS[task].metrics == ("matthews",):
        return 0.0
    labels = Counter(load_glue(task, data / "glue")["dev"].labels.tolist())
    return labels.most_common(1)[0][1] / labels.total()


def table(rows: list[dict[str, Any]]) -> str:
    """A line a method, a column a task."""
    lines = [["", "rate", *LENGTHS]]
    for method in RATES:
        mine = {r["task"]: r for r in rows if r["method"] == method}
        if len(mine) == len(LENGTHS):
            cells = [f"{100 * mine[t]['mean']:.1f} ± {100 * mine[t]['interval']:.1f}" for t in LENGTHS]
            lines.append([method, f"{mine['sst2']['learning_rate']:g}", *cells])
    return format_table(lines)


def main(seeds: int = 3, epochs: float = 1.0, vocabulary: int = 8_192, encoder: str = "", out: Path = OUT) -> None:
    """
    Args:
        seeds: runs of each method on each task, with seeds 0, 1, …
        epochs: of pretraining.
        vocabulary: pieces of the tokenizer.
        encoder: folder of an encoder that an earlier call made, or where to make it; empty keeps none.
        out: where the results go.
    """
    data = Path(os.environ["MEMTRAIN_DATA"])
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    console = Console()
    with tempfile.TemporaryDirectory() as work:
        number = itertools.count()
        folder = Path(encoder or f"{work}/encoder")
        done = folder / "pretraining.json"
        about = json.loads(done.read_text()) if done.exists() else pretrain(folder, data, epochs, vocabulary, console)
        console.say(f"encoder: {about}")
        base = GlueConfig(model=str(folder), rank=RANK, alpha=RANK, eval_interval=10**9, tracker="none", device="cpu")

        def run(method: str, rate: float, **changes: Any) -> tuple[dict[str, float], int]:
            config = with_rate(base, method, rate)
            return scores_of(method, dataclasses.replace(config, out=f"{work}/{next(number)}", **changes))

        tuning = held_out_sst2(data, Path(work) / "tuning")
        rates: dict[str, dict[float, float]] = {}
        for method, grid in RATES.items():
            how = {"task": "sst2", "data_dir": str(tuning), "epochs": 1.0, "max_train_samples": TUNING_ROWS}
            rates[method] = {rate: run(method, rate, seed=TUNING_SEED, **how)[0]["accuracy"] for rate in grid}
            console.say(f"{method}: accuracy on training rows held out, by rate: {rates[method]}")
        rows: list[dict[str, Any]] = []
        for task, (passes, limit) in LENGTHS.items():
            for method in RATES:
                rate = max(rates[method], key=lambda r: rates[method][r])
                how = {"task": task, "data_dir": str(data / "glue"), "epochs": passes, "max_train_samples": limit}
                done_runs = [run(method, rate, seed=seed, **how) for seed in range(seeds)]
                metric = TASKS[task].metrics[0]
                values = [scores[metric] for scores, _ in done_runs]
                rows.append({
                    "task": task, "metric": metric, "method": method, "learning_rate": rate,
                    "trained_besides_head": done_runs[0][1], "mean": statistics.mean(values),
                    "interval": mean_and_ci(values)[1], "scores": values,
                })  # fmt: skip
                console.say(f"{task}, {method}: {metric} {100 * rows[-1]['mean']:.1f} of {values}")
    console.say(table(rows))
    write_results(
        out,
        argv=["python", "benchmarks/lora_xs_glue.py", *(w for w in sys.argv[1:] if "/" not in w and w != "--encoder")],
        device=torch.device("cpu"),
        seeds=range(seeds),
        encoder=about,
        rank=RANK,
        epochs_and_rows={task: list(how) for task, how in LENGTHS.items()},
        head_learning_rate=HEAD_RATE,
        accuracy_on_held_out_training_rows_by_rate={m: {str(r): s for r, s in by.items()} for m, by in rates.items()},
        always_the_commonest_class={task: majority(task, data) for task in LENGTHS},
        rows=rows,
    )
    console.say(f"wrote {out}")


if __name__ == "__main__":
    tyro.cli(main)
