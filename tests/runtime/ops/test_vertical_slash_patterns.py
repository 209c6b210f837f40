"""Vertical-slash patterns in two launches: those of the profiles and what covers gamma of them."""

from __future__ import annotations

import pytest
import torch

from shareprefill.errors import ConfigError
from shareprefill.runtime.ops.block_selection import (
    SparseGuard,
    sparse_heads,
    vertical_slash_blocks,
)
from shareprefill.runtime.ops.blocks import count_blocks
from shareprefill.runtime.ops.vertical_slash import (
    vertical_slash_patterns,
    vertical_slash_profile,
)

DEVICES = [
    pytest.param("cpu", marks=pytest.mark.interpreter),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
# (Nq, Nk, block); the last ones of the GPU alone: one program a head, and beyond.
SHAPES = [(36, 58, 16), (20, 20, 16)]
LARGE = [(8192, 8192, 128), (1111, 3000, 128), (17_000, 17_000, 128)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [*SHAPES, *LARGE], ids=str)
@pytest.mark.parametrize(("is_guarded", "delta"), [(False, 0.0), (True, 0.0), (True, 0.9)])
def test_patterns_are_those_of_the_operators_alone(
    is_guarded: bool,
    delta: float,
    shape: tuple[int, int, int],
    device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    n_q, n_k, block = shape
    if device == "cpu":
        from shareprefill.runtime.ops.vertical_slash import triton

        if shape in LARGE:
            pytest.skip("too long for the interpreter")
        # Several steps of few columns.
        monkeypatch.setitem(triton.PATTERN_OPTIONS, "STEP", 2)
    dtype, dim = (torch.float32, 16) if device == "cpu" else (torch.bfloat16, 128)
    query, key = (
        torch.randn(heads, tokens, dim, device=device).to(dtype)
        for heads, tokens in ((4, n_q), (2, n_k))
    )
    query[0, :, 0] += 3
    key[:, : n_k // 3, 0] += 2
    key[1, n_k // 2, 0] = torch.nan
    heads = torch.tensor([1, 0, -1, 3], device=device)
    gamma = torch.tensor([0.9, 0.6, 0.5, 0.9], device=device)
    size = (4, count_blocks(n_q, block), count_blocks(n_k, block))
    # A part of a larger tensor, which starts at no multiple of 16.
    out = torch.ones(4 * size[1] * size[2] + 3, dtype=torch.bool, device=device)[3:].view(size)
    finite = torch.ones(4, dtype=torch.bool, device=device)
    reads = {"block_size": block, "sink_blocks": 1, "local_blocks": 2}
    given: dict[str, object] = {"block_size": block, "scale": 0.3, "heads": heads}
    # Heads that read the patterns 3 to 6, and what else is asked for; the last are other patterns'.
    requested = torch.tensor([4, 3, 9, 6, *range(10, 160)], device=device)
    guard = SparseGuard(n_heads=4, delta=delta, first=3, otherwise=20, place=150)
    guarded = {"requested": requested, "guard": guard} if is_guarded else {}
    vertical, decided = vertical_slash_patterns(
        query, key, gamma, **(given | reads), out=out, finite=finite, **guarded, impl="triton"
    )
    masses = vertical_slash_profile(query, key, **given, impl="triton")
    known = torch.zeros_like(finite)
    wanted = vertical_slash_blocks(
        *masses, gamma, n_query=n_q, n_key=n_k, **reads, finite=known, impl="triton"
    )
    # Sums within a program of another size may be rounded otherwise.
    torch.testing.assert_close(vertical, masses[0], rtol=0, atol=1e-6, equal_nan=True)
    assert torch.equal(finite, known)
    assert finite.tolist() == [True, True, True, False]
    assert (out != wanted).float().mean() <= (0 if device == "cpu" else 1e-3)
    if is_guarded:
        assert torch.equal(decided, sparse_heads(masses[0], requested, guard, impl="reference"))
        assert (decided[1] == 3) == (delta == 0.0)
    else:
        assert decided is None


def test_places_that_do_not_fit_are_refused() -> None:
    query, key = torch.randn(2, 20, 16), torch.randn(1, 20, 16)
    out, finite = torch.ones(2, 2, 2, dtype=torch.bool), torch.ones(2, dtype=torch.bool)
    options = {"block_size": 16, "sink_blocks": 1, "local_blocks": 1}
    with pytest.raises(ConfigError, match=r"out must be bool \[2, 2, 2\]"):
        vertical_slash_patterns(query, key, torch.ones(2), **options, out=out[:, :1], finite=finite)
    with pytest.raises(ConfigError, match="out must be contiguous"):
        vertical_slash_patterns(
            query, key, torch.ones(2), **options, out=out.transpose(0, 1), finite=finite
        )
