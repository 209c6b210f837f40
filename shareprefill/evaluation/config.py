"""What an evaluation and a sweep measure. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from shareprefill.config import BLOCK_SIZES, Decode, Precision, RuntimeConfig, Stage
from shareprefill.errors import ConfigError, require
from shareprefill.policy_names import current_policy, reads, require_no_plan

DENSE = "dense"
PERPLEXITY = "perplexity"
DEFAULT_TASKS = (
    "retr_kv",
    "retr_passkey",
    "retr_number",
    "math_find",
    "code_run",
    "variable_tracking",
)

_LEAST_TIMES = 3


@dataclass(frozen=True, kw_only=True)
class EvalConfig(Stage):
    """What `sp eval` measures.

    Attributes:
        artifact: Path of the artifact; none where no policy needs one.
        model: Where the model is; None: where the artifact says.
        tasks: Generated tasks, `perplexity` (of the shipped text), `perplexity:<file or folder>`
            (.txt, or rows with the field text, content, context or messages), or rows of a
            benchmark (`ruler`, `infinitebench`, `longbench`), `<benchmark>:<file>` or
            `<benchmark>:hub:...`.
        policies: Policies that are compared with `dense`, which is always measured too.
        lengths: Tokens a prompt, at most.
        gammas: Attention masses to cover; none: the artifact's own, chosen head by head.
        samples: Prompts of each task and length.
        seed: Picks the generated prompts. No seed gives a prompt of a calibration.
        device: `auto`, `cpu`, `cuda`, `cuda:1`, ...
        dtype: `auto`, `float32`, `bfloat16` or `float16`.
        precision: Of sparse attention's operands, `model` or `fp8`, as in `sp run`.
        fp8_error: With `fp8`, see `sp run`.
        measure: Also measure recall and the attention's output errors. It takes a second prefill
            of every prompt, so that the times do not include it.
        times: Measure times to the first token. Without them every prompt is prefilled once.
        max_density: Heads whose pattern is denser are computed densely; None: the device's
            crossover, 0.6 on a CPU and 0.7 on a GPU.
        bins: Ranges of position that perplexity is told for.
        cut_middle: Cut the middle out of a benchmark's rows that are longer than the length, as
            InfiniteBench and LongBench do; otherwise such a row is an error.
        workers: Processes, each with a model of its own on the same device, that divide the
            prompts. Of several, the times are those of a shared device.
        others: Paths of further artifacts of the model. Policy `auto` is then run as each artifact
            plans it, whatever the gammas; all else comes from the first.
        decode: How the steps of answers attend under the policies: `dense`, or `sparse`, each step
            and KV head few key blocks. Of `dense` among the policies, prefills stay dense then.
        decode_density: With `sparse`, blocks read over all blocks, mean over steps, layers and
            heads; None: 0.2.
    """

    artifact: str | None = None
    model: str | None = None
    tasks: tuple[str, ...] = DEFAULT_TASKS
    policies: tuple[str, ...] = ("auto",)
    lengths: tuple[int, ...] = (8192,)
    gammas: tuple[float, ...] = ()
    samples: int = 20
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    precision: Precision = "model"
    fp8_error: float | None = None
    measure: bool = True
    times: bool = True
    max_density: float | None = None
    bins: int = 8
    cut_middle: bool = False
    workers: int = 1
    others: tuple[str, ...] = ()
    decode: Decode = "dense"
    decode_density: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "policies", tuple(map(current_policy, self.policies)))
        require(self.artifact != "", "artifact", self.artifact, "the path of an artifact")
        if self.artifact is None:
            require(bool(self.model), "model", self.model, "named where there is no artifact")
            require(not self.others, "others", self.others, "none without a first artifact")
            for policy in self.policies:
                require_no_plan(policy)
        for name in ("tasks", "policies", "lengths"):
            require(bool(getattr(self, name)), name, getattr(self, name), "at least one")
        for name in ("tasks", "policies", "lengths", "gammas"):
            values = getattr(self, name)
            require(len(set(values)) == len(values), name, values, "a list without repetitions")
        if self.others:
            names = self.names
            require(len(set(names)) == len(names), "artifact", names, "files of different names")
            require("auto" in self.policies, "policies", self.policies, "auto for more artifacts")
        for length in self.lengths:
            require(length >= 1, "lengths", length, "at least 1")
        require(self.samples >= 1, "samples", self.samples, "at least 1")
        require(self.seed >= 0, "seed", self.seed, "0 or more")
        require(self.bins >= 1, "bins", self.bins, "at least 1")
        require(self.workers >= 1, "workers", self.workers, "at least 1")
        # Also where dense attention alone is asked for.
        for gamma in self.gammas or (None,):
            self._runtime("auto", gamma)
        self.runtimes()
        self._require_read()
        if self.cut_middle and not any(_is_benchmark(task) for task in self.tasks):
            raise ConfigError(
                "cut_middle is for rows of benchmarks: name one, as ruler:FILE, or leave it out"
            )
        reads = all(task.partition(":")[0] == PERPLEXITY for task in self.tasks)
        if self.decode == "sparse" and reads:
            raise ConfigError(
                "decode = 'sparse' is for answers, and the tasks only read: name a task that asks, "
                f"as {DEFAULT_TASKS[0]}, or leave it out"
            )

    @property
    def repeats(self) -> int:
        """Timed prefills of each prompt and policy, so that a cell has at least three; or none."""
        if not self.times:
            return 0
        return max(1, -(-_LEAST_TIMES // self.samples))

    @property
    def artifacts(self) -> tuple[str, ...]:
        """Paths of all artifacts."""
        return () if self.artifact is None else (self.artifact, *self.others)

    @property
    def names(self) -> tuple[str, ...]:
        """What tells the artifacts apart: their files' names, without a suffix."""
        return tuple(Path(path).stem for path in self.artifacts)

    def runtimes(self) -> list[RuntimeConfig]:
        """The options of every session that is compared with dense attention, in order.

        Raises:
            ConfigError: a policy or a gamma is no such thing.
        """
        return [
            self._runtime(policy, gamma)
            for policy in self.policies
            if policy != DENSE or self.decode == "sparse"
            for gamma in self._gammas_of(policy)
        ]

    def _runtime(self, policy: str, gamma: float | None) -> RuntimeConfig:
        options = {
            "gamma": gamma,
            "min_tokens": 0,
            "max_density": self.max_density,
            "precision": self.precision,
            "fp8_error": self.fp8_error,
            "decode": self.decode,
            "decode_density": self.decode_density,
        }
        read = {name: value for name, value in options.items() if reads(policy, name)}
        return RuntimeConfig.from_dict({"policy": policy, **read})

    def _require_read(self) -> None:
        """Refuses options that none of the policies reads."""
        for name, option in (
            ("gammas", "gamma"),
            ("max_density", "max_density"),
            ("precision", "precision"),
        ):
            value = getattr(self, name)
            is_given = value != getattr(type(self), name)
            if is_given and not any(reads(policy, option) for policy in self.policies):
                raise ConfigError(
                    f"{name} = {value!r} does nothing to {', '.join(self.policies)}: name a policy "
                    f"that reads {option}, or leave it out"
                )

    def _gammas_of(self, policy: str) -> tuple[float | None, ...]:
        is_planned = policy == "auto" and self.others
        varies = reads(policy, "gamma") and not is_planned
        return self.gammas if self.gammas and varies else (None,)


