"""What may be tuned of attention, forward and backward: the implementation, and each one's block sizes.

Results are checked on one batch row and one or two groups of heads, whose oracle has all of the scores in memory; the
last ones, where a wrong index shows. With dropout, whose pattern counts heads, all of a call is checked.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp

from kernels_pallas.attention import mosaic_gpu, triton, xla
from kernels_pallas.attention.facts import MORE, facts
from kernels_pallas.attention.front import ATTENTION, Call, _checked, attention
from kernels_pallas.attention.oracle import attention_oracle
from kernels_pallas.attention.spec import Operands
from kernels_pallas.dispatch import Target
from kernels_pallas.tuning import Cost, Facts, Tunable, Values, completed

GRIDS = {
    "mosaic_gpu": {"length": (64, 128, 192, 256), "stages": (2, 3, 4)},
    "triton": {"queries": (16, 32, 64, 128, 256), "keys": (16, 32, 64, 128), "warps": (4, 8), "stages": (1, 2, 3, 4)},
    "mosaic_tpu": {"queries": (128, 256, 512, 1024), "keys": (128, 256, 512, 1024, 2048)},
    "xla": {"block_q": (64, 128, 256, 512, 1024), "block_k": (128, 256, 512, 1024, 2048)},
}
_MOSAIC = tuple(f"mosaic_{name}" for name in ("gpu", "kernels", "ampere", "hopper", "blackwell"))
_SOURCES = ("xla", "triton", *_MOSAIC, "tpu", "blocks", "spec", "front")
LARGEST = 2**31  # bytes of scores that the oracle may hold
_DTYPES = ("float32", "bfloat16", "float16")


def _complete(given: dict[str, Any]) -> dict[str, Any]:
    optional = {"K": 1, "S": 1, "Hv": 1, "dtype": "float32", "causal": True, "window": 0, "more": ""}
    made = completed("attention", {n: x for n, x in given.items() if n != "window"}, ("B", "T", "N", "H"), optional)
    made |= {n: made[other] for n, other in (("K", "N"), ("S", "T"), ("Hv", "H")) if n not in given}
    made["window"] = given.get("window", 0)
    if made["N"] % made["K"]:
        raise ValueError(f"attention: K={made['K']} does not divide N={made['N']}.")
    if made["dtype"] not in _DTYPES:
        raise ValueError(f"attention: dtype is {made['dtype']!r}; choose of {', '.join(_DTYPES)}.")
    if not isinstance(made["causal"], bool) or not isinstance(made["window"], int) or made["window"] < 0:
        raise ValueError("attention: causal is true or false, and window a number of keys, 0 for all.")
    unknown = set(made["more"].split()) - {*MORE, "soft_cap", "dropout"}
    if unknown:
        raise ValueError(f"attention: {', '.join(sorted(unknown))} is nothing that attention takes more.")
    return made


def _facts(query: Any, key: Any, value: Any, **options: Any) -> Facts | None:
    static = {n: options.pop(n) for n in ("causal", "window", "scale", "soft_cap", "dropout") if n in options}
    if static.get("dropout"):
        options["seed"] = jax.ShapeDtypeStruct((2,), jnp.uint32)
    options.pop("dropout_key", None)
    call = _checked(Operands(query, key, value, **options), **static)
    return facts(call.spec, call.ops)


def _types(known: Facts) -> dict[str, jax.ShapeDtypeStruct]:
    f, dtype = known, jnp.dtype(known["dtype"])
    shapes: dict[str, tuple[Any, Any]] = {
        "query": ((f["B"], f["T"], f["N"], f["H"]), dtype),
        "key": ((f["B"], f["S"], f["K"], f["H"]), dtype),
        "value": ((f["B"], f["S"], f["K"], f["Hv"]), dtype),
        "query_positions": ((f["B"], f["T"]), jnp.int32),
        "key_positions": ((f["B"], f["S"]), jnp.int32),
        "query_segments": ((f["B"], f["T"]), jnp.int32),
        "key_segments": ((f["B"], f["S"]), jnp.int32),
        "mask": ((1, 1, f["T"], f["S"]), jnp.bool_),
        "bias": ((1, 1, f["T"], f["S"]), jnp.float32),
        "slopes": ((f["N"],), jnp.float32),
        "relative": ((f["N"], 257), jnp.float32),
        "sinks": ((f["N"],), jnp.float32),
    }
    more = set(f["more"].split())
    names = ["query", "key", "value", *(n for n in MORE if n in more)]
    names += ["key_segments"] if "query_segments" in more else []
    return {n: jax.ShapeDtypeStruct(*shapes[n]) for n in names}


def _options(known: Facts) -> dict[str, Any]:
    more = known["more"].split()
    options: dict[str, Any] = {"causal": known["causal"], "window": known["window"] or None}
    if "soft_cap" in more:
        options["soft_cap"] = 30.0
    if "dropout" in more:
        options |= {"dropout": 0.1, "dropout_key": jax.random.key(7)}
    return options


def _call(known: Facts) -> Call:
    options = _options(known)
    options.pop("dropout_key", None)
    types = dict(_types(known))
    if options.get("dropout"):
        types["seed"] = jax.ShapeDtypeStruct((2,), jnp.uint32)
    return _checked(Operands(**cast(Any, types)), **options)


def _refusal(target: Target, implementation: str, known: Facts) -> str:
    return ATTENTION.named(implementation).refusal(target, _call(known))


def _arrays(known: Facts, keys: list[jax.Array]) -> dict[str, jax.Array]:
    made = {}
    for (name, kind), key in zip(_types(known).items(), keys, strict=False):
        if name.endswith("positions"):
            made[name] = jnp.broadcast_to(jnp.arange(kind.shape[1], dtype=jnp.int32), kind.shape)
        elif name.endswith("segments"):
            made[name] = jnp.broadcast_to(jnp.arange(kind.shape[1], dtype=jnp.int32) // 512, kind.shape)
        elif name == "mask":
            made[name] = jax.random.uniform(key, kind.shape) < 0.9
        else:
            made[name] = jax.random.normal(key, kind.shape, jnp.float32).astype(kind.dtype)
    return made


def _operands(known: Facts) -> tuple[Any, ...]:
    return (_arrays(known, list(jax.random.split(jax.random.key(0), 16))),)


def _pair(known: Facts) -> tuple[Any, ...]:
    """Operands, and a cotangent of the output."""
    shape = (known["B"], known["T"], known["N"], known["Hv"])
    cotangent = jax.random.normal(jax.random.key(1), shape, jnp.float32)
    return (*_operands(known), cotangent.astype(known["dtype"]))


def _pull(known: Facts, operands: tuple[Any, ...], function: Callable[..., Any] = attention) -> tuple[Any, ...]:
    arrays, cotangent = operands
    rest = {n: x for n, x in arrays.items() if n not in ("query", "key", "value")}
    _, pull = jax.vjp(functools.partial(function, **rest, **_options(known)), *(arrays[n] for n in _SMOOTH))
    return pull, cotangent


_SMOOTH = ("query", "key", "value")


def _heads(known: Facts) -> list[int]:
    """The groups of heads that are checked: first and last if both fit, else the last."""
    one = known["T"] * known["S"] * 4 * (known["N"] // known["K"])
    if one > LARGEST:
        raise ValueError(
            f"attention: the oracle of one group of heads at T={known['T']} and S={known['S']} takes {one / 1e9:.0f} "
            "GB; tune a shorter length, whose values serve longer ones."
        )
    return sorted({0, known["K"] - 1}) if 2 * one <= LARGEST else [known["K"] - 1]


def _part(known: Facts, name: str, x: jax.Array) -> jax.Array:
    """Of an operand or its gradient, the part that is checked."""
    if "dropout" in known["more"]:
        return x
    chosen, groups = _heads(known), known["N"] // known["K"]
    kv = jnp.asarray(chosen)
    if name in ("key", "value"):
        return x[-1:, :, kv]
    queries = (kv[:, None] * groups + jnp.arange(groups)[None, :]).reshape(-1)
    if name in ("slopes", "relative", "sinks"):
        return x[queries]
    if name in ("mask", "bias"):
        return x
    return x[-1:, :, queries] if x.ndim == 4 else x[-1:]


def _forward_oracle(known: Facts, operands: tuple[Any, ...]) -> Any:
    arrays = {n: _part(known, n, x) for n, x in operands[0].items()}
    return attention_oracle(**arrays, **_options(known))


def _backward_oracle(known: Facts, operands: tuple[Any, ...]) -> Any:
    arrays, cotangent = operands
    wide = {n: x.astype(jnp.float32) if n in _SMOOTH else x for n, x in arrays.items()}
    parts = {n: _part(known, n, x) for n, x in wide.items()}
    pull, _ = _pull(known, (parts, cotangent), attention_oracle)
    return pull(_part(known, "out", cotangent).astype(jnp.float32))


def _constraint(target: Target, known: Facts, given: Values) -> str:
    longest = max(64, 1 << (max(known["T"], known["S"]) - 1).bit_length())
    if given.get("length", 0) > longest:
        return f"a block of {given['length']} keys, and there are {known['S']}"
    return ""


def _resolved(target: Target, known: Facts, given: Values, *, backward: bool) -> Any:
    call, name = _call(known), given.get("implementation")
    if name == "mosaic_gpu":
        engine = mosaic_gpu.engine_of(target) or "hopper"
        plain = mosaic_gpu.blocks_of(call, "dq" if backward else "forward", engine)
        return name, given.get("length", plain.length), given.get("stages", plain.stages)
    if name == "xla":
        return name, xla.plan_of(call.ops, target.platform, given)
    made = dict(given)
    if "queries" in made:
        rounded = triton._power if name == "triton" else lambda n: n
        made |= {"queries": min(made["queries"], rounded(known["T"])), "keys": min(made["keys"], rounded(known["S"]))}
    return tuple(sorted(made.items()))


def _cost(target: Target, known: Facts, given: Values, *, backward: bool) -> Cost:
    f, name = known, given["implementation"]
    size = jnp.dtype(f["dtype"]).itemsize
    groups = f["N"] // f["K"]
    if name == "mosaic_gpu":
        queries = mosaic_gpu.tile_of(target, _call(known), "dq" if backward else "forward")
        keys = min(given.get("length", 128), f["S"])
    elif name == "xla":
        plan = xla.plan_of(_call(known).ops, target.platform, given)
        queries, keys = plan.block_q, plan.block_k
    else:
        queries, keys = min(given.get("queries", 128), f["T"]), min(given.get("keys", 128), f["S"])
    rows, columns = -(-f["T"] // queries), -(-f["S"] // keys)
    heads = f["B"] * (f["K"] if name == "xla" else f["N"])
    # The share of tiles that a mask leaves: with a causal one half of them and those on the diagonal.
    share = min(1.0, 0.5 + 0.5 * max(queries / f["T"], keys / f["S"])) if f["causal"] else 1.0
    share = min(share, (f["window"] + queries + keys) / f["S"]) if f["window"] else share
    tiles = heads * rows * columns * share
    products = 5 if backward else 2
    flops = tiles * 2 * queries * keys * f["H"] * products * (groups if name == "xla" else 1)
    width = f["H"] + f["Hv"]
    moved = tiles * keys * width * size + heads * f["T"] * width * size * (groups if name == "xla" else 1)
    stages = given.get("stages", 2)
    onchip = (stages * keys * width + queries * width) * size * (2 if backward else 1)
    if name == "mosaic_gpu":  # a tile of queries (backward: and cotangents), the ring, and one number a row of each
        held = queries * (width if backward or f["H"] != f["Hv"] else f["H"])
        onchip = (held + stages * keys * width) * size + 8 * (queries + stages * keys)
    if name == "mosaic_tpu":
        onchip = 2 * (keys + queries) * width * size + queries * width * 4 + 3 * queries * keys * 4
    tile = queries * keys * groups * 4 if name == "xla" else 0
    return Cost(flops, moved, tiles, heads * rows, 0 if name == "xla" else onchip, tile)


def _tunable(direction: str) -> Tunable:
    backward = direction == "backward"

    def run(known: Facts) -> Callable[..., Any]:
        if backward:
            return lambda pull, cotangent: pull(cotangent)
        return lambda arrays: attention(**arrays, **_options(known))

    def checked(known: Facts, result: Any) -> Any:
        if not backward:
            return _part(known, "out", result)
        return tuple(_part(known, n, x) for n, x in zip(_SMOOTH, result, strict=True))

    return Tunable(
        op=f"attention_{direction}",
        sources=tuple(f"kernels_pallas.attention.{n}" for n in _SOURCES),
        grids={i.name: GRIDS.get(i.name, {}) for i in ATTENTION.implementations},
        sizes=("B", "T", "S", "N", "K", "window"),
        complete=_complete,
        facts=_facts,
        operands=_pair if backward else _operands,
        prepare=_pull if backward else lambda known, operands: operands,
        run=run,
        oracle=_backward_oracle if backward else _forward_oracle,
        checked=checked,
        refusal=_refusal,
        constraint=_constraint,
        resolved=functools.partial(_resolved, backward=backward),
        cost=functools.partial(_cost, backward=backward),
        reduction=lambda known: max(known["S"], known["T"] if backward else 1, known["H"]),
    )


FORWARD, BACKWARD = _tunable("forward"), _tunable("backward")
TUNABLES = (FORWARD, BACKWARD)
