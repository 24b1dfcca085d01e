"""Cases of decode attention, products and ops over rows, to be compiled for chips that are not here."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from kernels_pallas.decode import decode_attention
from kernels_pallas.grouped_matmul import grouped_matmul
from kernels_pallas.norm import norm_quantized
from kernels_pallas.packed import Layout, Plane, packed_matmul
from kernels_pallas.rope import rope
from kernels_pallas.selective_scan import selective_scan
from kernels_pallas.softmax import softmax

# B, T, N, K, H, S, kind of the cache, its page or None, dtype of queries; the options that follow are added
DECODING: dict[str, tuple] = {
    "decode": (4, 1, 32, 8, 128, 4096, "float", None, "bfloat16", {}),
    "decode int8": (4, 1, 32, 8, 128, 4096, "int8", None, "bfloat16", {}),
    "decode float8": (4, 1, 32, 8, 128, 4096, "float8_e4m3fn", None, "bfloat16", {}),
    "decode int4, float32, tails": (2, 3, 6, 2, 80, 1000, "int4", None, "float32", {"slopes": (6,), "sinks": (6,)}),
    "decode pages": (4, 2, 32, 8, 128, 4096, "float", 128, "bfloat16", {"window": 300, "soft_cap": 20.0}),
    "decode pages of int4": (4, 2, 32, 8, 128, 4096, "int4", 128, "bfloat16", {"sinks": (32,)}),
    "prompt, chunks": (2, 700, 8, 2, 64, 1000, "int8", None, "bfloat16", {"chunk": 300}),
}
_HALVES, _BYTES = (Plane("codes", 4, 16),), (Plane("codes", 8),)
_TABLE = tuple(float(i) for i in range(16))
# layouts of the formats that trustcore has; `run` is K where scales belong to columns
LAYOUTS: dict[str, Layout] = {
    "q4_0": Layout("q4_0", 32, _HALVES, offset=8),
    "q8_0": Layout("q8_0", 32, _BYTES, "signed"),
    "q4_k": Layout("q4_k", 256, (Plane("codes", 4, 32),), sub=32, kind="six_bits"),
    "q6_k": Layout("q6_k", 256, (Plane("codes", 4, 64), Plane("high", 2, 32)), sub=16, kind="int8", offset=32),
    "mxfp4": Layout("mxfp4", 32, _HALVES, "table", kind="power", table=_TABLE, halved=1),
    "int4": Layout("int4", 128, (Plane("codes", 4),), extra="zero"),
    "int8": Layout("int8", 128, _BYTES, "signed", run=2304),
    "e4m3": Layout("e4m3", 128, _BYTES, "e4m3"),
    "nf4": Layout("nf4", 64, (Plane("codes", 4),), "table", table=_TABLE),
}
PRODUCTS = {
    f"{name}, {rows} rows of {dtype}": (name, rows, dtype)
    for name in LAYOUTS
    for rows, dtype in ((1, "bfloat16"), (16, "bfloat16"), (300, "bfloat16"), (300, "float32"))
}


def decoding(implementation, b, t, n, k, h, s, kind, page, dtype, options):
    """A case of decode attention: a function of arrays by name, and their shapes and dtypes."""
    first, slots = (b, s) if page is None else (500, page)
    half = h // 2 if kind == "int4" else h
    code = {"float": dtype, "int4": "uint8"}.get(kind, kind)
    shapes = {"query": ((b, t, n, h), dtype), "keys": ((first, k, half, slots), code)}
    shapes |= {"values": ((first, k, slots, half), code), "lengths": ((b,), "int32")}
    if kind != "float":
        scale = ((first, k, 2, slots), "bfloat16") if kind == "int4" else ((first, k, slots), "float32")
        shapes |= {"key_scale": scale, "value_scale": scale}
    if page is not None:
        shapes["pages"] = ((b, -(-s // page)), "int32")
    shapes |= {x: (v, "float32") for x, v in options.items() if isinstance(v, tuple)}
    static = {x: v for x, v in options.items() if not isinstance(v, tuple)}
    return (lambda arrays: decode_attention(**arrays, **static, implementation=implementation)), shapes


def product(implementation, name, rows, dtype, k=2304, n=1536):
    """A product with a packed weight, alike."""
    layout = LAYOUTS[name]
    shapes = {
        p.name: ((k // layout.block, layout.rows(p), n), "int8" if p.bits == 8 else "uint8") for p in layout.planes
    }
    for field in layout.fields[len(layout.planes) :]:
        count = {"six_bits": 12, "int8": 16}.get(layout.kind) if field == "scales" else None
        runs = k // (layout.run or layout.block)
        kind = {"exponent": "uint8", "scales": "uint8" if layout.kind == "six_bits" else "int8"}.get(field, "float16")
        shapes[field] = ((runs, n) if count is None else (runs, count, n), kind)

    def run(arrays):
        fields = {n: arrays[n] for n in layout.fields}
        return packed_matmul(arrays["x"], fields, layout=layout, implementation=implementation)

    return run, {"x": ((rows, k), dtype), **shapes}


def more_cases(implementation):
    """Every case by name: a function of arrays by name, and the shapes and dtypes of these."""
    found = {name: decoding(implementation, *case) for name, case in DECODING.items()}
    return found | {name: product(implementation, *case) for name, case in PRODUCTS.items()}


ROWS, GAIN = ((3000, 4096), "bfloat16"), ((4096,), "bfloat16")
EXPERTS = {
    "experts": ((4096, 4096), (8, 4096, 14336), "bfloat16"),
    "small experts": ((8192, 2048), (128, 2048, 768), "bfloat16"),
    "one token": ((2, 4096), (8, 4096, 14336), "bfloat16"),
    "float32, tails": ((1000, 200), (5, 200, 300), "float32"),
}
# B, T, I, S, dtype
SCANS = {
    "scan": (2, 700, 1536, 16, "bfloat16"),
    "scan of 64": (2, 700, 1000, 64, "bfloat16"),
    "scan, tails": (1, 1000, 1000, 20, "float32"),
    "scan, large states": (1, 2048, 5120, 128, "bfloat16"),
}
# shape of x, its dtype, channels that turn, and whether pairs are neighbours
TURNS = {
    "rope": ((2, 4096, 32, 128), "bfloat16", 128, False),
    "rope of a part, interleaved": ((3, 700, 3, 256), "float32", 96, True),
}


def row_cases(implementation):
    """Cases of grouped products, scans, rotary positions, softmax and norms with codes.

    By name: a function, the types of its operands, and how many kernels it has.
    """

    def total(y):
        return jnp.sum(jnp.sin(y.astype(jnp.float32)))

    def product(x, w, sizes):
        return total(grouped_matmul(x, w, sizes, implementation=implementation))

    def weights(x, mask):
        return total(softmax(x, mask, implementation=implementation))

    def codes(x, w):
        return norm_quantized(x, w, residual=x, implementation=implementation)

    def floats(x, w):
        return norm_quantized(x, w, dtype=jnp.float8_e4m3fn, implementation=implementation)

    def scanned(*arrays):
        return sum(map(total, selective_scan(*arrays, implementation=implementation)))

    def unturned(turn, dy, cos, sin):
        return jax.vjp(lambda x: turn(x, cos, sin), jnp.zeros_like(dy))[1](dy)[0]

    gradient = jax.grad(product, (0, 1))
    found: dict[str, tuple[Callable, tuple, int]] = {}
    for name, (x, w, dtype) in EXPERTS.items():
        found[name] = gradient, ((x, dtype), (w, dtype), ((w[0],), "int32")), 3
    for name, (b, t, i, s, dtype) in SCANS.items():
        tokens, numbers = ((b, t, i), dtype), ((b, t, s), dtype)
        found[name] = jax.grad(scanned, (0, 1, 2, 3, 4)), (tokens, tokens, ((i, s), "float32"), numbers, numbers), 2
    for name, (shape, dtype, size, interleaved) in TURNS.items():
        angles = ((1 if shape[0] == 2 else shape[0], shape[1], size // 2), "float32")
        turn = functools.partial(rope, interleaved=interleaved, implementation=implementation)
        found[name] = turn, ((shape, dtype), angles, angles), 1
        found[f"{name}, backward"] = functools.partial(unturned, turn), ((shape, dtype), angles, angles), 1
    found["softmax"] = jax.grad(weights), (ROWS, ((3000, 4096), "bool")), 2
    found["norm, int8"] = codes, (ROWS, GAIN), 1
    found["norm, float8"] = floats, (ROWS, GAIN), 1
    return found
