"""Advice on made-up logs whose right answer is known."""

import json
import math
from typing import Any

import numpy as np
import pytest

import clipax
from clipax.advice import Advice

STEPS = 2000


def lognormal(spread: float = 0.2, steps: int = STEPS, seed: int = 0) -> np.ndarray:
    """Norms of usual size 1."""
    return np.exp(spread * np.random.default_rng(seed).normal(size=steps))


def with_spikes(at: Any, size: float = 20.0) -> np.ndarray:
    norms = lognormal()
    norms[at] *= size
    return norms


def fixed(code: str) -> float:
    """The bound in a line that chains a fixed bound and nothing more."""
    before, after = "optimizer = optax.chain(clipax.clip_by_global_norm(", "), optimizer)"
    assert code.startswith(before), code
    assert code.endswith(after), code
    return float(code.removeprefix(before).removesuffix(after))


def first(advice: Advice) -> str:
    return advice.recommendations[0].code


def candidate(advice: Advice, start: str) -> Any:
    return next(each for each in advice.candidates if each.code.startswith(f"clipax.{start}"))


def test_nearly_constant_norms_need_a_fixed_bound_above_them() -> None:
    advice = clipax.advise(lognormal(0.01))
    assert 1.9 < fixed(first(advice)) < 2.2
    assert advice.statistics.spike_count == 0
    assert advice.statistics.drift < 1.01


def test_equal_norms_look_clipped_and_are_refused_unless_they_are_said_to_be_raw() -> None:
    norms = np.full(STEPS, 2.0)
    with pytest.raises(ValueError, match=r"2000 of 2000 norms are 2, the largest"):
        clipax.advise(norms)
    advice = clipax.advise(norms, raw=True)
    assert fixed(first(advice)) == 4.0
    assert any("pile up" in limit for limit in advice.limits)


@pytest.mark.parametrize("spread", [0.1, 0.5, 1.0])
def test_log_normal_norms_need_a_fixed_bound_in_their_tail(spread: float) -> None:
    advice = clipax.advise(lognormal(spread))
    bound = fixed(first(advice))
    assert np.exp(2 * spread) < bound < 4 * np.exp(4 * spread)
    assert advice.statistics.spread == pytest.approx(spread, rel=0.1)
    assert advice.statistics.tail == pytest.approx(1, abs=0.2)
    assert candidate(advice, "clip_by_global_norm").usual_clipped < 0.01


@pytest.mark.parametrize("direction", [1, -1])
def test_norms_that_drift_far_need_a_bound_that_follows(direction: int) -> None:
    norms = lognormal() * 100.0 ** np.linspace(0, direction, STEPS)
    norms[150::300] *= 20
    advice = clipax.advise(norms)
    chosen = candidate(advice, advice.recommendations[0].clip.removeprefix("clipax."))
    assert chosen.kind == "adaptive"
    assert chosen.spikes_clipped == 1
    assert chosen.most_ratio < 8
    assert "No fixed bound fits" in advice.recommendations[0].why
    assert advice.statistics.drift > 10
    assert advice.statistics.spike_count == 7


def test_rare_spikes_need_a_fixed_bound_under_them() -> None:
    spikes = np.arange(100, STEPS, 200)
    advice = clipax.advise(with_spikes(spikes))
    bound = fixed(first(advice))
    assert np.quantile(lognormal(), 0.999) < bound < 10
    assert advice.statistics.spike_count == advice.statistics.spike_groups == len(spikes)
    assert candidate(advice, "clip_by_global_norm").spikes_clipped == 1
    assert advice.statistics.longest_group == 1


def test_spikes_in_groups_need_a_fixed_bound_under_them() -> None:
    groups = np.concatenate([np.arange(start, start + 12) for start in (500, 900, 1500)])
    advice = clipax.advise(with_spikes(groups))
    assert fixed(first(advice)) < 10
    assert advice.statistics.spike_count == 36
    assert advice.statistics.spike_groups == 3
    assert advice.statistics.longest_group == 12
    assert candidate(advice, "clip_by_global_norm").spikes_clipped == 1


