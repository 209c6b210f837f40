"""Policies of one's own: by module, by file, and by the entry point of an installed package."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from shareprefill import policy_names
from shareprefill.config import RuntimeConfig
from shareprefill.errors import ConfigError
from shareprefill.policies import BlockPolicy, LayerInputs, covering_blocks, pooled_scores
from shareprefill.policy_names import GROUP, PolicyName
from shareprefill.runtime.core import SparsePrefill
from shareprefill.runtime.plan import plan_without_artifact
from shareprefill.runtime.policies import make_policy, policy_text
from shareprefill.runtime.policies.sampled import Sampled
from shareprefill.testing import check_policy, check_waits_for_nothing, layer_inputs

FILE = """
from dataclasses import dataclass

import torch

from shareprefill.policies import BlockPolicy


@dataclass(frozen=True)
class Strided(BlockPolicy):
    stride: int = 4

    def blocks(self, layer, gamma):
        n_q, n_k = layer.geometry.shape
        columns = torch.arange(n_k, device=layer.query.device) % self.stride == 0
        return (columns & layer.geometry.causal).expand(len(layer.query), -1, -1)

    def work(self, inputs):
        return 0.0


class Unfinished(BlockPolicy):
    def blocks(self, layer, gamma):
        return None


@dataclass(frozen=True)
class Wanting(Strided):
    scale: float | None = None
    name: str = "x"
    loud: bool = False
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder with a policy in a file, which nothing else knows."""
    (tmp_path / "strided_here.py").write_text(FILE)
    (tmp_path / "broken_here.py").write_text("import no_such_library\n")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    assert str(tmp_path) not in sys.path
    for name in [name for name in sys.modules if name.removesuffix(".py").endswith("_here")]:
        del sys.modules[name]


@dataclass(frozen=True)
class Covering(BlockPolicy):
    """Blocks that cover gamma by pooled scores, in this module."""

    def blocks(self, layer: LayerInputs, gamma: Tensor) -> Tensor:
        return covering_blocks(layer, pooled_scores(layer), gamma)

    def work(self, inputs: LayerInputs) -> float:
        return 0.25


@pytest.mark.parametrize("name", ["strided_here:Strided:stride=2", "strided_here.py:Strided"])
def test_a_class_of_a_file_is_a_policy_like_ours(here: Path, name: str) -> None:
    check_policy(name)
    plan = plan_without_artifact(2, 4, RuntimeConfig(policy=name, max_density=1.0))
    query, key, value = torch.randn(4, 900, 16), torch.randn(2, 900, 16), torch.randn(2, 900, 16)
    prefill = SparsePrefill(plan)
    state = prefill.begin(plan.geometry(900, 900, query.device))
    _, record = prefill.attend(0, state, query, key, value, scale=0.25)
    assert {plan.labels[code] for code in record.policies.tolist()} == {name}
    # 8 rows of blocks: columns 0, 4 (and, with stride 2, 2 and 6), and the last two of each row.
    assert record.blocks.tolist() == [27 if "stride=2" in name else 23] * 4


def test_a_path_and_an_object_name_the_same_class(here: Path) -> None:
    named = make_policy(f"{here / 'strided_here.py'}:Strided:stride=8")
    assert named == make_policy("./strided_here.py:Strided:stride=8")
    assert make_policy(policy_text(named)) == named
    assert policy_text("flex") == "flex"
    assert make_policy(policy_text(Sampled(rows=4))) == Sampled(rows=4)


def test_a_policy_in_one_function_is_that_function() -> None:
    """The same blocks as the class of ours with the same rule."""
    check_policy(Covering())
    inputs, heads = layer_inputs(), torch.arange(4)
    gamma = torch.tensor([0.5, 0.7, 0.8, 0.9])
    ours = make_policy("pooled").select(inputs, heads, gamma).pattern
    assert torch.equal(Covering().select(inputs, heads, gamma).pattern, ours)


def test_an_installed_package_adds_policies_by_name(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def install(package: str, value: str) -> None:
        folder = here / "site" / f"{package}-1.0.dist-info"
        folder.mkdir(parents=True)
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        (folder / "entry_points.txt").write_text(f"[{GROUP}]\nstrided = {value}\n")
        monkeypatch.syspath_prepend(here / "site")

    install("one", "strided_here:Strided")
    assert RuntimeConfig(policy="strided:stride=2").policy == "strided:stride=2"
    made: Any = make_policy("strided:stride=2")
    assert made.stride == 2
    with pytest.raises(ConfigError, match=r"did you mean 'strided'\?\).*strided, and module:Class"):
        RuntimeConfig(policy="stridet")
    install("two", "another:Strided")
    with pytest.raises(ConfigError, match="two installed packages add a policy 'strided'"):
        make_policy("strided")


def test_parameters_are_read_by_their_types(here: Path) -> None:
    made: Any = make_policy("strided_here:Wanting:scale=2,stride=3,name=7,loud=true")
    assert (made.scale, type(made.scale), made.stride) == (2.0, float, 3)
    assert (made.name, made.loud) == ("7", True)
    assert make_policy("strided_here:Wanting:scale=None") == make_policy("strided_here:Wanting")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("flux", r"policy = 'flux' is not known \(did you mean 'flex'\?\). Known"),
        ("flex:tua=.2", r"'flex' has no parameter 'tua' \(did you mean 'tau'\?\). It has: tau"),
        ("flex:tau=much", r"'flex': tau = 'much' is not allowed: it must be a number"),
        ("sampled:rows=2.5", "rows = '2.5' is not allowed: it must be a whole number"),
        ("smoothed:weights=1", "has no parameter 'weights'. It has: rows"),
        ("oracle:rows=1", "has no parameter 'rows'. It has: none"),
        ("auto:rows=1", "policy 'auto' has no parameters"),
        ("", "is not allowed: write NAME"),
        ("flex:", "is not allowed: write NAME"),
        ("flex:tau=", "is not allowed: write NAME"),
        ("flex:tau=1,tau=2", "is not allowed: write NAME"),
        ("a:b:c", "is not allowed: write NAME"),
        ("no_such_module:Strided", "there is no module 'no_such_module'"),
        ("nowhere.py:Strided", "there is no file nowhere.py"),
        ("strided_here:Stridet", r"strided_here has no Stridet \(did you mean 'Strided'\?\)"),
        ("strided_here:torch", "is no class of a policy: derive one from"),
        ("strided_here:Unfinished", "lacks the methods that a policy must have: work"),
    ],
)
def test_what_is_no_policy_is_refused(here: Path, name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_policy(RuntimeConfig(policy=name).policy)


def test_what_a_module_imports_in_vain_is_its_own_error(here: Path) -> None:
    with pytest.raises(ModuleNotFoundError, match="no_such_library"):
        make_policy("broken_here:Policy")


def test_an_object_that_no_name_finds_is_refused() -> None:
    class Hidden(Covering):
        pass

    with pytest.raises(ConfigError, match="define its class as a dataclass at the top level"):
        policy_text(Hidden())


def test_lists_keep_the_parameters_of_each_policy() -> None:
    text = "flex:tau=.2, a.b:C:x=1,y=2 ,oracle"
    assert policy_names.listed_policies(text) == ("flex:tau=.2", "a.b:C:x=1,y=2", "oracle")
    assert str(PolicyName.parse(" a.b:C: x = 1 , y=2".strip())) == "a.b:C:x=1,y=2"


class Wrong(Covering):
    """Gives what it is made with."""

    def __init__(self, change: Any) -> None:
        object.__setattr__(self, "change", change)

    def blocks(self, layer: LayerInputs, gamma: Tensor) -> Tensor:
        return self.change(super().blocks(layer, gamma))  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p[0], r"chose \[7, 7\], torch.bool on cpu; it must be a tensor \[4, 7, 7\]"),
        (lambda p: p.float(), r"chose \[4, 7, 7\], torch.float32 on cpu; it must be"),
        (lambda p: p.tolist(), "chose a list; it must be a tensor"),
    ],
)
def test_what_is_no_bitmap_is_refused_by_sessions(change: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Wrong(change).select(layer_inputs(), torch.arange(4), torch.full((4,), 0.8))


@pytest.mark.gpu
def test_the_public_check_finds_a_policy_that_waits_for_a_gpu() -> None:
    with pytest.raises(AssertionError, match="the policy waits for the GPU"):
        check_waits_for_nothing(Wrong(lambda p: p if p.any() else ~p), torch.device("cuda"))


def _loose(pattern: Tensor) -> Tensor:
    return pattern | True


def _crossed(pattern: Tensor) -> Tensor:
    return pattern & pattern.flip(0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_loose, "blocks are chosen that are not causal"),
        (_crossed, "heads 0 and 1 read other blocks in a process of their own"),
        (lambda p: p & (torch.rand(p.shape) > 0.5), "a second call chooses other blocks"),
    ],
)
def test_the_public_check_finds_faults(change: Any, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_policy(Wrong(change))
