"""Several processes that work on one network together: the rank of this one, and what they do together.

`torchrun --nproc_per_node=N -m tspc …` or `accelerate launch -m tspc …` start them. With one process everything here
does nothing. They share the run's directory: the first process writes, and the others read its files.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from tspc.errors import TspcError
from tspc.system import launch
from tspc.system.launch import is_first

PATIENCE = timedelta(hours=12)
"""How long processes wait for each other; meanwhile the first one may train a reference or decompose."""

_TOLD = "_is_told_to_all_processes"
"""An attribute of errors that all processes know of."""

_is_shared: ContextVar[bool] = ContextVar("is_shared", default=False)
_is_alone: ContextVar[bool] = ContextVar("is_alone", default=False)

Item = TypeVar("Item")
Result = TypeVar("Result")


def count() -> int:
    """The number of processes; 1 for the one that works `alone`."""
    return dist.get_world_size() if dist.is_initialized() and not _is_alone.get() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


@dataclass(frozen=True)
class Share:
    """The part of every batch that this process takes: each `processes`-th image, from `process` on."""

    process: int = 0
    processes: int = 1

    def of(self, indices: Tensor) -> Tensor:
        return indices[self.process :: self.processes]


ALONE = Share()
"""One process takes everything."""


def own_device(device: torch.device) -> torch.device:
    """The GPU of this process, if there are several."""
    if count() > 1 and device.type == "cuda" and device.index is None:
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return device


def share() -> Share:
    """This process's part of every batch."""
    return Share(rank(), count())


def join(cpu: bool) -> None:
    """Connects the processes that the launcher started, if there are several; with `cpu` no GPU is used.

    Called once for all jobs of a sweep, because a second connection to the same address fails.
    """
    if launch.count() == 1 or dist.is_initialized():
        return
    # accelerate knows the launchers, and the backend that suits the device.
    from accelerate import PartialState

    PartialState(cpu=cpu, timeout=PATIENCE)
    atexit.register(dist.destroy_process_group)


def wait() -> None:
    """Waits until all processes have come here."""
    if count() > 1:
        dist.barrier()


def by_first(work: Callable[[], Result]) -> Result:
    """Runs `work` in the first process; all processes get its result. If it raises, the others raise TspcError.

    Meanwhile the others wait, so the first process works `alone`.
    """
    if count() == 1:
        return work()
    result = None
    with _telling():
        if is_first():
            with alone():
                result = work()
    return cast(Result, _agreed(result)[0])


@contextmanager
def sharing(is_on: bool = True) -> Iterator[None]:
    """Inside this context `spread` divides work among the processes, which must all enter it and do the same.

    An error in one process is raised in all: TspcError in the others, at the latest at the end of the context.
    """
    if count() == 1 or not is_on:
        yield
        return
    token = _is_shared.set(True)
    try:
        with _telling():
            yield
    finally:
        _is_shared.reset(token)
    _agreed(None)


@contextmanager
def alone() -> Iterator[None]:
    """Inside this context the process does all work itself, and exchanges nothing with the others."""
    token = _is_alone.set(True)
    try:
        yield
    finally:
        _is_alone.reset(token)


def is_shared() -> bool:
    """Whether `spread` divides work."""
    return count() > 1 and _is_shared.get()


def spread(
    items: Sequence[Item], size: Callable[[Item], float], work: Callable[[list[Item]], dict[str, Result]]
) -> dict[str, Result]:
    """What `work` returns for all items, in all processes. Inside `sharing` each process does a part of the items.

    The parts are of about the same total size. Results are sent as pickles: plain data, and tensors on the CPU.
    """
    if not is_shared():
        return work(list(items))
    with _telling():
        own = work(_part(items, size))
    found: dict[str, Result] = {}
    for others, results in _agreed((list(items), own)):
        if others != list(items):
            raise _told(TspcError("the processes do not have the same layers to share; give all the same arguments"))
        found |= results
    return found


