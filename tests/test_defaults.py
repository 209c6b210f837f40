"""Nothing depends on torch's default dtype and default device, which belong to the caller."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import shareprefill
from shareprefill import share_prefill
from shareprefill.artifact import Policy, load_artifact, save_artifact
from shareprefill.calib.capture import capture
from shareprefill.config import RuntimeConfig
from shareprefill.policy_names import POLICIES, reads
from tests.support.tiny import tiny_artifact, tiny_llama, token_ids

P, S, R, V = Policy.PIVOT, Policy.SHARE, Policy.SAMPLED, Policy.VERTICAL_SLASH
PLANNED = [[P, S, R, V], [S, S, P, R], [V, R, S, S]]
# Factories whose dtype follows the default one, and those of integers.
FLOATS = {"empty", "eye", "full", "linspace", "ones", "rand", "randn", "zeros"}
FACTORIES = FLOATS | {"arange", "as_tensor", "randint", "randperm", "tensor", "triu_indices"}
CHECKED = (
    *("runtime", "calib", "clustering", "autoencoder", "audit", "evaluation", "bench", "data"),
    *("artifact.py", "models.py", "doctor.py", "weights.py"),
)


DEFAULTS: list[tuple[torch.dtype, str | None]] = [
    (torch.float64, None),
    (torch.bfloat16, "meta"),
    (torch.float16, "cpu"),
    (torch.float32, "meta"),
]


@contextmanager
def defaults(dtype: torch.dtype, device: str | None) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


@pytest.mark.parametrize("policy", POLICIES)
@torch.no_grad()
def test_sessions_compute_the_same_under_other_defaults(policy: str) -> None:
    model, ids = tiny_llama(), token_ids(1, 60)
    artifact = tiny_artifact(model, PLANNED)
    sparse = {"gamma": 0.7, "max_density": 1.0}
    options = {name: value for name, value in sparse.items() if reads(policy, name)}
    config = RuntimeConfig.from_dict({"policy": policy, "min_tokens": 0, **options})

    def run() -> tuple[torch.Tensor, Any]:
        with share_prefill(model, artifact, config, measure_recall=True) as session:
            return model(input_ids=ids).logits, session.report()

    expected, report = run()
    for dtype, device in DEFAULTS:
        # What the model itself makes anew would follow the defaults, too.
        with defaults(dtype, device):
            found, other = run()
        assert found.dtype == torch.float32
        assert torch.equal(found, expected)
        assert other.to_dict() == report.to_dict()


@torch.no_grad()
def test_capture_and_artifacts_are_the_same_under_other_defaults(tmp_path: Path) -> None:
    model, ids = tiny_llama(), token_ids(120)
    artifact, path = tiny_artifact(model, PLANNED), tmp_path / "clusters.st"
    save_artifact(artifact, path)
    expected = capture(model, ids, block_size=16, rows=(2,))
    loaded = load_artifact(path)
    for dtype, device in DEFAULTS:
        with defaults(dtype, device):
            found, again = capture(model, ids, block_size=16, rows=(2,)), load_artifact(path)
            save_artifact(again, tmp_path / "again.st")
        for name, maps in expected.tensors.items():
            assert torch.equal(found.tensors[name], maps)
        assert torch.equal(again.gamma, loaded.gamma)
        assert (tmp_path / "again.st").read_bytes() == path.read_bytes()


def test_every_tensor_is_made_with_its_dtype_and_device() -> None:
    package = Path(shareprefill.__file__).parent
    files = [
        file
        for name in CHECKED
        for file in ([package / name] if name.endswith(".py") else (package / name).rglob("*.py"))
    ]
    bare = [
        f"{file.relative_to(package)}:{call.lineno}: {ast.unparse(call)}"
        for file in files
        for call in ast.walk(ast.parse(file.read_text()))
        if isinstance(call, ast.Call) and _is_bare(call)
    ]
    assert len(files) > 50
    assert not bare


def _is_bare(call: ast.Call) -> bool:
    function = call.func
    if not (isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name)):
        return False
    named = {keyword.arg for keyword in call.keywords}
    if function.value.id != "torch" or function.attr not in FACTORIES or None in named:
        return False
    return not named >= ({"dtype", "device"} if function.attr in FLOATS else {"device"})
