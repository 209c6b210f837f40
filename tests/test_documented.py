"""What README and docs print is true of the program: commands, options, output, code, links.

Transcripts (blocks marked `console`) are run where they are cheap, and what they print is compared,
but for numbers. The other lines that call `sp` are parsed by the real command line; Python is
compiled, and what it imports is looked up.
"""

from __future__ import annotations

import ast
import importlib
import re
import shlex
import subprocess
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from shareprefill import cli
from shareprefill.errors import ShareprefillError
from shareprefill.runtime import crossover

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
SP: Any = typer.main.get_command(cli.app)
USAGE_ERROR = typer.BadParameter.__mro__[1]
# They load no model.
CHEAP = {"--version", "doctor", "inspect", "diff", "--help"}
# The record of what was measured keeps the commands of its time.
OLD = {"CHANGELOG.md", "findings-record.md"}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(page: Path) -> Iterator[tuple[str, str]]:
    """Kind and text of every code block, fenced or indented."""
    text = page.read_text(encoding="utf-8")
    for indent, kind, block in re.findall(r"(?ms)^( *)```(\w*)[^\n]*\n(.*?)^ *```", text):
        yield kind, textwrap.dedent(block) if indent else block
    rest = re.sub(r"(?ms)^ *```.*?^ *```", "", text)
    for block in re.findall(r"(?m)(?:^    .*\n?)+", rest):
        yield "", textwrap.dedent(block)


def calls(text: str) -> list[list[str]]:
    """The words after `sp` of every line that calls it, continued lines joined."""
    found = []
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        match = re.match(
            r"(?:\$ )?(?:\w+=\S+ )*(?:\S*bin/)?(?:sp|.*-m shareprefill(?:\.cli)?) (.*)", line
        )
        if match is not None:
            words = shlex.split(re.sub(r" (?:[|&]|[<>] ).*", "", match[1]), comments=True)
            found.append([word for word in words if word not in ("[", "]")])
    return found


def written(page: Path) -> list[list[str]]:
    found = []
    for kind, text in blocks(page):
        if kind == "console":
            # The other lines are what was printed.
            text = "\n".join(re.findall(r"(?m)^\$ .*", text))
        found += [] if kind == "python" else calls(text)
    return found


def parse(words: list[str]) -> None:
    """Reads a command line as `sp` does, without running it."""
    if words[0] in ("--help", "--version", "--install-completion", "-h"):
        return
    command = SP.commands.get(words[0])
    assert command is not None, f"there is no command sp {words[0]}"
    try:
        command.make_context(f"sp {words[0]}", [*words[1:]])
    except typer.Exit:
        pass
    except (USAGE_ERROR, ShareprefillError) as error:
        pytest.fail(f"sp {shlex.join(words)}: {error}")


CALLS = [
    pytest.param(call, id=f"{name_of(page)}: sp {shlex.join(call)[:60]}")
    for page in PAGES
    if page.name not in OLD
    for call in written(page)
]


@pytest.mark.parametrize("words", CALLS)
def test_every_command_is_one_that_sp_takes(words: list[str]) -> None:
    parse(words)


@pytest.mark.parametrize("page", [p for p in PAGES if p.name not in OLD], ids=name_of)
def test_options_named_in_sentences_are_those_of_the_command(page: Path) -> None:
    text = re.sub(r"(?ms)^ *```.*?^ *```", "", page.read_text(encoding="utf-8"))
    for span in re.findall(r"`sp ([a-z]+[^`]*)`", text):
        name, *words = span.split()
        command = SP.commands.get(name)
        assert command is not None, f"there is no command sp {name}"
        options = {o for p in command.params for o in (*p.opts, *p.secondary_opts)} | {"--help"}
        used = {word.split("=")[0] for word in words if word.startswith("--")}
        assert used <= options, f"sp {name} has no {used - options}"


TRANSCRIPTS = [
    pytest.param(call, output, id=f"{name_of(page)}: {call[:60]}")
    for page in PAGES
    for kind, text in blocks(page)
    if kind == "console"
    for call, output in re.findall(r"(?m)^\$ (sp .*)\n((?:(?!\$ ).*\n?)*)", text)
    if call.split()[1] in CHEAP
]


