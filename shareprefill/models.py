"""Models by name: where they lie, how they are loaded, and what tells one from another."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import math
import os
import pickle
import re
import struct
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from shareprefill.errors import ConfigError, ModelError, UnsupportedError
from shareprefill.files import kind_of, printable
from shareprefill.weights import (
    adapter_settings,
    all_weights,
    base_weights,
    has_adapters,
    sketch,
)

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# Name: folder in the package's `assets`.
BUILT_IN = {"sp-tiny": "sp-tiny"}
_LONGEST_ID = 200  # characters; as a file's name it must not be too long either
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# A module that projects to queries under one of these names is an attention module.
_PROJECTIONS = ("q_proj", "qkv_proj", "query_key_value", "c_attn", "Wqkv", "W_pack", "q_a_proj")
_PROJECTIONS += ("q_b_proj", "wq", "query")


# What a configuration says of files, and of how a model is loaded.
_NOT_OF_THE_MODEL = frozenset(
    ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version")
)
# What a configuration says of attention besides its sizes and RoPE, by transformers' names:
# positions, the keys that a layer sees, and what becomes of logits.
_OF_ATTENTION = (
    *("alibi", "alibi_bias_max", "compress_rope_theta", "layer_rope_theta", "no_rope_layers"),
    *("position_embedding_type", "rope_interleave", "rope_ratio", "rotary_dim", "swa_rope_theta"),
    *("attention_chunk_size", "attention_layers", "attention_window_size", "index_topk"),
    *("keep_window_size", "layer_types", "local_attention", "sliding_window"),
    *("sliding_window_size", "use_bidirectional_attention", "window_size"),
    *("attention_multiplier", "attn_logit_softcapping", "attn_scale", "attn_temperature_tuning"),
    *("clip_qkv", "floor_scale", "key_multiplier", "log_scaling_alpha", "log_scaling_n_floor"),
    *("qk_l2_clip_threshold", "qk_layernorm", "qk_ln", "query_pre_attn_scalar"),
    *("scale_attn_by_inverse_layer_idx", "scale_attn_weights", "softmax_scale"),
    *("use_dynamic_ntk", "use_logn_attn", "use_qk_norm"),
)
# Names of RoPE's base and of the part of a head that it turns; those behind the first are older.
_THETAS = ("rope_theta", "rotary_emb_base")
_ROTARY_PARTS = ("partial_rotary_factor", "rotary_pct", "rotary_emb_fraction")
# Settings that a message names of those that differ.
_SHOWN = 6
# Pieces of each weight that a digest of the model reads, and values of a piece.
_DIGEST_PIECES = (16, 4096)
# Tables of positions, by the names that they have in transformers' decoders.
_POSITION_TABLES = ("wpe", "embed_positions", "positions_embed", "position_embeddings")
_POSITION_TABLES += ("position_embedding", "position_embeds_layer", "pos_encoding")


@dataclass(frozen=True)
class ModelGeometry:
    """The sizes of a model's attention: layers L, query heads H, KV heads G, head dimension D."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class Fingerprint:
    """What an artifact fits. Two are equal if architecture and weights are.

    Attributes:
        model_type: The architecture's name.
        geometry: Sizes of its attention.
        weights: SHA-256 of the attention weights.
        sketch: Numbers that say how far other attention weights are, in hexadecimal, one layer
            behind the other (`shareprefill.weights`); empty where there are none.
        checkpoint: SHA-256 over the model's files (`shareprefill.checkpoint`), for engines that
            keep weights in another shape; empty where the model did not come from such files.
        attention: What the configuration says of positions, windows and logits
            (`attention_settings`); None where it is not known, as in files of earlier versions.
    """

    model_type: str
    geometry: ModelGeometry
    weights: str
    sketch: str = field(default="", compare=False, repr=False)
    checkpoint: str = field(default="", compare=False, repr=False)
    attention: dict[str, Any] | None = field(default=None, compare=False, repr=False)

    def describe(self) -> str:
        """The architecture in words, for messages."""
        sizes = self.geometry
        return (
            f"{printable(self.model_type)} of {sizes.layers} layers, {sizes.heads} heads, "
            f"{sizes.kv_heads} KV heads, head_dim {sizes.head_dim}"
        )


