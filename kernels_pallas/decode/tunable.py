"""What may be tuned of decode attention: the implementation, splits of the cache, and the tiles of the kernels.

Measured with caches that are full, where time matters most. Results are checked on the last row of the batch and the
last key head with its queries, whose oracle holds that part of the cache as floats.
"""

from __future__ import annotations

from typing import Any, cast

import jax
import jax.numpy as jnp

from kernels_pallas.decode import triton, xla
from kernels_pallas.decode.facts import MORE, facts
from kernels_pallas.decode.front import DECODE, _checked, decode_attention
from kernels_pallas.decode.oracle import decode_oracle
from kernels_pallas.decode.spec import Call, Operands
from kernels_pallas.dispatch import Target
from kernels_pallas.tuning import Cost, Facts, Tunable, Values, completed

GRIDS = {
    "triton": {
        "slots": (16, 32, 64, 128), "splits": (1, 2, 4, 8, 16, 32, 64), "warps": (2, 4, 8), "stages": (1, 2, 3, 4)
    },
    "mosaic_tpu": {"slots": (128, 256, 512, 1024, 2048, 4096)},
    "xla": {"split": (64, 128, 256, 512, 1024, 2048, 4096, 8192)},
}  # fmt: skip
LARGEST = 2**31  # bytes that the oracle's part may hold
_DTYPES = ("float32", "bfloat16", "float16")
_CODES = ("int8", "float8_e4m3fn", "uint8")
_POOLS = ("keys", "values", "key_scale", "value_scale")


def _complete(given: dict[str, Any]) -> dict[str, Any]:
    plain = {"K": 1, "Hv": 1, "dtype": "float32", "cache": "", "more": ""}
    rest = {n: given.get(n, 0) for n in ("page", "window", "chunk")}
    made = completed(
        "decode_attention", {n: x for n, x in given.items() if n not in rest}, ("B", "T", "S", "N", "H"), plain
    )
    made |= {n: made[other] for n, other in (("K", "N"), ("Hv", "H")) if n not in given}
    made["cache"] = made["cache"] or made["dtype"]
    made = {n: x for n, x in made.items() if n != "more"} | rest | {"more": made["more"]}
    if made["N"] % made["K"]:
        raise ValueError(f"decode_attention: K={made['K']} does not divide N={made['N']}.")
    for name, allowed in (("dtype", _DTYPES), ("cache", (*_DTYPES, *_CODES))):
        if made[name] not in allowed:
            raise ValueError(f"decode_attention: {name} is {made[name]!r}; choose of {', '.join(allowed)}.")
    if made["cache"] == "uint8" and (made["H"] % 2 or made["Hv"] % 2):
        raise ValueError("decode_attention: codes of 4 bits (cache=uint8) need an even H and Hv.")
    if not all(isinstance(x, int) and not isinstance(x, bool) and x >= 0 for x in rest.values()):
        raise ValueError("decode_attention: page, window and chunk are numbers of slots, 0 for none.")
    if made["page"] and made["S"] % made["page"]:
        raise ValueError(f"decode_attention: S={made['S']} is no multiple of page={made['page']}.")
    unknown = set(made["more"].split()) - set(MORE)
    if unknown:
        raise ValueError(f"decode_attention: {', '.join(sorted(unknown))} is nothing that it takes more.")
    made["more"] = " ".join(n for n in MORE if n in made["more"].split())
    return made


def _facts(query: Any, keys: Any, values: Any, lengths: Any = None, **options: Any) -> Facts | None:
    lengths = jax.ShapeDtypeStruct((query.shape[0],), jnp.int32) if lengths is None else lengths
    static = {n: options.pop(n) for n in ("window", "chunk", "scale", "soft_cap") if n in options}
    return facts(_checked(Operands(query, keys, values, lengths, **options), **static))


