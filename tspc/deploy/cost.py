"""The cost of a forward pass besides time: operations, parameters, bytes, peak memory."""

from __future__ import annotations

import math
import weakref
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from tspc.deploy.programs import Inputs
from tspc.layers.forms import tensorized_layers
from tspc.store.state import tensor_state
from tspc.system.modes import whole_operations
from tspc.traversal.hooks import evaluating


@dataclass(frozen=True)
class Cost:
    """The cost of one forward pass in eval mode. `macs` (multiply-accumulates) are for a single input.

    `weight_bytes` counts parameters and buffers. `peak_bytes` adds the kernels that layers keep for inference, and the
    largest memory of the pass's tensors at one time, for the whole batch. On the CPU memory inside operations is not
    counted.
    """

    macs: int
    parameters: int
    weight_bytes: int
    peak_bytes: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def cost(model: nn.Module, inputs: Inputs) -> Cost:
    """The cost of `model` on a batch of `inputs`."""
    state = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensor_state(model).values()}
    weights = sum(state.values())
    with evaluating(model), whole_operations():
        with FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION) as counter:
            model(*(x[:1] for x in inputs))
        # Kernels that layers keep for inference are weights, too, while they run.
        storages = (t.untyped_storage() for layer in tensorized_layers(model).values() for t in layer.kept)
        kept = {s.data_ptr(): s.nbytes() for s in storages if s.data_ptr() not in state}
        peak = sum(kept.values()) + _peak(model, inputs)
    parameters = sum(p.numel() for p in model.parameters())
    return Cost(counter.get_total_flops() // 2, parameters, weights, weights + peak)


def _attention_flops(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    """Operations of softmax(q kᵀ) v for shapes (…, L, E), (…, S, E), (…, S, V)."""
    *lead, length, width = query
    return 2 * math.prod(lead) * length * key[-2] * (width + value[-1])


_CPU_ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}
"""PyTorch's counter knows the fused attention of GPUs only."""


def _peak(model: nn.Module, inputs: Inputs) -> int:
    device = inputs[0].device
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        model(*inputs)
        return torch.cuda.max_memory_allocated(device) - before
    with _Live() as live:
        model(*inputs)
    return live.peak


class _Live(TorchDispatchMode):
    """Counts the bytes of the tensors that exist at each time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {id(x.untyped_storage()) for x in _tensors((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            if id(storage) not in known and storage not in self._known:
                self._known.add(storage)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._gone, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def _gone(self, size: int) -> None:
        self.now -= size


def _tensors(values: Any) -> list[Tensor]:
    return [x for x in pytree.tree_leaves(values) if isinstance(x, Tensor)]