def test_nan_and_inf_need_steps_that_are_left_out() -> None:
    norms = lognormal()
    norms[[0, 1, 700]], norms[701] = np.nan, np.inf
    advice = clipax.advise(norms)
    start = "optimizer = clipax.skip_step(optax.chain(clipax.clip_by_global_norm("
    assert first(advice).startswith(start)
    assert first(advice).endswith("), optimizer))")
    assert advice.statistics.nonfinite_count == 4
    assert advice.statistics.first_rows_nonfinite == 2
    assert any("2 of them the first ones" in limit for limit in advice.limits)


def test_a_run_that_diverged_is_advised_by_what_came_before() -> None:
    norms = lognormal()
    norms[300:] = np.nan
    advice = clipax.advise(norms)
    assert first(advice).startswith("optimizer = clipax.skip_step(optax.chain(")
    assert advice.statistics.nonfinite_count == STEPS - 300
    norms[1:] = np.nan
    assert clipax.advise(norms).recommendations == ()


def test_a_bound_under_all_norms_is_named_and_replaced() -> None:
    advice = clipax.advise(20 * lognormal(), max_norm=1.0)
    assert 30 < fixed(first(advice)) < 100
    assert advice.candidates[0].kind == "in use"
    assert advice.candidates[0].clipped == 1
    assert advice.candidates[0].mass_removed == pytest.approx(0.95, abs=0.01)
    (limit,) = (limit for limit in advice.limits if "normalizes" in limit)
    assert "100 % of the norms" in limit
    assert "20 times as long" in limit


def test_a_bound_that_is_never_reached_is_kept_while_it_is_near() -> None:
    advice = clipax.advise(0.5 * lognormal(), max_norm=2.0)
    assert fixed(first(advice)) == 2.0
    assert "Keep your bound: it never acted" in advice.recommendations[0].why
    assert any("above all norms" in limit for limit in advice.limits)
    # A thousand times the usual norm would let any spike pass.
    assert fixed(first(clipax.advise(0.001 * lognormal(), max_norm=1.0))) < 0.01


def test_a_bound_that_catches_the_spikes_is_kept() -> None:
    advice = clipax.advise(with_spikes([300, 900]), max_norm=3.0)
    assert fixed(first(advice)) == 3.0
    assert "clips 2 of 2 spikes" in advice.recommendations[0].why


def loss_after(spikes: Any, jump: float) -> np.ndarray:
    losses = np.linspace(3, 2, STEPS) + 0.01 * np.random.default_rng(1).normal(size=STEPS)
    for spike in spikes:
        losses[spike + 1 : spike + 20] += jump
    return losses


def test_spikes_before_jumps_of_the_loss_are_left_out() -> None:
    spikes = np.arange(300, STEPS, 300)
    advice = clipax.advise(with_spikes(spikes), loss_after(spikes, 1.0))
    assert first(advice).startswith("optimizer = clipax.skip_step(optax.chain(clipax.")
    assert first(advice).endswith(", optimizer), z_max=6.0)")
    assert advice.statistics.spikes_before_jumps == len(spikes)
    assert advice.statistics.usual_jump_share < 0.01
    assert "loss jumped after 6 of 6" in advice.recommendations[0].why
    # Not where the loss does not jump, or jumps elsewhere.
    for losses in (loss_after(spikes, 0.0), loss_after(spikes + 100, 1.0)):
        assert "skip_step" not in first(clipax.advise(with_spikes(spikes), losses))


