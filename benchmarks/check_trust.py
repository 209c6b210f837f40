"""Checks a session where caches and agent turns have burnt users of other projects.

    python benchmarks/check_trust.py --model sp-tiny --artifact artifacts/sp-tiny.st

Each check gives a row: what dense attention scores by itself, and a session beside it. `turns`: ten
turns over one growing cache, against the same conversation at once. `prefix`: two requests that
continue copies of one cache, against each alone; they must be equal bit for bit. `switch`: what
`session.dense()` computes, against the model without a session; equal bit for bit, too. `quotes`: a
passage of 200 tokens, random words in a text, is to be quoted from its first words on, at ten
depths. `values`: the same of hexadecimal digits, a value in a JSON object. `first`: the pair that
stands first in a long JSON object is asked for. `tools`: a call must follow the schema of the tool
that stands first in a long prompt.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import subprocess
import uuid
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shareprefill.calib.tasks.haystack import held_out_text
from shareprefill.models import load_model, load_tokenizer
from shareprefill.runtime.generation import cache_of, encode_prompt, generate, relative_error
from shareprefill.runtime.session import Session, share_prefill

TURNS, DEPTHS, PASSAGE = 10, 10, 200
_OPENING = 12  # words of a passage that its question tells
_ASK = (
    "Extract the value corresponding to the specified key in the JSON object below.\n\nJSON data:\n"
)


@dataclass
class Score:
    """Answers of one kind: right ones of dense attention and of a session, and equal ones."""

    dense: int = 0
    sparse: int = 0
    same: int = 0
    of: int = 0

    def add(self, answers: list[Any], is_right: Any) -> None:
        """Counts the answer of dense attention and that of a session."""
        dense, sparse = answers
        self.dense += is_right(dense)
        self.sparse += is_right(sparse)
        self.same += dense == sparse
        self.of += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--artifact", type=Path, help="none: the policy that needs none")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a conversation")
    parser.add_argument("--checks", help="with commas; all by default")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    model = load_model(args.model, device=args.device, dtype="float32")
    tokenizer = load_tokenizer(args.model)
    session = share_prefill(model, args.artifact, min_tokens=0)
    ids = encode_prompt(model, tokenizer, pairs(args.length, tokenizer)[0])[: args.length]
    checks: dict[str, Any] = {
        "turns": lambda: turns(session, ids),
        "prefix": lambda: prefix(session, ids),
        "switch": lambda: switch(session, ids),
        "quotes": lambda: quotes(session, tokenizer, args.length, quotation),
        "values": lambda: quotes(session, tokenizer, args.length, long_value),
        "first": lambda: first(session, tokenizer, args.length),
        "tools": lambda: tools(session, tokenizer, args.length),
    }
    found: dict[str, Any] = {}
    for name in args.checks.split(",") if args.checks else checks:
        session.reset()
        found[name] = {"found": checks[name](), "density": session.report().density}
        print(name, json.dumps(found[name], default=vars), flush=True)
    if args.json:
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        found |= {"model": args.model, "length": args.length, "commit": commit}
        text = json.dumps(found, indent=1, default=vars)
        args.json.write_text(text + "\n", encoding="utf-8")


@torch.no_grad()
def turns(session: Session, ids: Tensor) -> dict[str, list[float]]:
    """Relative errors of each turn's last logits.

    Args:
        session: Not entered.
        ids: The conversation, int64 `[N]`.

    Returns:
        `dense`: the growing cache against the conversation at once, both dense. `grown`: the sparse
        growing cache against dense at once; `once`: sparse at once against dense at once.
    """
    model, pieces = session.model, ids.tensor_split(TURNS)
    found: dict[str, list[float]] = {"dense": [], "grown": [], "once": []}
    whole = [torch.cat(pieces[: turn + 1]) for turn in range(len(pieces))]
    own = [_last(model, part)[0] for part in whole]
    for logits, expected in zip(_grown(model, pieces), own, strict=True):
        found["dense"].append(relative_error(logits, expected))
    with session:
        for logits, expected in zip(_grown(model, pieces), own, strict=True):
            found["grown"].append(relative_error(logits, expected))
        for part, expected in zip(whole, own, strict=True):
            found["once"].append(relative_error(_last(model, part)[0], expected))
    return found


@torch.no_grad()
def prefix(session: Session, ids: Tensor) -> dict[str, bool]:
    """Whether two requests that share a prefix's cache are what each is alone.

    Args:
        session: Not entered.
        ids: int64 `[N]`; its first half is the prefix, its quarters are the requests.
    """
    model, half = session.model, len(ids) // 2
    requests = ids[half:].tensor_split(2)
    with session:
        alone = []
        for request in requests:
            _, cache = _last(model, ids[:half])
            alone.append(_answer(model, request, cache))
        _, shared = _last(model, ids[:half])
        caches = [copy.deepcopy(shared) for _ in requests]
        together = [_answer(model, r, c) for r, c in zip(requests, caches, strict=True)]
        again = _answer(model, requests[0], shared)
    return {
        "first": torch.equal(together[0], alone[0]),
        "second": torch.equal(together[1], alone[1]),
        "after both": torch.equal(again, alone[0]),
    }


@torch.no_grad()
def switch(session: Session, ids: Tensor) -> dict[str, bool]:
    """Whether a dense call is the model's own, and the next call sparse again.

    Args:
        session: Not entered.
        ids: int64 `[N]`.
    """
    model = session.model
    own = _last(model, ids)[0]
    with session:
        before = _last(model, ids)[0]
        with session.dense():
            dense = _last(model, ids)[0]
        after = _last(model, ids)[0]
    return {
        "dense is the model's own": torch.equal(dense, own),
        "sparse after it is sparse before": torch.equal(after, before),
        "sparse differs": not torch.equal(before, own),
    }


def quotes(session: Session, tokenizer: Any, length: int, make: Any) -> dict[str, Any]:
    """Passages of 200 tokens quoted to the letter, at ten depths.

    Args:
        session: Not entered.
        tokenizer: The model's.
        length: Tokens of a prompt.
        make: `quotation` or `long_value`.

    Returns:
        The score, and the tokens to the letter at each depth, dense and sparse.
    """
    score, tokens = Score(), []
    for number in range(DEPTHS):
        prompt, passage = make(length, tokenizer, depth=number / (DEPTHS - 1))
        expected, answers = forced(session, tokenizer, prompt, passage)
        score.add(answers, lambda answer, expected=expected: answer == expected)
        tokens.append([_alike(answer, expected) for answer in answers])
    return {**vars(score), "tokens": tokens, "length": PASSAGE}


def quotation(length: int, tokenizer: Any, *, depth: float = 0.0) -> tuple[str, str]:
    """A prompt that begins to quote a passage of a text, and what follows in the passage.

    The passage is of random words of the text, so that no model can know it from elsewhere.

    Args:
        length: Tokens of the prompt, about.
        tokenizer: Counts them.
        depth: Where the passage stands, from 0 (first) to 1 (last).
    """
    words = held_out_text().split()
    plain = sorted({word for word in words if word.isalpha()})
    draw = random.Random(f"passage {depth}")
    opening, passage = " ".join(draw.choices(plain, k=_OPENING)), ""
    while len(tokenizer(passage).input_ids) < PASSAGE:
        passage += " " + draw.choice(plain)
    question = f"\n\nThe paragraph that begins so, to the letter:\n\n{opening}"
    room = length - len(tokenizer(opening + passage + question).input_ids)
    start = draw.randrange(len(words) // 2)
    # About one token and a half a word; what is too much is cut.
    text = tokenizer(" ".join(words[start : start + room])).input_ids[1:room]
    cut = round(depth * len(text))
    before, after = (tokenizer.decode(part) for part in (text[:cut], text[cut:]))
    return f"{before}\n\n{opening}{passage}\n\n{after}{question}", passage


def long_value(length: int, tokenizer: Any, *, depth: float = 0.0) -> tuple[str, str]:
    """A prompt that asks for a value of 200 tokens in a JSON object, and the value."""
    return pairs(length, tokenizer, depth=depth, tokens=PASSAGE)


def _alike(answer: list[int], expected: list[int]) -> int:
    """Tokens before the first one that differs."""
    return [*(a == b for a, b in zip(answer, expected, strict=True)), False].index(False)


def first(session: Session, tokenizer: Any, length: int) -> Score:
    """Answers about the first pair of a long object."""
    score = Score()
    for number in range(TURNS):
        prompt, value = pairs(length, tokenizer, seed=number)
        expected, answers = forced(session, tokenizer, prompt, value)
        score.add(answers, lambda answer, expected=expected: answer == expected)
    return score


def tools(session: Session, tokenizer: Any, length: int) -> Score:
    """Calls that have the name and the arguments of the tool whose schema stands first."""
    score = Score()
    for number in range(TURNS):
        prompt, schema = tool_prompt(length, tokenizer, seed=number)
        answers = _both(session, tokenizer, prompt, 64)
        score.add(answers, lambda answer, schema=schema: follows(_CALL + answer, schema))
    return score


_CALL = '{"name": "'
_TOOLS = {
    "get_weather": ("city", "unit"),
    "send_message": ("recipient", "text"),
    "book_flight": ("origin", "destination", "date"),
    "search_files": ("folder", "pattern"),
    "create_event": ("title", "day", "hour"),
}
_REQUESTS = {
    "get_weather": "What is the weather in Paris, in celsius?",
    "send_message": "Tell Anna that the meeting is at noon.",
    "book_flight": "Book a flight from Rome to Oslo on Friday.",
    "search_files": "Find all files named report in the folder docs.",
    "create_event": "Put lunch with Bob into my calendar on Monday at 12.",
}


def tool_prompt(length: int, tokenizer: Any, *, seed: int = 0) -> tuple[str, dict[str, Any]]:
    """A prompt whose system part names a tool, a long text, and a request; and the tool's schema.

    Names end in a number, so that only the schema tells them.

    Args:
        length: Tokens of the prompt, about.
        tokenizer: Counts them; its chat template is used where it has one.
        seed: Of the tool.
    """
    draw = random.Random(f"tool {seed}")
    kind = sorted(_TOOLS)[seed % len(_TOOLS)]
    name = f"{kind}_{draw.randrange(100, 1000)}"
    names = [f"{argument}_{draw.randrange(100, 1000)}" for argument in _TOOLS[kind]]
    schema = {"name": name, "arguments": dict.fromkeys(names, "string")}
    system = (
        "You can call one tool. Answer with a call of it, a JSON object of this form and with "
        f"these names, and nothing else:\n{json.dumps(schema)}"
    )
    text = held_out_text()
    start = draw.randrange(len(text) // 2)
    room = length - len(tokenizer(system).input_ids) - 120
    notes = tokenizer.decode(tokenizer(text[start : start + 8 * room]).input_ids[1:room])
    user = f"Notes:\n{notes}\n\n{_REQUESTS[kind]}"
    if getattr(tokenizer, "chat_template", None):
        messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        asked = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return asked + _CALL, schema
    return f"{system}\n\n{user}\n\nCall: {_CALL}", schema


def follows(answer: str, schema: dict[str, Any]) -> bool:
    """Whether an answer begins with a call of the tool, with all its arguments and no other."""
    try:
        call, _ = json.JSONDecoder().raw_decode(answer)
        return call["name"] == schema["name"] and set(call["arguments"]) == set(schema["arguments"])
    except (ValueError, KeyError, TypeError):
        return False


def pairs(
    length: int, tokenizer: Any, *, depth: float = 0.0, seed: int = 0, tokens: int = 1
) -> tuple[str, str]:
    """A prompt that asks for one value of a JSON object, and the value.

    Args:
        length: Tokens of the prompt, about.
        tokenizer: Counts them.
        depth: Where the pair stands, from 0 (first) to 1 (last).
        seed: Of the keys and values.
        tokens: Of the value, at least.
    """
    draw = random.Random(f"{seed} {depth}")

    def name() -> str:
        return str(uuid.UUID(int=draw.getrandbits(128), version=4))

    key, value = name(), name()
    while len(tokenizer(value).input_ids) < tokens:
        value += "-" + name()
    asked = f'"{key}": "{value}"'
    room = length - len(tokenizer(_ASK + asked).input_ids) - 80
    a_pair = len(tokenizer(f'"{name()}": "{name()}", ').input_ids)
    lines = [f'"{name()}": "{name()}"' for _ in range(room // a_pair)]
    lines.insert(round(depth * len(lines)), asked)
    tail = f'}}\n\nKey: "{key}"\nThe value associated with the specified key is: "'
    return _ASK + "{" + ", ".join(lines) + tail, value


def _both(session: Session, tokenizer: Any, prompt: str, tokens: int) -> list[str]:
    """What is generated, dense and sparse."""
    model = session.model
    ids = encode_prompt(model, tokenizer, prompt)
    with session:
        sparse = generate(model, tokenizer, ids, max_new_tokens=tokens).text
        with session.dense():
            return [generate(model, tokenizer, ids, max_new_tokens=tokens).text, sparse]


@torch.no_grad()
def forced(
    session: Session, tokenizer: Any, prompt: str, answer: str
) -> tuple[list[int], list[list[int]]]:
    """An answer's tokens, and at each place the likeliest one after those before it.

    They are equal if, and only if, the answer is what is generated greedily.

    Returns:
        The tokens; those of dense attention, and of a sparse prefill of the prompt.
    """
    model = session.model
    ids = encode_prompt(model, tokenizer, prompt)
    expected = torch.tensor(tokenizer(answer, add_special_tokens=False).input_ids)
    found = []
    with session:
        for sparse in (False, True):
            with ExitStack() as stack:
                if not sparse:
                    stack.enter_context(session.dense())
                first, cache = _last(model, ids)
            # Decode steps are dense, and many at once are what one after the other is.
            with session.dense():
                rest = model(input_ids=_on(model, expected)[None, :-1], **cache).logits[0]
            found.append(torch.cat([first[None], rest]).argmax(-1).tolist())
    return expected.tolist(), found


def _on(model: Any, ids: Tensor) -> Tensor:
    return ids.to(model.get_input_embeddings().weight.device)


def _grown(model: Any, pieces: tuple[Tensor, ...]) -> list[Tensor]:
    logits, cache = [], {}
    for piece in pieces:
        last, cache = _last(model, piece, cache)
        logits.append(last)
    return logits


def _last(model: Any, ids: Tensor, cache: dict[str, Any] | None = None) -> tuple[Tensor, Any]:
    step = model(input_ids=_on(model, ids)[None], **(cache or {}), use_cache=True, logits_to_keep=1)
    return step.logits[0, -1], cache_of(step)


def _answer(model: Any, ids: Tensor, cache: dict[str, Any]) -> Tensor:
    """Logits of a request and of four tokens after it."""
    logits, tokens = [], ids
    for _ in range(5):
        last, cache = _last(model, tokens, cache)
        logits.append(last)
        tokens = last.argmax()[None]
    return torch.stack(logits)


if __name__ == "__main__":
    main()
