"""Kills the commands of `sp` at random moments, and runs them again.

`python tools/kill_test.py --kills 12 --seed 0` kills each command 12 times (SIGKILL). Half of the
kills come at a random time, half right after a random change in the folder, where writes are.

After every kill the files must be whole: each as it was before or as an undisturbed run leaves it,
what an index names there, no training that loads with another one's codes, the earlier artifact
loads, and a repository of the hub (one on the loopback) has all of a push or nothing. After one to
three kills the command runs to its end: its files must equal those of the undisturbed run byte for
byte (but for the times in them), with no temporary file left. Exit status 1 on a failure.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shareprefill.artifact import load_artifact
from shareprefill.autoencoder.pipeline import CODES, HISTORY, WEIGHTS, load_training
from shareprefill.calib.store import INDEX, MapStore
from shareprefill.errors import ArtifactError, DataError
from shareprefill.files import LOCK_NAME, reading_folder

SP = [sys.executable, "-m", "shareprefill.cli"]
CALIBRATION = "calibration"
ARTIFACT = "clusters.st"
TRAINING = (WEIGHTS, CODES, HISTORY)
POLL_S = 0.0003
# What a killed worker has, to see that its parent is gone.
ORPHAN_S = 10.0
DATA = ("--data", "retr_kv", "--data", "text", "--length", "320", "--block-size", "32")
CAPTURE = ("calibrate", "--model", "model", "--out", CALIBRATION, *DATA)
MODELS = """
[[model]]
name = "small"
model = "model"
artifact = "committed.st"
data = ["retr_kv", "text"]
lengths = [320]
samples = 4
block_size = 32
target_recall = 0.8
train.epochs = 20
eval = { tasks = ["perplexity"], samples = 2 }
"""
# Files with times in them: whole, but not the same in two runs.
TIMED = ("outcomes.jsonl", "outcome.json", "evaluation.json", "sweep.json")
REPOSITORY = "me/patterns"
PULLED = "pulled.st"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

Contents = dict[str, bytes]


@dataclass
class Scenario:
    """A command, the folder that it starts in, and what it leaves there undisturbed.

    Attributes:
        name: In the summary.
        arguments: Of `sp`.
        start: The folder before the command.
        replaces: The command is asked to delete what is there.
        before: The start folder's files.
        after: The files of an undisturbed run.
        reset: Called before every command, as the folder is made anew.
        check: What else must hold after a kill; says what does not.
        again: Options for a run after one that had done its work before it was killed.
        seconds: That the undisturbed run took.
        changes: That it made in the folder, as far as polling saw them.
    """

    name: str
    arguments: tuple[str, ...]
    start: Path
    replaces: bool = False
    before: Contents = field(default_factory=dict)
    after: Contents = field(default_factory=dict)
    reset: Callable[[], None] = lambda: None
    check: Callable[[], list[str]] = list
    again: Callable[[Path], tuple[str, ...]] = lambda _: ()
    seconds: float = 0.0
    changes: int = 0


@dataclass
class Findings:
    """Kills by command and phase, runs that ended before their kill, and what went wrong."""

    kills: Counter[tuple[str, str]] = field(default_factory=Counter)
    missed: int = 0
    resumed: int = 0
    failures: list[str] = field(default_factory=list)

    def add(self, other: Findings) -> None:
        """Counts another command's findings in."""
        self.kills += other.kills
        self.missed += other.missed
        self.resumed += other.resumed
        self.failures += other.failures


def sp(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end."""
    return subprocess.run(
        [*SP, *arguments],
        cwd=folder,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )


def contents(folder: Path) -> Contents:
    """All files of a work folder but the model and the folders' locks, by path."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != LOCK_NAME and path.parent.name != "model"
    }


