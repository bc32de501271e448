"""Users, keys and constants on several devices give what they give on one."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import per_example_zoo as zoo
import pytest
import trees
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from per_example_cases import every_way

import clipax
from clipax._core import _compat

DEVICES, USERS = 4, 3
P = PartitionSpec
# Some users have examples on two devices, each of which has two examples.
USER_IDS = np.array([0, 0, 1, 1, -1, 2, 0, 2])
OPTIONS: dict[str, dict[str, Any]] = {
    "users": {"num_users": USERS},
    "sums of users in microbatches": {
        "num_users": USERS,
        "user_mean": False,
        "microbatch_size": 2,
        "normalize_by": 3.0,
    },
}


def mesh_of(kind: AxisType) -> Any:
    return jax.make_mesh((DEVICES,), ("data",), axis_types=(kind,))


@pytest.mark.slow_but(2)
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_users_of_a_sharded_batch_are_clipped_as_on_one_device(kind: AxisType, name: str) -> None:
    loss_fn, params, batch = every_way()
    mesh = mesh_of(kind)
    run = trees.quick_jit(clipax.clipped_grad(loss_fn, 0.1, **OPTIONS[name]))
    wanted, of_wanted = run(params, batch, user_ids=USER_IDS)
    sharded = jax.device_put(batch, NamedSharding(mesh, P("data")))
    replicated = jax.device_put(params, NamedSharding(mesh, P()))
    grads, info = run(replicated, sharded, user_ids=USER_IDS)
    zoo.assert_near(grads, wanted)
    zoo.assert_near(info.norms, of_wanted.norms)
    zoo.assert_near(info.losses, of_wanted.losses)
    trees.assert_same_type(info, of_wanted)


def of_devices(grad_of: Any, *split: Any) -> Any:
    """The sum over devices that have all parameters, and a part of everything else."""

    def step(params: Any, *split: Any) -> Any:
        params = jax.tree.map(lambda leaf: _compat.varying_over(leaf, ("data",)), params)
        return jax.lax.psum(grad_of(params, *split), "data")

    in_specs = (P(), *[P("data")] * len(split))
    mapped = jax.shard_map(step, mesh=mesh_of(AxisType.Auto), in_specs=in_specs, out_specs=P())
    return trees.quick_jit(mapped)(every_way()[1], *split)


@pytest.mark.slow_but(1)
@pytest.mark.parametrize("size", [None, 1])
def test_users_of_one_device_each_are_clipped_in_a_mapped_program(size: int | None) -> None:
    loss_fn, params, batch = every_way()
    user_ids = np.array([0, 0, 1, 1, 2, -1, 3, 3])
    grad_fn = clipax.clipped_grad(
        loss_fn, 0.1, num_users=4, normalize_by=4.0, microbatch_size=size
    )
    found = of_devices(lambda *args: grad_fn(*args[:2], user_ids=args[2])[0], batch, user_ids)
    wanted, _ = grad_fn(params, batch, user_ids=user_ids)
    zoo.assert_near(found, wanted)


def test_each_device_divides_by_the_constant() -> None:
    loss_fn, params, batch = every_way()
    grad_fn = clipax.clipped_grad(loss_fn, 0.1, normalize_by=8.0)
    mask = np.arange(8) != 5
    found = of_devices(lambda *args: grad_fn(*args[:2], mask=args[2])[0], batch, mask)
    zoo.assert_near(found, grad_fn(params, batch, mask=mask)[0])


def test_devices_without_examples_add_nothing() -> None:
    loss_fn, params, batch = every_way()
    grad_fn = clipax.clipped_grad(loss_fn, 0.1, normalize_by=8.0)
    nothing = jax.tree.map(lambda leaf: leaf[:0], batch)
    found = of_devices(lambda *args: grad_fn(*args)[0], nothing)
    zoo.assert_near(found, jax.tree.map(jnp.zeros_like, params))
