"""`clipax advise` on the command line: what it prints, writes and takes."""

import io
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

import clipax
from clipax import __main__
from clipax.advice import _command, _picture

LOGS = pathlib.Path(clipax.__file__).parent.parent.parent / "shared" / "logs"
DATA = pathlib.Path(__file__).parent.parent / "data" / "logs"
STEPS = 300


def log_text(norms: np.ndarray, every: int = 10) -> str:
    rows = (f"{every * n},{norm:.9g},{3 - n / 1000:.4f}\n" for n, norm in enumerate(norms))
    return "step,train/grad_norm,train/loss\n" + "".join(rows)


def lognormal(spread: float = 0.2) -> np.ndarray:
    return np.exp(spread * np.random.default_rng(0).normal(size=STEPS))


@pytest.fixture
def log(tmp_path: pathlib.Path) -> str:
    path = tmp_path / "log.csv"
    path.write_text(log_text(lognormal()))
    return str(path)


def run(
    argv: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> str:
    monkeypatch.setattr(sys, "argv", ["clipax", "advise", *argv])
    __main__.main()
    printed = capsys.readouterr()
    assert printed.err == ""
    return printed.out


def test_the_page_names_what_it_took_and_ends_with_its_files(
    log: str,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "made" / "here"
    lines = run([log, "--bound", "2", "--output", str(output)], monkeypatch, capsys).splitlines()
    taken = "norms from 'train/grad_norm', losses from 'train/loss', steps from 'step'"
    assert lines[0] == f"{log} (CSV): {taken}"
    assert "1. optimizer = optax.chain(clipax.clip_by_global_norm(2.0), optimizer)" in lines
    assert any("every 10 steps" in line for line in lines)
    assert lines[-2:] == [str(output / "advice.json"), str(output / "advice.png")]
    assert (output / "advice.png").read_bytes()[:4] == b"\x89PNG"
    document = json.loads((output / "advice.json").read_text(), parse_constant=pytest.fail)
    assert document["log"]["column"] == "train/grad_norm"
    advice = clipax.advise(lognormal(), max_norm=2.0, every=10)
    assert document["recommendations"][0]["code"] == advice.recommendations[0].code
    assert document["statistics"]["row_count"] == STEPS


def test_columns_bounds_and_rows_are_taken_as_they_are_given(
    log: str,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = ["--column", "train/loss", "--every", "7", "--output", str(tmp_path / "out")]
    printed = run([log, *given], monkeypatch, capsys)
    assert "norms from 'train/loss', no losses" in printed
    assert "every 7 steps" in printed
    assert "(in use)" not in printed


def test_a_log_of_clipped_norms_is_refused_unless_told(
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "log.csv"
    path.write_text(log_text(np.minimum(lognormal(0.5), 1.0)))
    monkeypatch.setattr(sys, "argv", ["clipax", "advise", str(path)])
    with pytest.raises(SystemExit, match="2"):
        __main__.main()
    error = capsys.readouterr().err
    assert error.startswith(f"clipax advise: {path}: ")
    assert "look like norms after a clip" in error
    assert len(error.splitlines()) == 1
    printed = run([str(path), "--raw", "--output", str(tmp_path / "out")], monkeypatch, capsys)
    assert "pile up" in printed


def test_standard_input_and_several_files_are_read(
    log: str,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = pathlib.Path(log).read_bytes()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))
    printed = run(["-", "--output", str(tmp_path / "out")], monkeypatch, capsys)
    assert printed.startswith("standard input (CSV): ")
    printed = run([log, log, "--output", str(tmp_path / "out")], monkeypatch, capsys)
    assert "300 rows before it under the same steps are left out" in " ".join(printed.split())


def test_without_matplotlib_there_is_no_picture(
    log: str,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    printed = run([log, "--output", str(tmp_path / "out")], monkeypatch, capsys)
    assert printed.splitlines()[-1].endswith("pip install 'clipax[plot]'")
    assert (tmp_path / "out" / "advice.json").exists()


def test_an_output_that_is_a_file_is_one_line(
    log: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["clipax", "advise", log, "--output", log])
    with pytest.raises(SystemExit, match="2"):
        __main__.main()
    assert capsys.readouterr().err == f"clipax advise: {log}: File exists.\n"


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "x"])
@pytest.mark.parametrize("option", ["--bound", "--every"])
def test_options_are_checked(
    option: str, value: str, log: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        _command.main([log, f"{option}={value}"])
    assert f"must be a finite number > 0, not '{value}'" in capsys.readouterr().err


def test_progress_is_shown_where_it_takes_long(
    log: str,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(_command, "_MANY", STEPS)
    _command.main([log, "--output", str(tmp_path / "out")])
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "300 rows: statistics ..."
    assert lines[-1].startswith("300 rows: clipax.autoclip(")


def test_the_other_commands_stay_the_demonstration(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(__main__._demonstration, "main", lambda: seen.append(sys.argv[1:]))
    for argv in ([], ["--steps", "3"]):
        monkeypatch.setattr(sys, "argv", ["clipax", *argv])
        __main__.main()
    assert seen == [[], ["--steps", "3"]]


@pytest.mark.slow
def test_the_module_runs_as_a_command(log: str, tmp_path: pathlib.Path) -> None:
    command = [sys.executable, "-m", "clipax", "advise"]
    done = subprocess.run(
        [*command, log], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert "1. optimizer = optax.chain(" in done.stdout
    assert (tmp_path / "runs" / "advice" / "advice.png").exists()
    done = subprocess.run([*command, "none"], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "clipax advise: none: No such file or directory.\n"


@pytest.mark.slow
def test_a_reader_may_stop_after_the_first_line(log: str, tmp_path: pathlib.Path) -> None:
    command = f"{sys.executable} -m clipax advise {log} | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(log)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["long", "short", "constant", "nothing clipped", "zeros and NaN"])
def test_every_log_can_be_drawn(kind: str, tmp_path: pathlib.Path) -> None:
    norms = {
        "long": np.exp(0.5 * np.random.default_rng(0).normal(size=4000)),
        "short": lognormal()[:5],
        "constant": np.full(STEPS, 2.0),
        "nothing clipped": lognormal(0.01),
        "zeros and NaN": np.where(np.arange(STEPS) % 3, lognormal(), [0, np.nan] * 150),
    }[kind]
    advice = clipax.advise(norms, max_norm=3.0, raw=True)
    _picture.write_png(advice, tmp_path / "advice.png")
    assert (tmp_path / "advice.png").stat().st_size > 10_000


def test_the_parser_says_what_it_takes() -> None:
    with pytest.raises(SystemExit, match="0"):
        _command.main(["--help"])


# What the owner of each run would hear, by what is known of the run.
REAL = {
    "speech_10k": ("optax.chain(clipax.clip_by_global_norm(", "normalizes"),
    "sft_2k": ("optax.chain(clipax.clip_by_global_norm(1.0)", "Keep your bound"),
    "rl_1k": ("optax.chain(clipax.clip_by_global_norm(1.0)", "exactly zero"),
    "first_steps_nan": ("clipax.skip_step(optax.chain(", "2 of them the first ones"),
    "lora_770": ("optax.chain(clipax.clip_by_global_norm(1.0)", "never acted"),
    "char_gpt_250": ("optax.chain(clipax.clip_by_global_norm(", "rounded to 0.01"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_real_logs_are_advised(name: str, tmp_path: pathlib.Path) -> None:
    path = LOGS / f"{name}.csv"
    if not path.exists():
        pytest.skip(f"{path} is not here")
    log = clipax.advice.read(str(path))
    advice = clipax.advise(log.norms, log.losses, steps=log.steps, max_norm=1.0)
    code, word = REAL[name]
    assert code in advice.recommendations[0].code
    assert word in " ".join(str(advice).split())
