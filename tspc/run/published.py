"""What the network and the data of a run say of each other, before either is built."""

from __future__ import annotations

import dataclasses
from functools import lru_cache
from pathlib import Path

from tspc.data import BYTES, Data, TextSpec, tokenizer_of
from tspc.models import NetworkSpec, class_names, with_fields
from tspc.run.config import Config


def with_own_classes(config: Config) -> Config:
    """The configuration with the names that a network in a folder, or on the hub, gives its classes.

    So a label stands for the answer that the network means by it. Names that the user gave stay. Raises ConfigError if
    the network's configuration cannot be read.
    """
    data = config.dataset
    if not isinstance(data, TextSpec) or config.network.family != "transformers" or not _is_published(config):
        return config
    names = class_names(config.network.name, config.network.kwargs)  # also tells what is wrong with the folder
    if data.task != "text_classification" or data.classes is not None or config.pretrained == "random":
        return config
    return dataclasses.replace(config, dataset=dataclasses.replace(data, classes=names))


def _is_published(config: Config) -> bool:
    name = config.network.name
    return "/" in name or Path(name).is_dir()


def with_tokens(spec: NetworkSpec, config: Config) -> NetworkSpec:
    """A new network for texts gets the vocabulary and the marks of the tokenizer, where the user says nothing else.

    A network from a folder or the hub keeps its own. Raises ConfigError or DataError if the type or the tokenizer is
    not there.
    """
    data = config.dataset
    if spec.family != "transformers" or not isinstance(data, TextSpec) or _is_published(config):
        return spec
    kwargs = with_fields(spec.name, spec.kwargs, _tokens(data.tokenizer or BYTES))
    return dataclasses.replace(spec, kwargs=kwargs)


@lru_cache(maxsize=4)
def _tokens(name: str) -> dict[str, int]:
    tokenizer = tokenizer_of(name)
    return {"vocab_size": tokenizer.size} | {f"{mark}_token_id": number for mark, number in tokenizer.marks.items()}


def guessed_order(config: Config, data: Data | None) -> str | None:
    """A warning if nothing says which answer of a published network stands for which label; else None."""
    classes = getattr(data, "classes", ())
    spec = config.dataset
    if config.pretrained != "default" or config.network.family != "transformers" or not isinstance(spec, TextSpec):
        return None
    if not classes or spec.classes is not None or classes == tuple(map(str, range(len(classes)))):
        return None
    shown = ", ".join(f"{number}={name}" for number, name in enumerate(classes[:8]))
    return (
        f"{config.network.name} does not name its classes: its answers are taken as {shown}, sorted by name; "
        "if this is wrong, give the right order: dataset.classes=[FIRST,SECOND]"
    )
