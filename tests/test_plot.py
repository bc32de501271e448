"""What `plot` draws: its lines, their labels, their numbers."""

import sys
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import clipax

pyplot = pytest.importorskip("matplotlib.pyplot")
pytestmark = pytest.mark.usefixtures("_promotes")

RUN = {
    "norm": [1.0, 4.0, 2.0, 8.0],
    "clipped_norm": [1.0, 2.0, 2.0, 2.0],
    "max_norm": [2.0, 2.0, 2.0, 2.0],
    "coefficient": [1.0, 0.5, 1.0, 0.25],
    "loss": [-1.0, 3.0, 2.0, 1.0],
}


@pytest.fixture(autouse=True)
def _no_figure_stays() -> Iterator[None]:
    yield
    pyplot.close("all")


def drawn(axes: Any) -> dict[str, tuple[list[float], list[float]]]:
    """Each line by its label, as its x and its y."""
    lines = axes.get_lines()
    labels = [line.get_label() for line in lines]
    assert len(set(labels)) == len(labels)
    return {
        label: (np.asarray(line.get_xdata()).tolist(), np.asarray(line.get_ydata()).tolist())
        for label, line in zip(labels, lines, strict=True)
    }


def colors(axes: Any) -> dict[str, str]:
    return {line.get_label(): line.get_color() for line in axes.get_lines()}


def test_one_run_shows_norms_bound_clipped_steps_and_loss() -> None:
    norms, losses = clipax.plot(RUN)
    shown = drawn(norms)
    steps = [0, 1, 2, 3]
    assert shown["norm"] == (steps, RUN["norm"])
    assert shown["norm after clipping"] == (steps, RUN["clipped_norm"])
    assert shown["bound"] == (steps, RUN["max_norm"])
    assert shown["clipped"][0] == [1, 3]
    assert set(shown) == {"norm", "norm after clipping", "bound", "clipped"}
    assert drawn(losses) == {"loss": (steps, RUN["loss"])}
    assert (norms.get_yscale(), losses.get_yscale()) == ("log", "linear")
    assert [each.get_text() for each in norms.get_legend().get_texts()] == list(shown)
    assert (norms.get_xlabel(), norms.get_ylabel(), losses.get_ylabel()) == (
        "step",
        "norm",
        "loss",
    )


def test_marks_stay_at_the_bottom_whatever_the_limits() -> None:
    (norms,) = clipax.plot({key: RUN[key] for key in ("norm", "coefficient")})
    before = norms.get_ylim()
    (marks,) = (line for line in norms.get_lines() if line.get_label() == "clipped")
    assert marks.get_transform() == norms.get_xaxis_transform()
    assert before[0] > 0.5


def test_a_list_of_metrics_and_a_dict_of_arrays_are_one_run() -> None:
    optimizer = optax.chain(clipax.clip_by_global_norm(2.0), optax.sgd(0.1))
    params = {"w": jnp.ones(2)}
    state, recorded = optimizer.init(params), []
    for size in (1.0, 4.0, 2.0):
        _, state = optimizer.update({"w": jnp.array([0.6, 0.8]) * size}, state, params)
        recorded.append(clipax.metrics(state))
    (of_list,) = clipax.plot(recorded)
    (of_dict,) = clipax.plot({key: [row[key] for row in recorded] for key in recorded[0]})
    assert drawn(of_list) == drawn(of_dict)
    np.testing.assert_allclose(drawn(of_list)["norm"][1], [1.0, 4.0, 2.0], rtol=1e-6)
    assert drawn(of_list)["clipped"][0] == [1]


def test_a_replay_is_drawn_as_the_run_that_it_replays() -> None:
    replayed = clipax.replay(clipax.clip_by_global_norm(2.0), RUN["norm"])
    (of_replay,) = clipax.plot(replayed)
    (of_run,) = clipax.plot({key: value for key, value in RUN.items() if key != "loss"})
    assert drawn(of_replay) == drawn(of_run)


def test_numbers_on_the_scale_are_no_powers() -> None:
    (norms,) = clipax.plot({"norm": [40.0, 60.0, 110.0]})
    norms.figure.canvas.draw()
    labels = {each.get_text() for each in norms.get_yticklabels(which="both")}
    assert {"100", "60"} <= labels
    assert not [label for label in labels if "10^" in label]


def test_steps_number_the_rows() -> None:
    norms, losses = clipax.plot(RUN, steps=[10, 20, 30, 40])
    assert drawn(norms)["norm"][0] == [10, 20, 30, 40]
    assert drawn(norms)["clipped"][0] == [20, 40]
    assert drawn(losses)["loss"][0] == [10, 20, 30, 40]


def test_several_runs_have_a_color_each() -> None:
    other = {"norm": [3.0, 3.0], "loss": [5.0, 4.0]}
    norms, losses = clipax.plot({"clipped": RUN, "no clip": other})
    assert set(drawn(norms)) == {"norm, clipped", "bound, clipped", "norm, no clip"}
    assert drawn(losses) == {
        "clipped": ([0, 1, 2, 3], RUN["loss"]),
        "no clip": ([0, 1], [5.0, 4.0]),
    }
    first, second = colors(losses)["clipped"], colors(losses)["no clip"]
    assert first != second
    assert colors(norms) == {
        "norm, clipped": first,
        "bound, clipped": first,
        "norm, no clip": second,
    }


