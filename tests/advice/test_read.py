"""Logs of every format are read alike: the column is found, and named."""

import gzip
import importlib
import io
import json
import pathlib
import sys
from typing import Any

import numpy as np
import optax
import pytest

import clipax
from clipax.advice import _read
from clipax.advice._log import Log, LogError

DATA = pathlib.Path(__file__).parent.parent / "data" / "logs"
STEPS = [10.0, 20.0, 30.0]
NORMS = [6.74, 2.93, 1.46]
LOSSES = [10.97, 8.61, 7.29]

# A few lines as each trainer writes them, all with the norms and losses above.
TEXTS = {
    "torchtitan": (
        "[titan] 2026-01-01 10:00:00,000 - root - INFO - Training starts at step 1\n"
        + "".join(
            f"\x1b[32m[titan] 2026-01-01 10:00:0{n},000 - root - INFO - step: {step:2.0f}  loss: "
            f"{loss:8.4f}  grad_norm: {norm:7.4f}  memory:  0.5GiB(0.53%)  tps: 1,234\x1b[0m\n"
            for n, (step, norm, loss) in enumerate(zip(STEPS, NORMS, LOSSES, strict=True))
        )
    ),
    "Megatron": "".join(
        f" [2026-01-01 10:00] iteration {step:8.0f}/  500000 | consumed samples: 1024 | elapsed"
        f" time per iteration (ms): 123.4 | learning rate: 1.500000E-04 | global batch size: 256 |"
        f" lm loss: {loss:E} | loss scale: 1.0 | grad norm: {norm:.3f} | params norm: 99.0 |"
        " number of skipped iterations:   0 | number of nan iterations:   0 |\n"
        for step, norm, loss in zip(STEPS, NORMS, LOSSES, strict=True)
    ),
    "LeRobot": "".join(
        f"INFO 2026-01-01 10:00:00 ts/train.py:10 step:{step:.0f} smpl:2K ep:3 epch:0.09"
        f" loss:{loss:.3f} grdn:{norm:.3f} lr:1.0e-05 updt_s:0.100 data_s:0.002\n"
        for step, norm, loss in zip(STEPS, NORMS, LOSSES, strict=True)
    ),
    "llm.c": "".join(
        f"step {step:4.0f}/18865 | loss {loss:.6f} (+nanz)| norm {norm:.4f} (+nanz)| lr 6.00e-07 |"
        " 3000.00 ms | 50.0% bf16 MFU | 170000 tok/s\n"
        for step, norm, loss in zip(STEPS, NORMS, LOSSES, strict=True)
    ),
    "nanoGPT-like": "using device: cuda\n"
    + "".join(
        f"step {step:4.0f} | loss: {loss:.6f} | lr 6.0000e-04 | norm: {norm:.2f} | dt: 90.00ms\n"
        for step, norm, loss in zip(STEPS, NORMS, LOSSES, strict=True)
    ),
    "JSON lines": "".join(
        json.dumps({"step": step, "train/loss": loss, "train/grad_norm": norm, "eval/loss": None})
        + "\n"
        for step, norm, loss in zip(STEPS, NORMS, LOSSES, strict=True)
    ),
    "nested JSON lines": "".join(
        json.dumps({"step": step, "train": {"loss": loss, "grad_norm": str(norm)}}) + "\n\n"
        for step, norm, loss in zip(STEPS, NORMS, LOSSES, strict=True)
    ),
    "JSON of columns": json.dumps({"iter": STEPS, "loss": LOSSES, "grad_norm": NORMS}, indent=1),
    "JSON of rows": json.dumps(
        [
            {"global_step": step, "loss": loss, "grad_norm": norm}
            for step, norm, loss in zip(STEPS, NORMS, LOSSES, strict=True)
        ]
    ),
    "an MLflow metric": "".join(
        f"176000000000{n} {norm} {step:.0f}\n"
        for n, (step, norm) in enumerate(zip(STEPS, NORMS, strict=True))
    ),
}


def table(names: dict[str, list[float | str]], separator: str = ",") -> str:
    rows = [list(names), *zip(*names.values(), strict=True)]
    return "".join(separator.join(map(str, row)) + "\n" for row in rows)


