"""Mutates good artifacts and loads them: each loads as it was written, or is refused.

The long run: `python tools/fuzz_artifact.py --mutations 200000 --seed 0`. The test-suite runs the
same mutations on a small budget. Exit status 1 if any file broke a rule.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import resource
import sys
import tempfile
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from shareprefill.artifact import (
    Artifact,
    Fingerprint,
    ModelGeometry,
    Policy,
    Rows,
    Thresholds,
    artifact_bytes,
    load_artifact,
)
from shareprefill.errors import ArtifactError

SECONDS_PER_FILE = 1.0
# A file that takes longer is loaded so many times more, and its fastest time counts: on a machine
# with other work, a process may wait for a processor.
MORE_TRIES = 4
# What parsing may take for a small file; beyond it, twice the file.
FREE_BYTES = 3 << 20
KEY = "shareprefill"
HOSTILE: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 2**31, 2**63, 10**30, 0.5, 1.5, -0.5, 1e308, "", "x",
    "\x1b[2J", "\u202e", "\ud800", "a" * 600, "\U0001f600", [], {}, [[]], {"": 0}, float("nan"),
    float("inf"), "../../etc/passwd", "__proto__",
)  # fmt: skip


def sample_artifact(
    seed: int, layers: int = 3, heads: int = 4, code_size: int = 5, summary_size: int = 3
) -> Artifact:
    """A random artifact that keeps all rules, with heads of every policy."""
    generator = torch.Generator().manual_seed(seed)
    shape = (layers, heads)
    total = layers * heads

    def fraction() -> torch.Tensor:
        return torch.rand(shape, generator=generator).clamp(min=0.01)

    cluster = torch.randint(0, max(1, total // 4), (total,), generator=generator)
    policy = torch.randint(0, len(Policy), (total,), generator=generator)
    pivot = torch.full((total,), -1)
    pivots: dict[int, int] = {}
    for head in range(total):
        if policy[head] == Policy.SHARE and int(cluster[head]) in pivots:
            pivot[head] = pivots[int(cluster[head])]
        elif policy[head] in (Policy.SHARE, Policy.PIVOT):
            policy[head] = Policy.PIVOT
            pivot[head] = pivots[int(cluster[head])] = head
    fallback = torch.where(policy == Policy.SHARE, int(Policy.SAMPLED), policy)
    return Artifact(
        model=f"organisation/model-{seed}",
        fingerprint=Fingerprint(
            "llama",
            ModelGeometry(layers, heads, 1, 64),
            weights=sha256(str(seed).encode()).hexdigest(),
            sketch=bytes(torch.randint(256, (64 * layers,), generator=generator).tolist()).hex(),
            checkpoint="0c" * 32 if seed % 2 else "",
            attention={"rope_parameters": {"rope_theta": 1e4}} if seed % 2 else None,
        ),
        cluster=cluster.reshape(shape).int(),
        policy=policy.reshape(shape).to(torch.int8),
        pivot=pivot.reshape(shape).int(),
        fallback=fallback.reshape(shape).to(torch.int8),
        gamma=fraction(),
        fallback_gamma=fraction(),
        slack=2 * fraction() - 1,
        recall=fraction(),
        density=fraction(),
        instability=fraction() * 3,
        effect=fraction() * 9,
        code=torch.randn((*shape, code_size), generator=generator),
        block_size=64,
        thresholds=Thresholds(gamma=0.9, tau=0.2, delta=0.3),
        rows=Rows(pivot=32, sample=8, check=2),
        estimator={"2": [0.25, 0.5, 0.0, 0.0, 0.0, 0.0, 0.25], "8": [0.5, 0.5, *[0.0] * 5]},
        configuration={"cluster": {"k": None, "metric": "jaccard"}, "seed": seed, "data": ["é"]},
        summary={
            "density": 0.25,
            "candidates": [{"k": k, "cost": k / 7} for k in range(summary_size)],
        },
    )


@dataclass
class Parts:
    """A file taken apart: header and metadata as values, tensors as bytes."""

    header: dict[str, Any]
    metadata: dict[str, Any]
    tensors: bytearray

    @classmethod
    def of(cls, data: bytes) -> Parts:
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        metadata = json.loads(header.pop("__metadata__")[KEY])
        return cls(header, metadata, bytearray(data[8 + length :]))

    def seal(self) -> None:
        """Makes the digest right again, as one who forges a file would."""
        self.metadata.pop("sha256", None)
        try:
            text = json.dumps(self.metadata, sort_keys=True, separators=(",", ":"))
            digest = sha256(text.encode())
        except (TypeError, ValueError):
            return
        for name in sorted(self.header):
            place = (
                self.header[name].get("data_offsets") if isinstance(self.header[name], dict) else 0
            )
            if isinstance(place, list) and len(place) == 2 and all(type(p) is int for p in place):
                digest.update(self.tensors[max(0, place[0]) : max(0, place[1])])
        self.metadata["sha256"] = digest.hexdigest()

    def join(self) -> bytes:
        return join(json.dumps(self.header), json.dumps(self.metadata), bytes(self.tensors))


def join(entries: str, metadata: str, tensors: bytes) -> bytes:
    """A file from the text of its tensor entries and of its metadata."""
    block = json.dumps({"__metadata__": {KEY: metadata}})
    text = (block[:-1] + ("," + entries[1:] if entries != "{}" else "}")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + tensors


def _place(rng: random.Random, data: bytes) -> int:
    """A random offset: in the header as often as in the tensors, whatever their sizes."""
    start = 8 + int.from_bytes(data[:8], "little")
    return rng.randrange(start) if rng.random() < 0.5 else rng.randrange(start, len(data))


def truncate(rng: random.Random, data: bytes) -> bytes:
    return data[: _place(rng, data)]


def append(rng: random.Random, data: bytes) -> bytes:
    return data + rng.randbytes(rng.choice((1, 7, 8, 4096)))


def flip_bits(rng: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 16))):
        changed[_place(rng, data)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def overwrite(rng: random.Random, data: bytes) -> bytes:
    place = _place(rng, data)
    span = rng.randbytes(rng.choice((1, 4, 32)))
    return (data[:place] + span + data[place + len(span) :])[: len(data)]


def move_span(rng: random.Random, data: bytes) -> bytes:
    start, length, to = _place(rng, data), rng.choice((1, 4, 8, 64)), _place(rng, data)
    span = data[start : start + length]
    rest = data if rng.random() < 0.5 else data[:start] + data[start + length :]
    return rest[:to] + span + rest[to:]


def header_length(rng: random.Random, data: bytes) -> bytes:
    right = int.from_bytes(data[:8], "little")
    wrong = rng.choice((0, 1, right - 1, right + 1, right + 8, len(data), 2**31, 2**63, 2**64 - 1))
    return wrong.to_bytes(8, "little") + data[8:]


def _edit(rng: random.Random, value: Any) -> Any:
    """A copy of a JSON value with one random part replaced, removed or added."""
    if not isinstance(value, dict | list) or not value or rng.random() < 0.15:
        if isinstance(value, int) and rng.random() < 0.5:
            return value + rng.choice((-1, 1, 4, 8))
        return copy.deepcopy(rng.choice(HOSTILE))
    result = copy.copy(value)
    at: Any = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
    action = rng.random()
    if action < 0.15:
        del result[at]
    elif action < 0.25 and isinstance(result, dict):
        result[rng.choice(("extra", at + " ", "\x1b", "code"))] = result[at]
    elif action < 0.35 and isinstance(result, list):
        result.append(result[at])
    else:
        result[at] = _edit(rng, value[at])
    return result


def edit_entries(rng: random.Random, data: bytes) -> bytes:
    parts = Parts.of(data)
    parts.header = _edit(rng, parts.header)
    return parts.join()


def edit_metadata(rng: random.Random, data: bytes) -> bytes:
    parts = Parts.of(data)
    parts.metadata = _edit(rng, parts.metadata)
    return parts.join()


def forge_metadata(rng: random.Random, data: bytes) -> bytes:
    parts = Parts.of(data)
    parts.metadata = _edit(rng, parts.metadata)
    if isinstance(parts.metadata, dict):
        parts.seal()
    return parts.join()


def forge_tensor(rng: random.Random, data: bytes) -> bytes:
    parts = Parts.of(data)
    entry = parts.header[rng.choice(list(parts.header))]
    kind = {"F32": torch.float32, "I32": torch.int32, "I8": torch.int8}[entry["dtype"]]
    numbers = (0, 1, -1, 2, 3, 5, 100) if kind != torch.float32 else (
        0.0, -0.0, 1.0, 1.0001, -1.0, 1e-40, 3e38, float("nan"), float("inf"), -float("inf")
    )  # fmt: skip
    raw = torch.tensor([rng.choice(numbers)], dtype=kind).view(torch.uint8).numpy().tobytes()
    begin, end = entry["data_offsets"]
    at = begin + rng.randrange((end - begin) // len(raw)) * len(raw)
    parts.tensors[at : at + len(raw)] = raw
    parts.seal()
    return parts.join()


def respell(rng: random.Random, data: bytes) -> bytes:
    """Other text of the same or nearly the same JSON: spaces, order, doubled keys, escapes."""
    parts = Parts.of(data)
    texts = [json.dumps(parts.header), json.dumps(parts.metadata)]
    which = rng.randrange(2)
    text = texts[which]
    match rng.randrange(5):
        case 0:
            text = text.replace(", ", rng.choice((",", ",\n", ",,", " , ")))
        case 1:
            name = rng.choice(list(parts.header if which == 0 else parts.metadata))
            text = text[:-1] + f', "{name}": {rng.choice(("0", "null", "{}", "[]"))}}}'
        case 2:
            text = text.replace("e", "\\u0065")
        case 3:
            text = json.dumps(json.loads(text), indent=rng.randrange(3))
        case _:
            pairs = list(json.loads(text).items())
            rng.shuffle(pairs)
            text = json.dumps(dict(pairs))
    texts[which] = text
    return join(texts[0], texts[1], bytes(parts.tensors))


def bomb(rng: random.Random, data: bytes) -> bytes:
    """Text that is small in the file and large, deep or slow for a careless parser."""
    size = rng.choice((100, 5_000, 60_000, 240_000, 2_000_000))
    build: Callable[[], str] = rng.choice(
        (
            lambda: "[" * size,
            lambda: "[" * (size // 2) + "]" * (size // 2),
            lambda: "[" + "[]," * (size // 3) + "0]",
            lambda: "[" + "{}," * (size // 3) + "0]",
            lambda: '{"a":' * (size // 5) + "0" + "}" * (size // 5),
            lambda: "{" + ",".join(f'"{i}":0' for i in range(size // 8)) + "}",
            lambda: '"' + '\\"' * (size // 2),
            lambda: '"\\ud83d\\ude00' + "a" * size + '"',
            lambda: "1" * size,
            lambda: "0." + "1" * size,
            lambda: "1e" + "9" * (size % 1000),
            lambda: '"' + "\\u00ff" * (size // 6) + '"',
        )
    )
    text = build()
    parts = Parts.of(data)
    hostile = json.dumps(parts.metadata)[:-1] + f', "summary{rng.choice(("", "2"))}": {text}}}'
    if rng.random() < 0.5:
        return join(json.dumps(parts.header), hostile, bytes(parts.tensors))
    return join(f'{{"x": {text}}}', json.dumps(parts.metadata), bytes(parts.tensors))


def garbage(rng: random.Random, data: bytes) -> bytes:
    return rng.choice((b"", b"\0" * 8, b"{}", rng.randbytes(8), rng.randbytes(len(data))))


MUTATIONS: tuple[tuple[Callable[[random.Random, bytes], bytes], int], ...] = (
    (truncate, 8), (append, 3), (flip_bits, 20), (overwrite, 8), (move_span, 8),
    (header_length, 3), (edit_entries, 12), (edit_metadata, 8), (forge_metadata, 14),
    (forge_tensor, 14), (respell, 6), (bomb, 3), (garbage, 1),
)  # fmt: skip
FORGERIES = ("forge_metadata", "forge_tensor")


@dataclass
class Findings:
    """What came of the files so far."""

    outcomes: Counter[str] = field(default_factory=Counter)
    broken: list[str] = field(default_factory=list)
    slowest: float = 0.0
    repeated: int = 0
    largest_excess: int = 0
    largest_ratio: float = 0.0

    def report(self) -> str:
        counts = ", ".join(f"{name} {count}" for name, count in sorted(self.outcomes.items()))
        return (
            f"{self.outcomes.total()} files: {counts}; slowest {self.slowest:.3f} s "
            f"({self.repeated} loaded again for their time); peak "
            f"allocation at most {self.largest_ratio:.2f} times a file of 1 MiB or more, and twice "
            f"a file plus {max(0, self.largest_excess) / 2**20:.2f} MiB; {len(self.broken)} broken"
        )


def fuzz(mutations: int, seed: int, folder: Path) -> Findings:
    """Loads `mutations` mutated files; a broken rule is noted, an unexpected exception rises."""
    rng = random.Random(seed)
    good = [artifact_bytes(sample_artifact(seed + i)) for i in range(4)]
    good += [artifact_bytes(sample_artifact(seed, 32, 32, 256, summary_size=500))]
    weights = [12, 12, 12, 12, 1]
    kinds, odds = zip(*MUTATIONS, strict=True)
    findings = Findings()
    path = folder / "mutated.st"
    tracemalloc.start()
    try:
        for number in range(mutations):
            original = rng.choices(good, weights)[0]
            kind = rng.choices(kinds, odds)[0]
            data = kind(rng, original)
            path.unlink(missing_ok=True)  # much faster than writing over it
            path.write_bytes(data)
            label = f"mutation {number} of seed {seed} ({kind.__name__})"
            _try(path, data, original, kind.__name__ in FORGERIES, label, findings)
    finally:
        tracemalloc.stop()
    return findings


def _try(
    path: Path, data: bytes, original: bytes, forged: bool, label: str, findings: Findings
) -> None:
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    start = time.perf_counter()
    try:
        artifact = load_artifact(path)
    except ArtifactError as error:
        artifact = None
        if not str(error).isprintable() or len(str(error)) > 1000:
            findings.broken.append(f"{label}: the message is unsafe to print: {str(error)!a}")
    seconds = time.perf_counter() - start
    peak = tracemalloc.get_traced_memory()[1] - before
    if seconds > SECONDS_PER_FILE:
        findings.repeated += 1
        seconds = min(seconds, *(_seconds(path) for _ in range(MORE_TRIES)))
    findings.slowest = max(findings.slowest, seconds)
    findings.largest_excess = max(findings.largest_excess, peak - 2 * len(data))
    if len(data) >= 1 << 20:
        findings.largest_ratio = max(findings.largest_ratio, peak / len(data))
    if seconds > SECONDS_PER_FILE:
        findings.broken.append(f"{label}: took {seconds:.2f} s")
    if peak > 2 * len(data) + FREE_BYTES:
        findings.broken.append(f"{label}: took {peak} bytes for a file of {len(data)}")
    if artifact is None:
        findings.outcomes["refused"] += 1
    elif artifact_bytes(artifact) == original:
        findings.outcomes["equal"] += 1
    elif forged and _holds_what_is_written(artifact, data):
        findings.outcomes["forged within the rules, equal to what is written"] += 1
    else:
        findings.broken.append(f"{label}: loaded, and differs from the file")


def _seconds(path: Path) -> float:
    start = time.perf_counter()
    with suppress(ArtifactError):
        load_artifact(path)
    return time.perf_counter() - start


def _holds_what_is_written(artifact: Artifact, data: bytes) -> bool:
    tensors = safetensors.torch.load(data)
    written, loaded = Parts.of(data).metadata, Parts.of(artifact_bytes(artifact)).metadata
    # The digest is of the text, where 1 and 1.0 differ.
    del written["sha256"], loaded["sha256"]
    return written == loaded and all(
        torch.equal(tensor, getattr(artifact, name)) for name, tensor in tensors.items()
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mutations", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    start = time.perf_counter()
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory() as folder:
        findings = fuzz(options.mutations, options.seed, Path(folder))
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resident) / 1024
    print(findings.report())
    print(f"{time.perf_counter() - start:.0f} s in all, resident memory grew by {grown:.0f} MiB")
    for line in findings.broken:
        print(line)
    return 1 if findings.broken else 0


if __name__ == "__main__":
    sys.exit(main())
