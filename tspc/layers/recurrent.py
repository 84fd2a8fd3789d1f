"""PyTorch's recurrent networks with their matrices as dense layers, which can then be measured and tensorized.

A run uses PyTorch's own kernel for whole sequences, with the rebuilt matrices; in eval mode they are kept. If a layer
has hooks, it is called, too: once for each pass, with all its inputs. The results are the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from tspc.layers.attention import as_linear
from tspc.layers.chains import REBUILT
from tspc.layers.dense import shown_by
from tspc.layers.tensorized import TensorizedLayer, as_one_node, is_tracing

_VF: Any = torch._VF  # pyright: ignore[reportPrivateImportUsage]


class Recurrent(nn.RNNBase):
    """The part that `LSTM`, `GRU` and `RNN` share. The layers are called `ih_l0`, `hh_l0`, `ih_l0_reverse` and so on.

    Other parameters, the projections of an LSTM, stay parameters of the module. `weight_ih_l0` and the like are rebuilt
    where other code reads them.
    """

    def __init__(self, recurrent: nn.RNNBase) -> None:
        """`recurrent` has parameters of its own; the new layers have the same ones."""
        nn.Module.__init__(self)
        vars(self).update(shown_by(recurrent))
        vars(self).update(_flat_weights_names=[], _flat_weight_refs=[], _all_weights=recurrent._all_weights)
        self._kept: list[Tensor] | None = None
        self._kept_of: Any = None
        own = dict(recurrent.named_parameters(recurse=False))
        for name, weight, bias in matrices_of(recurrent):
            self.add_module(name, as_linear(own.pop(weight), own.pop(bias, None)))
            self.get_submodule(name).is_read = True  # type: ignore[assignment]
        for name, parameter in own.items():
            self.register_parameter(name, parameter)
        self.training = recurrent.training

    def forward(self, input: Any, hx: Any = None) -> Any:
        """The arguments and results are those of PyTorch's module."""
        if isinstance(input, torch.fx.Proxy):
            return as_one_node(self, (input, hx))
        if not any(part._forward_hooks or part._forward_pre_hooks for part in self.children()):
            return super().forward(input, hx)
        return self._observed(input, hx)

    @property
    def _flat_weights(self) -> list[Tensor]:  # type: ignore[override]
        """All matrices and biases, in the order of PyTorch's kernels; kept in eval mode if no gradient is needed."""
        needs_gradient = torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())
        if self.training or needs_gradient or is_tracing():
            self._kept, self._kept_of = None, None
            return self._gathered()
        if torch.compiler.is_compiling():
            return self._gathered() if self._kept is None else self._kept
        versions = self._versions()
        if self._kept is None or versions is None or self._kept_of != versions:
            with torch.inference_mode(False), torch.no_grad():
                self._kept, self._kept_of = [weight.detach() for weight in self._gathered()], versions
        return self._kept

    def _gathered(self) -> list[Tensor]:
        return [getattr(self, name) for names in self._all_weights for name in names]

    def _versions(self) -> tuple[Any, ...] | None:
        try:
            tensors = (*self.parameters(), *self.buffers())
            return tuple((x.data_ptr(), x._version, x.dtype) for x in tensors)
        except RuntimeError:  # inference tensors, and those of function transforms
            return None

    def __getattr__(self, name: str) -> Any:
        kind, _, rest = name.partition("_")
        part = self.__dict__.get("_modules", {}).get(rest) if kind in ("weight", "bias") else None
        if part is None:
            return super().__getattr__(name)
        return rebuilt(part) if kind == "weight" else part.bias

    def _observed(self, input: Any, hx: Any) -> Any:
        """The same as `forward`, layer by layer, with calls of the dense layers."""
        packed: Any = input if isinstance(input, PackedSequence) else None
        is_batched = packed is not None or cast(Tensor, input).dim() == 3
        x: Any = packed.data if packed is not None else input if is_batched else cast(Tensor, input)[None]
        if packed is None and is_batched and not self.batch_first:
            x = x.transpose(0, 1)
        states = self._states(x, packed, hx, is_batched)
        ends: list[tuple[Tensor, ...]] = []
        count = 1 + self.bidirectional
        for layer in range(self.num_layers):
            own = tuple(state[layer * count : (layer + 1) * count] for state in states)
            x, *end = self._layer(layer, x, own, None if packed is None else packed.batch_sizes)
            ends.append(tuple(end))
            if layer + 1 < self.num_layers:
                x = F.dropout(x, self.dropout, self.training)
        found = tuple(torch.cat(parts) for parts in zip(*ends, strict=True))
        if packed is not None:
            x = packed._replace(data=x)
            found = tuple(self._permuted(state, packed.unsorted_indices) for state in found)
        elif not is_batched:
            x, found = x.squeeze(0), tuple(state.squeeze(1) for state in found)
        elif not self.batch_first:
            x = x.transpose(0, 1).contiguous()
        return x, found if self.mode == "LSTM" else found[0]

    def _states(self, x: Tensor, packed: PackedSequence | None, hx: Any, is_batched: bool) -> tuple[Tensor, ...]:
        """The first hidden state, and of an LSTM the first cell state (layers and directions × batch × length)."""
        if hx is None:
            batch = len(x) if packed is None else int(packed.batch_sizes[0])
            widths = (self.proj_size or self.hidden_size, self.hidden_size)[: 1 + (self.mode == "LSTM")]
            count = self.num_layers * (1 + self.bidirectional)
            dtype = self._gathered()[0].dtype if torch.is_autocast_enabled(x.device.type) else x.dtype
            return tuple(torch.zeros(count, batch, width, dtype=dtype, device=x.device) for width in widths)
        states = hx if self.mode == "LSTM" else (hx,)
        if packed is not None:
            return tuple(self._permuted(state, packed.sorted_indices) for state in states)
        return tuple(state if is_batched else state.unsqueeze(1) for state in states)

    @staticmethod
    def _permuted(state: Tensor, order: Tensor | None) -> Tensor:
        return state if order is None else state.index_select(1, order)

    def _layer(self, layer: int, x: Tensor, states: tuple[Tensor, ...], sizes: Tensor | None) -> tuple[Tensor, ...]:
        """Output and last states of one layer of the network, with calls of its dense layers.

        The inputs of the recurrent matrices follow from the output of PyTorch's kernel. For gradients the kernel runs
        again, from what the dense layers return: the inputs' share enters it through identity matrices, and the
        recurrent share through a difference that is zero. So gradients come to each output as in a run step by step.
        """
        cells = [Cell.of(self, layer, suffix) for suffix in ("", "_reverse")[: 1 + self.bidirectional]]
        with torch.no_grad():
            result = self._kernel([w for cell in cells for w in cell.weights], x.detach(), states, sizes)
        width = states[0].shape[-1]
        inputs = []
        for i, cell in enumerate(cells):
            before = _before(result[0][..., i * width : (i + 1) * width], states[0][i].detach(), sizes, i > 0)
            inputs.append((cell.ih(x), cell.hh(before)))
        if not torch.is_grad_enabled():
            return result
        like = states[0]
        joined = torch.cat([self._with_share(given.to(like), back.to(like)) for given, back in inputs], -1)
        weights = []
        for i, cell in enumerate(cells):
            gates = len(cell.weights[0])
            eye = torch.zeros(gates, joined.shape[-1]).to(like)
            eye[:, i * gates : (i + 1) * gates] = torch.eye(gates).to(like)
            weights += cell.with_identity(eye)
        return self._kernel(weights, joined, states, sizes)

    def _with_share(self, given: Tensor, back: Tensor) -> Tensor:
        """What the inputs give to the gates, plus a zero whose gradients are those of the recurrent share."""
        zero = back - back.detach()
        if self.mode == "GRU":  # the reset gate is a factor of the recurrent share of the last third
            reset, *_ = (given + back).detach().chunk(3, -1)
            *first, last = zero.chunk(3, -1)
            zero = torch.cat([*first, last * reset.sigmoid()], -1)
        return given + zero

    def _kernel(
        self, weights: list[Tensor], x: Tensor, states: tuple[Tensor, ...], sizes: Tensor | None
    ) -> tuple[Tensor, ...]:
        """PyTorch's kernel for one layer; returns the output, and the last states."""
        run = getattr(_VF, self.mode.lower())
        first = states if self.mode == "LSTM" else states[0]
        common = weights, self.bias, 1, 0.0, self.training, self.bidirectional
        return run(x, sizes, first, *common) if sizes is not None else run(x, first, *common, True)

    def flatten_parameters(self) -> None:
        """Does nothing: the kernels' weights are rebuilt, and lie where they are made."""

    def _init_flat_weights(self) -> None:
        self._kept, self._kept_of = None, None

    def _weights_have_changed(self) -> bool:
        return False

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": None, "_kept_of": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        nn.Module.__setstate__(self, state)

    def _replicate_for_data_parallel(self) -> Any:
        return nn.Module._replicate_for_data_parallel(self)


