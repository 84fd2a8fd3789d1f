"""Packages that only some uses need: `pip install 'tspc[NAME]'`."""

from __future__ import annotations

from importlib.util import find_spec

from tspc.errors import ConfigError

EXTRAS = {
    "datasets": ("datasets",),
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("openvino", "onnx", "onnxscript", "onnxruntime"),
    "timm": ("timm",),
    "transformers": ("transformers",),
}
"""For each extra the packages that it installs, by their import names."""


def missing(extra: str) -> str | None:
    """A line that says how to install `extra`; None if it is installed."""
    absent = [package for package in EXTRAS[extra] if find_spec(package) is None]
    return f"{', '.join(absent)} not installed: pip install 'tspc[{extra}]'" if absent else None


def require(extra: str, what: str) -> None:
    """Raises ConfigError, with the command that helps, if `what` needs packages that are not installed."""
    lack = missing(extra)
    if lack is not None:
        raise ConfigError([f"{what} needs the extra {extra}; {lack}"])
