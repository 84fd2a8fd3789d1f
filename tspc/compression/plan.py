"""`Plan` and its rows: what will happen to every layer. It can be printed and saved before anything is changed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tspc import decompositions
from tspc.compression.beside_rows import Beside, lines
from tspc.decompositions import Decomposition, Method, Rank, Shape
from tspc.quantization.grids import FULL, VECTOR_BYTES, factor_bytes

FINAL = "final layer"
"""The reason why the network's last layer stays dense."""
PARAMETERS, BYTES = "parameters", "bytes"
UNITS = (PARAMETERS, BYTES)
"""What a budget counts."""
TABLE = "Embedding"
"""The kind of a row about a table of embeddings."""
SLOWER = "no path is faster"
"""The reason why a layer that shares the budget stays dense when the objective is speed."""


@dataclass(frozen=True)
class LayerPlan:
    """What happens to one convolution or dense layer, or to a table of embeddings.

    `dense_params` and `params` count the kernel (or its factors) and the bias. `method` and `rank` are None if the
    layer stays dense. `reason` then says which rule keeps it dense, and is None if the allocation chose it.

    `error` is ‖K − K̂‖/‖K‖, known once the layer is decomposed. `output_error` is the relative root mean square error
    of the layer's output against the reference's: first the expected one, from the error curves, then the measured one.
    `note` names a problem of the decomposition. `path` says how a tensorized layer computes, see `tspc.layers.chains`.
    `bits` is the width of the factors' entries; with fewer than 32 they lie on grids, see `tspc.quantization`.
    A layer that is not tensorized may have 16 bits beside layers on grids; its numbers are then float16.
    `entry_bytes` are those of a number of the network. With `has_narrow_bias` the bias has 16 bits beside such factors.
    With `is_whole` the only form of the layer is its whole kernel, in few bits.
    """

    name: str
    kind: str
    shape: Shape
    dense_params: int
    params: int
    method: Decomposition | None = None
    rank: Rank | None = None
    reason: str | None = None
    error: float | None = None
    output_error: float | None = None
    note: str | None = None
    path: str | None = None
    bits: int = FULL
    entry_bytes: int = 4
    has_narrow_bias: bool = True
    is_whole: bool = False

    @property
    def is_table(self) -> bool:
        """Whether the layer is a table of embeddings, which has no inputs and no ranks."""
        return self.kind == TABLE

    @property
    def is_on_grids(self) -> bool:
        """Whether the entries of the layer's factors, or of its whole kernel, are integers of a few bits."""
        return self.method is not None and self.bits != FULL

    @property
    def kernel_params(self) -> int:
        """Entries of the dense kernel, without the bias."""
        return math.prod(self.shape)

    @property
    def bias_params(self) -> int:
        return self.dense_params - self.kernel_params

    @property
    def dense_bytes(self) -> int:
        """Bytes of the kernel and the bias in the network's number format."""
        return self.entry_bytes * self.dense_params

    @property
    def bytes(self) -> int:
        """Bytes of the factors with the scales of their grids, and of the bias."""
        if self.method is None or self.rank is None:
            return (self.entry_bytes if self.bits == FULL else VECTOR_BYTES) * self.dense_params
        shapes = self.method.factor_shapes(self.shape, self.rank)
        factors = sum(factor_bytes(shape, self.bits, self.entry_bytes) for shape in shapes)
        return factors + self.method.basis_bytes(self.shape) + self.bias_size(BYTES)

    def size(self, unit: str) -> int:
        """The parameters or the bytes after, with the bias."""
        return self.bytes if unit == BYTES else self.params

    def dense_size(self, unit: str) -> int:
        """The parameters or the bytes before, with the bias."""
        return self.dense_bytes if unit == BYTES else self.dense_params

    def bias_size(self, unit: str) -> int:
        """The parameters or the bytes of the bias, after."""
        is_narrow = self.is_on_grids and self.has_narrow_bias
        entry_bytes = min(self.entry_bytes, VECTOR_BYTES) if is_narrow else self.entry_bytes
        return entry_bytes * self.bias_params if unit == BYTES else self.bias_params

    @property
    def compensates(self) -> bool:
        """Whether a layer that stays dense may still correct the errors of the layers before it."""
        return self.reason in (None, FINAL, SLOWER) and not self.is_table

    @property
    def ranks(self) -> str:
        """Method and ranks, without the width; or why the layer stays dense."""
        if self.method is None or not self.rank:
            return f"dense: {self.reason or 'the budget allows it'}"
        return f"{self.method.name} {', '.join(map(str, self.rank))}"

    @property
    def factors(self) -> str:
        """What the layer becomes: method, ranks and width, or why it stays dense."""
        width = "" if self.bits == FULL else f" in {self.bits} bits"
        if self.method is None or self.rank is None:
            return self.ranks + width
        return (self.ranks if self.rank else self.method.name) + width

    @property
    def form(self) -> str:
        """The same as `factors`, with the path if there is a choice. A whole kernel has one path only."""
        return f"{self.factors}, {self.path}" if self.rank and self.path is not None else self.factors

    def __str__(self) -> str:
        shape = "×".join(map(str, self.shape))
        note = "" if self.note is None else f" ({self.note})"
        sizes = f"{self.dense_params:,} → {self.params:,} parameters"
        if self.bits < FULL:
            sizes = f"{self.dense_bytes:,} → {self.bytes:,} bytes"
        return f"{self.name} {self.kind} {shape}: {self.form}, {sizes}{note}"

    def to_dict(self) -> dict[str, Any]:
        plain = ("name", "kind", "dense_params", "params", "reason", "error", "output_error", "note", "path", "bits")
        plain += ("entry_bytes", "has_narrow_bias", "is_whole")
        rank = None if self.rank is None else list(self.rank)
        method = None if self.method is None else self.method.to_dict()
        return {k: getattr(self, k) for k in plain} | {"shape": list(self.shape), "rank": rank, "method": method}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> LayerPlan:
        method = None if data["method"] is None else decompositions.decomposition_from_dict(data["method"])
        rank = None if data["rank"] is None else tuple(data["rank"])
        return cls(**data | {"shape": tuple(data["shape"]), "rank": rank, "method": method})