class LSTM(Recurrent, nn.LSTM):
    """An `nn.LSTM` with its matrices as layers."""


class GRU(Recurrent, nn.GRU):
    """An `nn.GRU` with its matrices as layers."""


class RNN(Recurrent, nn.RNN):
    """An `nn.RNN` with its matrices as layers."""


class Cell(NamedTuple):
    """One direction of one layer: the dense layers, and all its tensors in the order of PyTorch's kernels."""

    ih: nn.Module
    hh: nn.Module
    weights: list[Tensor]

    @classmethod
    def of(cls, network: Recurrent, layer: int, suffix: str) -> Cell:
        ih, hh = (network.get_submodule(f"{kind}_l{layer}{suffix}") for kind in ("ih", "hh"))
        names = next(names for names in network._all_weights if names[0] == f"weight_ih_l{layer}{suffix}")
        return cls(ih, hh, [getattr(network, name) for name in names])

    def with_identity(self, eye: Tensor) -> list[Tensor]:
        """The tensors for inputs that are shares of the gates already; gradients come through the dense layers."""
        first, back, *rest = self.weights
        if len(rest) > 1:  # the bias of the inputs is in their share
            rest = [torch.zeros_like(rest[0]), rest[1].detach(), *rest[2:]]
        return [eye.to(first), back.detach(), *rest]


