"""The drop of a metric on held-out inputs: its bound, and the search for the smallest network within a limit."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from tspc.compression.limits import Limit
from tspc.compression.smallest import STEP, Search
from tspc.errors import ConfigError, DataError
from tspc.training import METRICS, TOP1, Drop, HeldOut
from tspc.training.held_out import reader_of
from tspc.training.metrics import metric_of


def drop_of(lost: int, gained: int, count: int) -> Drop:
    losses = torch.zeros(count)
    losses[:lost], losses[lost : lost + gained] = 1, -1
    return Drop.of(losses, 100.0, is_counted=True)


@pytest.mark.parametrize(("count", "limit"), [(25, 0.1), (40, 0.02)])
def test_the_exact_test_keeps_its_level_however_often_inputs_gain(count, limit):
    level = 0.1
    outcomes = [(a, b) for a, b in itertools.product(range(count + 1), repeat=2) if a + b <= count]
    p_values = np.array([drop_of(a, b, count).p_value(100 * limit) for a, b in outcomes])
    let_through = [outcome for outcome, p in zip(outcomes, p_values, strict=True) if p <= level]
    assert let_through or 0.9**count > level
    for gain in np.linspace(0, (1 - limit) / 2, 12):
        chances = gain + limit, gain, 1 - 2 * gain - limit
        wrong = sum(_chance(a, b, count, *chances) for a, b in let_through)
        assert wrong <= level


def _chance(lost: int, gained: int, count: int, loses: float, gains: float, rest: float) -> float:
    ways = math.comb(count, lost) * math.comb(count - lost, gained)
    return ways * loses**lost * gains**gained * max(rest, 0.0) ** (count - lost - gained)


def test_the_exact_bound_is_near_the_normal_one_for_many_inputs():
    drop = drop_of(98, 66, 5000)
    assert drop.value == pytest.approx(0.64)
    normal = drop.value + 100 * stats.norm.isf(0.05) * drop.error
    assert normal - 0.02 < drop.bound(0.05) < normal + 0.06
    assert drop.p_value(drop.bound(0.05) + 0.01) <= 0.05 < drop.p_value(drop.bound(0.05) - 0.01)


def test_nothing_lost_shows_what_the_number_of_inputs_can_show():
    # (1 - x) ** 1000 = 0.05
    assert drop_of(0, 0, 1000).bound(0.05) == pytest.approx(100 * (1 - 0.05 ** (1 / 1000)), abs=0.01)
    assert drop_of(0, 0, 1000).p_value(0.0) == 1.0
    assert drop_of(0, 0, 1000).p_value(100.0) == 0.0


def test_other_losses_have_the_bound_of_students_t():
    losses = torch.tensor([0.1, 0.4, -0.2, 0.3, 0.05])
    drop = Drop.of(losses)
    assert not drop.is_exact
    expected = stats.ttest_1samp(losses.double().numpy(), 0.5, alternative="less")
    assert drop.p_value(0.5) == pytest.approx(expected.pvalue)
    assert drop.p_value(drop.bound(0.05)) == pytest.approx(0.05, rel=0.02)


# The search, with networks that are made up: each input is lost or gained by chance.


class Judge:
    has_counts = True

    def __init__(self, drop_at, count: int = 6000, seed: int = 0) -> None:
        self.drop_at, self.count, self.seed = drop_at, count, seed

    def drop(self, network: SimpleNamespace, start: int, stop: int) -> Drop:
        share = self.drop_at(network.share)
        # The same inputs are lost first at every size, as by networks that resemble each other.
        chances = torch.rand(self.count, generator=torch.Generator().manual_seed(self.seed))[start:stop]
        losses = (chances < share + 0.01).float() - (chances > 0.99).float()
        return Drop.of(losses, 100.0, is_counted=True)


def search_of(judge, limit: Limit, smallest: float = 0.01) -> Search:
    def plan_at(share: float) -> SimpleNamespace:
        return SimpleNamespace(share=share, output_error=0.0065 / share**1.2, network_bytes=int(1e6 * share))

    return Search(plan_at, lambda plan: (SimpleNamespace(share=plan.share), plan), judge, limit, smallest)


def power_law(share: float) -> float:
    """A drop of 0.01 at a share of 0.1."""
    return 0.01 * (0.1 / share) ** 2.4


def test_the_result_is_near_the_smallest_network_and_the_sizes_fall():
    search = search_of(Judge(power_law, 7000, seed=1), Limit(2.0, 0.05))
    one = search.run()
    best = 0.1 / 2 ** (1 / 2.4)
    assert best < one.share < 1.5 * best
    assert power_law(one.share) < 0.02
    assert one.drop is not None
    assert one.drop.bound(0.05) <= 2.0
    passed = [each.share for each in search.tried.values() if each.passed]
    assert one.share == min(passed)
    failed = [each.share for each in search.tried.values() if each.passed is False]
    assert failed
    assert all(share < one.share for share in failed)
    assert max(failed) > 0.98 * STEP**2 * one.share
    record = search.judged(one)
    assert record["bound"] <= 2.0
    assert [each["share"] for each in record["tried"]] == sorted(search.tried, reverse=True)


def test_limits_are_exceeded_no_more_often_than_the_level_allows():
    level, above = 0.2, 0
    for seed in range(60):
        share = search_of(Judge(power_law, 1500, seed), Limit(3.0, level)).run().share
        above += power_law(share) > 0.03
    assert stats.binom.sf(above - 1, 60, level) > 0.01


@pytest.mark.parametrize("times", [0.1, 10])
def test_the_pilot_finds_the_place_of_a_network_that_is_not_typical(times):
    search = search_of(Judge(lambda share: min(times * power_law(share), 0.9), 7000), Limit(2.0, 0.05))
    one = search.run()
    best = 0.1 / (2 / times) ** (1 / 2.4)
    assert best < one.share < 1.5 * best


def test_the_smallest_form_ends_the_search():
    one = search_of(Judge(lambda share: 0.0), Limit(2.0, 0.05), smallest=0.3).run()
    assert one.share == pytest.approx(0.3, rel=0.01)


def test_few_inputs_use_one_chain_and_too_few_are_refused():
    one = search_of(Judge(power_law, 250), Limit(5.0, 0.05)).run()
    assert one.passed
    with pytest.raises(ConfigError, match=r"max_drop=0\.5 needs 598 held-out inputs at confidence 0\.95, and 375 can"):
        search_of(Judge(power_law, 500), Limit(0.5, 0.05))
    with pytest.raises(DataError, match="99 are too few: give 100 at least"):
        search_of(Judge(power_law, 99), Limit(50, 0.05))


def test_a_limit_out_of_reach_names_the_nearest_one():
    with pytest.raises(ConfigError, match=r"max_drop=2 cannot be shown .* give max_drop=\d+") as caught:
        search_of(Judge(lambda share: 0.05), Limit(2.0, 0.05)).run()
    nearest = float(str(caught.value).split("give max_drop=")[1].split(",")[0])
    assert 5.0 < nearest < 7.0
    assert search_of(Judge(lambda share: 0.05), Limit(nearest, 0.05)).run().passed


def test_no_network_is_tested_twice_where_hardly_anything_may_change():
    tested = []

    class Counting(Judge):
        def drop(self, network, start, stop):
            tested.append((round(network.share, 3), start, stop))
            return super().drop(network, start, stop)

    with pytest.raises(ConfigError, match="cannot be shown"):
        search_of(Counting(lambda share: 0.02 / share**2.2, 5000), Limit(1.0, 0.05)).run()
    assert sum(share == 1.0 and start > 0 for share, start, _ in tested) <= 3  # two looks, and one for the advice


def test_a_size_beside_it_is_kept_or_refused():
    assert search_of(Judge(power_law), Limit(2.0, 0.05, share=0.2)).run().share < 0.2
    with pytest.raises(ConfigError, match=r"max_drop=2 and a size of 0\.05 .* smallest network within the drop has"):
        search_of(Judge(power_law), Limit(2.0, 0.05, share=0.05)).run()


def test_before_a_training_the_drop_is_estimated_and_what_comes_back_is_counted_on():
    plain = search_of(Judge(power_law), Limit(2.0, 0.05, is_trained=True)).run()
    back = Limit(2.0, 0.05, is_trained=True, given_back=lambda drop: drop / 4)
    bold = search_of(Judge(power_law), back).run()
    assert plain.passed is None
    assert 0.5 < power_law(plain.share) / 0.02 < 1.5
    assert 0.5 < power_law(bold.share) / 0.08 < 1.5
    assert bold.share < 0.7 * plain.share


# Held-out inputs.


class Fixed(nn.Module):
    """Answers with the class that the input names, and with the next one where it is below `wrong`."""

    def __init__(self, wrong: float) -> None:
        super().__init__()
        self.wrong = wrong

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.eye(10)[(x[:, 0].long() + (x[:, 1] < self.wrong).long()) % 10]


def held_out(metric, count: int = 700, wrong: float = 0.1) -> HeldOut:
    inputs = torch.stack([torch.arange(count) % 10, torch.arange(count) / count], 1)
    read, number = reader_of(
        list(zip(inputs.split(64), inputs[:, 0].long().split(64), strict=True)), torch.device("cpu")
    )
    assert number == count
    return HeldOut(Fixed(wrong), metric, read, count, torch.device("cpu"))


def test_drops_on_held_out_inputs():
    judge = held_out(TOP1)
    drop = judge.drop(Fixed(0.2), 0, 700)
    assert (drop.lost, drop.gained, drop.count) == (70, 0, 700)
    assert drop.value == pytest.approx(10.0)
    assert judge.drop(Fixed(0.2), 0, 300).lost + judge.drop(Fixed(0.2), 300, 700).lost == 70
    assert judge.drop(Fixed(0.05), 0, 700).value == pytest.approx(-5.0)
    agreement = held_out(METRICS["agreement"], wrong=0.0).drop(Fixed(0.2), 0, 700)
    assert agreement.value == pytest.approx(20.0)


def test_a_metric_of_the_whole_is_judged_by_groups():
    judge = held_out(METRICS["perplexity"])
    drop = judge.drop(Fixed(0.2), 0, 700)
    assert drop.count >= 30
    assert not drop.is_exact
    each = [judge.drop(Fixed(0.2), start, start + 100).value for start in range(0, 700, 100)]
    assert drop.value == pytest.approx(sum(each) / 7, rel=0.3)
    assert math.isfinite(drop.bound(0.05))


def test_an_iterator_of_batches_can_be_read_again():
    batches = [(torch.zeros(3, 2), torch.zeros(3)), (torch.ones(2, 2), torch.ones(2))]
    read, count = reader_of(iter(batches), torch.device("cpu"))
    assert count == 5
    assert sum(len(x) for x, _ in read(2, 5)) == 3
    assert sum(float(y.sum()) for _, y in read(0, 5)) == 2
    with pytest.raises(DataError, match="a batch is Tensor; expected a pair"):
        reader_of([torch.zeros(3)], torch.device("cpu"))


def test_few_equal_losses_are_no_certainty_and_a_loss_of_groups_is_not_counted():
    drop = Drop.of(torch.zeros(31))
    assert not drop.is_exact
    assert 0 < drop.p_value(0.02) < 1e-6
    nearly = torch.full((31,), 0.019)
    nearly[0] += 1e-9
    assert Drop.of(nearly).p_value(0.02) > 0.05
    assert drop.p_value(drop.bound(0.05) + 1e-9) <= 0.0501


def test_what_says_nothing_is_refused():
    with pytest.raises(ConfigError, match="top-1 is a share, so it cannot fall by 100 points"):
        held_out(TOP1).check(100.0, 100)
    with pytest.raises(ConfigError, match="of the reference is 0 on 100 held-out inputs: are the labels right"):
        held_out(TOP1, wrong=1.0).check(1.0, 100)
    own = metric_of(lambda model, batches: torch.cat([(model(x).argmax(1) == y).float() for x, y in batches]))
    with pytest.raises(ConfigError, match=r"max_drop=2 with .* a drop of 2 allows everything; give max_drop=0\.02"):
        held_out(own).check(2.0, 100)
    held_out(own).check(0.02, 100)
    blind = metric_of(lambda model, batches: 0.5)
    with pytest.raises(ConfigError, match="it judged 0 of 3 held-out inputs; it must read all batches"):
        held_out(blind).check(0.1, 100)


def test_held_out_inputs_are_mixed_and_the_same_at_every_time():
    class Shuffled:
        def __iter__(self):
            order = torch.randperm(60)
            yield from zip(order.float()[:, None].split(20), order.split(20), strict=True)

    read, count = reader_of(Shuffled(), torch.device("cpu"))
    first, again = (torch.cat([y for _, y in read(0, 60)]) for _ in range(2))
    assert count == 60
    assert torch.equal(first, again)
    ordered = [(torch.arange(60.0)[:, None], torch.arange(60))]
    (part,) = (y for _, y in reader_of(ordered, torch.device("cpu"))[0](0, 20))
    assert part.max() > 40
    assert not torch.equal(part, part.sort().values)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (5, "a batch is int; expected a pair of inputs and targets"),
        ([], "held_out has no batch"),
        ((torch.zeros(4, 2), torch.zeros(4)), r"held_out is a pair of tensors; give a list of batches"),
        ([(torch.zeros(4, 2), torch.tensor(1))], r"have shapes \(4, 2\) and \(\); the first axis counts both"),
        ([(torch.zeros(4, 2), torch.zeros(3))], r"have shapes \(4, 2\) and \(3,\)"),
        ([(torch.zeros(4, 2), torch.zeros(4)), (torch.zeros(4, 3), torch.zeros(4))], "the batches do not fit together"),
    ],
)
def test_held_out_batches_of_a_wrong_form_are_one_line(given, message):
    with pytest.raises(DataError, match=message):
        reader_of(given, torch.device("cpu"))


def test_a_refusal_is_about_a_network_that_was_tested():
    for seed in range(8):
        judge = Judge(lambda share: 0.3 if share < 0.999 else 0.02, 900, seed)
        with pytest.raises(ConfigError, match=r"cannot be shown"):
            search_of(judge, Limit(1.0, 0.05)).run()
