"""Runs independent pieces of work in parallel, one core each.

The linear algebra of one layer gains little from a second core; two layers at once gain much. Every piece runs on one
thread, however many pieces there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def side_by_side(
    function: Callable[[Item], Result], items: Sequence[Item], size: Callable[[Item], float]
) -> Iterator[tuple[Item, Result]]:
    """Yields every item with the result of `function`, as soon as it is ready; uses as many threads as PyTorch may.

    The item with the largest `size` starts first. If `function` raises, the error is raised here, and pieces that have
    not begun are dropped. The gradient mode is that of the caller.
    """
    threads, gradients = torch.get_num_threads(), torch.is_grad_enabled()
    order = sorted(items, key=size, reverse=True)

    def piece(item: Item) -> Result:
        with torch.set_grad_enabled(gradients):
            return function(item)

    torch.set_num_threads(1)
    try:
        if threads == 1 or len(order) < 2:
            yield from ((item, function(item)) for item in order)
            return
        # PyTorch's number of threads is set for each thread of the pool.
        pool = ThreadPoolExecutor(min(threads, len(order)), initializer=torch.set_num_threads, initargs=(1,))
        try:
            futures = {pool.submit(piece, item): item for item in order}
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            pool.shutdown(cancel_futures=True)
    finally:
        torch.set_num_threads(threads)


def in_parts(items: Iterable[Item], size: Callable[[Item], float], limit: float) -> Iterator[list[Item]]:
    """Groups of neighbouring items with a total size of at most the limit; a larger item comes alone."""
    part: list[Item] = []
    used = 0.0
    for item in items:
        own = size(item)
        if part and used + own > limit:
            yield part
            part, used = [], 0.0
        part.append(item)
        used += own
    if part:
        yield part
