"""Compiles the kernels for attention, decoding and packed products for a TPU that is not here.

    python tests/kernels_pallas/compile_for_tpu.py v5e:2x2 [CASE ...]

libtpu compiles without a device. It aborts the process where it fails hard, so each topology is one process. A line
of JSON for an outcome has the case, the direction, `ok`, and either the bytes of temporary memory and the number of
kernels in the program, or the error's first lines.
"""

from __future__ import annotations

import functools
import json
import os
import sys

os.environ.update(
    JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", TPU_WORKER_HOSTNAMES="localhost", TPU_ACCELERATOR_TYPE="v5litepod-4"
)

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from kernels_pallas.attention import attention
from kernels_pallas.decode import decode_attention
from kernels_pallas.packed import Layout, Plane, packed_matmul

# B, T, N, K, H, S, dtype, options; arrays of options are given by their shapes
CASES: dict[str, tuple] = {
    "causal": (1, 2048, 4, 2, 128, 2048, "bfloat16", {}),
    "head 64": (2, 1024, 4, 4, 64, 1024, "bfloat16", {"causal": False}),
    "head 256": (1, 1024, 2, 1, 256, 1024, "bfloat16", {}),
    "float32, tails": (1, 700, 2, 1, 80, 900, "float32", {"causal": False}),
    "one query": (2, 1, 4, 2, 128, 1000, "bfloat16", {"causal": False}),
    "everything": (
        2, 700, 4, 2, 128, 700, "bfloat16",
        {
            "window": 130, "soft_cap": 30.0, "query_positions": (2, 700), "key_positions": (2, 700),
            "query_segments": (2, 700), "key_segments": (2, 700), "sinks": (4,), "slopes": (4,),
        },
    ),
    "bias": (2, 700, 4, 2, 128, 700, "bfloat16", {"bias": (1, 4, 700, 700)}),
    "mask of keys by head": (2, 700, 4, 2, 128, 700, "bfloat16", {"mask": (1, 4, 1, 700), "causal": False}),
    "dropout": (1, 600, 4, 2, 128, 600, "bfloat16", {"dropout": 0.1, "dropout_key": (2,)}),
}  # fmt: skip
_DTYPES = {"bias": jnp.float32, "sinks": jnp.float32, "slopes": jnp.float32, "mask": bool, "dropout_key": jnp.uint32}


# B, T, N, K, H, S, kind of the cache, its page or None, dtype of queries; the options that follow are added
DECODING: dict[str, tuple] = {
    "decode": (4, 1, 32, 8, 128, 4096, "float", None, "bfloat16", {}),
    "decode int8": (4, 1, 32, 8, 128, 4096, "int8", None, "bfloat16", {}),
    "decode float8": (4, 1, 32, 8, 128, 4096, "float8_e4m3fn", None, "bfloat16", {}),
    "decode int4, float32, tails": (2, 3, 6, 2, 80, 1000, "int4", None, "float32", {"slopes": (6,), "sinks": (6,)}),
    "decode pages": (4, 2, 32, 8, 128, 4096, "float", 128, "bfloat16", {"window": 300, "soft_cap": 20.0}),
    "decode pages of int4": (4, 2, 32, 8, 128, 4096, "int4", 128, "bfloat16", {"sinks": (32,)}),
    "prompt": (2, 700, 8, 2, 64, 1000, "int8", None, "bfloat16", {}),
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
    f"{name}, {rows} rows": (name, rows, dtype)
    for name in LAYOUTS
    for rows, dtype in ((1, "bfloat16"), (300, "float32"))
}


def decoding(b, t, n, k, h, s, kind, page, dtype, options):
    """Types of the operands of a case of decode attention, and its static options."""
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
    return shapes, functools.partial(decode_attention, **static, implementation="mosaic_tpu")


def product(name, rows, dtype, k=2304, n=1536):
    """Types of the operands of a product with a packed weight."""
    layout = LAYOUTS[name]
    shapes = {
        p.name: ((k // layout.block, layout.rows(p), n), "int8" if p.bits == 8 else "uint8") for p in layout.planes
    }
    for field in layout.fields[len(layout.planes) :]:
        count = {"six_bits": 12, "int8": 16}.get(layout.kind) if field == "scales" else None
        runs = k // (layout.run or layout.block)
        kind = {"exponent": "uint8", "scales": "uint8" if layout.kind == "six_bits" else "int8"}.get(field, "float16")
        shapes[field] = ((runs, n) if count is None else (runs, count, n), kind)

    def run(x, **fields):
        return packed_matmul(x, fields, layout=layout, implementation="mosaic_tpu")

    return {"x": ((rows, k), dtype), **shapes}, run


def main(topology: str, names: list[str]) -> None:
    """Compiles the cases for one topology, on its first device."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = jax.sharding.Mesh(devices[:1], ("d",))
    where = NamedSharding(mesh, PartitionSpec())
    for name in names or (*DECODING, *PRODUCTS):
        if name in CASES:
            continue
        shapes, run = decoding(*DECODING[name]) if name in DECODING else product(*PRODUCTS[name])
        arrays = {x: jax.ShapeDtypeStruct(*v, sharding=where) for x, v in shapes.items()}
        report(topology, name, "forward", lambda arrays, run=run: run(**arrays), arrays, mesh)
    for name in names or CASES:
        if name not in CASES:
            continue
        b, t, n, k, h, s, dtype, options = CASES[name]
        shapes = {"query": ((b, t, n, h), dtype), "key": ((b, s, k, h), dtype), "value": ((b, s, k, h), dtype)}
        shapes |= {x: (v, _DTYPES.get(x, jnp.int32)) for x, v in options.items() if isinstance(v, tuple)}
        arrays = {x: jax.ShapeDtypeStruct(*v, sharding=where) for x, v in shapes.items()}
        static = {x: v for x, v in options.items() if not isinstance(v, tuple)}
        smooth = [x for x in ("query", "key", "value", "bias", "slopes", "sinks") if x in arrays]

        def forward(arrays, static=static):
            given = dict(arrays)
            if "dropout_key" in given:
                given["dropout_key"] = jax.random.wrap_key_data(given["dropout_key"])
            q, k, v = (given.pop(x) for x in ("query", "key", "value"))
            return attention(q, k, v, **given, **static, return_lse=True, implementation="mosaic_tpu")

        def both(arrays, smooth=smooth, forward=forward):
            def loss(part):
                out, lse = forward({**arrays, **part})
                return jnp.sum(out.astype(jnp.float32)) + jnp.sum(lse)

            return jax.grad(loss)({x: arrays[x] for x in smooth})

        for direction, function in (("forward", forward), ("backward", both)):
            report(topology, name, direction, function, arrays, mesh)


def report(topology, name, direction, function, arrays, mesh) -> None:
    """Compiles a function and prints a line of the outcome."""
    found = {"topology": topology, "case": name, "direction": direction, "ok": True}
    try:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            compiled = jax.jit(function).trace(arrays).lower(lowering_platforms=("tpu",)).compile()
        found["temporary"] = compiled.memory_analysis().temp_size_in_bytes
        found["kernels"] = compiled.as_text().count('custom_call_target="tpu_custom_call"')
    except Exception as error:
        found.update(ok=False, error=str(error)[:800])
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
