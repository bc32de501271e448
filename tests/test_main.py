"""The demonstration run: what it promises on the command line, on paper and in the plot."""

import argparse
import contextlib
import io
import json
import math
import pathlib
import subprocess
import sys
import typing

import jax
import numpy as np
import optax
import pytest
import trees

import clipax
from clipax import __main__
from clipax._demo import _command, _methods, _picture, _report, _training

STEPS, SEEDS = 12, 2
FEW = ["none", "clip_by_global_norm", "clip_by_value", "clip_cotangent", "autoclip"]
# One of each kind: a table of all of them is long in compiling.
SOME = [*FEW, "clip_by_leaf_norm", "clip_by_quantile", "zclip", "adagc", "skip_step"]
BUILDERS = {"clip_by", "observe", "track"}
ALIASES = {"clip": "clip_by_value", "measure": "none"}
TIMES = "milliseconds_per_step_of_all_seeds"


def run(output: pathlib.Path, *args: str) -> dict[str, typing.Any]:
    size = ["--steps", str(STEPS), "--seeds", str(SEEDS), "--output", str(output)]
    _command.main([*size, *args])
    return json.loads((output / "training.json").read_text(), parse_constant=pytest.fail)


@pytest.fixture(scope="module", params=[FEW, pytest.param(SOME, marks=pytest.mark.slow)], ids=len)
def some_methods(request, tmp_path_factory):
    output, printed = tmp_path_factory.mktemp("demo") / "made" / "here", io.StringIO()
    with contextlib.redirect_stdout(printed):
        document = run(output, "--methods", ",".join(request.param))
    return output, document, printed.getvalue()


def fake_record(**values: typing.Any) -> dict[str, typing.Any]:
    curve = np.linspace(1.0, 9.0, STEPS * SEEDS, dtype=np.float32).reshape(STEPS, SEEDS)
    history = {"loss": curve, "global_norm": curve, "norm": curve, "clip_fraction": curve > 2}
    history |= {"max_norm": np.full_like(curve, 2.0)} | values
    summary = _training.summary("a_method", history)
    return summary | {"test_accuracy": np.array([0.25, 0.75]), TIMES: 5.0}


def fake_args(output: pathlib.Path) -> argparse.Namespace:
    return argparse.Namespace(optimizer="sgd", steps=STEPS, seeds=SEEDS, output=output)


def test_every_public_method_takes_part():
    names = {ALIASES.get(name, name) for name in set(trees.public_factories()) - BUILDERS}
    assert "clip_by_global_norm" in names
    assert names - set(_methods.METHODS) == set()


@pytest.mark.slow
def test_all_methods_run(tmp_path):
    _command.main(["--methods", "all", "--steps", "1", "--seeds", "1", "--output", str(tmp_path)])
    document = json.loads((tmp_path / "training.json").read_text(), parse_constant=pytest.fail)
    assert list(document["methods"]) == list(_methods.METHODS)
    for record in document["methods"].values():
        assert np.isfinite(record["loss"]).all()
        assert record["test_accuracy"][0] > 0


@pytest.mark.slow
def test_json_is_complete(some_methods):
    document = some_methods[1]
    assert {key: document[key] for key in ("optimizer", "steps", "seeds")} == {
        "optimizer": "sgd",
        "steps": STEPS,
        "seeds": SEEDS,
    }
    assert document["device"] == jax.devices()[0].device_kind
    assert list(document["methods"]) in (FEW, SOME)
    for record in document["methods"].values():
        for key in ("loss", "norm"):
            assert np.shape(record[key]) == (STEPS, SEEDS)
        for key in ("final_loss", "largest_norm", "test_accuracy"):
            assert np.shape(record[key]) == (SEEDS,)
        assert record[TIMES] > 0


def test_json_agrees_with_itself(some_methods):
    for record in some_methods[1]["methods"].values():
        np.testing.assert_allclose(np.max(record["norm"], axis=0), record["largest_norm"])
        np.testing.assert_allclose(np.mean(record["loss"], axis=0), record["final_loss"], 1e-5)
        images = np.multiply(record["test_accuracy"], _training.TEST_SIZE)
        np.testing.assert_allclose(images, images.round(), atol=1e-2)


@pytest.mark.slow
def test_one_of_each_family_runs_by_default(tmp_path):
    _command.main(["--steps", "1", "--seeds", "1", "--output", str(tmp_path)])
    document = json.loads((tmp_path / "training.json").read_text(), parse_constant=pytest.fail)
    assert list(document["methods"]) == _methods.DEFAULT
    assert 8 <= len(_methods.DEFAULT) <= 10


def test_share_of_steps_clipped_is_the_share_of_norms_above_the_bound(some_methods):
    record = some_methods[1]["methods"]["clip_by_global_norm"]
    share = np.mean(np.greater(record["norm"], record["max_norm"]), axis=0)
    assert np.all(share > 0)
    np.testing.assert_allclose(record["share_of_steps_clipped"], share, atol=1e-6)


