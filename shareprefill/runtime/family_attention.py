"""Attention that our operators cannot compute: the model's own function does it instead."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shareprefill.errors import UnsupportedError

# Keyword arguments of an attention call that change nothing beside what its mask says already, or
# that transformers' eager functions pass over. All others are either handed to a function that
# knows them or refused: an option that is not known here may change the result.
HARMLESS_OPTIONS = frozenset(
    {
        "cache_position",
        "cu_seq_lens_k",
        "cu_seq_lens_q",
        "is_causal",
        "logits_to_keep",
        "max_length_k",
        "max_length_q",
        "num_items_in_batch",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "past_key_values",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "seq_idx",
        "sliding_window",
        "use_cache",
    }
)

_SOFT_CAP, _SINKS = "softcap", "s_aux"
_ROW_BY_ROW = frozenset({_SOFT_CAP, _SINKS})
_WORDS = {
    _SOFT_CAP: "logit soft-capping",
    _SINKS: "attention sinks",
    "indices": "keys that it selects by itself ('indices')",
}
# Tokens on which a family's function is compared with what its options are taken to mean.
_PROBE = 8
# Logits that one call of the model's own function may make, and its rows at most.
_LOGITS, _ROWS = 2**26, 1024


def active_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of an attention call that may change its result."""
    return {
        name: value
        for name, value in options.items()
        if value is not None and name not in HARMLESS_OPTIONS
    }


def is_causal(module: nn.Module, options: Mapping[str, Any]) -> bool:
    """Whether a call is causal where its mask does not say."""
    chosen = options.get("is_causal")
    return bool(getattr(module, "is_causal", True) if chosen is None else chosen)


def needs_family(module: nn.Module, options: Mapping[str, Any]) -> str | None:
    """Why only the model's own function can compute a call; None where plain attention does.

    Args:
        module: The attention module.
        options: Keyword arguments of the call.

    Raises:
        UnsupportedError: it needs the model's own function, and there is none that knows all of
            the call's options.
    """
    active, causal = active_options(options), is_causal(module, options)
    if causal and not active:
        return None
    reasons = [_WORDS.get(name, f"the option {name!r}") for name in sorted(active)]
    if not causal:
        reasons.append("attention that is not causal")
    reason = " and ".join(reasons)
    function = _family_function(module)
    unknown = [name for name in sorted(active) if function and not _knows(function, name)]
    if function is None or unknown:
        raise UnsupportedError(
            f"{type(module).__name__} uses {reason}, which neither this version nor transformers' "
            "eager attention of that family computes; run the model without a session"
        )
    return reason


@dataclass(frozen=True)
class LogitExtras:
    """What a call lays over plain attention that our operators compute too.

    Attributes:
        softcap: c of a soft-cap of the scaled logits, `c * tanh(logit / c)`; None for none.
        sinks: `[H]`, one more logit in each head's softmax, without a value; None for none.
    """

    softcap: float | None = None
    sinks: Tensor | None = None


_meanings: dict[tuple[Any, frozenset[str]], bool] = {}


def known_extras(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    options: Mapping[str, Any],
) -> LogitExtras | None:
    """The soft-cap and the sinks of a call, if its family's function means just these by them.

    That is not read off the options' names: at the first call of a function, its result on a few
    random tokens is compared with our own. (Without values, on the meta device, the names have to
    do.)

    Args:
        module: The attention module.
        query: `[B, H, Lq, D]`.
        key: `[B, G, Lk, D]`.
        value: `[B, G, Lk, Dv]`.
        scale: Factor on the logits.
        options: Keyword arguments of the call, which `needs_family` found to be known.

    Returns:
        The extras; None where only the model's own function can compute the call.
    """
    active = active_options(options)
    softcap, sinks = active.get(_SOFT_CAP), active.get(_SINKS)
    if not active or not active.keys() <= _ROW_BY_ROW or not is_causal(module, options):
        return None
    if softcap is not None and not (isinstance(softcap, int | float) and softcap > 0):
        return None
    if sinks is not None and not (isinstance(sinks, Tensor) and sinks.shape == query.shape[1:2]):
        return None
    extras = LogitExtras(None if softcap is None else float(softcap), sinks)
    if query.is_meta:
        return extras
    place = (_family_function(module), frozenset(active))
    if place not in _meanings:
        heads, head_dim = query.shape[1], query.shape[3]
        sizes = ((heads, head_dim), (key.shape[1], head_dim), (key.shape[1], value.shape[3]))
        probes = [
            _probe(sizes, scale, level, query.device) for level in {0.0, extras.softcap or 0.0}
        ]
        _meanings[place] = all(_means(extras, module, *probe, scale, options) for probe in probes)
    return extras if _meanings[place] else None


