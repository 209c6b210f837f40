from __future__ import annotations

from typing import Any

import pytest

from shareprefill.config import CalibrateConfig, ClusterConfig, RuntimeConfig
from shareprefill.errors import ConfigError
from shareprefill.evaluation.config import EvalConfig, SweepConfig
from shareprefill.policy_names import SELECTION_POLICIES
from shareprefill.runtime.policies import make_policy


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
        ({"tau": 0.3}, r"tau = 0\.3 is for policy 'shareprefill', not for 'auto': use slack"),
        ({"policy": "sampled", "tau": 0.3}, r"tau = 0\.3 .* 'sampled', which shares nothing"),
        (
            {"policy": "shareprefill", "slack": 0.1},
            r"slack = 0\.1 is for policy 'auto', .*: use tau",
        ),
        ({"policy": "flex", "slack": 0.1}, r"slack = 0\.1 .* not for 'flex', which shares nothing"),
        ({"slack": 1.1}, r"slack = 1\.1 is not allowed: it must be between -1 and 1"),
        ({"slack": -1.1}, r"slack = -1\.1 is not allowed"),
        ({"slack": float("nan")}, "slack = nan is not allowed"),
        ({"policy": "shareprefill", "tau": 1.1}, r"tau = 1\.1 is not allowed"),
    ],
)
def test_each_rule_of_sharing_has_its_own_threshold(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RuntimeConfig(**options)


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