def stamps(folder: Path) -> frozenset[tuple[str, int, int]]:
    """What polling compares: names, inodes and times of the files that a command writes."""
    found = set()
    places = [folder]
    while places:
        try:
            for entry in os.scandir(places.pop()):
                if entry.is_dir():
                    if entry.name != "model":
                        places.append(entry)  # type: ignore[arg-type]
                    continue
                status = entry.stat()
                found.add((entry.path, status.st_ino, status.st_mtime_ns))
        except FileNotFoundError:
            continue
    return frozenset(found)


def watch(
    folder: Path, arguments: tuple[str, ...], *, after_s: float, after_changes: int, delay_s: float
) -> tuple[int, int]:
    """Runs a command until a time has passed or so many changes were seen, then kills it.

    Returns:
        Its exit status (negative: it was killed), and the changes that were seen.
    """
    command = [*SP, *arguments]
    quiet = subprocess.DEVNULL
    with subprocess.Popen(
        command, cwd=folder, env=ENVIRONMENT, stdout=quiet, stderr=quiet
    ) as process:
        started, seen, last = time.monotonic(), 0, stamps(folder)
        while process.poll() is None:
            now = stamps(folder)
            seen += now != last
            last = now
            if time.monotonic() - started >= after_s or seen >= after_changes:
                time.sleep(delay_s)
                process.kill()
                break
            time.sleep(POLL_S)
        return process.wait(), seen


@dataclass
class _HubState:
    """What the hub on the loopback must hold before and after a push and a pull."""

    hub: Any
    artifact: bytes

    def empty(self) -> None:
        self.hub.repositories.clear()

    def fill(self) -> None:
        self.hub.repositories[REPOSITORY] = {PULLED: self.artifact}

    def check(self) -> list[str]:
        files = self.hub.repositories.get(REPOSITORY, {})
        if files and (set(files) != {ARTIFACT, "README.md"} or files[ARTIFACT] != self.artifact):
            return [f"the repository holds a part of a push: {sorted(files)}"]
        return []

    def again(self, _: Path) -> tuple[str, ...]:
        return ("--force",) if self.hub.repositories.get(REPOSITORY) else ()


def prepare(root: Path, only: list[str], hub: Any) -> list[Scenario]:
    """Makes the folders that the commands start in, and runs every command undisturbed."""
    from tests.support.checkpoint import save_checkpoint

    ENVIRONMENT.update(HF_ENDPOINT=hub.address, HF_HOME=str(root / "hub"))
    trained = root / "trained"
    save_checkpoint(trained / "model")
    (trained / "models.toml").write_text(MODELS)
    (trained / "prompt.txt").write_text("A line of text that is read. " * 60)
    _expect(sp(trained, *CAPTURE, "--samples", "8", "--seed", "1"))
    _expect(sp(trained, "cluster", CALIBRATION, "--k", "2", "--out", ARTIFACT))
    bare = root / "bare"
    shutil.copytree(trained, bare, ignore=shutil.ignore_patterns(CALIBRATION))
    stale = root / "stale"
    shutil.copytree(bare, stale)
    shutil.copy(trained / ARTIFACT, stale / "committed.st")
    capture = (*CAPTURE, "--samples", "6")
    use = ("--artifact", ARTIFACT, "--model", "model")
    ask = (*use, "--tasks", "perplexity", "--samples", "2", "--out", "results")
    hub_state = _HubState(hub, (trained / ARTIFACT).read_bytes())
    scenarios = [
        Scenario("calibrate", capture, bare),
        Scenario("calibrate --fresh", (*capture, "--fresh"), trained, replaces=True),
        Scenario("train", ("train", CALIBRATION, "--seed", "3", "--epochs", "60"), trained),
        Scenario("cluster", ("cluster", CALIBRATION, "--target-recall", "0.8"), trained),
        Scenario("run", ("run", *use, "prompt.txt", "--min-tokens", "0", "--recall"), trained),
        Scenario("eval", ("eval", *ask, "--lengths", "320"), trained),
        Scenario("sweep", ("sweep", *ask, "--length", "320", "--gamma", "0.9"), trained),
        Scenario("audit", ("audit", ARTIFACT, "--calibration", CALIBRATION), trained),
        Scenario("regenerate", ("regenerate", "models.toml", "--update"), stale),
        Scenario(
            "push",
            ("push", ARTIFACT, REPOSITORY),
            bare,
            reset=hub_state.empty,
            check=hub_state.check,
            again=hub_state.again,
        ),
        Scenario(
            "pull",
            ("pull", REPOSITORY),
            bare,
            reset=hub_state.fill,
            again=lambda folder: ("--force",) * (folder / PULLED).exists(),
        ),
    ]
    scenarios = [scenario for scenario in scenarios if not only or scenario.name in only]
    for number, scenario in enumerate(scenarios):
        folder = root / f"undisturbed-{number}"
        shutil.copytree(scenario.start, folder)
        scenario.reset()
        scenario.before = contents(folder)
        started = time.monotonic()
        endless = {"after_s": 1e9, "after_changes": 1 << 30, "delay_s": 0.0}
        status, scenario.changes = watch(folder, scenario.arguments, **endless)
        scenario.seconds = time.monotonic() - started
        scenario.after = contents(folder)
        if status or scenario.check():
            raise RuntimeError(f"{scenario.name} fails without faults")
    return scenarios