def _probe(
    sizes: tuple[tuple[int, int], ...], scale: float, level: float, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of a few tokens, float32, whose logits are about `level`, ± 1.

    There a soft-cap of that size halves their differences, which the result shows.
    """
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, heads, _PROBE, dim, generator=generator, dtype=torch.float32, device="cpu")
        for heads, dim in sizes
    )
    for tensor in (query, key):
        tensor *= (scale * tensor.shape[-1] ** 0.5) ** -0.5
        tensor[..., 0] = (level / scale) ** 0.5
    return query.to(device), key.to(device), value.to(device)


@torch.no_grad()
def _means(
    extras: LogitExtras,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    options: Mapping[str, Any],
) -> bool:
    """Whether a family's function computes what the extras say, on a few tokens."""
    tokens = query.shape[2]
    mask = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device).tril()
    found = family_attention(module, query, key, value, mask[None, None], scale, options).float()
    repeats = query.shape[1] // key.shape[1]
    logits = query @ key.repeat_interleave(repeats, 1).transpose(-1, -2) * scale
    if extras.softcap is not None:
        logits = extras.softcap * torch.tanh(logits / extras.softcap)
    logits = logits.masked_fill(~mask, -torch.inf)
    if extras.sinks is not None:
        sinks = extras.sinks.float()[None, :, None, None].expand(*logits.shape[:3], 1)
        logits = torch.cat([logits, sinks], -1)
    weights = torch.softmax(logits, -1)[..., :tokens]
    expected = weights @ value.repeat_interleave(repeats, 1)
    # Sinks may be in half precision, and with them the softmax.
    return bool((found - expected).norm() < 2e-2 * expected.norm())


def family_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    options: Mapping[str, Any],
) -> Tensor:
    """The attention function that transformers has for a module's family (its eager one).

    Args:
        module: The attention module.
        query: `[B, H, Lq, D]`.
        key: `[B, G, Lk, D]`.
        value: `[B, G, Lk, Dv]`.
        mask: `[B, 1, Lq, Lk]`, bool (True may be read) or additive; None reads everything.
        scale: Factor on the logits.
        options: Keyword arguments of the call.

    Returns:
        `[B, H, Lq, Dv]`.
    """
    function = _family_function(module)
    assert function is not None, "needs_family refuses such a module"
    if mask is not None and mask.dtype == torch.bool:
        lowest = torch.finfo(query.dtype).min
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, lowest)
    out, _ = function(module, query, key, value, mask, scaling=scale, dropout=0.0, **options)
    return out.transpose(1, 2)


def implementation(module: nn.Module, name: str | None) -> Callable[..., Any]:
    """The attention function that transformers would call a module's attention with.

    Args:
        module: The attention module.
        name: An implementation of transformers; None for the eager one.

    Raises:
        UnsupportedError: it is the eager one, and the module's file has none.
    """
    if name not in (None, "eager"):
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        return ALL_ATTENTION_FUNCTIONS[name]
    function = _family_function(module)
    if function is None:
        raise UnsupportedError(
            f"{type(module).__name__} has no eager attention that could be called: set the model "
            "to another attention implementation before the session"
        )
    return function


def rows_at_once(module: nn.Module, query: Tensor, key: Tensor, options: Mapping[str, Any]) -> int:
    """Query rows that one call of the model's own function may take, to bound its memory.

    Options that are not known may hold something for every row: such calls are not divided.
    """
    if not is_causal(module, options) or not active_options(options).keys() <= _ROW_BY_ROW:
        return query.shape[2]
    a_row = query.shape[0] * query.shape[1] * key.shape[2]
    return max(1, min(_ROWS, _LOGITS // a_row))


def _family_function(module: nn.Module) -> Callable[..., tuple[Tensor, Any]] | None:
    """`eager_attention_forward` of the file that a module's class is from.

    Transformers takes that function for a family's definition: the other implementations are
    registered for all families, and some of them pass over soft-capping and sinks.
    """
    for kind in type(module).__mro__:
        function = getattr(sys.modules.get(kind.__module__), "eager_attention_forward", None)
        if function is not None:
            return function
    return None


def _knows(function: Callable[..., Any], option: str) -> bool:
    """Whether a function reads an option; `**kwargs` alone would swallow it unread."""
    function = inspect.unwrap(function)
    if option in inspect.signature(function).parameters:
        return True
    # Eager functions take the sinks off the module instead of the argument.
    code = getattr(function, "__code__", None)
    return option == _SINKS and code is not None and "sinks" in code.co_names
