"""Intervals: closed forms and coverage."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from emlens._stats import (
    Interval,
    RunningMean,
    bootstrap_gap,
    bootstrap_mean,
    bootstrap_ratio,
    bootstrap_statistic,
    bootstrap_trainings,
    gap_of_shares,
    holm,
    interval_level,
    mean_over_seeds,
    p_value,
    share_of_units,
    wilson,
)


def test_a_ratio_is_of_sums_never_a_mean_of_means():
    found = bootstrap_ratio([1.0, 9.0], [1.0, 3.0])
    assert found.estimate == 2.5


def test_bootstrap_intervals_cover_the_mean():
    generator = np.random.default_rng(0)
    hits = 0
    for _ in range(300):
        interval = bootstrap_mean(generator.exponential(size=24))
        hits += interval.low <= 1 <= interval.high
    assert 0.92 <= hits / 300 <= 0.98


def test_the_same_seed_gives_the_same_interval():
    values = np.arange(10.0)
    assert bootstrap_mean(values, seed=1) == bootstrap_mean(values, seed=1)
    assert bootstrap_mean(values, seed=1) != bootstrap_mean(values, seed=2)


def test_one_unit_has_no_interval_and_constants_have_a_point():
    assert np.isnan(bootstrap_mean([2.0]).low)
    assert bootstrap_mean([2.0] * 5).low == 2.0
    assert np.isnan(mean_over_seeds([1.0]).high)


def test_the_interval_over_seeds_is_the_t_interval():
    found = mean_over_seeds([1.0, 2.0, 3.0])
    assert found.estimate == 2
    assert found.high - 2 == pytest.approx(4.302653 / 3**0.5, rel=1e-5)
    assert not mean_over_seeds([-1.0, 2.0, 3.0]).excludes_zero


@pytest.mark.parametrize(
    ("sums", "counts", "message"),
    [([], [], "must be equal and not empty"), ([1.0], [0.0], "nothing was counted")],
)
def test_nothing_to_count_is_refused(sums, counts, message):
    with pytest.raises(ValueError, match=message):
        bootstrap_ratio(sums, counts)


def test_trainings_are_random_as_the_units_are():
    generator = np.random.default_rng(0)
    units = generator.normal(1.0, 0.1, size=40)
    alike = bootstrap_trainings(np.stack([units] * 3))
    alone = bootstrap_mean(units)
    assert (alike.estimate, alike.low, alike.high) == pytest.approx(
        (alone.estimate, alone.low, alone.high)
    )
    apart = bootstrap_trainings(np.stack([units - 1, units, units + 1]))
    assert apart.estimate == pytest.approx(units.mean())
    # three trainings that are 1 apart have a t interval of 4.30 / 3**0.5 to either side
    further = 4.3026527**2 / 3
    assert apart.high - units.mean() == pytest.approx(
        ((alone.high - alone.estimate) ** 2 + further) ** 0.5, rel=1e-6
    )
    assert apart.low < units.mean() - 2.48
    assert bootstrap_trainings(units[None]) == alone


@pytest.mark.parametrize("apart", [0.0, 1.0])
def test_intervals_over_three_trainings_hold_the_truth_whether_or_not_they_differ(apart):
    generator = np.random.default_rng(6)
    hits = 0
    for _ in range(300):
        own, both = apart * generator.normal(size=(3, 1)), 0.5 * generator.normal(size=(3, 16))
        found = bootstrap_trainings(generator.normal(size=16) + own + both)
        hits += found.low <= 0 <= found.high
    assert hits / 300 >= 0.93


def test_trainings_are_weighted_by_the_counts_of_their_units():
    sums, counts = np.array([[2.0, 9.0], [4.0, 3.0]]), np.array([1.0, 3.0])
    assert bootstrap_trainings(sums, counts).estimate == pytest.approx((3 + 6) / 4)
    with pytest.raises(ValueError, match=r"sums must be \[trainings, units\] and not empty"):
        bootstrap_trainings(np.ones(3))
    with pytest.raises(ValueError, match=r"counts \(3,\) do not fit sums \(2, 2\)"):
        bootstrap_trainings(sums, np.ones(3))


def test_an_estimate_from_one_value_is_printed_without_an_interval():
    assert str(bootstrap_mean([0.25])) == "+0.250 [no interval]"
    assert str(Interval(0.25, 0.0, 0.5)) == "+0.250 [+0.000, +0.500]"


def test_an_interval_is_printed_in_the_format_that_is_asked_for():
    assert f"{Interval(0.25, 0.0, 0.5):+.1f}" == "+0.2 [+0.0, +0.5]"
    assert f"{bootstrap_mean([12.0]):.1f}" == "12.0 [no interval]"


# -- units that count nothing -----------------------------------------------------------------


@pytest.mark.parametrize("blank", [0, 1, 30])
def test_one_unit_that_counts_has_no_interval_however_many_count_nothing(blank):
    sums, counts = np.zeros(1 + blank), np.zeros(1 + blank)
    sums[blank // 2], counts[blank // 2] = 6.0, 4.0
    found = bootstrap_ratio(sums, counts)
    assert found.estimate == 1.5
    assert np.isnan([found.low, found.high]).all()
    assert not found.excludes_zero
    several = bootstrap_trainings(np.stack([sums, 2 * sums, 3 * sums]), counts)
    assert several.estimate == 3.0
    assert np.isnan([several.low, several.high]).all()


def errors_by_hand(sums, counts):
    """A ratio and its standard error: the t interval of what is left of each unit."""
    ratio = sums.sum() / counts.sum()
    rest = (sums - ratio * counts) / counts.sum()
    return ratio, (len(sums) * rest.var(ddof=1)) ** 0.5


def test_the_ends_are_as_many_standard_errors_off_as_resamples_say_within_limits():
    generator = np.random.default_rng(4)
    for n, blank in ((5, 5), (7, 1), (12, 40)):
        counts = generator.integers(1, 30, n).astype(float)
        sums = counts * np.exp(generator.normal(0, 1, n))
        found = bootstrap_ratio(
            np.concatenate([np.zeros(blank), sums]), np.concatenate([np.zeros(blank), counts])
        )
        ratio, error = errors_by_hand(sums, counts)
        off = []
        for drawn in np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), 2000):
            one, own = errors_by_hand(np.repeat(sums, drawn), np.repeat(counts, drawn))
            off.append((one - ratio) / max(own, 1e-6 * error))
        reach = {5: 2.7764451, 7: 2.4469119, 12: 2.2009852}[n]
        low, high = np.quantile(off, [0.025, 0.975])
        assert found.estimate == pytest.approx(ratio)
        assert found.low == pytest.approx(ratio - np.clip(high, reach, 2 * reach) * error)
        assert found.high == pytest.approx(ratio + np.clip(-low, reach, 2 * reach) * error)
        assert found.high - ratio > ratio - found.low
        assert found == bootstrap_ratio(sums, counts)


def test_two_or_three_units_have_a_t_interval():
    for values, reach in (([1.0, 2.0], 12.7062047), ([1.0, 2.0, 4.0], 4.3026527)):
        found, n = bootstrap_mean(values), len(values)
        half = reach * np.std(values, ddof=1) / n**0.5
        assert found.low == pytest.approx(np.mean(values) - half)
        assert found.high == pytest.approx(np.mean(values) + half)


def test_units_that_count_nothing_leave_the_interval_over_trainings_as_it_is():
    generator = np.random.default_rng(5)
    counts = np.array([3.0, 0.0, 5.0, 0.0, 2.0, 7.0])
    sums = generator.normal(1, 0.3, (3, 6)) * counts
    keep = counts > 0
    assert bootstrap_trainings(sums, counts) == bootstrap_trainings(sums[:, keep], counts[keep])


def test_a_unit_without_a_count_that_adds_to_the_sum_stays():
    """Such is a prompt whose whole effect is zero, in a share of effects."""
    found = bootstrap_ratio([1.0, 2.0, 4.0], [0.0, 1.0, 2.0])
    assert found.estimate == pytest.approx(7 / 3)
    assert found.low < 7 / 3 < found.high


# -- the level --------------------------------------------------------------------------------


def intervals() -> dict[str, Interval]:
    """One of each kind, of the same numbers."""
    values = np.random.default_rng(0).normal(1.0, 0.5, 30)
    running = RunningMean(0, 1000)
    for value in values:
        running.add(value)
    return {
        "mean": bootstrap_mean(values),
        "ratio": bootstrap_ratio(values, np.arange(1, 31)),
        "share over units": share_of_units(np.arange(6), np.full(6, 9)),
        "gap of shares": gap_of_shares((np.arange(6), np.full(6, 9)), (np.ones(6), np.full(6, 9))),
        "gap": bootstrap_gap((values, np.ones(30)), (np.ones(30), np.ones(30))),
        "trainings": bootstrap_trainings(np.stack([values, values[::-1]])),
        "statistic": bootstrap_statistic(
            lambda drawn: float(np.median(values[drawn])), 30, estimate=float(np.median(values))
        ),
        "running": running.interval(),
        "t": mean_over_seeds(values),
        "share": wilson(20, 30),
    }


def test_a_level_reaches_every_kind_of_interval_and_is_put_back():
    before = intervals()
    with interval_level(0.5):
        narrow = intervals()
        with interval_level(0.99):
            wide = intervals()
    for kind, plain in before.items():
        assert narrow[kind].estimate == wide[kind].estimate == plain.estimate
        assert wide[kind].low < plain.low < narrow[kind].low, kind
        assert narrow[kind].high < plain.high < wide[kind].high, kind
    assert intervals() == before


def test_a_level_that_is_asked_for_is_before_the_one_in_force():
    with interval_level(0.5):
        assert mean_over_seeds([1.0, 2.0, 3.0], 0.9).high - 2 == pytest.approx(2.919986 / 3**0.5)
        assert wilson(3, 6, 0.95) == wilson(3, 6, level=0.95) != wilson(3, 6)


def test_a_level_is_a_share_between_nothing_and_all():
    with pytest.raises(ValueError, match="level must be above 0 and below 1, not 95"):
        interval_level(95)


def test_a_gap_is_paired_unit_by_unit():
    hits, n = np.array([1.0, 4.0, 2.0, 0.0]), np.array([4.0, 4.0, 4.0, 4.0])
    found = bootstrap_gap((hits + 1, n), (hits, n))
    assert found == Interval(0.25, 0.25, 0.25)
    assert np.isnan(bootstrap_gap((hits[:1], n[:1]), (hits[:1], n[:1])).low)


# -- shares over units ------------------------------------------------------------------------


def ends_of(share: float, n: float, far: float) -> tuple[float, float]:
    """Where a share is `far` standard errors from the one that was seen: a quadratic's roots."""
    roots = np.roots([1 + far**2 / n, -2 * share - far**2 / n, share**2])
    return float(min(roots)), float(max(roots))


