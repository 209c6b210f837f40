"""The page of an audit: what was found, in words, tables and figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from shareprefill.artifact import Policy
from shareprefill.audit.codes import UNSTABLE
from shareprefill.audit.figures import (
    CLUSTERS,
    LEAVES,
    draw_distances,
    draw_planes,
    draw_policies,
    draw_spread,
    draw_tree,
)
from shareprefill.audit.findings import Findings, describe_clusters
from shareprefill.audit.head_grids import class_grids, value_grids
from shareprefill.audit.map_figures import map_pictures
from shareprefill.audit.separation import NAMES
from shareprefill.files import printable
from shareprefill.report.drawing import figure_style
from shareprefill.report.marks import AUDIT, mark_of
from shareprefill.report.page import Cell, Page

_ROWS = 20
_LEAST = 10
_SETTINGS = 80
_HOVER = "Rest the pointer on a head for its numbers."


def build_page(findings: Findings, doubts: Sequence[str] = ()) -> Page:
    """The page; the same bytes for the same findings.

    Args:
        findings: About the artifact.
        doubts: Why its promise may not hold, told below the verdict.
    """
    artifact, heads = findings.artifact, findings.heads
    page = Page(
        "Audit of a clustering",
        f"{printable(artifact.model)}: {heads.count} heads of {len(heads.layers)} layers",
        mark_of(AUDIT, artifact.model),
    )
    _verdict(page, findings, is_doubtful=bool(doubts or findings.warnings))
    for warning in (*doubts, *findings.warnings):
        page.warning(warning)
    if findings.calibration is None:
        page.note(
            f"Maps, Jaccard distances and the spread by data set are missing here: "
            f"{findings.missing}. Give sp audit --calibration FOLDER, the folder that sp cluster "
            "read, to see them."
        )
    with figure_style():
        for section in (
            _summary,
            _policies,
            _codes,
            _separation,
            _tree,
            _grids,
            _maps,
            _stability,
            _noise,
            _settings,
        ):
            section(page, findings)
    return page


def _verdict(page: Page, findings: Findings, *, is_doubtful: bool) -> None:
    artifact, heads = findings.artifact, findings.heads
    recall, target = artifact.expected("recall"), _target(findings)
    cost = _number(artifact.summary.get("cost"))
    held_out, tokens = (artifact.summary.get(f"held_out_{name}") for name in ("prompts", "tokens"))
    words = f"{artifact.expected('density'):.1%} of the blocks hold {recall:.1%} of the attention"
    words += f", planned for {artifact.goal_in_words}"
    if cost is not None:
        words += f". Attention should take {cost:.0%} of dense attention's time"
    words += f". {_count_share(findings, Policy.SHARE)} of the {heads.count} heads share a pattern"
    if isinstance(held_out, list) and isinstance(tokens, list) and tokens:
        words += f". This rests on {len(held_out)} held-out prompts of {_listed(tokens)} tokens"
    page.verdict(f"{words}.", is_good=not is_doubtful and (target is None or recall >= target))


def _target(findings: Findings) -> float | None:
    """The recall that heads were planned for; None where that was no goal."""
    name, value = findings.artifact.goal or ("", 0.0)
    return value if name == "target_recall" else None


def _summary(page: Page, findings: Findings) -> None:
    artifact, heads = findings.artifact, findings.heads
    summary, geometry = artifact.summary, artifact.fingerprint.geometry
    sizes = heads.sizes()
    left_out = geometry.layers - len(heads.layers)
    page.heading("Summary")
    rows: list[tuple[str, Cell]] = [
        ("model", printable(artifact.model)),
        ("geometry", printable(artifact.fingerprint.describe())),
        ("hash of the attention weights", artifact.fingerprint.weights[:16]),
        ("captured heads", f"{heads.count} of {artifact.heads}"),
        ("block size", f"{artifact.block_size} tokens"),
        ("clusters", len(sizes)),
        ("clusters of one head", sum(size == 1 for size in sizes.values())),
        ("heads that share a pattern", _count_share(findings, Policy.SHARE)),
        ("noise", f"{findings.noise.share:.0%} of the heads"),
        ("expected density", artifact.expected("density")),
        ("expected recall", artifact.expected("recall")),
        ("recall of the worst 5 % of heads", _number(summary.get("recall_worst_5_percent"))),
        ("predicted cost, dense attention 1", _number(summary.get("cost"))),
        ("γ, attention mass of a pattern", artifact.thresholds.gamma),
        ("τ, JS distance to share by the paper's rule", artifact.thresholds.tau),
        ("δ, JS distance to uniform", artifact.thresholds.delta),
        ("rows a block: pivot, sample, check", _rows(findings)),
        ("held-out prompts", _listed(summary.get("held_out_prompts"))),
        ("their tokens", _listed(summary.get("held_out_tokens"))),
    ]
    page.table(["what", "value"], [(name, _text(value)) for name, value in rows])
    page.text(
        "Recall is the attention mass inside a head's pattern, density the share of causal blocks "
        "that it computes; both were measured on the held-out prompts when the artifact was made."
        + (f" {left_out} layers were not captured and run dense." if left_out else "")
    )


def _policies(page: Page, findings: Findings) -> None:
    heads = findings.heads
    page.heading("Recall and density by policy")
    page.table(
        ["policy", "heads", "recall", "5th percentile", "least", "density", "most"],
        [
            (f.policy, f.heads, f.recall, f.recall_p5, f.recall_least, f.density, f.density_most)
            for f in findings.policies
        ],
        caption="Heads by policy; means and extremes over heads",
    )
    target = _target(findings)
    page.panels(
        draw_policies(heads, target),
        "Each point is a head; bars are medians, the dotted line is the recall that was asked for.",
        "Recall and density of every head by policy, and recall against density",
    )
    page.grids(value_grids(heads), f"Recall and density of every head. {_HOVER}")
    order = heads.recall.argsort(stable=True)[:_LEAST].tolist()
    page.table(
        ["head", "policy", "cluster", "recall", "density"],
        [
            (
                heads.name(i),
                Policy(int(heads.policy[i])).label,
                int(heads.cluster[i]),
                float(heads.recall[i]),
                float(heads.density[i]),
            )
            for i in order
        ],
        caption=f"The {len(order)} heads of least recall (layer.head)",
    )


def _codes(page: Page, findings: Findings) -> None:
    plane = findings.plane
    page.heading("Codes")
    page.text(
        "Each point is a head, placed by its code, the mean over prompts. t-SNE keeps neighbours "
        "together, distances between groups mean little; PCA keeps distances along the two main "
        f"directions. The {CLUSTERS} largest clusters have a colour and a shape of their own."
    )
    if plane.tsne is None:
        page.note("Fewer than four heads have different codes: there is no t-SNE.")
    page.panels(
        draw_planes(findings.heads, plane),
        "Codes of all heads by cluster; rings mark pivots.",
        "Scatter plots of the heads' codes in two dimensions, by cluster",
    )


def _separation(page: Page, findings: Findings) -> None:
    separation = findings.separation
    page.heading("Distances within and across clusters")
    if findings.heads.count < 2:
        page.note("One head has no distance to another.")
        return
    if findings.calibration is None:
        page.note(
            "Jaccard distances need the maps: give --calibration FOLDER. Below are the distances "
            "of codes, which the artifact holds."
        )
    score = separation.silhouette
    page.text(
        "Good clusters have small distances within and large ones across. "
        + (
            f"Silhouette of the clusters in this distance: {score:.2f} (1: tight and apart, 0: "
            "overlapping, below 0: wrong)."
            if score is not None
            else "The silhouette is not defined for this number of clusters."
        )
    )
    page.figure(
        draw_distances(separation),
        f"{NAMES[separation.measure]}, all pairs of heads; vertical lines are medians.",
        "Histograms of distances within and across clusters",
    )


def _tree(page: Page, findings: Findings) -> None:
    heads, tree = findings.heads, findings.separation.tree
    page.heading("Dendrogram")
    if heads.count < 2:
        page.note("One head has nothing to merge with.")
        return
    if not tree.is_artifacts:
        page.note(
            "No cut of this tree gives the artifact's clusters, so none is drawn"
            + (
                ": it is built on the distances of codes. Give --calibration FOLDER to see the "
                "tree that was cut."
                if findings.calibration is None
                else "."
            )
        )
    large = heads.count > LEAVES
    page.figure(
        draw_tree(heads, tree),
        f"Merges by {tree.linkage} linkage. "
        + (
            "Only the last merges are drawn; numbers in brackets count the heads below a leaf."
            if large
            else "Leaves are heads (layer.head)."
        ),
        "Dendrogram of the heads"
        + ("" if tree.cut_height is None else f", cut at {tree.cut_height:.2f}"),
    )


def _grids(page: Page, findings: Findings) -> None:
    heads = findings.heads
    page.heading("Heads by layer")
    page.grids(class_grids(heads), f"Numbers are clusters, letters policies. {_HOVER}")
    clusters = [c for c in describe_clusters(findings) if c["heads"] > 1]
    if not clusters:
        page.text("No cluster has two heads.")
        return
    page.table(
        ["cluster", "heads", "sharing", "pivots", "recall", "density", "distance", "spread"],
        [
            (
                str(c["cluster"]),
                c["heads"],
                c["sharing"],
                printable(" ".join(c["pivots"]), 40) or None,
                c["recall"],
                c["density"],
                c["distance"],
                c["spread"],
            )
            for c in clusters[:_ROWS]
        ],
        caption="Clusters of at least two heads: mean recall and density, mean distance of two "
        "heads, mean spread over prompts",
    )
    if len(clusters) > _ROWS:
        rest = clusters[_ROWS:]
        page.text(
            f"{len(rest)} more clusters with {sum(c['heads'] for c in rest)} heads are left "
            "out; sp audit --json has them."
        )


def _maps(page: Page, findings: Findings) -> None:
    heads, thumbnails = findings.heads, findings.thumbnails
    page.heading("Maps")
    if thumbnails is None:
        page.note(
            f"The maps of pivots and members, the consensus and the reconstructions need "
            f"--calibration FOLDER: {findings.missing}."
        )
        return
    if not thumbnails.clusters:
        page.note("No cluster has two heads.")
        return
    page.text(
        "Block maps: rows are query blocks, columns key blocks, bright is much attention (roots of "
        "the mass, dark 0, yellow 1). Means are over the prompts that are not held out; the "
        f"unseen prompt is held out ({printable(thumbnails.source)}). Members go from the nearest "
        "to the farthest of the cluster."
    )
    if thumbnails.left_out:
        page.note(
            f"{thumbnails.left_out} more clusters with {thumbnails.heads_left_out} heads are left "
            "out here; sp audit --json has the figures of all."
        )
    for maps in thumbnails.clusters:
        picked = maps.picked
        page.heading(f"Cluster {picked.cluster}", level=3)
        more = picked.size - 1 - len(picked.members)
        role = "pivot" if picked.is_pivot else "head nearest to the rest"
        page.text(
            f"{picked.size} heads, {picked.sharing} of them share a pattern; {role} "
            f"{heads.name(picked.head)}. Loss of the reconstruction on held-out prompts: "
            f"{maps.loss:.4f} (Hellinger², mean over the cluster)."
            + (f" {more} more members are not shown." if more else "")
        )
        page.pictures(map_pictures(heads, maps))


def _stability(page: Page, findings: Findings) -> None:
    heads, noise = findings.heads, findings.noise
    page.heading("Stability over prompts")
    page.text(
        "Spread of a head: how far its codes lie from their mean from prompt to prompt, over how "
        f"far the heads' mean codes lie apart. Above {UNSTABLE:g} the prompt says more about the "
        "head's map than which head it is."
    )
    page.panels(
        draw_spread(heads, noise),
        "Spread of every head's codes.",
        "Spread of codes over prompts, sorted and by layer",
    )
    if findings.sources is None:
        page.note(
            "The spread by data set needs the codes of each prompt: give --calibration FOLDER."
        )
    else:
        page.table(
            ["data set", "prompts", "median spread", "95th percentile"],
            [(printable(s.source), s.prompts, s.spread, s.worst) for s in findings.sources],
            caption="How far the prompts of each data set move the heads from their means",
        )


def _noise(page: Page, findings: Findings) -> None:
    heads, noise = findings.heads, findings.noise
    page.heading("Noise")
    both = int((noise.alone & noise.unstable).sum())
    page.table(
        ["heads", "number", "share"],
        [
            ("in no cluster, or alone in one", int(noise.alone.sum()), _percent(noise.alone)),
            ("unstable", int(noise.unstable.sum()), _percent(noise.unstable)),
            ("both", both, f"{both / heads.count:.0%}"),
            ("noise in all", int(noise.heads.sum()), _percent(noise.heads)),
        ],
        caption="Heads that the clusters say nothing about",
    )
    order = noise.spread.argsort(descending=True, stable=True).tolist()
    rows = [i for i in order if bool(noise.heads[i])]
    if not rows:
        page.text(
            "Every head has company in its cluster and keeps its place from prompt to prompt."
        )
        return
    page.table(
        ["head", "cluster", "policy", "spread", "why"],
        [
            (
                heads.name(i),
                int(heads.cluster[i]) if heads.cluster[i] >= 0 else None,
                Policy(int(heads.policy[i])).label,
                float(noise.spread[i]),
                " and ".join(
                    why
                    for why, is_so in (("alone", noise.alone[i]), ("unstable", noise.unstable[i]))
                    if is_so
                ),
            )
            for i in rows[:_ROWS]
        ],
        caption=f"{min(_ROWS, len(rows))} of {len(rows)} noise heads, the least stable first",
    )


def _settings(page: Page, findings: Findings) -> None:
    page.heading("Settings")
    rows = list(_flat(findings.artifact.configuration))
    if not rows:
        page.text("The artifact names no settings.")
        return
    page.table(["setting", "value"], rows[:_SETTINGS], caption="What the artifact was made with")
    if len(rows) > _SETTINGS:
        page.text(f"{len(rows) - _SETTINGS} more settings are left out; sp inspect has them.")


def _flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    found = []
    for name, value in sorted(values.items()):
        if isinstance(value, dict) and value:
            found += _flat(value, f"{prefix}{name}.")
        else:
            found.append((printable(prefix + name), _text(value)))
    return found


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return _listed(value) if isinstance(value, list) else "–" if value is None else printable(value)


def _listed(values: object) -> str:
    if not isinstance(values, list):
        return "–"
    return printable(", ".join(map(str, values))) if values else "none"


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _percent(chosen: Any) -> str:
    return f"{float(chosen.double().mean()):.0%}"


def _count_share(findings: Findings, policy: Policy) -> str:
    heads = int((findings.heads.policy == int(policy)).sum())
    return f"{heads} ({heads / findings.heads.count:.0%})"


def _rows(findings: Findings) -> str:
    rows = findings.artifact.rows
    return f"{rows.pivot or 'all'}, {rows.sample}, {rows.check}"