def test_the_lines_to_paste_run() -> None:
    import optax

    norms = lognormal() * 100.0 ** np.linspace(0, 1, STEPS)
    norms[700] = np.nan
    spikes = np.arange(300, STEPS, 300)
    logs = [(norms, None), (with_spikes(spikes), loss_after(spikes, 1.0))]
    for advice in (clipax.advise(*log) for log in logs):
        for choice in advice.recommendations:
            names = {"optax": optax, "clipax": clipax, "optimizer": optax.sgd(0.1)}
            exec(choice.code, names)
            optimizer = names["optimizer"]
            updates, _ = optimizer.update({"w": np.ones(3)}, optimizer.init({"w": np.ones(3)}))
            assert np.isfinite(updates["w"]).all()


def test_a_replayed_candidate_says_what_its_bound_does() -> None:
    norms = with_spikes([300, 900])
    advice = clipax.advise(norms, max_norm=2.0)
    in_use = advice.candidates[0]
    assert in_use.code == "clipax.clip_by_global_norm(2.0)"
    assert in_use.clipped == pytest.approx(np.mean(norms > 2), abs=1e-9)
    removed = np.sum(np.maximum(norms - 2, 0)) / np.sum(norms)
    assert in_use.mass_removed == pytest.approx(removed, rel=1e-5)
    late = norms[200:]
    usual = late[late < 10]
    assert in_use.usual_clipped == pytest.approx(np.mean(usual > 2), abs=1e-9)
    assert in_use.start_clipped == pytest.approx(np.mean(norms[:200] > 2), abs=1e-9)
    assert 1.7 < in_use.least_ratio < 2 < in_use.most_ratio < 2.3


def test_the_start_has_no_say() -> None:
    norms = lognormal()
    norms[:300] *= np.linspace(40, 1, 300)
    advice = clipax.advise(norms, max_norm=3.0)
    assert fixed(first(advice)) == 3.0
    assert advice.candidates[0].start_clipped > 0.5
    assert 250 < advice.statistics.start_count < 320


def test_zeros_are_left_out() -> None:
    norms = lognormal()
    norms[::3] = 0
    advice = clipax.advise(norms)
    assert advice.statistics.zero_count == np.sum(norms == 0)
    assert advice.statistics.median == pytest.approx(1, abs=0.05)
    assert 1.5 < fixed(first(advice)) < 5
    assert any("exactly zero" in limit for limit in advice.limits)


def test_a_short_log_gets_one_choice_and_a_very_short_one_none() -> None:
    advice = clipax.advise(lognormal(steps=100))
    assert len(advice.recommendations) == 1
    assert any("short (100 norms)" in limit for limit in advice.limits)
    advice = clipax.advise(lognormal(steps=19))
    assert advice.recommendations == ()
    assert any("too few" in limit for limit in advice.limits)
    assert "No recommendation" in str(advice)
    assert clipax.advise([1.0]).recommendations == ()


def test_nothing_fit_is_said() -> None:
    rng = np.random.default_rng(0)
    # Every few steps another scale: no bound can follow.
    norms = lognormal(0.05) * 10.0 ** rng.choice([0, 0, 0, 2], STEPS)
    norms[::2] *= 1000.0 ** np.linspace(0, 1, STEPS)[::2]
    advice = clipax.advise(norms)
    assert "No candidate passes all tests" in advice.recommendations[0].why
    assert "of the usual norms" in advice.recommendations[0].why
    assert len(advice.recommendations) == 1


def test_how_often_the_log_has_a_norm_is_found_or_given() -> None:
    norms = lognormal()
    advice = clipax.advise(norms, steps=25 * np.arange(STEPS))
    assert any("every 25 steps" in limit for limit in advice.limits)
    advice = clipax.advise(norms, every=10)
    assert any("every 10 steps" in limit for limit in advice.limits)
    assert advice.steps[1] == 10
    assert not any("every" in limit for limit in clipax.advise(norms).limits)


def test_rounded_norms_are_noticed() -> None:
    advice = clipax.advise(0.2 * lognormal().round(1), max_norm=5.0)
    assert any("rounded to 0.01" in limit or "rounded to 0.02" in limit for limit in advice.limits)
    assert not any("rounded" in limit for limit in clipax.advise(lognormal()).limits)


