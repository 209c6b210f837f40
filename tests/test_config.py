from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from shareprefill.config import CalibrateConfig, ClusterConfig, RuntimeConfig
from shareprefill.errors import ConfigError
from shareprefill.evaluation.config import EvalConfig, SweepConfig
from shareprefill.policy_names import POLICIES, SELECTION_POLICIES, reads
from shareprefill.runtime.policies import make_policy, policy_text
from shareprefill.runtime.policies.sampled import Sampled
from shareprefill.runtime.policies.streaming import Streaming


@pytest.mark.parametrize("rows", [(1, 2, 4, 8), (2, 8, 32), (1, 2, 3, 5, 128)])
def test_row_counts_that_are_allowed(rows: tuple[int, ...]) -> None:
    config = CalibrateConfig(model="m", rows=rows)
    assert CalibrateConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize("rows", [(), (1, 8), (2, 1, 8), (1, 1, 8), (0, 1, 8), (1, 2, 129)])
def test_row_counts_that_are_not(rows: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=r"rows = .* at least three ascending .* \(128\)"):
        CalibrateConfig(model="m", rows=rows)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tau": 0.3}, r"tau = 0\.3 .* policy 'auto', it is for shareprefill: use slack"),
        ({"policy": "sampled", "tau": 0.3}, r"tau = 0\.3 .* 'sampled', .* shareprefill: leave"),
        ({"policy": "shareprefill", "slack": 0.1}, r"slack = 0\.1 .*, it is for auto: use tau"),
        ({"policy": "flex", "slack": 0.1}, r"slack = 0\.1 .* 'flex', it is for auto: leave it out"),
        ({"slack": 1.1}, r"slack = 1\.1 is not allowed: it must be between -1 and 1"),
        ({"slack": -1.1}, r"slack = -1\.1 is not allowed"),
        ({"slack": float("nan")}, "slack = nan is not allowed"),
        ({"policy": "shareprefill", "tau": 1.1}, r"tau = 1\.1 is not allowed"),
    ],
)
def test_each_rule_of_sharing_has_its_own_threshold(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RuntimeConfig(**options)


@pytest.mark.parametrize("policy", ["dense", "smoothed", "streaming:local_blocks=4"])
@pytest.mark.parametrize("option", ["delta", "pivot_rows", "sample_rows", "check_rows"])
def test_what_only_plans_have_is_refused_with_other_policies(policy: str, option: str) -> None:
    with pytest.raises(
        ConfigError, match=f"{option} = 1 does nothing to policy '{policy}', it is for auto"
    ):
        RuntimeConfig.from_dict({"policy": policy, option: 1})
    assert getattr(RuntimeConfig.from_dict({option: 1}), option) == 1


@pytest.mark.parametrize("policy", ["dense", "streaming", "streaming:local_blocks=4"])
def test_a_gamma_is_refused_where_it_does_nothing(policy: str) -> None:
    with pytest.raises(ConfigError, match=rf"gamma = 0\.9 does nothing to policy '{policy}'"):
        RuntimeConfig(policy=policy, gamma=0.9)


@pytest.mark.parametrize("option", ["pivot_rows", "check_rows", "sample_rows"])
def test_the_papers_rule_samples_no_rows(option: str) -> None:
    assert RuntimeConfig(policy="shareprefill", delta=0.5).delta == 0.5
    with pytest.raises(ConfigError, match=f"{option} = 2 does nothing to policy 'shareprefill'"):
        RuntimeConfig.from_dict({"policy": "shareprefill", option: 2})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "sampled:rows=4", "sample_rows": 2}, "auto and sampled, sampled without rows"),
        ({"policy": "flash:alpha=0.1", "gamma": 0.9}, "dense and streaming, flash without alpha"),
        ({"policy": "decompose:max_error=0.1", "gamma": 0.9}, "decompose without max_error and"),
        ({"policy": "streaming", "local_blocks": 16}, "use its parameter, streaming:local_blocks="),
        ({"policy": "streaming", "local_blocks": 2}, "local_blocks = 2 does nothing"),
        ({"policy": policy_text(Streaming()), "gamma": 0.9}, "gamma = 0.9 does nothing"),
        ({"policy": policy_text(Sampled()), "sample_rows": 2}, "sample_rows = 2 does nothing"),
        ({"policy": "mine:Own", "sample_rows": 2}, "sample_rows = 2 does nothing"),
    ],
)
def test_parameters_stand_for_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RuntimeConfig.from_dict(options)


