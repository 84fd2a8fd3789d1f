"""What every network may expect of plan, compress, save, load, fold_batch_norms and export."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import tspc
from tests.random_networks import Answer, Network
from tests.random_uses import CALLERS, Use
from tspc.calibration.samples import Samples
from tspc.compression.apply import apply_
from tspc.compression.integers import state_bytes
from tspc.compression.plan import Plan
from tspc.errors import ConfigError, ExportError, InfeasibleRateError, TspcWarning
from tspc.layers.forms import tensorized_layers
from tspc.traversal.copying import copied

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4, torch.bfloat16: 0.1}
"""Largest difference of answers that should be equal, relative to the largest answer."""


class Refused(Exception):
    """One TspcError that is right."""


def keeps_the_contract(network: Network, use: Use, folder: Path) -> None:
    """Raises AssertionError where it is broken, Refused where the library refuses for a good reason."""
    model = network.build().train(use.training)
    inputs = network.inputs(3)
    with torch.no_grad():
        dense = answer(model, inputs)
    before, around = state_of(model), surroundings()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TspcWarning)
        with CALLERS[use.caller]():
            inside = surroundings()
            small, use = _compressed(model, network, use)
            assert surroundings() == inside
        assert state_of(model) == before, "the network that was given has changed"
        assert surroundings() == around
        check_caller(small, model, network, use)
        check_parameters(small, model, use)
        check_answers(small, model, inputs, dense)
        check_full_rank(model, network, use, inputs, dense)
        check_file(small, network, inputs, folder)
        check_folded(small, network)
        if use.exports:
            check_exported(small, model, inputs, folder)
    assert state_of(model) == before, "the network that was given has changed"


def _compressed(model: nn.Module, network: Network, use: Use) -> tuple[nn.Module, Use]:
    """The compressed network, at the least rate that can be met where the one drawn cannot; and how it was made."""
    given = {"calibration": use.samples(network), "settings": use.settings}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TspcWarning)
            return tspc.compress(model, **given, **use.plan_options), use
    except InfeasibleRateError as error:
        _expect(use.rate < error.smallest <= 1, error)
        return _compressed(model, network, replace(use, rate=error.smallest))
    except ConfigError as error:
        _expect("has no layer to tensorize" in str(error), error)
        raise Refused("nothing to tensorize") from error


def _expect(right: bool, error: Exception) -> None:
    """That an error is the right one."""
    assert right, error


def answer(model: nn.Module, inputs: Tensor) -> list[Tensor]:
    """The tensors that the network answers with in eval mode; its modes are kept."""
    modes = {module: module.training for module in model.modules()}
    with torch.random.fork_rng(devices=[]):
        found = model.eval()(inputs.clone())
    for module, training in modes.items():
        module.training = training
    found = [found.logits, found.features] if isinstance(found, Answer) else found
    return [tensor.detach() for tensor in pytree.tree_leaves(found)]


def state_of(model: nn.Module) -> dict[str, Any]:
    """All of a network that its owner may look at, as plain data."""

    def plain(tensor: Tensor | None) -> Any:
        if tensor is None:
            return None
        flat = tensor.detach().clone().reshape(-1)
        return (
            tensor.requires_grad,
            tensor.dtype,
            tuple(tensor.shape),
            torch.view_as_real(flat).tolist() if (flat.is_complex()) else flat.tolist(),
        )

    state: dict[str, Any] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        hooks = [len(h) for h in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)]
        state[name] = type(module).__name__, id(module), module.training, hooks
        owned = {**module._parameters, **module._buffers}
        state |= {f"{name}:{key}": (id(value), plain(value)) for key, value in owned.items()}
    return state


def surroundings() -> Any:
    """What belongs to the caller."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_default_dtype(),
        torch.get_rng_state().tolist(),
    )


def check_caller(small: nn.Module, model: nn.Module, network: Network, use: Use) -> None:
    """What the caller is inside of does not matter."""
    if use.caller != "plain":
        plain, _ = _compressed(model, network, use)
        for name, value in plain.state_dict().items():
            if isinstance(value, Tensor) and value.is_floating_point():
                close([small.state_dict()[name]], [value], 1, f"{name} differs inside of {use.caller}")


