"""The artifact: what clustering found out about a model's heads, and its file format.

An artifact is a safetensors file with some tensors and one metadata string, canonical JSON. Equal
artifacts have equal bytes. Loading trusts nothing in the file.

Version 2 added the fingerprint's sketch, checkpoint and attention, effects, and the estimator.
Until it is released, optional entries may be added to it: a line in `_TENSORS` or `_OBJECTS`, and a
field of `Artifact` with the default None. In layers that were not captured, measured tensors are
NaN: files of before that was so have made-up values there, which loading turns into NaN.
"""

from __future__ import annotations

import hashlib
import io
import logging
import math
import os
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from enum import IntEnum
from io import BufferedIOBase
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from shareprefill.config import BLOCK_SIZES
from shareprefill.errors import ArtifactError
from shareprefill.files import atomic_write_bytes, kind_of, printable
from shareprefill.models import (
    BUILT_IN,
    Fingerprint,
    ModelGeometry,
    settings_that_differ,
    warn_once,
)
from shareprefill.safetensors_reader import (
    Layout,
    RefusedError,
    canonical_json,
    check_json,
    check_keys,
    check_text,
    open_regular,
    parse_json,
    quoted,
    read_header,
    read_tensors,
)
from shareprefill.weights import SKETCH_SIZE, sketch_distances

logger = logging.getLogger(__name__)

# Of an organisation's or a user's model: nothing else in a file is looked up on the hub.
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)

FORMAT_VERSION = 2
# The relative distance of a layer's attention weights up to which a model counts as the artifact's:
# the same weights in 4 bits come to at most 0.17, in 2 bits to 0.5, unrelated ones to 1.3 and more
# (docs/reliability.md).
NEAR_WEIGHTS = 0.3
MAX_HEADS = 1 << 20
MAX_CODE_SIZE = 4096
_KEY = "shareprefill"
_REGENERATE = "regenerate it with sp calibrate and sp cluster"
_SHA256 = re.compile(r"[0-9a-f]{64}")
_HEXADECIMAL = re.compile(r"[0-9a-f]*")


class _Kind(NamedTuple):
    """A tensor of the file: dtype, shape (L, H, Z: layers, heads, code size), values allowed.

    What is measured is NaN in layers that were not captured.
    """

    dtype: torch.dtype
    shape: tuple[str | int, ...] = ("L", "H")
    lowest: float = -math.inf
    highest: float = math.inf
    optional: bool = False
    measured: bool = False


_TENSORS = {
    "cluster": _Kind(torch.int32),
    "policy": _Kind(torch.int8),
    "pivot": _Kind(torch.int32),
    "fallback": _Kind(torch.int8),
    "gamma": _Kind(torch.float32, lowest=0, highest=1),
    "fallback_gamma": _Kind(torch.float32, lowest=0, highest=1),
    "slack": _Kind(torch.float32, lowest=-1, highest=1),
    "recall": _Kind(torch.float32, lowest=0, highest=1, measured=True),
    "density": _Kind(torch.float32, lowest=0, highest=1, measured=True),
    "instability": _Kind(torch.float32, lowest=0, measured=True),
    "effect": _Kind(torch.float32, lowest=0, optional=True, measured=True),
    "step_effect": _Kind(torch.float32, lowest=0, optional=True, measured=True),
    "fp8_error": _Kind(torch.float32, lowest=0, optional=True, measured=True),
    "code": _Kind(torch.float32, ("L", "H", "Z"), measured=True),
}
_ABOVE_ZERO = {"gamma", "fallback_gamma"}
# JSON objects in the metadata, and whether a file may lack them.
_OBJECTS = {"configuration": False, "summary": False, "estimator": True}
# Weights of the lines of `LineWeights`.
_LINES = 7
_ROWS = re.compile(r"[1-9][0-9]{0,3}")
_METADATA = {
    "format_version",
    "model",
    "fingerprint",
    "code_size",
    "block_size",
    "thresholds",
    "rows",
    "sha256",
}


