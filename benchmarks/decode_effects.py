"""KL of sparse decode steps by whose effects prices go, and by how often blocks are chosen.

    python benchmarks/decode_effects.py --model DIR --calibrate chosen.json \
        --prompts measured.json --artifact x.st --json effects.json

As `decode_study.py run`, whose prompts these are, with sessions' prices: each prompt has one of its
own, at which it reads the density asked for, and a KV head's blocks must be worth it by its harm.
Effects of heads are those of the calibration's decode steps (`steps`), of its prompts' last rows,
as `sp calibrate` measures them (`rows`), of the artifact's prefills (`prefills`), or alike. With
`steps`, blocks are also chosen every few steps alone, in layers in turns. With `--coordinates`,
those of the sketch are not each prompt's own: they are of all calibration prompts together, as an
engine has them for all requests, of those of other tasks, or of one of those.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from decode_policies import Basis, Policy, ranked, worth_counts
from decode_study import Decode, Prompt, Sample, Study, bases_of, load_samples
from provenance import provenance
from torch import Tensor

from shareprefill.artifact import load_artifact

SKETCH = (24, 4)


@torch.no_grad()
def price(study: Study, sample: Sample, prompt: Prompt, harm: Tensor, density: float) -> float:
    """What all blocks of a KV head of mean harm must be worth for a prompt to read a density."""
    handler = Decode(prompt, study.share, None, study.block)
    study.steps(sample, handler)
    policy = Policy("sketch", density, sketch=SKETCH)
    score = torch.cat([policy.score(n, steps) for n, steps in enumerate(handler.steps)])
    always, visible = handler.steps[0].always(), handler.steps[0].visible
    held = score.gather(-1, ranked(score, always, visible)).cumsum(-1)
    low, high = -22.0, 4.0
    for _ in range(9):
        middle = (low + high) / 2
        read = worth_counts(held, 2.0**middle / harm, always, visible) / visible.sum(-1)
        low, high = (middle, high) if read.mean() > density else (low, middle)
    return 2.0**high


@torch.no_grad()
def rows_of(
    study: Study,
    sample: Sample,
    effects: dict[str, Tensor],
    bases: list[Basis] | None,
    options: argparse.Namespace,
) -> list[dict[str, Any]]:
    """A row for every effect and number of steps of one prompt."""
    prompt = study.prefill(sample)
    if bases is not None:
        prompt = replace(prompt, basis=bases)
    dense = study.steps(sample, Decode(prompt, None, None, study.block))
    rows = []
    for name, effect in effects.items():
        study.share = effect / effect.sum(-1, keepdim=True)
        harm = (effect.sum(-1) / effect.sum(-1).mean()).flatten().clamp(min=1e-3)
        worth = price(study, sample, prompt, harm, options.density) / harm
        for every in options.every if name == "steps" else [1]:
            policy = Policy("sketch", options.density, every=every, sketch=SKETCH, worth=worth)
            handler = Decode(prompt, study.share, policy, study.block)
            states = study.steps(sample, handler)
            row = {"effects": name, "every": every, "task": sample.task}
            row |= {"tokens": len(sample.prompt), "steps": len(sample.follow)}
            row["blocks"] = torch.stack(handler.reads).mean().item()
            rows.append(row | study.outcome(sample, dense, states))
    return rows


def effects_of(study: Study, samples: Sequence[Sample], artifact: Path | None) -> dict[str, Tensor]:
    """Effects of heads `[L, G, R]`, by what they were measured on."""
    alike = torch.ones_like(study.share)
    pairs = [(sample, study.prefill(sample)) for sample in samples]
    found = {"steps": study.head_effects(pairs).view_as(alike)}
    last = [
        replace(s, prompt=s.prompt[: -len(s.follow)], follow=s.prompt[-len(s.follow) :])
        for s in samples
    ]
    pairs = [(sample, study.prefill(sample)) for sample in last]
    found["rows"] = study.head_effects(pairs).view_as(alike)
    if artifact is not None:
        effect = load_artifact(artifact).effect
        assert effect is not None, artifact
        found["prefills"] = effect.to(alike).view_as(alike)
    return found | {"alike": alike}


def coordinates(
    study: Study, samples: Sequence[Sample], kind: str
) -> Callable[[str], list[Basis] | None]:
    """The sketch's coordinates for a task: None for a prompt's own, else of calibration prompts."""
    if kind == "own":
        return lambda task: None
    moments = [(sample.task, study.read(sample).moments()) for sample in samples]

    def of(task: str) -> list[Basis]:
        chosen = [m for name, m in moments if kind == "all" or name != task]
        chosen = chosen[:1] if kind == "one" else chosen
        together = chosen[0]
        for number, other in enumerate(chosen[1:], 2):
            together = together.with_another(other, number)
        return bases_of(together)

    return of


def main() -> None:
    """Parses the command line, measures, and prints means over prompts."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--calibrate", type=Path, required=True, help="prompts of effects")
    parser.add_argument("--prompts", type=Path, required=True, help="prompts that are measured")
    parser.add_argument("--artifact", type=Path, help="with effects of prefills")
    parser.add_argument("--density", type=float, default=0.153, help="of blocks")
    parser.add_argument("--every", type=int, nargs="*", default=[1, 2, 4, 8])
    parser.add_argument("--coordinates", choices=("own", "all", "others", "one"), default="own")
    parser.add_argument("--block", type=int, default=32, help="tokens a key block")
    parser.add_argument("--commit", help="of the sources, where git's files are not there")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    sizes = {"model": options.model, "device": options.device, "block": options.block}
    study = Study(argparse.Namespace(**sizes, artifact=None))
    effects = effects_of(study, load_samples(options.calibrate, study), options.artifact)
    rows: list[dict[str, Any]] = []
    bases = coordinates(study, load_samples(options.calibrate, study), options.coordinates)
    for sample in load_samples(options.prompts, study):
        rows += rows_of(study, sample, effects, bases(sample.task), options)
    groups: dict[tuple[str, int], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["effects"], row["every"]].append(row)
    for (name, every), found in groups.items():
        blocks, kl = (sum(row[c] for row in found) / len(found) for c in ("blocks", "kl"))
        tasks = ", ".join(f"{row['task']} {row['kl']:.4f}" for row in found)
        print(f"{name}, every {every} steps: blocks {blocks:.3f}, KL {kl:.4f} ({tasks})")
    if options.json:
        found = {"facts": provenance(options.device, options.commit), "rows": rows}
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
