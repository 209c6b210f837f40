"""What pages print after a command is what that command prints.

Each command of a transcript is run on sp-tiny, at a small size, on a terminal of 80 columns. The
words that it prints are then compared with the page. What a run decides is left out: numbers and
their units, which model, data sets, policies and statuses are named, and verdicts that may go
either way. Rows of a table that differ in nothing else count once. `[...]` and a line of dots
stand for any words.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from shareprefill import cli, console
from shareprefill.config import DATA_SETS
from shareprefill.policy_names import POLICIES, listed_policies
from shareprefill.regeneration import pipeline
from shareprefill.regeneration.outcomes import Change, Outcome
from tests.test_documented import ROOT, blocks
from tests.test_guides import blocks_of
from tools import demo

PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
# The record of what was measured keeps the words of its time.
OLD = {"findings-record.md"}
ARTIFACT = ROOT / "artifacts" / "sp-tiny.st"
# They stand in for what a page says.
SMALL = {
    "--model": "sp-tiny",
    "--samples": "3",
    "--length": "256",
    "--lengths": "320",
    "--tasks": "retr_passkey",
    "--max-new-tokens": "2",
}
MORE = {
    "calibrate": ["--block-size", "32"],
    "eval": ["--samples", "1"],
    "run": ["--artifact", str(ARTIFACT), "--model", "sp-tiny", "--min-tokens", "0"],
}
CALIBRATE = "sp calibrate --model MODEL --data mixture --samples 8 --length 4096 --effect-tokens 0"
NEEDS = {"cluster": CALIBRATE, "diff": "sp cluster"}
NAMES = {
    "MODEL": ("MODEL", "SmolLM2-135M", "smollm2", "sp-tiny"),
    "DATA": DATA_SETS,
    "POLICY": (*POLICIES, "pivot", "share", r"strided:Strided:stride=\d+"),
    "STATUS": ("equal", "unchanged", "updated", "drifted", "missing"),
    # Either is right after a run of one size.
    "as promised": ("less than promised",),
    "beats": ("does not beat",),
    "thin": ("enough",),
    "right": ("WRONG",),
}
PLAIN: tuple[tuple[str, str], ...] = (
    (r"─+", " "),
    (r", dense attention is faster here", ""),
    (r"Warning: there is little to gain: [^:]*longer\s+prompts", ""),
    (r"artifacts/[\w-]+/calibration", "artifacts/MODEL/calibration"),
    *((rf"(?<![\w./-])(?:{'|'.join(n)})(?![\w/-])", stand_in) for stand_in, n in NAMES.items()),
    (r"[-+−]?\d[\d.,]*(?:e[-+]?\d+)?(?<![.,])%?", "#"),
    (r"(?<=\s)[-–](?=\s)", "#"),
    (r"\s+", " "),
    (r"# (?:min|h)\b", "# s"),
    (r"# GB\b|under # MB\b", "# MB"),
    (r"prompts\b", "prompt"),
    (r"POLICY, \w+ #", "POLICY"),
    (r"# \[#, #\]", "#"),
    (r"# (?:to|of|->|>) #|#(?: #)* \*(?= #)", "#"),
    (r"POLICY > POLICY", "POLICY"),
    (r"DATA(?:, DATA)+", "DATA"),
    (r"'POLICY': #(?:, 'POLICY': #)+", "'POLICY': #"),
    (r"# POLICY(?:, # POLICY)+", "# POLICY"),
    # Rows of a table.
    (r"((?:# )?POLICY (?:# )+)\1+", r"\1"),
    (r"((?:MODEL STATUS )(?:# )+)\1+", r"\1"),
    (r"(?:# ){2,}", "# # "),
)


def plain(text: str) -> str:
    """The words of a text, without what a run decides."""
    text = f" {text} "
    for pattern, stand_in in PLAIN:
        text = re.sub(pattern, stand_in, text)
    return text.strip()


def require_printed(said: str, printed: str) -> None:
    """Every piece of what a page says stands in what was printed, in order."""
    rest = f" {plain(printed)} "
    for piece in re.split(r"\[\.\.\.\]|(?m:^\.\.\.$)", said):
        if words := plain(piece):
            _, found, rest = rest.partition(f" {words} ")
            assert found, f"\nsaid:    {words}\nprinted: {plain(printed)}"
            rest = f" {rest}"


class Terminal:
    """Runs commands in a folder, each only once."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self._known: dict[str, str] = {}
        patch.chdir(folder)
        patch.syspath_prepend(folder)
        # Nearly 80: a small run has shorter figures, and so room for more columns.
        patch.setattr(console, "_width", lambda: 78)
        # In processes of its own for every model: tests/commands/test_regenerate.py.
        patch.setattr(pipeline, "regenerate", regenerate)
        (folder / "artifacts" / "regenerated" / "sp-tiny").mkdir(parents=True)
        for name in ("sp-tiny.st", "artifacts/sp-tiny.st"):
            (folder / name).symlink_to(ARTIFACT)
        for name in ("prompt.txt", "report.txt"):
            (folder / name).write_text("A line of text that is read. " * 90)
        (folder / "artifacts/regenerated/sp-tiny/artifact.st").symlink_to(folder / "clusters.st")
        (folder / "strided.py").write_text(blocks_of("add-a-policy.md")[0])

    def __call__(self, call: str) -> str:
        """What a command prints, run small."""
        words = smaller(shlex.split(call, comments=True)[1:])
        if words[0] in NEEDS:
            self(NEEDS[words[0]])
        if (name := shlex.join(words)) not in self._known:
            result = CliRunner().invoke(cli.app, words)
            assert result.exit_code in (0, 1), result.output
            assert result.exception is None or isinstance(result.exception, SystemExit), result
            # What reads JSON reads no notes of how far slow work is.
            self._known[name] = result.stdout if "--json" in words else result.output
        return self._known[name]


