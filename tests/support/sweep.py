"""Every decoder family of transformers under a session, measured on tiny random models."""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError

from shareprefill import share_prefill
from shareprefill.artifact import Policy
from shareprefill.config import RuntimeConfig
from shareprefill.errors import ShareprefillError, UnsupportedError
from shareprefill.models import geometry
from shareprefill.runtime.generation import cache_of
from shareprefill.runtime.layers import LayerKind, LayerUse, layer_uses
from shareprefill.runtime.plan import what_is_read
from tests.support.families import FAMILIES, SMALL, Family, build
from tests.support.tiny import tiny_artifact, token_ids

DENSE = RuntimeConfig(min_tokens=10**9)
EVERYTHING = RuntimeConfig(gamma=1.0, min_tokens=0, max_density=1.0)
TOKENS = 75
# Larger ones cannot be made small by the names of their sizes.
_PARAMETERS = 20_000_000
# Differences that are rounding, in standard deviations of the logits.
ROUNDING = 1e-4
# What a tiny model of a family that wants other sizes raises.
_UNBUILT = (
    *(AttributeError, AssertionError, ImportError, IndexError, KeyError, NotImplementedError),
    *(RuntimeError, TypeError, ValueError, StrictDataclassError),
)


@dataclass(frozen=True)
class Row:
    """What a session does with a family.

    Attributes:
        family: Its name.
        shared: `yes`, `partly` or `no`.
        layers: Layers by what happens to them.
        dense: Largest difference of a dense session's logits from the model's own, in standard
            deviations of the logits; None where no session runs.
        sparse: The same of a session that computes sparsely, and takes all blocks.
        reason: What is not shared and why; why the family was refused, or is no case for us.
    """

    family: str
    shared: str
    layers: str = ""
    dense: float | None = None
    sparse: float | None = None
    reason: str = ""

    @property
    def is_wrong(self) -> bool:
        """Whether a session changes the model's results, dense or with all blocks."""
        differences = [d for d in (self.dense, self.sparse) if d is not None]
        return any(not d < ROUNDING for d in differences) or self.shared == "breaks"

    @property
    def line(self) -> str:
        """Its row of the table in docs/models.md."""
        dense, sparse = _number(self.dense), _number(self.sparse)
        cells = (self.family, self.shared, self.layers, dense, sparse, self.reason)
        return f"| {' | '.join(cells)} |"


def _number(difference: float | None) -> str:
    if difference is None:
        return ""
    return "< 1e-5" if difference < 1e-5 else f"{difference:.0e}"


