"""Checks a session where caches and agent turns have burnt users of other projects.

    python benchmarks/check_trust.py --model sp-tiny --artifact artifacts/sp-tiny.st

`turns`: ten turns over one growing cache; the last logits of each against the same conversation in
one prefill, dense and sparse. `prefix`: two requests that continue copies of one cache, in turns,
against each request alone; they must be equal bit for bit. `quotes`: a passage of 200 tokens
inside a JSON object, at ten depths, is to be quoted; dense and sparse. `first`: the pair that
stands first, as a system prompt does, is asked for after a long object, ten times.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import uuid
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shareprefill.artifact import load_artifact
from shareprefill.config import RuntimeConfig
from shareprefill.models import load_model, load_tokenizer
from shareprefill.runtime.generation import cache_of, encode_prompt, generate, relative_error
from shareprefill.runtime.session import Session, share_prefill

TURNS, DEPTHS, PASSAGE = 10, 10, 200
_ASK = (
    "Extract the value corresponding to the specified key in the JSON object below.\n\nJSON data:\n"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--artifact", type=Path, required=True)
    parser.add_argument("--length", type=int, default=2048, help="tokens of a conversation")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    model = load_model(args.model, device=args.device, dtype="float32")
    tokenizer = load_tokenizer(args.model)
    session = share_prefill(model, load_artifact(args.artifact), RuntimeConfig(min_tokens=0))
    ids = encode_prompt(model, tokenizer, pairs(args.length, tokenizer)[0])[: args.length]
    checks = {
        "turns": lambda: turns(session, ids),
        "prefix": lambda: prefix(session, ids),
        "quotes": lambda: quotes(session, tokenizer, args.length),
        "first": lambda: first(session, tokenizer, args.length),
    }
    found = {}
    for name, check in checks.items():
        found[name] = check()
        print(name, json.dumps(found[name]), flush=True)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


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


def quotes(session: Session, tokenizer: Any, length: int) -> dict[str, int]:
    """Passages of 200 tokens quoted to the letter, of ten depths."""
    found = {"dense": 0, "sparse": 0, "same": 0, "of": DEPTHS}
    for number in range(DEPTHS):
        prompt, passage = pairs(length, tokenizer, depth=number / (DEPTHS - 1))
        dense, sparse = _both(session, tokenizer, prompt, PASSAGE + 8)
        found["dense"] += dense.strip().startswith(passage)
        found["sparse"] += sparse.strip().startswith(passage)
        found["same"] += dense == sparse
    return found


def first(session: Session, tokenizer: Any, length: int) -> dict[str, int]:
    """Answers about the first pair of a long object, dense and sparse."""
    found = {"dense": 0, "sparse": 0, "same": 0, "of": TURNS}
    for number in range(TURNS):
        prompt, value = pairs(length, tokenizer, seed=number, passage=1)
        dense, sparse = _both(session, tokenizer, prompt, 48)
        found["dense"] += dense.strip().startswith(value)
        found["sparse"] += sparse.strip().startswith(value)
        found["same"] += dense == sparse
    return found


def pairs(
    length: int, tokenizer: Any, *, depth: float = 0.0, seed: int = 0, passage: int = PASSAGE
) -> tuple[str, str]:
    """A prompt that asks for one value of a JSON object, and the value.

    Args:
        length: Tokens of the prompt, about.
        tokenizer: Counts them.
        depth: Where the pair stands, from 0 (first) to 1 (last).
        seed: Of the keys and values.
        passage: Tokens of the value, at least.
    """
    draw = random.Random(f"{seed} {depth}")

    def name() -> str:
        return str(uuid.UUID(int=draw.getrandbits(128), version=4))

    value = name()
    while len(tokenizer(value).input_ids) < passage:
        value += " " + name()
    key = name()
    lines = [f'"{key}": "{value}"']
    room = length - len(tokenizer(_ASK + lines[0]).input_ids) - 80
    others: list[str] = []
    a_pair = len(tokenizer(f'"{name()}": "{name()}", ').input_ids)
    while len(others) * a_pair < room:
        others.append(f'"{name()}": "{name()}"')
    others.insert(round(depth * len(others)), lines[0])
    tail = f'}}\n\nKey: "{key}"\nThe value associated with the specified key is: "'
    return _ASK + "{" + ", ".join(others) + tail, value


def _both(session: Session, tokenizer: Any, prompt: str, tokens: int) -> tuple[str, str]:
    model = session.model
    ids = encode_prompt(model, tokenizer, prompt)
    with session:
        sparse = generate(model, tokenizer, ids, max_new_tokens=tokens).text
        with session.dense():
            return generate(model, tokenizer, ids, max_new_tokens=tokens).text, sparse


def _grown(model: Any, pieces: tuple[Tensor, ...]) -> list[Tensor]:
    logits, cache = [], {}
    for piece in pieces:
        last, cache = _last(model, piece, cache)
        logits.append(last)
    return logits


def _last(model: Any, ids: Tensor, cache: dict[str, Any] | None = None) -> tuple[Tensor, Any]:
    ids = ids.to(model.get_input_embeddings().weight.device)
    step = model(input_ids=ids[None], **(cache or {}), use_cache=True, logits_to_keep=1)
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
