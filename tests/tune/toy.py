"""`x @ w` in several forms, of which the tuner must take the right fast one."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas import tuning
from kernels_pallas.dispatch import Target
from kernels_pallas.tuning import Cost, Tunable, completed

HERE = Target("cpu")


def facts(x: Any, w: Any) -> dict[str, Any]:
    return {"R": x.shape[0], "D": x.shape[1], "dtype": x.dtype.name}


def product(x: jax.Array, w: jax.Array) -> jax.Array:
    """The op: reads the form it is to take where it is traced."""
    found = tuning.values("toy", HERE, lambda: facts(x, w))
    form, turns = found.get("form", "loop"), found.get("turns", 200)
    if form == "broken":
        raise ValueError("this form cannot be traced")
    if form == "wrong":
        return x @ w + 0.1 * jnp.ones((1, 1), x.dtype)
    if form == "nan":
        return jnp.where(x @ w > 0, x @ w, jnp.nan)
    if form == "fast":
        return x @ w
    # Each turn has a product of its own, which adds nothing: the loop takes that many times as long.
    return jax.lax.fori_loop(0, turns, lambda i, y: x @ w + (y @ w) * 0.0, jnp.zeros((x.shape[0], w.shape[1])))


def operands(known: Any) -> tuple[jax.Array, ...]:
    keys = jax.random.split(jax.random.key(0))
    return (
        jax.random.normal(keys[0], (known["R"], known["D"])),
        jax.random.normal(keys[1], (known["D"], known["D"])),
    )


def oracle(known: Any, made: Any) -> jax.Array:
    return jnp.matmul(*made, precision="highest")


def cost(target: Target, known: Any, given: Any) -> Cost:
    turns = given.get("turns", 200) if given.get("form") == "slow" else 1
    return Cost(2.0 * known["R"] * known["D"] ** 2 * turns, 4.0 * known["D"] ** 2, turns, onchip=given.get("turns", 0))


TOY = Tunable(
    op="toy",
    sources=(product,),
    grids={"plain": {"form": ("fast", "slow", "wrong", "nan", "broken"), "turns": (100,)}, "other": {}},
    sizes=("R", "D"),
    complete=lambda given: completed("toy", given, ("R", "D"), {"dtype": "float32"}),
    facts=facts,
    operands=operands,
    run=lambda known: product,
    oracle=oracle,
    refusal=lambda target, name, known: "it runs elsewhere." if name == "other" else "",
    cost=cost,
    reduction=lambda known: known["D"],
)