def _before(outputs: Tensor, first: Tensor, sizes: Tensor | None, is_reverse: bool) -> Tensor:
    """The hidden state before each step, from the states after each step (N × L × length, or packed)."""
    if sizes is None:
        first = first.unsqueeze(1)
        return torch.cat([outputs[:, 1:], first] if is_reverse else [first, outputs[:, :-1]], 1)
    counts = [int(size) for size in sizes]
    steps = list(outputs.split(counts))
    if is_reverse:  # a sequence begins at its own end
        after = [*steps[1:], outputs[:0]]
        return torch.cat(
            [torch.cat([step, first[len(step) : count]]) for step, count in zip(after, counts, strict=True)]
        )
    return torch.cat([step[:count] for step, count in zip([first, *steps[:-1]], counts, strict=True)])


def is_read(layer: nn.Module) -> bool:
    """Whether the kernel of sequences reads the matrix of a dense layer, and the layer itself is not run."""
    return getattr(layer, "is_read", False) is True


def rebuilt(layer: nn.Module) -> Tensor:
    """The matrix of a dense or tensorized layer; the one that the layer keeps, if it keeps it."""
    if isinstance(layer, TensorizedLayer) and layer.path == REBUILT:
        return layer.kernels()[0]
    return cast(Tensor, layer.weight)


def matrices_of(recurrent: nn.RNNBase) -> Iterator[tuple[str, str, str]]:
    """For each matrix the name of its layer, and the names of its weight and its bias."""
    for names in recurrent._all_weights:
        for weight in names[:2]:
            own = weight.removeprefix("weight_")
            yield own, weight, f"bias_{own}"
