"""`skip_step`: chosen ranges of steps."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import sequences
import trees
from skipping import GRADS, losses_of_a_run, once, promotes, run_losses

import clipax


@pytest.mark.slow_but(6)
@pytest.mark.parametrize(
    ("ranges", "skipped"),
    [
        ((), []),
        (((0, 1),), [0]),
        (((2, 4),), [2, 3]),
        (((1, 2), (4, 6)), [1, 4, 5]),
        ([[4, 6], [1, 2]], [1, 4, 5]),
        (((1, 4), (2, 5), (3, 4)), [1, 2, 3, 4]),
        (((0, 2), (2, 4)), [0, 1, 2, 3]),
        (((5, 2**40),), [5, 6, 7]),
        (((2**31 - 1, 2**31), (2**40, 2**41)), []),
        (((np.int64(6), np.uint8(8)),), [6, 7]),
        (np.array([[6, 8]]), [6, 7]),
    ],
)
def test_chosen_ranges_of_steps_are_skipped(ranges: Any, skipped: list[int]) -> None:
    column = np.ones((8, 1), np.float32)
    out, states = run_losses(clipax.skip_step(optax.sgd(1.0), skip_ranges=ranges), column)
    assert np.flatnonzero(states.is_skipped).tolist() == skipped
    assert np.flatnonzero(out[:, 0] == 0).tolist() == skipped
    np.testing.assert_array_equal(states.norm, 1.0)
    counts = states.taken_count + states.skipped_count
    np.testing.assert_array_equal(counts, np.arange(8) + 1)
    np.testing.assert_array_equal(states.step_count, counts)
    assert states.step_count.dtype == np.int32


def test_edge_a_chosen_range_is_as_if_its_steps_had_not_been() -> None:
    """No window learns them, and the schedule does not count them."""
    rules = {
        "skip_above": lambda count: 30.0 - 0.1 * jnp.asarray(count, jnp.float32),
        "z_max": 3.0,
        "loss_z_max": 3.0,
        "window_size": 12,
    }
    sequence, losses = sequences.long_run(3), losses_of_a_run()
    rows = np.arange(sequences.LONG_COUNT)
    is_chosen = ((rows >= 60) & (rows < 75)) | ((rows >= 138) & (rows < 143)) | (rows == 230)
    ranges = ((60, 75), (138, 143), (230, 231))
    chosen = clipax.skip_step(optax.sgd(1.0, momentum=0.9), skip_ranges=ranges, **rules)
    plain = clipax.skip_step(optax.sgd(1.0, momentum=0.9), **rules)
    out, states = run_losses(chosen, sequence, losses)
    kept = {name: leaf[~is_chosen] for name, leaf in sequence.items()}
    kept_out, kept_states = run_losses(plain, kept, losses[~is_chosen])
    trees.assert_bitwise({name: leaf[~is_chosen] for name, leaf in out.items()}, kept_out)
    assert 10 < kept_states.is_skipped.sum() < 200
    last, last_kept = (jax.tree.map(lambda leaf: leaf[-1], s) for s in (states, kept_states))
    skipped = last_kept.skipped_count + is_chosen.sum(dtype=np.int32)
    trees.assert_bitwise(last, last_kept._replace(skipped_count=skipped))
    assert bool(states.is_skipped[is_chosen].all())
    for leaf in jax.tree.leaves(out):
        np.testing.assert_array_equal(leaf[is_chosen], 0)
    assert last.step_count == sequences.LONG_COUNT


def test_edge_chosen_steps_neither_count_as_steps_in_a_row_nor_end_the_row() -> None:
    column = np.array([1, np.nan, 1, np.nan, np.nan, 1, 1], np.float32)[:, None]
    method = clipax.skip_step(optax.sgd(1.0), skip_ranges=((2, 4), (6, 7)))
    _, states = run_losses(method, column)
    assert states.is_skipped.tolist() == [False, True, True, True, True, False, True]
    assert states.consecutive_count.tolist() == [0, 1, 1, 1, 2, 0, 0]
    assert states.skipped_count.tolist() == [0, 1, 2, 3, 4, 4, 5]


def test_a_run_is_taken_up_again_with_other_ranges() -> None:
    """The state that was saved says which step is next, and is none of the ranges' business."""
    column = np.array([1, 1, np.nan, 1, 1, 1, 1, 1], np.float32)[:, None]

    def step(state: Any, updates: Any, method: Any) -> Any:
        _, state = method.update(updates, state)
        return state

    plain = clipax.skip_step(optax.sgd(1.0), z_max=6.0)
    other = clipax.skip_step(optax.sgd(1.0), z_max=6.0, skip_ranges=((0, 2), (4, 6)))
    state = plain.init(column[0])
    trees.assert_same_type(state, other.init(column[0]))
    skipped = []
    for row, updates in enumerate(column):
        state = step(state, updates, plain if row < 4 else other)
        skipped.append(bool(state.is_skipped))
    assert np.flatnonzero(skipped).tolist() == [2, 4, 5]


@promotes
def test_chosen_ranges_in_the_wrappers_of_optax() -> None:
    """Outside of `MultiSteps` a step is one gradient, inside it is a sum of them."""
    column = np.arange(1, 9, dtype=np.float32)[:, None]
    outside = clipax.skip_step(optax.MultiSteps(optax.sgd(1.0), 2), skip_ranges=((1, 3),))
    assert run_losses(outside, column)[0][:, 0].tolist() == [0, 0, 0, -2.5, 0, -5.5, 0, -7.5]
    inner = clipax.skip_step(optax.sgd(1.0), skip_ranges=((1, 3),))
    inside = optax.MultiSteps(inner, 2)
    through = optax.GradientTransformationExtraArgs(inside.init, inside.update)
    assert run_losses(through, column)[0][:, 0].tolist() == [0, -1.5, 0, 0, 0, 0, 0, -7.5]
    injected = optax.inject_hyperparams(clipax.skip_step)(
        optax.sgd(1.0), 6.5, skip_ranges=((1, 3),)
    )
    out = run_losses(injected, column)[0][:, 0].tolist()
    assert out == [-1, 0, 0, -4, -5, -6, 0, 0]


@promotes
def test_the_count_of_steps_leaves_optax_its_own_name() -> None:
    method = clipax.skip_step(optax.adam(1e-3), 1.0, skip_ranges=((0, 2),))
    _, state = once(method, GRADS)
    assert int(optax.tree.get(state, "taken_count")) == 0
    assert int(optax.tree.get(state, "skipped_count")) == 1
    assert int(optax.tree.get(state, "count")) == 0


NO_RANGES = [
    *(None, 3, 2.5, "1-2", (1, 2), [(1,)], ((1, 2, 3),), ((1, 1),), ((2, 1),), ((-1, 2),)),
    *(((1.0, 2.0),), ((False, True),), ((1, None),), ("12",), (range(1, 2),), ((0, 1), (3, 2))),
    *(({1, 2},), np.ones((2, 2)), np.array([1, 2]), np.ones((1, 3), int)),
]


@pytest.mark.parametrize("bad", NO_RANGES, ids=repr)
def test_bad_ranges_are_refused(bad: Any) -> None:
    wanted = r"^skip_ranges must be pairs \(start, stop\) of integers with 0 <= start < stop, as "
    with pytest.raises(ValueError, match=wanted) as caught:
        clipax.skip_step(optax.sgd(1.0), skip_ranges=bad)
    assert repr(bad) in str(caught.value)


def test_traced_ranges_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^skip_ranges must be known while tracing, got"):
        clipax.skip_step(optax.sgd(1.0), skip_ranges=jnp.array([[1, 2]]))