def _expect(result: subprocess.CompletedProcess[str]) -> None:
    if result.returncode:
        raise RuntimeError(f"a command without faults failed: {result.stderr}")


def check_killed(scenario: Scenario, folder: Path) -> list[str]:
    """What is wrong in a folder after a kill."""
    _wait_for_orphans(folder)
    now, wrong = contents(folder), scenario.check()
    for name, data in now.items():
        known = (scenario.before.get(name), scenario.after.get(name))
        place = Path(name)
        if _temporary(name) or place.name in TIMED or place.name == "stages.json":
            continue
        if place.name == INDEX:
            wrong += _check_index(scenario, folder, now, name)
        elif data not in known:
            wrong.append(f"{name} is neither the earlier file nor the undisturbed run's")
    if not scenario.replaces:
        wrong += [f"{name} was lost" for name in scenario.before if name not in now]
    try:
        load_training(folder / CALIBRATION)
    except DataError:
        pass  # none, or one that is refused
    else:
        parts = [f"{CALIBRATION}/{name}" for name in TRAINING]
        if not any(
            all(now.get(part) == source.get(part) for part in (*parts, *_maps(source)))
            for source in (scenario.before, scenario.after)
        ):
            wrong.append("a training loads whose files or maps are of two runs")
    try:
        load_artifact(folder / ARTIFACT)
    except ArtifactError as error:
        wrong.append(f"the earlier artifact does not load: {error}")
    return wrong


def _wait_for_orphans(folder: Path) -> None:
    """Waits until no worker of a killed command holds a folder any more."""
    end = time.monotonic() + ORPHAN_S
    for lock in folder.rglob(LOCK_NAME):
        while time.monotonic() < end:
            try:
                with reading_folder(lock.parent):
                    break
            except DataError:
                time.sleep(0.05)


def _check_index(scenario: Scenario, folder: Path, now: Contents, name: str) -> list[str]:
    try:
        MapStore.open((folder / name).parent).verify()
    except DataError as error:
        return [f"the calibration cannot be resumed: {error}"]
    if now[name] == scenario.before.get(name):
        return []
    found, whole = json.loads(now[name]), json.loads(scenario.after[name])
    begun = whole["prompts"][: len(found["prompts"])]
    if found != {**whole, "prompts": begun}:
        return [f"{name} is no beginning of the undisturbed run's"]
    return []


