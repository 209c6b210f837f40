"""The questions of a task: token ids of prompts, with what their answers are scored by.

A task is named by

- a generated task: `retr_kv`, `variable_tracking`, `niah_single`, ... (`GENERATED`);
- `perplexity`: the shipped documentation text, or `perplexity:<file or folder>` for one's own;
- rows of a benchmark: `ruler:<file>`, `infinitebench:<file>`, `longbench:<file>`, where the file is
  a .jsonl or .json file, a folder of them, or `hub:<dataset>:<config>:<split>`.

A row of RULER holds its whole prompt. The others hold a context and a question; the words that join
them are ours, short and without a chat template. For the benchmarks' own prompts, run their tasks
with lm-evaluation-harness under `evaluation.harness`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from shareprefill.calib.tasks import NIAH_TASKS, TASKS, generate
from shareprefill.data.sources import HUB, Row, read_objects, read_texts
from shareprefill.errors import ConfigError, DataError, did_you_mean
from shareprefill.evaluation.config import PERPLEXITY, EvalConfig
from shareprefill.evaluation.scores import SCORES, Reference, read_reference
from shareprefill.files import kind_of, printable
from shareprefill.tokens import Messages, encode, encode_either

GENERATED: tuple[str, ...] = (*TASKS, *NIAH_TASKS)
"""Generated tasks."""

# Characters of a .txt file that are tokenised at once, at least.
_TEXT_SIZE = 1 << 22
Render = Callable[[Row], str]


@dataclass(frozen=True, eq=False)
class Question:
    """One prompt.

    Attributes:
        input_ids: int64 `[N]`.
        metric: Name of a score in `scores.SCORES`, or `perplexity`.
        reference: What a completion is scored by; None for `perplexity`.
        new_tokens: Tokens to generate at most.
    """

    input_ids: Tensor
    metric: str
    reference: Reference | None = None
    new_tokens: int = 0

    @property
    def digest(self) -> str:
        """SHA-256 of all that an outcome depends on."""
        facts = f"{self.metric} {self.reference} {self.new_tokens}".encode()
        return hashlib.sha256(self.input_ids.numpy().tobytes() + facts).hexdigest()

    def score(self, completion: str) -> float:
        """The benchmark's score of a completion, 0 to 1."""
        assert self.reference is not None
        return SCORES[self.metric](completion, self.reference)


def make_questions(
    task: str, length: int, config: EvalConfig, tokenizer: Any, longest: int | None
) -> list[Question]:
    """The questions of a task at a length, always the same for the same data and seed.

    Args:
        task: As above.
        length: Tokens a prompt, at most.
        config: Number of questions, seed, and whether long rows are cut.
        tokenizer: The model's tokenizer.
        longest: Tokens that the model reads at most; None: any number.

    Raises:
        ConfigError: the task is unknown, or its prompts are too long for the length or the model.
        DataError: a file is missing, damaged, or has too few rows.
    """
    check_task(task)
    check_length(length, longest)
    kind, _, address = task.partition(":")
    if kind in GENERATED:
        return [_generated(kind, length, config.seed, n, tokenizer) for n in range(config.samples)]
    if kind == PERPLEXITY and not address:
        texts = _shipped_text(length, config, tokenizer)
    elif kind == PERPLEXITY:
        # A text is tokenised as a whole: no longer than what leaves many pieces.
        texts = read_texts(address, max(_TEXT_SIZE, 32 * length))
        texts = _pieces(texts, length, tokenizer)
    else:
        return _rows(kind, address, length, config, tokenizer)
    found = [Question(ids, PERPLEXITY) for ids in islice(texts, config.samples)]
    if len(found) < config.samples:
        raise DataError(
            f"{address} holds only {len(found)} pieces of {length} tokens, {config.samples} "
            "samples are wanted; lower --samples or --lengths, or name more text"
        )
    return found