def _is_benchmark(task: str) -> bool:
    return ":" in task and task.partition(":")[0] != PERPLEXITY


@dataclass(frozen=True, kw_only=True)
class SweepConfig(Stage):
    """What `sp sweep` varies, one parameter at a time.

    Attributes:
        artifact: Path of the artifact that the other values are taken from; none where the policy
            needs none.
        model: Where the model is; None: where the artifact says.
        slacks: With policy `auto`, masses below gamma at which a head still shares.
        taus: With policy `shareprefill`, JS distances to share.
        deltas: JS distances to uniform.
        gammas: Attention masses to cover.
        block_sizes: Tokens a block; each needs a calibration of that block size.
        ks: Numbers of clusters; needs a calibration.
        calibrations: Folders of calibrations, for `block_sizes` and `ks`.
        policy: Policy of all points.
        tasks: Generated tasks, `perplexity`, `perplexity:<file or folder>`, or rows of a benchmark
            (`ruler`, `infinitebench`, `longbench`), `<benchmark>:<file>` or `<benchmark>:hub:...`.
        length: Tokens a prompt, at most.
        samples: Prompts of each task.
        seed: Picks the generated prompts.
        device: `auto`, `cpu`, `cuda`, `cuda:1`, ...
        dtype: `auto`, `float32`, `bfloat16` or `float16`.
        max_density: Heads whose pattern is denser are computed densely; None: the device's
            crossover, 0.6 on a CPU and 0.7 on a GPU.
    """

    artifact: str | None = None
    model: str | None = None
    slacks: tuple[float, ...] = ()
    taus: tuple[float, ...] = ()
    deltas: tuple[float, ...] = ()
    gammas: tuple[float, ...] = ()
    block_sizes: tuple[int, ...] = ()
    ks: tuple[int, ...] = ()
    calibrations: tuple[str, ...] = ()
    policy: str = "auto"
    tasks: tuple[str, ...] = ("retr_kv", "perplexity")
    length: int = 8192
    samples: int = 8
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    max_density: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "policy", current_policy(self.policy))
        varied = ("slacks", "taus", "deltas", "gammas", "block_sizes", "ks")
        if not any(getattr(self, name) for name in varied):
            raise ConfigError(
                "there is nothing to vary: give at least one value of slack, tau, delta, gamma, "
                "block size or k, as --gamma 0.9"
            )
        for name in varied:
            values = getattr(self, name)
            require(len(set(values)) == len(values), name, values, "a list without repetitions")
        for size in self.block_sizes:
            require(size in BLOCK_SIZES, "block_size", size, f"one of {BLOCK_SIZES}")
        for k in self.ks:
            require(k >= 1, "k", k, "at least 1")
        if (self.block_sizes or self.ks) and self.artifact is None:
            raise ConfigError(
                "another block size or number of clusters is clustered with an artifact's other "
                "settings: name the artifact"
            )
        if self.calibrations and not (self.block_sizes or self.ks):
            raise ConfigError(
                "a calibration is for other block sizes and numbers of clusters: give --k or "
                "--block-size, or leave --calibration out"
            )
        if (self.block_sizes or self.ks) and not self.calibrations:
            raise ConfigError(
                "another block size or number of clusters needs the calibration that it is "
                "clustered from: name its folder with --calibration"
            )
        require(self.policy != DENSE, "policy", self.policy, "another than dense")
        self.runtime()
        for name, values in self.of_sessions().items():
            for value in values:
                self.runtime(**{name: value})
        self.evaluation()

    def of_sessions(self) -> dict[str, tuple[float, ...]]:
        """The values of the parameters that are options of a session, by its names for them."""
        return {
            "slack": self.slacks,
            "tau": self.taus,
            "delta": self.deltas,
            "gamma": self.gammas,
        }

    def runtime(self, **changes: float) -> RuntimeConfig:
        """A session's options with some of them changed.

        Raises:
            ConfigError: a value is outside its range, or is for another policy.
        """
        return RuntimeConfig.from_dict(
            {
                "policy": self.policy,
                "min_tokens": 0,
                "max_density": self.max_density,
                **changes,
            }
        )

    def evaluation(self) -> EvalConfig:
        """What is measured at every point.

        Raises:
            ConfigError: one of the options that both have is outside its range.
        """
        return EvalConfig(
            artifact=self.artifact,
            model=self.model,
            tasks=self.tasks,
            policies=(self.policy,),
            lengths=(self.length,),
            samples=self.samples,
            seed=self.seed,
            device=self.device,
            dtype=self.dtype,
            max_density=self.max_density,
        )
