"""Encodes the corpus into the token streams that training reads."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from tools.sp_tiny.tokenizer import EOS

_BATCH = 64


def encode_stream(tokenizer: Tokenizer, texts: Iterable[str]) -> np.ndarray:
    """Token ids `[N]` uint16 of all texts, an end-of-sequence token after each."""
    chunks: list[np.ndarray] = []
    batch: list[str] = []

    def flush() -> None:
        for encoding in tokenizer.encode_batch(batch, add_special_tokens=False):
            chunks.append(np.asarray([*encoding.ids, EOS], dtype=np.uint16))
        batch.clear()

    for text in texts:
        batch.append(text)
        if len(batch) == _BATCH:
            flush()
    flush()
    return np.concatenate(chunks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpus", type=Path, required=True, help="output folder of corpus.py")
    parser.add_argument("--tokenizer", type=Path, default=Path("shareprefill/assets/sp-tiny"))
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for file in args.tokenizer.glob("tokenizer*.json"):
        shutil.copy(file, args.out)
    tokenizer = Tokenizer.from_file(str(args.out / "tokenizer.json"))
    with (args.corpus / "train.jsonl").open(encoding="utf-8") as lines:
        train = encode_stream(tokenizer, (json.loads(line) for line in lines))
    val = encode_stream(tokenizer, [(args.corpus / "held_out.txt").read_text(encoding="utf-8")])
    train.tofile(args.out / "train.bin")
    val.tofile(args.out / "val.bin")
    print(f"train.bin: {len(train) / 1e6:.2f} M tokens; val.bin: {len(val) / 1e6:.2f} M tokens")


if __name__ == "__main__":
    main()