def check_length(length: int, longest: int | None) -> None:
    """Checks that a model reads prompts of a length.

    Args:
        length: Tokens a prompt, at most.
        longest: Tokens that the model reads at most; None: any number.

    Raises:
        ConfigError: it does not.
    """
    if longest is not None and length > longest:
        raise ConfigError(
            f"length = {length} is beyond the model's maximum of {longest} tokens; lower --lengths"
        )


def check_task(task: str) -> None:
    """Checks that a task's name is known, and that its file is there.

    Raises:
        ConfigError: it is not.
    """
    kind, _, address = task.partition(":")
    if task in (*GENERATED, PERPLEXITY):
        return
    if not address or kind not in (PERPLEXITY, *BENCHMARKS):
        benchmarks = ", ".join(f"{name}:<file>" for name in (PERPLEXITY, *BENCHMARKS))
        known = (*GENERATED, PERPLEXITY, *BENCHMARKS)
        raise ConfigError(
            f"task {task!r} is not known: it must be one of {', '.join(GENERATED)}, {PERPLEXITY}, "
            f"or {benchmarks} (a file, a folder, or hub:<dataset>:<config>:<split>)"
            f"{did_you_mean(kind, known)}"
        )
    if not address.startswith(HUB) and kind_of(address) is None:
        raise ConfigError(
            f"task {printable(task)!r} cannot be read: there is no {printable(address)}"
        )


def _seed(seed: int, number: int) -> int:
    """A seed of its own for every prompt. Those of calibrations are not negative."""
    return -(seed * 1_000_003 + number + 1)


def _generated(task: str, length: int, seed: int, number: int, tokenizer: Any) -> Question:
    example = generate(task, tokenizer, length, _seed(seed, number))
    answer = len(tokenizer(example.answer, add_special_tokens=False).input_ids)
    # RULER's score finds answers anywhere in the completion, so it leaves room for words.
    metric, new_tokens = "exact_match", answer + 4
    if task in NIAH_TASKS:
        metric, new_tokens = "string_match_all", 2 * answer + 8
    return Question(
        encode(tokenizer, example.prompt), metric, Reference(example.answers), new_tokens
    )


def _shipped_text(length: int, config: EvalConfig, tokenizer: Any) -> Iterator[Tensor]:
    for number in range(config.samples):
        example = generate("text", tokenizer, length, _seed(config.seed, number))
        yield encode(tokenizer, example.prompt)


def _pieces(texts: Iterator[str | Messages], length: int, tokenizer: Any) -> Iterator[Tensor]:
    """Texts in pieces of exactly `length` tokens; what is left over at a text's end is left out."""
    for text in texts:
        ids = encode_either(tokenizer, text)
        # Models that expect a first token of their own expect it before every piece.
        first = ids[:1] if ids[:1].tolist() == [tokenizer.bos_token_id] else ids[:0]
        body, size = ids[len(first) :], length - len(first)
        for start in range(0, len(body) - size + 1, max(size, 1)):
            yield torch.cat([first, body[start : start + size]])


def _rows(
    benchmark: str, address: str, length: int, config: EvalConfig, tokenizer: Any
) -> list[Question]:
    questions = []
    for number, row in enumerate(islice(benchmark_rows(benchmark, address), config.samples)):
        ids = encode(tokenizer, row.prompt)
        if len(ids) > length and not config.cut_middle:
            raise ConfigError(
                f"row {number} of {address} has {len(ids)} tokens, beyond the length of {length}: "
                "raise --lengths, or cut it with --cut-middle"
            )
        if len(ids) > length:
            # The instruction stands at the beginning, the question at the end.
            head = length // 2
            ids = torch.cat([ids[:head], ids[len(ids) - (length - head) :]])
        questions.append(Question(ids, row.metric, row.reference, row.new_tokens))
    if len(questions) < config.samples:
        raise DataError(
            f"{address} has only {len(questions)} rows, {config.samples} samples are wanted; lower "
            "--samples"
        )
    return questions