@pytest.mark.parametrize("noise", [0.0, 1e-6, 3e-4])
def test_norms_after_a_clip_are_refused(noise: float) -> None:
    norms = np.minimum(lognormal(0.5), 1.2)
    norms *= 1 + noise * np.random.default_rng(2).normal(size=STEPS)
    with pytest.raises(ValueError, match=r"look like norms after a clip.*raw=True"):
        clipax.advise(norms)
    assert clipax.advise(norms, raw=True).recommendations


def test_a_few_unclipped_norms_above_the_pile_do_not_hide_it() -> None:
    norms = np.minimum(lognormal(0.5), 1.2)
    norms[:3] = 9.0
    with pytest.raises(ValueError, match=r"are 1\.2"):
        clipax.advise(norms, max_norm=1.2)


def test_rounding_does_not_make_a_pile() -> None:
    for norms in (lognormal().round(1), lognormal(0.05).round(2), lognormal(0.5).round(0)):
        clipax.advise(norms + 0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"norms": [1.0, -2.0]}, "norms must be >= 0, got -2"),
        ({"norms": [math.nan, 0.0]}, "norms must have a finite number > 0, got none"),
        ({"norms": []}, "norms must have a finite number > 0, got none"),
        ({"norms": [[1.0]]}, r"norms must have the shape \[steps\], got \[1, 1\]"),
        ({"norms": ["a"]}, "norms must be numbers, one for each step, got"),
        ({"losses": [1.0]}, r"losses must have the shape \[3\], got \[1\]"),
        ({"steps": [1.0, 2.0]}, r"steps must have the shape \[3\], got \[2\]"),
        ({"steps": [1.0, 3.0, 2.0]}, "steps must rise, got 2 after 3"),
        ({"max_norm": 0.0}, "max_norm must be a finite number > 0"),
        ({"max_norm": math.inf}, "max_norm must be a finite number > 0"),
        ({"every": 0}, "every must be a finite number >= 1"),
    ],
)
def test_a_bad_argument_is_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        clipax.advise(**{"norms": [1.0, 2.0, 3.0]} | arguments)


def test_the_advice_is_json_and_a_page() -> None:
    advice = clipax.advise(with_spikes([300]), loss_after([300], 1.0), max_norm=1.0)
    document = json.loads(json.dumps(advice.as_dict(), allow_nan=False))
    assert document["recommendations"][0]["code"] == first(advice)
    assert len(document["candidates"]) == len(advice.candidates)
    assert document["candidates"][0]["failed"]
    page = str(advice)
    assert first(advice) in page
    assert max(len(line) for line in page.splitlines() if "  " not in line) <= 100
    for each in advice.candidates:
        assert each.code.removeprefix("clipax.") in page


def test_progress_is_shown_where_it_is_asked_for() -> None:
    lines: list[str] = []
    advice = clipax.advise(lognormal(steps=50), progress=lines.append)
    adaptive = [each.code for each in advice.candidates if each.kind == "adaptive"]
    assert lines == ["statistics", "fixed bounds", *adaptive]


@pytest.mark.parametrize("every", [0, 0.5, -1, math.nan, math.inf, "10", True])
def test_a_step_from_norm_to_norm_is_at_least_one(every: Any) -> None:
    with pytest.raises(ValueError, match=r"every must be a finite number >= 1, got"):
        clipax.advise(lognormal(), every=every)


def test_a_bound_near_the_usual_norm_says_nothing_of_the_learning_rate() -> None:
    norms = lognormal()
    near, far = (
        " ".join(clipax.advise(norms, max_norm=float(np.median(norms)) * share).limits)
        for share in (0.98, 0.1)
    )
    assert "normalizes the gradient" in near
    assert "times as long" not in near
    assert "10 times as long" in far
