"""What other packages do anew for each command and each file, and the tests in one process need only once.

The settings of every command are still composed as Hydra composes them, and every file is written as PyTorch writes
it. A process of its own has none of this.
"""

from __future__ import annotations

import copy
import io
import pickle
import sys
from collections.abc import Callable
from typing import Any

import pytest


def remembering(make: Callable[[str], Any]) -> Callable[[str], Any]:
    """The function, which makes an object from a text; for a text that it knows it gives a copy of the first one."""
    known: dict[str, bytes] = {}

    def made(text: str) -> Any:
        if text not in known:
            known[text] = pickle.dumps(make(text))
        return pickle.loads(known[text])

    return made


def make_hydra_quick(patch: pytest.MonkeyPatch) -> None:
    """Files of the same text are read once, an argument is parsed once, and no sweep is looked for in vain."""
    from hydra._internal.hydra import Hydra
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from omegaconf import OmegaConf

    read, parse, mode_of = OmegaConf.load, OverridesParser.parse_rule, Hydra.get_mode
    of_text = remembering(lambda text: read(io.StringIO(text)))
    override = remembering(lambda text: parse(OverridesParser.create(), text, "override"))

    def load(file: Any) -> Any:
        return of_text(file.read()) if hasattr(file, "read") else read(file)

    def parsed(parser: OverridesParser, text: str, rule: str) -> Any:
        return override(text) if rule == "override" else parse(parser, text, rule)

    def get_mode(self: Hydra, config_name: str | None, overrides: list[str]) -> Any:
        """Composes all settings for it only where an option or a setting of Hydra's own may name one."""
        may_name_one = any(argument.startswith("-") or "hydra" in argument for argument in sys.argv[1:])
        return mode_of(self, config_name, overrides) if may_name_one else None

    patch.setattr(OmegaConf, "load", staticmethod(load))
    patch.setattr(OverridesParser, "parse_rule", parsed)
    patch.setattr(Hydra, "get_mode", get_mode)


def make_onnx_quick(patch: pytest.MonkeyPatch) -> None:
    """The sources of the operators are parsed once, not for each file, which takes a second."""
    import torch

    write = torch.onnx.export
    known: dict[Any, Any] = {}

    def export(*given: Any, **named: Any) -> Any:
        from torch.onnx._internal.exporter._registration import ONNXRegistry

        if not known:
            read = ONNXRegistry.from_torchlib
            patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(lambda **asked: registry(read, asked)))
        return write(*given, **named)

    def registry(read: Callable[..., Any], asked: dict[str, Any]) -> Any:
        key = tuple(sorted(asked.items()))
        if key not in known:
            known[key] = read(**asked)
        found = copy.copy(known[key])
        found.functions = {name: list(functions) for name, functions in found.functions.items()}
        return found

    patch.setattr(torch.onnx, "export", export)