def check_parameters(small: nn.Module, model: nn.Module, use: Use) -> None:
    """No more parameters than the rate allows; those that could be trained still can, and no other."""
    plan = tspc.plan(model, **use.plan_options)
    counted = [layer.name for layer in plan.budgeted]
    whole = use.rate_scope == "network"
    base = size(model) if whole else sum(size(model.get_submodule(name)) for name in counted)
    found = size(small) if whole else sum(size(small.get_submodule(name)) for name in counted)
    rate = 1 if use.method == "dense" else use.rate
    assert found <= rate * base, f"{found} parameters of {base} at rate {rate}"
    if plan.rate_unit == "bytes" or use.bits is not None:
        assert state_bytes(small) <= state_bytes(model)
    assert all(not parameter.is_inference() for parameter in small.parameters())
    done = tensorized_layers(small)
    old = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in small.named_parameters(remove_duplicate=False):
        owner = next((layer for layer in done if name.startswith(f"{layer}.")), None)
        if owner is None:
            assert parameter.requires_grad == old[name].requires_grad, name
            assert parameter.dtype == old[name].dtype, name
        else:
            bias = done[owner].bias
            expected = old[f"{owner}.bias"] if parameter is bias else old[f"{owner}.weight"]
            assert parameter.requires_grad == expected.requires_grad, name
            assert parameter.dtype == expected.dtype, name


def size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def check_answers(small: nn.Module, model: nn.Module, inputs: Tensor, dense: list[Tensor]) -> None:
    """Shapes, dtypes, finite; and a step of training where the network can be trained."""
    found = answer(small, inputs)
    assert [(t.shape, t.dtype) for t in found] == [(t.shape, t.dtype) for t in dense]
    assert all(bool(t.isfinite().all()) for t in found)
    modes = {name: module.training for name, module in small.named_modules()}
    assert all(modes.get(name, module.training) == module.training for name, module in model.named_modules())


def check_full_rank(model: nn.Module, network: Network, use: Use, inputs: Tensor, dense: list[Tensor]) -> None:
    """With the largest ranks the network answers as it did, fitted by the weights or by what the layers see."""
    if use.method == "dense":  # it has no ranks
        return
    whole_plan = tspc.plan(model, use.method, 1.0, allocation="uniform", keep_first=False, keep_last=False)
    whole = copied(model)
    given = use.samples(network)
    if given is None:
        apply_(whole, full_rank(whole_plan))
    else:
        with Samples(given, replace(use.settings, batch_norm="keep")) as samples:
            apply_(whole, full_rank(whole_plan), samples)
    close(answer(whole, inputs), dense, 10, "at full rank the network answers otherwise")


def full_rank(plan: Plan) -> Plan:
    rows = [
        layer if layer.method is None else replace(layer, rank=layer.method.max_rank(layer.shape), path=None)
        for layer in plan.layers
    ]
    return replace(plan, layers=tuple(rows))


def check_file(small: nn.Module, network: Network, inputs: Tensor, folder: Path) -> None:
    """What is loaded is what was saved, in another network of the same architecture."""
    path = folder / "small.safetensors"
    tspc.save(small, path)
    other = replace(network, seed=network.seed + 1, dtype="float32").build()
    loaded = tspc.load(path, model=other)
    expected, found = small.state_dict(), loaded.state_dict()
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        if isinstance(value, Tensor):
            assert found[name].dtype == value.dtype, name
            assert torch.equal(found[name], value), name
        else:
            assert found[name] == value, name
    for ours, theirs in zip(answer(loaded, inputs), answer(small, inputs), strict=True):
        assert torch.equal(ours, theirs), "the loaded network answers otherwise"


def check_folded(small: nn.Module, network: Network) -> None:
    """Without its batch norms the network answers the same, for other inputs too."""
    before = state_of(small)
    folded = tspc.fold_batch_norms(small, network.inputs(3))
    assert state_of(small) == before
    for count, seed in ((3, 0), (2, 5)):
        inputs = network.inputs(count, seed)
        close(answer(folded, inputs), answer(small, inputs), 1, "the folded network answers otherwise")


def check_exported(small: nn.Module, model: nn.Module, inputs: Tensor, folder: Path) -> None:
    """The file answers like the network, which `export` checks; refused only where the dense network is too."""
    tolerance = TOLERANCE.get(inputs.dtype, 1e-4)
    try:
        tspc.export(small, folder / "small.pt2", inputs, tolerance=tolerance)
    except ExportError:
        with pytest.raises(ExportError):
            tspc.export(model, folder / "dense.pt2", inputs, tolerance=tolerance)


def close(found: list[Tensor], expected: list[Tensor], times: float, message: str) -> None:
    for ours, theirs in ((a, b) for a, b in zip(found, expected, strict=True) if b.numel()):
        difference = float((ours.double() - theirs.double()).abs().max()) / max(float(theirs.abs().max()), 1e-6)
        assert difference <= times * TOLERANCE[theirs.dtype], f"{message}: {difference:.2g}"
