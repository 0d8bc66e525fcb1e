"""The composition behind ``lora-xs eval``: questions, generation in batches, answers, predictions as JSON Lines."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from memtrain_common.console import Console, format_table
from memtrain_common.data.text import official_math
from memtrain_common.data.text.answers import OPTIONS, boxed, gsm8k_expected, rules
from memtrain_common.data.text.instruct import Row, find_file, read_rows, rows_from_hub
from memtrain_common.data.text.prompts import RESPONSE, evaluation_prompt
from memtrain_common.errors import UserError
from memtrain_common.measuring.intervals import wilson
from memtrain_common.models.encoders import load_causal_lm, load_tokenizer
from memtrain_common.runs.run_folder import default_run_path
from memtrain_common.training.cpu_workarounds import avoid_broken_amx
from memtrain_common.training.distributed import launch
from memtrain_common.training.fit_config import DTYPES
from torch import Tensor, nn

from .eval_flags import EvalConfig
from .models import load_adapted, read_task
from .predictions import about_of, begin, finished, line_of

STOPS = ("### Instruction", "### Response")
OFFICIAL_STOPS = ("Instruction", "Response")  # for gsm8k and math; for commonsense it has none
# kind: (beams, longest answer), as the official evaluation has them
OFFICIAL = {"gsm8k": (1, 1024), "math": (1, 2048), "commonsense": (4, 32)}
HUB = {"gsm8k": ("openai/gsm8k", "main", "test")}


@dataclass(frozen=True)
class Question:
    """A prompt and the answer that is right."""

    prompt: str
    expected: str | None
    """None where the official metric finds none, and counts every answer wrong."""
    options: tuple[str, ...] = ()


def run_eval(config: EvalConfig) -> None:
    """Everything that ``lora-xs eval`` does once its flags are checked."""
    world, device = launch(config.device)
    if world.size > 1:
        raise UserError("lora-xs eval runs in one process: start it without torchrun")
    if device.type == "cpu" and config.base_dtype == "bfloat16":
        avoid_broken_amx()
    kind, asked = questions(config)
    out = Path(config.out) if config.out else default_run_path("lora-xs-eval").with_suffix(".jsonl")
    done, whole = finished(out, config.resume, [_kept(question, config) for question in asked])
    if config.adapter:
        model, name = load_adapted(config.adapter, config.model, config.base_dtype)
    else:
        model, name = load_causal_lm(config.model, DTYPES[config.base_dtype]).eval(), config.model
    if not hasattr(model, "generate") or not model.can_generate():  # type: ignore[operator]
        raise UserError(
            f"{name} is no language model: lora-xs eval generates answers, and lora-xs glue reports GLUE's metrics"
        )
    tokenizer = load_tokenizer(name)
    tokenizer.padding_side = "left"
    console = Console()
    beams, longest = OFFICIAL[kind]
    beams, longest = config.num_beams or beams, config.max_new_tokens or longest
    metric = "official metric" if config.official_metric else "correct rules"
    settings = {"num_beams": beams, "max_new_tokens": longest, "base_dtype": config.base_dtype}
    begin(out, done, whole, about_of(model, tokenizer, name, config.adapter, **settings))
    model.to(device)
    console.say(f"{out}: {len(asked):,} questions of {config.data}, {beams} beams, up to {longest} tokens, {metric}")
    stops = STOPS if not config.official_metric else () if kind == "commonsense" else OFFICIAL_STOPS
    room = getattr(model.config, "max_position_embeddings", None)
    lengths = [len(ids) for ids in tokenizer([q.prompt for q in asked])["input_ids"]]
    fits = [room is None or n < room for n in lengths]
    if not all(fits):
        console.say(
            f"{fits.count(False):,} prompts fill the model's {room} tokens: they have no answer, and count wrong"
        )
    right = [bool(row["correct"]) for row in done]
    bar = console.progress(len(asked), initial=len(done), label="eval")
    with out.open("a", encoding="utf-8") as file:
        for start in range(len(done), len(asked), config.batch_size):
            batch = range(start, min(start + config.batch_size, len(asked)))
            answered = [i for i in batch if fits[i]]
            prompts = [asked[i].prompt for i in answered]
            made = generate(model, tokenizer, prompts, beams=beams, longest=longest, stops=stops) if prompts else []
            texts = dict(zip(answered, made, strict=True))
            for i in batch:
                row = scored(i, asked[i], texts.get(i, ""), kind, config.official_metric)
                right.append(row["correct"])
                file.write(line_of(row))
            file.flush()
            bar.update(len(batch))
            bar.set_postfix_str(f"accuracy {100 * sum(right) / len(right):.1f}", refresh=False)
    bar.close()
    n = len(right)
    low, high = wilson(sum(right), n)
    accuracy = f"{100 * sum(right) / n:.2f} ({100 * low:.2f} to {100 * high:.2f})"
    console.say(format_table([("accuracy", accuracy), ("questions", f"{n:,}")]))
    console.say(f"predictions {out}")


def scored(index: int, question: Question, text: str, kind: str, official: bool) -> dict[str, Any]:
    """One line of the predictions."""
    take, compare = rules(kind, official, question.options)
    if official and kind == "commonsense":  # it reads what follows the last heading of all that the model has seen
        text = text.split(RESPONSE)[-1].strip()
    answer = take(text)
    return {
        "index": index,
        "prompt": question.prompt,
        "output": text,
        "answer": answer,
        "expected": question.expected,
        "correct": compare(answer, question.expected),
        "official_metric": official,
    }


def _kept(question: Question, config: EvalConfig) -> dict[str, Any]:
    """What a finished row must have to be this question's."""
    return {"prompt": question.prompt, "expected": question.expected, "official_metric": config.official_metric}


