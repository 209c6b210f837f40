from __future__ import annotations

import random
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from shareprefill.models import load_tokenizer
from shareprefill.runtime.streaming import TextStream

WORDS = ["▁a", "▁the", "b", "é", "▁", "▁▁", "\n", "👍", "一", ".", "▁'", "n't"]


def sentencepiece() -> Any:
    """Spaces as ▁, bytes where the vocabulary has no character, as Llama 2's."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *WORDS]
    model = models.BPE({piece: n for n, piece in enumerate(pieces)}, [], byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return wrapped(tokenizer)


UNKNOWN: Any = {"unk_token": "[UNK]"}


def wordpiece() -> Any:
    pieces = ["[UNK]", "<s>", "</s>", "hello", "##lo", "world", "##s", ".", ",", "don", "'", "t"]
    tokenizer = Tokenizer(models.WordPiece({p: n for n, p in enumerate(pieces)}, **UNKNOWN))
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    return wrapped(tokenizer, clean_up_tokenization_spaces=True)


def wrapped(tokenizer: Tokenizer, **options: Any) -> Any:
    ends = {"bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **ends, **options)


@pytest.fixture(scope="module", params=["sp-tiny", "sentencepiece", "wordpiece"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    made = {"sentencepiece": sentencepiece, "wordpiece": wordpiece}
    return made[request.param]() if request.param in made else load_tokenizer("sp-tiny")


class Counting:
    """A tokenizer that counts the tokens it decodes."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.decoded = tokenizer, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def decode(self, tokens: list[int], **options: Any) -> str:
        self.decoded += len(tokens)
        return self.tokenizer.decode(tokens, **options)


def stream(tokenizer: Any, tokens: list[int]) -> tuple[list[str], str]:
    pieces: list[str] = []
    text = TextStream(tokenizer, pieces.append)
    for token in tokens:
        text.add(token)
    whole = text.finish()
    assert whole == tokenizer.decode(
        tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return pieces, whole


def test_pieces_are_the_text_whatever_the_tokens(tokenizer: Any) -> None:
    rng = random.Random(0)
    size = len(tokenizer)
    few = [rng.randrange(size) for _ in range(12)]
    for _ in range(400):
        tokens = [rng.choice(few) if rng.random() < 0.5 else rng.randrange(size) for _ in range(40)]
        pieces, whole = stream(tokenizer, tokens)
        assert "".join(pieces) == whole


@pytest.mark.parametrize(
    "text",
    [
        "na\u00efve \u2013 \U0001f468\u200d\U0001f469\u200d\U0001f467 \u65e5\u672c\u8a9e ",
        "  two  spaces\n\n\tand a tab",
        "don 't stop ! 'x'",
        "\xe9" * 30,
        "",
    ],
)
def test_text_comes_as_it_is(text: str) -> None:
    tokenizer = load_tokenizer("sp-tiny")
    tokens = tokenizer(text * 20, add_special_tokens=False).input_ids
    pieces, whole = stream(tokenizer, tokens)
    assert "".join(pieces) == whole == text * 20
    # Told as it grows: no character waits for more than the tokens that it is made of.
    assert len(pieces) >= len(tokens) / 8


def test_special_tokens_keep_the_space_behind_them() -> None:
    tokenizer = sentencepiece()
    ids = tokenizer.convert_tokens_to_ids(["▁a", "</s>", "▁the", "<s>", "<s>", "▁a"])
    pieces, whole = stream(tokenizer, ids)
    assert "".join(pieces) == whole == "a the a"


def test_a_wrong_byte_spoils_what_was_not_told() -> None:
    tokenizer = sentencepiece()
    thumb = [f"<0x{byte:02X}>" for byte in "👍".encode()]
    for names in ([*thumb, "▁a"], [*thumb, "<0xFF>", "▁a"], [*thumb, *thumb], thumb[:3]):
        pieces, whole = stream(tokenizer, tokenizer.convert_tokens_to_ids(names))
        assert "".join(pieces) == whole


@pytest.mark.parametrize("kind", ["words", "bytes", "broken"])
def test_the_cost_of_a_token_does_not_grow(kind: str) -> None:
    tokenizer = Counting(sentencepiece() if kind == "bytes" else load_tokenizer("sp-tiny"))
    if kind == "words":
        tokens = tokenizer.tokenizer("A line of words. ", add_special_tokens=False).input_ids * 2000
    elif kind == "bytes":
        tokens = tokenizer.convert_tokens_to_ids(["<0xF0>", "<0x9F>", "<0x91>", "<0x8D>"] * 2000)
    else:  # bytes that never make a character
        tokens = [tokenizer.convert_tokens_to_ids("ð")] * 8000
    text = TextStream(tokenizer, lambda _: None)
    for token in tokens:
        text.add(token)
    text.finish()
    assert tokenizer.decoded < 40 * len(tokens)