class Policy(IntEnum):
    """How a head's block pattern comes about."""

    DENSE = 0
    PIVOT = 1
    SHARE = 2
    SAMPLED = 3
    VERTICAL_SLASH = 4
    SMOOTHED = 5

    @property
    def label(self) -> str:
        """The policy's name in options and tables."""
        return self.name.lower().replace("_", "-")


@dataclass(frozen=True)
class Thresholds:
    """The thresholds of arXiv 2505.19578, section 4.

    Attributes:
        gamma: Attention mass that a pattern covers, in (0, 1]; a head's own value goes before it.
        tau: Jensen-Shannon distance to the pivot under which a head shares by the paper's online
            rule, in [0, 1]; planned sharing has each head's `slack` instead.
        delta: Jensen-Shannon distance to uniform above which a head is highly sparse, in [0, 1].
    """

    gamma: float
    tau: float
    delta: float


@dataclass(frozen=True)
class Rows:
    """Query rows a block that an exact map is taken from: `pivot` (0: all), `sample`, `check`."""

    pivot: int
    sample: int
    check: int


@dataclass(frozen=True, eq=False)
class Artifact:
    """The policy of every head of one model, and how it was found.

    A head's id is `layer * H + head`. All tensors lie on the CPU. In layers that were not captured
    (those without full causal attention), heads are DENSE, and what is measured is NaN: `recall`,
    `density`, `instability`, `code`, `effect`, `step_effect`, `fp8_error`.

    Attributes:
        model: The model's name, as the user gave it.
        fingerprint: The model's geometry, and what tells its attention from others'.
        cluster: `[L, H]` int32, the head's cluster; -1: none.
        policy: `[L, H]` int8, codes of `Policy`.
        pivot: `[L, H]` int32, id of the head whose pattern a SHARE head uses, a PIVOT head's own
            id, -1 for the others.
        fallback: `[L, H]` int8, a SHARE head's policy when its check fails (SMOOTHED,
            SAMPLED, VERTICAL_SLASH or DENSE); the others' own policy.
        gamma: `[L, H]` float32, attention mass that the head's pattern covers, in (0, 1].
        fallback_gamma: `[L, H]` float32, the same for the fallback's pattern.
        slack: `[L, H]` float32, how much less than `gamma` of its attention a SHARE head's sampled
            rows may have inside its pivot's pattern for it to share, in [-1, 1]; negative where
            they must have more.
        recall: `[L, H]` float32, attention mass inside the pattern on held-out prompts, in [0, 1].
        density: `[L, H]` float32, share of causal blocks computed on held-out prompts, in [0, 1].
        instability: `[L, H]` float32, spread of the head's code over prompts, at least 0.
        code: `[L, H, Z]` float32, the head's mean code.
        block_size: Tokens a block.
        thresholds: The online rule's thresholds.
        rows: Query rows a block of the exact maps.
        configuration: JSON object, the configuration of every stage that made the artifact.
        summary: JSON object, what was measured (expected density, recall, ...).
        effect: `[L, H]` float32, KL divergence of the predictions from those of dense attention, in
            nats a position, for a mean square of 1, over query blocks, of the attention mass that
            the head loses; None where it was not measured.
        step_effect: `[L, H]` float32, the same of decode steps that read few blocks, which tells
            heads from each other alone; None where it was not measured.
        fp8_error: `[L, H]` float32, how far the head's output is off where its operands are rounded
            to e4m3, relative to the output's norm; None where it was not measured.
        estimator: For counts of sampled rows a block, what the lines through a block count in the
            estimate of its mass: weights in the order of `LineWeights`, fitted to the model; None
            where none were.
    """

    model: str
    fingerprint: Fingerprint
    cluster: Tensor
    policy: Tensor
    pivot: Tensor
    fallback: Tensor
    gamma: Tensor
    fallback_gamma: Tensor
    slack: Tensor
    recall: Tensor
    density: Tensor
    instability: Tensor
    code: Tensor
    block_size: int
    thresholds: Thresholds
    rows: Rows
    configuration: dict[str, Any]
    summary: dict[str, Any]
    effect: Tensor | None = None
    step_effect: Tensor | None = None
    fp8_error: Tensor | None = None
    estimator: dict[str, Any] | None = None

    def __repr__(self) -> str:
        """A few lines; the tensors are left out."""
        sizes = self.fingerprint.geometry
        counts = (f"{count} {name}" for name, count in self.policy_counts().items() if count)
        return (
            f"<Artifact of {self.model!r}, {sizes.layers} layers of {sizes.heads} heads, blocks of "
            f"{self.block_size} tokens\n"
            f"heads: {', '.join(counts)}\n"
            f"expected: density {self.expected('density'):.3f}, recall "
            f"{self.expected('recall'):.3f}>"
        )

    @property
    def heads(self) -> int:
        """Query heads of all layers, L * H."""
        return self.fingerprint.geometry.layers * self.fingerprint.geometry.heads

    @property
    def measured_layers(self) -> list[int]:
        """The layers that were captured."""
        return (~self.recall.isnan().all(1)).nonzero()[:, 0].tolist()

    def expected(
        self, name: Literal["recall", "density"], layers: Sequence[int] | None = None
    ) -> float:
        """The mean over the heads of captured layers; NaN where none of them was captured.

        Args:
            name: Of what was measured.
            layers: Those to look at; None: all.
        """
        values: Tensor = getattr(self, name)
        return (values if layers is None else values[[*layers]]).double().nanmean().item()

    @property
    def measured_tokens(self) -> int | None:
        """Tokens of the longest prompt that it was measured on; None where it does not say."""
        tokens = self.summary.get("held_out_tokens")
        known = [n for n in tokens if type(n) is int] if isinstance(tokens, list) else []
        return max(known, default=None)

    @property
    def goal(self) -> tuple[str, float] | None:
        """The option of `ClusterConfig` that heads were planned by; None where it does not say."""
        options = self.configuration.get("cluster")
        for name in ("budget", "max_kl", "target_recall"):
            value = options.get(name) if isinstance(options, dict) else None
            if isinstance(value, int | float) and not isinstance(value, bool):
                return name, float(value)
        return None

    @property
    def goal_in_words(self) -> str:
        """What heads were planned for, as in "planned for ..."."""
        if self.goal is None:
            return "a goal that the artifact does not name"
        name, value = self.goal
        return {
            "budget": f"a density of {value:g}",
            "max_kl": f"a KL divergence of {value:g} nats a position",
            "target_recall": f"a recall of {value:g} in every head",
        }[name]

    def policy_counts(self) -> dict[str, int]:
        """Heads per policy label, in the order of `Policy`, zeros included."""
        counts = torch.bincount(self.policy.flatten().long(), minlength=len(Policy)).tolist()
        return {policy.label: counts[policy] for policy in Policy}


