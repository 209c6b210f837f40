"""What other cuts of the same estimates would lose, on the exact maps of a calibration.

head      one threshold a head, as policy `smoothed` has it: most mass for the blocks
row       gamma of every query block
row-loss  a block is read while its mass times what its query block still lacks is above a price:
          least mean square of lost mass, which effects count, for the blocks

Every head has the gamma, or the price, that is best by its effect on the first two thirds of the
prompts; it is judged on the others, beside the oracle: gamma of every query block of exact maps,
one for all heads. `harm` is predicted KL divergence, as of the oracle at the same density and work.

python benchmarks/cuts.py CALIBRATION --rows 2 8 0 --budget .2 .25 .3 .35
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from provenance import provenance, summary
from torch import Tensor

from shareprefill.calib.capture import FULL, rows_key
from shareprefill.calib.store import MapStore
from shareprefill.clustering.effects import head_effects
from shareprefill.clustering.estimator import fit_estimator
from shareprefill.clustering.measurements import GAMMAS
from shareprefill.config import LOCAL_BLOCKS, SINK_BLOCKS
from shareprefill.runtime.geometry import Geometry
from shareprefill.runtime.ops.block_selection import head_blocks, select_blocks, smooth_maps
from shareprefill.runtime.ops.blocks import always_blocks
from shareprefill.runtime.policies.smoothed import line_weights

PRICES = tuple(10 ** (-1 - 5 * step / 23) for step in range(24))
# Halvings of the decimal logarithm of a price of harm, between these.
STEPS, CHEAP, DEAR = 40, -4.0, 6.0
Curve = tuple[Tensor, Tensor, Tensor]
"""Density, harm and recall of every head, float64 `[cuts, K]`."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("calibration", type=Path)
    parser.add_argument("--rows", type=int, nargs="+", default=[2], help="sampled; 0: exact maps")
    parser.add_argument("--budget", type=float, nargs="+", default=[0.25, 0.35])
    args = parser.parse_args()
    print(summary(provenance("cpu")), flush=True)
    study = Study(MapStore.open(args.calibration))
    for rows in args.rows:
        for cut in ("head", "row", "row-loss"):
            for line in study.judge(cut, rows, args.budget):
                print(line, flush=True)


class Study:
    """A calibration, split into prompts that choose and prompts that judge.

    Args:
        store: With effects, prompts of one number of blocks.
    """

    def __init__(self, store: MapStore) -> None:
        self.store = store
        every = range(len(store.prompts))
        self.known, self.unseen = every[: 2 * len(every) // 3], every[2 * len(every) // 3 :]
        self.estimator = fit_estimator(store, self.known)
        effect = head_effects(store, self.known)
        assert effect is not None, "calibrate without --effect-tokens 0"
        self.effect = effect
        self.oracle = {number: self.measure("row", 0, number) for number in self.unseen}

    def measure(self, cut: str, rows: int, number: int) -> Curve:
        """A prompt's curve of one cut of maps of so many rows."""
        record = self.store.prompts[number]
        reads: dict[str, Any] = {
            "sink_blocks": SINK_BLOCKS,
            "local_blocks": LOCAL_BLOCKS,
        }
        size, cpu = record.map_block, torch.device("cpu")
        geometry = Geometry(record.tokens, record.tokens, cpu, block_size=size, **reads)
        name = rows_key(rows) if rows else FULL
        maps, full = (
            self.store.load(number, each)[each].float().flatten(0, 1) for each in (name, FULL)
        )
        if rows:
            maps = smooth_maps(maps, line_weights(self.estimator, rows), **geometry.sizes)
        always = always_blocks(record.tokens, 0, size, **reads)
        cuts: dict[str, Callable[[float], Tensor]] = {
            "head": lambda x: head_blocks(maps, torch.full((len(maps),), x), **geometry.reads)[0],
            "row": lambda x: select_blocks(maps, torch.full((len(maps),), x), **geometry.reads),
            "row-loss": lambda x: blocks_by_loss(maps * geometry.causal, always, x),
        }
        found = []
        for value in PRICES if cut == "row-loss" else GAMMAS:
            pattern = cuts[cut](value) & geometry.causal
            lost = (full * ~pattern).sum(-1).double()
            density = pattern.sum((1, 2)).double() / geometry.causal_count
            found.append((density, lost.square().mean(-1) * self.effect, 1 - lost.mean(-1)))
        density, harm, recall = (torch.stack(tensors) for tensors in zip(*found, strict=True))
        return density, harm, recall

    def judge(self, cut: str, rows: int, budgets: Sequence[float]) -> list[str]:
        """A line for each budget."""
        chosen = [self.measure(cut, rows, number) for number in self.known]
        density, harm = (torch.stack([curve[n] for curve in chosen]).mean(0) for n in (0, 1))
        curves = [self.measure(cut, rows, number) for number in self.unseen]
        lines = []
        for budget in budgets:
            best = best_cuts(density, harm, budget)
            found = [[each.gather(0, best[None])[0] for each in curve] for curve in curves]
            spent = [d.mean().item() for d, _, _ in found]
            work = rows / (2 * self.store.config.block_size)
            ratios = [
                h.sum().item() / self.oracle_harm(number, d + work)
                for number, d, (_, h, _) in zip(self.unseen, spent, found, strict=True)
            ]
            recall = mean(r.mean().item() for _, _, r in found)
            each = " ".join(f"{ratio:.2f}" for ratio in ratios)
            lines.append(
                f"{rows} rows, {cut}, budget {budget}: density {mean(spent):.3f}, "
                f"recall {recall:.3f}, harm / oracle {mean(ratios):.3f} ({each})"
            )
        return lines

    def oracle_harm(self, number: int, density: float) -> float:
        """The oracle's harm at a density, between its gammas by logarithm; NaN beyond them."""
        curve = self.oracle[number]
        points = zip(curve[0].mean(1).tolist(), curve[1].sum(1).log().tolist(), strict=True)
        for (d1, h1), (d2, h2) in pairwise(points):
            if d1 <= density <= d2:
                return math.exp(h1 + (h2 - h1) * (density - d1) / (d2 - d1))
        return math.nan


def blocks_by_loss(maps: Tensor, always: Tensor, price: float) -> Tensor:
    """The cut `row-loss`.

    Args:
        maps: float32 `[K, n_q, n_k]`, zero where nothing may be read.
        always: bool `[n_q, n_k]`, read anyway.
        price: Of a block: mass times mass, in shares of a query block's.

    Returns:
        bool `[K, n_q, n_k]`.
    """
    maps = maps / maps.sum(-1, keepdim=True).clamp_min(torch.finfo(maps.dtype).tiny)
    mass, order = maps.masked_fill(always, 0).sort(-1, descending=True)
    held = (maps * always).sum(-1, keepdim=True)
    lacking = 1 - held - (mass.cumsum(-1) - mass)
    taken = mass * lacking > price
    return torch.zeros_like(taken).scatter_(-1, order, taken) | always


def best_cuts(density: Tensor, harm: Tensor, budget: float) -> Tensor:
    """The cut of every head, int64 `[K]`, at the highest price of harm that meets the budget."""
    low, high = CHEAP, DEAR
    for _ in range(STEPS):
        middle = (low + high) / 2
        best = (density + 10**middle * harm).argmin(0)
        spent = density.gather(0, best[None]).mean().item()
        low, high = (middle, high) if spent <= budget else (low, middle)
    return (density + 10**low * harm).argmin(0)


if __name__ == "__main__":
    main()