TABLES = {
    "CSV": {"step": STEPS, "loss": LOSSES, "grad_norm": NORMS},
    "a Weights & Biases export": {
        "Step": STEPS,
        '"my - run - train/grad_norm"': NORMS,
        '"my - run - train/grad_norm__MIN"': NORMS,
        '"my - run - train/grad_norm__MAX"': NORMS,
        '"my - run - train/loss"': LOSSES,
    },
    "MaxText": {
        "step": STEPS,
        "learning/grad_norm": [1.0] * 3,
        "learning/raw_grad_norm": NORMS,
        "learning/param_norm": [9.0] * 3,
        "learning/loss": LOSSES,
    },
    "Levanter": {
        "_step": STEPS,
        "grad/norm/total": NORMS,
        "grad/norm/embeddings": [1.0] * 3,
        "params/norm/total": [9.0] * 3,
        "train/loss": LOSSES,
    },
    "OLMo-core": {
        "step": STEPS,
        "optim/total grad norm": NORMS,
        "train/CE loss": LOSSES,
        "optim/step size": [1.0] * 3,
    },
    "Composer": {
        "step": STEPS,
        "l2_norm/grad/global": NORMS,
        "l2_norm/grad/model.0.weight": [1.0] * 3,
        "loss/train/total": LOSSES,
    },
    "Lightning": {
        "epoch": [0] * 3,
        "grad_2.0_norm/layer.weight": [1.0] * 3,
        "grad_2.0_norm_total": NORMS,
        "step": STEPS,
        "train_loss": LOSSES,
    },
    "fairseq": {"step": STEPS, "gnorm": NORMS, "loss": LOSSES},
    "clipax": {"step": STEPS, "norm": NORMS, "clipped_norm": [1.0] * 3, "loss": LOSSES},
}
COLUMNS = {
    "torchtitan": "grad_norm",
    "Megatron": "grad norm",
    "LeRobot": "grdn",
    "llm.c": "norm",
    "nanoGPT-like": "norm",
    "JSON lines": "train/grad_norm",
    "nested JSON lines": "train/grad_norm",
    "JSON of columns": "grad_norm",
    "JSON of rows": "grad_norm",
    "an MLflow metric": "grad_norm",
    "CSV": "grad_norm",
    "a Weights & Biases export": "my - run - train/grad_norm",
    "MaxText": "learning/raw_grad_norm",
    "Levanter": "grad/norm/total",
    "OLMo-core": "optim/total grad norm",
    "Composer": "l2_norm/grad/global",
    "Lightning": "grad_2.0_norm_total",
    "fairseq": "gnorm",
    "clipax": "norm",
}
ALL = TEXTS | {name: table(columns) for name, columns in TABLES.items()}


def write(folder: pathlib.Path, text: str, name: str = "grad_norm") -> str:
    path = folder / name
    path.write_text(text)
    return str(path)


def assert_read(log: Log, *, with_losses: bool = True) -> None:
    np.testing.assert_allclose(log.norms, NORMS)
    np.testing.assert_allclose(log.steps, STEPS)
    if with_losses:
        np.testing.assert_allclose(log.losses, LOSSES)
    else:
        assert log.losses is None


@pytest.mark.parametrize("kind", ALL)
def test_the_norms_of_every_trainer_are_found(kind: str, tmp_path: pathlib.Path) -> None:
    log = _read.read(write(tmp_path, ALL[kind]))
    assert_read(log, with_losses=kind != "an MLflow metric")
    assert log.column == COLUMNS[kind]
    notes = {
        "a Weights & Biases export": "mean of several steps",
        "clipax": "what the method in use measures",
    }
    assert [notes[kind] in note for note in log.notes] == ([True] if kind in notes else [])


@pytest.mark.parametrize("separator", ["\t", ";"])
def test_tables_may_have_other_separators(separator: str, tmp_path: pathlib.Path) -> None:
    text = table(TABLES["Levanter"], separator)
    assert_read(_read.read(write(tmp_path, text)))


