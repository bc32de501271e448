"""Each example, run as a reader runs it: in a process of its own, on this checkout."""

import importlib.util
import itertools
import math
import os
import pathlib
import re
import runpy
import subprocess
import sys
from typing import Any

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent


def _hook() -> Any:
    path = ROOT / "docs" / "hooks" / "frameworks.py"
    spec = importlib.util.spec_from_file_location("frameworks", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


EXAMPLES = _hook().examples()
each_example = pytest.mark.parametrize("example", EXAMPLES, ids=lambda each: each.name)
_LINE = re.compile(r"^(?:(\w+), )?(?:step|epoch) (\d+): (loss .*)$", re.MULTILINE)
# What the values of a metric may be.
_SENSIBLE = {
    "loss": math.isfinite,
    "norm": lambda value: 0 < value < math.inf,
    "max_norm": lambda value: value > 0,
    "clip_fraction": lambda value: 0 <= value <= 1,
    "skipped": lambda value: value == 0,
}
# A model that a CPU trains in a minute, and no services.
_TINY = """
    run_name=tiny hardware=cpu skip_jax_distributed_system=true dataset_type=synthetic steps=12
    base_emb_dim=32 base_mlp_dim=64 base_num_decoder_layers=2 base_num_query_heads=2
    base_num_kv_heads=2 head_dim=16 vocab_size=256 max_target_length=32 per_device_batch_size=4
    attention=dot_product learning_rate=1e-2 enable_checkpointing=false base_output_directory=out
"""
_ARGUMENTS = {"maxtext_launcher": _TINY.split()}
_ALSO_PRINTED = {
    "flax_nnx_sharded": "kernel: P(None, 'model') on 8 devices",
    "orbax_resume": "resumed bit for bit: True",
}


def test_there_is_an_example_for_each_framework() -> None:
    frameworks = "Brax Diffrax Equinox Haiku kauldron Keras Levanter Linen MaxText NetKet NNX"
    titles = " ".join(example.title for example in EXAMPLES)
    for name in [*frameworks.split(), "NumPyro", "Optax", "Orbax", "Tunix"]:
        assert name in titles


@each_example
def test_the_folder_lists_an_example(example: Any) -> None:
    line = f"| [`{example.name}.py`]({example.name}.py) | {example.title} |"
    assert line in (ROOT / "examples" / "README.md").read_text()


@each_example
def test_an_example_is_short_and_explained(example: Any) -> None:
    assert len([line for line in example.code.splitlines() if line.strip()]) <= 40
    assert example.text.endswith(".")
    assert "clipax._" not in example.code


@pytest.mark.parametrize(
    "example", [each for each in EXAMPLES if each.packages], ids=lambda each: each.name
)
def test_an_example_without_its_package_ends_with_what_to_install(
    example: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KERAS_BACKEND", "jax")  # It sets this itself, before its import.
    package = example.packages[0]
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "examples" / f"{example.name}.py"))
    assert re.fullmatch(rf"needs {package}(\.\w+)*: pip install \S.*", str(ended.value))


def _lines_of_maxtext(printed: str, log: str) -> list[tuple[str, str, str]]:
    """MaxText logs its losses itself, in a line a step."""
    losses = re.findall(r"step: (\d+),.* loss: ([\d.]+)", log + printed)
    norms = re.findall(r"^norm (\S+), max_norm (\S+)$", printed, re.MULTILINE)
    return [
        ("", step, f"loss {loss}, norm {norm}, max_norm {bound}")
        for (step, loss), (norm, bound) in zip(losses, norms, strict=False)
    ]


@pytest.mark.slow
@each_example
def test_an_example_trains(example: Any, tmp_path: pathlib.Path) -> None:
    missing = [name for name in example.packages if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"{' and '.join(missing)} not installed: {example.command}")
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    environment["DECOUPLE_GCLOUD"] = "TRUE"  # MaxText without Google's cloud
    script = str(ROOT / "examples" / f"{example.name}.py")
    command = [sys.executable, script, *_ARGUMENTS.get(example.name, ())]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=580
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert _ALSO_PRINTED.get(example.name, "") in done.stdout
    lines = _LINE.findall(done.stdout) or _lines_of_maxtext(done.stdout, done.stderr)
    assert lines, done.stdout
    for _, run in itertools.groupby(lines, key=lambda line: line[0]):
        reports = [dict(pair.split() for pair in told.split(", ")) for _, _, told in run]
        losses = [float(report["loss"]) for report in reports]
        assert losses[-1] < losses[0] - 0.1 * abs(losses[0])
        for report in reports:
            assert len(report) > 1
            for name, value in report.items():
                assert _SENSIBLE[name](float(value)), report
