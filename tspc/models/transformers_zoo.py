"""Networks of Hugging Face's transformers: classifiers of images or texts, from a configuration or a folder."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tspc.errors import ConfigError, WeightsError
from tspc.system import extras


class Classifier(nn.Module):
    """Returns only the logits, as every other network does.

    The input is the network's first argument: images (N, C, H, W) or token numbers (N, L).
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    @property
    def dummy_inputs(self) -> dict[str, Tensor]:
        """The inputs on which transformers itself tries the network."""
        return self.network.dummy_inputs  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x).logits


def transformers_network(
    name: str,
    num_classes: int,
    in_channels: int,
    image_size: int | None,
    pretrained: bool,
    kwargs: dict[str, Any],
    folders: bool = True,
) -> nn.Module:
    """A classifier. `name` is a model type (`vit`, `bert`), a folder with a configuration, or a name on a hub.

    Without `folders` only model types are accepted. `kwargs` are fields of the configuration. `pretrained` reads the
    weights from the folder or the hub; nothing there is executed. Raises ConfigError, also if transformers is missing,
    or WeightsError.
    """
    extras.require("transformers", "model=transformers")
    from transformers import AutoModelForImageClassification as ImageClassifier
    from transformers import AutoModelForSequenceClassification as TextClassifier
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING as OF_IMAGES

    config = _configuration(name, pretrained, kwargs, folders)
    kind = ImageClassifier if type(config) in OF_IMAGES else TextClassifier
    try:
        config.num_labels = num_classes
        config.architectures = config.architectures or []  # where there is a choice, None is iterated over
        for field, value in (("num_channels", in_channels), ("image_size", image_size)):
            if hasattr(config, field) and field not in kwargs and value is not None:
                _set_size(config, field, value)
        if pretrained:
            return Classifier(kind.from_pretrained(name, config=config, trust_remote_code=False))
        return Classifier(kind.from_config(config, trust_remote_code=False))
    except OSError as error:
        raise WeightsError(f"pretrained=default: {_first_line(error)}; pass pretrained=FILE or random") from error
    except Exception as error:  # each network has its own checks, and some need other packages
        raise ConfigError([f"transformers cannot build {name} with {kwargs}: {_first_line(error)}"]) from error


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
        if "/" not in name and not Path(name).is_dir():  # before the hub is asked, which takes long where there is none
            raise ValueError("a network of the hub is named OWNER/NAME")
        return AutoConfig.from_pretrained(name, trust_remote_code=False, **kwargs)
    except (OSError, ValueError, TypeError, KeyError) as error:
        near = difflib.get_close_matches(name, list(CONFIG_MAPPING), n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else _first_line(error)
        raise ConfigError(
            [f"model.name={name!r} is no model type of transformers, and no folder or hub's name; {hint}"]
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
