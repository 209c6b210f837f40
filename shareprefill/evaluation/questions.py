"""The questions of a task: token ids of prompts, with what their answers are scored by.

A task is named by

- a generated task: `retr_kv`, `variable_tracking`, `niah_single`, ... (`GENERATED`);
- `perplexity`: the shipped documentation text, or `perplexity:<file or folder>` for one's own;
- rows of a benchmark: `ruler:<file>`, `infinitebench:<file>`, `longbench:<file>`, where the file is
  a .jsonl or .json file, a folder of them, or `hub:<dataset>:<config>:<split>`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from shareprefill.calib.tasks import NIAH_TASKS, TASKS, generate
from shareprefill.data.sources import HUB, read_texts
from shareprefill.errors import ConfigError, DataError
from shareprefill.evaluation.config import EvalConfig
from shareprefill.evaluation.longcontext_suites import BENCHMARKS, benchmark_rows
from shareprefill.evaluation.results import PERPLEXITY
from shareprefill.evaluation.scores import SCORES, Reference
from shareprefill.files import kind_of, printable
from shareprefill.tokens import encode

GENERATED: tuple[str, ...] = (*TASKS, *NIAH_TASKS)
"""Generated tasks."""

# Characters of a .txt file that are tokenised at once, at least.
_TEXT_SIZE = 1 << 22


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
        raise ConfigError(
            f"task {task!r} is not known: it must be one of {', '.join(GENERATED)}, {PERPLEXITY}, "
            f"or {benchmarks} (a file, a folder, or hub:<dataset>:<config>:<split>)"
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


def _pieces(texts: Iterator[str], length: int, tokenizer: Any) -> Iterator[Tensor]:
    """Texts in pieces of exactly `length` tokens; what is left over at a text's end is left out."""
    for text in texts:
        ids = encode(tokenizer, text)
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