def _part(items: Sequence[Item], size: Callable[[Item], float]) -> list[Item]:
    """The items of this process. Each item, the largest first, goes to the process that has the least to do."""
    loads, own = [0.0] * count(), []
    for item in sorted(items, key=size, reverse=True):
        free = loads.index(min(loads))
        loads[free] += size(item)
        if free == rank():
            own.append(item)
    return own


def _agreed(result: Any) -> list[Any]:
    """The results of all processes, by rank. If one of them has failed, raises TspcError with its message."""
    outcomes = _exchanged((result, None))
    for number, (_, failure) in enumerate(outcomes):
        if failure is not None:
            raise _told(TspcError(f"process {number}: {failure}"))
    return [result for result, _ in outcomes]


@contextmanager
def _telling() -> Iterator[None]:
    """Tells the other processes of an error, once. They learn of it where they exchange something the next time."""
    try:
        yield
    except BaseException as error:
        if not hasattr(error, _TOLD):
            _exchanged((None, str(_told(error)) or type(error).__name__))
        raise


def _told(error: BaseException) -> BaseException:
    setattr(error, _TOLD, True)
    return error


def _exchanged(outcome: Any) -> list[Any]:
    """What each process gives, by rank."""
    found = []
    for source in range(count()):
        sent = [outcome]
        dist.broadcast_object_list(sent, src=source)
        found.append(sent[0])
    return found


def summed(tensor: Tensor) -> Tensor:
    """The sum over all processes."""
    if count() > 1:
        dist.all_reduce(tensor)
    return tensor


def gathered(own: Tensor) -> Tensor:
    """The numbers (N) of all processes, those of the first one first; each may have another N."""
    if count() == 1:
        return own
    sizes = torch.zeros(count(), dtype=torch.long, device=own.device)
    sizes[rank()] = len(own)
    ends = summed(sizes).cumsum(0).tolist()
    found = torch.zeros(ends[-1], dtype=own.dtype, device=own.device)
    found[ends[rank()] - len(own) : ends[rank()]] = own
    return summed(found)


def together(network: nn.Module) -> nn.Module:
    """The network for training by all processes: its gradients are the mean over them."""
    if count() == 1:
        return network
    # The batch norms of all processes have the same statistics, so no buffer is sent.
    buffers = [name for name, _ in network.named_buffers()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(network, buffers)
    return DistributedDataParallel(network)


@contextmanager
def synchronised(network: nn.Module) -> Iterator[None]:
    """Inside this context batch norms in training mode use the statistics of the images of all processes."""
    norms = [m for m in network.modules() if isinstance(m, _BatchNorm)] if count() > 1 else []
    classes = [type(norm) for norm in norms]
    # PyTorch's own SyncBatchNorm is for GPUs only. The class alone changes: weights, buffers and hooks stay.
    for norm in norms:
        norm.__class__ = _SharedBatchNorm
    try:
        yield
    finally:
        for norm, cls in zip(norms, classes, strict=True):
            norm.__class__ = cls


class _Sum(torch.autograd.Function):
    """The sum over all processes, with gradients: the part of each process is in the losses of all."""

    @staticmethod
    def forward(context: Any, part: Tensor) -> Tensor:
        return summed(part.clone())

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return summed(gradient.clone())


class _SharedBatchNorm(_BatchNorm):
    """Mean and variance over the batch's parts in all processes."""

    def _check_input_dim(self, input: Tensor) -> None:
        pass

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        axes = [axis for axis in range(input.ndim) if axis != 1]
        view = [1, -1] + [1] * (input.ndim - 2)
        values = input.float()
        number = summed(torch.tensor(float(input.numel() // input.shape[1]), device=input.device))
        mean = _Sum.apply(values.sum(axes)) / number
        centred = values - mean.view(view)
        variance = _Sum.apply(centred.square().sum(axes)) / number
        self._follow(mean.detach(), variance.detach() * (number / (number - 1)))
        result = centred * (variance + self.eps).rsqrt().view(view)
        if self.affine:
            result = result * self.weight.view(view) + self.bias.view(view)
        return result.to(input.dtype)

    @torch.no_grad()
    def _follow(self, mean: Tensor, variance: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked += 1
        step = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean), step)
        self.running_var.lerp_(variance.to(self.running_var), step)
