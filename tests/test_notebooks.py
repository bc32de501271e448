"""Every notebook runs as a reader runs it: a fresh kernel, this checkout, all of its cells."""

import ast
import base64
import importlib.util
import json
import os
import pathlib
import re
import sys
import time
import types

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager
from nbclient import NotebookClient

ROOT = pathlib.Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# A notebook takes less than 60 s on an idle CPU; the rest is room for a busy one.
SECONDS = 120
WHERE_AM_I = "import sys, jax, clipax\nprint(sys.executable, clipax.__file__, len(jax.devices()))"
# How many devices there were when the outputs were kept: one, where nothing is said.
KEPT_WITH_DEVICES = {"03_many_devices": 8}
_NUMBER = re.compile(r"[-+]?(?:\d+(?:\.\d*)?(?:e[-+]?\d+)?|\binf\b|\bnan\b)")

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
# One device everywhere, and many where they are the subject.
each_run = pytest.mark.parametrize(
    ("path", "num_devices"),
    [
        pytest.param(path, number, id=f"{number}-{path.stem}")
        for path in NOTEBOOKS
        for number in sorted({1, KEPT_WITH_DEVICES.get(path.stem, 1)})
    ],
)


def _read(path):
    return nbformat.read(path, as_version=4)


def _code_cells(path):
    return [cell for cell in _read(path).cells if cell.cell_type == "code"]


def _texts(notebook):
    """The text of each output of each code cell, with a # for every number."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [[_text(output) for output in cell.outputs] for cell in cells]


def _text(output):
    data = output.get("data", {})
    text = output.get("text") or data.get("text/markdown") or data["text/plain"]
    # Columns are as wide as their numbers.
    return re.sub(r"-{2,}", "--", re.sub(r"\s+", " ", _NUMBER.sub("#", text))).strip()


def _write_kernel_spec(folder, num_devices):
    """A kernel of this interpreter, whatever kernels Jupyter knows besides."""
    imports = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    spec = {
        "argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
        "display_name": "The interpreter of the tests",
        "language": "python",
        "env": {
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": os.pathsep.join(filter(None, imports)),
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={num_devices}",
        },
    }
    folder.mkdir(parents=True)
    (folder / "kernel.json").write_text(json.dumps(spec))


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.slow
@each_run
def test_runs(path, num_devices, tmp_path, monkeypatch):
    _write_kernel_spec(tmp_path / "kernels" / "of-the-tests", num_devices)
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    notebook, kept = _read(path), _texts(_read(path))
    notebook.cells.append(nbformat.v4.new_code_cell(WHERE_AM_I))
    start = time.monotonic()
    NotebookClient(
        notebook,
        kernel_name="of-the-tests",
        resources={"metadata": {"path": str(path.parent)}},
        timeout=SECONDS,
    ).execute()
    assert time.monotonic() - start < SECONDS

    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    warnings = [
        output.text
        for output in outputs
        if output.get("name") == "stderr" and "Warning" in output.text
    ]
    assert not warnings
    expected = f"{sys.executable} {ROOT / 'clipax' / '__init__.py'} {num_devices}"
    assert outputs[-1].text.strip() == expected
    if num_devices == KEPT_WITH_DEVICES.get(path.stem, 1):
        assert _texts(notebook)[:-1] == kept


@each_notebook
def test_is_kept_with_its_outputs(path):
    notebook = _read(path)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    cells = _code_cells(path)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert {output.output_type for output in outputs} <= {"display_data", "stream"}
    assert not [output for output in outputs if output.get("name") == "stderr"]
    assert not re.search(r"/(?:home|root|tmp|usr)/", json.dumps(outputs))


@each_notebook
def test_pictures_are_small(path):
    data = [output.get("data", {}) for cell in _code_cells(path) for output in cell.outputs]
    pictures = [base64.b64decode(each["image/png"]) for each in data if "image/png" in each]
    assert pictures
    assert max(map(len, pictures)) < 150_000


@pytest.mark.parametrize(
    ("one", "other", "is_alike"),
    [
        ("{'norm': 13.0}", "{'norm': 12.99}", True),
        ("loss  1e-05 ± nan", "loss 0.2 ± -3", True),
        ("{'norm': 13.0}", "{'bound': 13.0}", False),
        ("5 leaves", "5 leaves of 6", False),
    ],
)
def test_outputs_are_compared_but_for_their_numbers(one, other, is_alike):
    texts = [_text(nbformat.v4.new_output("stream", text=text)) for text in (one, other)]
    assert (texts[0] == texts[1]) == is_alike


@each_notebook
def test_cells_end_in_an_assert(path):
    _, *cells = _code_cells(path)
    assert cells
    for cell in cells:
        assert isinstance(ast.parse(cell.source).body[-1], ast.Assert), cell.source


def _installs(path, monkeypatch, *, missing):
    """What the install cell runs where these modules are missing."""
    commands, find_spec = [], importlib.util.find_spec
    shell = types.SimpleNamespace(run_line_magic=lambda name, line: commands.append((name, line)))
    code = TransformerManager().transform_cell(_code_cells(path)[0].source)
    with monkeypatch.context() as patch:
        patch.setattr(
            importlib.util, "find_spec", lambda name: None if name in missing else find_spec(name)
        )
        exec(code, {"get_ipython": lambda: shell})
    return commands


@each_notebook
class TestInstallCell:
    def test_has_four_lines_at_most(self, path):
        assert len(_code_cells(path)[0].source.splitlines()) <= 4

    def test_installs_nothing_where_all_is_there(self, path, monkeypatch):
        assert _installs(path, monkeypatch, missing=()) == []

    @pytest.mark.parametrize("missing", ["clipax", "matplotlib", "sklearn"])
    def test_installs_the_demonstration_where_something_is_missing(
        self, path, missing, monkeypatch
    ):
        commands = [("pip", 'install --quiet "clipax[demo]"')]
        assert _installs(path, monkeypatch, missing={missing}) == commands