def check_resumed(scenario: Scenario, folder: Path) -> list[str]:
    """What differs from the undisturbed run after the command ran to its end."""
    _wait_for_orphans(folder)
    result = sp(folder, *scenario.arguments, *scenario.again(folder))
    if result.returncode:
        return [f"the next run fails: {result.stderr.strip().splitlines()[-1]}"]
    return _differences(scenario.after, contents(folder)) + scenario.check()


def _differences(expected: Contents, now: Contents) -> list[str]:
    wrong = [f"{name} stays" for name in now if name not in expected]
    wrong += [f"{name} is missing" for name in expected if name not in now]
    both = [name for name in now.keys() & expected.keys() if Path(name).name not in TIMED]
    return wrong + [f"{name} has other bytes" for name in both if now[name] != expected[name]]


def kill_often(
    scenario: Scenario, kills: int, chance: random.Random, root: Path, findings: Findings
) -> None:
    """Kills one command so many times, in rounds of one to three kills and a whole run."""
    done = 0
    while done < kills:
        folder = Path(tempfile.mkdtemp(dir=root))
        shutil.copytree(scenario.start, folder, dirs_exist_ok=True)
        scenario.reset()
        for _ in range(min(chance.randint(1, 3), kills - done)):
            earlier = contents(folder)
            by_time = not scenario.changes or chance.random() < 0.5
            moment = chance.random()
            status, _ = watch(
                folder,
                scenario.arguments,
                after_s=moment * scenario.seconds if by_time else 1e9,
                after_changes=1 << 30 if by_time else 1 + int(moment * scenario.changes),
                delay_s=0.0 if by_time else chance.random() * 0.002,
            )
            if status >= 0:
                findings.missed += 1
                continue
            done += 1
            phase = _phase(scenario, earlier, contents(folder))
            findings.kills[scenario.name, phase] += 1
            for wrong in check_killed(scenario, folder):
                findings.failures.append(f"{scenario.name}, killed at {phase}: {wrong}")
        findings.resumed += 1
        for wrong in check_resumed(scenario, folder):
            findings.failures.append(f"{scenario.name}, resumed: {wrong}")
        shutil.rmtree(folder)


def _phase(scenario: Scenario, earlier: Contents, now: Contents) -> str:
    if any(name.endswith(".tmp") and name not in earlier for name in now):
        return "inside a write"
    if scenario.before == scenario.after:
        return "no file is written"
    if {n: d for n, d in now.items() if not _temporary(n)} == scenario.after:
        return "after the last write"
    return "before the first write" if now == earlier else "between writes"


def _temporary(name: str) -> bool:
    # Of a write, and of the lock on an output.
    return Path(name).name.startswith(".sp-") and name.endswith((".tmp", ".lock"))


def _maps(files: Contents) -> list[str]:
    return [name for name in files if "maps-" in name or name.endswith(INDEX)]


def main() -> int:
    """Kills, prints the summary; the exit status says whether anything went wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=12, help="of each command")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", action="append", default=[], help="a command; may be repeated")
    options = parser.parse_args()
    chance, findings, started = random.Random(options.seed), Findings(), time.monotonic()
    from tests.support.hub import fake_hub

    with tempfile.TemporaryDirectory(prefix="sp-kill-") as root, fake_hub() as hub:
        for scenario in prepare(Path(root), options.only, hub):
            of_it = Findings()
            kill_often(scenario, options.kills, chance, Path(root), of_it)
            for (name, phase), count in sorted(of_it.kills.items()):
                print(f"{name:<18} {phase:<23} {count:5d} kills")
            for failure in of_it.failures:
                print(f"FAILED {failure}")
            sys.stdout.flush()
            findings.add(of_it)
    print(
        f"{findings.kills.total()} kills, {findings.resumed} whole runs after them, "
        f"{findings.missed} runs ended before their kill, {len(findings.failures)} failures, "
        f"seed {options.seed}, {time.monotonic() - started:.0f} s"
    )
    return 1 if findings.failures else 0


if __name__ == "__main__":
    sys.exit(main())
