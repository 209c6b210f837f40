"""One frozen configuration per stage: the only place where defaults live. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from numbers import Integral, Real
from types import UnionType
from typing import Any, Literal, Self, Union, get_args, get_origin, get_type_hints

from shareprefill.errors import ConfigError, did_you_mean
from shareprefill.errors import require as _require
from shareprefill.policy_names import (
    NOT_READ_BY,
    READ_BY,
    check_policy_name,
    current_policy,
    reads,
    require_read,
)

Metric = Literal["jaccard", "jaccard-raw", "code"]
Linkage = Literal["average", "complete", "single"]
Nonfinite = Literal["dense", "error"]
Precision = Literal["model", "fp8"]
Decode = Literal["dense", "sparse"]

METRICS: tuple[str, ...] = get_args(Metric)
LINKAGES: tuple[str, ...] = get_args(Linkage)
# What `sp calibrate` generates itself: tasks, plain documentation, and all of them in turn.
DATA_SETS: tuple[str, ...] = (
    *("retr_kv", "retr_passkey", "retr_number", "math_find", "code_run", "variable_tracking"),
    *("needle", "text", "mixture"),
)
NONFINITE: tuple[str, ...] = get_args(Nonfinite)
PRECISIONS: tuple[str, ...] = get_args(Precision)
# Of heads that run in FP8 where no bound is asked for.
FP8_ERROR = 0.1
DECODES: tuple[str, ...] = get_args(Decode)
# Of sparse decode steps where none is asked for.
DECODE_DENSITY = 0.2
# First and last causal key blocks that every query block reads, where no others are asked for.
SINK_BLOCKS = 1
LOCAL_BLOCKS = 2
BLOCK_SIZES: tuple[int, ...] = (16, 32, 64, 128, 256)
MIN_RESOLUTION = 8


def _require_fraction(name: str, value: float) -> None:
    _require(0.0 < value <= 1.0, name, value, "above 0 and at most 1")


def _require_distance(name: str, value: float) -> None:
    _require(0.0 <= value <= 1.0, name, value, "between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What the stage configurations share: exact conversion from and to plain dictionaries."""

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-ready values (tuples become lists)."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`.

        Raises:
            ConfigError: a key is unknown, or a value is of another type or outside its range.
        """
        unknown = sorted(set(values) - {field.name for field in fields(cls)})
        if unknown:
            near = did_you_mean(unknown[0], [field.name for field in fields(cls)])
            raise ConfigError(f"{cls.__name__} has no option {', '.join(map(repr, unknown))}{near}")
        hints = get_type_hints(cls)
        for name, value in values.items():
            if not _fits(value, hints[name]):
                raise ConfigError(
                    f"{name} = {value!r} is of the wrong type: it must be {_described(hints[name])}"
                )
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def _choices(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _fits(value: object, hint: Any) -> bool:
    """Whether a value is of a field's type; lists stand for tuples."""
    if len(choices := _choices(hint)) > 1:
        return any(_fits(value, choice) for choice in choices)
    if get_origin(hint) is Literal:
        return isinstance(value, str)  # which ones are allowed, the stage says
    if get_origin(hint) is tuple:
        item = get_args(hint)[0]
        return isinstance(value, list | tuple) and all(_fits(each, item) for each in value)
    # A bool is a number to Python, and numbers of NumPy are ints and floats to us.
    number = {int: Integral, float: Real}.get(hint)
    if number is not None:
        return isinstance(value, number) and not isinstance(value, bool)
    return isinstance(value, hint)


def _described(hint: Any, *, many: bool = False) -> str:
    """A field's type in words."""
    kind, *others = _choices(hint)
    if others:
        return " or ".join([_described(kind), *("None" for _ in others)])
    if get_origin(kind) is tuple:
        return f"a list of {_described(get_args(kind)[0], many=True)}"
    if get_origin(kind) is Literal:
        kind = str
    one = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}[kind]
    return f"{one.removeprefix('a ')}s" if many else one


