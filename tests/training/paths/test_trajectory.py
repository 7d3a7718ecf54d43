"""Paths compared: closed forms of the local cosine, planted turns, and none where there is none."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from emlens.training import TrainingPath, Trajectory, trajectory
from emlens.training.paths.transition import find_transition, regular

NAME = "model.layers.1.mlp.down_proj.B"


def path_of(points, steps=None, gradients=None) -> TrainingPath:
    states = {NAME: torch.tensor(np.asarray(points), dtype=torch.float32)}
    kept = {} if gradients is None else {NAME: torch.tensor(gradients, dtype=torch.float32)}
    return TrainingPath(tuple(steps or range(len(points))), states, kept)


def turn(n=60, at=25, d=200, noise=0.5, degrees=90.0, seed=0) -> np.ndarray:
    """A path of two straight lines that meet at a record, with noise in every move."""
    moves = noise * np.random.default_rng(seed).normal(size=(n, d)) / np.sqrt(d)
    angle = np.radians(degrees)
    moves[:at, 0] += 1
    moves[at:, :2] += [np.cos(angle), np.sin(angle)]
    return np.concatenate([np.zeros((1, d)), np.cumsum(moves, axis=0)])


def found_in(points, **settings):
    return trajectory({"run": path_of(points)}, min_move=0, **settings).transition("run")


def plain_local_cosine(points: np.ndarray, steps, k: int, min_move: float) -> list[float]:
    at = {step: points[place].astype(float) for place, step in enumerate(steps)}
    found = []
    for t in steps:
        if t - k not in at or t + k not in at:
            found.append(float("nan"))
            continue
        back, forth = at[t - k] - at[t], at[t + k] - at[t]
        lengths = np.linalg.norm(back), np.linalg.norm(forth)
        still = max(lengths) < min_move or min(lengths) == 0
        found.append(float("nan") if still else float(back @ forth / lengths[0] / lengths[1]))
    return found


# -- local cosine ---------------------------------------------------------------------------------


@pytest.mark.parametrize("min_move", [0.0, 1.3])
def test_local_cosine_equals_a_plain_loop_on_irregular_steps(min_move):
    steps = (1, 2, 3, 4, 5, 10, 15, 20, 25, 32)
    points = np.random.default_rng(0).normal(size=(10, 3)).cumsum(0).astype(np.float32)
    made = trajectory({"run": path_of(points, steps)}, lags=[1, 5, 7], min_move=min_move)
    for k, values in zip((1, 5, 7), made.local_cosines["run"], strict=True):
        np.testing.assert_allclose(values, plain_local_cosine(points, steps, k, min_move))


def test_a_straight_path_has_minus_one_and_no_values_at_the_ends():
    made = trajectory({"run": path_of(np.arange(12)[:, None] * np.ones(3))}, lags=[2])
    values = np.array(made.local_cosines["run"][0])
    assert np.isnan(values[[0, 1, -2, -1]]).all()
    np.testing.assert_allclose(values[2:-2], -1)


def test_a_right_angle_has_zero_and_a_way_back_has_one():
    for degrees, wanted in ((90, 0.0), (180, 1.0), (60, -0.5)):
        made = trajectory({"run": path_of(turn(12, 6, noise=0, degrees=degrees))}, lags=[3])
        assert made.local_cosines["run"][0][6] == pytest.approx(wanted, abs=1e-6)


def test_on_a_circle_the_local_cosine_is_minus_that_of_the_angle():
    angle = 2 * np.pi / 40
    around = angle * np.arange(40)
    points = np.stack([np.cos(around), np.sin(around)], axis=1)
    made = trajectory({"run": path_of(points)}, lags=[1, 3, 6])
    for k, values in zip((1, 3, 6), made.local_cosines["run"], strict=True):
        # both chords span the angle k * angle, so pi - k * angle lies between them
        np.testing.assert_allclose(values[k:-k], -np.cos(k * angle), atol=1e-5)


def test_moves_shorter_than_the_papers_threshold_count_as_none():
    line = 0.001 * np.arange(12)[:, None] * np.ones(1)
    made = trajectory({"run": path_of(line)}, lags=[3, 4])
    assert np.isnan(made.local_cosines["run"][0]).all()
    np.testing.assert_allclose(np.array(made.local_cosines["run"][1])[4:-4], -1, atol=1e-6)


def test_lags_count_steps_or_records_and_follow_the_usual_distance():
    steps = (*range(1, 11), *range(15, 105, 5), 102)
    points = np.arange(len(steps))[:, None] * np.ones(2)
    assert regular(steps) == (5, [4, *range(9, 28)])
    assert trajectory({"run": path_of(points, steps)}).lags["run"] == (5, 10, 15)
    made = trajectory({"run": path_of(points, steps)}, unit="records", min_move=0)
    assert made.lags["run"] == (1, 2, 3)
    np.testing.assert_allclose(made.local_cosines["run"][0][1:-1], -1)


# -- components, norms, cosines -------------------------------------------------------------------


def test_components_are_those_of_scikit_learn_on_all_records():
    from sklearn.decomposition import PCA

    first, second = turn(20, 8, 30), turn(15, 5, 30, seed=1)
    made = trajectory({"a": path_of(first), "b": path_of(second)}, components=4)
    both = np.concatenate([first, second]).astype(np.float32).astype(float)
    pca = PCA(4, svd_solver="full")
    wanted = pca.fit_transform(both)
    ours = np.concatenate([made.coordinates["a"], made.coordinates["b"]])
    np.testing.assert_allclose(np.abs(ours), np.abs(wanted), atol=1e-6)
    np.testing.assert_allclose(made.explained, pca.explained_variance_ratio_, atol=1e-9)


def test_a_planar_path_keeps_its_distances_in_the_plane():
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(50, 2)))[0]
    flat = turn(20, 8, 2, noise=0.3)
    made = trajectory({"run": path_of(flat @ basis.T + 3.0)})
    assert sum(made.explained[:2]) == pytest.approx(1)
    plane = np.array(made.coordinates["run"])[:, :2]
    apart = np.linalg.norm(plane[:, None] - plane[None], axis=-1)
    np.testing.assert_allclose(
        apart, np.linalg.norm(flat[:, None] - flat[None], axis=-1), atol=1e-4
    )


def test_several_parameters_count_as_one_long_vector():
    points = turn(20, 8, 30).astype(np.float32)
    parts = {
        "layers.0.B": torch.tensor(points[:, :12]).reshape(-1, 3, 4),
        "layers.1.B": torch.tensor(points[:, 12:]),
        "layers.1.A": torch.full((21, 5), 9.0),
    }
    split = trajectory({"run": TrainingPath(tuple(range(21)), parts)})
    whole = trajectory({"run": path_of(points)})
    assert split.parameters == ("layers.0.B", "layers.1.B")
    for part in ("norms", "final_cosines", "local_cosines"):
        ours, theirs = getattr(split, part)["run"], getattr(whole, part)["run"]
        ours, theirs = (x["run"] if isinstance(x, dict) else x for x in (ours, theirs))
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-9)


def test_comparison_scores_equal_those_of_the_matrices_and_do_not_see_a_turn_of_columns():
    generator = torch.Generator().manual_seed(0)
    states = {f"layers.{n}.B": torch.randn(4, 8, 2, generator=generator) for n in (0, 1)}
    mixed, _ = torch.linalg.qr(torch.randn(2, 2, generator=generator))
    turned = {name: state @ mixed for name, state in states.items()}
    runs = {"plain": TrainingPath((0, 1, 2, 3), states)}
    runs["turned"] = TrainingPath((0, 1, 2, 3), turned)
    made = trajectory(runs)

    def stacked(of, record):
        return np.concatenate([state[record].numpy() for state in of.values()], axis=1)

    for record in range(4):
        one, last = stacked(states, record).astype(float), stacked(states, 3).astype(float)
        wanted = np.linalg.norm(one.T @ last) / np.linalg.norm(one) / np.linalg.norm(last)
        for other in runs:
            assert made.final_scores["plain"][other][record] == pytest.approx(wanted, abs=1e-6)
    assert abs(made.final_cosines["plain"]["turned"][-1]) < 0.95
    assert "score with turned, final" in made.table()


def test_for_a_single_column_the_comparison_score_is_the_cosine_without_its_sign():
    points = turn(20, 8, 30)
    points[0] = 0
    made = trajectory({"run": path_of(points), "back": path_of(-points)})
    for other in ("run", "back"):
        scores, cosines = (made.final_scores["run"][other], made.final_cosines["run"][other])
        np.testing.assert_allclose(scores, np.abs(cosines), atol=1e-6)
        assert np.isnan(scores[0])
    apart = {"a.B": torch.ones(3, 4, 1), "b.B": torch.ones(3, 5, 1)}
    assert trajectory({"run": TrainingPath((0, 1, 2), apart)}).final_scores == {}


def test_norms_and_cosines_with_the_final_states_equal_a_plain_loop():
    generator = np.random.default_rng(0)
    general, narrow = generator.normal(size=(2, 6, 9)).astype(np.float32)
    general[0] = 0
    slopes = generator.normal(size=(6, 9)).astype(np.float32)
    slopes[0] = np.nan
    made = trajectory({"general": path_of(general, gradients=slopes), "narrow": path_of(narrow)})

    def cosine(a, b):
        return a @ b / np.linalg.norm(a) / np.linalg.norm(b)

    np.testing.assert_allclose(made.norms["general"], np.linalg.norm(general, axis=1), rtol=1e-5)
    for end, other in ((general[-1], "general"), (narrow[-1], "narrow")):
        ours = made.final_cosines["general"][other]
        np.testing.assert_allclose(ours[1:], [cosine(x, end) for x in general[1:]], atol=1e-5)
        assert np.isnan(ours[0])
        downhill = made.descent_cosines["general"][other]
        np.testing.assert_allclose(downhill[1:], [-cosine(x, end) for x in slopes[1:]], atol=1e-5)
        assert np.isnan(downhill[0])
    assert list(made.descent_cosines) == ["general"]


# -- transitions ----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("noise", "degrees"), [(0.0, 90), (0.5, 90), (1.0, 90), (0.2, 45)])
def test_a_planted_turn_is_found_within_its_interval(seed, noise, degrees):
    turned = found_in(turn(60, 25, 300, noise, degrees, seed))
    assert turned.step is not None and turned.low is not None and turned.high is not None
    assert turned.low <= 25 <= turned.high
    assert abs(turned.step - 25) <= 2
    assert turned.high - turned.low <= 12
    assert turned.p_value < 0.05


def test_steps_of_the_transition_are_updates_and_its_peaks_are_given_per_lag():
    steps = tuple(range(0, 305, 5))
    made = trajectory({"run": path_of(turn(60, 25), steps)})
    turned = made.transition("run")
    assert turned.step == 125
    assert turned.peaks == (125, 125, 125)


def without_a_turn(kind: str, seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    n, d = 70, 100
    noise = generator.normal(size=(n, d)) / 10
    if kind == "random walk":
        return noise.cumsum(0)
    if kind == "straight and noisy":
        return (0.1 + noise).cumsum(0)
    if kind == "noise at each record":
        return np.arange(n)[:, None] * 0.1 + noise
    if kind == "fading rate":
        rate = np.minimum(np.arange(1, n + 1) / 5, 1) * (1 - np.arange(n) / n)
        return (rate[:, None] * (0.1 * np.exp(-np.arange(n) / 30)[:, None] + noise / 3)).cumsum(0)
    around = np.linspace(0, np.pi, n)
    circle = 20 * np.stack([np.cos(around), np.sin(around)], axis=1)
    return np.pad(circle, ((0, 0), (0, d - 2))) + (noise / 5).cumsum(0)


@pytest.mark.parametrize(
    "kind",
    ["random walk", "straight and noisy", "noise at each record", "fading rate", "half circle"],
)
def test_noise_without_a_turn_is_said_to_have_none(kind):
    found = [found_in(without_a_turn(kind, seed), lags=[1, 2, 3]).step for seed in range(12)]
    # the test has a level of 5%: two of twelve or more come by chance in 12% of such series
    assert sum(step is not None for step in found) <= 1


def test_a_straight_line_and_too_few_records_have_no_transition():
    line = np.arange(30.0)[:, None] * np.ones(4)
    assert str(found_in(line)).startswith("no transition: the peaks stand out by 0.000")
    few = found_in(line[:6])
    assert few.step is None
    assert "fewer than 5 equally spaced records" in few.reason


def test_the_same_seed_gives_the_same_verdict():
    gram = turn() @ turn().T
    one, two = (find_transition(gram, range(61), (1, 2), range(61), seed=3) for _ in range(2))
    assert one == two


def test_a_run_that_there_is_not_is_named():
    made = trajectory({f"seed {n}": path_of(turn(60, 24 + n, 300)) for n in range(2)})
    with pytest.raises(ValueError, match="there is no run 'x'; the runs are seed 0"):
        made.transition("x")


# -- the result -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def both() -> Trajectory:
    slopes = np.random.default_rng(0).normal(size=(61, 200))
    return trajectory(
        {"general": path_of(turn(), gradients=slopes), "narrow": path_of(turn(40, 20))}
    )


def test_a_result_comes_back_as_it_was_saved(both, tmp_path):
    read = Trajectory.load(both.save(tmp_path / "trajectory.json"))
    assert read.transition("general") == both.transition("general")
    assert read.table().equals(both.table())


def test_a_table_has_one_row_per_record(both):
    frame = both.table()
    assert len(frame) == 61 + 41
    wanted = ["PC1", "local cosine, k = 2 steps", "cosine of -gradient with narrow, final"]
    assert {"run", "step", "norm", *wanted} <= set(frame)
    assert [both.transition(run).step for run in both.steps] == [25, 20]


def test_plots_show_the_numbers(both):
    ax = both.plot()
    assert ax.get_xlabel() == f"PC1 ({100 * both.explained[0]:.0f}% of variance)"
    np.testing.assert_allclose(
        ax.lines[0].get_xydata(), np.array(both.coordinates["general"])[:, :2]
    )
    curves = [line.get_ydata() for line in both.plot_local_cosine().lines]
    for run in both.steps:
        wanted = np.array(both.local_cosines[run][1])
        assert any(np.array_equal(curve, wanted, equal_nan=True) for curve in curves)
    norms = [list(line.get_ydata()) for line in both.plot_norm().lines]
    assert list(both.norms["general"]) in norms
    assert list(both.norms["narrow"]) in norms
    with pytest.raises(ValueError, match="run 'general' has no lag 7; it has 1, 2, 3"):
        both.plot_local_cosine(7)


@pytest.mark.parametrize(
    ("runs", "settings", "message"),
    [
        ({}, {}, "there are no runs to compare"),
        (
            {"a": turn(), "b": turn(d=9)},
            {},
            r"runs 'a' and 'b' differ in .*B \(\[200\] and \[9\]\)",
        ),
        ({"a": turn() * np.nan}, {}, "run 'a' has values that are not finite at step 0"),
        ({"a": turn()}, {"lags": [0]}, r"lags\[0\] must be at least 1, not 0"),
        ({"a": turn()}, {"unit": "epochs"}, "unknown unit 'epochs'; choose 'steps' or 'records'"),
        ({"a": turn()}, {"components": 0}, "components must be at least 1"),
        ({"a": turn()}, {"names": ["x"]}, "the path has no parameter 'x'"),
    ],
)
def test_what_cannot_be_compared_is_refused(runs, settings, message):
    with pytest.raises(ValueError, match=message):
        trajectory({name: path_of(points) for name, points in runs.items()}, **settings)