def artifact_bytes(artifact: Artifact) -> bytes:
    """The file's content: equal for equal artifacts, whatever the machine or the time.

    Raises:
        ArtifactError: the artifact breaks a rule of the format.
    """
    try:
        return _encode(artifact)
    except RefusedError as error:
        raise ArtifactError(f"the artifact cannot be saved: {error}") from error


def save_artifact(artifact: Artifact, path: str | Path) -> None:
    """Writes an artifact atomically.

    Raises:
        ArtifactError: the artifact breaks a rule of the format; nothing is written.
        DataError: the file cannot be written; an earlier one is untouched.
    """
    atomic_write_bytes(path, artifact_bytes(artifact))


def load_artifact(path: str | Path) -> Artifact:
    """Reads and checks an artifact; a link to a regular file is followed.

    Raises:
        ArtifactError: the file is missing, damaged, inconsistent, or of a newer format.
    """
    with _opened(Path(path)) as (file, size):
        return _decode(file, size)


def load_with_bytes(path: str | Path) -> tuple[Artifact, bytes]:
    """`load_artifact`, and the bytes that were checked: the file may be another one afterwards.

    Raises:
        ArtifactError: as for `load_artifact`.
    """
    with _opened(Path(path)) as (file, size):
        # Before all of it is in memory: whether it is an artifact at all.
        _decode(file, size)
        file.seek(0)
        data = file.read(size)
        return _decode(io.BytesIO(data), len(data)), data