def test_seeds_are_their_median_and_their_range() -> None:
    seeds = np.array([[1.0, 2.0, 9.0], [2.0, 3.0, 4.0]])
    (norms,) = clipax.plot({"norm": seeds})
    assert drawn(norms) == {"norm": ([0, 1], [2.0, 3.0])}
    (shade,) = norms.collections
    corners = shade.get_paths()[0].vertices
    assert {(0, 1), (0, 9), (1, 2), (1, 4)} <= {(x, y) for x, y in corners.tolist()}


def test_leaves_of_a_replay_are_their_median_and_their_range() -> None:
    leaves = {"a": [1.0, 4.0], "b": [3.0, 2.0], "c": [2.0, 9.0]}
    replayed = clipax.replay(clipax.clip_by_leaf_norm(3.5), leaves)
    (norms,) = clipax.plot(replayed)
    assert drawn(norms)["norm"] == ([0, 1], [2.0, 4.0])
    assert drawn(norms)["clipped"][0] == [1]


def test_it_draws_on_given_axes_without_a_legend() -> None:
    figure, given = pyplot.subplots(1, 2)
    assert clipax.plot(RUN, axes=given) == tuple(given)
    assert all(axes.get_legend() is None for axes in given)
    (norms,) = clipax.plot({"norm": [1.0]}, axes=figure.add_subplot())
    assert set(drawn(norms)) == {"norm"}
    # One panel is that of the norms.
    (norms,) = clipax.plot(RUN, axes=figure.add_subplot())
    assert "loss" not in drawn(norms)


def test_edge_what_a_log_scale_cannot_show_is_a_gap() -> None:
    run = {"norm": [0.0, 1.0, np.nan, np.inf], "max_norm": [np.inf, 2.0, 2.0, 2.0]}
    (norms,) = clipax.plot(run)
    np.testing.assert_array_equal(drawn(norms)["norm"][1], [np.nan, 1.0, np.nan, np.nan])
    np.testing.assert_array_equal(drawn(norms)["bound"][1], [np.nan, 2.0, 2.0, 2.0])
    (norms,) = clipax.plot({"norm": [np.nan, 0.0], "max_norm": [np.inf, np.inf]})
    assert drawn(norms) == {}


def test_edge_no_step_is_clipped() -> None:
    replayed = clipax.replay(clipax.clip_by_global_norm(100.0), RUN["norm"])
    (norms,) = clipax.plot(replayed)
    assert set(drawn(norms)) == {"norm", "bound"}


def test_edge_skipped_steps_have_their_own_norm_and_a_cross() -> None:
    optimizer = clipax.skip_step(
        optax.chain(clipax.clip_by_global_norm(2.0), optax.sgd(0.1)), skip_above=5.0
    )
    params = {"w": jnp.ones(2)}
    state, recorded = optimizer.init(params), []
    for size in (4.0, 8.0, 1.0):
        _, state = optimizer.update({"w": jnp.array([0.6, 0.8]) * size}, state, params)
        recorded.append(clipax.metrics(state))
    (norms,) = clipax.plot(recorded)
    np.testing.assert_allclose(drawn(norms)["norm"][1], [4.0, 8.0, 1.0], rtol=1e-6)
    np.testing.assert_allclose(
        drawn(norms)["norm after clipping"][1], [2.0, np.nan, 1.0], rtol=1e-6
    )
    assert drawn(norms)["clipped"][0] == [0]
    assert drawn(norms)["skipped"][0] == [1]


def test_edge_many_steps_are_the_median_and_the_range_of_neighbors() -> None:
    length = 5000  # groups of three
    values = 1.0 + np.arange(length) % 3
    values[7] = np.nan
    coefficient = np.where(np.arange(length) % 3 == 2, 0.5, 1.0)
    (norms,) = clipax.plot({"norm": values, "coefficient": coefficient})
    x, y = drawn(norms)["norm"]
    assert x == list(range(0, length, 3))
    assert set(y) - {2.0} == {1.0}  # the lower of the two that are left beside a NaN
    assert y.count(1.0) == 1
    (shade, *_) = norms.collections
    low, high = (extreme(shade.get_paths()[0].vertices[:, 1]) for extreme in (np.min, np.max))
    assert (low, high) == (1.0, 3.0)
    assert len(drawn(norms)["clipped"][0]) == length // 3


@pytest.mark.parametrize("bad", [3, {}, [], {"grad_norm": [1.0]}, [{"loss": 1.0}], {"loss": [1]}])
def test_what_is_no_run_is_refused(bad: Any) -> None:
    with pytest.raises(ValueError, match="runs must be what replay returns, or have 'norm'"):
        clipax.plot(bad)


@pytest.mark.parametrize("bad", ["high", 1.0, [[1.0], [1.0, 2.0]], {"w": 1.0}])
def test_norms_that_are_no_numbers_for_the_steps_are_refused(bad: Any) -> None:
    with pytest.raises(ValueError, match="norm must"):
        clipax.plot({"norm": bad})


def test_series_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"one number for each step, got {'norm': 2, 'loss': 1}"):
        clipax.plot({"norm": [1.0, 2.0], "loss": [1.0]})
    with pytest.raises(ValueError, match=r"steps must have the shape \[4\], got \[3\]"):
        clipax.plot(RUN, steps=[1, 2, 3])
    with pytest.raises(ValueError, match=r"axes must be those of the norms, .* got 3"):
        clipax.plot(RUN, axes=pyplot.subplots(1, 3)[1])


def test_without_matplotlib_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'clipax\[plot\]'"):
        clipax.plot(RUN)
