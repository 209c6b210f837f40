"""Draws the pictures of README and docs from a real model's calibration and artifact.

    python tools/pictures.py ARTIFACT CALIBRATION docs/pictures

Every picture is an SVG file: the front's (two heads' maps and the pattern that they share), and one
for each stage. Equal inputs give equal files.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure

from shareprefill.artifact import Artifact, Policy, load_artifact
from shareprefill.audit.figures import draw_planes, policy_looks
from shareprefill.audit.findings import Findings, examine
from shareprefill.calib.capture import FULL
from shareprefill.files import atomic_write_bytes
from shareprefill.report.drawing import MUTED, RULE, figure_file, figure_style
from shareprefill.runtime.ops.block_selection import select_blocks

_READ = "#2f9fd8"


def main(artifact: str, calibration: str, out: str) -> None:
    """Draws all of them."""
    loaded = load_artifact(artifact)
    findings = examine(loaded, Path(calibration))
    pictures = {
        "front": front,
        "calibrate": calibrate,
        "autoencoder": autoencoder,
        "cluster": cluster,
        "run": run,
    }
    Path(out).mkdir(parents=True, exist_ok=True)
    for name, draw in pictures.items():
        with figure_style():
            path = Path(out) / f"{name}.svg"
            atomic_write_bytes(path, figure_file(draw(loaded, findings), "svg"))
        print(f"{path}: {path.stat().st_size} bytes")


def unseen_maps(findings: Findings) -> tuple[torch.Tensor, int]:
    """Exact maps `[K, n, n]` of the first held-out prompt, and its tokens."""
    assert findings.calibration is not None
    number = findings.calibration.training.split.held_out[0]
    maps = findings.calibration.store.load(number, FULL)[FULL].flatten(0, 1).float()
    return maps, findings.calibration.store.prompts[number].tokens


def most_shared(artifact: Artifact, findings: Findings) -> tuple[int, int]:
    """A pivot and a head of another layer that shares its pattern, as indices.

    Of the pivot with most sharers the one whose map has most to show: the densest.
    """
    heads = findings.heads
    sharing = (heads.policy == int(Policy.SHARE)).nonzero()[:, 0]
    pivots, counts = heads.pivot[sharing].unique(return_counts=True)
    index = {head: i for i, head in enumerate(heads.ids.tolist())}
    many = [index[p] for p, n in zip(pivots.tolist(), counts.tolist(), strict=True) if n > 1]
    pivot = max(many, key=lambda i: float(heads.density[i]) * (float(heads.density[i]) < 0.5))
    sharers = [i for i in sharing.tolist() if int(heads.pivot[i]) == int(heads.ids[pivot])]
    layer = int(heads.ids[pivot]) // heads.width
    others = [i for i in sharers if int(heads.ids[i]) // heads.width != layer] or sharers
    return pivot, others[len(others) // 2]


def front(artifact: Artifact, findings: Findings) -> Figure:
    """Two heads' maps, and the pattern that they share."""
    heads = findings.heads
    maps, tokens = unseen_maps(findings)
    pivot, sharer = most_shared(artifact, findings)
    gamma = artifact.gamma.flatten()[heads.ids[sharer]].reshape(1)
    pattern = select_blocks(
        maps[pivot][None],
        gamma.float(),
        n_query=tokens,
        n_key=tokens,
        block_size=artifact.block_size,
        sink_blocks=1,
        local_blocks=1,
    )[0]
    causal = len(pattern) * (len(pattern) + 1) / 2
    inside = [float((maps[i] * pattern).sum() / len(pattern)) for i in (pivot, sharer)]
    figure = Figure(figsize=(7.4, 3.1), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    show_map(left, maps[pivot], f"head {heads.name(pivot)} (layer.head)")
    show_map(middle, maps[sharer], f"head {heads.name(sharer)}")
    show_pattern(right, pattern, "the pattern that both read")
    left.set_ylabel("blocks of queries")
    left.set_xlabel("blocks of keys")
    middle.set_xlabel("bright: much attention")
    right.set_xlabel(
        f"{float(pattern.sum()) / causal:.0%} of the blocks hold {inside[0]:.0%}\n"
        f"and {inside[1]:.0%} of their attention"
    )
    return figure


def calibrate(artifact: Artifact, findings: Findings) -> Figure:
    """Maps of some heads, from the first layer to the last."""
    maps, _ = unseen_maps(findings)
    chosen = torch.linspace(0, len(maps) - 1, 8).long().tolist()
    figure = Figure(figsize=(7.4, 4.0), layout="constrained")
    for axes, index in zip(figure.subplots(2, 4).flat, chosen, strict=True):
        show_map(axes, maps[index], f"head {findings.heads.name(index)}")
    return figure


def autoencoder(artifact: Artifact, findings: Findings) -> Figure:
    """Maps of an unseen prompt, and what is left of them after 64 numbers."""
    assert findings.thumbnails is not None
    shown = findings.thumbnails.clusters[:2]
    figure = Figure(figsize=(7.4, 2.2), layout="constrained")
    axes = iter(figure.subplots(1, 2 * len(shown), squeeze=False)[0])
    for maps in shown:
        show_map(next(axes), maps.unseen, f"head {findings.heads.name(maps.picked.head)}")
        show_map(next(axes), maps.reconstruction, "from its code")
    return figure


def cluster(artifact: Artifact, findings: Findings) -> Figure:
    """The heads by their codes, and their clusters."""
    return draw_planes(findings.heads, findings.plane)[0]


def run(artifact: Artifact, findings: Findings) -> Figure:
    """What each head of each layer does."""
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    heads, looks = findings.heads, policy_looks()
    codes = sorted(set(heads.policy.tolist()))
    grid = heads.grid(torch.tensor([codes.index(code) for code in heads.policy.tolist()]))
    figure = Figure(figsize=(7.4, 2.9), layout="constrained")
    axes = figure.subplots()
    colours = ListedColormap([looks[code].colour for code in codes])
    axes.imshow(grid.T.numpy(), cmap=colours, vmin=-0.5, vmax=len(codes) - 0.5, aspect="auto")
    axes.set_xlabel("layer")
    axes.set_ylabel("head")
    axes.spines[:].set(visible=True, color=RULE)
    patches = [Patch(facecolor=looks[code].colour, label=looks[code].label) for code in codes]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(codes))
    return figure


def show_map(axes, map_: torch.Tensor, title: str) -> None:
    """Square roots of the attention mass; the future is left blank."""
    future = torch.ones_like(map_, dtype=torch.bool).triu(1)
    roots = map_.clamp_min(0).sqrt().masked_fill(future, float("nan"))
    axes.imshow(roots.numpy(), vmin=0, vmax=float(roots.nan_to_num().max()))
    _frame(axes, title)


def show_pattern(axes, pattern: torch.Tensor, title: str) -> None:
    """Blocks that are read."""
    from matplotlib.colors import ListedColormap

    colours = ListedColormap(["#00000000", "#e9ebee", _READ])
    causal = torch.ones_like(pattern).tril()
    axes.imshow((causal.int() + (pattern & causal).int()).numpy(), cmap=colours, vmin=0, vmax=2)
    _frame(axes, title)


def _frame(axes, title: str) -> None:
    axes.set_title(title, fontsize=9.5)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set(visible=True, color=MUTED, linewidth=0.5)


if __name__ == "__main__":
    main(*sys.argv[1:])
