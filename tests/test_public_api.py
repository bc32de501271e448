"""What the package offers: typed, documented, with examples that run."""

import importlib.metadata
import inspect
import os
import pathlib
import subprocess
import sys

import optax
import pytest
import trees

import clipax

FUNCTIONS = {name: value for name, value in vars(clipax).items() if inspect.isfunction(value)}
ROOMS = ("advice", "coefficients", "norms", "per_example", "states", "thresholds", "units")
METHODS = {
    path.stem for path in (pathlib.Path(clipax.__file__).parent / "methods").glob("[a-z]*.py")
}


def test_every_method_has_a_file_a_test_and_a_place_in_the_map() -> None:
    tests = {path.stem for path in (pathlib.Path(__file__).parent / "methods").glob("*.py")}
    for method in METHODS:
        assert method in trees.public_factories()
        assert f"test_{method}" in tests
        assert f"`{method}`" in clipax.__doc__


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_every_function_is_in_the_map_and_documented(name: str) -> None:
    assert f"`{name}`" in clipax.__doc__
    doc, signature = inspect.getdoc(FUNCTIONS[name]), inspect.signature(FUNCTIONS[name])
    assert len(doc.splitlines()[0]) <= 80
    assert signature.return_annotation is not inspect.Signature.empty
    for parameter in signature.parameters.values():
        assert parameter.annotation is not inspect.Parameter.empty


@pytest.mark.parametrize("room", ROOMS)
def test_everything_in_a_public_module_is_documented(room: str) -> None:
    module = getattr(clipax, room)
    for name, value in vars(module).items():
        if name[0] != "_" and getattr(value, "__module__", "").startswith("clipax"):
            assert inspect.getdoc(value), name


def test_the_top_level_has_about_forty_names() -> None:
    names = {name for name, value in vars(clipax).items() if name[0] != "_"}
    assert 35 <= len({name for name in names if not inspect.ismodule(getattr(clipax, name))}) <= 46


@pytest.mark.parametrize("name", sorted(trees.public_factories()))
def test_every_factory_documents_its_arguments_in_order(name: str) -> None:
    doc = inspect.getdoc(FUNCTIONS[name])
    assert ">>> " in doc
    places = [
        doc.find(f"\n  {parameter}: ")
        for parameter in inspect.signature(FUNCTIONS[name]).parameters
    ]
    assert places == sorted(places)
    assert all(place > 0 for place in places)
    if name in METHODS:
        headings = ["Args:", "Returns:", "Raises:", "Example:"]
        assert [doc.find(heading) for heading in headings] == sorted(doc.find(h) for h in headings)
        assert "\n|---|" in doc


def test_names_of_arguments_are_the_terms_of_the_field() -> None:
    other_names = {
        "g",
        "grads",
        "threshold",
        "clipping",
        "clip_value",
        "max_delta",
        "alpha",
        "beta",
        "momentum",
        "percentile",
        "history",
        "buffer",
        "z_thresh",
        "step",
        "t",
    }
    for name, factory in trees.public_factories().items():
        taken = set(inspect.signature(factory).parameters) & other_names
        assert not taken or (name, taken) == ("clip_by", {"threshold"})


def test_methods_are_transformations_of_optax() -> None:
    for name in trees.public_factories():
        assert isinstance(trees.build(name), optax.GradientTransformationExtraArgs)


def test_importing_takes_jax_and_optax_alone() -> None:
    code = "import sys, clipax; print(sorted({name.split('.')[0] for name in sys.modules}))"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    for module in ("chex", "equinox", "flax", "sklearn", "matplotlib", "tqdm", "hypothesis"):
        assert f"'{module}'" not in loaded.stdout or module == "chex"  # older optax imports chex


def test_importing_touches_no_device() -> None:
    # Without a platform of this name, whatever asks for a device fails.
    environment = os.environ | {"JAX_PLATFORMS": "no_such_platform"}
    ask = "import jax; jax.devices()"
    for code, status in (("import clipax", 0), (ask, 1)):
        run = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, check=False
        )
        assert run.returncode == status, run.stderr.decode()


def test_the_package_is_typed_and_versioned() -> None:
    assert (pathlib.Path(clipax.__file__).parent / "py.typed").exists()
    assert clipax.__version__ == importlib.metadata.version("clipax")
