"""Where dense attention is faster, as measured: a small table by kind of device.

`benchmarks/measure_crossover.py` measures a row; docs/performance.md has the figures. What
`sp tune` has measured on a machine lies in a file of its user, and goes before.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from shareprefill.errors import ConfigError, DataError
from shareprefill.files import atomic_write_text, kind_of, locked_output, make_folder, printable

# Names the file of `sp tune`; set to nothing, no file is read.
TABLE_VARIABLE = "SHAREPREFILL_CROSSOVERS"
# Dense attention of a session, and its decode steps; others are named as vLLM names its backends.
SDPA, DECODING = "SDPA", "decode steps"
_FORMAT = "shareprefill crossovers 1"


@dataclass(frozen=True)
class Crossover:
    """From where on sharing is never slower than dense attention.

    Attributes:
        tokens: Keys below which a prefill runs dense by itself.
        density: Computed blocks over causal blocks above which a head is computed densely: its
            pattern takes more time, or so little less that it is not worth what it loses.
        source: What it was measured on.
        is_measured: Whether that is this kind of device.
        width: Query heads times their dimension of the layer that was measured, where smaller ones
            need longer prompts; None: the tokens hold whatever the model.
    """

    tokens: int
    density: float
    source: str
    is_measured: bool = True
    width: int | None = None

    def tokens_of(self, heads: int, head_dim: int) -> int:
        """Keys below which a prefill runs dense, of layers of so many query heads in a process.

        Choosing patterns takes the host the same for heads of any number and size. So smaller ones
        need as much dense work as was measured: heads times dimension times the tokens' square.
        """
        width = heads * head_dim
        if self.width is None or width >= self.width:
            return self.tokens
        return math.isqrt(self.tokens**2 * self.width // width)

    def is_worth_it(self, rows: int, keys: int, heads: int, head_dim: int) -> bool:
        """Whether so many last rows of so many keys are computed faster sparse.

        A whole prompt is so from `tokens_of` on. Where that is due to the work of dense attention,
        fewer rows than keys need as much of it: as many pairs of a row and a key.
        """
        least = self.tokens_of(heads, head_dim)
        if self.width is None:
            return keys >= least
        return rows * (2 * keys - rows) >= least**2


# End to end sp-ref gains from 4K tokens on and sp-tiny between 4K and 8K; a block takes 1.5 times
# as long as in dense attention.
_CPU = Crossover(5120, 0.6, "2 CPU cores, sp-ref and sp-tiny, end to end")
# Layer after layer, sharing takes .34 to .42 ms at 6K tokens and .28 to .36 at 4K, the best dense
# attention .47 and .22. A block takes about as long as in dense attention, but with 0.95 for 0.7
# sp-ref's artifact of most sharing heads loses 6.7 points of retr_kv for .010 of density
# (docs/findings-record.md).
_HOPPER = Crossover(
    6144,
    0.7,
    "one H200: a layer of 32 heads, D=128 (6b73ebe), and sp-ref's answers (5e089ea)",
    width=32 * 128,
)
# In vLLM an 8B model gained 6 % at 8K and 19 % at 16K, and lost 1 % at 6K (docs/vllm.md).
_HOPPER_ENGINES = replace(_HOPPER, tokens=8192, source="one H200: vLLM 0.24, an 8B shape (e7d7919)")
# Not measured.
_HOPPER_STEPS = replace(_HOPPER, tokens=16384, source="no measurement of decode steps")
# By the first number of the compute capability, then by what is dense; None: an engine's backends.
_GPUS = {9: {SDPA: _HOPPER, DECODING: _HOPPER_STEPS, None: _HOPPER_ENGINES}}


@lru_cache(maxsize=64)
def crossover(device: torch.device, backend: str = SDPA) -> Crossover:
    """The crossover of a device; kinds that were not measured take that of Hopper GPUs.

    Args:
        device: Where attention is computed.
        backend: What computes dense attention there.

    Raises:
        ConfigError: the environment names a table that is not there.
        DataError: the table of `sp tune` cannot be read.
    """
    known = _known(device, backend)
    path = table_path()
    entry = None if path is None else _entries(path).get(device_name(device), {}).get(backend)
    if entry is None:
        return known
    width = None if known.width is None else entry.get("width")
    return Crossover(entry["tokens"], known.density, entry["source"], width=width)


def tuned(device: torch.device) -> dict[str, Crossover]:
    """What `sp tune` measured on a device against other backends than SDPA, by backend."""
    path = table_path()
    backends = [] if path is None else _entries(path).get(device_name(device), {})
    return {name: crossover(device, name) for name in sorted(backends) if name != SDPA}


def table_path() -> Path | None:
    """The file that holds what `sp tune` measured; None where there is none to be read.

    Raises:
        ConfigError: the environment names a table that is not there.
    """
    named = os.environ.get(TABLE_VARIABLE)
    if named is None:
        path = default_table()
        return path if kind_of(path) == "file" else None
    if named and kind_of(named) != "file":
        raise ConfigError(
            f"{TABLE_VARIABLE} = {printable(named)!r} is not allowed: there is no such file; make "
            "it with sp tune --table, or unset the variable"
        )
    return Path(named) if named else None


def default_table() -> Path:
    """Where `sp tune` writes by default: in the user's folder of caches."""
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(caches) / "shareprefill" / "crossovers.json"


