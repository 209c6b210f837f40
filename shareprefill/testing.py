"""Checks that every policy passes, ours and those from outside.

from shareprefill.testing import check_policy

def test_strided() -> None:
    check_policy("my_package.strided:Strided:stride=4")
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from shareprefill.runtime.geometry import Geometry
from shareprefill.runtime.policies import make_policy
from shareprefill.runtime.policies.base import LayerInputs, SelectionPolicy

BLOCK = 16
HEADS, KV_HEADS = 4, 2
# Query rows and keys: whole blocks and parts of them, whole prompts and chunks, one row.
SIZES = ((101, 101), (64, 64), (30, 101), (16, 16), (1, 70))
# Share of the blocks that rounding must leave as they are.
_SAME_BUT_FOR_ROUNDING = 0.98


def check_policy(policy: str | SelectionPolicy, *, device: str = "cpu") -> None:
    """Runs all checks on a policy.

    Args:
        policy: A policy, or its name with its parameters.
        device: Where to run them. On a GPU it is also checked that the policy never waits for it.

    Raises:
        AssertionError: a check fails; says what was expected, and why.
        ConfigError: there is no such policy, or it gives no bitmaps of blocks.
    """
    made = make_policy(policy) if isinstance(policy, str) else policy
    for check in CHECKS:
        check(made, torch.device(device))


def layer_inputs(
    n_query: int = 101,
    n_key: int = 101,
    *,
    heads: int = HEADS,
    block: int = BLOCK,
    device: torch.device | str = "cpu",
    **options: Any,
) -> LayerInputs:
    """Random inputs with structure: a few keys attract every query.

    Args:
        n_query: Query rows, the last ones of the sequence.
        n_key: Keys.
        heads: Query heads, over two KV heads.
        block: Tokens a block.
        device: Where they are.
        options: Further fields of `LayerInputs`.
    """
    query = torch.randn(heads, n_query, 16, device="cpu", dtype=torch.float32)
    key = torch.randn(KV_HEADS, n_key, 16, device="cpu", dtype=torch.float32)
    query[..., 0] += 4
    key[:, 20:24, 0] += 4
    place = torch.device(device)
    geometry = Geometry(n_query, n_key, place, block_size=block, sink_blocks=1, local_blocks=2)
    return LayerInputs(query.to(place), key.to(place), 0.25, geometry, **options)


def check_bitmaps(policy: SelectionPolicy, device: torch.device) -> None:
    """Gives a bitmap of blocks for every head, causal ones alone, and an amount of work."""
    for n_query, n_key in SIZES:
        inputs = layer_inputs(n_query, n_key, device=device)
        found = policy.select(inputs, *_every_head(inputs))
        case = f"{n_query} query rows of {n_key} keys, blocks of {BLOCK}"
        wanted = (HEADS, *inputs.geometry.shape)
        _require(
            tuple(found.pattern.shape) == wanted and found.pattern.dtype == torch.bool,
            f"{case}: the pattern is {list(found.pattern.shape)}, {found.pattern.dtype}; it must "
            f"be {list(wanted)} (heads, query blocks, key blocks), torch.bool",
        )
        _require(
            not (found.pattern & ~inputs.geometry.causal).any(),
            f"{case}: blocks are chosen that are not causal. Query block i is at key block "
            "i + n_k - n_q, as a chunk has the last query rows alone: use layer.geometry.causal",
        )
        # Of a few rows, sampling each one is more than all of them.
        _require(
            n_query <= 2 * BLOCK or 0 <= found.work <= 0.5,
            f"{case}: work = {found.work!r}; it must be from 0 to 0.5, which is all logits of "
            "dense attention",
        )


def check_threshold(policy: SelectionPolicy, device: torch.device) -> None:
    """Takes no fewer blocks for more mass; a policy without a threshold takes as many."""
    inputs = layer_inputs(device=device)
    counts = [int(_pattern(policy, inputs, gamma).sum()) for gamma in (0.3, 0.6, 0.9, 0.99)]
    _require(
        counts == sorted(counts),
        f"more attention mass to cover takes fewer blocks: {counts} at gamma .3, .6, .9 and .99",
    )


def check_heads_are_alone(policy: SelectionPolicy, device: torch.device) -> None:
    """Chooses for a head whatever the others are: they may be in another process."""
    inputs = layer_inputs(device=device)
    heads, _ = _every_head(inputs)
    gamma = torch.linspace(0.5, 0.9, HEADS, device=device)
    whole = policy.select(inputs, heads, gamma).pattern
    half = LayerInputs(inputs.query[:2], inputs.key[:1], inputs.scale, inputs.geometry)
    _require(
        _is_same(policy.select(half, heads[:2], gamma[:2]).pattern, whole[:2]),
        "heads 0 and 1 read other blocks in a process of their own than beside heads 2 and 3, so "
        "that tensor parallelism would change the result",
    )
    order = torch.tensor([2, 0, 3], device=device)
    some = policy.select(inputs, order, gamma[order]).pattern
    _require(
        _is_same(some, whole[order]),
        "heads 2, 0 and 3 alone get other blocks than among all heads: pattern s must be of head "
        "heads[s] at gamma[s]",
    )
    not_all = torch.tensor([-1, 3, -1], device=device)
    one = policy.select(inputs, not_all, gamma[[0, 3, 1]]).pattern
    _require(
        _is_same(one[1], whole[3]),
        "head 3 gets other blocks beside heads of number -1, which need no pattern",
    )


def check_key_heads(policy: SelectionPolicy, device: torch.device) -> None:
    """Reads the keys of the group: head h those of KV head h // (H / G)."""
    inputs = layer_inputs(device=device)
    repeated = inputs.key.repeat_interleave(HEADS // KV_HEADS, 0)
    expanded = LayerInputs(inputs.query, repeated, inputs.scale, inputs.geometry)
    _require(
        _is_same(_pattern(policy, inputs), _pattern(policy, expanded)),
        "grouped KV heads give other blocks than the same keys repeated for every query head: "
        "query head h reads KV head h // (H / G)",
    )


def check_softcap(policy: SelectionPolicy, device: torch.device) -> None:
    """Works with a soft-cap, and one beyond all logits changes nothing."""
    inputs = layer_inputs(device=device)
    capped = LayerInputs(inputs.query, inputs.key, inputs.scale, inputs.geometry, softcap=1e4)
    _require(
        _is_same(_pattern(policy, inputs), _pattern(policy, capped)),
        "a soft-cap far above all logits changes the blocks",
    )


def check_half_precision(policy: SelectionPolicy, device: torch.device) -> None:
    """Chooses nearly the same from inputs in half precision."""
    inputs = layer_inputs(device=device)
    half = LayerInputs(inputs.query.half(), inputs.key.half(), inputs.scale, inputs.geometry)
    same = (_pattern(policy, half) == _pattern(policy, inputs)).float().mean().item()
    _require(
        same > _SAME_BUT_FOR_ROUNDING,
        f"float16 inputs change {1 - same:.1%} of the blocks, at most "
        f"{1 - _SAME_BUT_FOR_ROUNDING:.0%} may: sum and exponentiate in float32",
    )


def check_inputs_are_kept(policy: SelectionPolicy, device: torch.device) -> None:
    """Leaves queries and keys as they are, and chooses the same again."""
    inputs = layer_inputs(device=device)
    query, key = inputs.query.clone(), inputs.key.clone()
    first = _pattern(policy, inputs)
    _require(
        torch.equal(query, inputs.query) and torch.equal(key, inputs.key),
        "the policy changes the layer's queries or keys, which attention is computed of next",
    )
    _require(torch.equal(first, _pattern(policy, inputs)), "a second call chooses other blocks")


def check_memory(policy: SelectionPolicy, device: torch.device) -> None:
    """Makes no tensor that grows with the square of the tokens."""
    n = 2048
    inputs = layer_inputs(n, n, heads=2, block=64, device=device)
    with LargestTensor() as largest:
        policy.select(inputs, *_every_head(inputs, 0.9))
    _require(
        largest.elements < n * n // 2,
        f"a tensor of {largest.elements} numbers is made for 2 heads of {n} tokens: one of all "
        "pairs of tokens does not fit for a long prompt; work block by block",
    )


def check_waits_for_nothing(policy: SelectionPolicy, device: torch.device) -> None:
    """Reads no value of a tensor on the host; that can be seen on a GPU only."""
    if device.type != "cuda":
        return
    inputs = layer_inputs(500, 500, block=64, device=device)
    arguments = _every_head(inputs)
    policy.select(inputs, *arguments)  # compiles
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        policy.select(inputs, *arguments)
    except RuntimeError as error:
        raise AssertionError(
            f"the policy waits for the GPU ({error}): read no values of tensors on the host, "
            "neither by item() nor by if or nonzero()"
        ) from error
    finally:
        torch.cuda.set_sync_debug_mode(before)


CHECKS: tuple[Callable[[SelectionPolicy, torch.device], None], ...] = (
    *(check_bitmaps, check_inputs_are_kept, check_threshold, check_heads_are_alone),
    *(check_key_heads, check_softcap, check_half_precision, check_memory, check_waits_for_nothing),
)


class LargestTensor(TorchDispatchMode):
    """Records the largest storage among the results of all operations, in elements."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(
        self, function: Any, _types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Runs an operation, and looks at its results."""
        found = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(found):
            if isinstance(leaf, Tensor):
                size = leaf.untyped_storage().nbytes() // leaf.element_size()
                self.elements = max(self.elements, size)
        return found


def _every_head(inputs: LayerInputs, gamma: float = 0.8) -> tuple[Tensor, Tensor]:
    heads = torch.arange(len(inputs.query), device=inputs.query.device)
    return heads, torch.full_like(heads, gamma, dtype=torch.float32)


def _pattern(policy: SelectionPolicy, inputs: LayerInputs, gamma: float = 0.8) -> Tensor:
    return policy.select(inputs, *_every_head(inputs, gamma)).pattern


def _is_same(pattern: Tensor, other: Tensor) -> bool:
    """Whether patterns are equal; on a GPU, whose sums come in another order, but for rounding."""
    if pattern.device.type == "cpu":
        return torch.equal(pattern, other)
    return (pattern == other).float().mean().item() > _SAME_BUT_FOR_ROUNDING


def _require(holds: bool | Tensor, text: str) -> None:
    """An AssertionError, as tests raise; `assert` would not hold under `python -O`."""
    if not holds:
        raise AssertionError(text)