def test_no_hit_in_any_unit_has_an_interval_of_a_width():
    found = share_of_units(np.zeros(8), np.full(8, 50))
    # (0 - p) / sqrt(p (1 - p) / 400) is t of 7 degrees, 2.3646
    assert (found.estimate, found.low) == (0, 0)
    assert found.high == pytest.approx(2.3646243**2 / (400 + 2.3646243**2))
    every = share_of_units(np.full(8, 50), np.full(8, 50))
    assert (every.low, every.high) == pytest.approx((1 - found.high, 1))


def test_one_unit_has_wilsons_interval_over_its_answers():
    assert share_of_units([3], [50]) == wilson(3, 50)
    assert share_of_units([0, 3], [0, 50]) == wilson(3, 50)
    assert share_of_units([0], [50]).high > 0.05
    # units of one answer each are independent answers
    assert share_of_units([1, 0, 0, 1], np.ones(4)) == wilson(2, 4)


def test_answers_that_share_units_are_worth_fewer():
    hits, counts = np.array([20.0, 0.0, 10.0]), np.array([50.0, 50.0, 50.0])
    found = share_of_units(hits, counts)
    share, error = errors_by_hand(hits, counts)
    worth = share * (1 - share) / error**2
    assert worth < 20
    assert (found.low, found.high) == pytest.approx(ends_of(share, worth, 4.3026527), abs=1e-6)
    alike = share_of_units([10, 10, 10], counts)
    assert (alike.low, alike.high) == pytest.approx(ends_of(0.2, 150, 4.3026527), abs=1e-6)