def save_crossover(
    path: Path,
    device: torch.device,
    backend: str,
    tokens: int,
    source: str,
    rows: list[Any],
    width: int | None = None,
) -> None:
    """Puts a measured crossover into a table, in place of an earlier one of the same kind.

    Args:
        path: The table; created where missing.
        device: Where it was measured.
        backend: What computed dense attention.
        tokens: Keys from which on sharing is faster.
        source: What was measured, in words.
        rows: The measurements, JSON-ready; nothing reads them but people.
        width: Query heads times their dimension of the layer, as in `Crossover`; None for any.

    Raises:
        DataError: the file is no such table, or cannot be written.
    """
    make_folder(path.parent)
    with locked_output(path):
        entries = _entries(path) if kind_of(path) == "file" else {}
        of_device = entries.setdefault(device_name(device), {})
        of_device[backend] = {"tokens": tokens, "source": source, "rows": rows}
        if width is not None:
            of_device[backend]["width"] = width
        text = json.dumps({"format": _FORMAT, "devices": entries}, indent=1)
        atomic_write_text(path, text + "\n")
    crossover.cache_clear()


def device_name(device: torch.device) -> str:
    """The device's product name: what is measured on one holds for the others of its kind."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return _processor() if device.type == "cpu" else device.type


@lru_cache(maxsize=1)
def _processor() -> str:
    try:
        facts = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        facts = ""
    named = re.search(r"^model name\s*:\s*(\S.*)$", facts, re.MULTILINE)
    return named[1].strip() if named else platform.processor() or platform.machine()


def _known(device: torch.device, backend: str) -> Crossover:
    if device.type == "cpu":
        return _CPU
    place = backend if backend in _GPUS[9] else None
    if device.type == "cuda":
        found = _GPUS.get(torch.cuda.get_device_capability(device)[0])
        if found is not None:
            return found[place]
    return replace(_GPUS[9][place], is_measured=False)


def _entries(path: Path) -> dict[str, dict[str, Any]]:
    """The table's entries, by device and backend."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        if table["format"] != _FORMAT:
            raise ValueError("another format")
        for entry in (entry for kinds in table["devices"].values() for entry in kinds.values()):
            if type(entry["tokens"]) is not int or entry["tokens"] < 0:
                raise ValueError("no number of tokens")
            if not isinstance(entry["source"], str):
                raise TypeError("no source")
            if "width" in entry and (type(entry["width"]) is not int or entry["width"] < 1):
                raise ValueError("no width")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(
            f"{printable(path)} is no table of crossovers ({printable(error)}): remove it, and "
            "measure again with sp tune"
        ) from error
    return table["devices"]
