"""Compiles the kernels for attention, decoding and packed products for a TPU that is not here.

    python tests/kernels_pallas/compile_for_tpu.py v5e:2x2 [CASE ...]

libtpu compiles without a device. It aborts the process where it fails hard, so each topology is one process. A line
of JSON for an outcome has the case, the direction, `ok`, and either the bytes of temporary memory and the number of
kernels in the program, or the error's first lines.
"""

from __future__ import annotations

import json
import os
import sys

os.environ.update(
    JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", TPU_WORKER_HOSTNAMES="localhost", TPU_ACCELERATOR_TYPE="v5litepod-4"
)

import jax
import jax.numpy as jnp
from chip_cases import more_cases
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from kernels_pallas.attention import BlockMask, attention

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
    "blocks": (1, 4096, 4, 2, 128, 4096, "bfloat16", {"blocks": (1, 1, 128, 128, 8)}),
    "blocks by row and head, bias": (
        2, 700, 4, 2, 128, 700, "bfloat16", {"blocks": (2, 4, 128, 256, 3), "bias": (1, 4, 700, 700), "window": 300},
    ),
    "float8": (1, 2048, 4, 2, 128, 2048, "float8_e4m3fn", {"key_scale": (1, 2)}),
    "float8, tails, blocks": (2, 700, 4, 2, 64, 700, "float8_e5m2", {"blocks": (1, 4, 128, 128, 3), "sinks": (4,)}),
    "dropout": (1, 600, 4, 2, 128, 600, "bfloat16", {"dropout": 0.1, "dropout_key": (2,)}),
}  # fmt: skip
_DTYPES = {
    "bias": jnp.float32,
    "sinks": jnp.float32,
    "slopes": jnp.float32,
    "mask": bool,
    "key_scale": jnp.float32,
    "dropout_key": jnp.uint32,
}


def main(topology: str, names: list[str]) -> None:
    """Compiles the cases for one topology, on its first device."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = jax.sharding.Mesh(devices[:1], ("d",))
    where = NamedSharding(mesh, PartitionSpec())
    for name, (run, shapes) in more_cases("mosaic_tpu").items():
        if names and name not in names:
            continue
        arrays = {x: jax.ShapeDtypeStruct(*v, sharding=where) for x, v in shapes.items()}
        report(topology, name, "forward", run, arrays, mesh)
    for name in names or CASES:
        if name not in CASES:
            continue
        b, t, n, k, h, s, dtype, options = CASES[name]
        shapes = {"query": ((b, t, n, h), dtype), "key": ((b, s, k, h), dtype), "value": ((b, s, k, h), dtype)}
        shapes |= {
            x: (v, _DTYPES.get(x, jnp.int32)) for x, v in options.items() if isinstance(v, tuple) and x != "blocks"
        }
        arrays = {x: jax.ShapeDtypeStruct(*v, sharding=where) for x, v in shapes.items()}
        if "blocks" in options:
            b0, n0, block_q, block_k, most = options["blocks"]
            rows = jax.ShapeDtypeStruct((b0, n0, -(-t // block_q)), jnp.int32, sharding=where)
            listed = jax.ShapeDtypeStruct((*rows.shape, most), jnp.int32, sharding=where)
            arrays["block_mask"] = BlockMask(block_q, block_k, rows, listed)
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

        directions = {"forward": forward, "backward": both}
        if dtype.startswith("float8"):
            directions.pop("backward")
        for direction, function in directions.items():
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