@dataclass(frozen=True, eq=False)
class AttentionLayer:
    """A self-attention module and the index of its decoder layer."""

    index: int
    module: nn.Module


def resolve_model(name: str) -> str:
    """The folder of a built-in or local model, or its GGUF file; the name itself for a hub id.

    Raises:
        ModelError: the name is a path that does not exist, or no valid name at all.
    """
    if name in BUILT_IN:
        return str(resources.files("shareprefill") / "assets" / BUILT_IN[name])
    path = _local(name)
    kind = kind_of(path) if name else None
    if kind == "folder" or (kind == "file" and _is_gguf(path)):
        return str(path)
    if kind == "file":
        raise ModelError(
            f"{printable(name)} is a file: name the folder that holds the model, or a .gguf file"
        )
    if name and _is_gguf(path):
        raise ModelError(f"there is no file {printable(name)!r}: check the path")
    if _HUB_ID.fullmatch(name) is None or len(name) > _LONGEST_ID:
        raise ModelError(
            f"there is no model folder {printable(name)!r}: check the path, or name a hub id "
            f"(organisation/name) or a built-in model ({', '.join(BUILT_IN)})"
        )
    return name


def _local(name: str) -> Path:
    # Not `Path.expanduser`, which raises where there is no such user.
    return Path(os.path.expanduser(name))


def model_slug(name: str) -> str:
    """A folder name for a model: `org--name` of a hub id, the last part of a local path."""
    if name in BUILT_IN:
        return name
    path = _local(name)
    is_local = kind_of(path) == "folder" or _is_gguf(path)
    text = path.resolve().name if is_local else name.strip("/").replace("/", "--")
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).lstrip(".-") or "model"


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a model.

    Raises:
        ModelError: the model cannot be found, or its tokenizer is missing or damaged.
    """
    path = resolve_model(name)
    with _source(path, trust_remote_code) as (place, options):
        from transformers import AutoTokenizer

        with _Loading(
            f"the tokenizer of {printable(name)} is missing or damaged",
            "get the file again"
            if "gguf_file" in options
            else "its folder needs a valid tokenizer.json and tokenizer_config.json",
        ):
            return AutoTokenizer.from_pretrained(place, **options)


def load_config(name: str, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Loads the configuration of a causal language model, without its weights.

    Args:
        name: A hub id, a local folder, a GGUF file, or a name in `BUILT_IN`.
        trust_remote_code: Runs Python code that the model's repository brings.

    Raises:
        ModelError: the model cannot be found, its configuration is damaged, or it is no causal
            decoder.
    """
    with _source(resolve_model(name), trust_remote_code) as (place, options):
        return _load_config(name, place, options)


def load_model(
    name: str, *, device: str = "auto", dtype: str = "auto", trust_remote_code: bool = False
) -> PreTrainedModel:
    """Loads a causal language model, ready to answer. The weights of a GGUF file are dequantised.

    Args:
        name: A hub id, a local folder, a GGUF file, or a name in `BUILT_IN`.
        device: `auto` (a GPU where there is one), `cpu`, `cuda`, `cuda:1`, ...
        dtype: `auto` (float32 on a CPU; on a GPU the checkpoint's own, bfloat16 of a GGUF file),
            `float32`, `bfloat16`, `float16`.
        trust_remote_code: Runs Python code that the model's repository brings.

    Raises:
        ConfigError: device or dtype is no such thing.
        ModelError: the model cannot be found or loaded, or is no causal decoder.
    """
    started = time.monotonic()
    target = resolve_device(device)
    if dtype != "auto" and dtype not in _DTYPES:
        raise ConfigError(f"dtype = {dtype!r} is not allowed: it must be auto or {list(_DTYPES)}")
    path = resolve_model(name)
    own = torch.bfloat16 if _is_gguf(Path(path)) else "auto"
    kind = _DTYPES.get(dtype, torch.float32 if target.type == "cpu" else own)
    with _source(path, trust_remote_code) as (place, options):
        from transformers import AutoModelForCausalLM

        config = _load_config(name, place, options)
        damage = _Loading(
            f"the weights of {printable(name)} are missing or damaged",
            "get the model again, or name another one",
        )
        # transformers draws a bar for a GGUF file that its own switch does not turn off.
        with damage, redirect_stderr(io.StringIO() if "gguf_file" in options else sys.stderr):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                place,
                config=config,
                dtype=kind,
                output_loading_info=True,
                **options,
                **_dequantised(options),
                **_without_pickles(options),
            )
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise ModelError(
            f"{printable(name)} is no complete causal decoder: its files lack {len(missing)} "
            f"weights, {printable(missing[0])} the first: get the model again, or name another one"
        )
    if any(getattr(layer.module, "is_causal", True) is False for layer in attention_layers(model)):
        raise _not_causal(name, config)
    try:
        placed = model.to(target).eval()
        logger.info(
            "model %s: %.3g parameters in %s on %s, loaded in %.1f s",
            printable(name),
            sum(weight.numel() for weight in placed.parameters()),
            str(placed.dtype).removeprefix("torch."),
            target,
            time.monotonic() - started,
        )
        return placed
    except torch.OutOfMemoryError as error:
        raise ModelError(
            f"{printable(name)} does not fit into the memory of {target}: use a smaller dtype, "
            "a smaller model, or device cpu"
        ) from error