@contextmanager
def _opened(path: Path) -> Iterator[tuple[BufferedIOBase, int]]:
    """The file and its size."""
    try:
        with open_regular(path) as file:
            yield file, os.fstat(file.fileno()).st_size
    except RefusedError as error:
        if isinstance(error.__context__, FileNotFoundError):
            raise ArtifactError(
                f"{printable(path)} does not exist: make it with sp calibrate and sp cluster, or "
                "name another artifact"
            ) from error
        advice = "" if isinstance(error, _NewerFormatError) else f"; {_REGENERATE}"
        raise ArtifactError(f"{printable(path)} is not usable: {error}{advice}") from error
    except OSError as error:
        raise ArtifactError(f"{printable(path)} cannot be read: {error.strerror}") from error


def check_fingerprint(artifact: Artifact, fingerprint: Fingerprint) -> float:
    """Checks that an artifact was made for the model of this fingerprint.

    Equal attention weights pass. So do weights that are near in every layer, which another dtype, a
    quantisation, or a light fine-tune of the same weights is; a warning then says how near. Other
    positions (RoPE), windows or logits do not pass, see `check_attention`.

    Returns:
        The relative distance of the attention weights in the worst layer, 0 where they are equal.

    Raises:
        ArtifactError: it was made for another one; both are named.
    """
    distance = _weights_distance(artifact, fingerprint)
    if fingerprint.attention is not None:
        check_attention(artifact, fingerprint.attention)
    return distance


def check_attention(artifact: Artifact, settings: dict[str, Any]) -> None:
    """Checks that a model has the positions, windows and logits that an artifact was made for.

    Args:
        artifact: What is to be used. Files of earlier versions do not say what they were made for:
            a warning says so.
        settings: Of the model (`models.attention_settings`).

    Raises:
        ArtifactError: it has others; both are named.
    """
    made_for = artifact.fingerprint.attention
    if made_for is None:
        warn_once(
            f"the artifact for {printable(artifact.model)} is of an earlier version and does not "
            "say which positions (RoPE) and windows it was made for: whether they are this "
            f"model's was not compared; {_REGENERATE}"
        )
    elif changed := settings_that_differ(made_for, settings):
        raise ArtifactError(
            f"the artifact was made for {printable(artifact.model)} with other positions (RoPE), "
            f"windows or logits than this model's ({changed}): load the model as it was "
            f"calibrated, or make an artifact for it as it is: {_REGENERATE}"
        )


def _weights_distance(artifact: Artifact, fingerprint: Fingerprint) -> float:
    made_for = artifact.fingerprint
    if made_for == fingerprint:
        return 0.0
    way_out = f"load that model, or make an artifact for this one: {_REGENERATE}"
    if (made_for.model_type, made_for.geometry) != (fingerprint.model_type, fingerprint.geometry):
        raise ArtifactError(
            f"the artifact was made for {printable(artifact.model)}: {made_for.describe()}; this "
            f"model: {fingerprint.describe()}; {way_out}"
        )
    distances = sketch_distances(made_for.sketch, fingerprint.sketch)
    worst = math.inf if distances is None else distances.max().item()
    if worst > NEAR_WEIGHTS:
        how_far = (
            "no distance is known"
            if distances is None
            else f"relative distance {worst:.2f} in layer {int(distances.argmax())} of those with "
            f"attention, at most {NEAR_WEIGHTS} is accepted"
        )
        raise ArtifactError(
            f"the artifact was made for {printable(artifact.model)}, whose geometry is this "
            f"model's ({made_for.describe()}) but whose attention weights differ (hash "
            f"{made_for.weights[:12]}, this model's {fingerprint.weights[:12]}; {how_far}); "
            f"{way_out}"
        )
    warn_once(
        f"the attention weights are near to those that the artifact was made for, not equal "
        f"(relative distance {worst:.3f} in the worst layer, hash {made_for.weights[:12]}, this "
        f"model's {fingerprint.weights[:12]}), as after a change of dtype, a quantisation or a "
        "light fine-tune: compare answers with sp run --compare-dense, or calibrate this model"
    )
    return worst


