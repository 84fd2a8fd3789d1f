"""Networks of Hugging Face's transformers for each task, from a configuration or a folder."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from tspc.errors import ConfigError, TspcError, WeightsError, shortened, some
from tspc.models.transformers_tasks import (
    Classifier,
    Features,
    LanguageModel,
    Regression,
    SentenceEmbeddings,
    Speech,
    Wrapped,
    pooling_of,
)
from tspc.system import extras

TASKS = (
    *("image_classification", "text_classification", "sentence_embeddings", "language_modelling"),
    *("speech", "regression", "custom"),
)
"""What a network can be built for."""
OF_CLASSES = (None, "image_classification", "text_classification")
"""The tasks whose networks have as many outputs as there are classes."""


def transformers_network(
    name: str,
    num_classes: int | None,
    in_channels: int,
    image_size: int | None,
    pretrained: bool,
    kwargs: dict[str, Any],
    folders: bool = True,
    task: str | None = None,
) -> nn.Module:
    """A network for a task. `name` is a model type (`vit`, `bert`), a folder with a configuration, or a name on a hub.

    Without a `task` it classifies images, or texts if its type takes none. `regression` is a classifier of texts with
    one output. `language_modelling` predicts the next token, or masked tokens if the folder says so or the type is that
    of an encoder. `speech` has an encoder and a decoder, or an encoder alone (CTC). `sentence_embeddings` pools as the
    folder says, else by the mean. `custom` is the network without a head. Each takes the network's own arguments; what
    it returns is told in `transformers_tasks`.

    Without `folders` only model types are accepted. `kwargs` are fields of the configuration. `pretrained` reads the
    weights from the folder or the hub; nothing there is executed. Raises ConfigError, also if transformers is missing,
    or WeightsError, also if weights are missing there that the answer needs.
    """
    extras.require("transformers", "model=transformers")
    if task not in (None, *TASKS):
        raise ConfigError([f"task={task!r}: choose one of {', '.join(TASKS)}"])
    config = _configuration(name, pretrained, kwargs, folders)
    settings = pooling_of(name) if task == "sentence_embeddings" and folders else {}
    outputs = getattr(config, "num_labels", None)
    try:
        kind, wrapper = _classes(config, task)
        if task in OF_CLASSES:
            config.num_labels = num_classes
        elif task == "regression":
            config.num_labels, config.problem_type = 1, "regression"
        config.architectures = config.architectures or []  # where there is a choice, None is iterated over
        for field, value in (("num_channels", in_channels), ("image_size", image_size)):
            if hasattr(config, field) and field not in kwargs and value is not None:
                _set_size(config, field, value)
        if pretrained:
            network = _published(kind, name, config, outputs, wrapper, task)
        else:
            network = kind.from_config(config, trust_remote_code=False)
    except TspcError:
        raise
    except OSError as error:
        raise WeightsError(f"pretrained=default: {_first_line(error)}; pass pretrained=FILE or random") from error
    except Exception as error:  # each network has its own checks, and some need other packages
        wanted = f"{name} for task={task}" if task else name
        raise ConfigError([f"transformers cannot build {wanted} with {kwargs}: {_first_line(error)}"]) from error
    return wrapper(network, **settings)


def _classes(config: Any, task: str | None) -> tuple[Any, type[Wrapped]]:
    """The class of transformers that builds the network, and the wrapper around it."""
    import transformers as hf
    from transformers.models.auto import modeling_auto as auto

    own, told = type(config), " ".join(config.architectures or ())
    if task is None:
        task = "image" if own in auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING else "text_classification"
    if task == "language_modelling":
        is_causal, is_masked = own in auto.MODEL_FOR_CAUSAL_LM_MAPPING, own in auto.MODEL_FOR_MASKED_LM_MAPPING
        masked = is_masked and not ("CausalLM" in told or "LMHead" in told or getattr(config, "is_decoder", False))
        return (hf.AutoModelForMaskedLM if masked or not is_causal else hf.AutoModelForCausalLM), LanguageModel
    if task == "speech":
        has_decoder = own in auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING and "CTC" not in told
        return (hf.AutoModelForSpeechSeq2Seq if has_decoder else hf.AutoModelForCTC), Speech
    kinds: dict[str, tuple[Any, type[Wrapped]]] = {
        "text_classification": (hf.AutoModelForSequenceClassification, Classifier),
        "regression": (hf.AutoModelForSequenceClassification, Regression),
        "sentence_embeddings": (hf.AutoModel, SentenceEmbeddings),
        "custom": (hf.AutoModel, Features),
    }
    return kinds.get(task, (hf.AutoModelForImageClassification, Classifier))


def class_names(name: str, kwargs: dict[str, Any]) -> tuple[str, ...] | None:
    """The names that a network in a folder, or on the hub, gives its classes, by their numbers; None if it gives none.

    Raises ConfigError if the configuration cannot be read.
    """
    extras.require("transformers", "model=transformers")
    named = getattr(_configuration(name, False, kwargs, folders=True), "id2label", None) or {}
    found = tuple(str(named[number]) for number in sorted(named))
    is_usual = all(label == f"LABEL_{number}" for number, label in enumerate(found))
    return None if is_usual or len(found) < 2 or len(set(found)) < len(found) else found


def with_fields(name: str, kwargs: dict[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """`kwargs` with those of `more` that a type of network knows; what `kwargs` has already stays."""
    extras.require("transformers", "model=transformers")
    config = _configuration(name, False, {}, folders=False)
    return {key: value for key, value in more.items() if hasattr(config, key)} | kwargs


def _published(kind: Any, name: str, config: Any, outputs: int | None, wrapper: type[Wrapped], task: Any) -> nn.Module:
    """The network with its published weights, `outputs` in the last layer.

    Raises WeightsError for weights that are missing, which transformers would draw at random, or of other shapes.
    """
    import transformers as hf

    verbosity = hf.logging.get_verbosity()
    hf.logging.set_verbosity_error()  # what it reports is told below
    try:
        network, told = kind.from_pretrained(
            name, config=config, trust_remote_code=False, output_loading_info=True, ignore_mismatched_sizes=True
        )
    finally:
        hf.logging.set_verbosity(verbosity)
    wanted = f"task={task}" if task else "this data set"
    if told["mismatched_keys"]:
        key, there, here = min(told["mismatched_keys"], key=str)
        if outputs is not None and outputs != config.num_labels:
            apart = f"{name} gives {outputs} values for an input, {wanted} needs {config.num_labels}"
            raise WeightsError(f"pretrained=default: {apart}; name a network with as many")
        shapes = f"{tuple(there)} in {name}, and {tuple(here)} in the network of these settings"
        raise WeightsError(f"pretrained=default: {key} has the shape {shapes}; leave out model.kwargs that change it")
    missing = sorted(key for key in told["missing_keys"] if not any(part in key for part in wrapper.may_lack))
    if missing:
        raise WeightsError(
            f"pretrained=default: {name} has no weights for {some(missing, 4)}, so its answers for {wanted} would be "
            "random; name a network that was trained for this"
        )
    return network


def _set_size(config: Any, field: str, value: int) -> None:
    """One number, or one for each side where the configuration has a list of them."""
    usual = getattr(config, field)
    setattr(config, field, [value] * len(usual) if isinstance(usual, list | tuple) else value)


def _configuration(name: str, pretrained: bool, kwargs: dict[str, Any], folders: bool) -> Any:
    from transformers import CONFIG_MAPPING, AutoConfig

    try:
        if name in CONFIG_MAPPING and not (folders and Path(name).is_dir()):
            if pretrained:
                raise ConfigError(
                    [f"pretrained=default: {name} is a type of network; name a folder or a network of the hub"]
                )
            return AutoConfig.for_model(name, **kwargs)
        if not folders:
            raise ValueError("it is no type")
        if name.startswith(("/", "./", "../", "~")) and not Path(name).is_dir():
            raise ValueError("there is no such folder")
        if "/" not in name and not Path(name).is_dir():  # before the hub is asked, which takes long where there is none
            raise ValueError("a network of the hub is named OWNER/NAME")
        return AutoConfig.from_pretrained(name, trust_remote_code=False, **kwargs)
    except (OSError, ValueError, TypeError, KeyError) as error:
        if folders and Path(name).is_dir():
            raise ConfigError(
                [f"model.name={name}: its config.json cannot be used ({shortened(str(error), 200)})"]
            ) from error
        near = difflib.get_close_matches(name, list(CONFIG_MAPPING), n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else _first_line(error)
        raise ConfigError(
            [f"model.name={name!r} is no model type of transformers, and no folder or hub's name; {hint}"]
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
