"""Several processes: how they divide a model, and work that comes in pieces."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch

from shareprefill.errors import UnsupportedError
from shareprefill.models import attention_layers
from shareprefill.runtime.tensor_parallel import HeadShard

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def head_shard(model: torch.nn.Module) -> HeadShard | None:
    """How a model's attention is divided over processes; None where it is not.

    Transformers' tensor parallelism (`tp_plan="auto"`) divides the projections of an attention
    module along its heads, contiguously: process r of S holds heads r * H / S and on.

    Args:
        model: A transformers decoder.

    Raises:
        UnsupportedError: its attention is divided over more than one dimension of a device mesh.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return None
    from torch.distributed.tensor import DTensor

    for layer in attention_layers(model):
        for parameter in layer.module.parameters():
            if isinstance(parameter, DTensor):
                dims = [i for i, p in enumerate(parameter.placements) if _divides(parameter, i, p)]
                if len(dims) > 1:
                    raise UnsupportedError(
                        "attention that is divided over several dimensions of a device mesh is not "
                        "supported: use tensor parallelism alone (tp_plan='auto')"
                    )
                if dims:
                    mesh = parameter.device_mesh
                    return HeadShard(
                        mesh.get_local_rank(dims[0]), mesh.size(dims[0]), mesh.get_group(dims[0])
                    )
    return None


def _divides(parameter: Any, dim: int, placement: Any) -> bool:
    """Whether a mesh dimension divides a parameter for good: FSDP gathers it before its use."""
    names = parameter.device_mesh.mesh_dim_names
    sharded = names is not None and "fsdp" in names[dim]
    return placement.is_shard() and not sharded and parameter.device_mesh.size(dim) > 1


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