@pytest.mark.parametrize("kind", ["CSV", "JSON of rows", "llm.c"])
def test_compressed_logs_and_standard_input_are_read(
    kind: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "log.gz"
    path.write_bytes(gzip.compress(ALL[kind].encode()))
    assert_read(_read.read(str(path)))
    for data in (ALL[kind].encode(), path.read_bytes()):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        log = _read.read("-")
        assert_read(log)
        assert log.source == "standard input"


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
@pytest.mark.parametrize("kind", ["CSV", "llm.c", "JSON of rows"])
def test_marks_of_the_encoding_are_understood(
    kind: str, encoding: str, tmp_path: pathlib.Path
) -> None:
    path = tmp_path / "log"
    path.write_bytes(ALL[kind].replace("\n", "\r\n").encode(encoding))
    assert_read(_read.read(str(path)))


def test_dictionaries_that_a_trainer_prints_are_text(tmp_path: pathlib.Path) -> None:
    lines = [
        f" {n}%|# | {n}/3 [00:01]\r{{'loss': {loss}, 'grad_norm': '{norm}', 'epoch': 0.1}}\n"
        for n, (norm, loss) in enumerate(zip(NORMS, LOSSES, strict=True))
    ]
    log = _read.read(write(tmp_path, "".join(lines)))
    np.testing.assert_allclose(log.norms, NORMS)
    np.testing.assert_allclose(log.losses, LOSSES)
    np.testing.assert_allclose(log.steps, [0, 1, 2])
    assert "rows are counted" in log.notes[0]


def test_a_column_of_numbers_is_one_of_norms(tmp_path: pathlib.Path) -> None:
    log = _read.read(write(tmp_path, "6.74\n2.93\n1.46\n"))
    np.testing.assert_allclose(log.norms, NORMS)
    assert log.column == "norm"
    assert log.step_column is None


def test_the_named_column_is_taken(tmp_path: pathlib.Path) -> None:
    log = _read.read(write(tmp_path, ALL["Levanter"]), "params/norm/total")
    np.testing.assert_allclose(log.norms, [9.0] * 3)
    log = _read.read(write(tmp_path, ALL["Megatron"]), "params norm")
    np.testing.assert_allclose(log.norms, [99.0] * 3)
    assert log.column == "params norm"


def test_norms_that_are_not_finite_are_kept(tmp_path: pathlib.Path) -> None:
    log = _read.read(write(tmp_path, "step,grad_norm\n1,nan\n2,inf\n3,1.5\n4,\n5,Infinity\n"))
    np.testing.assert_array_equal(log.norms, [np.nan, np.inf, 1.5, np.inf])
    np.testing.assert_array_equal(log.steps, [1, 2, 3, 5])
    log = _read.read(
        write(tmp_path, "step 1 | norm nan |\nstep 2 | norm inf |\nstep 3 | norm 2\n")
    )
    np.testing.assert_array_equal(log.norms, [np.nan, np.inf, 2])


def test_losses_are_nan_where_a_row_has_none(tmp_path: pathlib.Path) -> None:
    log = _read.read(write(tmp_path, "step,grad_norm,loss\n1,2.0,\n2,3.0,7.0\n"))
    np.testing.assert_array_equal(log.losses, [np.nan, 7.0])


def test_of_equal_steps_the_last_row_counts(tmp_path: pathlib.Path) -> None:
    log = _read.read(write(tmp_path, "step,grad_norm\n1,1.0\n2,2.0\n2,2.5\n3,3.0\n"))
    np.testing.assert_array_equal(log.norms, [1.0, 2.5, 3.0])
    assert "1 row came again" in log.notes[0]


def test_rounded_steps_are_not_steps(tmp_path: pathlib.Path) -> None:
    log = _read.read(write(tmp_path, "step:1K grdn:1.0\nstep:1K grdn:2.0\nstep:2K grdn:3.0\n"))
    np.testing.assert_array_equal(log.norms, [1.0, 2.0, 3.0])
    assert "rounded" in log.notes[0]


def test_the_later_file_of_a_resumed_run_wins(tmp_path: pathlib.Path) -> None:
    first = write(tmp_path, "step,grad_norm,loss\n1,1,1\n2,2,2\n3,3,3\n4,4,4\n", "first")
    second = write(tmp_path, "step,grad_norm,loss\n3,30,30\n4,40,40\n5,50,50\n", "second")
    log = _read.read([first, second])
    np.testing.assert_array_equal(log.norms, [1, 2, 30, 40, 50])
    np.testing.assert_array_equal(log.losses, [1, 2, 30, 40, 50])
    np.testing.assert_array_equal(log.steps, [1, 2, 3, 4, 5])
    assert log.source == f"{first} + {second}"
    (note,) = log.notes
    assert second in note
    assert "2 rows" in note
    # The other way round, the first one is the later one; the rest goes on behind it.
    log = _read.read([second, first])
    np.testing.assert_array_equal(log.norms, [1, 2, 3, 4, 50])


def test_files_without_steps_go_on_after_each_other(tmp_path: pathlib.Path) -> None:
    log = _read.read([write(tmp_path, "1\n2\n", "first"), write(tmp_path, "3\n4\n", "second")])
    np.testing.assert_array_equal(log.norms, [1, 2, 3, 4])
    np.testing.assert_array_equal(log.steps, [0, 1, 2, 3])
    assert "is taken to go on" in log.notes[-1]


@pytest.mark.parametrize("kind", ["CSV", "JSON lines", "an MLflow metric"])
def test_a_half_written_last_line_is_left_out(kind: str, tmp_path: pathlib.Path) -> None:
    whole = ALL[kind].rstrip("\n")
    cut = whole[: whole.rindex("1.46") - 1].rstrip()
    log = _read.read(write(tmp_path, cut))
    np.testing.assert_allclose(log.norms, NORMS[:2])
    assert "line 4" in log.notes[0] or "line 3" in log.notes[0]
    assert "half-written" in log.notes[0]
    log = _read.read(write(tmp_path, "step,grad_norm\n1,1.0\n2,1e-"))
    np.testing.assert_allclose(log.norms, [1.0])


# What the real writers wrote, see tests/data/logs/write_logs.py; and what one of them needs.
WRITTEN = {
    "lightning/metrics.csv": "grad_2.0_norm_total",
    "tensorboard/events.out.tfevents.0": "train/grad_norm",
    "wandb/run.wandb": "train/grad_norm",
    "mlflow/metrics/grad_norm": "grad_norm",
    "log.jsonl": "grad_norm",
    "trainer_state.json": "grad_norm",
}
NEEDED = {
    "tensorboard/events.out.tfevents.0": "tensorboard.backend.event_processing.event_file_loader",
    "wandb/run.wandb": "wandb.proto.wandb_internal_pb2",
}


def expected() -> tuple[np.ndarray, np.ndarray]:
    rows = [json.loads(line) for line in (DATA / "log.jsonl").read_text().splitlines()]
    return np.array([row["grad_norm"] for row in rows]), np.array([row["loss"] for row in rows])


def read_written(name: str, path: pathlib.Path) -> Log:
    if name in NEEDED:
        pytest.importorskip(NEEDED[name])
    log = _read.read(str(path))
    assert log.column == WRITTEN[name]
    assert log.notes == ()
    return log


@pytest.mark.parametrize("name", WRITTEN)
def test_files_of_real_writers_are_read(name: str) -> None:
    log = read_written(name, DATA / name)
    if name == "trainer_state.json":
        rows = json.loads((DATA / name).read_text())["log_history"]
        rows = [row for row in rows if "grad_norm" in row]
        np.testing.assert_array_equal(log.norms, [row["grad_norm"] for row in rows])
        np.testing.assert_array_equal(log.losses, [row["loss"] for row in rows])
        np.testing.assert_array_equal(log.steps, np.arange(2, 61, 2))
        return
    norms, losses = expected()
    np.testing.assert_allclose(log.norms, norms, 1e-6)
    np.testing.assert_array_equal(log.steps, np.arange(60))
    if not name.startswith("mlflow"):
        np.testing.assert_allclose(log.losses, losses, 1e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", WRITTEN)
def test_what_the_writers_write_today_is_read(
    name: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch")
    writer = {"lightning": "lightning", "wandb": "wandb", "mlflow": "mlflow"}
    writer |= {"trainer_state.json": "transformers", "tensorboard": "tensorboard"}
    pytest.importorskip(writer.get(name.split("/")[0], "torch"))
    monkeypatch.syspath_prepend(DATA)
    monkeypatch.chdir(tmp_path)
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    importlib.import_module("write_logs").WRITERS[name](path)
    log, before = read_written(name, path), read_written(name, DATA / name)
    np.testing.assert_allclose(log.norms, before.norms, 1e-4)
    np.testing.assert_array_equal(log.steps, before.steps)


@pytest.mark.parametrize("name", NEEDED)
def test_a_binary_log_says_which_package_reads_it(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, NEEDED[name], None)
    extra = name.split("/")[0]
    with pytest.raises(ValueError, match=rf"needs {extra}: pip install 'clipax\[{extra}\]'"):
        _read.read(str(DATA / name))


GRADIENTS = [{"w": np.array([3.0, 4.0]) * scale, "b": np.ones(1)} for scale in (1.0, 9.0, 0.1)]
WRITTEN_NORMS = [float(np.sqrt(np.sum(each["w"] ** 2) + 1)) for each in GRADIENTS]


def own_log(method: optax.GradientTransformation, **options: Any) -> str:
    """What a training loop writes that logs the metrics of clipax."""
    lines = []
    state = method.init(GRADIENTS[0])
    for step, gradient in enumerate(GRADIENTS):
        _, state = method.update(gradient, state)
        per_leaf = options.get("per_leaf", False)
        found = clipax.as_floats(
            clipax.metrics(state, per_leaf=per_leaf), prefix=options.get("prefix", "")
        )
        lines.append(json.dumps({"step": step, "param_norm": 7.0, "weight/norm": 8.0} | found))
    return "\n".join(lines)


CLIP = clipax.clip_by_global_norm(2.0)


@pytest.mark.parametrize(
    ("text", "column", "bound"),
    [
        (own_log(CLIP), "norm", 2.0),
        (own_log(CLIP, prefix="train/"), "train/norm", 2.0),
        (own_log(CLIP, prefix="run_1/"), "run_1/norm", 2.0),
        (own_log(clipax.clip_by_leaf_norm(2.0), per_leaf=True), "norm/all", 2.0),
        (own_log(clipax.observe(clipax.clip_by_value(0.1))), "norm_in", None),
        (own_log(clipax.skip_step(CLIP), prefix="train/"), "train/raw_norm", None),
        (own_log(clipax.clip_by_global_norm(lambda count: 1.0 + count)), "norm", None),
    ],
)
def test_the_norms_that_clipax_writes_are_found(
    text: str, column: str, bound: float | None, tmp_path: pathlib.Path
) -> None:
    log = _read.read(write(tmp_path, text))
    assert log.column == column
    assert log.bound == bound
    if column != "norm/all":
        np.testing.assert_allclose(log.norms, WRITTEN_NORMS, rtol=1e-6)
    is_of_method = column.endswith(("norm", "/all")) and "raw" not in column
    assert ["what the method in use measures" in note for note in log.notes] == (
        [True] if is_of_method else []
    )


def test_two_clips_in_a_row_are_both_named(tmp_path: pathlib.Path) -> None:
    text = own_log(optax.chain(CLIP, clipax.clip_by_global_norm(0.5)))
    with pytest.raises(LogError, match=r"2 columns .* '0/norm', '1/norm'\.$"):
        _read.read(write(tmp_path, text))
    assert _read.read(write(tmp_path, text), "0/norm").bound == 2.0


def test_what_is_named_after_a_clip_is_not_taken_in_silence(tmp_path: pathlib.Path) -> None:
    log = _read.read(write(tmp_path, own_log(CLIP, prefix="train/")), "train/clipped_norm")
    assert "is the norm after the clip" in " ".join(log.notes)
