"""Runs notebooks and keeps their outputs: `python notebooks/keep_outputs.py [NAME ...]`.

One device, but where a notebook itself asks for more. Pictures are kept with few colours.
"""

import base64
import io
import json
import os
import pathlib
import sys
import tempfile

import nbformat
from nbclient import NotebookClient
from PIL import Image

FOLDER = pathlib.Path(__file__).resolve().parent
KERNEL = {
    "argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
    "display_name": "Python 3",
    "language": "python",
    "env": {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(FOLDER.parent), os.environ.get("PYTHONPATH", "")]),
    },
}


def smaller(picture: str) -> str:
    image = Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB")
    out = io.BytesIO()
    image.quantize(64).save(out, "png", optimize=True)
    return base64.b64encode(out.getvalue()).decode()


def keep(path: pathlib.Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook,
        kernel_name="this-one",
        record_timing=False,
        resources={"metadata": {"path": str(FOLDER)}},
    ).execute()
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            if "image/png" in data:
                data["image/png"] = smaller(data["image/png"])
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    nbformat.write(notebook, path)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        place = pathlib.Path(folder, "kernels", "this-one")
        place.mkdir(parents=True)
        (place / "kernel.json").write_text(json.dumps(KERNEL))
        os.environ["JUPYTER_PATH"] = folder
        for path in map(pathlib.Path, sys.argv[1:] or sorted(FOLDER.glob("*.ipynb"))):
            keep(path)


if __name__ == "__main__":
    main()
