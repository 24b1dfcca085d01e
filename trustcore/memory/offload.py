"""Trees in the host's memory, and steps that bring them to the device and take them back.

    params = offload(params);  step = offloaded(train_step, argnums=(0, 1), results=(0, 1))
    params, state, loss = step(params, state, batch)          the same numbers; params and state stay with the host

Where the backend has memory kinds ("pinned_host", "unpinned_host"), an array in the host's memory is a `jax.Array` that
compiled programs copy in and out themselves, beside what they compute. Where it has none, it is a NumPy array, copied
before and after. On CPUs both memories are one: everything works, and nothing is saved.

Activations are offloaded by the policy of a checkpoint: `activation_policy`, which `fit` and `remat_blocks` take.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from trustcore.errors import ProgramError

KINDS = ("pinned_host", "unpinned_host")


def memory_kinds(device: Any = None) -> tuple[str, ...]:
    """Returns the names of the memories that a device (None: the default one) reaches, its own first."""
    device = device or jax.devices()[0]
    own = device.default_memory().kind
    return (own, *sorted(m.kind for m in device.addressable_memories() if m.kind != own))


def has_host_memory(device: Any = None) -> bool:
    """Returns whether a device reaches a memory of the host that is not its own: not on CPUs."""
    device = device or jax.devices()[0]
    return device.platform != "cpu" and any(kind in KINDS for kind in memory_kinds(device)[1:])


def offload(tree: Any, *, kind: str = "pinned_host") -> Any:
    """Returns a tree with its arrays in the host's memory.

    Args:
        tree: its `jax.Array`s are moved, all else stays.
        kind: "pinned_host", which copies fast, or "unpinned_host".

    Raises:
        ProgramError: no such kind.

    Sharded arrays keep their sharding. On a backend without such a memory, NumPy arrays.
    """
    if kind not in KINDS:
        raise ProgramError(f"offload: memory kind {kind!r} is none of {', '.join(KINDS)}.")

    def move(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array):
            return leaf
        if kind not in memory_kinds(next(iter(leaf.devices()))):
            return np.asarray(leaf)
        return jax.device_put(leaf, leaf.sharding.with_memory_kind(kind))

    return jax.tree.map(move, tree)


def onload(tree: Any) -> Any:
    """Returns a tree with its arrays in the device's own memory: the inverse of `offload`."""

    def move(leaf: Any) -> Any:
        if isinstance(leaf, np.ndarray):
            return jax.numpy.asarray(leaf)
        if not isinstance(leaf, jax.Array):
            return leaf
        own = next(iter(leaf.devices())).default_memory().kind
        return jax.device_put(leaf, leaf.sharding.with_memory_kind(own))

    return jax.tree.map(move, tree)


def offloaded(
    step: Callable[..., Any],
    *,
    argnums: int | Sequence[int] = 0,
    results: int | Sequence[int] = 0,
    donate: bool = True,
) -> Callable[..., Any]:
    """Returns a jitted step whose named arguments and results lie in the host's memory.

    Args:
        step: of pytrees; where `results` are named, it returns a tuple.
        argnums: numbers of the arguments that come from the host (see `offload`); others are as they are.
        results: numbers of the results that go back there, in the memory of the first of those arguments.
        donate: whether the arguments are gone afterwards, their memory taken for the results.

    Raises:
        ProgramError: when called: an argument or result of that number is missing.

    The numbers are those of `jax.jit(step)`, bit for bit. XLA copies each array in before its first use and out after
    its last, so that the device holds those that are in use.
    """
    wanted = (argnums,) if isinstance(argnums, int) else tuple(argnums)
    back = (results,) if isinstance(results, int) else tuple(results)

    def inside(*args: Any) -> Any:
        args = tuple(put(arg, jax.memory.Space.Device) if i in wanted else arg for i, arg in enumerate(args))
        found = step(*args)
        if not back:
            return found
        if not isinstance(found, tuple) or max(back) >= len(found):
            raise ProgramError(f"offloaded: results {list(back)} are named; the step returns {_kind(found)}.")
        return tuple(put(part, jax.memory.Space.Host) if i in back else part for i, part in enumerate(found))

    here = jax.jit(inside, donate_argnums=wanted if donate else ())
    plain = functools.cache(lambda: jax.jit(step, donate_argnums=wanted if donate else ()))

    @functools.wraps(step)
    def called(*args: Any) -> Any:
        if wanted and max(wanted) >= len(args):
            raise ProgramError(f"offloaded: argnums {list(wanted)} are named; there are {len(args)} arguments.")
        if any(isinstance(leaf, np.ndarray) for i in wanted for leaf in jax.tree.leaves(args[i])):
            found = plain()(*(onload(arg) if i in wanted else arg for i, arg in enumerate(args)))
            if not back:
                return found
            if not isinstance(found, tuple) or max(back) >= len(found):
                raise ProgramError(f"offloaded: results {list(back)} are named; the step returns {_kind(found)}.")
            return tuple(jax.tree.map(np.asarray, part) if i in back else part for i, part in enumerate(found))
        return here(*args)

    return called


def activation_policy(*names: str) -> Any:
    """Returns a policy for `jax.checkpoint` and `remat_blocks`: activations go to the host, and come back when needed.

    Args:
        names: of those that go (`jax.ad_checkpoint.checkpoint_name`), all else being computed again; none: the results
            of products with weights.
    """
    if names:
        return jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[], names_which_can_be_offloaded=list(names), offload_src="device",
            offload_dst="pinned_host",
        )  # fmt: skip
    return jax.checkpoint_policies.offload_dot_with_no_batch_dims("device", "pinned_host")


def put(tree: Any, space: Any) -> Any:
    """Returns a tree with its arrays in a memory space, within a program."""
    return jax.tree.map(lambda x: jax.device_put(x, space), tree)


def _kind(found: Any) -> str:
    return f"a tuple of {len(found)}" if isinstance(found, tuple) else f"a {type(found).__name__}"
