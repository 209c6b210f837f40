"""Trains sp-tiny's tokenizer: byte-level BPE in which every digit is a token."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

VOCAB_SIZE = 4096
BOS, EOS, PAD = 0, 1, 2
SPECIAL_TOKENS = ("<|bos|>", "<|eos|>", "<|pad|>")
MAX_LENGTH = 131072


def train_tokenizer(texts: Iterator[str]) -> Tokenizer:
    """Trains the tokenizer; `<|bos|>`, `<|eos|>` and `<|pad|>` get the ids 0, 1 and 2."""
    tokenizer = Tokenizer(models.BPE())
    # Digits apart, so that numbers and hexadecimal keys of any value cost about as many tokens.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("[0-9]"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    bos = SPECIAL_TOKENS[BOS]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B:1", special_tokens=[(bos, BOS)]
    )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, out: Path) -> None:
    """Saves the files that `AutoTokenizer.from_pretrained(out)` loads."""
    bos, eos, pad = SPECIAL_TOKENS
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_LENGTH,
    )
    fast.save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpus", type=Path, required=True, help="folder of train.jsonl")
    parser.add_argument("--out", type=Path, default=Path("shareprefill/assets/sp-tiny"))
    args = parser.parse_args()
    with (args.corpus / "train.jsonl").open(encoding="utf-8") as lines:
        tokenizer = train_tokenizer(json.loads(line) for line in lines)
    save_tokenizer(tokenizer, args.out)
    print(f"{tokenizer.get_vocab_size()} tokens, saved to {args.out}")


if __name__ == "__main__":
    main()
