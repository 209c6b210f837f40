from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Replace
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from shareprefill.calib.prompts import make_prompts
from shareprefill.calib.tasks import generate
from shareprefill.config import CalibrateConfig
from shareprefill.errors import DataError
from shareprefill.models import load_tokenizer
from shareprefill.tokens import encode, encode_some, without_end

WORDS = {"<unk>": 0, "<s>": 1, "</s>": 2, "<sep>": 3, "a": 4, "b": 5, "1": 6}


def made(template: str, *, drops: str | None = None) -> PreTrainedTokenizerFast:
    """A tokenizer of words whose post-processor puts a text in place of `$A`."""
    backend = Tokenizer(WordLevel(WORDS, unk_token="<unk>"))  # noqa: S106
    backend.pre_tokenizer = Whitespace()
    if drops is not None:
        backend.normalizer = Replace(drops, "")
    special = ["<s>", "</s>", "<sep>"]
    backend.add_special_tokens(special)
    backend.post_processor = TemplateProcessing(
        single=template, special_tokens=[(token, WORDS[token]) for token in special]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",  # noqa: S106
        eos_token="</s>",  # noqa: S106
        sep_token="<sep>",  # noqa: S106
        unk_token="<unk>",  # noqa: S106
    )


@pytest.mark.parametrize(
    ("template", "text", "expected"),
    [
        ("$A", "a b", [4, 5]),
        ("<s> $A", "a b", [1, 4, 5]),
        ("<s> $A </s>", "a b", [1, 4, 5]),
        ("$A </s>", "a b", [4, 5]),
        ("<s> $A <sep>", "a b", [1, 4, 5]),
        ("<s> $A <sep> </s>", "a b", [1, 4, 5]),
        # What the text spells is the user's.
        ("<s> $A </s>", "a </s>", [1, 4, 2]),
        ("<s> $A </s>", "a </s></s>", [1, 4, 2, 2]),
        ("$A", "a </s>", [4, 2]),
        ("<s> $A </s>", "<s>a", [1, 1, 4]),
        ("</s> $A </s>", "</s>", [2, 2]),
        ("<s> $A </s>", "<s>a</s><s>b", [1, 1, 4, 2, 1, 5]),
        ("<s> $A </s>", "x", [1, 0]),
        ("<s> $A </s>", "", []),
        ("<s> $A", "  ", []),
        ("$A", "", []),
    ],
)
def test_what_is_added_after_a_text_is_dropped(
    template: str, text: str, expected: list[int]
) -> None:
    assert encode(made(template), text).tolist() == expected


@pytest.mark.parametrize(
    ("template", "text", "ids", "expected"),
    [
        ("<s> $A </s>", "a b", [1, 4, 5, 2], [1, 4, 5]),
        ("<s> $A <sep> </s>", "a b", [1, 4, 5, 3, 2], [1, 4, 5]),
        ("<s> $A", "a b", [1, 4, 5], [1, 4, 5]),
        # Cut at the left, and without special tokens.
        ("<s> $A </s>", "a b", [5, 2], [5]),
        ("<s> $A </s>", "a b", [4, 5], [4, 5]),
        ("<s> $A </s>", "a </s>", [4, 2], [4, 2]),
        ("<s> $A </s>", "", [1, 2], [1, 2]),
        ("<s> $A", "", [1], [1]),
    ],
)
def test_what_others_encoded_is_ended_no_more(
    template: str, text: str, ids: list[int], expected: list[int]
) -> None:
    assert without_end(made(template), text, ids) == expected


def test_a_tokenizer_that_adds_eos_only_where_the_text_has_none() -> None:
    class Once:
        """As T5's slow tokenizer does it."""

        def __call__(self, text: str, add_special_tokens: bool = True) -> Any:
            ids = made("$A")(text).input_ids
            if add_special_tokens and ids[-1:] != [2]:
                ids = [*ids, 2]
            return type("Encoding", (), {"input_ids": ids})

    assert encode(Once(), "a b").tolist() == [4, 5]
    assert encode(Once(), "a </s>").tolist() == [4, 2]


@pytest.mark.parametrize("template", ["$A", "<s> $A", "<s> $A </s>"])
def test_a_text_of_which_no_token_is_left_is_refused(template: str) -> None:
    for text in ("", "  ", "\n\t"):
        with pytest.raises(DataError, match="the prompt is empty"):
            encode_some(made(template), text)
    with pytest.raises(DataError, match="leaves no token of the prompt"):
        encode_some(made(template, drops="b"), "bb b")
    # A tokenizer that leaves nothing of anything.
    with pytest.raises(DataError, match="leaves no token of the prompt"):
        encode_some(made("$A", drops="a"), "a")


def _ending(name: str = "sp-tiny") -> Any:
    tokenizer = load_tokenizer(name)
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A {eos}",
        special_tokens=[(bos, tokenizer.bos_token_id), (eos, tokenizer.eos_token_id)],
    )
    return tokenizer


def test_prompts_of_calibration_and_evaluation_do_not_end_either() -> None:
    tokenizer = _ending()
    assert tokenizer("a").input_ids[-1] == tokenizer.eos_token_id
    config = CalibrateConfig(model="sp-tiny", data=("mixture",), samples=3, length=512)
    for prompt in make_prompts(config, tokenizer):
        assert prompt.input_ids[-1] != tokenizer.eos_token_id
        assert prompt.input_ids[0] == tokenizer.bos_token_id
    text = generate("retr_kv", tokenizer, 512, 0).prompt
    assert len(encode(tokenizer, text)) <= 512