def test_what_does_not_apply_is_null(some_methods):
    methods = some_methods[1]["methods"]
    bounded = {name for name, record in methods.items() if record["max_norm"] is not None}
    # Of the others, nothing is bounded, or it is no global norm that is.
    of_a_global_norm = {"clip_by_global_norm", "autoclip", "clip_by_quantile", "zclip"}
    assert bounded == of_a_global_norm & set(methods)
    assert np.all(np.equal(methods["clip_by_global_norm"]["max_norm"], 1.0))
    assert methods["none"]["share_of_steps_clipped"] == [0.0] * SEEDS
    unknown = {n for n, record in methods.items() if record["share_of_steps_clipped"] is None}
    assert unknown == {"clip_cotangent"}


def test_methods_start_alike(some_methods):
    methods = some_methods[1]["methods"]
    for name, record in methods.items():
        np.testing.assert_allclose(record["loss"][0], methods["none"]["loss"][0], rtol=1e-5)
        if name != "clip_cotangent":
            np.testing.assert_allclose(record["norm"][0], methods["none"]["norm"][0], rtol=1e-3)
    assert methods["none"]["loss"][0][0] != methods["none"]["loss"][0][1]


def test_gradients_explode_unclipped(some_methods):
    bound = 1.0
    methods = some_methods[1]["methods"]
    assert min(methods["none"]["largest_norm"]) > 10 * bound
    assert max(methods["clip_cotangent"]["norm"][0]) < min(methods["none"]["norm"][0]) / 2


def test_gradients_grow_on_their_way_back():
    params, batch = jax.tree.map(jax.numpy.asarray, (_training.initial_params(0), first_batch()))
    images, labels = batch

    def loss(pixels):
        logits = _training.predict(params, pixels)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    at_pixel = np.linalg.norm(jax.jit(jax.grad(loss))(images), axis=0)
    assert at_pixel[0] > 10 * at_pixel[-1]


def first_batch() -> _training.Batch:
    datasets = pytest.importorskip("sklearn.datasets")
    images, labels = next(_training.minibatches(_training.digits(datasets)[0], 1))
    return images[0], labels[0]


def test_png_is_a_png(some_methods):
    image = (some_methods[0] / "training.png").read_bytes()
    assert image.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = (int.from_bytes(image[at : at + 4], "big") for at in (16, 20))
    assert min(width, height) > 900


def test_seeds_and_batches_are_fixed(some_methods, tmp_path):
    def without_times(record):
        return {key: value for key, value in record.items() if key != TIMES}

    again = run(tmp_path, "--methods", "clip_by_global_norm, none")["methods"]
    assert list(again) == ["clip_by_global_norm", "none"]
    for name, record in again.items():
        assert without_times(record) == without_times(some_methods[1]["methods"][name])


@pytest.mark.slow
@pytest.mark.parametrize("name", _methods.OPTIMIZERS)
def test_optimizers(name, tmp_path):
    with jax.numpy_dtype_promotion("standard"):  # Optax's Adam needs it.
        document = run(tmp_path, "--optimizer", name, "--steps", "1", "--methods", "none")
    assert document["optimizer"] == name
    assert np.isfinite(document["methods"]["none"]["loss"]).all()


def test_splits_are_of_all_images_and_do_not_overlap():
    (images, labels), (test_images, test_labels) = _training.digits(
        pytest.importorskip("sklearn.datasets")
    )
    assert images.shape == (1437, 64)
    assert test_images.shape == (360, 64)
    assert len(labels) + len(test_labels) == 1797
    assert {image.tobytes() for image in images}.isdisjoint(i.tobytes() for i in test_images)
    assert (images.min(), images.max()) == (0.0, 1.0)


def test_batches_of_a_seed_do_not_depend_on_the_others():
    train_set = np.arange(100.0), np.arange(100)
    alone, together = _training.minibatches(train_set, 1), _training.minibatches(train_set, 3)
    for _ in range(3):
        np.testing.assert_array_equal(next(alone)[0][0], next(together)[0][0])


def test_table(some_methods):
    output, document, printed = some_methods
    lines = printed.splitlines()
    assert "To learn from it" in printed
    methods = document["methods"]
    rows = {line.split()[0]: line for line in lines[2 : 2 + len(methods)]}
    assert lines[0].startswith("method ")
    assert list(rows) == list(methods)
    assert rows["none"].split()[-3:-1] == ["0.0", "%"]
    assert rows["clip_cotangent"].split()[-2] == "-"
    for name, record in methods.items():
        assert f" {np.mean(record['final_loss']):.3f} ± " in rows[name]
        assert f" {max(record['largest_norm']):.1f} " in rows[name]
    assert lines[-2:] == [str(output / "training.png"), str(output / "training.json")]