def error_of(layers: Sequence[LayerPlan]) -> float | None:
    """Root mean square of the output errors of some layers; None if one is unknown."""
    errors = [layer.output_error for layer in layers]
    known = [error for error in errors if error is not None]
    return math.sqrt(sum(e * e for e in known) / len(known)) if len(known) == len(errors) else None


@dataclass(frozen=True)
class Plan:
    """Ranks for a whole network at one rate. `layers` also lists the layers that stay dense.

    `rate` is the ceiling that the user gave, or that was found for a target error; it counts parameters or bytes
    (`rate_unit`). `promise` is what the whole network took when it was timed with random factors, if there is a limit
    on the time: the `limit`, the `runtime`, `batch` and `threads`, and `dense_seconds` and `seconds` for a batch.
    `network_dense_bytes` are the bytes of the network's parameters and buffers before, and
    `beside_saved` those by which what lies beside the `layers` becomes smaller. The parameters named in `kept` keep
    their numbers. `judged` is what held-out inputs said of the network in phase 0, if there is a limit on the drop.
    `beside` has the other modules with parameters, so that all rows together count every parameter once; a plan of an
    earlier version has none of them.
    """

    method: Method
    rate: float
    rate_decay: str
    rate_scope: str
    allocation: str
    layers: tuple[LayerPlan, ...]
    network_dense_params: int
    objective: str = "parameters"
    rate_unit: str = PARAMETERS
    network_dense_bytes: int = 0
    beside_saved: int = 0
    kept: tuple[str, ...] = ()
    judged: dict[str, Any] | None = None
    promise: dict[str, Any] | None = None
    beside: tuple[Beside, ...] = ()

    @property
    def budgeted(self) -> tuple[LayerPlan, ...]:
        """The layers that share the budget: they are tensorized, or could have been."""
        return tuple(layer for layer in self.layers if layer.reason in (None, SLOWER))

    @property
    def tensorized(self) -> tuple[LayerPlan, ...]:
        return tuple(layer for layer in self.layers if layer.method is not None)

    @property
    def counts_bytes(self) -> bool:
        """Whether sizes are told in bytes: the budget counts them, or entries have fewer than 32 bits."""
        return self.rate_unit == BYTES or any(layer.bits < FULL for layer in self.layers)

    @property
    def paths(self) -> dict[str, int]:
        """For each path the number of tensorized layers that take it; whole kernels have no choice."""
        chosen = Counter(layer.path for layer in self.tensorized if layer.rank and layer.path is not None)
        return dict(chosen.most_common())

    @property
    def dense_params(self) -> int:
        """Parameters of the layers that share the budget, before."""
        return sum(layer.dense_params for layer in self.budgeted)

    @property
    def params(self) -> int:
        """Parameters of the layers that share the budget, after."""
        return sum(layer.params for layer in self.budgeted)

    @property
    def dense_bytes(self) -> int:
        """Bytes of the layers that share the budget, before, in float32."""
        return sum(layer.dense_bytes for layer in self.budgeted)

    @property
    def bytes(self) -> int:
        """Bytes of the layers that share the budget, after."""
        return sum(layer.bytes for layer in self.budgeted)

    @property
    def network_params(self) -> int:
        """Parameters of the whole network after."""
        return self.network_dense_params - self.dense_params + self.params

    @property
    def rate_reached(self) -> float:
        """Parameters or bytes after ÷ before, counted over `rate_scope`; never above `rate`."""
        if self.rate_unit == BYTES:
            return self.bytes_reached
        if self.rate_scope == "network":
            return self.network_params / self.network_dense_params
        return self.params / self.dense_params

    @property
    def network_bytes(self) -> int:
        """Bytes of the whole network's parameters and buffers after."""
        before = self.network_dense_bytes or 4 * self.network_dense_params  # of a plan of an earlier version
        return before - sum(layer.dense_bytes - layer.bytes for layer in self.layers) - self.beside_saved

    @property
    def bytes_reached(self) -> float:
        """Bytes after ÷ before, counted over `rate_scope`."""
        if self.rate_scope == "network":
            return self.network_bytes / (self.network_dense_bytes or 4 * self.network_dense_params)
        return self.bytes / self.dense_bytes

    @property
    def output_error(self) -> float | None:
        """Root mean square of the output errors of the layers that share the budget; None if one is unknown."""
        return error_of(self.budgeted)

    def __str__(self) -> str:
        totals = [f"layers in budget: {self.dense_params:,} → {self.params:,} parameters"]
        if self.counts_bytes:
            totals.append(f"network: {self.network_dense_bytes:,} → {self.network_bytes:,} bytes")
        return "\n".join([*map(str, self.layers), *map(str, lines(self.beside)), *totals])

    def to_dict(self) -> dict[str, Any]:
        plain = ("rate", "rate_decay", "rate_scope", "allocation", "network_dense_params", "objective")
        plain += ("rate_unit", "network_dense_bytes", "beside_saved")
        rows = {key: [row.to_dict() for row in getattr(self, key)] for key in ("layers", "beside")}
        plan = {k: getattr(self, k) for k in plain} | rows
        found = {"promise": self.promise, "judged": self.judged}
        judged = {key: value for key, value in found.items() if value is not None}
        return plan | {"method": self.method.to_dict(), "kept": list(self.kept)} | judged

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Plan:
        layers, kept = tuple(LayerPlan.from_dict(layer) for layer in data["layers"]), tuple(data.get("kept", ()))
        beside = tuple(Beside.from_dict(row) for row in data.get("beside", ()))
        method = decompositions.from_dict(data["method"])
        saved = data.get("beside_saved", data.get("vectors_saved", 0))  # the second is its name in an earlier version
        plain = {key: value for key, value in data.items() if key != "vectors_saved"}
        rows = {"layers": layers, "beside": beside}
        return cls(**plain | rows | {"method": method, "kept": kept, "beside_saved": saved})
