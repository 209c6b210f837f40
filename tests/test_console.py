"""Tables of every command that prints some: at 60, 80 and 140 columns, and piped."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.cells import cell_len

from shareprefill import console
from shareprefill.artifact import Policy, load_artifact
from shareprefill.autoencoder.losses import Losses
from shareprefill.bench.measure import BenchResult, BenchRow
from shareprefill.clustering.comparison import MovedHead, compare_artifacts
from shareprefill.clustering.pipeline import Clustering
from shareprefill.commands import (
    bench,
    cluster,
    diff,
    doctor,
    evaluate,
    inspect,
    regenerate,
    run,
    sweep,
    train,
)
from shareprefill.doctor import Check
from shareprefill.evaluation.config import SweepConfig
from shareprefill.evaluation.statistics import Estimate
from shareprefill.evaluation.sweep import Curve, Sweep
from shareprefill.regeneration.outcomes import Change, Outcome
from shareprefill.runtime.crossover import LayerSizes
from tests.support.evaluations import dense_cell, made_cell, made_evaluation, perplexity_cells

Terminal = Callable[[int | None], None]
ANSI = re.compile(r"\x1b\[[\d;]*m")
ARTIFACT = Path(__file__).parent / "data" / "format-1.st"
LONG_POLICY = "vertical-slash, gamma 0.9"


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Makes standard output a terminal of so many columns, or none."""

    def make(width: int | None) -> None:
        monkeypatch.setattr(sys.stdout, "isatty", lambda: width is not None)
        monkeypatch.setenv("COLUMNS", str(width or 40))

    return make


