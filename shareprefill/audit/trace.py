"""The page of a run: per layer and head what was planned, what was taken, and why."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from shareprefill.artifact import Artifact, Policy
from shareprefill.audit.figures import policy_looks
from shareprefill.config import RuntimeConfig
from shareprefill.files import printable
from shareprefill.report.drawing import colour_png, value_png
from shareprefill.report.grids import Cell, Grid, value_colour, value_legend
from shareprefill.report.marks import TRACE, mark_of
from shareprefill.report.page import Page, Picture
from shareprefill.runtime.crossover import crossover
from shareprefill.runtime.plan import make_plan
from shareprefill.runtime.reasons import reason
from shareprefill.runtime.records import Sketch
from shareprefill.runtime.report import SessionReport

# Below its promise by more than this, a run's recall is told as a warning.
_TOLERANCE = 0.01
_SHARERS_SHOWN = 24
_READ, _NOT_READ = (47, 159, 216, 255), (128, 128, 128, 40)


@dataclass(frozen=True)
class HeadTrace:
    """What one head did.

    Attributes:
        layer: Its layer.
        head: Its index in the layer.
        planned: Name of the policy that it was to take.
        taken: Name of the policy that it took.
        pivot: Layer and index of the pivot whose pattern it was to read; None for none.
        density: Computed share of its causal blocks.
        recall: Attention inside the blocks that it read.
        reason: Why.
    """

    layer: int
    head: int
    planned: str
    taken: str
    pivot: tuple[int, int] | None
    density: float
    recall: float
    reason: str

    @property
    def place(self) -> str:
        """`layer.head`."""
        return f"{self.layer}.{self.head}"


def trace_heads(
    artifact: Artifact, config: RuntimeConfig, report: SessionReport, device: str
) -> list[HeadTrace]:
    """What every head did in a session that measured recall.

    Args:
        artifact: Of the session.
        config: Of the session.
        report: Of the session.
        device: Where it ran.
    """
    plan, width = make_plan(artifact, config), artifact.policy.shape[1]
    dense_from = plan.max_density
    if dense_from is None:
        dense_from = crossover(torch.device(device)).density
    found = []
    for layer in report.layers:
        assert layer.recall is not None
        for place in range(len(layer.policies)):
            head = layer.first_head + place
            pivot = plan.layers[layer.layer][head].pivot
            found.append(
                HeadTrace(
                    layer=layer.layer,
                    head=head,
                    planned=layer.planned[place] if layer.tau is None else "by the paper's rule",
                    taken=layer.policies[place],
                    pivot=None if pivot < 0 or layer.tau is not None else divmod(pivot, width),
                    density=layer.density[place],
                    recall=layer.recall[place],
                    reason=reason(layer, place, dense_from, plan.delta),
                )
            )
    return found


def trace_page(
    artifact: Artifact,
    config: RuntimeConfig,
    report: SessionReport,
    sketches: dict[int, Sketch],
    *,
    prompt_tokens: int,
    least_tokens: int,
    device: str,
) -> str:
    """The page, as one self-contained HTML file.

    Args:
        artifact: Of the session.
        config: Of the session.
        report: Of the session, which measured recall.
        sketches: `Session.sketches`.
        prompt_tokens: Of the prompt.
        least_tokens: Tokens from which on a prompt is computed sparsely there.
        device: Where it ran.
    """
    page = Page(
        "Trace of a run",
        f"{printable(artifact.model)}, {prompt_tokens:,} prompt tokens, {device}",
        mark_of(TRACE, artifact.model),
    )
    heads = trace_heads(artifact, config, report, device)
    if not heads:
        page.verdict(
            f"Everything ran dense: no prefill had {least_tokens:,} tokens, from which on sharing "
            "pays on this device. sp run --min-tokens 0 shares from the first block on.",
            is_good=False,
        )
        return page.html()
    _verdict(page, artifact, report, heads)
    _policies(page, heads)
    families = _families(heads)
    _grids(page, heads, families)
    _maps(page, heads, families, sketches)
    _heads(page, heads)
    return page.html()


def _verdict(page: Page, artifact: Artifact, report: SessionReport, heads: list[HeadTrace]) -> None:
    recall = sum(head.recall for head in heads) / len(heads)
    promised = artifact.expected("recall", [layer.layer for layer in report.layers])
    # Layers that were not captured when it was made may be sparse all the same.
    held_out = "" if math.isnan(promised) else f"; held-out prompts had {promised:.1%}"
    sharing = sum(head.taken == Policy.SHARE.label for head in heads)
    otherwise = sum(head.planned != head.taken for head in heads if head.planned in _LABELS)
    page.verdict(
        f"{report.density:.1%} of the blocks were computed, and they hold {recall:.1%} of the "
        f"attention{held_out}. {sharing} of {len(heads)} heads "
        f"read another head's pattern, {otherwise} did otherwise than planned. Choosing took "
        f"{report.selection_work:.1%} of dense attention's work.",
        is_good=not recall < promised - _TOLERANCE,
    )


_LABELS = {policy.label for policy in Policy}


def _policies(page: Page, heads: list[HeadTrace]) -> None:
    page.heading("Planned and taken")
    pairs = Counter((head.planned, head.taken) for head in heads)
    rows = []
    for (planned, taken), count in sorted(pairs.items(), key=lambda item: (-item[1], item[0])):
        same = [head for head in heads if (head.planned, head.taken) == (planned, taken)]
        density = sum(head.density for head in same) / count
        rows.append((planned, taken, count, density, sum(head.recall for head in same) / count))
    page.table(["planned", "taken", "heads", "density", "recall"], rows)


def _families(heads: list[HeadTrace]) -> dict[tuple[int, int], list[HeadTrace]]:
    """The heads that share each pivot's pattern, by the pivot's layer and index."""
    found: dict[tuple[int, int], list[HeadTrace]] = defaultdict(list)
    for head in heads:
        if head.pivot is not None and head.taken == Policy.SHARE.label:
            found[head.pivot].append(head)
    return dict(found)


def _grids(
    page: Page, heads: list[HeadTrace], families: dict[tuple[int, int], list[HeadTrace]]
) -> None:
    page.heading("Heads by layer")
    looks = {look.label: look for look in policy_looks().values()}
    shown = [looks[name] for name in dict.fromkeys(h.taken for h in heads) if name in looks]

    def by_policy(head: HeadTrace) -> Cell:
        look = looks.get(head.taken)
        colour, letter = ("#989da4", "") if look is None else (look.colour, look.letter)
        ink = "#0b0c0d" if look is None else look.ink
        return Cell(colour, _words(head), letter, ink, target=_target(head, families))

    grids = [
        Grid(
            "policy taken",
            *_rows(heads, by_policy),
            legend=[(look.colour, 1.0, f"{look.letter}  {look.label}") for look in shown],
            label="Grid of layers by heads, coloured by the policy taken",
        )
    ]
    for name in ("recall", "density"):
        values = [getattr(head, name) for head in heads]
        least, most = (min(0.9, *values), 1.0) if name == "recall" else (0.0, 1.0)

        def by_value(head: HeadTrace, name: str = name, least: float = least) -> Cell:
            colour = value_colour(getattr(head, name), least, 1.0)
            return Cell(colour, _words(head), target=_target(head, families))

        grids.append(
            Grid(
                name,
                *_rows(heads, by_value),
                legend=value_legend(least, most),
                label=f"Grid of layers by heads, coloured by {name}",
            )
        )
    page.grids(
        grids,
        "Rows are layers, columns heads. Rest the pointer on a head for its numbers; click on it "
        "for its maps where it gives or shares a pattern, and for its line below otherwise.",
    )


def _rows(
    heads: list[HeadTrace], cell: Callable[[HeadTrace], Cell]
) -> tuple[list[int], list[list[Cell]]]:
    layers = sorted({head.layer for head in heads})
    return layers, [[cell(head) for head in heads if head.layer == layer] for layer in layers]


def _words(head: HeadTrace) -> str:
    return (
        f"head {head.place}: {head.taken}\nplanned {head.planned}\nrecall {head.recall:.3f}\n"
        f"density {head.density:.3f}\n{head.reason}"
    )


def _target(head: HeadTrace, families: dict[tuple[int, int], list[HeadTrace]]) -> str:
    place = (head.layer, head.head)
    if place in families:
        return "pivot-{}-{}".format(*place)
    if head.pivot in families and head.taken == Policy.SHARE.label:
        return "pivot-{}-{}".format(*head.pivot)
    return f"head-{head.layer}-{head.head}"


def _maps(
    page: Page,
    heads: list[HeadTrace],
    families: dict[tuple[int, int], list[HeadTrace]],
    sketches: dict[int, Sketch],
) -> None:
    page.heading("Patterns that are shared")
    if not families:
        page.text("No head read another head's pattern.")
        return
    some = next(iter(sketches.values()))
    page.text(
        "Of every head the exact block map on the left (rows are blocks of queries, columns blocks "
        "of keys, bright is much attention) and what was read of it on the right. Queries are the "
        f"last {some.queries:,} tokens, keys all {some.keys:,}."
    )
    known = {(head.layer, head.head): head for head in heads}
    for place, sharers in sorted(families.items(), key=lambda item: (-len(item[1]), item[0])):
        pivot = known.get(place)
        words = f"Pivot {place[0]}.{place[1]} and {len(sharers)} that share its pattern"
        with page.details(words, "pivot-{}-{}".format(*place)):
            members = ([] if pivot is None else [pivot]) + sharers[:_SHARERS_SHOWN]
            page.pictures([*_pictures(members, sketches)])
            if len(sharers) > _SHARERS_SHOWN:
                page.text(f"{len(sharers) - _SHARERS_SHOWN} more are in the table below.")


def _pictures(heads: list[HeadTrace], sketches: dict[int, Sketch]) -> Iterator[Picture]:
    for head in heads:
        sketch = sketches[head.layer]
        yield Picture(
            f"{head.place} {head.taken}: recall {head.recall:.3f}, density {head.density:.3f}",
            [
                (map_png(sketch, head.head), f"attention of head {head.place}"),
                (read_png(sketch, head.head), f"blocks that head {head.place} read"),
            ],
        )


def map_png(sketch: Sketch, head: int) -> bytes:
    """Square roots of a head's map in the sequential colours, the future transparent."""
    map_ = sketch.maps[head].float()
    roots = (map_ / map_.max().clamp(min=1e-9)).sqrt()
    return value_png(roots.numpy(), _future(sketch).numpy())


