"""RULER, InfiniteBench and LongBench: their rows as prompts, and which score each subset has.

A row of RULER holds its whole prompt. The others hold a context and a question; the words that join
them are ours, short and without a chat template. For the benchmarks' own prompts, run their tasks
with lm-evaluation-harness under `evaluation.harness`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from shareprefill.data.sources import Row, read_objects
from shareprefill.errors import ConfigError, DataError
from shareprefill.evaluation.scores import Reference, read_reference

Render = Callable[[Row], str]


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