def every_family() -> tuple[Family, ...]:
    """The families that are described by hand, and all other causal decoders of transformers."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    known = {family.name for family in FAMILIES}
    others = [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name not in known]
    return tuple(sorted([*FAMILIES, *map(_described, others)], key=lambda family: family.name))


# What families want beside small sizes.
_OPTIONS: dict[str, dict[str, Any]] = {
    "helium": {"head_dim": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
}


def _described(name: str) -> Family:
    """A family by the names that transformers gives its classes."""
    from transformers.models.auto.configuration_auto import (
        CONFIG_MAPPING_NAMES,  # pyright: ignore[reportPrivateImportUsage]
    )
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    names: Any = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name]
    model = names if isinstance(names, str) else names[0]
    config = CONFIG_MAPPING_NAMES[name].removesuffix("Config")
    return Family(name, config, _OPTIONS.get(name, {}), config=config, model=model, sizes={})


def build_small(family: Family) -> Any:
    """A random model of a family; the sizes of one that is not described are found by name.

    Raises:
        ValueError: it stays large.
    """
    if family.sizes:
        return build(family)
    transformers = importlib.import_module("transformers")
    config = _small(getattr(transformers, f"{family.config}Config"), **family.options)
    if hasattr(config, "is_decoder"):
        config.is_decoder = True
    kind = getattr(transformers, family.class_name)
    with torch.device("meta"):
        size = sum(p.numel() for p in kind(config).parameters())
    if size > _PARAMETERS:
        raise ValueError(f"its smallest model that we can build has {size:,} parameters")
    torch.manual_seed(0)
    return kind(config).float().eval()


def _small(kind: Any, **options: Any) -> Any:
    """A configuration with small sizes, and layers of every type that its default has."""
    default = kind()
    sizes = {name: value for name, value in SMALL.items() if hasattr(default, name)}
    if getattr(default, "sliding_window", None) is None:
        sizes.pop("sliding_window", None)
    parts = {
        name: _small(part)
        for name, part in (getattr(kind, "sub_configs", None) or {}).items()
        if isinstance(part, type) and part.__name__ != "AutoConfig"
    }
    if "qk_rope_head_dim" in sizes:
        sizes |= {"head_dim": sizes["qk_rope_head_dim"], "num_key_value_heads": 4}
    sizes |= options
    if options or not getattr(default, "layer_types", None):
        return kind(**sizes, **parts)
    wanted = set(default.layer_types)
    for layers in (2, 3, 4, 6, 8):
        sizes["num_hidden_layers"] = layers
        try:
            config = kind(**sizes, **parts)
        except (ValueError, StrictDataclassError):
            continue
        if set(config.layer_types) == wanted:
            break
    else:
        first = [default.layer_types.index(one) for one in sorted(wanted)]
        types = [default.layer_types[place] for place in sorted(first)]
        config = kind(**{**sizes, "num_hidden_layers": len(types), "layer_types": types}, **parts)
    return config


def _prompts() -> tuple[torch.Tensor, torch.Tensor]:
    """Two prompts without tokens that stand for images, and the mask of padding on the left."""
    torch.manual_seed(1)
    ids = token_ids(2, TOKENS, vocabulary=100)
    mask = torch.ones_like(ids)
    mask[1, :31] = 0
    return ids, mask


def _prefill(model: Any) -> torch.Tensor:
    return model(input_ids=_prompts()[0], use_cache=False).logits


def _batch(model: Any) -> torch.Tensor:
    """Logits of the real tokens of a padded batch."""
    ids, mask = _prompts()
    return model(input_ids=ids, attention_mask=mask, use_cache=False).logits[mask.bool()]


def _chunks(model: Any) -> torch.Tensor:
    ids = _prompts()[0][:1]
    first = model(input_ids=ids[:, :40], use_cache=True)
    second = model(input_ids=ids[:, 40:], **cache_of(first), use_cache=True)
    return torch.cat([first.logits, second.logits], 1)


_RUNS: dict[str, Callable[[Any], torch.Tensor]] = {
    "prefill": _prefill,
    "batch": _batch,
    "chunks": _chunks,
}


@torch.no_grad()
def _own_runs(model: Any) -> dict[str, torch.Tensor]:
    """Logits of what a model can run by itself: some have no cache, or no padding.

    Raises:
        ValueError: not even a prefill.
    """
    found, failed = {}, ""
    for name, run in _RUNS.items():
        try:
            found[name] = run(model)
        except _UNBUILT as error:
            failed = failed or _text(error)
    if not found:
        raise ValueError(failed)
    return found


@torch.no_grad()
def _difference(model: Any, own: dict[str, torch.Tensor]) -> float:
    """The largest difference of a model's logits from its own, in their standard deviations."""
    return max(
        ((_RUNS[name](model) - logits).abs().max() / logits.std()).item()
        for name, logits in own.items()
    )


def measure(family: Family) -> Row:
    """Runs a family's tiny model without a session, with a dense one, and with all blocks."""
    try:
        model = build_small(family)
        own = _own_runs(model)
    except _UNBUILT as error:
        return Row(family.name, "not built", reason=_text(error))
    try:
        uses = layer_uses(model)
        kinds = {use.index: use.kind for use in uses}
        heads = geometry(model).heads
        artifact = tiny_artifact(
            model,
            [
                [Policy.SAMPLED if kinds.get(layer) is LayerKind.SHARED else Policy.DENSE] * heads
                for layer in range(geometry(model).layers)
            ],
        )
        with share_prefill(model, artifact, DENSE):
            dense = _difference(model, own)
        with share_prefill(model, artifact, what_is_read(artifact, EVERYTHING)):
            sparse = _difference(model, own)
    except ShareprefillError as error:
        return Row(family.name, "no", reason=f"refused: {_text(error)}")
    except _UNBUILT as error:
        return Row(family.name, "breaks", reason=f"{type(error).__name__}: {_text(error)}")
    said = _said(family.name, uses)
    counted = Counter(use.kind.value for use in uses)
    layers = ", ".join(f"{count} {kind}" for kind, count in sorted(counted.items()))
    return Row(family.name, said.shared, layers, dense, sparse, said.reason)