@pytest.mark.parametrize("spread", [1.0, 2.0])
def test_rates_over_eight_questions_hold_the_truth_though_questions_differ(spread):
    generator = np.random.default_rng(7)
    truth = (1 / (1 + np.exp(3 - spread * generator.normal(size=400_000)))).mean()
    hits = 0
    for _ in range(300):
        chances = 1 / (1 + np.exp(3 - spread * generator.normal(size=8)))
        found = share_of_units(generator.binomial(50, chances), np.full(8, 50))
        hits += found.low <= truth <= found.high
    assert hits / 300 >= 0.92


def test_a_difference_of_shares_has_a_width_where_nothing_was_hit_and_is_paired():
    n = np.full(8, 50.0)
    nothing = gap_of_shares((np.zeros(8), n), (np.zeros(8), n))
    alone = share_of_units(np.zeros(8), n)
    assert nothing.high == pytest.approx(alone.high)
    assert nothing.low == pytest.approx(-alone.high)
    own = np.arange(8.0) * 5
    paired = gap_of_shares((own + 5, n), (own, n))
    assert paired.estimate == pytest.approx(0.1)
    assert paired.high - paired.low < 0.2 * (
        share_of_units(own, n).high - share_of_units(own, n).low
    )


def test_holm_is_that_of_the_definition():
    # smallest times n, next times n - 1, ...; never below the one before, never above 1
    assert holm([0.01, 0.04, 0.03, 0.5]) == pytest.approx([0.04, 0.09, 0.09, 0.5])
    assert holm([0.6, 0.7]) == pytest.approx([1, 1])
    assert holm([]).size == 0


