"""Factors → modules: a tensorized layer acts exactly like the dense layer with the rebuilt kernel.

The parameters are the factors, whatever the path (see `tspc.links`). Two forms, chosen by the method:

- `Chain`: its children are ordinary convolutions (or dense layers) whose weights are the factors. On the path "chain"
  it is but a sequence of them;
- `Contracted`: the factors are a list of matrices, from which the kernels of the path are contracted.

Kernels that are contracted from factors follow them in training. In eval mode they are contracted once and kept, until
the factors change. Both forms show `weight` (rebuilt, differentiable), `bias` and the plain attributes (`in_features`,
`stride`, …) of the layer they replace, so that code which reads them keeps working.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from tspc.decompositions import Decomposition, Factors, Metric, Rank, Shape
from tspc.dense import DenseLayer, Form, as_weight, kernel_of, kernel_shape, shown_by
from tspc.links import CHAIN, REBUILT, Stage, contracted, paths_of, stages_of

_is_tracing: Callable[[], bool] = torch.jit.is_tracing  # pyright: ignore[reportPrivateImportUsage]
_is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", lambda: False)


class TensorizedLayer(nn.Module):
    """What all tensorized layers share: the decomposition, the dense kernel's shape, the rank, the path."""

    decomposition: Decomposition
    shape: Shape
    rank: Rank
    kind: str
    shown: dict[str, Any]
    """The attributes of the dense layer, which this one has, too."""
    _kept: tuple[Tensor, ...] | None
    """In eval mode: the kernels of the path's stages. Neither a parameter nor a buffer, so that it is not saved."""

    def _prepare(self, layer: DenseLayer, decomposition: Decomposition, rank: Rank, path: str | None) -> None:
        self.form = Form.of(layer)
        self.kind, self.shape = self.form.kind, kernel_shape(layer)
        self.decomposition, self.rank = decomposition, rank
        self._kept, self._kept_of = None, None
        self.shown = {key: value for key, value in shown_by(layer).items() if not hasattr(self, key)}
        vars(self).update(self.shown)
        self.register_load_state_dict_post_hook(_after_loading)
        self.path = path or default_path(layer, decomposition)

    @property
    def path(self) -> str:
        """How the layer computes; may be set to another of `paths`."""
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
        """The convolutions that the path runs."""
        return list(self._stages)

    @property
    def runs_factors(self) -> bool:
        """Whether the path takes the factors as they are, so that there is nothing to contract."""
        return False

    @property
    def kept(self) -> tuple[Tensor, ...]:
        """Kernels that were contracted for inference and take memory beside the factors; may be none."""
        return self._kept or ()

    def forget(self) -> None:
        """Lets go of the kept kernels, until they are wanted again."""
        self._kept, self._kept_of = None, None

    def factor_parameters(self) -> list[nn.Parameter]:
        """The parameters that hold the factors, in the order of the decomposition."""
        raise NotImplementedError

    def factor_tensors(self) -> list[Tensor]:
        """The factors, in the order of the decomposition: the parameters, or views of them."""
        raise NotImplementedError

    def factors(self) -> Factors:
        return Factors(tuple(self.factor_tensors()), self.shape, self.rank)

    @property
    def weight(self) -> Tensor:
        """The dense weight that the factors stand for, in the shape that the dense layer had; differentiable."""
        return as_weight(self.decomposition.reconstruct(self.factors()), self.kind)

    def kernels(self) -> tuple[Tensor, ...]:
        """Those of the path's stages: kept ones where no gradient is asked for, else contracted from the factors."""
        if self.training or (self._needs_gradient() and not _is_exporting()):
            if self._kept is not None and not _is_tracing():
                self._kept = None  # a step may follow, which compiled code would not notice
            return self._contract()
        # Compiled code goes by what the modes and the loading of weights leave it.
        if not torch.compiler.is_compiling() and not _is_tracing() and self._kept_of != self._versions():
            self._keep()
        return self._contract() if self._kept is None else self._kept

    def forward(self, input: Tensor) -> Tensor:
        x = input  # the name by which a dense layer takes it
        last = len(self._stages) - 1
        bias = cast("Tensor | None", self.bias)
        for i, (stage, kernel) in enumerate(zip(self._stages, self.kernels(), strict=True)):
            x = self.form.run(stage, x, kernel, bias if i == last else None)
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
        """Without the kept kernels: a pickle is as small as the factors."""
        return self.__dict__ | {"_kept": None, "_kept_of": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._keep()

    def _contract(self) -> tuple[Tensor, ...]:
        # A kernel's entries are sums of products of several factors: autocast would round each of them.
        factors = self.factors()
        with torch.autocast(factors.tensors[0].device.type, enabled=False):
            found = contracted(self.decomposition, factors, self._path)
        return tuple(self.form.ready(kernel) for kernel in found)

    def _keep(self) -> None:
        """Contracts the kernels for inference; forgets them in training mode."""
        self.forget()
        tensors = list(self.parameters())
        if self.training or self.runs_factors or not tensors or tensors[0].is_meta:
            return
        # What is kept may later be used outside inference mode.
        with torch.inference_mode(False), torch.no_grad():
            versions = self._versions()
            if versions is not None:
                self._kept, self._kept_of = tuple(kernel.detach() for kernel in self._contract()), versions

    def _versions(self) -> tuple[Any, ...] | None:
        """Changes with every change of the factors; None where that cannot be told."""
        try:
            return tuple((p.data_ptr(), p._version, p.dtype) for p in self.parameters())
        except RuntimeError:  # inference tensors, and those of function transforms
            return None

    def _needs_gradient(self) -> bool:
        return torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())

    def extra_repr(self) -> str:
        return f"{self.decomposition.name}, shape={self.shape}, rank={self.rank}, path={self.path}"


