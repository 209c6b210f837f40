"""Policies by name: ours, those of installed packages, and classes of one's own. Imports no torch.

Each name stands for a place `module:Class`, and `runtime.policies` makes a policy of any place in
the same way. A name may have parameters: `streaming:local_blocks=16`.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Self

from shareprefill.errors import ConfigError, did_you_mean

logger = logging.getLogger(__name__)

# The entry points by which an installed package adds policies, as `name = "module:Class"`.
GROUP = "shareprefill.policies"
# What a session may run under: `auto` as the artifact says and the paper's rule need an artifact;
# otherwise one rule for every head.
PLANNED_POLICIES: tuple[str, ...] = ("auto", "shareprefill")
# Policies by which a head chooses its own blocks: a file each in `runtime/policies`.
SELECTION_POLICIES: tuple[str, ...] = (
    *("sampled", "vertical-slash", "smoothed", "global-threshold", "antidiagonal", "decompose"),
    *("flash", "flex", "oracle", "pooled", "streaming"),
)
POLICIES: tuple[str, ...] = (*PLANNED_POLICIES, "dense", *SELECTION_POLICIES)
# Options of a session that few policies read, and which do. Options of neither table are for all.
READ_BY: dict[str, tuple[str, ...]] = {
    "slack": ("auto",),
    "tau": ("shareprefill",),
    "delta": PLANNED_POLICIES,
    "pivot_rows": ("auto",),
    "check_rows": ("auto",),
    "sample_rows": ("auto", "sampled"),
}
# Options that most policies read, also those from outside, and which do not.
NOT_READ_BY: dict[str, tuple[str, ...]] = {
    "gamma": ("dense", "streaming"),
    "sink_blocks": ("dense", "streaming"),
    "local_blocks": ("dense", "streaming"),
    "max_density": ("dense",),
    "precision": ("dense",),
    "fp8_error": ("dense",),
}
# Parameters with which a policy does not read an option that it reads without.
_IN_PLACE_OF = {
    "gamma": {"flash": ("alpha",), "decompose": ("max_error", "time_budget")},
    "sample_rows": {"sampled": ("rows",)},
}
# What a policy reads instead of an option.
_INSTEAD = {
    ("slack", "shareprefill"): "tau",
    ("tau", "auto"): "slack",
    ("sink_blocks", "streaming"): "its parameter, streaming:sink_blocks=...",
    ("local_blocks", "streaming"): "its parameter, streaming:local_blocks=...",
}
# What a session without an artifact does where no policy is named.
WITHOUT_ARTIFACT = "smoothed"
# Words that still work in this version.
_RENAMED = {"share": "shareprefill", "level": "global-threshold"}
_WRITTEN = "write NAME, NAME:parameter=value,..., or module:Class in the place of NAME"


@dataclass(frozen=True)
class PolicyName:
    """A policy as it is written.

    >>> PolicyName.parse("streaming:sink_blocks=2,local_blocks=16").parameters
    {'sink_blocks': '2', 'local_blocks': '16'}
    >>> PolicyName.parse("strided.py:Strided").name
    'strided.py:Strided'

    Attributes:
        name: A name, or `module:Class`.
        parameters: Values by parameter, as they are written.
    """

    name: str
    parameters: dict[str, str]

    @classmethod
    def parse(cls, text: str) -> Self:
        """Reads a policy.

        Raises:
            ConfigError: it is written otherwise.
        """
        name, colon, last = text.rpartition(":")
        if not colon or "=" not in last:
            name, last = text, ""
        parameters = {}
        for part in filter(None, (part.strip() for part in last.split(","))):
            key, is_given, value = (word.strip() for word in part.partition("="))
            if not (key.isidentifier() and is_given and value) or key in parameters:
                raise _not_allowed(text)
            parameters[key] = value
        parts = name.split(":")
        if len(parts) > 2 or not all(part and part == part.strip() for part in parts):
            raise _not_allowed(text)
        if len(parts) == 2 and not parts[1].isidentifier():
            raise _not_allowed(text)
        return cls(name, parameters)

    @property
    def is_place(self) -> bool:
        """Whether it names a class by its module."""
        return ":" in self.name

    def __str__(self) -> str:
        written = ",".join(f"{key}={value}" for key, value in self.parameters.items())
        return f"{self.name}:{written}" if written else self.name


def current_policy(text: str) -> str:
    """A policy in its present name; for a former one a note goes to the log.

    Raises:
        ConfigError: it is not written as a policy is.
    """
    found = PolicyName.parse(text)
    renamed = _RENAMED.get(found.name)
    if renamed is None:
        return str(found)
    logger.warning("policy %r is now called %r; the old word goes soon", found.name, renamed)
    return str(PolicyName(renamed, found.parameters))


def check_policy_name(text: str) -> None:
    """Refuses a policy that is not known; a class by its module is not looked for yet.

    Raises:
        ConfigError: names what is near, and what is known.
    """
    found = PolicyName.parse(text)
    if found.name in POLICIES:
        if found.parameters and found.name not in SELECTION_POLICIES:
            raise ConfigError(f"policy {found.name!r} has no parameters, {text!r} gives some")
        return
    installed = installed_policies()
    if found.is_place or found.name in installed:
        return
    known = (*POLICIES, *installed)
    raise ConfigError(
        f"policy = {found.name!r} is not known{did_you_mean(found.name, known)}. Known are "
        f"{', '.join(known)}, and module:Class for one of your own (docs/add-a-policy.md)"
    )


def reads(text: str, option: str) -> bool:
    """Whether a policy reads an option of a session.

    Of `auto` and `shareprefill` it also depends on the artifact (`runtime.plan.require_read`).

    >>> reads("sampled", "sample_rows"), reads("sampled:rows=4", "sample_rows")
    (True, False)

    Args:
        text: A policy as it is written, that is known.
        option: A field of `RuntimeConfig`.
    """
    policy = PolicyName.parse(text)
    # One of ours that is named by its module has its own defaults, and reads no artifact's.
    if option in READ_BY and policy.name not in READ_BY[option]:
        return False
    name = _name_of(policy.name)
    return name not in NOT_READ_BY.get(option, ()) and not any(
        policy.parameters.get(parameter, "None") != "None"
        for parameter in _IN_PLACE_OF.get(option, {}).get(name, ())
    )


def require_read(text: str, option: str, value: object) -> None:
    """Refuses an option of a session that its policy does not read.

    Raises:
        ConfigError: names the option, the policy, and those that read it.
    """
    if reads(text, option):
        return
    name = _name_of(PolicyName.parse(text).name)
    parameters = _IN_PLACE_OF.get(option, {}).get(name, ())
    if option in READ_BY:
        who = " and ".join(READ_BY[option])
    else:
        who = f"all policies but {' and '.join(NOT_READ_BY[option])}"
    if parameters and name not in NOT_READ_BY.get(option, ()):
        who = f"{who}, {name} without {' and '.join(parameters)}"
    instead = _INSTEAD.get((option, name))
    use = f"use {instead}, or leave it out" if instead else "leave it out"
    raise ConfigError(
        f"{option} = {value!r} does nothing to policy {text!r}, it is for {who}: {use}"
    )


def is_planned(text: str) -> bool:
    """Whether a policy needs an artifact."""
    name = PolicyName.parse(text).name
    return _RENAMED.get(name, name) in PLANNED_POLICIES


def require_no_plan(text: str) -> None:
    """Refuses a policy that needs an artifact, where there is none.

    Raises:
        ConfigError: says how to make one, and what needs none.
    """
    if is_planned(text):
        raise ConfigError(
            f"policy {text!r} needs an artifact: name one, make one with sp calibrate and sp "
            f"cluster, or name a policy that plans nothing ({', '.join(SELECTION_POLICIES)})"
        )


def installed_policies() -> dict[str, str]:
    """Names of the policies that installed packages add -> `module:Class`.

    Raises:
        ConfigError: two packages add different classes by one name.
    """
    # Here, as it takes a tenth of what sp --help does.
    from importlib.metadata import entry_points

    found: dict[str, str] = {}
    for entry in entry_points(group=GROUP):
        if found.setdefault(entry.name, entry.value) != entry.value:
            raise ConfigError(
                f"two installed packages add a policy {entry.name!r}, {found[entry.name]} and "
                f"{entry.value}: remove one of them, or name the class itself"
            )
    return found


def place_of(name: str) -> str:
    """The `module:Class` of a policy by which heads choose their own blocks.

    Args:
        name: A name without parameters, or a place.

    Raises:
        ConfigError: it is not known, or no such policy.
    """
    if name in SELECTION_POLICIES:
        return _place_of_ours(name)
    check_policy_name(name)
    return name if ":" in name else installed_policies()[name]


def listed_policies(text: str) -> tuple[str, ...]:
    """Policies with commas between them, of which each may have parameters with commas.

    >>> listed_policies("flex, streaming:sink_blocks=2,local_blocks=16,oracle")
    ('flex', 'streaming:sink_blocks=2,local_blocks=16', 'oracle')
    """
    found: list[str] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        # No name has an equals sign, so this is one more parameter of the policy before.
        is_parameter = "=" in part and ":" not in part.partition("=")[0]
        if is_parameter and found:
            found[-1] += f",{part}"
        else:
            found.append(part)
    return tuple(found)


def _place_of_ours(name: str) -> str:
    module, words = name.replace("-", "_"), name.title().replace("-", "")
    return f"shareprefill.runtime.policies.{module}:{words}"


def _name_of(name: str) -> str:
    """The name of a policy of ours that is named by its place; others as they are."""
    return {_place_of_ours(ours): ours for ours in SELECTION_POLICIES}.get(name, name)


def _not_allowed(text: str) -> ConfigError:
    return ConfigError(f"policy = {text!r} is not allowed: {_WRITTEN}")