def model_to_load(
    artifact: Artifact,
    given: str | None,
    known: Collection[str] = (),
    *,
    trust_remote_code: bool = False,
) -> str:
    """The model that a command loads for an artifact.

    An artifact is anybody's file. A hub id in it is loaded as adapters load their base: from
    safetensors alone and without code of the repository, and a session refuses other attention
    weights than the artifact's. A path in it is looked up only if the user said it.

    Args:
        artifact: Names the model it was made for.
        given: The model that the user gave, None where none was.
        known: Names that the user gave earlier, to `sp calibrate`.
        trust_remote_code: Whether code of the model's repository is to be run.

    Raises:
        ArtifactError: none was given, and the artifact names a path that is neither known nor built
            in, or a hub id whose code is to be run.
    """
    if given is not None:
        return given
    name = artifact.model
    if name in BUILT_IN or name in known:
        return name
    # A folder of that name would go before the hub.
    if not _HUB_ID.fullmatch(name) or kind_of(Path(name)) is not None:
        raise ArtifactError(
            f"the artifact names the model {printable(name)}, and a path in a file is not "
            "loaded by itself: say --model with that name, or with the place where you have it"
        )
    if trust_remote_code:
        raise ArtifactError(
            f"the artifact names the model {printable(name)}, and code of a repository that a file "
            f"names is not run: say --model {printable(name)} beside --trust-remote-code"
        )
    logger.info("the model is %s of the hub, which the artifact names", printable(name))
    return name


class _NewerFormatError(RefusedError):
    """A file that this version cannot know how to read."""


def _encode(artifact: Artifact) -> bytes:
    from safetensors.torch import save

    _check(artifact)
    # Copies: safetensors refuses tensors that share memory, as views of one tensor do.
    tensors = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name in _TENSORS
        if (tensor := getattr(artifact, name)) is not None
    }
    metadata = {
        "format_version": FORMAT_VERSION,
        "model": artifact.model,
        "fingerprint": {
            name: value
            for name, value in asdict(artifact.fingerprint).items()
            # As in files of before there was such an entry.
            if name != "attention" or value is not None
        },
        "code_size": artifact.code.shape[2],
        "block_size": artifact.block_size,
        "thresholds": {k: float(v) for k, v in asdict(artifact.thresholds).items()},
        "rows": asdict(artifact.rows),
        **{name: value for name in _OBJECTS if (value := getattr(artifact, name)) is not None},
    }
    metadata["sha256"] = _digest(metadata, tensors)
    data = save(tensors, metadata={_KEY: canonical_json(metadata)})
    # Limits that only show in the bytes: what is written can be read again.
    _decode(io.BytesIO(data), len(data))
    return data


