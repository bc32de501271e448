"""Every notebook runs as a reader runs it: a fresh kernel, this checkout, all of its cells."""

import ast
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import time

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = pathlib.Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# A notebook takes less than 60 s on an idle CPU; the rest is room for a busy one.
SECONDS = 120
WHERE_AM_I = "import sys, jax, clipax\nprint(sys.executable, clipax.__file__, len(jax.devices()))"

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def _read(path):
    return nbformat.read(path, as_version=4)


def _code_cells(path):
    return [cell for cell in _read(path).cells if cell.cell_type == "code"]


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
@each_notebook
@pytest.mark.parametrize("num_devices", [1, 8])
def test_runs(path, num_devices, tmp_path, monkeypatch):
    _write_kernel_spec(tmp_path / "kernels" / "of-the-tests", num_devices)
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    notebook = _read(path)
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


@each_notebook
def test_is_clean(path):
    notebook = _read(path)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    for cell in _code_cells(path):
        assert not cell.outputs
        assert cell.execution_count is None


@each_notebook
def test_cells_end_in_an_assert(path):
    _, *cells = _code_cells(path)
    assert cells
    for cell in cells:
        assert isinstance(ast.parse(cell.source).body[-1], ast.Assert), cell.source


def _install(path, folder, monkeypatch, *, missing):
    """Runs the install cell without pip; gives what pip would install, and the new imports."""
    commands, find_spec, imports = [], importlib.util.find_spec, sys.path.copy()

    def find(name):
        return None if name in missing else find_spec(name)

    def record(command, *, check):
        assert check
        assert command[:5] == [sys.executable, "-m", "pip", "install", "--quiet"]
        commands.append(command[5:])

    with monkeypatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "path", imports.copy())
        patch.setattr(importlib.util, "find_spec", find)
        patch.setattr(subprocess, "run", record)
        exec(_code_cells(path)[0].source, {})
        assert sys.path[len(sys.path) - len(imports) :] == imports
        return commands, sys.path[: -len(imports)]


@each_notebook
class TestInstallCell:
    jax = f"jax=={importlib.metadata.version('jax')}"

    def test_installs_nothing_where_all_is_there(self, path, tmp_path, monkeypatch):
        assert _install(path, tmp_path, monkeypatch, missing=()) == ([], [])

    @pytest.mark.parametrize("folder", [ROOT, ROOT / "notebooks"], ids=["root", "notebooks"])
    def test_takes_the_checkout_that_it_sits_in(self, path, folder, monkeypatch):
        commands, imports = _install(path, folder, monkeypatch, missing={"clipax"})
        assert commands == [[f"--editable={ROOT}[demo]", self.jax]]
        assert imports == [str(ROOT)]

    def test_takes_the_index_elsewhere(self, path, tmp_path, monkeypatch):
        (tmp_path / "pyproject.toml").touch()  # somebody else's project
        commands, imports = _install(path, tmp_path, monkeypatch, missing={"clipax"})
        assert commands == [["clipax[demo]", self.jax]]
        assert imports == []

    def test_adds_what_the_demonstration_needs(self, path, tmp_path, monkeypatch):
        commands, _ = _install(path, tmp_path, monkeypatch, missing={"matplotlib"})
        assert commands == [["clipax[demo]", self.jax]]

    def test_lets_pip_choose_a_jax_where_none_is(self, path, tmp_path, monkeypatch):
        commands, _ = _install(path, tmp_path, monkeypatch, missing={"clipax", "jax"})
        assert commands == [["clipax[demo]"]]