@pytest.mark.parametrize(("call", "output"), TRANSCRIPTS)
def test_transcripts_print_what_they_say(
    call: str, output: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Line by line, a line of dots stands for any; numbers are left out but of committed files."""
    cleaned = without_blanks if "artifacts/" in call else without_numbers
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("COLUMNS", "80")
    result = CliRunner().invoke(cli.app, shlex.split(call)[1:])
    assert result.exit_code == 0, result.output
    lines = [cleaned(line) for line in output.rstrip().splitlines()]
    pattern = "\n".join(r"(?:.*\n?)*?" if line == "..." else re.escape(line) for line in lines)
    printed = "\n".join(cleaned(line) for line in result.output.rstrip().splitlines())
    assert re.search(rf"(?m)^{pattern}", printed), printed


def without_blanks(line: str) -> str:
    return " ".join(line.split())


def without_numbers(line: str) -> str:
    return re.sub(r"[\d.]*\d", "#", without_blanks(line))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_python_in_pages_compiles_and_imports_what_is_there(page: Path) -> None:
    for kind, text in blocks(page):
        if kind != "python":
            continue
        for node in ast.walk(ast.parse(text)):
            module = getattr(node, "module", None) or ""
            if isinstance(node, ast.ImportFrom) and module.split(".")[0] == "shareprefill":
                found = importlib.import_module(module)
                for alias in node.names:
                    assert hasattr(found, alias.name), f"{module} has no {alias.name}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"(?ms)^ *```.*?^ *```|`[^`\n]*`", "", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\((?!https?:|mailto:|#)([^)#\s]+)", text):
        assert (page.parent / target).exists(), f"{name_of(page)} leads to {target}"


@pytest.mark.parametrize("page", ["README.md", "docs/index.md", "docs/stages/run.md"])
def test_lengths_from_which_on_sharing_pays_are_those_of_the_package(page: str) -> None:
    text = " ".join((ROOT / page).read_text(encoding="utf-8").split())
    session, engine = crossover._GPUS[9][crossover.SDPA], crossover._GPUS[9][None]
    assert f"{crossover._CPU.tokens // 1024}K tokens on a CPU" in text
    assert f"{session.tokens // 1024}K on a GPU" in text
    assert f"{engine.tokens // 1024}K in vLLM" in text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("sp run a.txt  # a comment", [["run", "a.txt"]]),
        (
            "$ sp eval --tasks a,b \\\n    --lengths 8K > out",
            [["eval", "--tasks", "a,b", "--lengths", "8K"]],
        ),
        ("A=1 .venv/bin/sp inspect x.st", [["inspect", "x.st"]]),
        ("torchrun -n 8 -m shareprefill.cli calibrate --model m", [["calibrate", "--model", "m"]]),
        ("the word sp and what follows", []),
    ],
)
def test_calls_are_found(text: str, words: list[list[str]]) -> None:
    assert calls(text) == words


@pytest.mark.parametrize(
    "words", [["fly"], ["run", "a.txt", "--wings"], ["run"], ["run", "a", "--gamma", "much"]]
)
def test_a_wrong_command_is_found(words: list[str]) -> None:
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        parse(words)


def git(*arguments: str) -> str | None:
    """What git prints; None where it fails."""
    run = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return run.stdout.strip() if run.returncode == 0 else None


def test_commits_that_gave_figures_are_in_the_repository() -> None:
    """All but those beside which `not kept` stands."""
    if git("rev-parse", "--is-shallow-repository") != "false":
        pytest.skip("needs the whole history")
    history = set((git("log", "--format=%h", "--abbrev=7") or "").split())
    found = 0
    for page in PAGES:
        # Of a letter and a digit: no word and no number.
        pattern = r"\b(?=[0-9a-f]*[a-f])(?=[0-9a-f]*[0-9])[0-9a-f]{7}\b(?![^(]{0,3}\(?not kept)"
        for commit in re.findall(pattern, " ".join(page.read_text(encoding="utf-8").split())):
            found += 1
            assert commit in history, f"{name_of(page)} has a figure of {commit}, which is not kept"
    assert found > 100