def _text(error: Exception) -> str:
    return " ".join(str(error).split()).replace("|", "/")[:300]


def support_of(family: Family) -> Row:
    """The words for what a session does with a family, without a measurement."""
    try:
        return _said(family.name, layer_uses(build(family)))
    except UnsupportedError as error:
        return Row(family.name, "no", reason=f"refused: {_text(error)}")


def _said(name: str, uses: tuple[LayerUse, ...]) -> Row:
    shared = [use for use in uses if use.kind is LayerKind.SHARED]
    details = sorted({_explained(use) for use in uses if use.kind is not LayerKind.SHARED})
    word = "yes" if not details else "partly" if shared else "no"
    return Row(name, word, reason="; ".join(details))


def _explained(use: LayerUse) -> str:
    if use.kind is LayerKind.WINDOW:
        return "sliding-window layers run dense inside their window"
    if use.kind is LayerKind.OWN:
        return f"layers with {use.reason} run with the model's own attention"
    if use.kind is LayerKind.OWN_MASK:
        return f"{use.reason} layers run dense with transformers' own mask"
    return f"{use.reason} layers are left alone"


DOCUMENT = Path(__file__).parents[2] / "docs" / "models.md"

_TEXT = """# Models

Any decoder of transformers that calls attention through its attention interface runs under a
session. What of it is shared is decided layer by layer, on the call that the layer makes:

- **full causal attention** is shared: multi-head latent attention (MLA), layers without RoPE,
  layers whose head_dim or KV heads differ from other layers' (Gemma 4), and differential attention
  among it;
- **soft-capping and sinks** are shared where the family's own function means just these by them,
  which is compared on a few tokens at its first call. Such a layer's dense prefills are computed by
  transformers' own function for the family, in pieces of query rows;
- **packed sequences** are taken apart, and each is treated as if it came alone (docs/runtime.md);
- **sliding windows** run dense inside their window;
- **chunked masks and blocks of image tokens** that see each other run dense with transformers' own
  mask;
- **linear attention, state-space and convolution layers, vision and audio towers** are not touched.

A call with an option that is not known to be harmless runs with the family's own function if that
function reads the option, and is refused if not. `sp doctor --model <model>` prints which of this
holds for each layer of a model.

`python tools/family_table.py` writes the table: it builds a small random model of every causal
decoder of transformers that can be made small, and compares logits of a prefill, of the real tokens
of a padded batch, and of two chunks against a cache, as far as the model runs these by itself.
"dense" and "all blocks" are the largest differences from the model without a session, in standard
deviations of its logits: of a session that stays dense, and of one that computes sparsely and
leaves no block out. "no" and "partly" have their reason beside them.

CodeGen and GPT-J call attention through the interface from transformers 5.24 on, and are shared
there.

"""


def document(rows: list[Row], run: str) -> str:
    """The text of docs/models.md.

    Args:
        rows: What was measured.
        run: The commit, versions and device of the run.
    """
    built = [row for row in rows if row.shared != "not built"]
    head = ("family", "shared", "layers", "dense", "all blocks", "what is not shared, and why")
    table = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}", *(row.line for row in built)]
    left = [f"- {row.family}: {row.reason}" for row in rows if row.shared == "not built"]
    counts = Counter(row.shared for row in built)
    said = ", ".join(f"{counts[word]} {word}" for word in ("yes", "partly", "no"))
    return (
        f"{_TEXT}{len(built)} families ({said}); {run}.\n\n"
        + "\n".join(table)
        + "\n\nNot built small, and so not measured:\n\n"
        + "\n".join(left)
        + "\n"
    )


def words(line: str) -> tuple[str, str, str]:
    """Family, shared and reason of a row of the table; what a run measures left out."""
    cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
    return cells[0], cells[1], cells[-1]