@torch.inference_mode()
def generate(
    model: nn.Module, tokenizer: Any, prompts: Sequence[str], *, beams: int, longest: int, stops: Sequence[str] = STOPS
) -> list[str]:
    """The likeliest continuation of each prompt, up to the first of the ``stops`` or an end token; all must fit it.

    A prompt has the room that its own tokens leave. A batch has that of its longest prompt: a prompt that needed more
    is asked again alone.
    """
    inputs = tokenizer(list(prompts), return_tensors="pt", padding=True).to(next(model.parameters()).device)
    inputs.pop("token_type_ids", None)
    room = getattr(model.config, "max_position_embeddings", None)
    width = inputs["input_ids"].shape[1]
    limit = longest if room is None else min(longest, room - width)
    ends = ends_of(model, tokenizer)
    ids = model.generate(  # type: ignore[operator]
        **inputs,
        num_beams=beams,
        do_sample=False,
        max_new_tokens=limit,
        eos_token_id=ends or None,
        pad_token_id=tokenizer.pad_token_id,
        stopping_criteria=transformers.StoppingCriteriaList([_Stops(tokenizer, width, stops)]),
    )
    answers = [_before_end(row, ends) for row in ids[:, width:].tolist()]
    texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
    if limit < longest and (beams > 1 or ids.shape[1] == width + limit):
        for i, length in enumerate(inputs["attention_mask"].sum(1).tolist()):
            ended = len(answers[i]) < ids.shape[1] - width or any(s in texts[i] for s in stops)
            if length < width and (beams > 1 or not ended):  # beams that went on might have found a likelier answer
                texts[i] = generate(model, tokenizer, [prompts[i]], beams=beams, longest=longest, stops=stops)[0]
    return [_cut(text, stops) for text in texts]


def ends_of(model: nn.Module, tokenizer: Any) -> list[int]:
    """The tokens at which an answer ends: the model's own, and the tokenizer's, by which instructions are trained."""
    found = model.generation_config.eos_token_id  # type: ignore[union-attr]
    own = found if isinstance(found, list) else [] if found is None else [found]
    more = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return list(dict.fromkeys([*own, *more]))


def _before_end(ids: list[int], ends: Sequence[int]) -> list[int]:
    return ids[: next((i for i, token in enumerate(ids) if token in ends), len(ids))]


