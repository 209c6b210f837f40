"""Scores of completions, as the benchmarks define them, all between 0 and 1.

Written from the published definitions of RULER (Hsieh et al., 2024), InfiniteBench (Zhang et al.,
2024) and LongBench (Bai et al., 2023).
"""

from __future__ import annotations

import json
import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

from shareprefill.errors import DataError
from shareprefill.files import printable

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
# Punctuation of the whole Unicode blocks that Chinese text takes it from.
_WIDE_PUNCTUATION = re.compile(
    r"[\u2010-\u2027\u3001-\u3003\u3008-\u301f\uff00-\uff0f\uff1a-\uff20]"
)
_LETTERS = "ABCD"
# Scores of numbers, and those of choices: what labels they can be right for.
_WHOLE_NUMBERS = ("first_integer", "last_integer", "leading_integers", "count")
_NUMBERS = ("first_number",)
_CHOICES = ("choice", "debug_choice")


@dataclass(frozen=True)
class Reference:
    """What a completion is compared with.

    Attributes:
        answers: Right answers, at least one.
        classes: All classes of a classification.
        options: Texts of the choices A, B, C, D of a multiple-choice question.
    """

    answers: tuple[str, ...]
    classes: tuple[str, ...] = ()
    options: tuple[str, ...] = ()


Score = Callable[[str, Reference], float]


def read_reference(metric: str, labels: Any, classes: Any = None, options: Any = None) -> Reference:
    """What a row's labels say, checked against what its score needs.

    Args:
        metric: Name of the score.
        labels: Text, a number, a list of them (lists inside it count by their members), or, where
            the score is of numbers, such a list as JSON in a text: `[[-7]]` is -7.
        classes: All classes of a classification, a list; None: none.
        options: The choices of a multiple-choice question, a list; None: none.

    Raises:
        DataError: they are no such things, or no completion could score with them.

    >>> read_reference("last_integer", "[[-7]]").answers
    ('-7',)
    """
    answers = _texts_of(labels, "label", parse=metric in _WHOLE_NUMBERS + _NUMBERS)
    reference = Reference(
        tuple(_number(metric, answer) for answer in answers),
        tuple(_texts_of(classes, "class")) if classes is not None else (),
        tuple(_texts_of(options, "option")) if options is not None else (),
    )
    if not answers:
        raise DataError("its label is an empty list")
    if metric == "classification" and not {*answers} & {*reference.classes}:
        raise DataError(f"its label {printable(answers[0])!r} is none of its classes")
    if metric in _CHOICES and not _right_letters(reference):
        raise DataError(f"its label {printable(answers[0])!r} is none of its options")
    return reference


def _texts_of(value: Any, what: str, *, parse: bool = False) -> list[str]:
    """The texts and numbers of a value and of the lists in it, as texts."""
    if isinstance(value, list | tuple):
        return [text for each in value for text in _texts_of(each, what, parse=parse)]
    if isinstance(value, str) and value.strip():
        return _list_in(value, what) if parse and value.lstrip().startswith("[") else [value]
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return [str(value)]
    shown = printable(json.dumps(value, default=str), 40)
    raise DataError(f"its {what} {shown} is neither a text nor a finite number")


def _list_in(text: str, what: str) -> list[str]:
    try:
        return _texts_of(json.loads(text), what)
    except (ValueError, RecursionError):
        raise DataError(f"its {what} {printable(text, 40)!r} is no list of numbers") from None


def _number(metric: str, answer: str) -> str:
    """The answer, as the score reads it; of scores of numbers, checked to be one."""
    text = answer.strip()
    if metric in _WHOLE_NUMBERS:
        # 12.0 is 12; digits stay as they are, zeros at the beginning of a key among them.
        text = re.sub(r"(?<=[0-9])\.0+$", "", text)
        if re.fullmatch(r"[+-]?[0-9]{1,4000}", text, re.ASCII) is None:
            raise DataError(f"its label {printable(answer, 40)!r} is no whole number")
        return text.removeprefix("+")
    if metric in _NUMBERS:
        try:
            if math.isfinite(float(text)):
                return text
        except ValueError:
            pass
        raise DataError(f"its label {printable(answer, 40)!r} is no finite number")
    if metric == "paragraph" and re.search(r"[0-9]", answer) is None:
        raise DataError(f"its label {printable(answer, 40)!r} holds no number")
    return answer


def exact_match(completion: str, reference: Reference) -> float:
    """The completion begins with the answer; see `calib.tasks.score`, whose rule this is."""
    from shareprefill.calib.tasks import Example, score

    return float(score(Example("", "", "", reference.answers), completion))