def read_png(sketch: Sketch, head: int) -> bytes:
    """What a head read of its map; cells of which some blocks were read are as much fainter."""
    read = sketch.read[head].float()[..., None]
    drawn, left = (
        torch.tensor(colour, dtype=torch.int64, device="cpu") for colour in (_READ, _NOT_READ)
    )
    colours = torch.where(read > 0, drawn, left)
    colours[..., 3:] = torch.where(read > 0, read * 215 + 40, colours[..., 3:].float())
    colours = colours.to(torch.uint8).masked_fill(_future(sketch)[..., None], 0)
    return colour_png(colours.numpy())


def _future(sketch: Sketch) -> Tensor:
    """Cells whose keys are all behind their queries, bool `[n_q, n_k]`."""
    n_q, n_k = sketch.maps.shape[1:]
    ends = (
        sketch.keys - sketch.queries + torch.arange(1, n_q + 1, device="cpu") * sketch.queries / n_q
    )
    return torch.arange(n_k, device="cpu") * sketch.keys / n_k >= ends[:, None]


def _heads(page: Page, heads: list[HeadTrace]) -> None:
    page.heading("All heads")
    for layer in sorted({head.layer for head in heads}):
        mine = [head for head in heads if head.layer == layer]
        density = sum(head.density for head in mine) / len(mine)
        recall = sum(head.recall for head in mine) / len(mine)
        with page.details(f"Layer {layer}: density {density:.3f}, recall {recall:.3f}"):
            page.table(
                ["head", "planned", "taken", "pivot", "density", "recall", "why"],
                [
                    (
                        head.place,
                        head.planned,
                        head.taken,
                        None if head.pivot is None else "{}.{}".format(*head.pivot),
                        head.density,
                        head.recall,
                        head.reason,
                    )
                    for head in mine
                ],
                names=[f"head-{head.layer}-{head.head}" for head in mine],
            )