def test_a_column_of_texts_begins_at_the_left(
    terminal: Terminal, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal(40)
    heads = " ".join(f"{number}.{number}" for number in range(1, 20))
    console.show_table("t", ("cluster", "heads"), [("1", heads), ("2", "3.4")], prose=("heads",))
    rows = [line for line in ANSI.sub("", capsys.readouterr().out).splitlines() if "." in line]
    assert len(rows) > 2
    assert all(re.match(r".{9}\d", row) for row in rows), rows


def training() -> None:
    losses = Losses(
        autoencoder=0.01, start=0.02, pca=0.03, pca_linear=0.04, mean=0.05, head_mean=0.06
    )
    split = SimpleNamespace(train=[0, 1], held_out=[2])
    found = SimpleNamespace(
        config=SimpleNamespace(code_size=64), split=split, losses=losses, epochs=7
    )
    train.show_training(Path("artifacts/model/calibration"), found)  # type: ignore[arg-type]


def clusterings() -> None:
    sizes = {"cost": 0.2, "recall": 0.95, "harm": 0.01, "sharing": 300, "objective": 0.2}
    cluster.show_clusterings(
        [Clustering(k=k, silhouette=k / 1000, is_best=k == 9, **sizes) for k in (2, 9, 1000)]  # type: ignore[arg-type]
    )


def inspected() -> None:
    inspect.summarize(load_artifact(ARTIFACT), Path("clusters.st"))


def inspected_with_many_pivots() -> None:
    artifact = load_artifact(ARTIFACT)
    policy = torch.full((60, 32), int(Policy.PIVOT), dtype=artifact.policy.dtype)
    policy[0, 0] = Policy.SHARE
    same = {name: torch.zeros(60, 32) for name in ("recall", "density", "cluster")}
    geometry = replace(artifact.fingerprint.geometry, layers=60, heads=32)
    made_for = replace(artifact.fingerprint, geometry=geometry)
    changed = replace(artifact, **same, policy=policy, fingerprint=made_for)
    inspect.summarize(changed, Path("clusters.st"))


def compared() -> None:
    before = load_artifact(ARTIFACT)
    data = ["retr_kv", "hub:organisation/a-data-set-of-a-long-name:configuration:train"] * 3
    configuration = {**before.configuration, "calibrate": {"data": data}}
    found = compare_artifacts(before, replace(before, configuration=configuration))
    head = MovedHead("31.31", ("vertical-slash", "global-threshold"), (None, "31.30"), (0, 127))
    diff.show_comparison(replace(found, moved=(head,) * 24))


def checked() -> None:
    doctor.show_checks(
        [
            Check("attention: blockwise", "works", "plain torch; for CPUs and for checks " * 4),
            Check("layers 0, 2, 4, 6", "window, dense", "sliding window of 24"),
            Check("model", "unsupported", "computes attention by itself"),
        ]
    )


def evaluated() -> None:
    cells = [dense_cell(), *perplexity_cells()]
    for policy in ("auto", "vertical-slash"):
        for gamma, recall in ((0.8, 0.93), (0.9, 0.97)):
            own = {"settings": {"gamma": gamma}, "policy": policy, "recall": Estimate(recall)}
            cells.append(made_cell(**own, density=Estimate(gamma - 0.6), kl=Estimate(0.0123)))
            cells.append(made_cell(**own, task="variable_tracking"))
    evaluate.show_evaluation(made_evaluation(cells))


def swept() -> None:
    evaluation = made_evaluation([dense_cell(), *perplexity_cells(), made_cell()])
    dense, *points = evaluation.summaries()
    names = ("perplexity_change against ttft_s", "recall against effective_density")
    curve = Curve("slack", (0.02, 0.04), (points[0], points[0]), dict.fromkeys(names, 0.04))
    config = SweepConfig(artifact="clusters.st", slacks=(0.02, 0.04))
    sweep.show_sweep(Sweep(config, {}, dense, (curve,), ()))


def benched() -> None:
    rows = tuple(
        BenchRow(tokens, kind, chunk, tokens / 1000, 79.5, 0.105, 0.0123, (), tokens / 900)
        for tokens, chunk in ((8192, 0), (1048576, 131072))
        for kind in ("dense", "share")
    )
    notes = ("random weights: the patterns are made up, and what is timed is their cost alone",)
    bench.show_bench(
        BenchResult(
            "llama-3.1-8b, 32 layers",
            "NVIDIA H200",
            "bfloat16",
            LayerSizes(32, 128),
            2.4,
            notes,
            rows,
        )
    )


def regenerated() -> None:
    changes = tuple(
        Change(name=name, before=0.95, after=0.9, tolerance=0.02)
        for name in ("accuracy", "density", "recall")
    )
    regenerate.show_outcomes(
        [
            Outcome(
                name=name,
                status="drifted",
                artifact="a.st",
                lines=(changes[0].describe(),),
                changes=changes,
                moved=100,
                heads=1024,
                seconds=12345.6,
            )
            for name in ("llama-3.1-8b-instruct", "small")
        ]
    )


# What is printed, and names and values that are whole in it at every width.
def did_otherwise() -> None:
    why = "check failed: 0.521 of its sampled attention lies in the pivot's pattern, 0.851 needed"
    row = {"planned": "share", "taken": "vertical-slash", "heads": 300, "why": why}
    run._show_otherwise([row, {**row, "taken": "dense"}])


TABLES: dict[Callable[[], None], tuple[str, ...]] = {
    training: ("PCA-64, rows normalised", "mean map of each head", "0.01000"),
    clusterings: ("1000", "9 *", "sharing heads", "0.2000"),
    inspected: ("vertical-slash", "policy", "density"),
    inspected_with_many_pivots: ("59.31", "pivots", "sharing"),
    compared: (
        "configuration.calibrate.data",
        "hub:organisation/a-data-set-of-a-long-name",
        "31.31",
    ),
    checked: ("attention: blockwise", "window, dense", "unsupported"),
    evaluated: (LONG_POLICY, "variable_tracking", "effective", "0.750 [0.300, 0.950]"),
    swept: ("slack", "0.02", "recall against effective density", "effective"),
    benched: ("1048576", "share", "first token, s", "1048.576", "speed-up"),
    did_otherwise: ("vertical-slash", "planned", "300", "heads"),
    regenerated: ("llama-3.1-8b-instruct", "drifted", "accuracy"),
}


@pytest.fixture(params=list(TABLES), ids=lambda show: show.__name__)
def show(request: pytest.FixtureRequest) -> Callable[[], None]:
    return request.param


@pytest.mark.parametrize("width", [60, 80, 140])
def test_tables_fit_a_terminal_and_break_no_name(
    show: Callable[[], None], width: int, terminal: Terminal, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal(width)
    show()
    text = ANSI.sub("", capsys.readouterr().out)
    # A single word may be wider than a terminal: it is whole all the same.
    for line in text.splitlines():
        assert cell_len(line.rstrip()) <= width or len(line.split()) == 1, line
    for name in TABLES[show]:
        assert name in text
    assert "…" not in text
    assert "..." not in text


def test_piped_tables_hold_all_whatever_the_terminal(
    show: Callable[[], None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = set()
    for columns, force in (("40", "1"), ("200", ""), ("80", "")):
        monkeypatch.setenv("COLUMNS", columns)
        monkeypatch.setenv("FORCE_COLOR", force)
        show()
        found.add(ANSI.sub("", capsys.readouterr().out))
    (text,) = found
    assert "not shown" not in text
    for name in TABLES[show]:
        assert name in text


def test_columns_go_in_their_order_and_are_named(
    terminal: Terminal, capsys: pytest.CaptureFixture[str]
) -> None:
    columns, rows = ("name", "first", "second", "third"), [("a" * 10, "b" * 10, "1" * 10, "c" * 10)]
    seen = {}
    for width in (46, 45, 34, 33, 22, 21):
        terminal(width)
        console.show_table("t", columns, rows, less_important=("third", "missing", "first"))
        seen[width] = ANSI.sub("", capsys.readouterr().out)
    assert "not shown" not in seen[46]
    for width in (45, 34):
        assert "ccc" not in seen[width]
        assert "width: third" in seen[width]
    for width in (33, 22):
        assert "bbb" not in seen[width]
        assert "first; third" in " ".join(seen[width].split())
    assert seen[21].splitlines()[1:5] == [
        f"name: {'a' * 10}",
        f"  first: {'b' * 10}",
        f"  second: {'1' * 10}",
        f"  third: {'c' * 10}",
    ]


def test_wide_characters_markup_and_control_characters(
    terminal: Terminal, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal(80)
    wide = "日本語" * 5
    console.show_table("[b]t[/b]", ("[i]", "n"), [(wide, "1"), ("\x1b[31m[red]:smile:", "2")])
    text = ANSI.sub("", capsys.readouterr().out)
    for word in ("[b]t[/b]", "[i]", wide, r"\x1b[31m[red]:smile:"):
        assert word in text
    ends = {cell_len(line.rstrip()) for line in text.splitlines()[3:5]}
    assert len(ends) == 1


def test_work_without_a_terminal_is_told_in_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "_LINES_EVERY_S", 0.02)
    # However slow the machine is.
    monkeypatch.setattr(console.time, "monotonic", lambda: 0.0)
    told = ""

    def wait_for(line: str) -> None:
        nonlocal told
        end = time.perf_counter() + 30
        while f"{line}\n" not in told and time.perf_counter() < end:
            time.sleep(0.01)
            told += capsys.readouterr().err

    with console.progress("prompts") as advance:
        wait_for("loading the model: 0 s")
        advance(2, 10)
        wait_for("prompts: 2 of 10, 0 s")
        advance(6, 10)
        wait_for("prompts: 6 of 10, 0 s, about 0 s left")
    with console.status("clustering") as say:
        wait_for("clustering: 0 s")
        say(None)
        time.sleep(0.1)
    told += capsys.readouterr().err
    assert [*dict.fromkeys(told.splitlines())] == [
        *("loading the model: 0 s", "prompts: 2 of 10, 0 s"),
        *("prompts: 6 of 10, 0 s, about 0 s left", "clustering: 0 s"),
    ]
    was = console.set_quiet(True)
    with console.progress("prompts"), console.status("clustering"):
        time.sleep(0.1)
    console.set_quiet(was)
    assert capsys.readouterr().err == ""


def test_time_left_counts_what_was_done_now(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: clock[0])
    work = console._Work("prompts")
    clock[0] = 1000.0  # loading
    work.advance(20, 30)  # of an earlier run
    clock[0] += 240
    work.advance(22, 30)
    assert work.line() == "prompts: 22 of 30, 4 min, about 16 min left"


def test_a_terminal_gets_a_bar_with_the_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")
    with console.progress("prompts") as advance:
        advance(2, 10)
        advance(3, 10)
    with console.status("clustering") as say:
        say("writing")
        say(None)
    text = ANSI.sub("", capsys.readouterr().err)
    assert "3/10" in text
    assert "left" in text
    assert max(cell_len(line) for line in text.splitlines()) <= 80