def text_decoder(model: nn.Module) -> nn.Module:
    """The text decoder in a model, without vision and audio towers; the model itself if none."""
    find: Any = getattr(model, "get_decoder", None)
    found: Any = find() if find else None
    # ModernBERT has an output layer of that name.
    return found if hasattr(found, "set_attn_implementation") else model


def attention_layers(model: nn.Module) -> list[AttentionLayer]:
    """The self-attention modules of a model's text decoder, in the order of their layers.

    Layers without attention (state-space or linear ones) are left out.

    Raises:
        UnsupportedError: a layer has several of them, or one of them serves several layers.
    """
    decoder = text_decoder(model)
    types = _layer_types(model)
    found: dict[int, nn.Module] = {}
    names: dict[int, str] = {}
    nameless = ""
    for name, module in decoder.named_modules():
        index = getattr(module, "layer_idx", None)
        if not _is_attention(module) or not hasattr(module, "layer_idx"):
            continue
        if not isinstance(index, int) or index < 0:
            nameless = type(module).__name__
            continue
        if index < len(types) and not _attends(types[index]):
            continue
        # A part of a layer's attention, which holds its projections.
        if index in found and name.startswith(f"{names[index]}."):
            continue
        if index in found:
            raise UnsupportedError(
                f"layer {index} has several attention modules, {name} among them: only decoders "
                "with one self-attention a layer are supported"
            )
        found[index], names[index] = module, name
    if nameless and not found:
        raise UnsupportedError(
            f"{nameless} does not know its layer, as one module serves several layers: a plan by "
            "layer cannot be followed in it; run the model without a session"
        )
    return [AttentionLayer(index, found[index]) for index in sorted(found)]


def _layer_types(model: nn.Module) -> list[str]:
    """The configuration's words for the layers; empty where it has none."""
    config: Any = getattr(model, "config", None)
    if config is None:
        return []
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    return list(getattr(text, "layer_types", None) or ())


def _attends(layer_type: str) -> bool:
    """Whether transformers' word for a layer may be one of softmax attention."""
    return not any(word in layer_type for word in ("linear", "mamba", "conv", "mlp", "recurrent"))


def require_attention(model: nn.Module) -> None:
    """Refuses a model whose configuration says that no layer has softmax attention.

    Raises:
        UnsupportedError: it says so.
    """
    types = _layer_types(model)
    if types and not any(map(_attends, types)):
        raise UnsupportedError(
            f"no layer of this {type(model).__name__} has softmax attention (its layers: "
            f"{', '.join(sorted(set(types)))}), so there is nothing to share; run it without a "
            "session"
        )


