"""What a user installs: built by the backend that pip calls, and used from an empty folder."""

from __future__ import annotations

import email
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

from shareprefill import __version__

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "shareprefill"
# The sdist's tests that a fresh environment runs here; CI runs all of them in one.
INSTALLED_TESTS = ("tests/test_files.py", "tests/calib/test_store.py", "tests/test_stability.py")


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the sdist."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    (built,) = dist.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def sources(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist, unpacked."""
    (built,) = dist.glob("*.tar.gz")
    folder = tmp_path_factory.mktemp("sdist")
    with tarfile.open(built) as archive:
        # Python before 3.11.4 has no filters, and does not know the keyword.
        archive.extraction_filter = getattr(tarfile, "data_filter", None)
        archive.extractall(folder)  # noqa: S202 (our own archive)
    return folder / f"shareprefill-{__version__}"


def package_files() -> set[str]:
    return {
        str(path.relative_to(ROOT))
        for path in PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    assert wheel.name == f"shareprefill-{__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        assert archive.testzip() is None
        names = set(archive.namelist())
    information = {name for name in names if ".dist-info/" in name}
    assert names - information == package_files()
    for asset in (
        "assets/sp-tiny/model.safetensors.index.json",
        "assets/sp-tiny/model-00001-of-00002.safetensors",
        "assets/sp-tiny/model-00002-of-00002.safetensors",
        "assets/sp-tiny/config.json",
        "assets/sp-tiny/tokenizer.json",
        "assets/text/python-docs.txt.gz",
        "assets/text/LICENSE.txt",
        "py.typed",
    ):
        assert f"shareprefill/{asset}" in names
    licences = {name.split("/licenses/")[1] for name in information if "/licenses/" in name}
    assert licences == {"LICENSE", "THIRD_PARTY.md"}


def test_the_metadata_of_the_wheel(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (path,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        metadata = email.message_from_bytes(archive.read(path))
        (path,) = (name for name in archive.namelist() if name.endswith("/entry_points.txt"))
        assert "sp = shareprefill.cli:main" in archive.read(path).decode()
    assert metadata["Version"] == __version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    assert any(name.startswith("torch>=") for name in metadata.get_all("Requires-Dist") or [])


def test_the_sdist_holds_what_building_and_testing_need(sources: Path) -> None:
    found = {str(path.relative_to(sources)) for path in sources.rglob("*") if path.is_file()}
    top = {name.split("/")[0] for name in found}
    assert top == {
        *(".ci", ".github", ".gitignore", "artifacts", "benchmarks", "docs", "requirements"),
        "shareprefill",
        *("tests", "tools", "CHANGELOG.md", "CONTRIBUTING.md", "DESIGN.md", "LICENSE", "Makefile"),
        *("PKG-INFO", "README.md", "SECURITY.md", "THIRD_PARTY.md", "constraints.txt"),
        *("mkdocs.yml", "pyproject.toml"),
    }
    assert package_files() <= found
    there = (ROOT / "artifacts").iterdir()
    committed = {f"artifacts/{path.name}" for path in there if path.suffix in (".st", ".toml")}
    # Nothing of what commands leave in that folder.
    assert {name for name in found if name.startswith("artifacts/")} == committed
    assert not any("__pycache__" in name for name in found)
    for name in ("tests/conftest.py", "tools/fuzz_artifact.py", ".ci/run", "docs/stability.md"):
        assert name in found


def test_what_is_locked_is_what_is_pinned() -> None:
    """constraints.txt and requirements/ name the same versions, and all that is installed."""
    pinned = _versions(ROOT / "constraints.txt")
    locked = _versions(ROOT / "requirements" / "locked.txt")
    torch = _versions(ROOT / "requirements" / "locked-torch.txt")
    assert {name: version for name, version in locked.items() if name != "triton"} == {
        name: version for name, version in pinned.items() if name != "torch"
    }
    assert torch["torch"] == pinned["torch"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    wanted = [*project["project"]["dependencies"], *project["dependency-groups"]["dev"]]
    names = {_plain(requirement) for requirement in wanted}
    assert names <= {*locked, "torch"}
    for name in ("locked.txt", "locked-torch.txt"):
        text = (ROOT / "requirements" / name).read_text(encoding="utf-8")
        for block in text.replace("\\\n", " ").splitlines():
            assert block.startswith("#") or "--hash=sha256:" in block


def _versions(path: Path) -> dict[str, str]:
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if "==" in line and not line.startswith(("#", " ")):
            name, version = line.split("==")
            found[_plain(name)] = version.removesuffix("\\").strip()
    return found


def _plain(requirement: str) -> str:
    name = requirement
    for mark in "<>=!~[; ":
        name = name.split(mark)[0]
    return name.lower().replace("_", "-").replace(".", "-")


@pytest.mark.slow
def test_the_installed_package_passes_tests_without_the_checkout(
    wheel: Path, sources: Path, tmp_path: Path
) -> None:
    """The wheel in an environment of its own; the libraries are those of this one."""
    fresh, empty = tmp_path / "fresh", tmp_path / "empty"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(fresh)], check=True)
    python = fresh / "bin" / "python"
    (site,) = (fresh / "lib").glob("python*/site-packages")
    # As a plain path, so that this environment's own .pth files, which would add the checkout, are
    # not read.
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
    subprocess.run([*pip, "--no-deps", "--no-index", str(wheel)], check=True)
    shutil.copytree(sources, empty)
    shutil.rmtree(empty / "shareprefill")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}

    def run(*command: str) -> str:
        found = subprocess.run(
            [str(fresh / "bin" / command[0]), *command[1:]],
            cwd=empty,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert found.returncode == 0, found.stdout + found.stderr
        return found.stdout

    place = run("python", "-c", "import shareprefill; print(shareprefill.__file__)")
    assert Path(place.strip()) == site / "shareprefill" / "__init__.py"
    assert run("sp", "--version") == f"sp {__version__}\n"
    assert "calibrate" in run("sp", "--help")
    assert "sp-tiny" in run("sp", "doctor")
    tested = run("python", "-m", "pytest", "-q", "-p", "no:cacheprovider", *INSTALLED_TESTS)
    assert " passed" in tested
