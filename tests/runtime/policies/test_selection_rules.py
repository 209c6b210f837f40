"""Each policy's rule against small cases worked out pair by pair."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from shareprefill.errors import ConfigError
from shareprefill.runtime.geometry import Geometry
from shareprefill.runtime.ops.block_selection import LineWeights, select_blocks
from shareprefill.runtime.policies import make_policy
from shareprefill.runtime.policies.antidiagonal import Antidiagonal
from shareprefill.runtime.policies.base import LayerInputs
from shareprefill.runtime.policies.decompose import Decompose, densest_blocks, fit_lines
from shareprefill.runtime.policies.flash import Flash
from shareprefill.runtime.policies.flex import Flex
from shareprefill.runtime.policies.global_threshold import GlobalThreshold
from shareprefill.runtime.policies.pooled import Pooled
from shareprefill.runtime.policies.sampled import sampled_maps
from shareprefill.runtime.policies.smoothed import UNFITTED
from tests.support.maps import head_pattern, smooth

BLOCK = 4
ZERO = torch.tensor([0])
ALL_LINES = LineWeights(itself=0.14, vertical1=0.15, diagonal1=0.02, diagonal2=0.04, diagonal=0.45)


def layer(query: Tensor, key: Tensor, scale: float = 1.0, block: int = BLOCK) -> LayerInputs:
    sizes = (query.shape[1], key.shape[1])
    return LayerInputs(
        query,
        key,
        scale,
        Geometry(*sizes, torch.device("cpu"), block_size=block, sink_blocks=1, local_blocks=1),
    )


def random_layer(n_query: int, n_key: int, heads: int = 1) -> LayerInputs:
    return layer(torch.randn(heads, n_query, 8), torch.randn(1, n_key, 8), 0.5)


def test_a_head_covers_its_mass_with_the_fewest_blocks() -> None:
    maps = torch.rand(3, 6, 6).tril().square()
    gamma = torch.tensor([0.4, 0.8, 0.95])
    found = head_pattern(maps, gamma)
    for head in range(3):
        ranked = maps[head].flatten().sort(descending=True).values
        least = int((ranked.cumsum(0) < gamma[head] * ranked.sum()).sum()) + 1
        assert int(found[head].sum()) == least
        assert maps[head][found[head]].min() == ranked[least - 1]


def test_whole_mass_is_every_block_that_holds_any() -> None:
    maps = torch.tensor([[[1.0, 0.0], [1e-20, 1.0]]])
    assert torch.equal(head_pattern(maps, torch.ones(1)), maps > 0)
    assert not head_pattern(torch.zeros(1, 2, 2), torch.tensor([0.5])).any()


def test_a_budget_takes_the_blocks_of_most_mass() -> None:
    causal = torch.ones(4, 4).tril().bool()
    maps = torch.rand(2, 4, 4)
    found = densest_blocks(maps, causal, 0.5)
    assert found.sum((1, 2)).tolist() == [5, 5]
    assert not (found & ~causal).any()
    for chosen, one in zip(found, maps, strict=True):
        assert one[chosen].min() > one[~chosen & causal].max()


def test_pooled_is_a_softmax_of_each_row_on_mean_keys() -> None:
    inputs = random_layer(10, 10)
    expected = torch.zeros(3, 3)
    for row in range(10):
        masses = torch.zeros(3)
        for block in range(row // BLOCK + 1):
            keys = inputs.key[0, block * BLOCK : (block + 1) * BLOCK]
            seen = min(row + 1, 10) - block * BLOCK
            logit = inputs.query[0, row] @ keys.mean(0) * 0.5
            masses[block] = min(seen, BLOCK) * logit.exp()
        members = 4 if row < 8 else 2
        expected[row // BLOCK] += masses / masses.sum() / members
    torch.testing.assert_close(Pooled().estimate(inputs, ZERO)[0], expected)


def test_antidiagonal_means_tile_by_tile() -> None:
    inputs = random_layer(10, 14)
    stride, offset = 2, 4
    logits = inputs.query[0] @ inputs.key[0].T * 0.5
    expected = torch.zeros(3, 4)
    for tile in range(5):
        scores = []
        for other in range(7):
            first, last = other * stride, offset + tile * stride + stride - 1
            pair = logits[tile * stride + 1, first] + logits[tile * stride, first + 1]
            scores.append(pair / 2 if first <= last else torch.tensor(-torch.inf))
        weights = torch.stack(scores).softmax(0)
        for other in range(7):
            expected[tile // 2, other // 2] += weights[other] / (2 if tile < 4 else 1)
    torch.testing.assert_close(Antidiagonal(stride=2).estimate(inputs, ZERO)[0], expected)


def test_an_antidiagonal_stride_divides_the_block() -> None:
    with pytest.raises(ConfigError, match=r"stride must divide the block size \(4\), got 3"):
        Antidiagonal(stride=3).estimate(random_layer(8, 8), ZERO)


def test_flash_keeps_tiles_of_enough_energy() -> None:
    # One channel, queries of 1: the logit of a block is its key. In halves of the largest energy.
    key = torch.tensor([0.0, -1.0, -3.0, -0.5]).mul(math.log(2)).repeat_interleave(BLOCK)
    inputs = layer(torch.ones(1, BLOCK, 1), key[None, :, None])
    for alpha, kept in ((0.4, [1, 1, 0, 1]), (0.6, [1, 0, 0, 1]), (0.1, [1, 1, 1, 1])):
        found = Flash(alpha=alpha).select(inputs, ZERO, torch.ones(1)).pattern
        assert found[0, 0].int().tolist() == kept
    by_gamma = Flash().select(inputs, ZERO, torch.tensor([0.4])).pattern
    assert by_gamma[0, 0].int().tolist() == [1, 0, 0, 1]


def test_flash_has_one_maximum_for_a_query_block() -> None:
    """A row of small logits is hidden by one of large logits: so it is in FlashPrefill."""
    query = torch.zeros(1, BLOCK, 2)
    query[0, 0, 0], query[0, 1, 1] = 20.0, 1.0
    key = torch.zeros(1, 3 * BLOCK, 2)
    key[0, :BLOCK, 0], key[0, BLOCK : 2 * BLOCK, 1] = 1.0, 5.0
    inputs = layer(query, key)
    assert Flash(alpha=0.05).select(inputs, ZERO, torch.ones(1)).pattern[0, 0, 0]
    assert not Flash(alpha=0.05).select(inputs, ZERO, torch.ones(1)).pattern[0, 0, 1]
    assert Pooled().estimate(inputs, ZERO)[0, 0, 1] > 0.2


def test_flex_switches_by_how_well_pooling_tells_the_last_block() -> None:
    even = random_layer(32, 32)
    # Two keys of opposite sign in a block: its mean tells nothing of their mass.
    key = torch.zeros(1, 32, 8)
    key[0, 9], key[0, 10] = 8.0, -8.0
    uneven = layer(torch.ones(1, 32, 8), key)
    gamma = torch.tensor([0.7])
    slash = make_policy("vertical-slash")
    assert torch.equal(
        Flex(tau=0.1).select(uneven, ZERO, gamma).pattern, slash.select(uneven, ZERO, gamma).pattern
    )
    maps = Flex().estimate(even, ZERO)[2]
    assert torch.equal(Flex(tau=1.0).select(even, ZERO, gamma).pattern, head_pattern(maps, gamma))


@pytest.mark.parametrize("offset", [0, 7])
def test_decompose_fits_logits_that_are_lines(offset: int) -> None:
    """Least squares against a dense solver, and additive logits are found again."""
    n_query, n_key = 20, 20 + offset
    queries, keys = torch.randn(1, n_query, 8), torch.randn(1, n_key, 8)
    # Rotated channels, as with rotary positions: their product follows the distance.
    for tokens, start in ((queries, offset), (keys, 0)):
        angle = torch.arange(start, n_key) * 0.3
        tokens[0, :, 0] += 3 * angle.cos()
        tokens[0, :, 1] += 3 * angle.sin()
    logits = (queries @ keys.mT)[0].double()
    where = torch.arange(n_query) + offset
    columns = torch.arange(n_key)
    pairs = [(i, j) for i in range(n_query) for j in range(n_key) if j <= where[i]]
    design = torch.zeros(len(pairs), n_query + 2 * n_key, dtype=torch.float64)
    for number, (i, j) in enumerate(pairs):
        design[number, [i, n_query + j, n_query + n_key + int(where[i]) - j]] = 1
    wanted = torch.stack([logits[i, j] for i, j in pairs])
    best = (design @ (torch.linalg.pinv(design) @ wanted) - wanted).square().mean()
    vertical, slash = (line[0].double() for line in fit_lines(queries, keys))
    rest = logits - vertical[None, :] - slash[(where[:, None] - columns[None, :]).clamp(min=0)]
    seen = columns[None, :] <= where[:, None]
    rows = (rest * seen).sum(1) / seen.sum(1)
    error = ((rest - rows[:, None]) * seen).square().sum() / seen.sum()
    assert error < 1.05 * best + 1e-9
    assert error < 0.9 * logits[seen].var()


def test_decompose_thresholds() -> None:
    inputs = random_layer(64, 64)
    gamma = torch.tensor([0.5])
    at_error = Decompose(max_error=0.2).select(inputs, ZERO, gamma).pattern
    assert torch.equal(at_error, Decompose().select(inputs, ZERO, torch.tensor([0.9])).pattern)
    budget = Decompose(time_budget=0.25).select(inputs, ZERO, gamma).pattern
    assert int(budget.sum()) == round(0.25 * int(inputs.geometry.causal.sum()))
    with pytest.raises(ConfigError, match="give max_error or time_budget, not both"):
        Decompose(max_error=0.1, time_budget=0.1)
    with pytest.raises(ConfigError, match="time_budget = 0 must be above 0"):
        Decompose(time_budget=0)


def test_sampled_rows_of_a_whole_block_are_the_oracle() -> None:
    inputs = random_layer(16, 16)
    exact = sampled_maps(inputs, ZERO, None)
    torch.testing.assert_close(sampled_maps(inputs, ZERO, BLOCK), exact)
    gamma = torch.tensor([0.8])
    expected = select_blocks(exact, gamma, **inputs.geometry.sizes)
    assert torch.equal(make_policy("oracle").select(inputs, ZERO, gamma).pattern, expected)
    sampled = make_policy(f"sampled:rows={BLOCK}")
    assert torch.equal(sampled.select(inputs, ZERO, gamma).pattern, expected)


@pytest.mark.parametrize(("n_q", "n_k"), [(9, 9), (4, 9)])
def test_smoothing_leaves_lines_as_they_are(n_q: int, n_k: int) -> None:
    """A map that is one value along every diagonal keeps its shape."""
    causal = torch.arange(n_k)[None, :] <= torch.arange(n_k - n_q, n_k)[:, None]
    distance = torch.arange(n_k - n_q, n_k)[:, None] - torch.arange(n_k)[None, :]
    value = torch.rand(n_k)
    maps = (value[distance.clamp(min=0)] * causal)[None]
    flat = torch.full((1, n_q, n_k), 0.3) * causal
    for weights in (UNFITTED, ALL_LINES):
        found = smooth(flat, weights)
        torch.testing.assert_close(found, flat * (found.max() / 0.3))
        slanted = smooth(maps, weights)
        assert (slanted[~causal[None]] == 0).all()


def test_smoothing_takes_means_over_the_lines_of_a_block() -> None:
    causal = torch.ones(8, 8).tril().bool()
    maps = torch.zeros(1, 8, 8)
    maps[0, 5, 2] = 1.0
    found = smooth(maps, ALL_LINES)[0]
    scale = smooth(causal[None].float(), ALL_LINES).max()
    assert found[5, 2] == found.max() < scale
    assert found[4, 2] > 0
    assert found[6, 2] > 0
    # The rest of its diagonal has five entries; no other block shares a line with it.
    torch.testing.assert_close(found[7, 4], found[3, 0])
    assert found[7, 4] > 0
    assert found[7, 0] == 0


def test_smoothing_brings_the_order_of_blocks_nearer_to_the_truth() -> None:
    """A noisy map of verticals and diagonals: at as many blocks, more of the true mass."""
    n = 40
    causal = torch.ones(n, n).tril().bool()
    distance = (torch.arange(n)[:, None] - torch.arange(n)[None, :]).clamp(min=0)
    truth = (torch.rand(n).pow(4)[None, :] + torch.rand(n).pow(4)[distance]) * causal
    noisy = truth * torch.rand(n, n)
    covered = [
        truth[densest_blocks(maps[None], causal, 0.2)[0]].sum()
        for maps in (noisy, smooth(noisy[None], ALL_LINES)[0])
    ]
    assert covered[1] > 1.05 * covered[0]


def test_one_level_for_all_heads_is_the_best_mean_recall() -> None:
    """Of all patterns of as many blocks over all heads, none holds more estimated mass."""
    inputs = random_layer(64, 64, heads=3)
    inputs.query[0] *= 4
    every = torch.arange(3)
    policy = GlobalThreshold(rows=BLOCK)
    estimate = policy.estimate(inputs, every)
    share = estimate / estimate.sum((1, 2), keepdim=True)
    found = policy.choose(inputs, estimate, torch.full((3,), 0.6))
    ranked = share.flatten().sort(descending=True).values
    assert share[found].sum() >= ranked[: int(found.sum())].sum() - 1e-5
    counts = found.sum((1, 2)).tolist()
    assert counts[0] < min(counts[1:])
    assert torch.equal(policy.choose(inputs, estimate, torch.ones(3)), estimate > 0)


def test_a_level_bounds_the_estimated_mass_that_a_row_skips() -> None:
    inputs = random_layer(64, 64)
    policy = GlobalThreshold()
    estimate = policy.estimate(inputs, ZERO)
    kept = policy.choose(inputs, estimate, torch.tensor([0.9]))
    rows = (estimate * ~kept).sum(-1) * 16 / estimate.sum()
    counts = inputs.geometry.causal.sum(-1) / inputs.geometry.causal.sum() * 16
    assert (rows <= -math.log(0.9) * counts + 1e-5).all()