@pytest.mark.parametrize(
    "policy", ["flash", "flash:alpha=None", "flex:tau=0.2", "mine:Own", "mine:Own:rows=4"]
)
def test_what_most_policies_read_is_for_those_from_outside_too(policy: str) -> None:
    options = {"gamma": 0.9, "sink_blocks": 2, "local_blocks": 3, "max_density": 0.5}
    assert RuntimeConfig.from_dict({"policy": policy, **options}).given() == options


@pytest.mark.parametrize(("name", "value"), [("budget", 0.3), ("max_kl", 0.01)])
def test_a_plan_has_one_goal(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"target_recall and {name} exclude each other"):
        ClusterConfig(target_recall=0.9, **{name: value})
    with pytest.raises(ConfigError, match="budget and max_kl exclude each other"):
        ClusterConfig(budget=0.3, max_kl=0.01)
    assert getattr(ClusterConfig(**{name: value}), name) == value


def test_another_policy_leaves_out_what_was_chosen_for_the_former() -> None:
    chosen = RuntimeConfig(
        gamma=0.8, slack=0.1, delta=0.2, pivot_rows=4, check_rows=2, sample_rows=4, local_blocks=3,
        max_density=0.5, decode="sparse",
    )  # fmt: skip
    kept: dict[str, Any] = {"max_density": 0.5, "decode": "sparse"}
    assert chosen.with_policy("streaming") == RuntimeConfig(policy="streaming", **kept)
    sampled = RuntimeConfig(policy="sampled", sample_rows=4, local_blocks=3, **kept)
    assert chosen.with_policy("sampled") == sampled
    assert chosen.with_policy("dense") == RuntimeConfig(policy="dense", decode="sparse")


