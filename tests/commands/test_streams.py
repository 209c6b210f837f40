from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from shareprefill import cli

ARTIFACT = Path(__file__).parents[1] / "data" / "format-1.st"
# A command that prints as `sp run` prints an answer, and its last line, without a model.
SAY = """
from shareprefill import cli, console
from shareprefill.commands.streams import print_now
@cli.app.command()
def say(text: str) -> None:
    print_now(text)
    console.show_line(text)
cli.main()
"""
SP = f"{sys.executable} -m shareprefill.cli"


def shell(command: str, **options: object) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        ["bash", "-c", command],
        capture_output=True,
        check=False,
        **options,  # pyright: ignore[reportArgumentType,reportCallIssue]
    )


def expect_error(found: subprocess.CompletedProcess[bytes], message: str) -> None:
    assert found.returncode == 1
    text = found.stderr.decode()
    assert text.startswith("sp: ")
    assert message in text
    assert text.count("\n") == 1, text


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_an_answer_is_printed_whatever_the_encoding(encoding: str) -> None:
    text = "caf\xe9 \u2013 \u65e5 \U0001f600 end"
    found = subprocess.run(
        [sys.executable, "-c", SAY, "say", text],
        capture_output=True,
        check=False,
        env={**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"},
    )
    assert (found.returncode, found.stderr) == (0, b"")
    shown = text.encode(encoding, "backslashreplace")
    assert found.stdout == shown + shown + b"\n"


@pytest.mark.parametrize("text", ["\\ud800 half", "\\udc80"])
def test_halves_of_surrogate_pairs_are_printed(text: str) -> None:
    code = SAY.replace("(text)", f"('{text}')")
    found = subprocess.run(
        [sys.executable, "-c", code, "say", "-"], capture_output=True, check=True
    )
    assert text.encode() in found.stdout


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("command", ["--version", "--help", "cluster --help", "inspect {} --json"])
def test_a_full_standard_output(command: str) -> None:
    found = shell(f"{SP} {command.format(ARTIFACT)} >/dev/full")
    expect_error(found, "cannot write the output: No space left on device")


def test_closed_standard_output() -> None:
    expect_error(shell(f"{SP} --version >&-"), "standard output is closed")
    found = shell(f"{SP} --version >&- 2>&-")
    assert (found.returncode, found.stderr) == (1, b"")


def test_closed_standard_error() -> None:
    found = shell(f"{SP} run nothing.txt 2>&-")
    assert (found.returncode, found.stdout) == (1, b"")
    assert shell(f"{SP} --version 2>&-").stdout.startswith(b"sp ")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_standard_error_loses_what_is_said_there_and_no_more() -> None:
    code = (
        "import sys; from shareprefill import cli; sys.argv = ['sp', 'inspect', '{}', '--json']\n"
    )
    code += "from shareprefill import cli; cli.open_streams()\n"
    code += "print('a notice', file=sys.stderr); cli.main()"
    command = [sys.executable, "-c", code.format(ARTIFACT)]
    with open("/dev/full", "wb") as full:
        found = subprocess.run(command, stdout=subprocess.PIPE, stderr=full, check=False)
    assert found.returncode == 0
    assert found.stdout.rstrip().endswith(b"}")
    found = shell(f"{SP} inspect nothing.st 2>/dev/full")
    assert (found.returncode, found.stdout) == (1, b"")
    assert shell(f"{SP} inspect --nothing 2>/dev/full").returncode == 2


@pytest.mark.parametrize("option", ["--out=~/page.html", "--out ~nobody-here/page.html"])
def test_a_home_folder_is_found_and_none_is_made_of_its_sign(option: str, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "here").mkdir()
    found = subprocess.run(
        [sys.executable, "-m", "shareprefill.cli", "audit", str(ARTIFACT), *option.split()],
        capture_output=True,
        check=False,
        cwd=tmp_path / "here",
        env={**os.environ, "HOME": str(tmp_path / "home")},
    )
    assert list((tmp_path / "here").iterdir()) == []
    if "nobody" in option:
        expect_error(found, "~nobody-here/page.html: there is no such user; write ./~nobody-here")
    else:
        assert found.returncode == 0, found.stderr
        assert (tmp_path / "home" / "page.html").exists()


@pytest.mark.parametrize("reader", ["head -c 1", "true"])
def test_a_reader_that_has_gone(reader: str) -> None:
    found = shell(f"set -o pipefail; {SP} inspect {ARTIFACT} --json | {reader}")
    assert found.stderr == b""


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (r"printf 'words \xff' | {}", "standard input cannot be read as UTF-8 text"),
        (r"printf '\xed\xa0\x80' | {}", "standard input cannot be read as UTF-8 text"),
        ("{} <&-", "standard input is closed"),
    ],
)
def test_bad_standard_input(given: str, message: str) -> None:
    expect_error(shell(given.format(f"{SP} run -")), message)


def test_a_file_that_is_opened_never_gets_a_standard_number() -> None:
    code = (
        "import os; from contextlib import suppress; from shareprefill.errors import DataError\n"
        "from shareprefill.commands.streams import open_streams\n"
        "with suppress(DataError): open_streams()\n"
        "os.write(2 if os.open(os.devnull, os.O_RDONLY) > 2 else 3, b'fine')"
    )
    found = shell(f'{sys.executable} -c "$CODE" <&- >&-', env={**os.environ, "CODE": code})
    assert found.stderr == b"fine"


@pytest.mark.parametrize("path", ["~nobody/x", "y" * 5000, "folder"])
@pytest.mark.parametrize(
    "command",
    [
        "run {} --artifact {artifact}",
        "run prompt --artifact {artifact} --model {}",
        "inspect {}",
        "diff {artifact} {}",
        "train {}",
        "cluster {}",
        "calibrate --model {}",
        "calibrate --model sp-tiny --samples 3 --length 512 --data {}",
        "audit {artifact} --out {}",
        "doctor --model {}",
        "eval --artifact {artifact} --model sp-tiny --tasks ruler:{}",
        "eval --artifact {artifact} --model sp-tiny --markdown {}",
        "bench --artifact {}",
        "regenerate {}",
        "push {} some/where",
    ],
)
def test_paths_that_cannot_be(
    path: str,
    command: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("text")
    (tmp_path / "prompt").write_text("some words")
    arguments = [part.format(path, artifact=ARTIFACT) for part in command.split()]
    monkeypatch.setattr(sys, "argv", ["sp", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    error = capfd.readouterr().err
    assert end.value.code == 1
    assert error.startswith("sp: ")
    assert error.count("\n") == 1, error
    assert len(error) < 2100
