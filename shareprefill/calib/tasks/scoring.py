"""Whether a completion answers an example."""

from __future__ import annotations

from shareprefill.calib.tasks.example import Example
from shareprefill.errors import DataError

_QUOTES = "\"'`"


def score(example: Example, completion: str) -> bool:
    """Scores a completion by exact match.

    White space and quotes before the answer do not count; what follows it does not count
    either, unless it makes the answer longer (another digit, a letter or a hyphen). An example
    of several answers is right when the completion holds all of them.

    Args:
        example: Example with at least one answer.
        completion: Text that a model wrote behind the prompt.

    Raises:
        DataError: The example asks nothing.
    """
    if not example.answers:
        raise DataError(
            f"a {example.task} example has no answer to score; score one of a task that asks"
        )
    answer, *others = example.answers
    if others:
        return all(each in completion for each in example.answers)
    text = completion.strip().strip(_QUOTES).strip()
    if not text.startswith(answer):
        return False
    following = text[len(answer) : len(answer) + 1]
    return not (following.isalnum() or following == "-")