class _Stops(transformers.StoppingCriteria):
    """Ends a row once one of some strings stands at its end.

    Not generate's own ``stop_strings``: those know byte-level and SentencePiece vocabularies only.
    """

    def __init__(self, tokenizer: Any, width: int, stops: Sequence[str]) -> None:
        self._tokenizer, self._width, self._stops = tokenizer, width, stops

    def __call__(self, ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        """ids (rows×tokens) → (rows,)"""
        tails = self._tokenizer.batch_decode(ids[:, max(self._width, ids.shape[1] - 24) :])
        return torch.tensor([any(stop in tail for stop in self._stops) for tail in tails], device=ids.device)


def _cut(text: str, stops: Sequence[str]) -> str:
    ends = [text.find(stop) for stop in stops if stop in text]
    return text[: min(ends)] if ends else text


# -- questions -----------------------------------------------------------------------------------------------------


def questions(config: EvalConfig) -> tuple[str, list[Question]]:
    """The kind of the answers ("gsm8k", "math", "commonsense"), and the questions in the file's order."""
    kind, _, name = config.data.partition(":")
    limit = config.limit or None
    folder = Path(config.data_dir) if config.data_dir else None
    if kind == "commonsense":
        assert folder is not None
        rows = read_rows(find_file(folder, (f"{name}/test.json", "test.json")), limit)
    elif kind in ("gsm8k", "math"):
        rows = rows_from_hub(*HUB[kind], limit) if folder is None else read_rows(find_file(folder, _TESTS), limit)
    else:
        if not Path(config.data).is_file():
            raise UserError(f"there is no file {config.data}: --data takes gsm8k, math, commonsense:NAME or a file")
        rows = read_rows(Path(config.data), limit)
        kind = _kind_of(rows[0])
    trained_with = read_task(Path(config.adapter)).get("prompt") if config.adapter else None
    prompt = evaluation_prompt(config.prompt, kind, trained_with, config.official_metric)
    make: dict[str, Callable[[Row, Prompt], Question]] = {
        "gsm8k": _gsm8k,
        "math": partial(_math, official=config.official_metric),
        "commonsense": partial(_commonsense, name=name),
    }
    return kind, [make[kind](row, prompt) for row in rows]


_TESTS = ("test.jsonl", "test.json", "MATH_test.jsonl", "gsm8k_test.jsonl")


def _kind_of(row: Row) -> str:
    has = row.values.keys()
    if {"question", "answer"} <= has:
        return "gsm8k"
    if {"problem", "solution"} <= has or ({"instruction", "output"} <= has and boxed(str(row.values["output"]))):
        return "math"
    if {"instruction", "answer"} <= has:
        return "commonsense"
    raise UserError(
        f"{row.where} has the fields {', '.join(map(repr, has))}, and needs question and answer (GSM8K), problem and "
        "solution (MATH), or instruction and answer (commonsense)"
    )


Prompt = Callable[[Row, str], str]


def _gsm8k(row: Row, prompt: Prompt) -> Question:
    expected = gsm8k_expected(row.text("answer"))
    if expected is None:
        raise UserError(f"{row.where} has no '####' in its answer: what follows it is the number that is right")
    return Question(prompt(row, "question"), expected)


def _math(row: Row, prompt: Prompt, official: bool) -> Question:
    question, solution = ("problem", "solution") if "problem" in row.values else ("instruction", "output")
    expected = boxed(row.text(solution))
    if expected is None:
        raise UserError(f"{row.where} has no \\boxed{{…}} in its {solution}: it holds the answer that is right")
    return Question(prompt(row, question), official_math.expected_of(row.text(solution)) if official else expected)


def _commonsense(row: Row, prompt: Prompt, name: str) -> Question:
    expected = row.text("answer")
    options = OPTIONS.get(name) or next((o for o in OPTIONS.values() if expected in o), None)
    if options is None or expected not in options:
        raise UserError(f"{row.where} has the answer {expected!r}, which is no option of a commonsense set")
    return Question(prompt(row, "instruction"), expected, options)