def _decode(file: BufferedIOBase, size: int) -> Artifact:
    header = read_header(file, size, _KEY)
    # A metadata string of other than ASCII characters becomes wrong JSON here, and is refused.
    metadata = parse_json(header.metadata.encode("utf-8", "replace"), size, "metadata")
    version = _check_version(metadata)
    lacking = {
        name
        for name, optional in _OBJECTS.items()
        if optional and (version == 1 or name not in metadata)
    }
    check_keys(metadata, "metadata", _METADATA | _OBJECTS.keys() - lacking)
    values = metadata["fingerprint"]
    added = {"sketch", "checkpoint"} if version >= 2 else set()
    if version >= 2 and isinstance(values, dict) and "attention" in values:
        added.add("attention")
    check_keys(values, "fingerprint", {"model_type", "geometry", "weights", *added})
    if "attention" in added and not isinstance(values["attention"], dict):
        raise RefusedError(f"attention is {quoted(values['attention'])}, not an object")
    for key, kind in (("thresholds", Thresholds), ("rows", Rows)):
        check_keys(metadata[key], key, set(kind.__dataclass_fields__))
    geometry = check_keys(values["geometry"], "geometry", set(ModelGeometry.__dataclass_fields__))
    fingerprint = Fingerprint(**{**values, "geometry": ModelGeometry(**geometry)})
    _check_fingerprint_values(fingerprint)
    code_size = _integer(metadata["code_size"], "code_size", 1, MAX_CODE_SIZE)
    layout = {
        name: place
        for name, place in _layout(fingerprint.geometry, code_size).items()
        if not _TENSORS[name].optional or (version >= 2 and name in header.entries)
    }
    tensors = read_tensors(file, header, layout)
    entries: dict[str, Any] = {name: tensors.get(name) for name in _TENSORS}
    entries |= {name: metadata.get(name) for name in _OBJECTS}
    artifact = Artifact(
        model=metadata["model"],
        fingerprint=fingerprint,
        block_size=metadata["block_size"],
        thresholds=Thresholds(**metadata["thresholds"]),
        rows=Rows(**metadata["rows"]),
        **entries,
    )
    _check(artifact)
    if metadata.pop("sha256") != _digest(metadata, tensors):
        raise RefusedError("its content does not match its sha256, so it was damaged or edited")
    return _with_gaps(artifact)


def _with_gaps(artifact: Artifact) -> Artifact:
    """NaN for what files of earlier versions have where nothing was measured.

    They have codes of zeros there, which no head that was captured has.
    """
    dense = (artifact.policy == Policy.DENSE).all(1) & (artifact.cluster < 0).all(1)
    absent = dense & (artifact.code == 0).flatten(1).all(1)
    if not absent.any() or absent.all():
        return artifact
    measured = {name: getattr(artifact, name) for name, kind in _TENSORS.items() if kind.measured}
    shown = {
        name: torch.where(absent.view(-1, *[1] * (values.ndim - 1)), torch.nan, values)
        for name, values in measured.items()
        if values is not None
    }
    return replace(artifact, **shown)


