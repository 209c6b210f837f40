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
class LayerSizes:
    """What a process computes in a model's layer, of those with attention.

    Attributes:
        heads: Query heads.
        head_dim: Their dimension.
        parameters: Of the layer's matrices, as far as one token meets them, the mean over layers;
            None where only attention is known.
        hidden: Channels of the hidden state.
    """

    heads: int
    head_dim: int
    parameters: int | None = None
    hidden: int = 0

    @property
    def width(self) -> int:
        """Query heads times their dimension."""
        return self.heads * self.head_dim


@dataclass(frozen=True)
class LayerTimes:
    """What a whole layer takes, in seconds.

    Attributes:
        host: The host, where attention is sparse, for a length that it has not seen. While it
            prepares a layer, the device works on earlier ones: a device that is done sooner waits.
        parameter: The device, for a token and a parameter.
        channel: The device, for a token and a channel of the hidden state: norms, activations.
        pair: The device in dense attention, for a query row, a key and a channel of all heads.
    """

    host: float
    parameter: float
    channel: float
    pair: float

    def dense(self, sizes: LayerSizes, rows: int, keys: int) -> float:
        """Seconds that a dense layer of so many last rows of so many keys takes the device."""
        pairs = rows * (2 * keys - rows) / 2
        return rows * self._token(sizes) + pairs * sizes.width * self.pair

    def least_tokens(self, sizes: LayerSizes) -> int:
        """Tokens of the shortest prompt whose dense layers take the device as long as the host.

        0 where the layer's matrices are not known.
        """
        if sizes.parameters is None:
            return 0
        # The larger root of half * tokens^2 + token * tokens = host.
        half, token = sizes.width * self.pair / 2, self._token(sizes)
        return math.ceil(2 * self.host / (token + math.sqrt(token**2 + 4 * half * self.host)))

    def _token(self, sizes: LayerSizes) -> float:
        """Seconds of a token, without attention."""
        return (sizes.parameters or 0) * self.parameter + sizes.hidden * self.channel


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
        times: Of whole layers, where the host of small ones takes longer than the device; None
            where it was not measured.
    """

    tokens: int
    density: float
    source: str
    is_measured: bool = True
    width: int | None = None
    times: LayerTimes | None = None

    def tokens_of(self, sizes: LayerSizes) -> int:
        """Keys below which a prefill runs dense, of a model with such layers."""
        by_host = 0 if self.times is None else self.times.least_tokens(sizes)
        return max(self._by_attention(sizes), by_host)

    def is_worth_it(self, rows: int, keys: int, sizes: LayerSizes) -> bool:
        """Whether so many last rows of so many keys are computed faster sparse.

        A whole prompt is so from `tokens_of` on. Where that is due to the work of dense attention,
        fewer rows than keys need as much of it: as many pairs of a row and a key. And the host must
        not take longer for a layer than dense ones take the device.
        """
        least = self._by_attention(sizes)
        if self.width is None:
            is_less_work = keys >= least
        else:
            is_less_work = rows * (2 * keys - rows) >= least**2
        if not is_less_work or self.times is None or sizes.parameters is None:
            return is_less_work
        return self.times.dense(sizes, rows, keys) >= self.times.host

    def or_from(self, tokens: int | None) -> Crossover:
        """From so many keys on instead, whatever the rows and the model; None: as it is."""
        if tokens is None:
            return self
        return replace(self, tokens=tokens, source="min_tokens", width=None, times=None)

    def _by_attention(self, sizes: LayerSizes) -> int:
        """Keys below which attention alone is not faster.

        Choosing patterns takes as long for heads of any number and size. So smaller ones need as
        much dense work as was measured: heads times dimension times the tokens' square.
        """
        if self.width is None or sizes.width >= self.width:
            return self.tokens
        return math.isqrt(self.tokens**2 * self.width // sizes.width)


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
    # benchmarks/measure_layers.py (docs/performance.md, "Whole layers").
    times=LayerTimes(host=3.0e-3, parameter=1.96e-15, channel=1.02e-10, pair=6.87e-15),
)
# In vLLM an 8B model gained 6 % at 8K and 19 % at 16K, and lost 1 % at 6K (docs/vllm.md).
_HOPPER_ENGINES = replace(
    _HOPPER, tokens=8192, source="one H200: vLLM 0.24, an 8B shape (docs/vllm.md)", times=None
)
# Not measured.
_HOPPER_STEPS = replace(_HOPPER_ENGINES, tokens=16384, source="no measurement of decode steps")
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
    times = known.times
    if times is not None and "host_ms" in entry:
        times = replace(times, host=entry["host_ms"] / 1e3)
    return Crossover(entry["tokens"], known.density, entry["source"], width=width, times=times)


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


def check_table(path: Path) -> None:
    """Checks that a table can be written, before what it is to hold is measured.

    Raises:
        DataError: the file is no such table, or cannot be written.
    """
    if kind_of(path) == "file":
        _entries(path)
    # A missing folder is made when there is something to be written.
    if kind_of(path.parent) is not None:
        with locked_output(path):
            pass


def saved_tokens(path: Path, device: torch.device, backend: str) -> int | None:
    """The keys that a table names for a device and a backend; None where it does not."""
    entries = _entries(path) if kind_of(path) == "file" else {}
    entry = entries.get(device_name(device), {}).get(backend)
    return None if entry is None else entry["tokens"]


def save_crossover(
    path: Path,
    device: torch.device,
    backend: str,
    tokens: int,
    source: str,
    rows: list[Any],
    width: int | None = None,
    host_ms: float | None = None,
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
        host_ms: Milliseconds that the host takes for a layer, as in `LayerTimes`; None where that
            was not measured.

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
        if host_ms is not None:
            of_device[backend]["host_ms"] = host_ms
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
            host = entry.get("host_ms", 1.0)
            if type(host) is not float or not 0 < host < math.inf:
                raise ValueError("no time of the host")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(
            f"{printable(path)} is no table of crossovers ({printable(error)}): remove it, and "
            "measure again with sp tune"
        ) from error
    return table["devices"]
