"""The base of all tensorized layers: the path that runs, kept kernels, the attributes of the dense layer."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from tspc.decompositions import Decomposition, Factors, Rank, Shape
from tspc.errors import WeightsError
from tspc.layers.chains import Stage, contracted, paths_of, stages_of
from tspc.layers.convolutions import Form
from tspc.layers.dense import TRANSPOSED, DenseLayer, as_weight, kernel_shape, shown_by
from tspc.quantization.grids import FULL, Grid, row_count

BASIS = "basis"
"""The name of the buffer with the basis of `id`."""

is_tracing: Callable[[], bool] = torch.jit.is_tracing  # pyright: ignore[reportPrivateImportUsage]
_TracerWarning: type[Warning] = torch.jit.TracerWarning  # pyright: ignore[reportPrivateImportUsage]
_is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", lambda: False)


class TensorizedLayer(nn.Module):
    """The base class of tensorized layers, with the decomposition, the dense kernel's shape, the rank and the path."""

    decomposition: Decomposition
    shape: Shape
    rank: Rank
    kind: str
    bits: int = FULL
    """The width of the factors' entries. With fewer than 32 bits the layer computes with values on grids."""
    shown: dict[str, Any]
    """The plain attributes of the dense layer; this layer has them, too."""
    _kept: tuple[Tensor, ...] | None
    """In eval mode the kernels of the path's stages. They are no parameters or buffers, so they are not saved."""

    def _prepare(self, layer: DenseLayer, decomposition: Decomposition, rank: Rank, path: str) -> None:
        self.form = Form.of(layer)
        self.kind, self.shape = self.form.kind, kernel_shape(layer)
        self.decomposition, self.rank = decomposition, rank
        self._kept, self._kept_of = None, None
        self.shown = {key: value for key, value in shown_by(layer).items() if not hasattr(self, key)}
        vars(self).update(self.shown)
        self.register_load_state_dict_post_hook(_after_loading)
        self.path = path

    @property
    def path(self) -> str:
        """How the layer computes; it can be set to one of `paths`."""
        return self._path

    @path.setter
    def path(self, path: str) -> None:
        self._path = path
        self._stages = stages_of(self.decomposition, self.shape, self.rank, path, self.form.groups)
        self._keep()

    @property
    def paths(self) -> list[str]:
        return paths_of(self.decomposition, self.shape, self.rank, self.form.groups)

    @property
    def stages(self) -> list[Stage]:
        """The convolutions of the path, in order."""
        return list(self._stages)

    @property
    def runs_factors(self) -> bool:
        """Whether the path uses the factors themselves, without a contraction."""
        return False

    @property
    def kept(self) -> tuple[Tensor, ...]:
        """Kernels that were contracted for inference; they take memory besides the factors. Empty if there are none."""
        return self._kept or ()

    def forget(self) -> None:
        """Frees the kept kernels; they are contracted again when they are needed."""
        self._kept, self._kept_of = None, None

    def factor_parameters(self) -> list[nn.Parameter]:
        """The parameters that hold the factors, in the order of the decomposition."""
        raise NotImplementedError

    def factor_tensors(self) -> list[Tensor]:
        """The factors, in the order of the decomposition: the parameters, or views of them."""
        raise NotImplementedError

    def as_parameters(self, factors: Sequence[Tensor]) -> list[Tensor]:
        """Other factors as the values of `factor_parameters`."""
        return [factor.reshape(own.shape) for factor, own in zip(factors, self.factor_parameters(), strict=True)]

    def factors(self) -> Factors:
        """The factors that the layer computes with; on their grids, if it has any. Differentiable."""
        tensors = self.factor_tensors()
        if self.bits != FULL:
            tensors = [grid.straight_through(f) for grid, f in zip(self.grids, tensors, strict=True)]
        return Factors(tuple(tensors), self.shape, self.rank, self._buffers.get(BASIS))

    @property
    def grids(self) -> list[Grid]:
        """The grid of each factor; empty with 32 bits."""
        count = 0 if self.bits == FULL else len(self.factor_parameters())
        return [Grid(self.bits, _as_float(self.get_buffer(scales_of(i)))) for i in range(count)]

    def put_on_(self, grids: Sequence[Grid]) -> None:
        """From now on the layer computes with the values on these grids, one for each factor, that are nearest."""
        self.bits = grids[0].bits
        for i, grid in enumerate(grids):
            scales = grid.scales.detach().to(self.factor_parameters()[i].device, torch.float32)
            # Their bits as whole numbers: `half` and the like would round floating-point numbers.
            self.register_buffer(scales_of(i), scales.clone().view(torch.int32))
        self.path = self.path

    def make_room_for_grids_(self, bits: int) -> None:
        """Puts the factors on grids of this width whose scales are 1; a state that is loaded then has the scales."""
        counts = [row_count(tuple(factor.shape)) for factor in self.factor_tensors()]
        self.put_on_([Grid(bits, torch.ones(count)) for count in counts])

    @torch.no_grad()
    def take_off_grids_(self) -> None:
        """The factors become the values that the layer computes with, as floating-point numbers."""
        values = self.factors().tensors
        for i, (own, value) in enumerate(zip(self.factor_tensors(), values, strict=True)):
            own.copy_(value)
            if self.bits != FULL:
                delattr(self, scales_of(i))
        self.bits = FULL
        self.path = self.path

    @property
    def weight(self) -> Tensor:
        """The dense weight that the factors represent, in the shape of the dense layer's weight; differentiable."""
        kernel = self.decomposition.reconstruct(self.factors())
        return as_weight(kernel, self.kind, self.form.groups, self.form.window)

    def kernels(self) -> tuple[Tensor, ...]:
        """The kernels of the path's stages: kept ones if no gradient is needed, else contracted from the factors.

        A trace of `torch.jit` always contains the contraction, because the tracer runs twice and compares.
        """
        if is_tracing():
            with warnings.catch_warnings():  # of sizes that become constants: the factors' do not change
                warnings.simplefilter("ignore", _TracerWarning)
                return self._contract()
        if self.training or (self._needs_gradient() and not _is_exporting()):
            if self._kept is not None:
                self._kept = None  # a step may follow, which compiled code would not notice
            return self._contract()
        # Compiled code goes by what the modes and the loading of weights leave it.
        if not torch.compiler.is_compiling() and self._kept_of != self._versions():
            self._keep()
        return self._contract() if self._kept is None else self._kept

    def forward(
        self, input: Tensor | None = None, output_size: Sequence[int] | None = None, x: Tensor | None = None
    ) -> Tensor:
        """The output of the layer. PyTorch's layers call the argument `input`, those of transformers `x`.

        A transposed convolution also takes the `output_size`, as PyTorch's does: it chooses among the sizes that the
        stride leaves open. Raises ValueError for another size, and TypeError if the layer is of another kind.
        """
        x = cast(Tensor, x if input is None else input)
        if isinstance(x, torch.fx.Proxy):
            return as_one_node(self, (x,) if output_size is None else (x, output_size))
        if output_size is None:
            return self._run(x)
        if self.kind not in TRANSPOSED:
            raise TypeError(f"a layer of the kind {self.kind} takes no output_size")
        return self._run(x, self.form.map_size(output_size, x))

    def _run(self, x: Tensor, size: Shape | None = None) -> Tensor:
        """Runs the convolutions of the path in order. `size` is that of the output's map, if it was asked for."""
        last = len(self._stages) - 1
        bias = cast("Tensor | None", self.bias)
        for i, (stage, kernel) in enumerate(zip(self._stages, self.kernels(), strict=True)):
            x = self.form.run(stage, x, kernel, bias if i == last else None, size)
        return x

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        self._keep()
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self._keep()
        return self

    def __getstate__(self) -> dict[str, Any]:
        """The state without the kept kernels, so that a pickle is as small as the factors."""
        return self.__dict__ | {"_kept": None, "_kept_of": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._keep()

    def _contract(self) -> tuple[Tensor, ...]:
        # A kernel's entries are sums of products of several factors; autocast would round each product.
        factors = self.factors()
        with torch.autocast(factors.tensors[0].device.type, enabled=False):
            found = contracted(self.decomposition, factors, self._path)
        return tuple(self.form.ready(kernel, stage) for kernel, stage in zip(found, self._stages, strict=True))

    def _keep(self) -> None:
        """Contracts the kernels in eval mode; frees them in training mode."""
        self.forget()
        tensors = list(self.parameters())
        if self.training or self.runs_factors or not tensors or tensors[0].is_meta:
            return
        # The kept kernels may later be used outside inference mode.
        with torch.inference_mode(False), torch.no_grad():
            versions = self._versions()
            if versions is not None:
                self._kept, self._kept_of = tuple(kernel.detach() for kernel in self._contract()), versions

    def _versions(self) -> tuple[Any, ...] | None:
        """A value that changes when a factor changes; None if changes cannot be detected."""
        try:
            return tuple((p.data_ptr(), p._version, p.dtype) for p in (*self.parameters(), *self.buffers()))
        except RuntimeError:  # inference tensors, and those of function transforms
            return None

    def _needs_gradient(self) -> bool:
        return torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())

    def extra_repr(self) -> str:
        bits = "" if self.bits == FULL else f", bits={self.bits}"
        return f"{self.decomposition.name}, shape={self.shape}, rank={self.rank}, path={self.path}{bits}"


