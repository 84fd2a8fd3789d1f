"""Independent pieces of work side by side."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from tspc.system.parallel import in_parts, side_by_side


@pytest.fixture(autouse=True, params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_every_item_once_with_its_result(threads):
    found = dict(side_by_side(lambda n: n * n, range(20), size=float))
    assert found == {n: n * n for n in range(20)}
    assert torch.get_num_threads() == threads


def test_the_largest_begins_first():
    begun = []
    list(side_by_side(begun.append, [1, 3, 2], size=float))
    assert begun[0] == 3


def test_pieces_run_at_once_each_on_one_thread(threads):
    meeting = threading.Barrier(threads, timeout=30)

    def piece(n):
        meeting.wait()
        return torch.get_num_threads()

    assert {own for _, own in side_by_side(piece, range(2), size=float)} == {1}


def test_the_gradient_mode_is_the_callers():
    with torch.no_grad():
        assert not any(on for _, on in side_by_side(lambda n: torch.is_grad_enabled(), range(4), size=float))


def test_an_error_ends_it_and_the_threads_are_given_back(threads):
    done = []

    def piece(n):
        if n == 99:
            raise ValueError("the first")
        time.sleep(0.01)
        done.append(n)

    with pytest.raises(ValueError, match="the first"):
        list(side_by_side(piece, range(100), size=float))
    assert len(done) < 99
    assert torch.get_num_threads() == threads


def test_parts_hold_neighbours_up_to_a_limit():
    assert list(in_parts([3, 4, 9, 1, 1], size=float, limit=7)) == [[3, 4], [9], [1, 1]]
    assert list(in_parts([], size=float, limit=7)) == []
