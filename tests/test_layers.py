"""The order of the stages: a module may use an earlier stage, never a later one."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "shareprefill"

# What each part may import of the package, besides itself and the parts named at "common".
COMMON = {
    "errors",
    "config",
    "files",
    "safetensors_reader",
    "models",
    "artifact",
    "__init__",
    "tokens",
    "weights",
    "checkpoint",
    "policy_names",
    "plain_tables",
    "version",
    "processes",
}
EVERY_STAGE = {
    *("runtime", "calib", "autoencoder", "clustering", "evaluation"),
    *("data", "doctor", "report", "audit", "regeneration", "bench", "hub"),
}
ALLOWED = {
    "runtime": set(),
    "data": set(),
    "calib": {"data", "runtime"},
    "autoencoder": {"calib", "runtime"},
    "clustering": {"autoencoder", "calib", "runtime"},
    "library": {"evaluation", "clustering", "autoencoder", "calib", "runtime"},
    "policies": {"runtime"},
    "testing": {"runtime"},
    "doctor": {"runtime"},
    "evaluation": {"clustering", "autoencoder", "calib", "data", "runtime", "report"},
    "report": set(),
    "audit": {"clustering", "autoencoder", "calib", "runtime", "report"},
    "regeneration": {"evaluation", "clustering", "autoencoder", "calib", "runtime", "report"},
    "bench": {"calib", "runtime", "report", "vllm"},
    "hub": {"runtime"},
    "vllm": {"runtime"},
    "console": EVERY_STAGE,
    "commands": EVERY_STAGE | {"console"},
    "__main__": {"cli"},
    "cli": EVERY_STAGE | {"console", "commands"},
}
OFFLINE_LIBRARIES = {"sklearn", "scipy", "datasets"}
FILES = sorted(PACKAGE.rglob("*.py"))


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            found.add(node.module or "")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_module_uses_a_later_stage(path: Path) -> None:
    part = part_of(path)
    used = {name.split(".")[1] for name in imports_of(path) if name.startswith("shareprefill.")}
    allowed = COMMON | {part}
    if part == "__init__":
        allowed |= {"runtime", "library", "policies", "testing"}
    elif part not in COMMON:
        allowed |= ALLOWED[part]
    assert used <= allowed


@pytest.mark.parametrize(
    "path", [p for p in FILES if part_of(p) == "runtime"], ids=lambda p: str(p.relative_to(PACKAGE))
)
def test_the_runtime_needs_no_offline_library(path: Path) -> None:
    assert not {name.split(".")[0] for name in imports_of(path)} & OFFLINE_LIBRARIES


@pytest.mark.parametrize("name", ["__init__", "options", "rows", "pages", "core"])
def test_what_the_vllm_adapter_does_on_plain_tensors_needs_no_vllm(name: str) -> None:
    """At import: `register` imports it when vLLM calls it."""
    tree = ast.parse((PACKAGE / "vllm" / f"{name}.py").read_text())
    outer = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = {getattr(node, "module", None) or node.names[0].name for node in outer}
    assert not [n for n in names if n.split(".")[0] in ("vllm", "transformers")]


@pytest.mark.parametrize(
    "path",
    [p for p in FILES if p.relative_to(PACKAGE).parts[:2] == ("runtime", "ops")],
    ids=lambda p: str(p.relative_to(PACKAGE)),
)
def test_operators_are_a_leaf(path: Path) -> None:
    ours = {n for n in imports_of(path) if n.startswith("shareprefill.")}
    assert all(n.startswith(("shareprefill.runtime.ops", "shareprefill.errors")) for n in ours)


def module_of(path: Path) -> str:
    parts = ("shareprefill", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts).removesuffix(".__init__")


def import_graph() -> dict[str, set[str]]:
    """Module -> the modules of the package that it names in any import, also in functions."""
    names = {module_of(path) for path in FILES}
    graph: dict[str, set[str]] = {}
    for path in FILES:
        used = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                used |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                # `from package import module` uses the module, not the package.
                members = {f"{node.module}.{alias.name}" for alias in node.names}
                used |= {node.module or ""} if members - names else members
                used |= members
        graph[module_of(path)] = (used & names) - {module_of(path)}
    return graph


# The runtime's files in order: each may use its own group and those above it.
RUNTIME_ORDER = (
    {"ops"},
    {"geometry", "dense", "crossover", "tensor_parallel"},
    {"policies"},
    {"plan"},
    {"rules"},
    {"records"},
    {"repeats"},
    {"core", "report"},
)
ENGINES = {"transformers", "vllm"}


def test_the_files_of_the_core_are_in_order() -> None:
    rank = {name: place for place, names in enumerate(RUNTIME_ORDER) for name in names}
    for module, used in import_graph().items():
        part = module.removeprefix("shareprefill.runtime.").split(".")[0]
        if not module.startswith("shareprefill.runtime.") or part not in rank:
            continue
        ours = {n.split(".")[2] for n in used if n.startswith("shareprefill.runtime.")}
        assert all(rank.get(n, len(rank)) <= rank[part] for n in ours), (module, ours)


def test_the_core_knows_no_engine() -> None:
    """Neither imported by any of its files, nor there once it is imported."""
    # The artifact takes two dataclasses from `models`, which loads transformers inside functions.
    graph, found, paths = import_graph(), set(), {module_of(path): path for path in FILES}
    todo = ["shareprefill.runtime.core", "shareprefill.runtime.tensor_parallel"]
    while todo:
        module = todo.pop()
        if module in found or module.startswith("shareprefill.models"):
            continue
        found.add(module)
        todo += graph[module]
    assert len(found) > 30
    for module in found:
        assert not {n.split(".")[0] for n in imports_of(paths[module])} & ENGINES, module
        if module.startswith("shareprefill.runtime."):
            assert "nn.Module" not in paths[module].read_text(encoding="utf-8"), module
    code = "import shareprefill.runtime.core, sys; print({*sys.modules} & {'transformers', 'vllm'})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"


def test_no_imports_form_a_circle() -> None:
    """A file can be read after the files that it uses."""
    try:
        TopologicalSorter(import_graph()).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


@pytest.mark.parametrize(
    ("code", "banned"),
    [
        ("import shareprefill", "torch transformers rich"),
        ("import shareprefill.config, shareprefill.errors", "torch transformers rich"),
        ("import shareprefill.cli", "torch transformers sklearn scipy datasets"),
        ("import shareprefill.runtime.session", "sklearn scipy datasets triton"),
    ],
)
def test_imports_are_cheap(code: str, banned: str) -> None:
    check = f"{code}; import sys; print([m for m in {banned.split()} if m in sys.modules])"
    found = subprocess.run(
        [sys.executable, "-c", check], capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "[]"