def _digest(metadata: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(canonical_json(metadata).encode())
    for name in sorted(tensors):
        digest.update(tensors[name].reshape(-1).numpy().data)
    return digest.hexdigest()


def _layout(geometry: ModelGeometry, code_size: int) -> Layout:
    sizes = {"L": geometry.layers, "H": geometry.heads, "Z": code_size}
    return {
        name: (
            kind.dtype,
            tuple(size if isinstance(size, int) else sizes[size] for size in kind.shape),
        )
        for name, kind in _TENSORS.items()
    }


def _check(artifact: Artifact) -> None:
    check_text(artifact.model, "model", 512)
    _check_fingerprint_values(artifact.fingerprint)
    if artifact.block_size not in BLOCK_SIZES or type(artifact.block_size) is not int:
        raise RefusedError(
            f"block_size is {quoted(artifact.block_size)}, expected one of {BLOCK_SIZES}"
        )
    _number(artifact.thresholds.gamma, "thresholds.gamma", above_zero=True)
    _number(artifact.thresholds.tau, "thresholds.tau")
    _number(artifact.thresholds.delta, "thresholds.delta")
    _integer(artifact.rows.pivot, "rows.pivot", 0, artifact.block_size)
    _integer(artifact.rows.sample, "rows.sample", 1, artifact.block_size)
    _integer(artifact.rows.check, "rows.check", 1, artifact.block_size)
    for name, optional in _OBJECTS.items():
        value = getattr(artifact, name)
        if not isinstance(value, dict) and not (optional and value is None):
            raise RefusedError(f"{name} is {quoted(value)}, not an object")
        check_json(value, name)
    _check_estimator(artifact.estimator or {}, artifact.block_size)
    _check_tensors(artifact)
    _check_graph(artifact)


def _check_estimator(estimator: dict[str, Any], block_size: int) -> None:
    for rows, weights in estimator.items():
        if not _ROWS.fullmatch(rows) or int(rows) > block_size:
            raise RefusedError(f"estimator has weights for {quoted(rows)} rows a block")
        if not isinstance(weights, list) or len(weights) != _LINES:
            raise RefusedError(f"estimator has {quoted(weights)}, not {_LINES} weights")
        for weight in weights:
            _number(weight, "a weight of estimator")
        if not sum(weights) > 0:
            raise RefusedError("estimator has weights that are all 0")


def _check_version(metadata: object) -> int:
    version = metadata.get("format_version") if isinstance(metadata, dict) else None
    if type(version) is not int or version < 1:
        raise RefusedError(f"format_version is {quoted(version)}, expected {FORMAT_VERSION}")
    if version > FORMAT_VERSION:
        raise _NewerFormatError(
            f"it has format {version}, and this version of shareprefill reads format "
            f"{FORMAT_VERSION}: upgrade with pip install --upgrade shareprefill"
        )
    return version


def _check_fingerprint_values(fingerprint: Fingerprint) -> None:
    geometry = fingerprint.geometry
    check_text(fingerprint.model_type, "model_type", 128)
    if not isinstance(fingerprint.weights, str) or not _SHA256.fullmatch(fingerprint.weights):
        raise RefusedError(f"weights is {quoted(fingerprint.weights)}, not a sha256 in hexadecimal")
    checkpoint, sketch = fingerprint.checkpoint, fingerprint.sketch
    if checkpoint != "" and not (isinstance(checkpoint, str) and _SHA256.fullmatch(checkpoint)):
        raise RefusedError(f"checkpoint is {quoted(checkpoint)}, not empty and not a sha256")
    if fingerprint.attention is not None:
        if not isinstance(fingerprint.attention, dict):
            raise RefusedError(f"attention is {quoted(fingerprint.attention)}, not an object")
        check_json(fingerprint.attention, "attention")
    for name in ModelGeometry.__dataclass_fields__:
        _integer(getattr(geometry, name), f"geometry.{name}", 1, MAX_HEADS)
    _integer(geometry.layers * geometry.heads, "the number of all heads", 1, MAX_HEADS)
    if geometry.heads % geometry.kv_heads:
        raise RefusedError(
            f"{geometry.heads} heads do not divide into {geometry.kv_heads} KV heads"
        )
    # Two characters a number; a layer without attention has none.
    layers, rest = divmod(len(sketch), 2 * SKETCH_SIZE) if isinstance(sketch, str) else (0, 1)
    if rest or layers > geometry.layers or not _HEXADECIMAL.fullmatch(sketch):
        raise RefusedError(
            f"sketch is {quoted(sketch)}, expected {2 * SKETCH_SIZE} hexadecimal digits for each "
            f"of at most {geometry.layers} layers"
        )


def _check_tensors(artifact: Artifact) -> None:
    code_size = artifact.code.shape[-1] if isinstance(artifact.code, Tensor) else 1
    _integer(code_size, "code_size", 1, MAX_CODE_SIZE)
    for name, (dtype, shape) in _layout(artifact.fingerprint.geometry, code_size).items():
        tensor = getattr(artifact, name)
        if tensor is None and _TENSORS[name].optional:
            continue
        if not isinstance(tensor, Tensor):
            raise RefusedError(f"{name} is a {type(tensor).__name__}, not a tensor")
        if (tensor.dtype, tuple(tensor.shape)) != (dtype, shape):
            raise RefusedError(
                f"tensor {name!r} is {tensor.dtype} {list(tensor.shape)}, "
                f"expected {dtype} {list(shape)}"
            )
        if _TENSORS[name].measured:
            tensor = _measured(artifact, name)
        if dtype.is_floating_point:
            _check_range(tensor, name, _TENSORS[name])


def _measured(artifact: Artifact, name: str) -> Tensor:
    """A tensor of the artifact without the layers that were not captured.

    They are the same in all tensors: a stray NaN is left in, for the check of the range to find.
    """
    tensor: Tensor = getattr(artifact, name)
    absent = artifact.recall.isnan().all(1)
    if not absent.any():
        return tensor
    if absent.all():
        raise RefusedError("recall says that no layer was measured")
    has_values = ~tensor.flatten(1).isnan().all(1)
    if (absent & has_values).any():
        layer = int((absent & has_values).nonzero()[0])
        raise RefusedError(f"{name} has values of layer {layer}, which recall calls not measured")
    return tensor[~absent]


def _check_range(tensor: Tensor, name: str, kind: _Kind) -> None:
    # No temporary tensor, unlike isfinite: and NaN comes out of aminmax.
    smallest, largest = (bound.item() for bound in tensor.aminmax())
    if not (abs(smallest) < math.inf and abs(largest) < math.inf):
        raise RefusedError(f"{name} holds values that are not finite")
    above_zero = name in _ABOVE_ZERO
    if smallest < kind.lowest or largest > kind.highest or (above_zero and smallest == 0):
        if above_zero:
            allowed = f"above 0 and at most {kind.highest:g}"
        elif kind.highest == math.inf:
            allowed = f"at least {kind.lowest:g}"
        else:
            allowed = f"between {kind.lowest:g} and {kind.highest:g}"
        raise RefusedError(f"{name} holds {smallest:g} to {largest:g}, expected {allowed}")


def _check_graph(artifact: Artifact) -> None:
    cluster, policy, pivot, fallback = (
        getattr(artifact, name).flatten().long()
        for name in ("cluster", "policy", "pivot", "fallback")
    )
    heads = artifact.fingerprint.geometry.heads
    head = torch.arange(artifact.heads, device=policy.device)
    _forbid((policy < 0) | (policy >= len(Policy)), heads, "has an unknown policy")
    _forbid((cluster < -1) | (cluster >= artifact.heads), heads, "has a cluster out of range")
    absent = artifact.recall.isnan().flatten()
    _forbid(absent & (policy != Policy.DENSE), heads, "was not measured, but is not dense")
    is_pivot, shares = policy == Policy.PIVOT, policy == Policy.SHARE
    _forbid((is_pivot | shares) & (cluster < 0), heads, "is a pivot or shares, but has no cluster")
    _forbid(is_pivot & (pivot != head), heads, "is a pivot, but does not name itself as its pivot")
    _forbid(~is_pivot & ~shares & (pivot != -1), heads, "names a pivot, but does not share")
    _forbid(shares & ((pivot < 0) | (pivot >= artifact.heads)), heads, "has a pivot out of range")
    source = torch.where(shares, pivot, head)
    _forbid(shares & ~is_pivot[source], heads, "shares with a head that is no pivot")
    _forbid(source // heads > head // heads, heads, "shares with a pivot of a later layer")
    needs_another = (fallback == Policy.PIVOT) | (fallback == Policy.SHARE)
    is_own = (fallback >= 0) & (fallback < len(Policy)) & ~needs_another
    _forbid(shares & ~is_own, heads, "shares, but its fallback is not a policy of its own")
    _forbid(~shares & (fallback != policy), heads, "does not share, but has another fallback")


def _forbid(broken: Tensor, heads: int, what: str) -> None:
    if broken.any():
        layer, head = divmod(int(broken.nonzero()[0]), heads)
        raise RefusedError(f"head {head} of layer {layer} {what}")


def _integer(value: object, name: str, smallest: int, largest: int) -> int:
    if type(value) is not int or not smallest <= value <= largest:
        raise RefusedError(f"{name} is {quoted(value)}, expected {smallest} to {largest}")
    return value


def _number(value: object, name: str, *, above_zero: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise RefusedError(f"{name} is {quoted(value)}, expected a number between 0 and 1")
    if above_zero and value == 0:
        raise RefusedError(f"{name} is 0, expected above 0 and at most 1")
