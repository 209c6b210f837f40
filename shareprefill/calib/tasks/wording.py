"""The wording of every task, shared by the evaluation prompts and the training of sp-tiny.

A query ends where its answer begins; an answer is what a trained model writes next.
"""

from __future__ import annotations

KV_HEADER = (
    "Extract the value corresponding to the specified key in the JSON object below.\n\n"
    "JSON data:\n{"
)
KV_SEPARATOR = ", "
KV_FOOTER = "}\n"

NOISE = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
)

PASSKEY_HEADER = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
    "I will quiz you about the important information there.\n\n"
)
PASSKEY_QUERY = "\nWhat is the pass key?\n\nThe pass key is"

NUMBER_HEADER = (
    "There is an important info hidden inside a lot of irrelevant text. Find it. "
    "I will quiz you about the important information there.\n\n"
)
NUMBER_QUERY = "\nWhat is the sequence of digits?\n\nThe sequence of digits is"

NEEDLE_HEADER = (
    "Some special magic numbers are hidden within the following text. Memorize them; "
    "I will quiz you about them afterwards.\n"
)
_NEEDLE_WORDS = """
apple river stone cloud tiger maple ember quartz violet anchor falcon harbor meadow copper saddle
timber lantern orchid pepper rocket
"""
NEEDLE_WORDS = tuple(_NEEDLE_WORDS.split())


def kv_pair(key: str, value: str) -> str:
    return f'"{key}": "{value}"'


def kv_query(key: str) -> str:
    return f'\nKey: "{key}"\nThe value associated with the specified key is: "'


def kv_answer(value: str) -> str:
    return f'{value}"\n'


def passkey_fact(key: str) -> str:
    return f"The pass key is {key}. Remember it. {key} is the pass key.\n"


def number_fact(number: str) -> str:
    return f"The sequence of digits is {number}. Remember it. {number} is the sequence of digits.\n"


def digits_answer(digits: str) -> str:
    """Answer to the pass-key and digit-sequence queries, which end without a space."""
    return f" {digits}.\n"


def needle_fact(key: str, value: str) -> str:
    return f"\nOne of the special magic numbers for {key} is: {value}.\n"


def needle_query(key: str) -> str:
    return (
        f"\nWhat is the special magic number for {key} mentioned in the text? "
        f"The special magic number for {key} is: "
    )


def needles_query(keys: list[str]) -> str:
    """Asks for all numbers of one key, or of several."""
    asked = keys[0] if len(keys) == 1 else f"{', '.join(keys[:-1])}, and {keys[-1]}"
    return (
        f"\nWhat are all the special magic numbers for {asked} mentioned in the text? "
        f"The special magic numbers for {asked} are: "
    )


def variable_root(name: str, value: str) -> str:
    return f"\nVAR {name} = {value}\n"


def variable_copy(name: str, source: str) -> str:
    return f"\nVAR {name} = VAR {source}\n"


def variable_query(name: str) -> str:
    return f"\nThe value of VAR {name} is "


def value_answer(value: str) -> str:
    """Answer to the needle and variable queries, which end with a space."""
    return f"{value}.\n"


def math_header(target: str) -> str:
    return f"What is the {target} number in the following list?\n\n"


def math_query(target: str) -> str:
    return (
        "\n\nYou should answer with only one number, no other words. "
        f"The {target} number of the list is:"
    )


def code_header(function: str) -> str:
    return f"There is a function called {function} in the following Python code.\n\n"


def code_function(function: str, callee: str | None, offset: int) -> str:
    """One function of the chain; the last of a chain (`callee` None) adds to its argument."""
    inner = "x" if callee is None else f"{callee}(x)"
    sign = "+" if offset >= 0 else "-"
    return f"def {function}(x):\n    return {inner} {sign} {abs(offset)}\n\n"


def code_query(call: str) -> str:
    return f"Please compute the exact value of {call}. The value of {call} is"
