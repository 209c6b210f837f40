"""The file of `sp regenerate`: which models, made how, compared within which tolerances."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from shareprefill.config import CalibrateConfig, ClusterConfig, Stage, TrainConfig
from shareprefill.errors import ConfigError, DataError, did_you_mean, require
from shareprefill.files import printable

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
# Keys of a [[model]] by the stage that they belong to; `lengths` belongs to two.
_CALIBRATE = ("data", "samples", "block_size", "seed", "device", "dtype")
_CLUSTER = ("target_recall", "k")
_THRESHOLDS = ("gamma", "tau", "delta")
_TABLES = ("thresholds", "train", "cluster", "eval", "tolerances")
_OWN = ("name", "model", "artifact")
_KEYS = (*_OWN, "lengths", *_CALIBRATE, *_CLUSTER, *_TABLES)
AnyStage = TypeVar("AnyStage", bound=Stage)


@dataclass(frozen=True, kw_only=True)
class Tolerances(Stage):
    """How far a regenerated artifact may be from the committed one, up or down.

    Attributes:
        accuracy: Mean score of the evaluation's tasks, 0 to 1.
        density: Share of causal blocks computed, as measured and as the artifacts expect it.
        recall: Attention mass inside the patterns, likewise.
        clusters: 1 minus the adjusted Rand index of the clusters; None: any.
    """

    accuracy: float = 0.02
    density: float = 0.01
    recall: float = 0.005
    clusters: float | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            holds = value is None or 0 <= value <= 1
            require(holds, field.name, value, "a number between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class EvalOptions(Stage):
    """What is asked of both artifacts; None takes the default of `sp eval`.

    Attributes:
        tasks: Tasks as `sp eval` names them.
        samples: Prompts of each task and length.
        seed: Picks the prompts.
    """

    tasks: tuple[str, ...] | None = None
    samples: int | None = None
    seed: int | None = None


@dataclass(frozen=True, kw_only=True)
class Job:
    """One [[model]] of the file.

    Attributes:
        name: Of the job, and of its folder.
        artifact: The committed artifact, relative to the file's folder.
        lengths: Tokens a prompt: calibrated at the longest, evaluated at each.
        calibrate: The calibration.
        train: The autoencoder's training.
        cluster: The clustering.
        evaluation: The evaluation of both artifacts.
        tolerances: How far they may be from each other.
    """

    name: str
    artifact: Path
    lengths: tuple[int, ...]
    calibrate: CalibrateConfig
    train: TrainConfig
    cluster: ClusterConfig
    evaluation: EvalOptions
    tolerances: Tolerances


def load_jobs(path: str | Path) -> list[Job]:
    """Reads a file of models, strictly: an unknown key or a wrong value is an error.

    Raises:
        DataError: the file cannot be read, or is no TOML.
        ConfigError: naming the model and the key that is wrong.
    """
    path = Path(path)
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(
            f"{printable(path)} does not exist: docs/regenerate.md says what it holds"
        ) from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise DataError(f"{printable(path)} cannot be read as TOML: {printable(error)}") from error
    _refuse_unknown(values, ("defaults", "model"), f"{printable(path)}: the file")
    defaults = _table(values.get("defaults", {}), f"{printable(path)}: defaults")
    shared = [key for key in _KEYS if key not in _OWN]
    _refuse_unknown(defaults, shared, f"{printable(path)}: defaults")
    models = values.get("model")
    if not isinstance(models, list) or not models:
        raise ConfigError(f"{printable(path)} names no model: add a [[model]] table")
    jobs = [_job(model, number, defaults, path) for number, model in enumerate(models, start=1)]
    for what in ("name", "artifact"):
        seen: set[object] = set()
        for job in jobs:
            if getattr(job, what) in seen:
                raise ConfigError(
                    f"{printable(path)}: two models have the {what} {printable(getattr(job, what))}"
                )
            seen.add(getattr(job, what))
    return jobs


def select_jobs(jobs: list[Job], only: Iterable[str] = (), shard: str | None = None) -> list[Job]:
    """The jobs of these names, and of those every n-th, from the i-th on, for a shard `i/n`.

    Raises:
        ConfigError: a name is unknown, or the shard is no such thing.
    """
    names = [job.name for job in jobs]
    only = list(only)
    for name in only:
        if name not in names:
            raise ConfigError(
                f"there is no model {printable(name)!r}; there are {printable(', '.join(names))}"
                f"{did_you_mean(name, names)}"
            )
    found = [job for job in jobs if not only or job.name in only]
    if shard is None:
        return found
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", shard)
    number, count = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= number <= count:
        raise ConfigError(f"shard = {shard!r} is not allowed: give i/n with i from 1 to n, as 2/5")
    return found[number - 1 :: count]


def _job(values: object, number: int, defaults: dict[str, Any], path: Path) -> Job:
    where = f"{printable(path)}: model {number}"
    own = _table(values, where)
    name = own.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigError(
            f"{where}: name = {_shown(name)} is not allowed: it must be letters, digits, dots, "
            "dashes and underscores, as it names a folder"
        )
    where = f"{printable(path)}: model {name}"
    _refuse_unknown(own, _KEYS, where)
    merged = {**defaults, **own}
    for table in _TABLES:
        merged[table] = {
            **_table(defaults.get(table, {}), f"{printable(path)}: defaults.{table}"),
            **_table(own.get(table, {}), f"{where}.{table}"),
        }
    artifact = own.get("artifact")
    if not isinstance(artifact, str) or not artifact:
        raise ConfigError(f"{where}: artifact is missing: name the file that is committed")
    _refuse_unknown(merged["thresholds"], _THRESHOLDS, f"{where}.thresholds")
    clustering = {key: merged[key] for key in _CLUSTER if key in merged} | merged["thresholds"]
    if both := sorted(clustering.keys() & merged["cluster"].keys()):
        raise ConfigError(f"{where}: {both[0]} stands in cluster, too: name it once")
    if clustering.get("k") == "auto":
        clustering["k"] = None
    lengths = merged.get("lengths", [CalibrateConfig(model="-").length])
    if not isinstance(lengths, list) or not lengths or not all(type(n) is int for n in lengths):
        raise ConfigError(f"{where}: lengths = {_shown(lengths)} must be a list of token counts")
    captured = {key: merged[key] for key in _CALIBRATE if key in merged}
    calibration = {"model": own.get("model", name), "length": max(lengths), **captured}
    return Job(
        name=name,
        artifact=Path(artifact),
        lengths=tuple(lengths),
        calibrate=_stage(CalibrateConfig, calibration, where),
        train=_stage(
            TrainConfig, {"seed": captured.get("seed", 0), **merged["train"]}, f"{where}.train"
        ),
        cluster=_stage(ClusterConfig, clustering | merged["cluster"], f"{where}.cluster"),
        evaluation=_stage(EvalOptions, merged["eval"], f"{where}.eval"),
        tolerances=_stage(Tolerances, merged["tolerances"], f"{where}.tolerances"),
    )


def _stage(kind: type[AnyStage], values: Mapping[str, Any], where: str) -> AnyStage:
    _refuse_unknown(values, [field.name for field in fields(kind)], where)
    try:
        return kind.from_dict(values)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def _table(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{where} = {_shown(value)} is not allowed: it must be a table")
    return value


def _refuse_unknown(values: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    known = list(known)
    for key in values:
        if key not in known:
            raise ConfigError(
                f"{where} has an unknown key {printable(key)!r}; it may have {', '.join(known)}"
                f"{did_you_mean(key, known)}"
            )


def _shown(value: object) -> str:
    return printable(repr(value), 80)
