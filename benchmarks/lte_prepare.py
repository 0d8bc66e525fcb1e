"""How fast does lte-prepare tokenize, what do threads bring, and what does it cost beside tiktoken itself?

    uv run python benchmarks/lte_prepare.py TOKENIZER_DIR

TOKENIZER_DIR holds GPT-2's encoder.json and vocab.bpe. The text is four times the source of Python's standard library,
in documents of 6,000 characters, as JSON Lines. Two threads and one are timed alternately, and one thread against
tiktoken's own call for each document.
"""

import argparse
import contextlib
import io
import itertools
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import torch
from lte.tasks.prepare import prepare
from memtrain_common.data.text.corpus import load_corpus
from memtrain_common.data.text.tokenizers import GPT2Tokenizer
from memtrain_common.measuring.bench import pairwise, write_results

RESULT = Path(__file__).parent / "results" / "lte_prepare.json"
DOCUMENT = 6000  # characters: about an OpenWebText document


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer_dir")
    parser.add_argument("--pairs", type=int, default=4)
    options = parser.parse_args()
    text = load_corpus().train.tobytes().decode()
    documents = 4 * [text[i : i + DOCUMENT] for i in range(0, len(text), DOCUMENT)]
    megabytes = 4 * len(text.encode()) / 1e6
    counter = itertools.count()
    with tempfile.TemporaryDirectory() as place:
        source = Path(place) / "source.jsonl"
        source.write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))

        def run(workers: int) -> float:
            words = [str(source), "--tokenizer-dir", options.tokenizer_dir, "--workers", str(workers)]
            began = time.perf_counter()
            with contextlib.redirect_stdout(io.StringIO()):
                prepare([*words, "--out", str(Path(place) / f"out{next(counter)}")])
            return time.perf_counter() - began

        coder = GPT2Tokenizer(Path(options.tokenizer_dir))
        seconds = {workers: run(workers) for workers in (1, 2)}
        threads = pairwise(lambda: run(2), lambda: run(1), pairs=options.pairs, warmup=0)
        overhead = pairwise(
            lambda: run(1),
            lambda: [coder._encoding.encode_ordinary(d) for d in documents],
            pairs=options.pairs,
            warmup=0,
        )
    print(f"{megabytes:.1f} MB: one thread {megabytes / seconds[1]:.1f} MB/s, two {megabytes / seconds[2]:.1f} MB/s")
    print(f"two threads over one {threads}; one thread over tiktoken alone {overhead}")
    write_results(
        RESULT,
        argv=["python", "benchmarks/lte_prepare.py", "TOKENIZER_DIR", *sys.argv[2:]],
        device=torch.device("cpu"),
        seeds=[],
        cores=os.cpu_count(),
        megabytes=round(megabytes, 2),
        documents=len(documents),
        megabytes_per_second={str(w): round(megabytes / s, 2) for w, s in seconds.items()},
        two_threads_over_one=vars(threads),
        one_thread_over_tiktoken=vars(overhead),
    )


if __name__ == "__main__":
    main()
