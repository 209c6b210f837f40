"""From an engine's configuration to a process's core; refuses at the start what would run dense."""

# vLLM lives in an environment of its own: it is not there where types are checked.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from __future__ import annotations

import hashlib
import os
import weakref
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import vllm
from torch import Tensor
from vllm import envs
from vllm.config import get_current_vllm_config, set_current_vllm_config
from vllm.distributed.parallel_state import get_pp_group, get_tp_group
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.v1.attention.selector import get_attn_backend

from shareprefill.artifact import Artifact, check_attention, load_artifact
from shareprefill.checkpoint import check_checkpoint
from shareprefill.errors import ArtifactError, ConfigError, UnsupportedError
from shareprefill.models import attention_settings
from shareprefill.runtime.crossover import DECODING, LayerSizes, crossover
from shareprefill.runtime.decoding import density_of, effect_of
from shareprefill.runtime.paged_decoding import PagedDecoding
from shareprefill.runtime.plan import RuntimePlan, make_plan, plan_without_artifact
from shareprefill.runtime.tensor_parallel import HeadShard
from shareprefill.version import __version__
from shareprefill.vllm import VERSIONS, inner_backend
from shareprefill.vllm.core import ServingCore
from shareprefill.vllm.decoding import ServingDecoding
from shareprefill.vllm.metrics import count, count_steps
from shareprefill.vllm.options import (
    INNER_VARIABLE,
    NAME,
    SWITCH_VARIABLE,
    ServingOptions,
    switch_is_on,
)

logger = init_logger("vllm.shareprefill")

# vLLM's operator that writes keys and values into the cache.
_CACHE_WRITE = "vllm::unified_kv_cache_update"
# The cores of a process's engines, by the identity of their compilation configurations: these hold
# the layers with their caches, and copies of an engine's configuration share them. An entry goes
# when its engine does, so that nothing here keeps a cache.
_cores: dict[int, tuple[weakref.ref[Any], ServingCore | None]] = {}


def core_of(vllm_config: Any) -> ServingCore | None:
    """The process's core for an engine; None where it asks for nothing, and for draft models.

    Raises:
        UnsupportedError: the engine has a mode that would run without us, or wrongly.
        ArtifactError: the artifact cannot be read, or is of another model.
        ConfigError: an option is not allowed.
    """
    if vllm_config.model_config.runner_type == "draft":
        return None
    owner = vllm_config.compilation_config
    key = id(owner)
    if key not in _cores:
        options = ServingOptions.find(vllm_config.additional_config, os.environ)
        if options is None:
            _require_nothing(vllm_config)
        core = None if options is None else _make(options, vllm_config)
        _cores[key] = weakref.ref(owner, lambda _: _cores.pop(key, None)), core
    return _cores[key][1]


def current_core() -> ServingCore | None:
    """The core of the engine whose model is being built."""
    return core_of(get_current_vllm_config())


def _require_nothing(config: Any) -> None:
    """Refuses an engine that names our backend and gives it nothing to do."""
    named, ours = config.attention_config.backend, "shareprefill.vllm."
    if named is not None and named.name == "CUSTOM" and named.get_path().startswith(ours):
        raise ConfigError(
            "--attention-backend CUSTOM is shareprefill's, and nothing was asked of it: add "
            f'--additional-config \'{{"{NAME}": {{"artifact": "clusters.st"}}}}\', or leave the '
            "backend out"
        )