@pytest.mark.parametrize(("low", "high"), [(0.2, 1.8), (0.01, 3.0), (-0.01, 2.0), (-1.0, 1.5)])
@pytest.mark.parametrize("degrees", [2, 7, np.inf])
@pytest.mark.parametrize("sign", [1, -1])
def test_p_is_below_alpha_where_the_interval_excludes_zero_and_only_there(low, high, degrees, sign):
    ends = sorted([sign * low, sign * high])
    found = Interval(sign * 1.0, *ends)
    for level in (0.9, 0.95):
        p = p_value(found, degrees=degrees, level=level)
        assert (p < 1 - level) == found.excludes_zero
    assert np.isnan(p_value(Interval(1.0)))


def test_p_is_that_of_a_t_test():
    values = np.array([0.3, 0.5, 0.1, 0.6, -0.1])
    found = p_value(mean_over_seeds(values), degrees=4)
    assert found == pytest.approx(stats.ttest_1samp(values, 0).pvalue)


def test_a_sample_of_one_unit_adds_no_spread_and_takes_none_away():
    units = np.random.default_rng(0).normal(size=12)

    def mean(*places: np.ndarray) -> float:
        return float(units[places[-1]].mean())

    alone = bootstrap_statistic(mean, 12, estimate=float(units.mean()))
    beside = bootstrap_statistic(mean, 1, 12, estimate=float(units.mean()))
    assert (beside.low, beside.high) == pytest.approx((alone.low, alone.high), rel=0.1)
    assert np.isnan(bootstrap_statistic(lambda place: 1.0, 1, estimate=1.0).low)