def string_match_all(completion: str, reference: Reference) -> float:
    """Share of the answers that the completion holds, whatever the case (RULER)."""
    found = completion.lower()
    return sum(answer.lower() in found for answer in reference.answers) / len(reference.answers)


def string_match_part(completion: str, reference: Reference) -> float:
    """Whether the completion holds one of the answers, whatever the case (RULER's QA)."""
    found = completion.lower()
    return float(any(answer.lower() in found for answer in reference.answers))


def word_match(completion: str, reference: Reference) -> float:
    """Whether the answer is a word of the completion (InfiniteBench Retrieve.KV)."""
    return float(reference.answers[0] in _words(completion, "\n:\"'.,?!{}"))


def upper_word_match(completion: str, reference: Reference) -> float:
    """Whether the answer is a word of the completion in capitals (InfiniteBench En.Dia)."""
    words = _words(completion, "\n:\"'.,?!{}")
    return float(reference.answers[0] in [word.upper() for word in words])


def first_integer(completion: str, reference: Reference) -> float:
    """Whether the first run of digits is the answer (InfiniteBench PassKey and Number)."""
    numbers = _integers(completion, reference)
    return float(bool(numbers) and numbers[0] == reference.answers[0])


def first_number(completion: str, reference: Reference) -> float:
    """Whether the first number equals the answer (InfiniteBench Math.Find)."""
    answer = float(reference.answers[0])
    sign = "-?" if answer < 0 else ""
    number = re.search(rf"{sign}(?:[0-9]+\.[0-9]+|[0-9]+)", completion)
    return float(number is not None and float(number[0]) == answer)


def last_integer(completion: str, reference: Reference) -> float:
    """Whether the last word is the answer as an integer (InfiniteBench Code.Run)."""
    words = _words(completion, "\n.`'\":")
    if not words or re.fullmatch(r"[+-]?[0-9]{1,4000}", words[-1]) is None:
        return 0.0
    return float(int(words[-1]) == int(reference.answers[0]))


def leading_integers(completion: str, reference: Reference) -> float:
    """Share of the numbers that are right before the first wrong one (InfiniteBench Math.Calc)."""
    right = 0
    numbers = _integers(completion, reference)
    for found, answer in zip(numbers, reference.answers, strict=False):
        if len(found) > 4000 or int(found) != int(answer):
            break
        right += 1
    return right / len(reference.answers)


def choice(completion: str, reference: Reference) -> float:
    """Whether the chosen letter, or the text of its option, is right (InfiniteBench En.MC).

    The letter is the completion's first character, or what stands behind "answer is", or the first
    word that is a letter.
    """
    right = _right_letters(reference)
    text = completion.strip()
    if text[:1] and text[0] in _LETTERS:
        return float(text[0] in right)
    text = " ".join(_words(text, "\n\"'.,?!{}"))
    for prefix in ("answer is:", "answer:", "answer is", "option is"):
        if prefix in text:
            behind = text.split(prefix, 1)[1].strip()
            return float(behind.startswith((*right, *reference.answers)))
    letters = [word for word in text.split() if len(word) == 1 and word in _LETTERS]
    return float(bool(letters) and letters[0] in right)


def debug_choice(completion: str, reference: Reference) -> float:
    """Whether the letter, or the function's name, is right (InfiniteBench Code.Debug)."""
    right = _right_letters(reference)
    text = completion.strip()
    if text[:2] in [letter + mark for letter in right for mark in ".:"]:
        return 1.0
    for name in ("Option", "option"):
        text = text.replace(name, " ")
    text = " ".join(_words(text, "\n`'\"-*"))
    for prefix in ("answer is:", "is:", "answer:"):
        if prefix in text:
            behind = text.split(prefix, 1)[1].strip()
            return float(behind.startswith((*right, *reference.answers)))
    return 0.0


def token_f1(completion: str, reference: Reference) -> float:
    """F1 of the words, without case, punctuation and articles; of the best answer (LongBench)."""
    return max(_f1(_normal(completion), _normal(answer)) for answer in reference.answers)


def character_f1(completion: str, reference: Reference) -> float:
    """F1 of the characters, without punctuation; of the best answer (InfiniteBench Zh.QA)."""

    def characters(text: str) -> list[str]:
        return list(
            "".join(_WIDE_PUNCTUATION.sub("", text.lower().translate(_PUNCTUATION)).split())
        )

    return max(_f1(characters(completion), characters(answer)) for answer in reference.answers)


