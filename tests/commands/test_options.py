from __future__ import annotations

from typing import Any

import pytest
import typer

from shareprefill import cli
from shareprefill.bench.config import BenchConfig
from shareprefill.commands.options import attributes_of
from shareprefill.config import CalibrateConfig, ClusterConfig, RuntimeConfig, TrainConfig
from shareprefill.evaluation.config import EvalConfig, SweepConfig

COMMANDS: dict[str, Any] = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
CONFIGURATIONS = (
    *(CalibrateConfig, TrainConfig, ClusterConfig, RuntimeConfig, EvalConfig, SweepConfig),
    BenchConfig,
)


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_every_field_is_described_as_a_help_text(configuration: type) -> None:
    for name, text in attributes_of(configuration).items():
        assert text, name
        assert "`" not in text
        assert "None" not in text, text


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_option_and_argument_has_a_help_text(name: str) -> None:
    for parameter in COMMANDS[name].params:
        assert getattr(parameter, "help", None), parameter.name


def test_defaults_are_those_of_the_configuration() -> None:
    found = {parameter.name: parameter.default for parameter in COMMANDS["train"].params}
    expected = {**TrainConfig().to_dict(), "calibration": None}
    assert {name: found[name] for name in expected} == expected


def test_both_names_of_samples_are_understood() -> None:
    for command in ("eval", "sweep"):
        (samples,) = [p for p in COMMANDS[command].params if p.name == "samples"]
        assert samples.opts == ["--samples-per-task", "--samples"]
        assert "each task" in samples.help
    (samples,) = [p for p in COMMANDS["calibrate"].params if p.name == "samples"]
    assert samples.help == "Prompts in all."
