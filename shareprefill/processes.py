"""Work in several processes: those that torchrun started, and workers that this one starts.

Workers are spawned, as a forked process cannot use CUDA. They end with the process that started
them, however that ends: they would wait, and hold their memory, for ever.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.context import SpawnContext
from typing import TYPE_CHECKING, Any, cast

import torch

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@contextmanager
def starting_workers() -> Iterator[SpawnContext]:
    """The way to start workers: they import nothing from the current folder that Python has itself.

    Each calls `end_with_parent` first.
    """
    name = "PYTHONSAFEPATH"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield multiprocessing.get_context("spawn")
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


def end_with_parent() -> None:
    """Lets a worker end when the process that started it is gone."""
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@dataclass(frozen=True)
class Processes:
    """The processes that torchrun started, this one among them, for work that divides into pieces.

    Attributes:
        rank: This process; 0 collects.
        size: All of them.
        group: A gloo group of them; None for one process alone.
    """

    rank: int = 0
    size: int = 1
    group: ProcessGroup | None = None

    def device(self, name: str) -> str:
        """The device for a process's model: with `auto`, each has a GPU of its own."""
        if self.size == 1 or name != "auto" or not torch.cuda.is_available():
            return name
        return f"cuda:{int(os.environ.get('LOCAL_RANK', self.rank)) % torch.cuda.device_count()}"

    def tell(self, value: Any = None) -> Any:
        """Gives process 0's value to all."""
        if self.group is None:
            return value
        told = [value]
        torch.distributed.broadcast_object_list(told, src=0, group=self.group)
        return told[0]

    def send(self, value: Any) -> None:
        """Sends a value to process 0, which `receive`s it."""
        torch.distributed.send_object_list([value], dst=0, group=self.group)

    def receive(self, rank: int) -> Any:
        """The next value that a process has sent."""
        received: list[Any] = [None]
        torch.distributed.recv_object_list(received, src=rank, group=self.group)
        return received[0]


@contextmanager
def launched() -> Iterator[Processes]:
    """The processes of a torchrun, joined for as long as the context lasts; otherwise one alone."""
    distributed = torch.distributed
    if not distributed.is_available() or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Processes()
        return
    joined = distributed.is_initialized()
    if not joined:
        distributed.init_process_group("gloo")
    group = cast("ProcessGroup", distributed.new_group(backend="gloo"))
    try:
        yield Processes(distributed.get_rank(), distributed.get_world_size(), group)
    finally:
        if not joined:
            distributed.destroy_process_group()