def check_engine(options: ServingOptions, config: Any) -> None:
    """Refuses an engine in which our backend is not in use, or one of its modes would be wrong.

    Args:
        options: What the engine is asked for.
        config: vLLM's configuration.

    Raises:
        UnsupportedError: says which mode, and what to do.
    """
    version = tuple(int(part) for part in vllm.__version__.split(".")[:2])
    if not VERSIONS[0] <= version < VERSIONS[1]:
        raise UnsupportedError(
            f"shareprefill knows vLLM 0.{VERSIONS[0][1]} to 0.{VERSIONS[1][1] - 1}, this is "
            f"{vllm.__version__}: install one of those, or run without shareprefill"
        )
    parallel = config.parallel_config
    refused = {
        "context parallelism": parallel.decode_context_parallel_size > 1
        or getattr(parallel, "prefill_context_parallel_size", 1) > 1,
        "LoRA adapters (their requests would read the base model's patterns: allow that with "
        '"lora": "share")': config.lora_config is not None and options.lora is None,
        'adapters ("lora": "share") while --enable-lora is not set: set it, or leave "lora" out': (
            config.lora_config is None and options.lora is not None
        ),
        "latent attention (MLA)": config.model_config.use_mla,
        "a model without attention": config.model_config.is_attention_free,
        "steps that are cut in two (DBO)": parallel.use_ubatching,
        "batch invariance (VLLM_BATCH_INVARIANT): patterns depend on chunks": bool(
            envs.VLLM_BATCH_INVARIANT
        ),
        "drafts whose number is decided on the device (enable_adaptive_verification)": getattr(
            config.speculative_config, "enable_adaptive_verification", False
        ),
        "the switch of single requests, of which this engine tells nobody (a pooling model, or a "
        f"model runner): set {SWITCH_VARIABLE}=off, or VLLM_USE_V2_MODEL_RUNNER=0": switch_is_on()
        and not _is_told(config),
    }
    for mode, holds in refused.items():
        if holds:
            raise UnsupportedError(f"shareprefill does not serve an engine with {mode}")


def check_decoding(config: Any) -> None:
    """Refuses an engine in which sketches of keys would be of other keys than the cache holds.

    Args:
        config: vLLM's configuration.

    Raises:
        UnsupportedError: says which mode, and what to do.
    """
    cache, model = config.cache_config, config.model_config
    transfer, compilation = config.kv_transfer_config, config.compilation_config
    has_graphs = getattr(compilation.cudagraph_mode, "name", "NONE") != "NONE"
    refused = {
        "a KV connector or an offloaded cache, which fill pages by themselves": transfer is not None
        and transfer.kv_connector is not None,
        # There a replay writes keys and calls nobody.
        "CUDA graphs that hold writes to the cache (use_inductor_graph_partition, FULL, or "
        "splitting_ops of your own: cudagraph_mode PIECEWISE has none)": has_graphs
        and _CACHE_WRITE not in (compilation.splitting_ops or ()),
        # What is made beside the cache would be thrown away with it.
        "sleep mode": model.enable_sleep_mode,
        # There vLLM copies a part of a page that a request shares with another one.
        "a prefix cache of parts of pages (prefix_match_unit, or a hybrid model)": bool(
            cache.enable_prefix_caching
        )
        and (getattr(cache, "prefix_match_unit", None) is not None or model.is_hybrid),
    }
    for mode, holds in refused.items():
        if holds:
            raise UnsupportedError(
                f"sparse decode steps do not know {mode}: start the engine without that, or leave "
                'out "decode"'
            )


def _is_told(config: Any) -> bool:
    """Whether an engine tells every process's logits processors of its requests."""
    if config.model_config.runner_type == "pooling":
        return False
    if config.use_v2_model_runner:
        # 0.24's has none; there only the last pipeline rank samples, and asks them.
        has_them = find_spec("vllm.v1.worker.gpu.sample.logits_processor") is not None
        return has_them and config.parallel_config.pipeline_parallel_size == 1
    return config.speculative_config is None


def check_backend(backend: type, named: str | None) -> None:
    """Refuses an engine whose backend would never call us.

    Args:
        backend: What vLLM chooses for a layer of plain attention.
        named: The engine's option; None where vLLM chooses by itself.

    Raises:
        UnsupportedError: says what to start the engine with.
    """
    if not getattr(backend, "is_of_shareprefill", False):
        raise UnsupportedError(
            f"shareprefill was asked for, but attention is computed by {backend.__name__} "
            f"(--attention-backend {named or 'is not set'}): start with --attention-backend CUSTOM "
            f"on a GPU; on a CPU, with {INNER_VARIABLE} unset"
        )


def _chosen_backend(config: Any) -> type:
    """The backend that vLLM chooses for the engine's layers of plain attention."""
    with set_current_vllm_config(config):
        return get_attn_backend(
            config.model_config.get_head_size(),
            config.model_config.dtype,
            config.cache_config.cache_dtype,
        )


