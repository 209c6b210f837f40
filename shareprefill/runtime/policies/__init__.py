"""How a head's blocks are chosen: one policy a file, all behind one interface (`base`).

A policy `some-name` is the class `SomeName` of `some_name.py`, and stands in the list of
`shareprefill.policy_names`; those of other packages and files are found and made alike. Attention
sinks take the same share of all masses of a row: they change no choice, and no policy looks at
them.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import secrets
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import is_dataclass
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType, UnionType
from typing import TYPE_CHECKING, Any, Union, get_args, get_origin, get_type_hints
from weakref import WeakKeyDictionary

from shareprefill.errors import ConfigError, did_you_mean
from shareprefill.policy_names import (
    PLANNED_POLICIES,
    POLICIES,
    SELECTION_POLICIES,
    PolicyName,
    place_of,
)

if TYPE_CHECKING:
    from shareprefill.runtime.policies.base import SelectionPolicy

__all__ = [
    "SELECTION_POLICIES",
    "make_policy",
    "policy_class",
    "policy_text",
    "require_policy",
    "source_digest",
]


_sources: WeakKeyDictionary[ModuleType, str] = WeakKeyDictionary()


def make_policy(text: str) -> SelectionPolicy:
    """Makes a policy.

    Args:
        text: One of `SELECTION_POLICIES`, the name of an installed one, or `module:Class`; behind
            it parameters may follow, `:parameter=value,...`.

    Raises:
        ConfigError: there is no such policy, or it has no such parameter.
    """
    written = PolicyName.parse(text)
    found = policy_class(text)
    return found(**_values(found, written))


def require_policy(text: str) -> None:
    """Makes sure that a policy can be made: now, not after a model was loaded.

    Raises:
        ConfigError: see `make_policy`.
    """
    if PolicyName.parse(text).name not in (*PLANNED_POLICIES, "dense"):
        make_policy(text)


def source_digest(text: str) -> str | None:
    """SHA-256 of the file that a policy from outside was loaded from; None for ours."""
    name = PolicyName.parse(text).name
    return None if name in POLICIES else _source(policy_class(text))


def _source(policy: type) -> str:
    """What the file of a policy's module held when it was first asked for here.

    The file may change since, and what was loaded does not.
    """
    module = sys.modules.get(policy.__module__)
    file = getattr(module, "__file__", None)
    if module is None or file is None:
        # What was measured of a class without a file is never used again.
        return secrets.token_hex(16)
    if module not in _sources:
        _sources[module] = hashlib.sha256(Path(file).read_bytes()).hexdigest()
    return _sources[module]


def policy_class(text: str) -> type:
    """The class of a policy as `make_policy` takes it.

    Raises:
        ConfigError: there is none, or it is of no policy.
    """
    policy = PolicyName.parse(text).name
    place = place_of(policy)
    name, _, word = place.rpartition(":")
    module = _module(name, place)
    found = getattr(module, word, None)
    if found is None:
        classes = [key for key, value in vars(module).items() if inspect.isclass(value)]
        raise ConfigError(f"policy {place!r}: {name} has no {word}{did_you_mean(word, classes)}")
    if not inspect.isclass(found) or not callable(getattr(found, "select", None)):
        raise ConfigError(
            f"policy {place!r} is no class of a policy: derive one from "
            "shareprefill.policies.BlockPolicy (docs/add-a-policy.md)"
        )
    if inspect.isabstract(found):
        missing = [
            name
            for name, member in inspect.getmembers(found)
            if getattr(member, "__isabstractmethod__", False)
        ]
        raise ConfigError(
            f"policy {place!r} lacks the methods that a policy must have: {', '.join(missing)}"
        )
    if policy not in POLICIES:
        _source(found)
    return found


def policy_text(policy: str | SelectionPolicy) -> str:
    """What names a policy, which may be given as an object: `module:Class:parameter=value,...`.

    Args:
        policy: A name, or a policy that is a dataclass at the top level of its module.

    Raises:
        ConfigError: it would not be found by its name.
    """
    if isinstance(policy, str):
        return policy
    found = type(policy)
    module, name = sys.modules.get(found.__module__), found.__qualname__
    fields: Mapping[str, Any] = getattr(found, "__dataclass_fields__", {})
    written = {
        key: str(getattr(policy, key))
        for key, field in fields.items()
        if field.init and getattr(policy, key) != field.default
    }
    text = str(PolicyName(f"{found.__module__}:{name}", written))
    if getattr(module, name, None) is not found or make_policy(text) != policy:
        raise ConfigError(
            f"policy {policy!r} cannot be made again from its name, {text}: define its class as a "
            "dataclass at the top level of a module, with parameters that are numbers or words"
        )
    return text


def _module(name: str, place: str) -> ModuleType:
    """The module of a policy: one that can be imported, a file of the working folder, or a path."""
    if name.endswith(".py"):
        return _module_of_file(Path(name), place)
    try:
        with _working_folder_last():
            return import_module(name)
    except ModuleNotFoundError as error:
        # What the module itself imports in vain is its own error.
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        raise ConfigError(
            f"policy {place!r}: there is no module {error.name!r}, neither installed nor in this "
            "folder; a file is named by its path, like my/folder/strided.py:Strided"
        ) from None


def _module_of_file(path: Path, place: str) -> ModuleType:
    file = path.expanduser().resolve()
    # One module for a file, by its path: its classes are the same however often they are asked
    # for, and are found again by the name of their module.
    name = str(file)
    if name in sys.modules:
        return sys.modules[name]
    if not file.is_file():
        raise ConfigError(f"policy {place!r}: there is no file {path}")
    spec = spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    # Dataclasses look their own module up.
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


@contextmanager
def _working_folder_last() -> Iterator[None]:
    """Lets modules of the working folder be imported, as under `python -m`, where no other is."""
    folder = str(Path.cwd())
    sys.path.append(folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def _values(found: type, written: PolicyName) -> dict[str, Any]:
    """The values of a policy's parameters.

    Raises:
        ConfigError: one is unknown, missing, or of another type.
    """
    parameters = inspect.signature(found).parameters
    # A dataclass says the types of its fields, inherited ones too, where they are declared.
    hints = get_type_hints(found if is_dataclass(found) else found.__init__)
    known = [
        name
        for name, parameter in parameters.items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        and _is_written(hints.get(name, Any))
    ]
    for name in written.parameters:
        if name not in known:
            has = ", ".join(known) or "none"
            raise ConfigError(
                f"policy {written.name!r} has no parameter {name!r}{did_you_mean(name, known)}. "
                f"It has: {has}"
            )
    missing = [
        name
        for name in known
        if parameters[name].default is inspect.Parameter.empty and name not in written.parameters
    ]
    if missing:
        example = ",".join(f"{name}=..." for name in missing)
        raise ConfigError(
            f"policy {written.name!r} needs a value of {', '.join(missing)}: write "
            f"{written.name}:{example}"
        )
    return {
        name: _value(written.name, name, value, hints.get(name, Any))
        for name, value in written.parameters.items()
    }


_WORDS = {int: "a whole number", float: "a number", bool: "True or False", str: "a word"}


def _kinds(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _is_written(hint: Any) -> bool:
    """Whether values of a type can be written as words."""
    return hint is Any or any(kind in _WORDS for kind in _kinds(hint))


def _value(policy: str, name: str, text: str, hint: Any) -> Any:
    try:
        value = ast.literal_eval({"true": "True", "false": "False"}.get(text, text))
    except (ValueError, SyntaxError):
        value = text
    kinds = _kinds(hint)
    if hint is Any or type(value) in kinds or (value is None and type(None) in kinds):
        return value
    if float in kinds and type(value) is int:
        return float(value)
    if str in kinds:
        return text
    allowed = " or ".join(_WORDS[kind] for kind in kinds if kind in _WORDS)
    raise ConfigError(f"policy {policy!r}: {name} = {text!r} is not allowed: it must be {allowed}")
