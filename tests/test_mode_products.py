"""Products of modes with matrices, against the plain Kronecker product."""

from __future__ import annotations

import math

import pytest
import torch

from tspc.decompositions.mode_products import multiplied

SIZES = {"a": 3, "b": 2, "c": 5, "d": 20, "e": 70}


def kron(names: tuple[str, ...], matrices: dict[str, torch.Tensor], n: int) -> torch.Tensor:
    found = torch.ones(1, 1, dtype=torch.float64)
    for name in names:
        matrix = matrices.get(name, torch.eye(SIZES[name], dtype=torch.float64))
        found = torch.kron(found, matrix.diag() if matrix.ndim == 1 else matrix)
    return found if names else torch.eye(n, dtype=torch.float64)


@pytest.mark.parametrize(
    "modes",
    [
        (("a", "b"), ("c",)),
        (("d", "a", "b"), ("d", "a", "b")),
        ((), ("a", "b", "c", "d")),
        (("a",), (), ("e", "c")),
        (("e", "b"), ("a", "d")),
    ],
)
@pytest.mark.parametrize("kinds", ["matrices", "diagonals", "mixed", "some"])
def test_each_mode_is_multiplied_by_its_matrix(modes, kinds):
    generator = torch.Generator().manual_seed(0)
    matrices = {}
    for number, (name, n) in enumerate(SIZES.items()):
        if kinds != "some" or number % 2:
            is_diagonal = kinds == "diagonals" or (kinds == "mixed" and number % 2)
            shape = (n,) if is_diagonal else (n, n + number % 3 - 1)
            matrices[name] = torch.randn(shape, generator=generator, dtype=torch.float64)
    shape = [math.prod(SIZES[name] for name in names) if names else 4 for names in modes]
    tensor = torch.randn(shape, generator=generator, dtype=torch.float64)
    expected = tensor
    for axis, names in enumerate(modes):
        factor = kron(names, matrices, shape[axis])
        expected = (expected.movedim(axis, -1) @ factor).movedim(-1, axis)
    torch.testing.assert_close(multiplied(tensor, modes, SIZES, matrices), expected)