def _check_sizes(artifact: Artifact, model: Any, n_layers: int, n_heads: int) -> None:
    """Refuses an artifact of other sizes."""
    sizes = artifact.fingerprint.geometry
    found = (n_layers, n_heads, model.get_total_num_kv_heads(), model.get_head_size())
    wanted = (sizes.layers, sizes.heads, sizes.kv_heads, sizes.head_dim)
    if found != wanted:
        raise ArtifactError(
            f"the artifact is of another model: layers, heads, KV heads and head_dim are {wanted} "
            f"in it, {found} in {model.model}"
        )


def _check_attention(artifact: Artifact, model: Any, *, is_unchecked: bool) -> None:
    """Refuses an artifact of other positions (RoPE), windows or logits; unchecked, warns of them.

    Options of the engine may have changed these (`hf_overrides`).
    """
    try:
        check_attention(artifact, attention_settings(model.hf_text_config))
    except ArtifactError as error:
        if not is_unchecked:
            raise ArtifactError(
                f'{error}; or take the artifact all the same with "checkpoint": "unchecked"'
            ) from error
        logger.warning_once("shareprefill: %s; it is taken all the same, unchecked", error)


def _check_files(artifact: Artifact, model: str, revision: str | None) -> None:
    """Refuses an artifact of another checkpoint's files, or of unknown ones.

    vLLM fuses and splits weights, so that what it has loaded cannot be compared.
    """
    if not check_checkpoint(artifact, model, revision):
        missing = "the model lies in no safetensors files"
        if not artifact.fingerprint.checkpoint:
            missing = "the artifact holds no fingerprint of its model's files"
        raise ArtifactError(
            f"whether the artifact was made for the weights of {model} cannot be checked: "
            f"{missing}. Make it anew with sp calibrate and sp cluster, from safetensors; or take "
            'it unchecked with "checkpoint": "unchecked"'
        )


def _make(options: ServingOptions, config: Any) -> ServingCore:
    check_engine(options, config)
    named = config.attention_config.backend
    check_backend(_chosen_backend(config), named and named.name)
    model = config.model_config
    n_layers = model.get_total_num_hidden_layers()
    n_heads = model.model_arch_config.total_num_attention_heads
    group = get_tp_group()
    shard = None
    if group.world_size > 1:
        shard = HeadShard(group.rank_in_group, group.world_size, group.device_group)
    artifact = None if options.artifact is None else load_artifact(options.artifact)
    check_files = None
    if artifact is not None:
        is_unchecked = options.checkpoint == "unchecked"
        _check_sizes(artifact, model, n_layers, n_heads)
        _check_attention(artifact, model, is_unchecked=is_unchecked)
        if not is_unchecked:
            check_files = partial(_check_files, artifact, model.model, model.revision)
    if check_files is not None and os.path.exists(model.model):
        # Before minutes of loading. What comes from a hub is there only after them.
        check_files()
        check_files = None
    layers = range(*model.get_layers_start_end_indices(config.parallel_config))

    # The core may not keep the engine's configuration: it would keep the engine's caches.
    def plan_of(policy: str | None) -> RuntimePlan:
        runtime = options.runtime
        if policy is not None:
            runtime = runtime.with_policy(policy)
        if artifact is None:
            plan = plan_without_artifact(n_layers, n_heads, runtime)
        else:
            plan = make_plan(artifact, runtime)
        return plan.on_layers(layers)

    counts = group.is_first_rank and get_pp_group().is_first_rank
    core = ServingCore(
        plan_of,
        options.runtime,
        heads=shard and shard.heads(n_heads),
        exchange=shard,
        head_dim=model.get_head_size(),
        device=_device(),
        backend=inner_backend(),
        max_rows=config.scheduler_config.max_num_batched_tokens,
        max_keys=model.max_model_len,
        told="" if shard is None else _told(options),
        # Every process has all rows; counters are of the engine, as vLLM's are.
        **({"count": count} if counts else {}),
    )
    core.check_files = check_files
    if options.runtime.decode == "sparse":
        core.decoding = _make_decoding(core, effect_of(artifact), shard, config, counts)
    _check_lengths(core, config)
    return core