def geometry(model: PreTrainedModel) -> ModelGeometry:
    """The sizes of a model's attention.

    Where layers differ in head_dim or KV heads (Gemma 4), those of the layers with the largest
    head_dim: sharing follows query heads, of which every layer has the same number.

    Raises:
        UnsupportedError: there is no attention in it, or the number of heads differs from layer to
            layer.
    """
    require_attention(model)
    config = model.config.get_text_config(decoder=True)
    layers = attention_layers(model)
    if not layers:
        raise UnsupportedError(
            f"no self-attention module was found in a model of type {config.model_type}: "
            "its family is not supported"
        )
    heads: Any = config.num_attention_heads
    found = {_module_sizes(layer.module) for layer in layers}
    kv_heads: Any
    head_dim: Any
    if len(found) > 1:
        kv_heads, head_dim = _widest(found, heads)
    else:
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        head_dim = getattr(config, "head_dim", None)
        if head_dim is None and isinstance(heads, int):
            head_dim = config.hidden_size // heads
    sizes: tuple[Any, ...] = (config.num_hidden_layers, heads, kv_heads, head_dim)
    if not all(isinstance(size, int) for size in sizes):
        raise UnsupportedError(
            f"the attention heads of a {config.model_type} model differ from layer to layer: only "
            "models with one number of query heads are supported; run the model without a session"
        )
    return ModelGeometry(*sizes)


def _widest(found: set[tuple[Any, ...]], heads: Any) -> tuple[int | None, int | None]:
    """KV heads and head_dim of the layers with the largest head_dim; None if heads differ."""
    for head_dim, groups, width in found:
        if not all(isinstance(size, int) for size in (heads, head_dim, groups, width)):
            return None, None
        if width != heads * head_dim:
            return None, None
    head_dim, groups, _ = max(found)
    return heads // groups, head_dim


@torch.no_grad()
def fingerprint(model: PreTrainedModel) -> Fingerprint:
    """What tells this model's attention from another's.

    The hash is over the attention modules' weights by layer and name: names, shapes, values.
    Values are first rounded to what both bfloat16 and float16 hold, so that a bfloat16 checkpoint
    has one fingerprint whether it is loaded as float32, bfloat16 or float16. Quantised weights
    count with the values that they stand for, so a quantised model has a hash of its own, the same
    before and after a forward pass. The sketch says how far it is from the model that it was made
    from. Adapters (PEFT) that are not merged are left out: the fingerprint is the base model's.

    Raises:
        UnsupportedError: a layer has no weights, they lie on the meta device or cannot be read, or
            `geometry` refuses the model.
    """
    sizes = geometry(model)
    layers = attention_layers(model)
    if any(has_adapters(part) for layer in layers for part in layer.module.modules()):
        warn_once(
            "the model's attention has adapters that are not merged: it has the fingerprint of the "
            "model without them, and how they change its patterns is not known: compare answers "
            "with dense attention, or calibrate the merged model"
        )
    digest, sketches = hashlib.sha256(), []
    for layer in layers:
        with _in_memory(layer.module):
            weights = sorted(base_weights(layer.module), key=lambda pair: pair[0])
            for name, weight in weights:
                if weight.is_meta:
                    raise UnsupportedError(
                        f"the weights of layer {layer.index} are not in memory (meta device): load "
                        "the model with its weights to compare it with an artifact"
                    )
                digest.update(f"{layer.index} {name} {list(weight.shape)}\n".encode())
                digest.update(_canonical_bytes(weight))
            matrices = [weight for _, weight in weights if weight.ndim >= 2]
            sketches.append(sketch(matrices))
        if not matrices:
            raise UnsupportedError(
                f"no weights were found in the attention of layer {layer.index} "
                f"({type(layer.module).__name__}): this way of storing them is not supported, so "
                "an artifact cannot be compared with the model; load it unquantised"
            )
    model_type = model.config.get_text_config(decoder=True).model_type
    whole = "".join(sketches) if all(sketches) else ""
    settings = attention_settings(model.config)
    return Fingerprint(model_type, sizes, digest.hexdigest(), whole, attention=settings)


def attention_settings(config: PreTrainedConfig) -> dict[str, Any]:
    """What a configuration says of positions (RoPE), windows and logits.

    With other values the same weights attend otherwise. How long prompts may be does not count.

    Args:
        config: Of a model, or of its text decoder.

    Returns:
        JSON-ready values by transformers' names. RoPE is as transformers 5 writes it, whatever the
        configuration calls it; what is off (None, False, 0) is left out.
    """
    text: Any = config.get_text_config(decoder=True)
    # MPT and DBRX have a part of it in a configuration of its own.
    parts = (getattr(text, "attn_config", None), text)
    found = [(name, getattr(part, name, None)) for part in parts for name in _OF_ATTENTION]
    found.append(("rope_parameters", _rope(text)))
    known = {name: value for name, value in found if value not in (None, False)}
    # Lists in place of tuples, as they come out of a file.
    return json.loads(json.dumps(known, default=str))