@dataclass(frozen=True)
class BenchmarkRow:
    """A row that is ready to be asked.

    Attributes:
        prompt: Text that ends where the answer begins.
        metric: Name of its score.
        reference: What a completion is scored by.
        new_tokens: Tokens that the benchmark generates at most.
    """

    prompt: str
    metric: str
    reference: Reference
    new_tokens: int


@dataclass(frozen=True)
class _Subset:
    metric: str
    new_tokens: int
    render: Render


def benchmark_rows(benchmark: str, address: str) -> Iterator[BenchmarkRow]:
    """The rows of a benchmark's file or data set.

    A row's subset is its field `task` or `dataset`, or the name of the file, its folder, or the
    hub data set's configuration or split.

    Args:
        benchmark: One of `BENCHMARKS`.
        address: As for `data.sources.read_rows`.

    Raises:
        ConfigError: the address or the subset is not known.
        DataError: a row lacks a field.
    """
    read = BENCHMARKS[benchmark]
    for row in read_objects(address):
        yield read(row)


def _ruler(row: Row) -> BenchmarkRow:
    subset = _subset(row, _RULER)
    # RULER's own files and their copies on the hub name the answers differently.
    return _ready(row, subset, _label(row, "outputs", "answer"))


def _infinitebench(row: Row) -> BenchmarkRow:
    subset = _subset(row, _INFINITEBENCH)
    return _ready(row, subset, _label(row, "answer"), options=row.values.get("options"))


def _longbench(row: Row) -> BenchmarkRow:
    subset = _subset(row, _LONGBENCH)
    return _ready(row, subset, _label(row, "answers"), classes=row.values.get("all_classes"))


def _ready(row: Row, subset: _Subset, labels: Any, **lists: Any) -> BenchmarkRow:
    """The row with its labels read and checked, before anything is generated for it."""
    prompt = subset.render(row)
    try:
        reference = read_reference(subset.metric, labels, **lists)
    except DataError as error:
        raise DataError(f"{row.place} cannot be scored: {error}") from None
    except RecursionError:
        raise DataError(f"{row.place} cannot be scored: its label is nested too deeply") from None
    return BenchmarkRow(prompt, subset.metric, reference, subset.new_tokens)


BENCHMARKS: dict[str, Callable[[Row], BenchmarkRow]] = {
    "ruler": _ruler,
    "infinitebench": _infinitebench,
    "longbench": _longbench,
}
"""Readers of the benchmarks' rows."""


def _joined(*parts: str) -> Render:
    """A prompt of the context, the given parts and the question `{input}`, by empty lines."""

    def render(row: Row) -> str:
        question = str(row.values.get("input") or "")
        options = _strings(row, "options")
        listed = "\n".join(
            f"{letter}. {option}" for letter, option in zip("ABCD", options, strict=False)
        )
        filled = (part.replace("{input}", question).replace("{options}", listed) for part in parts)
        return "\n\n".join([_text(row, "context"), *filled])

    return render


def _direct(row: Row) -> str:
    """The context and what follows it, as they are: few-shot examples, or code to go on with."""
    return _text(row, "context") + str(row.values.get("input") or "")


def _whole(row: Row) -> str:
    """The prompt of a RULER row (copies on the hub split it), and the beginning of its answer."""
    if "question" in row.values:
        prompt = _text(row, "context") + _text(row, "question")
    else:
        prompt = _text(row, "input")
    return prompt + str(row.values.get("answer_prefix") or "")


_QUESTION = _joined("Question: {input}\nAnswer:")
_INPUT = _joined("{input}")
_SUMMARY = _joined("{input}\nSummary of the text above:")
_CHOICE = _joined("{input}", "{options}", "The letter of the right option is")

_RULER = {
    "niah": _Subset("string_match_all", 128, _whole),
    "vt": _Subset("string_match_all", 30, _whole),
    "cwe": _Subset("string_match_all", 120, _whole),
    "fwe": _Subset("string_match_all", 50, _whole),
    "qa": _Subset("string_match_part", 32, _whole),
}