def _check_lengths(core: ServingCore, config: Any) -> None:
    """Says from which lengths on an engine is sparse, and refuses one whose prompts are shorter.

    Raises:
        UnsupportedError: no prompt can be as long.
    """
    whole, most, source = core.min_tokens, core.max_keys, core.crossover.source
    # A step takes no more of a prompt.
    limit = getattr(config.scheduler_config, "long_prefill_token_threshold", 0)
    rows = min(core.max_rows, limit or core.max_rows)
    chunked = core.keys_of_chunk(rows)
    if chunked is None:
        raise UnsupportedError(
            f"shareprefill would compute nothing in this engine: prompts are sparse from {whole} "
            f"tokens on ({source}), in chunks at more, and have at most {most}, of which a step "
            f'takes {rows}; name a smaller "min_tokens", or a larger --max-model-len or '
            "--max-num-batched-tokens"
        )
    if core.decoding is not None and core.decoding.least_tokens > most:
        raise UnsupportedError(
            f"sparse decode steps begin at {core.decoding.least_tokens} tokens, and this engine's "
            f'requests have at most {most}: name a smaller "min_tokens", or leave out "decode"'
        )
    is_later = chunked > max(whole, core.least_rows)
    in_chunks = f", in steps of {rows} tokens from {chunked} on" if is_later else ""
    logger.info(
        "shareprefill: policy %s, prefills of %d tokens and more are sparse%s (%s)",
        core.config.policy,
        whole,
        in_chunks,
        source,
    )


def _told(options: ServingOptions) -> str:
    """What every process reads for itself, beside the options in its configuration."""
    artifact = options.artifact
    content = None if artifact is None else hashlib.sha256(Path(artifact).read_bytes()).hexdigest()
    return repr((__version__, content, crossover(_device(), DECODING)))


def _device() -> torch.device:
    return torch.device(current_platform.device_type)


def _make_decoding(
    core: ServingCore,
    effect: Tensor | None,
    shard: HeadShard | None,
    config: Any,
    counts: bool,
) -> ServingDecoding:
    """Sparse decode steps, where the engine asks for them.

    Args:
        core: Of the process.
        effect: What lost attention of a head changes, `[L, H]` of the whole model; None if unknown.
        shard: The process's part of the heads; None where it holds all.
        config: vLLM's configuration.
        counts: Whether the process counts for the engine.
    """
    check_decoding(config)
    model, parallel = config.model_config, config.parallel_config
    density = density_of(core.config)
    known = crossover(core.device, DECODING).or_from(core.config.min_tokens)
    sizes = model.get_num_attention_heads(parallel), model.get_head_size()
    heads = shard and shard.heads(model.model_arch_config.total_num_attention_heads)
    make = partial(
        PagedDecoding,
        n_heads=sizes[0],
        n_groups=model.get_num_kv_heads(parallel),
        head_dim=sizes[1],
        device=core.device,
        density=density,
        effect=effect,
        heads=heads,
    )
    decoding = ServingDecoding(
        make,
        shard,
        least_tokens=known.tokens_of(LayerSizes(*sizes)),
        max_rows=config.scheduler_config.max_num_seqs,
        max_keys=core.max_keys,
        room=_most_cache_bytes(config.cache_config),
        **({"count": count_steps} if counts else {}),
    )
    logger.info(
        "shareprefill: of requests of %d tokens and more, decode steps read %.3g of the key blocks "
        "(%s); in CUDA graphs of whole steps the others are dense by the same kernels",
        decoding.least_tokens,
        density,
        "all heads alike" if effect is None else "by the artifact's effects",
    )
    return decoding


def _most_cache_bytes(cache: Any) -> int:
    """Bytes that the engine's cache may take; 0 on a CPU, where room for it is given alone."""
    if current_platform.is_cpu():
        return 0
    given = getattr(cache, "kv_cache_memory_bytes", None)
    return given or int(cache.gpu_memory_utilization * current_platform.get_device_total_memory())