def _types(known: Facts) -> dict[str, jax.ShapeDtypeStruct]:
    f = known
    packed, codes = f["cache"] == "uint8", f["cache"] in _CODES
    half = 2 if packed else 1
    first, slots = (f["B"] * (f["S"] // f["page"]), f["page"]) if f["page"] else (f["B"], f["S"])
    shapes: dict[str, tuple[Any, Any]] = {
        "query": ((f["B"], f["T"], f["N"], f["H"]), f["dtype"]),
        "keys": ((first, f["K"], f["H"] // half, slots), f["cache"]),
        "values": ((first, f["K"], slots, f["Hv"] // half), f["cache"]),
        "lengths": ((f["B"],), "int32"),
    }
    if codes:
        scale = ((first, f["K"], 2, slots), "bfloat16") if packed else ((first, f["K"], slots), "float32")
        shapes |= {"key_scale": scale, "value_scale": scale}
    if f["page"]:
        shapes["pages"] = ((f["B"], f["S"] // f["page"]), "int32")
    shapes |= {n: ((f["N"],), "float32") for n in ("slopes", "sinks") if n in f["more"].split()}
    return {n: jax.ShapeDtypeStruct(*x) for n, x in shapes.items()}


def _options(known: Facts) -> dict[str, Any]:
    options: dict[str, Any] = {n: known[n] or None for n in ("window", "chunk")}
    return options | ({"soft_cap": 30.0} if "soft_cap" in known["more"].split() else {})


def _call(known: Facts) -> Call:
    return _checked(Operands(**cast(Any, _types(known))), **_options(known))


def _operands(known: Facts) -> tuple[Any, ...]:
    made = {}
    for i, (name, kind) in enumerate(_types(known).items()):
        key = jax.random.key(i)
        if name == "lengths":
            made[name] = jnp.full(kind.shape, known["S"], jnp.int32)
        elif name == "pages":
            made[name] = jax.random.permutation(key, kind.size).astype(jnp.int32).reshape(kind.shape)
        elif name.endswith("scale"):
            made[name] = jax.random.uniform(key, kind.shape, jnp.float32, 0.01, 0.03).astype(kind.dtype)
        elif kind.dtype in (jnp.int8, jnp.uint8):
            low, high = (-100, 101) if kind.dtype == jnp.int8 else (0, 256)
            made[name] = jax.random.randint(key, kind.shape, low, high, jnp.int32).astype(kind.dtype)
        else:
            numbers = jax.random.normal(key, kind.shape, jnp.float32)
            made[name] = (numbers * (16.0 if kind.dtype == jnp.float8_e4m3fn else 1.0)).astype(kind.dtype)
    return (made,)


def _part(known: Facts, name: str, x: jax.Array) -> jax.Array:
    """Of an operand or the result, what the last row and the last key head have."""
    groups = known["N"] // known["K"]
    if name in _POOLS:
        return x[:, -1:] if known["page"] else x[-1:, -1:]
    if name in ("slopes", "sinks"):
        return x[-groups:]
    return x[-1:, :, -groups:] if x.ndim == 4 else x[-1:]


def _oracle(known: Facts, operands: tuple[Any, ...]) -> Any:
    f = known
    slots = f["S"] * (f["B"] if f["page"] else 1)
    size = 4 * (f["T"] * f["N"] // f["K"] * f["S"] + slots * (f["H"] + f["Hv"]))
    if size > LARGEST:
        raise ValueError(
            f"decode_attention: the oracle of one key head at T={f['T']} and S={f['S']} takes {size / 1e9:.0f} GB; "
            "tune fewer slots, whose values serve more."
        )
    return decode_oracle(**{n: _part(known, n, x) for n, x in operands[0].items()}, **_options(known))


def _refusal(target: Target, implementation: str, known: Facts) -> str:
    return DECODE.named(implementation).refusal(target, _call(known))


def _constraint(target: Target, known: Facts, given: Values) -> str:
    if given["implementation"] == "triton":
        each = -(-known["S"] // given["splits"])
        if known["page"] % given["slots"]:
            return f"pages of {known['page']} slots are no multiple of {given['slots']}"
        return "" if each >= given["slots"] else f"a split has {each} slots, fewer than a tile of {given['slots']}"
    return ""


def _resolved(target: Target, known: Facts, given: Values) -> Any:
    call, name = _call(known), given.get("implementation")
    if name == "xla":
        plan = xla.plan_of(call, target.platform, given)
        return name, plan.split, plan.cells, plan.tokens
    if name == "triton":
        return name, triton.fitting_blocks(call, given) if "slots" in given else triton.blocks_of(call)
    slots = known["page"] or min(given.get("slots", 512), known["S"])
    return name, slots


def _cost(target: Target, known: Facts, given: Values) -> Cost:
    f, name = known, given["implementation"]
    width = f["H"] + f["Hv"]
    seen = min(f["S"], f["window"] + f["T"]) if f["window"] else f["S"]
    seen = min(seen, f["chunk"] + f["T"]) if f["chunk"] else seen
    wide = jnp.dtype(f["dtype"]).itemsize
    size = 0.5 if f["cache"] == "uint8" else jnp.dtype(f["cache"]).itemsize
    flops, moved = 2.0 * f["B"] * f["N"] * f["T"] * seen * width, f["B"] * f["K"] * seen * width * size
    heads = f["B"] * f["K"]
    if name == "xla":
        plan = xla.plan_of(_call(known), target.platform, given)
        rows = f["B"] * f["N"] * f["T"] // plan.cells
        steps = -(-seen // plan.split) * plan.cells
        held = (heads if plan.cells == 1 else 1) * plan.split * width * 4
        return Cost(flops, moved, steps, tile=int(rows * plan.split * 4 + held))
    slots, rows = given.get("slots", 64), min(64, f["T"] * f["N"] // f["K"])
    if name == "mosaic_tpu":
        slots = min(slots, f["S"])
        onchip = int(2 * slots * width * size + 3 * slots * width * 4 + rows * slots * 12)
        return Cost(flops, moved, heads * -(-seen // slots), onchip=onchip)
    splits = given.get("splits", 1)
    held = int(given.get("stages", 2) * slots * width * size + rows * f["H"] * wide)
    merged = 2 * 4 * f["B"] * f["N"] * f["T"] * f["Hv"] * splits
    return Cost(flops, moved + merged, -(-seen // (splits * slots)), heads * splits, held)


FORWARD = Tunable(
    op="decode_attention_forward",
    sources=tuple(f"kernels_pallas.decode.{n}" for n in ("xla", "triton", "tpu", "spec", "front")),
    grids={i.name: GRIDS[i.name] for i in DECODE.implementations},
    sizes=("B", "T", "S", "N", "K", "window", "chunk"),
    complete=_complete,
    facts=_facts,
    operands=_operands,
    run=lambda known: lambda arrays: decode_attention(**arrays, **_options(known)),
    oracle=_oracle,
    checked=lambda known, result: _part(known, "out", result),
    refusal=_refusal,
    constraint=_constraint,
    resolved=_resolved,
    cost=_cost,
    reduction=lambda known: max(known["S"], known["H"]),
)
TUNABLES = (FORWARD,)