def rouge_l(completion: str, reference: Reference) -> float:
    """F1 of the longest common subsequence of words, of the best answer (ROUGE-L, Lin, 2004)."""
    found = completion.lower().split()
    best = 0.0
    for answer in reference.answers:
        words = answer.lower().split()
        common = _common_subsequence(found, words)
        best = max(best, 2 * common / (len(found) + len(words)) if common else 0.0)
    return best


def first_line_f1(completion: str, reference: Reference) -> float:
    """`token_f1` of the first line (LongBench's few-shot tasks)."""
    return token_f1(_first_line(completion), reference)


def first_line_rouge_l(completion: str, reference: Reference) -> float:
    """`rouge_l` of the first line (LongBench's few-shot tasks)."""
    return rouge_l(_first_line(completion), reference)


def classification(completion: str, reference: Reference) -> float:
    """One over the classes named in the first line, if the right one is among them (LongBench).

    Classes whose names are parts of the right one's do not count.
    """
    line = _first_line(completion)
    best = 0.0
    for answer in reference.answers:
        named = [name for name in reference.classes if name in line]
        named = [name for name in named if name == answer or name not in answer]
        best = max(best, 1 / len(named) if answer in named else 0.0)
    return best


def paragraph(completion: str, reference: Reference) -> float:
    """Share of the completion's numbers that are the paragraph's (LongBench passage retrieval)."""
    return max(_share_of_numbers(completion, _digits(answer)) for answer in reference.answers)


def count(completion: str, reference: Reference) -> float:
    """Share of the completion's numbers that are the answer (LongBench passage count)."""
    return max(_share_of_numbers(completion, answer) for answer in reference.answers)


def edit_similarity(completion: str, reference: Reference) -> float:
    """Similarity to the first line of code, in whole percents (LongBench's code completion)."""
    lines = completion.lstrip("\n").split("\n")
    marks = ("`", "#", "//")
    code = next((line for line in lines if not any(mark in line for mark in marks)), "")
    ratios = (SequenceMatcher(None, code, answer).ratio() for answer in reference.answers)
    return max(round(100 * ratio) / 100 for ratio in ratios)


SCORES: dict[str, Score] = {
    score.__name__: score
    for score in (
        *(exact_match, string_match_all, string_match_part, word_match, upper_word_match),
        *(first_integer, first_number, last_integer, leading_integers, choice, debug_choice),
        *(token_f1, character_f1, rouge_l, first_line_f1, first_line_rouge_l, classification),
        *(paragraph, count, edit_similarity),
    )
}
"""Scores by name."""


def _words(text: str, separators: str) -> list[str]:
    return text.translate(str.maketrans(dict.fromkeys(separators, " "))).split()


def _integers(completion: str, reference: Reference) -> list[str]:
    """The completion's runs of digits; signs count where an answer has one."""
    sign = "-?" if any(answer.startswith("-") for answer in reference.answers) else ""
    return re.findall(rf"{sign}[0-9]+", completion)


def _right_letters(reference: Reference) -> tuple[str, ...]:
    """Letters of the right options; answers that are letters themselves stand for their option."""
    letters = [
        letter
        for letter, option in zip(_LETTERS, reference.options, strict=False)
        if option in reference.answers
    ]
    letters += [answer for answer in reference.answers if len(answer) == 1 and answer in _LETTERS]
    return tuple(letters)


def _first_line(completion: str) -> str:
    return completion.lstrip("\n").split("\n")[0]


def _normal(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def _f1(found: Sequence[str], expected: Sequence[str]) -> float:
    common = sum((Counter(found) & Counter(expected)).values())
    return 2 * common / (len(found) + len(expected)) if common else 0.0


def _common_subsequence(first: list[str], second: list[str]) -> int:
    """Length of the longest common subsequence, in the memory of one row."""
    row = [0] * (len(second) + 1)
    for word in first:
        diagonal = 0
        for place, other in enumerate(second, start=1):
            above = row[place]
            row[place] = diagonal + 1 if word == other else max(above, row[place - 1])
            diagonal = above
    return row[-1]


def _digits(text: str) -> str:
    found = re.search(r"[0-9]+", text)
    return found[0] if found else text


def _share_of_numbers(completion: str, right: str) -> float:
    numbers = re.findall(r"-?[0-9]+" if right.startswith("-") else r"[0-9]+", completion)
    return numbers.count(right) / len(numbers) if numbers else 0.0
