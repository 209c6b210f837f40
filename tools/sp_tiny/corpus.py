"""Collects the text that sp-tiny reads: Python's standard library and its documentation."""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path

# Third-party code, tables without prose, and copies of the documentation (pydoc_data would put
# held-out pages into the training text).
_SKIPPED_PACKAGES = {"site-packages", "encodings", "pydoc_data", "lib2to3"}
_SKIPPED_TEST_DATA = ("bad", "encoded_modules", "cjkencodings", "data", "tokenize_tests")
_MAX_SOURCE_BYTES = 400_000
_HELD_OUT_SHARE = 0.2


def library_sources(root: Path) -> Iterator[str]:
    """UTF-8 Python files of a standard library, in the order of their paths."""
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        skipped = parts[0] in _SKIPPED_PACKAGES or any(
            part.startswith(_SKIPPED_TEST_DATA) for part in parts[1:]
        )
        if skipped or not 200 <= path.stat().st_size <= _MAX_SOURCE_BYTES:
            continue
        try:
            yield path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            # Files that test source encodings are no text of ours.
            continue


def is_held_out(name: str) -> bool:
    """Whether a documentation file is kept from training, decided by its name alone."""
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:8], "big") < _HELD_OUT_SHARE * 2**64


def documentation(root: Path) -> tuple[list[str], list[str]]:
    """Documentation sources below `root`, split by file into training and held-out texts."""
    train: list[str] = []
    held_out: list[str] = []
    for path in sorted(root.rglob("*.rst.txt")):
        name = path.relative_to(root).as_posix()
        target = held_out if is_held_out(name) else train
        target.append(path.read_text(encoding="utf-8"))
    if not train or not held_out:
        raise SystemExit(f"no documentation sources (*.rst.txt) to split below {root}")
    return train, held_out


def write_corpus(docs: Path, out: Path, asset: Path) -> None:
    """Writes `train.jsonl` and `held_out.txt` into `out`, and the latter gzipped to `asset`."""
    train, held_out = documentation(docs)
    sources = list(library_sources(Path(sysconfig.get_paths()["stdlib"])))
    texts = train + sources
    random.Random(0).shuffle(texts)
    out.mkdir(parents=True, exist_ok=True)
    with (out / "train.jsonl").open("w", encoding="utf-8") as file:
        for text in texts:
            file.write(json.dumps(text) + "\n")
    excerpt = "\n\n".join(text.strip() for text in held_out) + "\n"
    (out / "held_out.txt").write_text(excerpt, encoding="utf-8")
    asset.parent.mkdir(parents=True, exist_ok=True)
    asset.write_bytes(gzip.compress(excerpt.encode(), compresslevel=9, mtime=0))
    print(
        f"training text: {len(train)} documentation files, {len(sources)} sources, "
        f"{sum(map(len, texts)) / 1e6:.1f} M characters; held out: {len(held_out)} documentation "
        f"files, {len(excerpt) / 1e6:.2f} M characters, {asset.stat().st_size / 1e6:.2f} MB gzipped"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--docs", type=Path, required=True, help="folder of *.rst.txt sources")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--asset", type=Path, default=Path("shareprefill/assets/text/python-docs.txt.gz")
    )
    args = parser.parse_args()
    write_corpus(args.docs, args.out, args.asset)


if __name__ == "__main__":
    main()
