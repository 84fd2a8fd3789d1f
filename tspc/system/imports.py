"""Finds the function that a setting names by text."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

from tspc.errors import ConfigError


def named(text: str | None, setting: str) -> Any:
    """What `text`, as package.module:function, names; `setting` is the key that messages name, such as model.factory.

    A module in the current folder is found, too. Raises ConfigError if the text has another form, or if there is no
    such thing.
    """
    module_name, _, name = (text or "").partition(":")
    if not module_name or not name:
        raise ConfigError([f"{setting}={text!r}: expected package.module:function"])
    # `python -m tspc` finds a module in the current folder; the console script should find it, too.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        return getattr(importlib.import_module(module_name), name)
    except Exception as error:  # importing runs the user's code, which may raise anything
        raise ConfigError([f"{setting}={text!r} cannot be imported ({error}); is it on PYTHONPATH?"]) from error
