"""What a session can do with each layer of a model, and which of its heads a process holds."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from shareprefill.errors import UnsupportedError
from shareprefill.files import printable
from shareprefill.models import attention_layers, geometry, require_attention, text_decoder
from shareprefill.runtime.crossover import LayerSizes
from shareprefill.runtime.interface import AttentionCall, attached
from shareprefill.runtime.tensor_parallel import HeadShard

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PROBE_TOKENS = 4


class LayerKind(StrEnum):
    """How a layer's prefill is computed under a session."""

    SHARED = "shared"
    WINDOW = "window, dense"
    OWN = "own attention"
    OWN_MASK = "own mask, dense"
    NONE = "not attention"


@dataclass(frozen=True)
class LayerUse:
    """One layer's kind, and the reason where it is not shared.

    Attributes:
        index: Layer index.
        kind: How its prefill is computed.
        reason: Why it is not shared; empty where it is.
    """

    index: int
    kind: LayerKind
    reason: str


@torch.no_grad()
def layer_uses(model: PreTrainedModel) -> tuple[LayerUse, ...]:
    """Runs a few tokens through a model and looks at every layer's attention call.

    Attention itself is not computed, so a model on the meta device will do where the rest of its
    forward pass runs there.

    Args:
        model: A transformers decoder.

    Returns:
        The layers in order.

    Raises:
        UnsupportedError: the model cannot run under a session.
        RuntimeError: the forward pass needs values that a model on the meta device has not.
    """
    found: dict[int, LayerUse] = {}
    require_attention(model)
    attention_layers(model)

    names = getattr(model.config.get_text_config(decoder=True), "layer_types", None) or ()

    def probe(call: AttentionCall) -> Tensor:
        found[call.layer] = _use_of(call, _layer_name(names, call.layer))
        return call.query.new_zeros((*call.query.shape[:3], call.value.shape[-1]))

    device = cast(Any, model).get_input_embeddings().weight.device
    ids = torch.zeros(1, _PROBE_TOKENS, dtype=torch.int64, device=device)
    with attached(model, probe):
        # With a cache, positions are not read for where packed sequences begin.
        cast(Any, model)(input_ids=ids, use_cache=True)
    sizes = geometry(model)
    return tuple(
        found.get(index)
        or LayerUse(index, LayerKind.NONE, _layer_name(names, index) or "no attention")
        for index in range(sizes.layers)
    )


def _use_of(call: AttentionCall, name: str) -> LayerUse:
    if call.needs_family is not None and call.extras is None:
        return LayerUse(call.layer, LayerKind.OWN, call.needs_family)
    if call.facts is None:
        return LayerUse(call.layer, LayerKind.OWN_MASK, name or "masked attention")
    if call.facts.window is not None:
        return LayerUse(call.layer, LayerKind.WINDOW, f"sliding window of {call.facts.window}")
    return LayerUse(call.layer, LayerKind.SHARED, "")


def _layer_name(names: Any, index: int) -> str:
    """The configuration's word for a layer, empty where it has none."""
    return printable(str(names[index])).replace("_", " ") if index < len(names) else ""


def head_shard(model: torch.nn.Module) -> HeadShard | None:
    """How a model's attention is divided over processes; None where it is not.

    Transformers' tensor parallelism (`tp_plan="auto"`) divides the projections of an attention
    module along its heads, contiguously: process r of S holds heads r * H / S and on.

    Args:
        model: A transformers decoder.

    Raises:
        UnsupportedError: its attention is divided over more than one dimension of a device mesh.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return None
    from torch.distributed.tensor import DTensor

    for layer in attention_layers(model):
        for parameter in layer.module.parameters():
            if isinstance(parameter, DTensor):
                dims = [i for i, p in enumerate(parameter.placements) if _divides(parameter, i, p)]
                if len(dims) > 1:
                    raise UnsupportedError(
                        "attention that is divided over several dimensions of a device mesh is not "
                        "supported: use tensor parallelism alone (tp_plan='auto')"
                    )
                if dims:
                    mesh = parameter.device_mesh
                    return HeadShard(
                        mesh.get_local_rank(dims[0]), mesh.size(dims[0]), mesh.get_group(dims[0])
                    )
    return None


def layer_sizes(model: PreTrainedModel, shard: HeadShard | None = None) -> LayerSizes:
    """What a process computes in a layer of a model.

    Args:
        model: A transformers decoder.
        shard: The process's part of it.
    """
    sizes = geometry(model)
    config = model.config.get_text_config(decoder=True)
    experts = getattr(config, "num_experts_per_tok", None)
    parameters = _met_by_a_token(text_decoder(model), experts if isinstance(experts, int) else 1)
    processes = 1 if shard is None else shard.size
    return LayerSizes(
        heads=sizes.heads // processes,
        head_dim=sizes.head_dim,
        parameters=parameters // (sizes.layers * processes),
        hidden=getattr(config, "hidden_size", None) or sizes.heads * sizes.head_dim,
    )


def _met_by_a_token(decoder: torch.nn.Module, n_experts: int) -> int:
    """Parameters of a decoder's matrices, embeddings left out, and of so many experts a layer."""
    found, listed = 0.0, dict[str, int]()
    for name, module in decoder.named_modules():
        if isinstance(module, torch.nn.ModuleList):
            listed[name] = len(module)
        parts = name.split(".")
        is_expert = "experts" in parts
        holder = ".".join(parts[: parts.index("experts") + 1]) if is_expert else ""
        for parameters, first_size in _matrices(module):
            # In a list, or all in one tensor.
            experts = listed.get(holder, first_size)
            found += parameters * (min(n_experts / experts, 1) if is_expert else 1)
    return int(found)


def _matrices(module: torch.nn.Module) -> list[tuple[int, int]]:
    """Parameters of the matrices that a module itself holds, and the first size of each."""
    if isinstance(module, torch.nn.Embedding):
        return []
    rows, columns = (getattr(module, side, None) for side in ("in_features", "out_features"))
    if isinstance(rows, int) and isinstance(columns, int):
        # Quantised ones hold their numbers in other shapes.
        return [(rows * columns, columns)]
    return [(p.numel(), len(p)) for p in module.parameters(recurse=False) if p.dim() > 1]


def _divides(parameter: Any, dim: int, placement: Any) -> bool:
    """Whether a mesh dimension divides a parameter for good: FSDP gathers it before its use."""
    names = parameter.device_mesh.mesh_dim_names
    sharded = names is not None and "fsdp" in names[dim]
    return placement.is_shard() and not sharded and parameter.device_mesh.size(dim) > 1