def _rope(config: Any) -> dict[str, Any] | None:
    """RoPE's parameters, by kinds of layers where these differ; None where there is no RoPE."""
    given: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    of_all = {
        names[0]: next((v for n in names if (v := getattr(config, n, None)) is not None), None)
        for names in (_THETAS, _ROTARY_PARTS)
    }
    if not given and of_all["rope_theta"] is None:
        return None

    def plain(values: dict[str, Any]) -> dict[str, Any]:
        kind = values.get("rope_type") or values.get("type") or "default"
        own = {name: value for name, value in values.items() if value is not None}
        every = {**of_all, **own, "rope_type": kind}
        return {n: value for n, value in every.items() if n != "type" and value is not None}

    by_kind = {name: plain(values) for name, values in given.items() if isinstance(values, dict)}
    return by_kind or plain(given)


def settings_that_differ(there: dict[str, Any], now: dict[str, Any]) -> str:
    """Where two `attention_settings` differ, in words; empty where they do not.

    Numbers are equal up to the rounding of float32, in which GGUF files have them.
    """
    old, new = _leaves(there), _leaves(now)
    lines = [
        f"{printable(name, 80)} {_value(old, name)} there, {_value(new, name)} now"
        for name in sorted(old.keys() | new.keys())
        if not _equal(old.get(name), new.get(name))
    ]
    more = len(lines) - _SHOWN
    return "; ".join(lines[:_SHOWN] + ([f"and {more} more"] if more > 0 else []))


def _leaves(value: Any, name: str = "") -> dict[str, Any]:
    """The values of nested objects and lists, their names joined by dots."""
    if not isinstance(value, dict | list):
        return {name: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    found: dict[str, Any] = {}
    for key, item in items:
        found |= _leaves(item, f"{name}.{key}" if name else str(key))
    return found


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, int | float) and isinstance(other, int | float):
        return math.isclose(one, other, rel_tol=1e-6)
    return one == other


def _value(values: dict[str, Any], name: str) -> str:
    return printable(repr(values[name]), 80) if name in values else "none"


@torch.no_grad()
def model_digest(model: PreTrainedModel) -> str:
    """SHA-256 of what a model's results come from: its configuration, and samples of all weights.

    What is kept of a model's results is good for this very model. Its fingerprint is too little for
    that: it does not tell models apart whose attention has the same weights, but whose other
    weights, adapters (PEFT: weights, scales, the active ones) or end-of-text tokens differ. As
    there, the dtype does not count. An edit that falls between the samples is not seen.
    """
    known: dict[str, Any] = model.config.to_dict()
    stops = getattr(model.generation_config, "eos_token_id", None)
    text = json.dumps([_lasting(known), stops], sort_keys=True, default=str)
    digest = hashlib.sha256(text.encode())
    for name, settings in adapter_settings(model):
        digest.update(json.dumps([name, settings], sort_keys=True).encode())
    for name, weight in all_weights(model):
        digest.update(f"{name} {list(weight.shape)}\n".encode())
        if not weight.is_meta:
            digest.update(_canonical_bytes(_sampled(weight.reshape(-1))))
    return digest.hexdigest()


def _lasting(values: dict[str, Any]) -> dict[str, Any]:
    """A configuration without what says how it was saved and loaded."""
    return {
        name: _lasting(value) if isinstance(value, dict) else value
        for name, value in values.items()
        if name not in _NOT_OF_THE_MODEL
    }