@dataclass(frozen=True, kw_only=True)
class CalibrateConfig(Stage):
    """What `sp calibrate` captures.

    Attributes:
        model: A hub id, a local folder, a GGUF file, or a built-in model's name.
        data: Data set names, files, folders or `hub:` addresses; prompts alternate between them.
        samples: Prompts in all.
        length: Tokens a prompt (generated prompts come close to it, none is longer).
        block_size: Tokens a block, of the pooled maps and of the runtime's patterns.
        seed: Seed of the generated prompts.
        device: `auto`, `cpu`, `cuda`, `cuda:1`, ...
        dtype: `auto` (float32 on a CPU, the model's own elsewhere), or a torch dtype's name.
        rows: Query rows a block that the row-sampled maps are taken from, at least three counts,
            ascending: the first is the check before sharing, the last the row-sampled estimate, and
            all but the first may be a pivot's.
        map_blocks: Blocks a side of the maps that are kept, at most: of longer prompts several
            blocks become one. Fewer, where a prompt's maps would take more than 300 MB.
        effect_tokens: Positions of each prompt, at most, that the effect of lost attention on the
            predictions is measured on; of a longer prompt its beginning and its end. 0: not at all,
            as for a model without gradients; budgets then go by recall.
    """

    model: str
    data: tuple[str, ...] = ("mixture",)
    samples: int = 12
    length: int = 8192
    block_size: int = 128
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    rows: tuple[int, ...] = (1, 2, 4, 8)
    map_blocks: int = 128
    effect_tokens: int = 2048

    def __post_init__(self) -> None:
        _require(bool(self.model), "model", self.model, "a hub id, a folder or a built-in name")
        _require(bool(self.data), "data", self.data, "at least one data set")
        _require(self.samples >= 3, "samples", self.samples, "at least 3 (one prompt is held out)")
        _require(
            self.block_size in BLOCK_SIZES, "block_size", self.block_size, f"one of {BLOCK_SIZES}"
        )
        _require(
            self.length >= 4 * self.block_size,
            "length",
            self.length,
            f"at least four blocks ({4 * self.block_size} tokens)",
        )
        _require(
            self.dtype in ("auto", "float32", "bfloat16", "float16"),
            "dtype",
            self.dtype,
            "auto, float32, bfloat16 or float16",
        )
        _require(self.map_blocks >= 8, "map_blocks", self.map_blocks, "at least 8")
        _require(
            self.effect_tokens == 0 or self.effect_tokens >= 4 * self.block_size,
            "effect_tokens",
            self.effect_tokens,
            f"0, or at least four blocks ({4 * self.block_size} tokens)",
        )
        _require(
            len(self.rows) >= 3
            and list(self.rows) == sorted(set(self.rows))
            and self.rows[0] >= 1
            and self.rows[-1] <= self.block_size,
            "rows",
            self.rows,
            f"at least three ascending row counts from 1 to the block size ({self.block_size})",
        )


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Stage):
    """How the autoencoder is trained.

    Attributes:
        code_size: Dimensions of a code.
        resolution: Side of the square that every map is pooled to before it is encoded, at most;
            maps of fewer blocks keep their own.
        hidden: Width of the nonlinear branches.
        epochs: Passes over the training maps at most, with each strength of variation tried.
        patience: Epochs without a better validation loss before training stops. The loss may rise
            while the learning rate is high and reach its best only as the rate falls.
        batch_size: Maps a step.
        learning_rate: AdamW's peak learning rate.
        seed: Seed of initialisation and shuffling.
    """

    code_size: int = 64
    resolution: int = 64
    hidden: int = 256
    epochs: int = 100
    patience: int = 50
    batch_size: int = 128
    learning_rate: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        _require(1 <= self.code_size <= 4096, "code_size", self.code_size, "between 1 and 4096")
        allowed = f"between {MIN_RESOLUTION} and 512"
        _require(MIN_RESOLUTION <= self.resolution <= 512, "resolution", self.resolution, allowed)
        _require(self.hidden >= 1, "hidden", self.hidden, "at least 1")
        _require(self.epochs >= 1, "epochs", self.epochs, "at least 1")
        _require(self.patience >= 1, "patience", self.patience, "at least 1")
        _require(self.batch_size >= 1, "batch_size", self.batch_size, "at least 1")
        _require(0 < self.learning_rate < 1, "learning_rate", self.learning_rate, "between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class ClusterConfig(Stage):
    """How heads are clustered, and how each head's policy is chosen.

    Attributes:
        k: Number of clusters; `auto` (None) chooses the one whose heads are most alike (silhouette)
            of those that cost at most 1 % more than the least.
        metric: `jaccard` (patterns of the consensus maps), `jaccard-raw` (patterns of the mean
            maps, no autoencoder), `code` (cosine distance of mean codes).
        linkage: Agglomerative linkage on the precomputed distances.
        min_size: Heads that a cluster needs to share a pivot.
        target_recall: Attention mass that every head's pattern must cover on each held-out prompt.
        budget: Mean density of all heads on held-out prompts instead: each head's policy and mass
            to cover are those that give the least predicted KL divergence for it. None: by
            target_recall.
        max_kl: Predicted KL divergence from dense attention, in nats a position, that the fewest
            blocks are spent for, instead.
        gamma: Attention mass that the patterns compared by the Jaccard metrics cover.
        slack: How much less of its attention a sharing head's sampled rows may have inside the
            pivot's pattern than on the held-out prompt where they had least: with less, the head
            takes its fallback.
        tau: Jensen-Shannon distance to the pivot under which a head shares by the paper's rule,
            which a session follows with `policy="shareprefill"`; nothing planned here uses it.
        delta: Jensen-Shannon distance to the uniform distribution above which a head whose check
            fails counts as highly sparse and takes a vertical-slash pattern.
        pivot_rows: Query rows a block that a pivot's pattern is taken from: 0 for all of them, as
            in the paper; otherwise one of the captured row counts; `auto` (None) takes what costs
            least.
    """

    k: int | None = None
    metric: Metric = "jaccard"
    linkage: Linkage = "average"
    min_size: int = 2
    target_recall: float = 0.95
    budget: float | None = None
    max_kl: float | None = None
    gamma: float = 0.9
    slack: float = 0.04
    tau: float = 0.2
    delta: float = 0.3
    pivot_rows: int | None = None

    def __post_init__(self) -> None:
        _require(self.k is None or self.k >= 1, "k", self.k, "'auto' or a number of at least 1")
        _require(self.metric in METRICS, "metric", self.metric, f"one of {METRICS}")
        _require(self.linkage in LINKAGES, "linkage", self.linkage, f"one of {LINKAGES}")
        _require(self.min_size >= 2, "min_size", self.min_size, "at least 2")
        _require_fraction("target_recall", self.target_recall)
        if self.budget is not None:
            _require_fraction("budget", self.budget)
        if self.max_kl is not None:
            _require(0 < self.max_kl < math.inf, "max_kl", self.max_kl, "above 0 and finite")
            if self.budget is not None:
                raise ConfigError("budget and max_kl exclude each other: give one of them")
        for name in ("budget", "max_kl"):
            if getattr(self, name) is not None and self.target_recall != type(self).target_recall:
                raise ConfigError(f"target_recall and {name} exclude each other: give one of them")
        _require_fraction("gamma", self.gamma)
        _require_distance("slack", self.slack)
        _require_distance("tau", self.tau)
        _require_distance("delta", self.delta)
        rows = self.pivot_rows
        _require(rows is None or rows >= 0, "pivot_rows", rows, "'auto', 0 (all rows) or more")


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig(Stage):
    """What a session may change; None takes the artifact's value.

    An option that the policy does not read is refused (`policy_names.reads`).

    Attributes:
        policy: `auto` (each head as the artifact says), `shareprefill` (the paper's online rule
            on the artifact's clusters), or one policy for every head. Only the first two need an
            artifact. A policy may have parameters, `streaming:local_blocks=16`, and be a class of
            one's own, `module:Class` (docs/add-a-policy.md).
        gamma: Attention mass a pattern covers, for all heads; None: chosen per head offline.
        slack: With `auto`, how much less than gamma a sharing head's sampled rows may have inside
            its pivot's pattern, for all heads; None: chosen per head offline.
        tau: With `shareprefill`, Jensen-Shannon distance to the pivot under which a head shares;
            None: the artifact's, 0.2 unless `sp cluster` was told another.
        delta: With `auto` and `shareprefill`, Jensen-Shannon distance to uniform above which a head
            is highly sparse; None: the artifact's, 0.3 unless `sp cluster` was told another.
        pivot_rows: With `auto`, query rows a block of a pivot's map, 0 for all of them; None: the
            artifact's.
        sample_rows: With `auto` and `sampled`, query rows a block of the row-sampled estimate.
        check_rows: With `auto`, query rows a block of the check before sharing.
        sink_blocks: First key blocks that every query block reads; None: 1.
        local_blocks: Last key blocks, the diagonal one among them, that every query block reads;
            None: 2.
        min_tokens: Prompts shorter than this run dense; None: the device's measured crossover, 5120
            on a CPU and 6144 on a GPU (8192 in vLLM), there for layers of 32 heads of 128, more for
            smaller ones.
        max_density: Heads whose pattern is denser are computed densely; None: measured likewise,
            0.6 on a CPU and 0.7 on a GPU.
        nonfinite: What to do about NaN or Inf in a layer's queries or keys: `dense` (a head whose
            own pattern rests on them reads every causal block, and no head shares such a pattern)
            or `error` (also for values; waits for the device at every layer).
        precision: Of the operands of sparse attention: `model` (the model's own) or `fp8` (e4m3,
            on Hopper GPUs; not with policy `dense`). Patterns are chosen in the model's own, and
            prompts that run dense are computed in it.
        fp8_error: With `fp8`, heads whose output was off by more than this in the calibration,
            relative to its norm, stay in the model's own precision; None: 0.1.
        decode: How decode steps attend: `dense`, or `sparse`: each step and KV head reads few key
            blocks, chosen by a sketch of the keys. No key is dropped.
        decode_density: With `sparse`, blocks read over all blocks, mean over steps, layers and
            heads; None: 0.2.
    """

    policy: str = "auto"
    gamma: float | None = None
    slack: float | None = None
    tau: float | None = None
    delta: float | None = None
    pivot_rows: int | None = None
    sample_rows: int | None = None
    check_rows: int | None = None
    sink_blocks: int | None = None
    local_blocks: int | None = None
    min_tokens: int | None = None
    max_density: float | None = None
    nonfinite: Nonfinite = "dense"
    precision: Precision = "model"
    fp8_error: float | None = None
    decode: Decode = "dense"
    decode_density: float | None = None

    def __post_init__(self) -> None:
        _require(self.decode in DECODES, "decode", self.decode, f"one of {DECODES}")
        if self.decode_density is not None:
            _require_fraction("decode_density", self.decode_density)
            if self.decode != "sparse":
                raise ConfigError(
                    f"decode_density = {self.decode_density} is for sparse decode steps: add "
                    "decode = 'sparse', or leave it out"
                )
        _require(self.precision in PRECISIONS, "precision", self.precision, f"one of {PRECISIONS}")
        if self.fp8_error is not None:
            _require(self.fp8_error >= 0, "fp8_error", self.fp8_error, "0 or more")
            if self.precision != "fp8":
                raise ConfigError(
                    f"fp8_error = {self.fp8_error} is for FP8 attention: add precision = 'fp8', or "
                    "leave it out"
                )
        object.__setattr__(self, "policy", current_policy(self.policy))
        _require(self.nonfinite in NONFINITE, "nonfinite", self.nonfinite, f"one of {NONFINITE}")
        check_policy_name(self.policy)
        for name in ("gamma", "max_density"):
            if (value := getattr(self, name)) is not None:
                _require_fraction(name, value)
        if self.slack is not None:
            _require(-1.0 <= self.slack <= 1.0, "slack", self.slack, "between -1 and 1")
        for name in ("tau", "delta"):
            if (value := getattr(self, name)) is not None:
                _require_distance(name, value)
        for name in ("pivot_rows", "min_tokens", "sink_blocks"):
            value = getattr(self, name)
            _require(value is None or value >= 0, name, value, "0 or more")
        for name in ("sample_rows", "check_rows", "local_blocks"):
            value = getattr(self, name)
            _require(value is None or value >= 1, name, value, "at least 1")
        for name, value in self.given().items():
            require_read(self.policy, name, value)

    def given(self) -> dict[str, Any]:
        """The options by name that not every policy reads, where they are not the default."""
        values = {name: getattr(self, name) for name in (*READ_BY, *NOT_READ_BY)}
        return {name: value for name, value in values.items() if value != getattr(type(self), name)}

    def with_policy(self, policy: str) -> RuntimeConfig:
        """The same under another policy, without what was chosen for the former or is not read."""
        chosen = ("gamma", "slack", "tau", "delta", "pivot_rows", "check_rows")
        left_out = {
            name: getattr(type(self), name)
            for name in (*READ_BY, *NOT_READ_BY)
            if name in chosen or not reads(policy, name)
        }
        return replace(self, policy=policy, **left_out)