def _is_ordinary(weight: Any) -> bool:
    return type(weight) in (Tensor, nn.Parameter)


def _after_loading(layer: TensorizedLayer, *_: Any) -> None:
    layer._keep()


class Chain(TensorizedLayer, nn.Sequential):
    """Convolutions (or dense layers) in sequence, or merged ones in their stead; the last one carries the bias."""

    def __init__(self, layer: DenseLayer, decomposition: Decomposition, rank: Rank, path: str | None = None) -> None:
        nn.Sequential.__init__(self, *_chain_links(layer, decomposition, rank))
        self._prepare(layer, decomposition, rank, path)

    @property
    def runs_factors(self) -> bool:
        # Tensors of other kinds, such as quantised ones, may know no more than to be a layer's weight.
        return self._path == CHAIN or any(not _is_ordinary(link.weight) for link in self)

    def forward(self, input: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return nn.Sequential.forward(self, input) if self.runs_factors else TensorizedLayer.forward(self, input)

    def factor_parameters(self) -> list[nn.Parameter]:
        return [cast(nn.Parameter, link.weight) for link in self]

    def factor_tensors(self) -> list[Tensor]:
        weights: list[Tensor] = [*self.factor_parameters()]
        return [weight.unsqueeze(2) for weight in weights] if self.kind == "conv1d" else weights

    @property
    def bias(self) -> nn.Parameter | None:
        return cast("nn.Parameter | None", self[-1].bias)


def _chain_links(layer: DenseLayer, decomposition: Decomposition, rank: Rank) -> list[nn.Module]:
    """Modules whose weights are the factors; see `Form.run` for why they give the layer's output."""
    form, shape = Form.of(layer), kernel_shape(layer)
    stages = stages_of(decomposition, shape, rank, CHAIN)
    last = len(stages) - 1
    has_bias = layer.bias is not None
    return [form.module(stage, has_bias and i == last, **_like(layer)) for i, stage in enumerate(stages)]


class Contracted(TensorizedLayer):
    """A layer whose kernels are contracted from its factors, by default to the dense kernel."""

    bias: nn.Parameter | None

    def __init__(self, layer: DenseLayer, decomposition: Decomposition, rank: Rank, path: str | None = None) -> None:
        super().__init__()
        shape = kernel_shape(layer)
        self._factor_shapes = decomposition.factor_shapes(shape, rank)
        # Stored as matrices: `model.to(memory_format=torch.channels_last)` takes any 4- or 5-way parameter for images.
        matrices = [(math.prod(s[:-1]), s[-1]) for s in self._factor_shapes]
        self.factor_list = nn.ParameterList(torch.empty(m, **_like(layer)) for m in matrices)
        bias = layer.bias is not None
        self.register_parameter("bias", nn.Parameter(torch.empty(shape[0], **_like(layer))) if bias else None)
        self._prepare(layer, decomposition, rank, path)

    def factor_parameters(self) -> list[nn.Parameter]:
        return list(self.factor_list)

    def factor_tensors(self) -> list[Tensor]:
        return [matrix.view(s) for matrix, s in zip(self.factor_list, self._factor_shapes, strict=True)]


def _like(layer: DenseLayer) -> dict[str, Any]:
    return {"device": layer.weight.device, "dtype": layer.weight.dtype}


def is_chain(layer: nn.Module, decomposition: Decomposition) -> bool:
    """Whether the factors themselves are the kernels of a chain."""
    return Form.of(layer).groups == 1 and decomposition.chain_axes(kernel_shape(layer)) is not None


def default_path(layer: nn.Module, decomposition: Decomposition) -> str:
    """The path where nothing is known of the costs."""
    return CHAIN if is_chain(layer, decomposition) else REBUILT


def untrained(layer: DenseLayer, decomposition: Decomposition, rank: Rank, path: str | None = None) -> TensorizedLayer:
    """The tensorized form of `layer` with factors of the right shapes and arbitrary values.

    Factors are trained if the layer's weight is, the bias if its bias is. Raises ConfigError for a path that it does
    not have.
    """
    decomposition = decomposition.for_shape(kernel_shape(layer))
    form = Chain if is_chain(layer, decomposition) else Contracted
    result = form(layer, decomposition, rank, path)
    for factor in result.factor_parameters():
        factor.requires_grad_(layer.weight.requires_grad)
    if layer.bias is not None:
        cast(nn.Parameter, result.bias).requires_grad_(layer.bias.requires_grad)
    return result


def tensorize(
    layer: DenseLayer,
    decomposition: Decomposition,
    rank: Rank,
    *,
    kernel: Tensor | None = None,
    metric: Metric | None = None,
    path: str | None = None,
) -> TensorizedLayer:
    """Decomposes the kernel of `layer` and returns the layer that runs on the factors, in the same mode.

    Stride, padding (every mode), dilation, groups and bias are kept. `kernel` (see `tspc.dense.as_kernel`) is
    decomposed in the stead of the layer's own, where given, and `metric` is the norm to fit it in. Raises
    DecompositionError as `decompose` does, ConfigError for a path that the layer does not have.
    """
    decomposition = decomposition.for_shape(kernel_shape(layer))
    factors = decomposition.decompose(kernel_of(layer) if kernel is None else kernel, rank, metric)
    result = untrained(layer, decomposition, rank, path)
    with torch.no_grad():
        for own, value in zip(result.factor_tensors(), factors.tensors, strict=True):
            own.copy_(value)
        if layer.bias is not None:
            cast(nn.Parameter, result.bias).copy_(layer.bias)
    return result.train(layer.training)


def tensorized_layers(model: nn.Module) -> dict[str, TensorizedLayer]:
    """All tensorized layers of a network by name, in module order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, TensorizedLayer)}