def _as_float(bits: Tensor) -> Tensor:
    """The float32 numbers with these bits. The tracer of `torch.jit` knows no `view` of another dtype: a constant."""
    if is_tracing():
        return torch.from_numpy(bits.detach().cpu().numpy().view("float32")).to(bits.device)
    return bits.view(torch.float32)


def scales_of(factor: int) -> str:
    """The name of the buffer with a factor's scales."""
    return f"scales_{factor}"


def as_one_node(layer: nn.Module, given: tuple[Any, ...], named: dict[str, Any] | None = None) -> Any:
    """The layer in a graph of `torch.fx`: one call, as the dense layer is, whose kernels follow its modes."""
    named, tracer = named or {}, given[0].tracer
    if layer._forward_hooks or layer._forward_pre_hooks:  # the graph has what they do; the module would do it again
        module = tracer.create_proxy("get_attr", tracer.path_of_module(layer), (), {})
        return tracer.create_proxy("call_function", _forward, (module, *given), named)
    return tracer.create_proxy("call_module", tracer.path_of_module(layer), given, named)


def _forward(layer: nn.Module, *given: Any, **named: Any) -> Any:
    return layer.forward(*given, **named)


def _after_loading(layer: TensorizedLayer, *_: Any) -> None:
    basis, method = layer._buffers.get(BASIS), layer.decomposition
    if basis is not None and not basis.is_meta and not method.is_basis(basis, layer.shape, layer.rank):
        raise WeightsError(
            f"the basis of a layer by {method.name} of shape {layer.shape} is damaged; load another state"
        )
    layer._keep()
