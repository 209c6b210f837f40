"""Models by name: where they lie, how they are loaded, and what tells one from another."""

from __future__ import annotations

import hashlib
import logging
import pickle
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from shareprefill.errors import ConfigError, ModelError, UnsupportedError
from shareprefill.files import printable

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# Name: folder in the package's `assets`.
BUILT_IN = {"sp-tiny": "sp-tiny"}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# A module that projects to queries under one of these names is an attention module.
_PROJECTIONS = ("q_proj", "qkv_proj", "query_key_value", "c_attn", "Wqkv", "W_pack", "q_a_proj")
_PROJECTIONS += ("q_b_proj", "wq", "query")


@dataclass(frozen=True)
class ModelGeometry:
    """The sizes of a model's attention: layers L, query heads H, KV heads G, head dimension D."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class Fingerprint:
    """What an artifact fits: the architecture, and a SHA-256 of the attention weights."""

    model_type: str
    geometry: ModelGeometry
    weights: str

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
    """The folder of a built-in or local model; the name itself for a hub id.

    Raises:
        ModelError: the name is a path that does not exist, or no valid name at all.
    """
    if name in BUILT_IN:
        return str(resources.files("shareprefill") / "assets" / BUILT_IN[name])
    folder = Path(name).expanduser()
    if name and "\0" not in name and folder.is_dir():
        return str(folder)
    if name and "\0" not in name and folder.exists():
        raise ModelError(f"{printable(name)} is a file: name the folder that holds the model")
    if _HUB_ID.fullmatch(name) is None:
        raise ModelError(
            f"there is no model folder {printable(name)!r}: check the path, or name a hub id "
            f"(organisation/name) or a built-in model ({', '.join(BUILT_IN)})"
        )
    return name


def model_slug(name: str) -> str:
    """A folder name for a model: `org--name` of a hub id, the last part of a local folder."""
    if name in BUILT_IN:
        return name
    folder = Path(name).expanduser()
    text = folder.resolve().name if folder.is_dir() else name.strip("/").replace("/", "--")
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).lstrip(".-") or "model"


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a model.

    Raises:
        ModelError: the model cannot be found, or its tokenizer is missing or damaged.
    """
    path = resolve_model(name)
    options = _loading_options(path, trust_remote_code)
    from transformers import AutoTokenizer

    with _quiet_transformers():
        try:
            return AutoTokenizer.from_pretrained(path, **options)
        except _loading_errors() as error:
            raise ModelError(
                f"the tokenizer of {printable(name)} is missing or damaged ({_reason(error)}): "
                "its folder needs a valid tokenizer.json and tokenizer_config.json"
            ) from error


def load_model(
    name: str, *, device: str = "auto", dtype: str = "auto", trust_remote_code: bool = False
) -> PreTrainedModel:
    """Loads a causal language model, ready to answer.

    Args:
        name: A hub id, a local folder, or a name in `BUILT_IN`.
        device: `auto` (a GPU where there is one), `cpu`, `cuda`, `cuda:1`, ...
        dtype: `auto` (float32 on a CPU, the checkpoint's own on a GPU), `float32`, `bfloat16`,
            `float16`.
        trust_remote_code: Runs Python code that the model's repository brings.

    Raises:
        ConfigError: device or dtype is no such thing.
        ModelError: the model cannot be found or loaded, or is no causal decoder.
    """
    target = _resolve_device(device)
    if dtype != "auto" and dtype not in _DTYPES:
        raise ConfigError(f"dtype = {dtype!r} is not allowed: it must be auto or {list(_DTYPES)}")
    kind = _DTYPES.get(dtype, torch.float32 if target.type == "cpu" else "auto")
    path = resolve_model(name)
    options = _loading_options(path, trust_remote_code)
    from transformers import AutoModelForCausalLM

    with _quiet_transformers():
        config = _load_config(name, path, options)
        _require_causal_config(name, config, trust_remote_code)
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                path, config=config, dtype=kind, output_loading_info=True, **options
            )
        except _loading_errors() as error:
            raise ModelError(
                f"the weights of {printable(name)} are missing or damaged ({_reason(error)}): "
                "get the model again, or name another one"
            ) from error
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise ModelError(
            f"{printable(name)} is no complete causal decoder: its files lack {len(missing)} "
            f"weights, {printable(missing[0])} the first: get the model again, or name another one"
        )
    if any(getattr(layer.module, "is_causal", True) is False for layer in attention_layers(model)):
        raise _not_causal(name, config)
    try:
        return model.to(target).eval()
    except torch.OutOfMemoryError as error:
        raise ModelError(
            f"{printable(name)} does not fit into the memory of {target}: use a smaller dtype, "
            "a smaller model, or device cpu"
        ) from error


def attention_layers(model: nn.Module) -> list[AttentionLayer]:
    """The self-attention modules of a model's text decoder, in the order of their layers.

    Layers without attention (state-space or linear ones) are left out.

    Raises:
        UnsupportedError: a layer has several of them.
    """
    find_decoder: Any = getattr(model, "get_decoder", None)
    decoder: nn.Module = find_decoder() if find_decoder else model
    found: dict[int, nn.Module] = {}
    for name, module in decoder.named_modules():
        index = getattr(module, "layer_idx", None)
        if not isinstance(index, int) or not _is_attention(module):
            continue
        if index in found:
            raise UnsupportedError(
                f"layer {index} has several attention modules, {name} among them: only decoders "
                "with one self-attention a layer are supported"
            )
        found[index] = module
    return [AttentionLayer(index, found[index]) for index in sorted(found)]


