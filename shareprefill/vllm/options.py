"""What a serving engine is asked for: an artifact or a policy, and a session's options."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from typing import Any, Self

from shareprefill.config import RuntimeConfig
from shareprefill.errors import ConfigError, did_you_mean
from shareprefill.policy_names import SELECTION_POLICIES, installed_policies, is_planned
from shareprefill.runtime.crossover import TABLE_VARIABLE
from shareprefill.runtime.policies import require_policy

# The key in `additional_config`, in `extra_args` of a request, and in a forward pass's context.
NAME = "shareprefill"
ARTIFACT_VARIABLE = "SHAREPREFILL_ARTIFACT"
POLICY_VARIABLE = "SHAREPREFILL_POLICY"
# Engines that tell logits processors nothing start only with the switch turned off; requests that
# carry one are refused then.
SWITCH_VARIABLE = "SHAREPREFILL_REQUEST_SWITCH"
# Names vLLM's backend under ours.
INNER_VARIABLE = "SHAREPREFILL_INNER_BACKEND"
_VARIABLES = (ARTIFACT_VARIABLE, POLICY_VARIABLE, SWITCH_VARIABLE, INNER_VARIABLE, TABLE_VARIABLE)
# What Kubernetes sets in every container for a service called shareprefill.
_OF_A_SERVICE = re.compile(r"SHAREPREFILL_(SERVICE_HOST|(SERVICE_)?PORT)(_\w+)?")
# A request with this value of the switch is computed by the inner backend alone.
OFF = "off"


@dataclass(frozen=True, kw_only=True)
class ServingOptions:
    """Options of the plug-in, from `--additional-config` or from the environment.

    Attributes:
        artifact: Path of the artifact; None with a policy that needs no calibration.
        runtime: A session's options (`policy`, `gamma`, `min_tokens`, ...).
        lora: What requests with a LoRA adapter do: None refuses an engine that serves adapters,
            `share` reads the patterns of the base model for them too.
        checkpoint: None refuses an artifact that cannot be compared with the model's files, or that
            was made for other positions or windows; `unchecked` takes it if its sizes fit.
    """

    artifact: str | None
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    lora: str | None = None
    checkpoint: str | None = None

    def __post_init__(self) -> None:
        if self.artifact is None and is_planned(self.runtime.policy):
            raise ConfigError(
                f"policy {self.runtime.policy!r} needs an artifact: name one "
                f'({{"{NAME}": {{"artifact": "clusters.st"}}}}), or a policy that needs no '
                f"calibration ({', '.join(SELECTION_POLICIES)})"
            )
        if self.runtime.policy == "dense" and self.runtime.decode == "dense":
            raise ConfigError(
                "policy 'dense' leaves nothing to shareprefill: run vLLM without it, or send "
                f"requests with {NAME!r}: {OFF!r}"
            )
        if self.runtime.precision != "model":
            raise ConfigError(
                f"precision = {self.runtime.precision!r} is for sessions of transformers models, "
                "and was not tried in engines: leave it out"
            )
        if self.runtime.nonfinite == "error":
            raise ConfigError(
                "nonfinite = 'error' is for sessions of transformers models: in an engine one "
                "request's NaN would end all others, too; leave it out"
            )
        for name, allowed in (("lora", "share"), ("checkpoint", "unchecked")):
            value = getattr(self, name)
            if value not in (None, allowed):
                raise ConfigError(
                    f"{name} = {value!r} is not allowed: it must be {allowed!r}, or unset"
                )
        if self.artifact is None and self.checkpoint is not None:
            raise ConfigError(
                f"checkpoint = {self.checkpoint!r} is for an artifact, and none is named: leave it "
                "out"
            )

    @classmethod
    def find(
        cls, additional_config: Mapping[str, Any] | None, environment: Mapping[str, str]
    ) -> Self | None:
        """The options of an engine; None where it was asked for nothing.

        Args:
            additional_config: The engine's `additional_config`, whose entry `shareprefill` holds
                options by name. It wins over the environment.
            environment: Environment variables.

        Raises:
            ConfigError: an option, a key or a variable is unknown, or a value is not allowed.
        """
        refuse_misspelt("additional_config's key", additional_config or {})
        for name in environment:
            is_ours = _plain(name).startswith(NAME) and not _OF_A_SERVICE.fullmatch(name)
            if is_ours and name not in _VARIABLES:
                raise ConfigError(
                    f"the environment variable {name} is unknown{did_you_mean(name, _VARIABLES)}: "
                    f"shareprefill reads {', '.join(_VARIABLES)}; other options go into "
                    f"additional_config[{NAME!r}]"
                )
        named = {
            "artifact": environment.get(ARTIFACT_VARIABLE),
            "policy": environment.get(POLICY_VARIABLE),
        }
        named = {name: value for name, value in named.items() if value}
        entry = (additional_config or {}).get(NAME)
        if entry is None:
            if not named:
                return None
            entry, named = named, {}
        if not isinstance(entry, Mapping):
            raise ConfigError(
                f"additional_config[{NAME!r}] = {entry!r} is not allowed: it must be an object "
                'like {"artifact": "clusters.st"}'
            )
        own = {field.name for field in fields(cls)} - {"runtime"}
        known = sorted(own | {field.name for field in fields(RuntimeConfig)})
        for name in entry:
            if name not in known:
                raise ConfigError(
                    f"additional_config[{NAME!r}] has no option {name!r}"
                    f"{did_you_mean(str(name), known)}; it takes {', '.join(known)}"
                )
        if named.keys() - entry.keys() and not {"artifact", "policy"} & entry.keys():
            raise ConfigError(
                f"additional_config[{NAME!r}] wins over the environment, and names neither an "
                f"artifact nor a policy: write {named} of the environment into it"
            )
        values = {name: value for name, value in entry.items() if name in own}
        others = {name: value for name, value in entry.items() if name not in own}
        if values.get("artifact") is not None and not isinstance(values["artifact"], str):
            raise ConfigError(
                f"artifact = {values['artifact']!r} is not allowed: it must be a path"
            )
        return cls(
            artifact=values.get("artifact"),
            runtime=RuntimeConfig.from_dict(others),
            lora=values.get("lora"),
            checkpoint=values.get("checkpoint"),
        )


def refuse_misspelt(what: str, names: Iterable[object]) -> None:
    """Refuses a key that is nearly ours: it would do nothing, and nobody would say so.

    Args:
        what: Is named so, in words.
        names: As they were written; those that are not near ours are others' and may be any.

    Raises:
        ConfigError: one is near.
    """
    for name in map(str, names):
        if name != NAME and get_close_matches(_plain(name), [NAME], cutoff=0.9):
            raise ConfigError(
                f"{what} {name!r} is unknown (did you mean {NAME!r}?): correct it, or name it "
                "otherwise if it is not meant for shareprefill"
            )


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")


def switch_is_on() -> bool:
    """Whether the requests of an engine may carry a switch.

    Raises:
        ConfigError: the environment says neither on nor off.
    """
    value = os.environ.get(SWITCH_VARIABLE) or "on"
    if value not in ("on", "off"):
        raise ConfigError(f"{SWITCH_VARIABLE} = {value!r} is not allowed: it must be on or off")
    return value == "on"


def check_switch(value: object) -> None:
    """Refuses a request's switch that is neither off nor a policy.

    Args:
        value: `extra_args["shareprefill"]` of a request; None where it has none.

    Raises:
        ConfigError: says what is allowed.
    """
    # Names alone: a request may not have a module imported, nor a plan made for any value.
    allowed = (OFF, *SELECTION_POLICIES)
    if value is None or value in allowed:
        return
    allowed = (*allowed, *installed_policies())
    if value not in allowed:
        raise ConfigError(
            f"extra_args[{NAME!r}] = {value!r} is not allowed: it must be one of "
            f"{', '.join(allowed)}"
        )
    # What cannot be made would end the engine.
    require_policy(str(value))
