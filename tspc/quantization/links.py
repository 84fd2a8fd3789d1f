"""The inputs of each link of a chain, from those of the layer, and links that are fitted to wanted outputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tspc.decompositions import Metric, Shape
from tspc.decompositions.metric import Rows

RIDGE = 1e-6
"""Added to the diagonal of normal equations, as a share of its mean."""


@dataclass(frozen=True)
class Inputs:
    """Rows of inputs of a link (m × channels × H × W), over the part of the window that no link has covered yet."""

    rows: Tensor

    whole: Tensor | None = None
    """The second moments of a whole patch, if they are known."""

    @classmethod
    def of_layer(cls, metric: Metric, shape: Shape) -> Inputs:
        """Rows whose second moments are those of the layer's inputs."""
        window, norm = (*shape[1:], 1, 1)[:3], metric.single()
        if isinstance(norm.inputs, Rows):
            return cls(norm.inputs.rows.reshape(-1, *window))
        return cls(norm.input_root.mT.reshape(-1, *window), norm.inputs)

    def moments(self, covered: str, is_depthwise: bool) -> Tensor:
        """The second moments of a link's patches: n × n, or for each channel of a depthwise link (channels × n × n)."""
        if self.whole is not None and covered == "hw" and not is_depthwise:
            return self.whole
        _, c, h, w = self.rows.shape
        size = (h if "h" in covered else 1) * (w if "w" in covered else 1)
        inner = self.rows.permute(0, *_places(covered, inside=False), 1, *_places(covered, inside=True))
        inner = inner.reshape(-1, c, size)
        if is_depthwise:
            by_channel = inner.transpose(0, 1)
            return by_channel.mT @ by_channel
        flat = inner.flatten(1)
        return flat.mT @ flat

    def after(self, kernel: Tensor, covered: str, is_depthwise: bool) -> Inputs:
        """The inputs of the next link: what this one returns. `kernel` is out × in of one group × H × W."""
        axes = "".join(axis for axis in "hw" if axis in covered)
        left = "".join(axis for axis in "hw" if axis not in covered)
        own = kernel.to(self.rows).reshape(*kernel.shape[:2], *(kernel.shape[2 + "hw".index(a)] for a in axes))
        if is_depthwise:
            found = torch.einsum(f"c{axes},mchw->mc{left}", own[:, 0], self.rows)
        else:
            found = torch.einsum(f"oc{axes},mchw->mo{left}", own, self.rows)
        for place, axis in enumerate("hw"):
            if axis in covered:
                found = found.unsqueeze(2 + place)
        return Inputs(found)

    def fitted(self, targets: Tensor, shape: Shape) -> Tensor:
        """The kernel of this shape, of a dense link over the whole window, whose outputs are nearest to `targets`."""
        rows = self.rows.flatten(1)
        gram = rows.mT @ rows
        gram.diagonal().add_((RIDGE * gram.diagonal().mean()).clamp(min=torch.finfo(gram.dtype).tiny))
        return torch.linalg.solve_ex(gram, rows.mT @ targets.to(rows)).result.mT.reshape(shape)


def _places(covered: str, inside: bool) -> list[int]:
    """The axes of the window that a link covers, or does not cover, in `Inputs.rows`."""
    return [2 + place for place, axis in enumerate("hw") if (axis in covered) == inside]