def regenerate(*_: Any, update: bool, **__: Any) -> list[Outcome]:
    """What came of a model."""
    if update:
        lines = ("sp-tiny.st is missing",)
        return [Outcome(name="sp-tiny", status="updated", artifact="sp-tiny.st", lines=lines)]
    figures = ("accuracy", "density", "recall", "expected density", "expected recall")
    changes = [Change(name=name, before=1.0, after=1.0, tolerance=0.01) for name in figures]
    lines = (
        *(change.describe() for change in changes[3:]),
        "setting configuration.cluster.target_recall 0.95 -> 0.8",
    )
    return [
        Outcome(
            name="sp-tiny",
            status="drifted",
            artifact="sp-tiny.st",
            lines=lines,
            changes=tuple(changes),
            moved=35,
            heads=48,
        )
    ]


def smaller(words: list[str]) -> list[str]:
    """A command with small sizes, of sp-tiny; of several gammas the last, of policies the ends."""
    while words.count("--gamma") > 1:
        place = words.index("--gamma")
        del words[place : place + 2]
    for place, word in enumerate(words):
        if word == "--policies":
            first, *_, last = listed_policies(words[place + 1])
            words[place + 1] = f"{first},{last}"
        elif word in SMALL:
            words[place + 1] = SMALL[word]
    return [*words, *MORE.get(words[0], [])]


@pytest.fixture(scope="module")
def terminal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Terminal]:
    with pytest.MonkeyPatch.context() as patch:
        yield Terminal(tmp_path_factory.mktemp("printed"), patch)


def transcripts(page: Path) -> list[tuple[str, str]]:
    """Commands of a page, and what it says that they print."""
    return [
        (call, output)
        for kind, text in blocks(page)
        if kind in ("console", "text")
        for call, output in re.findall(r"(?m)^\$ (sp .*)\n((?:(?!\$ ).*\n?)*)", text)
        if output.strip()
    ]


FOUND = [
    pytest.param(call, output, id=f"{page.relative_to(ROOT)}: {call[:60]}")
    for page in PAGES
    if page.name not in OLD
    for call, output in transcripts(page)
]


@pytest.mark.parametrize(("call", "said"), FOUND)
def test_a_command_prints_what_the_page_says(terminal: Terminal, call: str, said: str) -> None:
    require_printed(said, terminal(call))


def test_the_demo_ends_as_readme_says(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without its calibration: with the artifact that comes with the sources."""

    def sp(*words: str, show: bool = True) -> str:
        return terminal(f"sp {shlex.join(words)}") if words[0] == "run" else ""

    monkeypatch.setattr(demo, "sp", sp)
    monkeypatch.setattr(demo, "LENGTH", 640)
    demo.main()
    (said,) = (text for _, text in blocks(ROOT / "README.md") if "the demo took" in text)
    require_printed(said, capsys.readouterr().out)


TABLE = "heads by policy\npolicy  heads  recall\n──────\ndense  14  1.000\nshare  4  .9\n"


@pytest.mark.parametrize(
    ("said", "is_true"),
    [
        ("policy    heads  recall\npivot  3  0.97", True),
        ("heads by policy\n[...]\nshare  4  1.0", True),
        ("heads by policy\n...\nshare  4  1.0", True),
        ("policy    heads  density\npivot  3  0.97", False),
        ("policy    heads  recall\npivot  three  0.97", False),
        ("policy  heads  recall\n[...]\nheads by policy", False),
        ("by policy policy heads recall and more", False),
    ],
)
def test_words_count_and_figures_do_not(said: str, is_true: bool) -> None:
    if is_true:
        require_printed(said, TABLE)
    else:
        with pytest.raises(AssertionError, match="said:"):
            require_printed(said, TABLE)
