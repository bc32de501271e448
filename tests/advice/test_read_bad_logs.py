"""What is wrong with a log is said in one line, with the file and the line in it."""

import gzip
import pathlib
import sys

import pytest
from test_read import ALL, DATA, NEEDED

from clipax import __main__
from clipax.advice import _read
from clipax.advice._log import LogError

TABLE = "step,grad_norm,loss\n1,1.0,9.0\n2,2.0,8.0\n3,3.0,7.0\n"
GOOD = "".join(f'{{"step": {n}, "grad_norm": {n}.5}}\n' for n in range(300))

# Name, content, and what the message must say behind the name of the file.
BAD: dict[str, tuple[str | bytes, str]] = {
    "empty": ("", ": is empty"),
    "blank": ("\n\n \n", ": has no line with text"),
    "no norm in a table": (
        "step,loss,accuracy\n1,2.0,0.5\n",
        ": no column looks like a gradient norm, so name it with --column; the names are 'step',"
        " 'loss', 'accuracy'",
    ),
    "no norm in text": ("hello\nworld\n", ": no 'grad_norm: 1.0', 'norm 1.0' or their like"),
    "no norm in JSON lines": (
        '{"step": 1, "loss": 2}\n',
        ": no column looks like a gradient norm",
    ),
    "no list in JSON": ('{\n "config": {"lr": 1}\n}\n', ": no list of logged steps in it"),
    "two norms": (
        "step,actor/grad_norm,critic/grad_norm\n1,2,3\n",
        ": 2 columns may be the global norm; name one with --column: 'actor/grad_norm',",
    ),
    "a norm after the clip": (
        "step,learning/grad_norm\n1,2\n",
        ": 'learning/grad_norm' is the norm after the clip",
    ),
    "two columns of one name": (
        "step,norm,norm\n1,2,3\n",
        ", line 1: two columns are named 'norm'",
    ),
    "no finite norm": ("step,grad_norm\n1,nan\n2,inf\n", ": 'grad_norm' has no finite norm in 2"),
    "an empty column": ("step,grad_norm\n1,\n2,\n", ": no column looks like a gradient norm"),
    "a negative norm": (
        TABLE.replace("2.0", "-2.0"),
        ", line 3: 'grad_norm' is -2; no norm is neg",
    ),
    "text for a norm": (
        TABLE.replace("3.0", "big"),
        ", line 4: 'grad_norm' is 'big', which is no",
    ),
    "true for a norm": (
        '{"grad_norm": true}\n',
        ", line 1: 'grad_norm' is 'True', which is no num",
    ),
    "steps that go back": (
        TABLE + "2,2.0,8.0\n",
        ", line 5: step 2 comes after step 3; of a resumed run, give each part as a file",
    ),
    "a short row": (TABLE + "4,4.0\n5,5.0,6.0\n", ", line 5: has 2 cells, and the header has 3"),
    "a long row": (TABLE + "4,4.0,1,1\n", ", line 5: has 4 cells, and the header has 3"),
    "a line that is not JSON": (GOOD + "oops\n", ", line 301: is not JSON (Expecting value)"),
    "a line that is no object": (GOOD + "[1, 2]\n", ", line 301: is not a JSON object"),
    "a document that breaks off": (
        '{\n  "log_history": [\n    {"grad_norm": 1.0},\n    {"grad_n',
        ", line 4: the JSON breaks off here",
    ),
    "a metric with a word too many": (
        "1760000000000 1.0 1\n1760000000000 1.0 2 3\n",
        ", line 2: has 4 words; a line of a metric has time, value and step",
    ),
    "binary": (b"\x7fELF\x02\x01\x00\x00\x00", ", line 1: is binary"),
    "binary behind text": (GOOD.encode() * 9 + b"\0\0\n", ", line 2701: is binary, not text"),
    "Latin text": (
        "step,grad_norm\n1,2\né,2\n".encode("latin-1"),
        ", line 3: is not text in UTF-8",
    ),
    "gzip that breaks off": (gzip.compress(GOOD.encode() * 99)[:-900], "gzip data are cut off"),
    "gzip of nothing": (gzip.compress(b""), ": is empty"),
    "gzip without data": (b"\x1f\x8b\x08", ", line 1: its gzip data are cut off or damaged"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_log_is_one_line_and_status_2(
    name: str,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    content, message = BAD[name]
    path = tmp_path / "a log"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    assert_ends(["advise", str(path)], message, monkeypatch, capsys)


def assert_ends(
    argv: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["clipax", *argv])
    with pytest.raises(SystemExit) as caught:
        __main__.main()
    assert caught.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("clipax advise: ")
    assert len(printed.err.splitlines()) == 1
    path = argv[1]
    assert message in printed.err, printed.err
    assert path == "-" or path in printed.err


def test_no_such_file_and_a_directory_are_one_line(
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    missing = str(tmp_path / "none")
    assert_ends(["advise", missing], ": No such file or directory", monkeypatch, capsys)
    assert_ends(["advise", str(tmp_path)], ": is a directory; give the", monkeypatch, capsys)


def test_a_missing_column_lists_those_that_look_like_norms(
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "log"
    path.write_text(ALL["Levanter"])
    message = (
        ": no column is named 'gradnorm'; these look like norms:"
        " 'grad/norm/total', 'grad/norm/embeddings'."
    )
    assert_ends(["advise", str(path), "--column", "gradnorm"], message, monkeypatch, capsys)
    path.write_text(ALL["llm.c"])
    message = ": no 'gradnorm' with a number in 3 lines of text"
    assert_ends(["advise", str(path), "--column", "gradnorm"], message, monkeypatch, capsys)
    path.write_text(ALL["an MLflow metric"])
    message = ": holds the one metric 'log', not 'gradnorm'"
    assert_ends(["advise", str(path), "--column", "gradnorm"], message, monkeypatch, capsys)


def test_no_log_is_an_error() -> None:
    with pytest.raises(LogError, match="no log to read"):
        _read.read([])


@pytest.mark.parametrize("name", NEEDED)
def test_a_binary_log_may_break_off_or_be_damaged(name: str, tmp_path: pathlib.Path) -> None:
    pytest.importorskip(NEEDED[name])
    data, path = (DATA / name).read_bytes(), tmp_path / "log"
    path.write_bytes(data[: len(data) // 2])
    assert 20 <= _read.read(str(path)).norms.size < 60
    path.write_bytes(data[:100] + b"\xff" * 1000 + data[1100:])
    with pytest.raises(LogError, match=r"cannot read it|no record|no column looks like"):
        _read.read(str(path))
