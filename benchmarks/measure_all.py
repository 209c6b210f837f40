"""Runs every measurement that the documents hold, on all GPUs of a machine, into one folder.

    python benchmarks/measure_all.py --model sp-ref --out measured
    python benchmarks/measure_all.py --list
    python benchmarks/measure_all.py --only kernels layer --out measured --commit 0123abc

In three phases: the GPU tests and artifacts; what stands on their compiled kernels and on these
(memcheck of each file of GPU tests, `sp eval`, what a session does); what is timed, one step a GPU
at a time. Every step has a log, `NAME.log`, and a limit in seconds after which it is ended. A step
that stands on one that failed does not run. What cannot run (no compute-sanitizer, one GPU for a
step of two) fails, and says so. Ends with a table, and exit status 1 where a step failed or did not
run. The tests are divided by pytest-xdist, which has to be there.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from provenance import ROOT, current_commit

PYTHON = sys.executable
PHASES = FIRST, THEN, TIMED = range(3)
# The options of the artifacts that are made, by the names of their files.
CLUSTERED = {
    "clusters": (),
    "budget14": ("--budget", ".14"),
    "budget20": ("--budget", ".20"),
    "budget30": ("--budget", ".30"),
    "recall88": ("--target-recall", ".88"),
}
TASKS = "retr_kv,retr_passkey,retr_number,math_find,code_run,variable_tracking,perplexity"


@dataclass(frozen=True)
class Step:
    """One measurement.

    Attributes:
        name: Of its log.
        commands: Run one after the other, until one fails.
        limit_s: Seconds after which it is ended.
        gpus: GPUs that it needs.
        phase: Phases follow each other; in the last one a step has its GPUs to itself.
        after: Steps whose files it reads, where they are asked for too.
    """

    name: str
    commands: tuple[tuple[str, ...], ...]
    limit_s: int
    gpus: int = 1
    phase: int = TIMED
    after: tuple[str, ...] = ()


def steps_of(args: argparse.Namespace) -> list[Step]:
    """All measurements, in the order in which they start."""
    out, model, commit = args.out, args.model, ("--commit", args.commit)
    artifacts = args.artifact or [out / f"{name}.st" for name in CLUSTERED]
    of_model = ("--model", model, "--artifact", str(artifacts[0]))
    of_all = (*of_model, *(word for other in artifacts[1:] for word in ("--artifact", str(other))))
    tests = (PYTHON, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider")
    workers = str(args.workers)

    def script(name: str, *arguments: str) -> tuple[str, ...]:
        return (PYTHON, str(ROOT / "benchmarks" / name), *arguments)

    def sp(*arguments: str) -> tuple[str, ...]:
        return (PYTHON, "-m", "shareprefill.cli", *arguments)

    def files(name: str, *kinds: str) -> tuple[str, ...]:
        return tuple(v for kind in kinds for v in (f"--{kind}", str(out / f"{name}.{kind}")))

    written = ("json", "markdown")
    shared = out / "one.pt"
    calibrated = sp(
        *("calibrate", "--model", model, "--data", "mixture", "--samples", "12"),
        *("--length", "8192", "--dtype", "float32", "--out", str(out / "calibration")),
    )
    clustered = [
        sp("cluster", str(out / "calibration"), *options, "--out", str(out / f"{name}.st"))
        for name, options in CLUSTERED.items()
    ]
    evaluated = sp(
        *("eval", *of_all, "--tasks", TASKS, "--policies", "all", "--lengths", "8192,16384"),
        *("--gamma", ".7", "--gamma", ".8", "--gamma", ".9", "--gamma", ".96"),
        *("--max-density", "1"),
        *("--samples", str(args.samples), "--workers", workers, "--out", str(out / "eval")),
        *("--plot", str(out / "frontier.svg"), "--markdown", str(out / "eval.md")),
    )
    answered = sp(
        *("eval", *of_all, "--tasks", "retr_kv,needle,perplexity", "--policies", "auto,share"),
        *("--lengths", "16384", "--samples", "120", "--no-measure", "--workers", workers),
        *("--out", str(out / "answers"), "--markdown", str(out / "answers.md")),
    )
    parallel = ("check_parallel.py", *of_model)
    divided = (
        *(PYTHON, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *(script(*parallel, "--against", str(shared))[1:]),
    )
    crossover = ("measure_crossover.py", *commit)
    kernels = script("bench_kernels.py", "--baseline", *files("kernels", *written), *commit)
    layer = ("bench_layer.py", *commit)
    few = script(*layer, "--plans", "mixed", "shared", *files("layer", *written))
    million = script(*layer, "--tokens", "1048576", "--plans", "shared", "--impl", "auto")
    runtime = script("check_runtime.py", *of_model, "--length", "8192", *files("runtime", "json"))
    made = ("artifact",)
    return [
        Step("tests", ((*tests, "-n", workers, "tests"),), 400, phase=FIRST),
        Step("artifact", (calibrated, *clustered), 400, phase=FIRST),
        Step("eval", (evaluated,), 500, phase=THEN, after=made),
        Step("answers", (answered,), 400, phase=THEN, after=made),
        Step("runtime", (runtime,), 200, phase=THEN, after=made),
        *(
            Step(f"memcheck-{file.stem}", ((*_memcheck(), *tests, str(file)),), 500, phase=THEN)
            for file in _gpu_tests()
        ),
        Step("doctor", (sp("doctor"),), 120),
        Step("kernels", (kernels,), 500),
        Step("layer", (few,), 400),
        Step("layer-1m", (million,), 200),
        Step("crossover", (script(*crossover, *files("crossover", "json")),), 200),
        Step("crossover-linear", (script(*crossover, "--linear"),), 200),
        Step("layers", (script("measure_layers.py", *files("layers", "json"), *commit),), 300),
        Step("ttft", (script("bench_ttft.py", *files("ttft", "json"), *commit),), 400),
        Step("bench", (sp("bench", "--lengths", "8K,32K,128K"),), 300),
        Step("bench-512k", (sp("bench", "--lengths", "512K", "--layers", "2"),), 200),
        Step("bench-1m", (sp("bench", "--lengths", "1M", "--layers", "1"),), 200),
        Step("one-process", (script(*parallel, "--out", str(shared)),), 120, after=made),
        Step("two-processes", (divided,), 120, gpus=2, after=("one-process",)),
    ]


def _gpu_tests() -> list[Path]:
    return [
        file for file in sorted(ROOT.glob("tests/**/test_*.py")) if "mark.gpu" in file.read_text()
    ]


def _memcheck() -> tuple[str, ...]:
    checker = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    # A test lets an allocation fail on purpose.
    return (checker, "--tool", "memcheck", "--report-api-errors", "no", "--error-exitcode", "9")


class Machine:
    """The GPUs, and what is running on them."""

    def __init__(self, out: Path, gpus: int) -> None:
        self.out, self.gpus = out, gpus
        self.outcomes: dict[str, str] = {}
        self._steps: list[Step] = []
        self._running: Counter[int] = Counter()
        self._changed = threading.Condition()

    def run(self, steps: list[Step], slots: int) -> None:
        """Runs steps, at most `slots` a GPU at a time; returns when all have ended."""
        self._steps, waiting, threads = steps, list(steps), []
        with self._changed:
            while waiting:
                places = ((step, self._free(step, slots)) for step in waiting)
                step, gpus = next(((s, g) for s, g in places if g is not None), (None, None))
                if step is None or gpus is None:
                    self._changed.wait()
                    continue
                waiting.remove(step)
                self._running.update(gpus)
                threads.append(threading.Thread(target=self._run, args=(step, gpus)))
                threads[-1].start()
        for thread in threads:
            thread.join()

    def _free(self, step: Step, slots: int) -> list[int] | None:
        """The least busy GPUs for a step; none where it cannot run; None where it has to wait."""
        needed = [name for name in step.after if name in {s.name for s in self._steps}]
        if any(name not in self.outcomes for name in needed):
            return None
        if self._missing(step):
            return []
        free = [gpu for gpu in range(self.gpus) if self._running[gpu] < slots]
        free.sort(key=lambda gpu: self._running[gpu])
        return free[: step.gpus] if len(free) >= step.gpus else None

    def _missing(self, step: Step) -> str | None:
        failed = [name for name in step.after if self.outcomes.get(name, "ok") != "ok"]
        if failed:
            return f"not run: {', '.join(failed)} failed"
        if step.gpus > self.gpus:
            return f"not run: needs {step.gpus} GPUs, there are {self.gpus}"
        return None

    def _run(self, step: Step, gpus: list[int]) -> None:
        begun = time.monotonic()
        found = self._missing(step) or _outcome(step, gpus, self.out / f"{step.name}.log")
        print(f"{step.name}: {found}, {time.monotonic() - begun:.0f} s", flush=True)
        with self._changed:
            self.outcomes[step.name] = found
            self._running.subtract(gpus)
            self._changed.notify_all()


def _outcome(step: Step, gpus: list[int], log: Path) -> str:
    """Runs a step's commands; "ok", or what went wrong."""
    # Of the GPUs that this process sees, which need not be all.
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    visible = ",".join(seen.split(",")[gpu] if seen else str(gpu) for gpu in gpus)
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": visible, "PYTHONUNBUFFERED": "1"}
    deadline = time.monotonic() + step.limit_s
    with log.open("w") as stream:
        for command in step.commands:
            try:
                process = subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env=environment,
                    stdout=stream,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            except OSError as error:
                return f"cannot be started: {error}"
            try:
                status = process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                # With its workers.
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                return f"ended after its limit of {step.limit_s} s"
            if status:
                return f"failed with exit status {status}"
    return "ok"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="sp-tiny", help="for what needs a trained model")
    parser.add_argument("--artifact", type=Path, nargs="+", help="by default some are made")
    parser.add_argument("--out", type=Path, default=Path("measured"))
    parser.add_argument("--only", nargs="+", metavar="STEP")
    parser.add_argument("--skip", nargs="+", metavar="STEP", default=[])
    parser.add_argument("--workers", type=int, default=12, help="processes of tests and of sp eval")
    parser.add_argument("--slots", type=int, default=3, help="steps a GPU, where none is timed")
    parser.add_argument("--samples", type=int, default=2, help="prompts a task of sp eval")
    parser.add_argument("--commit", help="the commit, where the sources are without git's files")
    parser.add_argument("--list", action="store_true", help="print the steps and end")
    args = parser.parse_args()
    args.commit = args.commit or current_commit()
    args.out = args.out.resolve()
    steps = steps_of(args)
    known = {step.name for step in steps}
    unknown = {*(args.only or []), *args.skip} - known
    if unknown:
        parser.error(f"no step {', '.join(sorted(unknown))}: see --list")
    if args.artifact is not None:
        args.skip.append("artifact")
    wanted = (set(args.only) if args.only else known) - set(args.skip)
    steps = [step for step in steps if step.name in wanted]
    if args.list:
        print("\n".join(step.name for step in steps))
        return
    import torch

    gpus = torch.cuda.device_count()
    if not gpus:
        parser.error("there is no CUDA GPU: the measurements for a CPU are commands of docs/")
    args.out.mkdir(parents=True, exist_ok=True)
    machine = Machine(args.out, gpus)
    for phase in PHASES:
        slots = 1 if phase == TIMED else args.slots
        machine.run([step for step in steps if step.phase == phase], slots)
    width = max(map(len, machine.outcomes))
    print("\n".join(f"{name:{width}} {found}" for name, found in machine.outcomes.items()))
    sys.exit(any(found != "ok" for found in machine.outcomes.values()))


if __name__ == "__main__":
    main()
