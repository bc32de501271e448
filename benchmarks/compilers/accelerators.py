"""Compilers for chips that are not here, and what they are asked to compile.

libtpu holds the TPU compiler, JAX's CUDA plugin the CUDA compiler. Both compile for a
machine that is only described, without a device.
"""

import functools
import importlib.metadata
import itertools
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import export
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# Four chips each: a test takes one of them, or all as a slice.
TPUS = {
    "v4": "v4:2x2x1",
    "v5e": "v5e:2x2",
    "v5p": "v5p:2x2x1",
    "v6e": "v6e:2x2",
    "tpu7x": "tpu7x:2x2x1",
}
SLICE = 4

# What libtpu reads when it is loaded: it shall not ask for the metadata of a machine, nor
# wait for other hosts, and two workers of a run may load it.
_TPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_LOG_DIR": "disabled",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

# From NVIDIA's data sheet of the H100 SXM and the CUDA tables for compute capability 9.0.
_H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  l2_cache_size: 52428800
  memory_bandwidth: 3350000000000
  device_memory_size: 85899345920
}
platform_name: "CUDA"
runtime_version { major: 12 minor: 9 }
dnn_version_info { major: 9 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


_COMPILERS = {"tpu": ("libtpu",), "cuda": ("jax-cuda12-plugin", "nvidia-cuda-nvcc-cu12")}


def why_not(extra: str) -> str:
    """What is not installed of a compiler, and how it would be; empty where nothing lacks."""
    missing = [name for name in _COMPILERS[extra] if not _is_installed(name)]
    if not missing:
        return ""
    return f'{" and ".join(missing)} not installed: pip install "clipax[{extra}]"'


def _is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


@functools.cache
def chips(name: str) -> Any:
    """The devices of a slice of four: of a TPU generation, or of H100s."""
    if name == "h100":
        described = topologies.get_topology_desc(
            "h100", platform="cuda", target_config=_H100, topology=f"1x1x{SLICE}"
        )
        return described.devices
    return tpu_slice(TPUS[name])


def tpu_slice(topology: str) -> Any:
    """The devices of a slice of any size, such as `v5e:16x16`."""
    for variable, value in _TPU_ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    return topologies.get_topology_desc(topology_name=topology, platform="tpu").devices


def placed(tree: Any, mesh: Mesh) -> Any:
    """Shapes with shardings: matrices by their rows, where the mesh divides these."""

    def place(leaf: Any) -> jax.ShapeDtypeStruct:
        is_split = leaf.ndim > 1 and leaf.shape[0] % mesh.size == 0
        spec = PartitionSpec("x") if is_split else PartitionSpec()
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(place, tree)


def layers(*widths: int) -> list[dict[str, jax.ShapeDtypeStruct]]:
    """Two leaves a layer."""
    return [
        {
            "kernel": jax.ShapeDtypeStruct((rows, columns), jnp.float32),
            "bias": jax.ShapeDtypeStruct((columns,), jnp.float32),
        }
        for rows, columns in itertools.pairwise(widths)
    ]


def loss(params: Any, inputs: jax.Array) -> jax.Array:
    for layer in params:
        inputs = jnp.tanh(inputs @ layer["kernel"] + layer["bias"][None])
    return jnp.mean(jnp.square(inputs))


def compiled_step(
    optimizer: optax.GradientTransformation, devices: Any, params: Any, batch: int = 64
) -> jax.stages.Compiled:
    """A step of training: the gradient, the update and the new parameters."""

    def step(params: Any, state: Any, inputs: jax.Array) -> Any:
        value, updates = jax.value_and_grad(loss)(params, inputs)
        updates, state = optimizer.update(updates, state, params)
        return optax.apply_updates(params, updates), state, value

    inputs = jax.ShapeDtypeStruct((batch, params[0]["kernel"].shape[0]), jnp.float32)
    mesh = Mesh(np.array(devices), ("x",))
    with jax.numpy_dtype_promotion("standard"):  # optax promotes its counters
        state = jax.eval_shape(optimizer.init, params)
        arguments = placed((params, state, inputs), mesh)
        return jax.jit(step, donate_argnums=(0, 1)).lower(*arguments).compile()


def compile_exported(artefact: bytearray, devices: Any) -> jax.stages.Compiled:
    """What was exported, for one of its platforms."""
    restored = export.deserialize(artefact)
    leaves = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in restored.in_avals]
    arguments, keywords = jax.tree.unflatten(restored.in_tree, leaves)
    mesh = Mesh(np.array(devices), ("x",))
    return jax.jit(restored.call).lower(*placed(arguments, mesh), **keywords).compile()
