"""Kills `sp calibrate`, `sp train` and `sp cluster` at random moments, and resumes them.

`python tools/kill_test.py --kills 100 --seed 0` kills each command 100 times (SIGKILL). Half of the
kills come at a random time, half right after a random change in the folder, where writes are.

After every kill the files must be whole: each as it was before or as an undisturbed run leaves it,
what the index names there, no training that loads with another one's codes, and the earlier
artifact must load with `sp inspect`. After one to three kills the command runs to its end: its
files must equal those of the undisturbed run byte for byte, with no temporary file left. Exit
status 1 on a failure.
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
from dataclasses import dataclass, field
from pathlib import Path

from shareprefill.autoencoder.pipeline import CODES, HISTORY, WEIGHTS, load_training
from shareprefill.calib.store import INDEX, MapStore
from shareprefill.errors import DataError
from shareprefill.files import LOCK_NAME

CALIBRATION = "calibration"
ARTIFACT = "clusters.st"
TRAINING = (WEIGHTS, CODES, HISTORY)
POLL_S = 0.0003
DATA = ("--data", "retr_kv", "--data", "text", "--length", "320", "--block-size", "32")
CAPTURE = ("calibrate", "--model", "model", "--out", CALIBRATION, *DATA)
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
        seconds: That the undisturbed run took.
        changes: That it made in the folder, as far as polling saw them.
    """

    name: str
    arguments: tuple[str, ...]
    start: Path
    replaces: bool = False
    before: Contents = field(default_factory=dict)
    after: Contents = field(default_factory=dict)
    seconds: float = 0.0
    changes: int = 0


@dataclass
class Findings:
    """Kills by command and phase, runs that ended before their kill, and what went wrong."""

    kills: Counter[tuple[str, str]] = field(default_factory=Counter)
    missed: int = 0
    resumed: int = 0
    failures: list[str] = field(default_factory=list)


def sp(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end."""
    return subprocess.run(
        [sys.executable, "-m", "shareprefill.cli", *arguments],
        cwd=folder,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )


def contents(folder: Path) -> Contents:
    """All files of a work folder but the model and the locks, by path."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != LOCK_NAME and path.parent.name != "model"
    }


def stamps(folder: Path) -> frozenset[tuple[str, int, int]]:
    """What polling compares: names, inodes and times of the files that a command writes."""
    found = set()
    for place in (folder, folder / CALIBRATION):
        try:
            for entry in os.scandir(place):
                if entry.is_file():
                    status = entry.stat()
                    found.add((entry.path, status.st_ino, status.st_mtime_ns))
        except FileNotFoundError:
            continue
    return frozenset(found)


def watch(
    folder: Path, arguments: tuple[str, ...], *, after_s: float, after_changes: int, delay_s: float
) -> tuple[bool, int]:
    """Runs a command until a time has passed or so many changes were seen, then kills it.

    Returns:
        Whether it was killed (and had not ended before), and the changes that were seen.
    """
    command = [sys.executable, "-m", "shareprefill.cli", *arguments]
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
        return process.wait() < 0, seen


def prepare(root: Path) -> list[Scenario]:
    """Makes the folders that the commands start in, and runs every command undisturbed."""
    from tests.support.checkpoint import save_checkpoint

    trained = root / "trained"
    save_checkpoint(trained / "model")
    _expect(sp(trained, *CAPTURE, "--samples", "8", "--seed", "1"))
    _expect(sp(trained, "cluster", CALIBRATION, "--k", "2", "--out", ARTIFACT))
    bare = root / "bare"
    shutil.copytree(trained, bare, ignore=shutil.ignore_patterns(CALIBRATION))
    capture = (*CAPTURE, "--samples", "6")
    scenarios = [
        Scenario("calibrate", capture, bare),
        Scenario("calibrate --fresh", (*capture, "--fresh"), trained, replaces=True),
        Scenario("train", ("train", CALIBRATION, "--seed", "3", "--epochs", "60"), trained),
        Scenario("cluster", ("cluster", CALIBRATION, "--target-recall", "0.8"), trained),
    ]
    for number, scenario in enumerate(scenarios):
        folder = root / f"undisturbed-{number}"
        shutil.copytree(scenario.start, folder)
        scenario.before = contents(folder)
        started = time.monotonic()
        endless = {"after_s": 1e9, "after_changes": 1 << 30, "delay_s": 0.0}
        _, scenario.changes = watch(folder, scenario.arguments, **endless)
        scenario.seconds = time.monotonic() - started
        scenario.after = contents(folder)
        assert scenario.after != scenario.before, scenario.name
    return scenarios


