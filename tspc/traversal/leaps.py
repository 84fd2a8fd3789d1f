"""Runs a network from the output of one of its blocks, without the blocks before it.

A head takes the pooled output of the last block. What stands between them is code in the network's `forward`, so the
network has to run from its start; but its blocks need not run again. The last one returns its known output, and the
others return a value that refuses every use. If the network uses more than the last output, the leap fails.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tspc.data.model_inputs import Given, called
from tspc.errors import TspcError
from tspc.system.modes import whole_operations
from tspc.traversal.handing import Call
from tspc.traversal.hooks import Reached, run_on, running, seeded
from tspc.traversal.nested import equal, mapped, tensors_in


class _RefusedError(TspcError):
    """The network uses the output of a block that was not run."""


def _refuse(*args: Any, **kwargs: Any) -> Any:
    raise _RefusedError("this block was not run")


SPECIAL = "len bool iter next getitem setitem contains call enter eq ne lt le gt ge hash repr str index int float"
ARITHMETIC = "add sub mul truediv floordiv mod pow matmul and or xor neg pos abs invert"
Absent: Any = type(
    "Absent",
    (),
    {f"__{name}__": _refuse for name in (SPECIAL + " " + ARITHMETIC).split()}
    | {f"__r{name}__": _refuse for name in ARITHMETIC.split()}
    # Also for `isinstance`, which looks at the class.
    | {"__getattribute__": _refuse, "__class__": property(_refuse)},
)
"""Stands for an output that is not known. It can be handed on, and every other use raises an error."""


@torch.no_grad()
def leap(
    model: nn.Module,
    blocks: Sequence[str],
    output: Any,
    target: str,
    images: Given,
    number: int = 0,
    short: bool = False,
) -> Call | None:
    """The arguments of the module `target`, if the last of the `blocks` returns `output` and the others do not run.

    None if that fails. `number` is the number of the batch; with `short` the network runs in bfloat16.
    """
    found: list[Call] = []

    def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
        found.append((args, kwargs))
        raise Reached

    try:
        copied = mapped(output, Tensor.clone)  # the network may change it in place
        with _returning(model, blocks, copied), running(number, short):
            handle = model.get_submodule(target).register_forward_pre_hook(hook, with_kwargs=True)
            run_on(model, [handle], images.clone())
    except Exception:  # the network may be the user's own
        return None
    return found[0] if found else None


@contextmanager
def _returning(model: nn.Module, blocks: Sequence[str], output: Any) -> Iterator[None]:
    """The last of the blocks returns `output` inside the `with` block, and the others nothing of use."""
    own: list[tuple[nn.Module, Any]] = []
    try:
        for name in blocks:
            module, result = model.get_submodule(name), output if name == blocks[-1] else Absent()
            before = vars(module).get("forward")
            module.forward = lambda *args, result=result, **kwargs: result
            own.append((module, before))
        yield
    finally:
        for module, before in own:
            del module.forward
            if before is not None:
                module.forward = before


@torch.no_grad()
def can_leap(model: nn.Module, blocks: Sequence[str], target: str, images: Given) -> bool:
    """Whether the leap from the blocks to the target gives, for a few images, the arguments that a whole pass gives.

    Between the two, the images run in another order. If the network keeps something from one pass to the next, the leap
    then gets something else.
    """
    if len(blocks) < 2 or len(images) < 2:
        return False
    outputs, calls = [], []

    def after_block(module: nn.Module, args: Any, output: Any) -> None:
        outputs.append(mapped(output, Tensor.clone))

    def before_target(module: nn.Module, args: Any, kwargs: Any) -> None:
        calls.append(mapped((args, kwargs), Tensor.clone))
        raise Reached

    try:
        handles = [
            model.get_submodule(blocks[-1]).register_forward_hook(after_block),
            model.get_submodule(target).register_forward_pre_hook(before_target, with_kwargs=True),
        ]
        with seeded(0), whole_operations():
            run_on(model, handles, images.clone())
            called(model, images[torch.tensor([1, 1, 0])])
        found = leap(model, blocks, outputs[0], target, images)
        return found is not None and _equal(found, calls[0])
    except Exception:  # also a network that takes no single image
        return False


def _equal(first: Any, second: Any) -> bool:
    """Whether two values are the same, with tensors that are equal bit by bit."""
    shells = []
    for value in (first, second):
        numbers = {id(tensor): number for number, tensor in enumerate(tensors_in(value))}
        shells.append(mapped(value, lambda tensor, numbers=numbers: numbers[id(tensor)]))
    pairs = zip(tensors_in(first), tensors_in(second), strict=False)
    return equal(*shells) and all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)