@pytest.mark.parametrize("policy", POLICIES)
def test_any_policy_may_follow_another_whatever_that_reads(policy: str) -> None:
    """A request of an engine names a policy alone, and the engine's own keeps its options."""
    values = {
        **dict.fromkeys(("gamma", "slack", "tau", "delta", "max_density"), 0.5),
        **dict.fromkeys(("pivot_rows", "check_rows", "sample_rows", "local_blocks"), 4),
        "sink_blocks": 0,
        "precision": "fp8",
        "fp8_error": 0.2,
        "min_tokens": 7,
    }
    read = {name: value for name, value in values.items() if reads(policy, name)}
    config = RuntimeConfig.from_dict({"policy": policy, **read})
    assert config.given().keys() == read.keys() - {"min_tokens"}
    for other in POLICIES:
        found = config.with_policy(other)
        assert (found.policy, found.min_tokens) == (other, 7)
        assert found.given().items() <= read.items()


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (RuntimeConfig, {"gamma": "0.9"}, "gamma = '0.9' is of the wrong type: .* a number"),
        (RuntimeConfig, {"min_tokens": 1.5}, "min_tokens = 1.5 .* a whole number"),
        (RuntimeConfig, {"min_tokens": True}, "min_tokens = True .* a whole number"),
        (RuntimeConfig, {"decode": 1}, "decode = 1 .* a text"),
        (RuntimeConfig, {"decode": "sparse", "decode_density": [0.2]}, r"decode_density = \[0.2\]"),
        (ClusterConfig, {"k": "auto"}, "k = 'auto' .* a whole number or None"),
        (CalibrateConfig, {"model": "m", "data": "text"}, "data = 'text' .* a list of texts"),
        (EvalConfig, {"artifact": "a.st", "lengths": [4096.0]}, "lengths .* of whole numbers"),
        (EvalConfig, {"artifact": "a.st", "measure": "no"}, "measure = 'no' .* true or false"),
    ],
)
def test_values_of_another_type_are_refused(
    kind: Any, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        kind.from_dict(values)


def test_numbers_of_numpy_are_numbers() -> None:
    found = RuntimeConfig.from_dict({"gamma": np.float32(0.5), "min_tokens": np.int64(7)})
    assert (found.gamma, found.min_tokens) == (0.5, 7)
    assert RuntimeConfig.from_dict({"gamma": 1}).gamma == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gammas": (0.9,)}, "gammas = (0.9,)"),
        ({"max_density": 0.5}, "max_density = 0.5"),
        ({"precision": "fp8"}, "precision = 'fp8'"),
        ({"decode": "sparse", "precision": "fp8"}, "precision = 'fp8'"),
        ({"decode": "sparse", "gammas": (0.9,)}, "gammas = (0.9,)"),
    ],
)
def test_dense_alone_takes_no_options_of_patterns(changes: dict[str, Any], message: str) -> None:
    options: dict[str, Any] = {"artifact": "a.st", "policies": ("dense",)}
    with pytest.raises(ConfigError, match=f"{re.escape(message)} does nothing .*name a policy"):
        EvalConfig(**options, **changes)
    assert EvalConfig(artifact="a.st", policies=("dense", "auto"), **changes).runtimes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decode_density": 0.3}, "decode_density = 0.3 is for sparse decode steps"),
        ({"fp8_error": 0.3}, "fp8_error = 0.3 is for FP8 attention"),
        ({"decode": "few"}, "decode = 'few' is not allowed"),
        ({"precision": "int4"}, "precision = 'int4' is not allowed"),
    ],
)
def test_options_are_checked_also_where_dense_attention_alone_is_asked_for(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        EvalConfig(artifact="a.st", policies=("dense",), **changes)


def test_dense_prefills_whose_steps_are_sparse_stay_in_the_models_precision() -> None:
    policies = ("dense", "auto")
    config = EvalConfig(artifact="a.st", policies=policies, decode="sparse", precision="fp8")
    assert [r.precision for r in config.runtimes()] == ["model", "fp8"]


def test_dense_attention_is_the_models_own() -> None:
    choices: list[dict[str, Any]] = [{"precision": "fp8"}, {"precision": "fp8", "fp8_error": 0.2}]
    for precision in choices:
        with pytest.raises(ConfigError, match="precision = 'fp8' does nothing to policy 'dense'"):
            RuntimeConfig(policy="dense", **precision)
        dense = RuntimeConfig(**precision).with_policy("dense")
        assert (dense.precision, dense.fp8_error) == ("model", None)
        assert RuntimeConfig(**precision).with_policy("sampled").precision == "fp8"


def test_thresholds_of_sharing() -> None:
    assert RuntimeConfig(slack=-1.0).slack == -1.0
    assert RuntimeConfig(policy="shareprefill", tau=0.0).tau == 0.0
    with pytest.raises(ConfigError, match=r"slack = -0\.1 is not allowed"):
        ClusterConfig(slack=-0.1)


@pytest.mark.parametrize(("old", "new"), [("share", "shareprefill"), ("level", "global-threshold")])
def test_a_renamed_policy_keeps_working_with_a_note(
    old: str, new: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert RuntimeConfig(policy=old) == RuntimeConfig(policy=new)
    assert f"policy '{old}' is now called '{new}'" in caplog.text
    caplog.clear()
    assert EvalConfig(artifact="a.st", policies=("auto", old)).policies == ("auto", new)
    assert SweepConfig(artifact="a.st", policy=old, gammas=(0.9,)).policy == new
    assert caplog.text.count("is now called") == 2


def test_every_policy_of_the_list_is_one_of_the_runtime() -> None:
    for name in SELECTION_POLICIES:
        assert callable(make_policy(name).select)