def geometry(model: PreTrainedModel) -> ModelGeometry:
    """The sizes of a model's attention, as its configuration tells them.

    Raises:
        UnsupportedError: there is no attention in it, or the sizes differ from layer to layer.
    """
    config = model.config.get_text_config(decoder=True)
    layers = attention_layers(model)
    if not layers:
        raise UnsupportedError(
            f"no self-attention module was found in a model of type {config.model_type}: "
            "its family is not supported"
        )
    # First: where heads differ, a configuration may refuse to tell one head_dim.
    differing = UnsupportedError(
        f"the attention heads of a {config.model_type} model differ from layer to layer: "
        "only models with one number of heads and one head_dim are supported; run the model "
        "without a session"
    )
    if len({_module_sizes(layer.module) for layer in layers}) > 1:
        raise differing
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None)
    if head_dim is None and isinstance(heads, int):
        head_dim = config.hidden_size // heads
    sizes: tuple[Any, ...] = (config.num_hidden_layers, heads, kv_heads, head_dim)
    if not all(isinstance(size, int) for size in sizes):
        raise differing
    return ModelGeometry(*sizes)


@torch.no_grad()
def fingerprint(model: PreTrainedModel) -> Fingerprint:
    """What tells this model's attention from another's.

    The hash is over the attention modules' parameters by layer and name: names, shapes, values.
    Values are first rounded to what both bfloat16 and float16 hold, so that a bfloat16 checkpoint
    has one fingerprint whether it is loaded as float32, bfloat16 or float16.

    Raises:
        UnsupportedError: weights lie on the meta device, or `geometry` refuses the model.
    """
    sizes = geometry(model)
    digest = hashlib.sha256()
    for layer in attention_layers(model):
        for name, parameter in sorted(layer.module.named_parameters()):
            if parameter.is_meta:
                raise UnsupportedError(
                    f"the weights of layer {layer.index} are not in memory (meta device): load "
                    "the model without offloading to compare it with an artifact"
                )
            digest.update(f"{layer.index} {name} {list(parameter.shape)}\n".encode())
            digest.update(_canonical_bytes(parameter))
    model_type = model.config.get_text_config(decoder=True).model_type
    return Fingerprint(model_type, sizes, digest.hexdigest())


def max_length(model: PreTrainedModel | PreTrainedConfig) -> int | None:
    """The tokens that a model's positions reach, None where its configuration sets no limit."""
    config: Any = model.config if isinstance(model, nn.Module) else model
    return getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)


def _resolve_device(device: str) -> torch.device:
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


def _loading_options(path: str, trust_remote_code: bool) -> dict[str, Any]:
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if not Path(path).is_dir():
        if path in (resolve_model(name) for name in BUILT_IN):
            raise ModelError(f"the built-in model {Path(path).name} is not in this installation")
        options["local_files_only"] = _only_cached(path)
    return options


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


def _loading_errors() -> tuple[type[Exception], ...]:
    """What transformers and its formats raise for missing, damaged or unknown files."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    return (
        OSError,
        ValueError,
        KeyError,
        ImportError,
        RuntimeError,
        SafetensorError,
        StrictDataclassError,
        pickle.UnpicklingError,
        struct.error,
    )


def _load_config(name: str, path: str, options: dict[str, Any]) -> PreTrainedConfig:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path, **options)
    except _loading_errors() as error:
        raise ModelError(
            f"{printable(name)} is no model that transformers can load ({_reason(error)}): "
            "its folder needs a valid config.json"
        ) from error


def _require_causal_config(name: str, config: PreTrainedConfig, trust_remote_code: bool) -> None:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    brings_code = trust_remote_code and "AutoModelForCausalLM" in getattr(config, "auto_map", {})
    known = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or brings_code
    if not known or getattr(config, "is_encoder_decoder", False):
        raise _not_causal(name, config)


def _not_causal(name: str, config: PreTrainedConfig) -> ModelError:
    return ModelError(
        f"{printable(name)} is no causal decoder (its type is {printable(config.model_type)}): "
        "name a causal language model"
    )


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return printable(lines[0].rstrip(". "), 160)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Holds back transformers' load report: what it says of an error is in ours."""
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    bar = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bar:
            transformers_logging.enable_progress_bar()


def _is_attention(module: nn.Module) -> bool:
    return hasattr(module, "num_key_value_groups") or any(
        isinstance(getattr(module, name, None), nn.Module) for name in _PROJECTIONS
    )


def _module_sizes(module: nn.Module) -> tuple[object, ...]:
    projection = getattr(module, "q_proj", None)
    return (
        getattr(module, "head_dim", None),
        getattr(module, "num_key_value_groups", None),
        getattr(projection, "out_features", None),
    )


def _canonical_bytes(parameter: Tensor) -> memoryview:
    values = parameter.detach()
    if values.is_floating_point():
        values = values.to(torch.bfloat16).to(torch.float16)
    return values.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
