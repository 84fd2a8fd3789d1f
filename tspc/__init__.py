"""tspc makes pretrained networks small by tensor decomposition (arXiv:1805.10352).

    small = tspc.compress(model, method="rcp", rate=0.1)
    tspc.save(small, "small.safetensors")
    model = tspc.load("small.safetensors", model=resnet50())

A name is imported when it is first used, so that `tspc --help` does not load PyTorch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tspc import decompositions as decompositions
    from tspc.calibration import Calibration as Calibration
    from tspc.calibration import Samples as Samples
    from tspc.compression.apply import apply_ as apply_
    from tspc.compression.compress import compress as compress
    from tspc.compression.compress import smallest as smallest
    from tspc.compression.folders import load as load
    from tspc.compression.folders import save as save
    from tspc.compression.plan import Plan as Plan
    from tspc.compression.planning import plan as plan
    from tspc.compression.settings import PlanSettings as PlanSettings
    from tspc.data.model_inputs import ModelInputs as ModelInputs
    from tspc.decompositions import CP as CP
    from tspc.decompositions import SVD as SVD
    from tspc.decompositions import Interpolative as Interpolative
    from tspc.decompositions import Reshaped as Reshaped
    from tspc.decompositions import TensorRing as TensorRing
    from tspc.decompositions import TensorTrain as TensorTrain
    from tspc.decompositions import Tucker as Tucker
    from tspc.deploy import export as export
    from tspc.deploy.folding import fold_batch_norms as fold_batch_norms
    from tspc.errors import TspcError as TspcError
    from tspc.errors import TspcWarning as TspcWarning

__version__ = "0.1.0"

_HOMES = {
    "Calibration": "calibration.samples",
    "Samples": "calibration.samples",
    "load": "compression.folders",
    "save": "compression.folders",
    "apply_": "compression.apply",
    "compress": "compression.compress",
    "smallest": "compression.compress",
    "ModelInputs": "data.model_inputs",
    "CP": "decompositions",
    "SVD": "decompositions",
    "Interpolative": "decompositions",
    "Reshaped": "decompositions",
    "TensorRing": "decompositions",
    "TensorTrain": "decompositions",
    "Tucker": "decompositions",
    "export": "deploy",
    "TspcError": "errors",
    "TspcWarning": "errors",
    "fold_batch_norms": "deploy.folding",
    "Plan": "compression.plan",
    "PlanSettings": "compression.settings",
    "plan": "compression.planning",
}

__all__ = [
    "CP",
    "SVD",
    "Calibration",
    "Interpolative",
    "ModelInputs",
    "Plan",
    "PlanSettings",
    "Reshaped",
    "Samples",
    "TensorRing",
    "TensorTrain",
    "TspcError",
    "TspcWarning",
    "Tucker",
    "__version__",
    "apply_",
    "compress",
    "decompositions",
    "export",
    "fold_batch_norms",
    "load",
    "plan",
    "save",
    "smallest",
]


def __getattr__(name: str) -> Any:
    if name == "decompositions":  # for methods of other packages
        return importlib.import_module("tspc.decompositions")
    if name not in _HOMES:
        raise AttributeError(f"module 'tspc' has no attribute {name!r}")
    return getattr(importlib.import_module(f"tspc.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