def _expect(result: subprocess.CompletedProcess[str]) -> None:
    if result.returncode:
        raise RuntimeError(f"a command without faults failed: {result.stderr}")


def check_killed(scenario: Scenario, folder: Path) -> list[str]:
    """What is wrong in a folder after a kill."""
    now, wrong = contents(folder), []
    index = f"{CALIBRATION}/{INDEX}"
    for name, data in now.items():
        known = (scenario.before.get(name), scenario.after.get(name))
        if not _temporary(name) and name != index and data not in known:
            wrong.append(f"{name} is neither the earlier file nor the undisturbed run's")
    if not scenario.replaces:
        wrong += [f"{name} was lost" for name in scenario.before if name not in now]
    if index in now:
        wrong += _check_index(scenario, folder, now, index)
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
    shown = sp(folder, "inspect", ARTIFACT)
    if shown.returncode:
        wrong.append(f"sp inspect fails on the earlier artifact: {shown.stderr.strip()}")
    return wrong


def _check_index(scenario: Scenario, folder: Path, now: Contents, name: str) -> list[str]:
    try:
        MapStore.open(folder / CALIBRATION).verify()
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
    result = sp(folder, *scenario.arguments)
    if result.returncode:
        return [f"the next run fails: {result.stderr.strip().splitlines()[-1]}"]
    now = contents(folder)
    wrong = [f"{name} stays" for name in now if name not in scenario.after]
    wrong += [f"{name} is missing" for name in scenario.after if name not in now]
    both = now.keys() & scenario.after.keys()
    wrong += [f"{name} has other bytes" for name in both if now[name] != scenario.after[name]]
    return wrong


def kill_often(
    scenario: Scenario, kills: int, chance: random.Random, root: Path, findings: Findings
) -> None:
    """Kills one command so many times, in rounds of one to three kills and a whole run."""
    done = 0
    while done < kills:
        folder = Path(tempfile.mkdtemp(dir=root))
        shutil.copytree(scenario.start, folder, dirs_exist_ok=True)
        for _ in range(min(chance.randint(1, 3), kills - done)):
            earlier = contents(folder)
            by_time = chance.random() < 0.5
            moment = chance.random()
            was_killed, _ = watch(
                folder,
                scenario.arguments,
                after_s=moment * scenario.seconds if by_time else 1e9,
                after_changes=1 << 30 if by_time else 1 + int(moment * scenario.changes),
                delay_s=0.0 if by_time else chance.random() * 0.002,
            )
            if not was_killed:
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
    if any(_temporary(name) and name not in earlier for name in now):
        return "inside a write"
    if {n: d for n, d in now.items() if not _temporary(n)} == scenario.after:
        return "after the last write"
    return "before the first write" if now == earlier else "between writes"


def _temporary(name: str) -> bool:
    return name.endswith(".tmp")


def _maps(files: Contents) -> list[str]:
    return [name for name in files if "maps-" in name or name.endswith(INDEX)]


def main() -> int:
    """Kills, prints the summary; the exit status says whether anything went wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=100, help="of each command")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chance, findings, started = random.Random(options.seed), Findings(), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="sp-kill-") as root:
        scenarios = prepare(Path(root))
        # Both ways to calibrate share one command's kills.
        shares = (options.kills - options.kills // 2, options.kills // 2)
        for scenario, kills in zip(scenarios, (*shares, options.kills, options.kills), strict=True):
            kill_often(scenario, kills, chance, Path(root), findings)
    for (name, phase), count in sorted(findings.kills.items()):
        print(f"{name:<18} {phase:<23} {count:5d} kills")
    print(
        f"{findings.kills.total()} kills, {findings.resumed} whole runs after them, "
        f"{findings.missed} runs ended before their kill, {len(findings.failures)} failures, "
        f"seed {options.seed}, {time.monotonic() - started:.0f} s"
    )
    for failure in findings.failures:
        print(f"FAILED {failure}")
    return 1 if findings.failures else 0


if __name__ == "__main__":
    sys.exit(main())