_INFINITEBENCH = {
    "passkey": _Subset("first_integer", 6, _joined("{input}\nThe pass key is")),
    "number_string": _Subset("first_integer", 12, _joined("{input}\nThe sequence of digits is")),
    "kv_retrieval": _Subset("word_match", 50, _INPUT),
    "code_run": _Subset("last_integer", 5, _joined("{input}\nThe return value is")),
    "code_debug": _Subset("debug_choice", 5, _CHOICE),
    "math_find": _Subset("first_number", 3, _joined("{input}\nAnswer:")),
    "math_calc": _Subset("leading_integers", 30_000, _INPUT),
    "longbook_qa_eng": _Subset("token_f1", 40, _QUESTION),
    "longbook_qa_chn": _Subset("character_f1", 40, _QUESTION),
    "longbook_choice_eng": _Subset("choice", 40, _CHOICE),
    "longbook_sum_eng": _Subset("rouge_l", 1200, _SUMMARY),
    "longdialogue_qa_eng": _Subset("upper_word_match", 40, _QUESTION),
}

_COUNT = "How many different paragraphs are there? Answer with a number only:"
_RETRIEVAL = "Abstract: {input}\n\nThe abstract above is of which paragraph? Paragraph"
_LONGBENCH = {
    "narrativeqa": _Subset("token_f1", 128, _QUESTION),
    "qasper": _Subset("token_f1", 128, _QUESTION),
    "multifieldqa_en": _Subset("token_f1", 64, _QUESTION),
    "hotpotqa": _Subset("token_f1", 32, _QUESTION),
    "2wikimqa": _Subset("token_f1", 32, _QUESTION),
    "musique": _Subset("token_f1", 32, _QUESTION),
    "gov_report": _Subset("rouge_l", 512, _SUMMARY),
    "qmsum": _Subset("rouge_l", 512, _QUESTION),
    "multi_news": _Subset("rouge_l", 512, _SUMMARY),
    "trec": _Subset("classification", 64, _INPUT),
    "triviaqa": _Subset("first_line_f1", 32, _INPUT),
    "samsum": _Subset("first_line_rouge_l", 128, _INPUT),
    "passage_count": _Subset("count", 32, _joined(_COUNT)),
    "passage_retrieval_en": _Subset("paragraph", 32, _joined(_RETRIEVAL)),
    "lcc": _Subset("edit_similarity", 64, _direct),
    "repobench-p": _Subset("edit_similarity", 64, _direct),
}


def _subset(row: Row, known: dict[str, _Subset]) -> _Subset:
    """The row's subset: RULER numbers its subsets (niah_single_1), LongBench-E ends in _e."""
    given = [row.values.get(name) for name in ("task", "dataset")]
    names = [name for name in (*given, *row.names) if isinstance(name, str)]
    for name in names:
        for key in (name, name.removesuffix("_e"), name.split("_")[0]):
            if key in known:
                return known[key]
    raise ConfigError(
        f"{row.place} is of no known subset ({', '.join(names) or 'no name'}): name the file, or "
        f"the field task, after one of {', '.join(known)}"
    )


def _text(row: Row, name: str) -> str:
    value = row.values.get(name)
    if not isinstance(value, str) or not value:
        raise DataError(f"{row.place} has no text in its field {name!r}")
    return value


def _label(row: Row, *names: str) -> Any:
    """The first of the fields that holds anything."""
    for name in names:
        if row.values.get(name) not in (None, [], ()):
            return row.values[name]
    raise DataError(f"{row.place} has no answer in its field {' or '.join(map(repr, names))}")


def _strings(row: Row, name: str) -> tuple[str, ...]:
    value = row.values.get(name)
    return tuple(str(each) for each in value) if isinstance(value, list | tuple) else ()
