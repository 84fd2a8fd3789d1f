"""A network as a graph that runs elsewhere, with any batch size and number of tokens: `torch.export` traces it once."""

from __future__ import annotations

import inspect
import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.dynamic_shapes import refine_dynamic_shapes_from_suggested_fixes
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from tspc.deploy.signature import Inputs, Signature
from tspc.errors import ExportError, TspcWarning
from tspc.layers.forms import tensorized_layers
from tspc.traversal.copying import copied
from tspc.traversal.hooks import hooked

PACKED = (
    "a layer gets a PackedSequence, whose sizes are values of the inputs and unknown in a graph; "
    "give the layer padded tensors, and leave padded positions out of its outputs by a mask"
)
EXPORTERS = ("torch.onnx", "torch.export", "torch.fx", "onnxscript", "onnx_ir")
"""The loggers of the libraries that write files."""


def as_inputs(inputs: Tensor | Inputs) -> Inputs:
    return (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)


def take(inputs: Inputs, count: int) -> Inputs:
    """The first `count` entries of a batch; they are repeated if there are fewer."""
    return tuple(torch.cat([x] * -(-count // len(x)))[:count] for x in inputs)


def flat(outputs: Any) -> list[Tensor]:
    """The tensors in a network's answer, however they are nested."""
    return [value for value in pytree.tree_leaves(outputs) if isinstance(value, Tensor)]


def on_cpu(model: nn.Module) -> nn.Module:
    """A copy for files: on the CPU, in eval mode, in the default layout."""
    return copied(model).cpu().eval().to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]


def traced(model: nn.Module, inputs: Inputs, signature: Signature | None = None) -> ExportedProgram:
    """The graph of `model`, whose batch size (the first axis of every input) is free, and the number of tokens.

    That number stays fixed, with a warning, if the control flow depends on it; and without one if the network cannot
    take another number itself. It is traced with at least five tokens, if it takes so many. `signature` says how the
    inputs are given; by default all by position. Raises ExportError if the network's control flow depends on values or
    on the batch size.
    """
    signature = signature or Signature(len(inputs))
    model = copied(model)
    # The file will hold the example, so it is not the user's images. A batch of one would be taken for a constant.
    example = long_enough(model, signature.example(take(inputs, 2)), signature)
    try:
        is_free = _takes_fewer(model, example, signature)
        for layer in tensorized_layers(model).values():
            layer.take_off_grids_()  # a file holds numbers, without the steps that round them
            layer.forget()  # and factors, not the larger kernels that the calls before have contracted
        program = _program(model, example, signature, is_free)
    except Exception as error:  # the network may be the user's own, and the tracer raises nearly anything
        reason = PACKED if _packs(model, inputs, signature) else first_line(error)
        raise ExportError(f"{type(model).__name__} cannot be traced by torch.export: {reason}") from error
    graphs = [part.graph for part in program.graph_module.modules() if isinstance(part, torch.fx.GraphModule)]
    for node in (node for graph in graphs for node in graph.nodes):
        node.meta.pop("stack_trace", None)  # paths of this machine
    return program


def _program(model: nn.Module, example: Inputs, signature: Signature, free: bool) -> ExportedProgram:
    from torch._dynamo.exc import UserError  # takes seconds

    network = signature.bound(model)
    args, kwargs = signature.arguments(example)

    def attempt(shapes: Any) -> ExportedProgram:
        # For control flow that depends on values the tracer prints the whole graph, besides raising the error.
        with quiet(*EXPORTERS), redirect_stderr(io.StringIO()):
            return torch.export.export(network, args, kwargs, dynamic_shapes=shapes)

    fixed, wanted = (
        _as_arguments(network, *signature.arguments(signature.shapes(example, lengths))) for lengths in (False, free)
    )
    if not free:
        return attempt(fixed)
    try:
        try:
            program = attempt(wanted)
        except UserError as error:  # the network has a largest number of tokens, which the tracer names
            program = attempt(refine_dynamic_shapes_from_suggested_fixes(error.msg, wanted))
        reason = "" if has_free_lengths(program, signature, example) else "its control flow depends on their number"
    except Exception as error:
        program, reason = attempt(fixed), first_line(error)
    if reason:
        message = f"the file takes inputs of {_told(signature, example)} tokens only: {reason}"
        warnings.warn(message, TspcWarning, stacklevel=5)
    return program


def has_free_lengths(program: ExportedProgram, signature: Signature, inputs: Inputs) -> bool:
    """Whether the number of tokens is free in the graph."""
    places = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    given = [places[name].meta["val"] for name in program.graph_signature.user_inputs if name in places]
    return all(isinstance(given[place].shape[1], torch.SymInt) for place in signature.lengths(inputs))


def _told(signature: Signature, inputs: Inputs) -> str:
    return ", ".join(str(size) for size in dict.fromkeys(inputs[place].shape[1] for place in signature.lengths(inputs)))


@torch.no_grad()
def _packs(model: nn.Module, inputs: Inputs, signature: Signature) -> bool:
    """Whether the network gives a packed sequence to one of its modules."""
    seen: list[bool] = []
    look = lambda module, args: seen.append(any(isinstance(x, PackedSequence) for x in args))  # noqa: E731
    with hooked([module.register_forward_pre_hook(look) for module in model.modules()]), suppress(Exception):
        signature.call(model, inputs)
    return any(seen)


@torch.no_grad()
def long_enough(model: nn.Module, inputs: Inputs, signature: Signature) -> Inputs:
    """The inputs, with more tokens if they have too few for a tracer and the network takes any number of them."""
    if not signature.is_short(inputs):
        return inputs
    longer = signature.longer(inputs)
    try:
        signature.call(model, longer)
    except Exception:  # the network may be the user's own
        return inputs
    return longer if _takes_fewer(model, longer, signature) else inputs


@torch.no_grad()
def _takes_fewer(model: nn.Module, inputs: Inputs, signature: Signature) -> bool:
    """Whether there are tokens, and the network takes fewer of them."""
    shorter = signature.shorter(inputs)
    if shorter is None:
        return False
    try:
        signature.call(model, shorter)
    except Exception:  # the network may be the user's own
        return False
    return True


def _as_arguments(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """A value for each argument of `forward`. `*inputs` is one argument, a tuple, and `**named` one, a dict."""
    return dict(inspect.signature(model.forward).bind(*args, **kwargs).arguments)


def onnx_session(
    graph: Path | bytes,
    threads: int | None = None,
    providers: tuple[str, ...] = ("CPUExecutionProvider",),
    profile: Path | None = None,
) -> Any:
    """An ONNX Runtime session of a file, or of its bytes. Raises ExportError if ONNX Runtime does not take it.

    With `profile` it notes the time of every operation, in a file whose path begins so.
    """
    import onnxruntime

    onnxruntime.disable_telemetry_events()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # Without VNNI a CPU adds products of 8-bit numbers in 16 bits, which overflow; this takes the exact operations.
    options.add_session_config_entry("session.x64quantprecision", "1")
    if threads is not None:
        options.intra_op_num_threads = threads
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    try:
        source = graph if isinstance(graph, bytes) else str(graph)
        return onnxruntime.InferenceSession(source, options, providers=list(providers))
    except Exception as error:  # ONNX Runtime's own family
        raise ExportError(f"ONNX Runtime does not take the network: {first_line(error)}") from error


def run_session(session: Any, inputs: Inputs) -> list[Tensor]:
    """What a session answers. Raises ExportError if it does not take the inputs."""
    feed = {entry.name: x.detach().cpu().numpy() for entry, x in zip(session.get_inputs(), inputs, strict=True)}
    try:
        return [torch.from_numpy(value) for value in session.run(None, feed)]
    except Exception as error:  # ONNX Runtime's own family
        raise not_taken(inputs, error) from error


def not_taken(inputs: Inputs, error: Exception) -> ExportError:
    """The error of a file that does not take some inputs."""
    given = ", ".join(f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}" for x in inputs)
    return ExportError(f"the file does not take inputs of shape {given}: {first_line(error)}")


def first_line(error: BaseException) -> str:
    """The first line of the innermost cause; messages of a tracer are pages long."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no reason given'}"


@contextmanager
def quiet(*names: str) -> Iterator[None]:
    """No warnings, and only errors from the named loggers; other messages are for the authors of those libraries."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