def test_divergence_is_said(tmp_path):
    nan = np.full((STEPS, SEEDS), np.nan, np.float32)
    half = np.where([True, False], nan, 1.0).astype(np.float32)
    runs = {
        "none": fake_record(loss=nan, global_norm=nan, norm=nan, max_norm=nan),
        "half": fake_record(loss=half, global_norm=half, norm=half),
        "fine": fake_record(),
    }
    table = _report.table(runs, fake_args(tmp_path))
    assert "diverged in 2 of 2" in table
    assert "diverged in 1 of 2" in table
    assert "inf" in table
    assert "0.500 ± 0.250" in table
    text = _report.write_json(runs, fake_args(tmp_path)).read_text()
    methods = json.loads(text, parse_constant=pytest.fail)["methods"]
    assert methods["none"]["final_loss"] == [None, None]
    assert methods["half"]["final_loss"] == [None, 1.0]
    assert methods["half"]["largest_norm"] == [None, 1.0]


@pytest.mark.parametrize("count", [1, 4, 10])
def test_plot_of_any_number_of_methods(count, tmp_path):
    figures = pytest.importorskip("matplotlib.figure")
    names = [*_methods.METHODS, *(f"later_{index}" for index in range(20))][:count]
    nan = np.full((STEPS, SEEDS), np.nan, np.float32)
    runs = dict.fromkeys(names, fake_record()) | {"none": fake_record(loss=nan, global_norm=nan)}
    assert _picture.write_png(runs, fake_args(tmp_path), figures).stat().st_size > 10_000


def test_plot_has_the_bound_where_there_is_one(tmp_path):
    figures = Figures()
    bound = np.tile(np.arange(1.0, STEPS + 1)[:, None], SEEDS)
    other = fake_record(norm=np.ones((STEPS, SEEDS), np.float32))
    runs = {"none": other, "rising": fake_record(max_norm=bound), "other": other}
    _picture.write_png(runs, fake_args(tmp_path), figures)
    drawn = [
        {line.get_label(): line.get_ydata() for line in axes.get_lines()}
        for axes in figures.last.axes
    ]
    assert [len(lines) for lines in drawn] == [1, 2, 2, 1, 3, 2]
    np.testing.assert_array_equal(drawn[4]["bound, with this method"], np.arange(1.0, STEPS + 1))
    assert all(axes.get_yscale() == "log" for axes in figures.last.axes)


class Figures:
    """Stands in for `matplotlib.figure`, and keeps the figure that was made."""

    def Figure(self, *args: typing.Any, **kwargs: typing.Any) -> typing.Any:  # noqa: N802
        self.last = pytest.importorskip("matplotlib.figure").Figure(*args, **kwargs)
        return self.last


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--methods", "none,clip_by_magic"], ["clip_by_magic", *_methods.METHODS]),
        (["--methods", ""], list(_methods.METHODS)),
        (["--optimizer", "sdg"], ["sdg", *_methods.OPTIMIZERS]),
        (["--steps", "0"], ["--steps", ">= 1"]),
        (["--steps", "ten"], ["--steps", "ten"]),
        (["--seeds", "-1"], ["--seeds"]),
        (["--seeds", "1.5"], ["--seeds", "1.5"]),
        (["--output", __file__], ["--output", "test_main.py"]),
        (["--method"], ["--method"]),
    ],
)
def test_bad_arguments(args, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        _command.main(args)
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert [word for word in said if word not in message] == []


def test_missing_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(SystemExit, match=r"needs tqdm.*pip install 'clipax\[demo\]'"):
        _command.main(["--output", str(tmp_path)])


def test_other_import_errors_are_not_hidden():
    with pytest.raises(SystemExit, match="needs no_such_module"):
        _command.require("no_such_module")


def test_help(capsys):
    with pytest.raises(SystemExit) as stopped:
        _command.main(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    for word in (
        "--methods",
        "--steps",
        "--seeds",
        "--output",
        "handwritten",
        *_methods.OPTIMIZERS,
    ):
        assert word in text


def test_the_version_is_printed(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["clipax", "--version"])
    __main__.main()
    assert capsys.readouterr().out == f"clipax {clipax.__version__}\n"


def test_an_unknown_command_names_those_that_there_are(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["clipax", "advice", "log.jsonl"])
    with pytest.raises(SystemExit, match=r"^clipax has no command 'advice': `clipax advise LOG` "):
        __main__.main()


def test_command_line(tmp_path):
    command = [sys.executable, "-m", "clipax", "--methods", "none", "--steps", "3"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    written = tmp_path / "runs" / "clipax"
    assert sorted(path.name for path in written.iterdir()) == ["training.json", "training.png"]
    assert "test accuracy" in done.stdout
    assert "3/3" in done.stderr


@pytest.mark.slow
def test_initial_recurrent_matrix_is_orthogonal_but_for_its_gain():
    matrix = _training.initial_params(0)["recurrent"] / _training.RECURRENT_GAIN
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(_training.HIDDEN_SIZE), atol=1e-5)
    assert math.isclose(np.linalg.norm(matrix), math.sqrt(_training.HIDDEN_SIZE), rel_tol=1e-5)
