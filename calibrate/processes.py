"""Several processes that learn together: each on batches of its own, by one averaged gradient.

Nothing is wrapped: gradients are averaged where they lie, except those that FSDP2 has averaged and sharded already. In one process
every function here does nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as distributed
from torch import Tensor

from ..sharding import is_shard


def num_processes() -> int:
    """Processes that learn together; 1 outside ``torch.distributed``."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def rank() -> int:
    """Number of this process among them, from 0."""
    return distributed.get_rank() if num_processes() > 1 else 0


def average_gradients(parameters: Iterable[Tensor]) -> None:
    """Replace each gradient by its mean over the processes; a missing one counts as zero."""
    if num_processes() == 1:
        return
    for parameter in parameters:
        if is_shard(parameter):
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        sum_over_processes([parameter.grad])
        parameter.grad /= num_processes()


def sum_over_processes(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its sum over the processes. A CPU tensor goes over the accelerator where only that can be reached."""
    if num_processes() == 1:
        return
    for tensor in tensors:
        carrier = tensor
        if tensor.device.type == "cpu" and distributed.get_backend() == "nccl":
            carrier = tensor.to(torch.accelerator.current_accelerator())
        distributed.all_reduce(carrier)
        if carrier is not tensor:
            tensor.copy_(carrier)


def mean_over_processes(value: float) -> float:
    """The mean of a number over the processes."""
    total = torch.tensor(value, dtype=torch.float64, device="cpu")
    sum_over_processes([total])
    return float(total) / num_processes()


def of_first_process(value: Any) -> Any:
    """What the first process has: measured times, say, on which all must agree."""
    if num_processes() == 1:
        return value
    carrier = [value]
    distributed.broadcast_object_list(carrier, src=0)
    return carrier[0]


def of_all_processes(value: Any) -> list[Any]:
    """What each process has, by rank."""
    if num_processes() == 1:
        return [value]
    found = [None] * num_processes()
    distributed.all_gather_object(found, value)
    return found


def wait_for_all() -> None:
    """Until every process is here."""
    if num_processes() > 1:
        distributed.barrier()
