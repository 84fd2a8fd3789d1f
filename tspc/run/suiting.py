"""Checks that the network takes the inputs of a task that is not about images, and that its answers suit the task."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tspc.data import Data, Given, ModelInputs, answer_of, called
from tspc.errors import ConfigError
from tspc.models import NetworkSpec
from tspc.run.config import Config
from tspc.training import Metric, Trial, measure, tried
from tspc.traversal.hooks import evaluating

CPU = torch.device("cpu")


def suited(model: nn.Module, data: Data, spec: NetworkSpec, config: Config, metric: Metric) -> Trial | None:
    """Runs two inputs through the network, and tries the task and the metric on its answers.

    Inputs that are images are tried in both memory layouts; of others the layout does not matter, and the result is
    None. Raises ConfigError if the network cannot take the inputs, or if its answers do not suit the task.
    """
    _check_tokens(model, data)
    inputs, targets = next(iter(data.test_batches(2, CPU, limit=2)))
    trial = None
    if isinstance(inputs, Tensor) and inputs.ndim == 4:
        trial = tried(model, inputs, trains=config.trains)
        inputs = inputs.contiguous(memory_format=trial.layout)
    answer = _answer(model, inputs, spec)
    if config.task.name == "language_modelling" and not getattr(config.dataset, "masked", 0.0):
        _check_order(model, inputs, answer, spec)
    with torch.random.fork_rng(devices=[]):
        if config.pretrained is None or "finetune" in config.phases or metric.each is not None:
            config.task.check_answer(answer, targets, data.num_classes, spec.name)
            if config.task.has_labels:
                config.task.loss_of(answer, targets)
        measure(metric, model, [(inputs, targets)], CPU, model, num_classes=data.num_classes)
    return trial


def _answer(model: nn.Module, inputs: Given, spec: NetworkSpec) -> Tensor:
    with torch.random.fork_rng(devices=[]), torch.no_grad(), evaluating(model):
        torch.manual_seed(0)
        try:
            output = called(model, inputs)
        except Exception as error:  # the network may be the user's own
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            told = (
                f"{spec.name} cannot take the data set's inputs, {_shown(inputs)}: {reason}{_of_length(model, inputs)}"
            )
            raise ConfigError([told]) from error
    answer = answer_of(output)
    if answer is None or not answer.ndim:
        raise ConfigError(
            [f"{spec.name} answers with {type(output).__name__}, in which there is no tensor to learn from"]
        )
    return answer


def _of_length(model: nn.Module, inputs: Given) -> str:
    """What to do if a network of transformers has fewer positions than the inputs have tokens."""
    configs = [getattr(module, "config", None) for module in model.modules()]
    most = next((n for n in (getattr(each, "max_position_embeddings", None) for each in configs) if n), None)
    tokens = inputs.first if isinstance(inputs, ModelInputs) else None
    if not isinstance(most, int) or tokens is None or tokens.ndim != 2 or tokens.shape[1] <= most:
        return ""
    return f"; it takes {most} tokens at most: set dataset.length={most}"


def _check_order(model: nn.Module, inputs: Given, answer: Tensor, spec: NetworkSpec) -> None:
    """Raises ConfigError if the answer to the first token depends on later ones: the network sees what is to come."""
    if not isinstance(inputs, ModelInputs) or inputs.first.shape[1] < 3 or answer.ndim != 3:
        return
    changed = inputs.clone()
    last = changed.named["input_ids"][:, 1:]
    last.copy_(last.roll(1, dims=1))
    other = _answer(model, changed, spec)
    if not torch.allclose(answer[:, 0], other[:, 0], rtol=1e-3, atol=1e-4):
        raise ConfigError(
            [
                f"{spec.name} sees the tokens that it should predict, so it is no model of the next token: set "
                "dataset.masked=0.15 for an encoder, or take a decoder (for some types +model.kwargs.is_decoder=true)"
            ]
        )


def _shown(inputs: Given) -> str:
    return repr(inputs) if isinstance(inputs, ModelInputs) else f"of shape {tuple(inputs.shape[1:])}"


def _check_tokens(model: nn.Module, data: Data) -> None:
    """Raises ConfigError if the texts hold tokens that the network does not know."""
    largest = getattr(data, "largest_token", None)
    readers: list[Any] = [module for module in model.modules() if hasattr(module, "get_input_embeddings")]
    tables = [module.get_input_embeddings() for module in readers[:1]]
    sizes = [table.num_embeddings for table in tables if isinstance(table, nn.Embedding)]
    if largest is not None and sizes and largest >= sizes[0]:
        raise ConfigError(
            [
                f"the texts hold the token number {largest}, and the network knows {sizes[0]} tokens: name its own "
                "tokenizer (dataset.tokenizer), or give it more (+model.kwargs.vocab_size)"
            ]
        )
