"""Fixtures for every package's tests."""

import gc
import json
import os
import re
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # of commands that tests start: tiny models run faster on one thread
# Some virtual machines announce AMX and then do not run it: bfloat16 products would end the process. The processor
# reads this at its first product, so it stands before torch is imported.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_FP16")

import fresh
import matplotlib.figure  # noqa: F401  # loaded here once, for the commands that tests fork from this process
import pytest
import torch
import torch._dynamo  # every optimizer loads it at its first use
import tqdm

torch.set_num_threads(1)
# Python's collector looks at every object of every library when those that live long have become a quarter more, and
# every file of tests adds some.
gc.set_threshold(700, 10, 10_000)
# Autograd's threads start at the first backward pass, one for each device. A fake tensor registers eight CUDA devices
# where there is none; with their threads a process cannot be forked any more. So the first pass is here, without them.
torch.ones((), requires_grad=True).backward()
fresh.start()
tqdm.tqdm.monitor_interval = 0  # its thread may hold a lock at the moment of a fork, which the child then waits for


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data files that MEMTRAIN_DATA names."""
    folder = os.environ.get("MEMTRAIN_DATA")
    if not folder:
        pytest.skip("MEMTRAIN_DATA is not set: it names the folder with real data files")
    return Path(folder)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """First what is about the repository as a whole: type checking is the longest of all, and must not come last."""
    items.sort(key=lambda item: item.path.parent != Path(__file__).parent)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def libraries_frozen():
    """For trainings by transformers' Trainer: accelerate ends each by Python's collector, which looks at what the test
    has made, then, and not at every object of every library."""
    gc.freeze()
    yield
    gc.unfreeze()


# -- a small encoder and a task for it ------------------------------------------------------------


@pytest.fixture(scope="session")
def words_tokenizer():
    """A tokenizer of whole words and single characters, as a function of the texts it must know."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    def make(texts, **special):
        pattern = Regex(r"\s?[A-Za-z]+|[\s\S]")
        pieces = sorted({m for text in texts for m in _pieces(text)})
        vocab = {piece: i for i, piece in enumerate([*special.values(), *pieces])}
        tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=special["unk_token"]))
        tokenizer.pre_tokenizer = pre_tokenizers.Split(pattern, "isolated")
        tokenizer.decoder = decoders.Fuse()
        return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)

    return make


def _pieces(text):
    return re.findall(r"\s?[A-Za-z]+|[\s\S]", text)


SENTENCES = [(f"the {noun} is {word} {adverb}", label)
             for noun in ("film", "play", "song", "book", "meal")
             for word, label in (("good", 1), ("bad", 0), ("fine", 1), ("dull", 0))
             for adverb in ("today", "again", "indeed", "here")]  # fmt: skip


@pytest.fixture(scope="session")
def encoder(tmp_path_factory, words_tokenizer):
    """A folder with a small BERT, saved without a classifier or a pooler."""
    import transformers

    folder = tmp_path_factory.mktemp("encoder")
    special = dict(unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]")
    tokenizer = words_tokenizer([s for s, _ in SENTENCES], **special)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(3)
    config = transformers.BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=64, initializer_range=0.3, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    transformers.BertForMaskedLM(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def glue_dir(tmp_path_factory):
    """SST-2 and STS-B in GLUE's layout, with sentences that can be told apart."""
    folder = tmp_path_factory.mktemp("glue")
    for split, rows in (("train", SENTENCES), ("dev", SENTENCES[::3])):
        (folder / "SST-2").mkdir(exist_ok=True)
        lines = ["sentence\tlabel", *(f"{s}\t{label}" for s, label in rows)]
        (folder / "SST-2" / f"{split}.tsv").write_text("\n".join(lines) + "\n")
        (folder / "STS-B").mkdir(exist_ok=True)
        lines = ["index\tsentence1\tsentence2\tscore", *(f"{i}\t{s}\t{s}\t{5 * y}" for i, (s, y) in enumerate(rows))]
        (folder / "STS-B" / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    return str(folder)


QUESTIONS = [(f"{a} plus {b}?", a + b) for a in range(4) for b in range(4)]


@pytest.fixture(scope="session")
def language_model(tmp_path_factory, words_tokenizer):
    """A folder with a small Llama that knows the words of the prompt and of sums."""
    import transformers
    from memtrain_common.data.text.instruct import PROMPT

    folder = tmp_path_factory.mktemp("llama")
    texts = [
        PROMPT,
        "0123456789",
        "plus? The answer is: true false the correct answer is ####",
        " Let's think step by step.",
    ]
    tokenizer = words_tokenizer(texts, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(4)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, initializer_range=0.25, max_position_embeddings=128,
        tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def sums(tmp_path_factory):
    """Sums in GSM8K's format."""
    file = tmp_path_factory.mktemp("sums") / "sums.jsonl"
    rows = [json.dumps({"question": q, "answer": f"{a}\n#### {a}"}) for q, a in QUESTIONS]
    file.write_text("\n".join(rows) + "\n")
    return str(file)
