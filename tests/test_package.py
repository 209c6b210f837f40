"""What a user installs: built by the backend that pip calls, and read from an empty folder."""

from __future__ import annotations

import email
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "shareprefill"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (built,) = folder.iterdir()
    return built


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        assert archive.testzip() is None
        names = set(archive.namelist())
    sources = {
        str(path.relative_to(ROOT))
        for path in PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    information = {name for name in names if ".dist-info/" in name}
    assert names - information == sources
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
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    assert any(name.startswith("torch>=") for name in metadata.get_all("Requires-Dist") or [])


def test_the_installed_package_works_without_the_checkout(wheel: Path, tmp_path: Path) -> None:
    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    check = (
        "import shareprefill; from shareprefill.models import load_tokenizer; "
        "from shareprefill.calib.tasks import generate; "
        "tokenizer = load_tokenizer('sp-tiny'); "
        "generate('needle', tokenizer, 512, 0); print(shareprefill.__file__)"
    )
    found = subprocess.run(
        [sys.executable, "-c", check],
        cwd=empty,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(found.stdout.strip()) == site / "shareprefill" / "__init__.py"
