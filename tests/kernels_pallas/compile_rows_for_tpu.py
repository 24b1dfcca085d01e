"""Compiles grouped products, softmax, norms with codes, the selective scan and rotary positions for an absent TPU.

    python tests/kernels_pallas/compile_rows_for_tpu.py v5e:2x2

As `compile_for_tpu.py` does. The first operand of rotary positions is donated: they are turned where they lie.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from typing import Any

os.environ.update(
    JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", TPU_WORKER_HOSTNAMES="localhost", TPU_ACCELERATOR_TYPE="v5litepod-4"
)

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from kernels_pallas.grouped_matmul import grouped_matmul
from kernels_pallas.norm import norm_quantized
from kernels_pallas.rope import rope
from kernels_pallas.selective_scan import selective_scan
from kernels_pallas.softmax import softmax


def total(y: jax.Array) -> jax.Array:
    """A number that depends on all of y, and not linearly."""
    return jnp.sum(jnp.sin(y.astype(jnp.float32)))


PRODUCT = jax.grad(lambda x, w, sizes: total(grouped_matmul(x, w, sizes)), (0, 1))
SCAN = jax.grad(lambda *arrays: sum(map(total, selective_scan(*arrays))), (0, 1, 2, 3, 4))
PAIRS = functools.partial(rope, interleaved=True)


def UNTURNED(dy: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """The gradient of x."""
    return jax.vjp(lambda x: rope(x, cos, sin), jnp.zeros_like(dy))[1](dy)[0]


def scanned(b: int, t: int, i: int, s: int, dtype: str) -> tuple[Any, ...]:
    """Types of x, dt, decay, b and c."""
    tokens, numbers = ((b, t, i), dtype), ((b, t, s), dtype)
    return tokens, tokens, ((i, s), "float32"), numbers, numbers


ROWS, GAIN = ((3000, 4096), "bfloat16"), ((4096,), "bfloat16")
# A function, the types of its operands, and the kernels that its program has.
CASES: dict[str, tuple[Any, tuple[Any, ...], int]] = {
    "experts": (PRODUCT, (((4096, 4096), "bfloat16"), ((8, 4096, 14336), "bfloat16"), ((8,), "int32")), 3),
    "small experts": (PRODUCT, (((8192, 2048), "bfloat16"), ((128, 2048, 768), "bfloat16"), ((128,), "int32")), 3),
    "one token": (PRODUCT, (((2, 4096), "bfloat16"), ((8, 4096, 14336), "bfloat16"), ((8,), "int32")), 3),
    "float32, tails": (PRODUCT, (((1000, 200), "float32"), ((5, 200, 300), "float32"), ((5,), "int32")), 3),
    "softmax": (jax.grad(lambda x, mask: total(softmax(x, mask))), (ROWS, ((3000, 4096), "bool")), 2),
    "norm, int8": (lambda x, w: norm_quantized(x, w, residual=x), (ROWS, GAIN), 1),
    "scan": (SCAN, scanned(2, 700, 1536, 16, "bfloat16"), 2),
    "scan, tails": (SCAN, scanned(1, 1000, 1000, 20, "float32"), 2),
    "scan, large states": (SCAN, scanned(1, 2048, 5120, 128, "bfloat16"), 2),
    "rope": (rope, (((2, 4096, 32, 128), "bfloat16"), *(((1, 4096, 64), "float32"),) * 2), 1),
    "rope, backward": (UNTURNED, (((2, 4096, 32, 128), "bfloat16"), *(((1, 4096, 64), "float32"),) * 2), 1),
    "rope of a part, interleaved": (PAIRS, (((3, 700, 3, 256), "float32"), *(((3, 700, 48), "float32"),) * 2), 1),
    "norm, float8": (lambda x, w: norm_quantized(x, w, dtype=jnp.float8_e4m3fn), (ROWS, GAIN), 1),
}


def main(topology: str) -> None:
    """Compiles the cases for one topology, on its first device."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = jax.sharding.Mesh(devices[:1], ("d",))
    where = NamedSharding(mesh, PartitionSpec())
    for name, (function, types, kernels) in CASES.items():
        arrays = [jax.ShapeDtypeStruct(*t, sharding=where) for t in types]
        found = {"topology": topology, "case": name, "ok": True}
        try:
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                donated = 0 if name.startswith("rope") else ()
                traced = jax.jit(function, donate_argnums=donated).trace(*arrays)
                compiled = traced.lower(lowering_platforms=("tpu",)).compile()
            found["temporary"] = compiled.memory_analysis().temp_size_in_bytes
            found["kernels"] = compiled.as_text().count('custom_call_target="tpu_custom_call"')
            found["ok"] = found["kernels"] == kernels
        except Exception as error:
            found.update(ok=False, error=str(error)[:800])
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