def _sampled(values: Tensor) -> Tensor:
    """All of a few values `[n]`; of more, pieces at even distances, the first and the last too."""
    pieces, length = _DIGEST_PIECES
    if len(values) <= pieces * length:
        return values
    last = len(values) - length
    starts = [last * number // (pieces - 1) for number in range(pieces)]
    return torch.cat([values[start : start + length] for start in starts])


@cache
def warn_once(text: str) -> None:
    """Logs a warning, the first time that a process has this one."""
    logger.warning(text)


def max_length(model: PreTrainedModel | PreTrainedConfig) -> int | None:
    """The tokens that a model's positions reach, None where its configuration sets no limit."""
    config: Any = model.config if isinstance(model, nn.Module) else model
    sizes = config.get_text_config(decoder=True)
    names = ("max_position_embeddings", "max_target_positions")
    found = [getattr(sizes, name) for name in names if isinstance(getattr(sizes, name, None), int)]
    table = position_table(model) if isinstance(model, nn.Module) else None
    return min(found + ([] if table is None else [table]), default=None)


def position_table(model: PreTrainedModel) -> int | None:
    """Rows of a model's table of positions, less those before the first token.

    Returns:
        The positions after which the model cannot go on; None where positions are computed (rotary
        ones, ALiBi, tables that grow).
    """
    decoder = text_decoder(model)
    return min((rows for module in decoder.modules() for rows in _tables(module)), default=None)


def _tables(module: nn.Module) -> Iterator[int]:
    for name in _POSITION_TABLES:
        table = getattr(module, name, None)
        if isinstance(table, nn.Embedding):
            # Position ids begin after the padding's row, or at an offset that the class has.
            first = getattr(table, "offset", None)
            padding = -1 if table.padding_idx is None else table.padding_idx
            yield table.num_embeddings - (padding + 1 if first is None else first)
        elif isinstance(table, Tensor) and table.ndim == 2:
            yield table.shape[0]


def resolve_device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    match = re.fullmatch(r"cpu|cuda(?::(\d+))?", device)
    if match is None:
        raise ConfigError(f"device = {device!r} is not allowed: it must be auto, cpu, cuda, cuda:1")
    if device != "cpu" and int(match[1] or 0) >= torch.cuda.device_count():
        raise ModelError(
            f"there is no device {device}: torch {torch.__version__} sees "
            f"{torch.cuda.device_count()} CUDA devices; use --device cpu, or run sp doctor"
        )
    return torch.device(device)


def _is_gguf(path: Path) -> bool:
    return path.suffix.lower() == ".gguf" and kind_of(path) != "folder"


@contextmanager
def _source(path: str, trust_remote_code: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where transformers finds a model, and the options that it needs for it.

    Args:
        path: What `resolve_model` found.
        trust_remote_code: Runs Python code that the model's repository brings.
    """
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if _is_gguf(Path(path)):
        _require_gguf(path)
        # Alone in a folder: transformers would read the tokenizer's files beside it, too.
        with TemporaryDirectory(prefix="sp-gguf-") as folder:
            link = Path(folder) / "model.gguf"
            link.symlink_to(Path(path).absolute())
            yield folder, {**options, "gguf_file": link.name}
        return
    if not Path(path).is_dir():
        if path in (resolve_model(name) for name in BUILT_IN):
            raise ModelError(f"the built-in model {Path(path).name} is not in this installation")
        options["local_files_only"] = _only_cached(path)
    yield path, options


def _require_gguf(path: str) -> None:
    missing = [name for name in ("gguf", "accelerate") if find_spec(name) is None]
    if missing:
        raise ModelError(
            f"{printable(path)} cannot be read without {' and '.join(missing)}: "
            "pip install 'shareprefill[gguf]'"
        )


def _without_pickles(options: dict[str, Any]) -> dict[str, Any]:
    """Options for weights of the hub: safetensors alone, unless its code is trusted, too."""
    is_of_hub = "local_files_only" in options
    return {"use_safetensors": True} if is_of_hub and not options["trust_remote_code"] else {}


def _dequantised(options: dict[str, Any]) -> dict[str, Any]:
    """Options for weights as plain tensors: packed blocks would need a kernel of their own."""
    if "gguf_file" not in options:
        return {}
    from transformers.utils.quantization_config import GgufConfig

    return {"quantization_config": GgufConfig(dequantize=True)}


def _only_cached(hub_id: str) -> bool:
    """Asks the hub once for a model, since loading would try each file again and again."""
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    # The HTTP library, and with it the class of its errors, differs among the hub's versions.
    http_error: type[Exception] = HfHubHTTPError.__bases__[0]
    try:
        HfApi().model_info(hub_id, timeout=10)
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"{hub_id!r} is neither a folder nor a model of the hub that you may read: check the "
            "name, or log in with hf auth login"
        ) from error
    except (OSError, http_error) as error:
        if not isinstance(try_to_load_from_cache(hub_id, "config.json"), str):
            raise ModelError(
                f"{hub_id!r} is no folder, and the hub cannot be reached ({_reason(error)}): check "
                f"the connection, or name a local folder or {', '.join(BUILT_IN)}"
            ) from error
        logger.warning("the hub cannot be reached: %s is taken from the cache", hub_id)
        return True
    return False


def _load_config(name: str, place: str, options: dict[str, Any]) -> PreTrainedConfig:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    with _Loading(
        f"{printable(name)} is no model that transformers can load",
        "get the file again" if "gguf_file" in options else "its folder needs a valid config.json",
    ):
        config = AutoConfig.from_pretrained(place, **options)
    own_classes = getattr(config, "auto_map", {}) if options["trust_remote_code"] else {}
    known = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or "AutoModelForCausalLM" in own_classes
    if not known or getattr(config, "is_encoder_decoder", False):
        raise _not_causal(name, config)
    # Nobody here reads attention weights, which take memory, and which sessions refuse.
    for part in (config, config.get_text_config(decoder=True)):
        part.output_attentions = False
    return config


def _not_causal(name: str, config: PreTrainedConfig) -> ModelError:
    return ModelError(
        f"{printable(name)} is no causal decoder (its type is {printable(config.model_type)}): "
        "name a causal language model"
    )


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return printable(lines[0].rstrip(". "), 160)


class _Loading:
    """Says what is damaged, in place of transformers' errors and its load report.

    What a damaged file makes the libraries raise is anything: wrong types in a configuration are
    AttributeError, TypeError or IndexError somewhere inside, and tokenizers raises the bare class
    Exception, which no `except` clause could catch alone.
    """

    def __init__(self, problem: str, advice: str) -> None:
        self._problem, self._advice = problem, advice

    def __enter__(self) -> None:
        from transformers.utils import logging as transformers_logging

        self._verbosity = transformers_logging.get_verbosity()
        self._bar = transformers_logging.is_progress_bar_enabled()
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        from transformers.utils import logging as transformers_logging

        transformers_logging.set_verbosity(self._verbosity)
        if self._bar:
            transformers_logging.enable_progress_bar()
        if isinstance(error, Exception) and (kind is Exception or isinstance(error, _damages())):
            raise ModelError(f"{self._problem} ({_reason(error)}): {self._advice}") from error


def _damages() -> tuple[type[Exception], ...]:
    """What transformers and its formats raise for missing, damaged or unknown files."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    return (
        ArithmeticError,
        AttributeError,
        ImportError,
        LookupError,
        OSError,
        RuntimeError,
        TypeError,
        ValueError,
        SafetensorError,
        StrictDataclassError,
        pickle.UnpicklingError,
        struct.error,
    )


def _is_attention(module: nn.Module) -> bool:
    return any(hasattr(module, name) for name in ("num_key_value_groups", "is_causal")) or any(
        isinstance(getattr(module, name, None), nn.Module) for name in _PROJECTIONS
    )


def _module_sizes(module: nn.Module) -> tuple[object, ...]:
    projection = getattr(module, "q_proj", None)
    return (
        getattr(module, "head_dim", None),
        getattr(module, "num_key_value_groups", None),
        getattr(projection, "out_features", None),
    )


@contextmanager
def _in_memory(module: nn.Module) -> Iterator[None]:
    """Weights that accelerate has offloaded (to the CPU or the disk) are there for a while."""
    offloaded = [part for part in module.modules() if hasattr(part, "_hf_hook")]
    with ExitStack() as stack:
        if offloaded:
            from accelerate.utils import align_module_device

            for part in offloaded:
                stack.enter_context(align_module_device(part))
        yield


def _canonical_bytes(values: Tensor) -> memoryview:
    if values.is_floating_point():
        values = values.to(torch.bfloat16).to(torch.float16)
    return values.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
