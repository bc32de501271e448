"""Metrics as plain floats, under keys that loggers take."""

import json
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import clipax

NESTED = {
    "mlp/~/linear_0": {"w": jnp.array([3.0, 4.0])},
    "name with spaces, é": {"b:0": jnp.array([1.0])},
    "norm": [jnp.array([1.0]), jnp.array([2.0])],
}


def metrics() -> dict[str, Any]:
    """Of a nested tree with unusual names, before and after the first step."""
    clip = clipax.track(clipax.clip_by_leaf_norm(2.0), groups=["norm", "norm/0"])
    _, state = clip.update(NESTED, clip.init(NESTED))
    first = clipax.metrics(clip.init(NESTED), per_leaf=True)
    return clipax.metrics(state, per_leaf=True) | {f"first/{key}": first[key] for key in first}


def test_json_takes_the_floats() -> None:
    floats = clipax.as_floats(metrics())
    assert json.loads(json.dumps(floats)) == floats
    assert all(type(value) is float for value in floats.values())
    assert floats["norm/mlp/linear_0/w"] == 5
    assert floats["norm/all"] == 5
    assert floats["norm/name_with_spaces___/b_0"] == 1


def test_keys_have_no_other_characters_and_are_no_folders() -> None:
    values = metrics()
    keys = set(clipax.as_floats(values, prefix="train/"))
    assert len(keys) == len(values)
    for key in keys:
        assert re.fullmatch(r"train(/[A-Za-z0-9_.-]+)+", key)
        assert not any(other.startswith(f"{key}/") for other in keys)


def test_edge_segments_without_letters_and_digits_are_left_out() -> None:
    values = {"a/~/b": 1.0, "//c/../d/": 2.0, "e/~": 3.0}
    assert clipax.as_floats(values) == {"a/b": 1.0, "c/d": 2.0, "e": 3.0}


def test_edge_other_characters_are_underscores() -> None:
    assert clipax.as_floats({"a b:c%é": 1.0}) == {"a_b_c__": 1.0}


def test_edge_a_folder_of_other_keys_is_all_of_them() -> None:
    assert clipax.as_floats({"norm": 1.0, "norm/w": 2.0}) == {"norm/all": 1.0, "norm/w": 2.0}


def test_edge_equal_keys_are_numbered() -> None:
    values = {"a b": 1.0, "a:b": 2.0, "a_b": 3.0}
    assert clipax.as_floats(values) == {"a_b": 1.0, "a_b_2": 2.0, "a_b_3": 3.0}


def test_edge_arrays_have_a_key_for_each_entry() -> None:
    clip = clipax.clip_by_global_norm(1.0)
    states = jax.vmap(clip.init)(jnp.ones((2, 3)))
    floats = clipax.as_floats(clipax.metrics(states))
    assert floats["coefficient/0"] == floats["coefficient/1"] == 1
    assert clipax.as_floats({"a": np.ones((1, 2))}) == {"a/0_0": 1.0, "a/0_1": 1.0}


def test_edge_nan_and_inf_stay() -> None:
    floats = clipax.as_floats({"a": jnp.array(jnp.inf), "b": jnp.array(jnp.nan)})
    assert floats["a"] == np.inf
    assert np.isnan(floats["b"])
    assert json.dumps(floats) == '{"a": Infinity, "b": NaN}'


@pytest.mark.parametrize("bad", ["1", 1j, None, object()])
def test_what_is_no_number_is_refused(bad: Any) -> None:
    with pytest.raises(ValueError, match=r"^values must be real numbers, got .* for 'a'"):
        clipax.as_floats({"a": bad})


@pytest.mark.parametrize("bad", [3, None, {3: 1.0}, [("a", 1.0)]])
def test_what_is_no_dict_of_names_is_refused(bad: Any) -> None:
    with pytest.raises(ValueError, match=r"^values must be a dict from names to numbers, got "):
        clipax.as_floats(bad)


@pytest.mark.parametrize("bad", [3, None])
def test_a_prefix_that_is_no_string_is_refused(bad: Any) -> None:
    with pytest.raises(ValueError, match=r"^prefix must be a string, got "):
        clipax.as_floats({"a": 1.0}, prefix=bad)


def test_values_of_a_trace_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^values must be known, got .* for 'norm'"):
        jax.jit(lambda x: clipax.as_floats({"norm": x}))(1.0)


def test_bfloat16_integers_and_numbers_of_python_are_floats() -> None:
    values = {"a": jnp.array(1.5, jnp.bfloat16), "b": jnp.array(3), "c": 2, "d": np.True_}
    assert clipax.as_floats(values) == {"a": 1.5, "b": 3.0, "c": 2.0, "d": 1.0}


def test_the_paths_of_flax_have_no_values_at_their_ends() -> None:
    nnx = pytest.importorskip("flax.nnx")
    params = nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Param)
    state = clipax.clip_by_leaf_norm(1.0).init(params)
    keys = set(clipax.as_floats(clipax.metrics(state, per_leaf=True)))
    assert {"norm/kernel", "norm/bias"} <= keys


other_packages = pytest.mark.filterwarnings("ignore")


@other_packages
def test_mlflow_takes_the_keys(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    floats = clipax.as_floats(metrics(), prefix="train/")
    client = mlflow.MlflowClient(tracking_uri=tmp_path.as_uri())
    run = client.create_run(client.create_experiment("clips")).info.run_id
    for key, value in floats.items():
        client.log_metric(run, key, value, step=1)
    assert client.get_run(run).data.metrics == floats


@other_packages
def test_wandb_takes_the_keys(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    floats = clipax.as_floats(metrics(), prefix="train/")
    with wandb.init(project="clips", mode="offline", dir=tmp_path) as run:
        run.log(floats, step=1)
    wandb.teardown()  # Its service may still be writing when the run is over.
    (written,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    for key in floats:
        assert key.encode() in written.read_bytes()


@other_packages
def test_tensorboard_takes_the_keys(tmp_path: Any) -> None:
    pytest.importorskip("tensorboard")
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    floats = clipax.as_floats(metrics(), prefix="train/")
    with tensorboard.SummaryWriter(tmp_path) as writer:
        for key, value in floats.items():
            writer.add_scalar(key, value, 1)
    events = accumulator.EventAccumulator(str(tmp_path)).Reload()
    assert set(events.Tags()["scalars"]) == set(floats)
    for key, value in floats.items():
        np.testing.assert_allclose(events.Scalars(key)[0].value, value, rtol=1e-6)
