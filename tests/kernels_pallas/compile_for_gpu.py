"""Compiles the kernels for a GPU that is not here, and writes what the assembler says as JSON lines.

    python tests/kernels_pallas/compile_for_gpu.py A100|A10|L4|H100|B200 [BEGINNING OF A CASE'S NAME ...]
    python tests/kernels_pallas/compile_for_gpu.py --table FILE ...      # the lines of files as a table in Markdown

A line of an outcome has the chip, the case, `ok`, and either the kernels with their registers, spilled bytes and shared
memory, or the error's first lines. A compiler that fails hard ends the process: one process a chip.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.update(JAX_PLATFORMS="cpu", MOSAIC_GPU_DUMP_PTXAS="1")

import jax
import jax.numpy as jnp
from chip_cases import more_cases, row_cases

from kernels_pallas import offline
from kernels_pallas.attention import BlockMask, attention, mosaic_gpu
from kernels_pallas.dispatch import Target
from kernels_pallas.glu import bias_activation, glu
from kernels_pallas.norm import layer_norm, rms_norm

# how names of our kernels begin
OURS = (
    "attention_", "norm_", "activation_", "decode_", "packed_", "softmax_", "grouped_", "selective_scan_", "rope",
)  # fmt: skip
_INT, _FLOAT = jnp.int32, jnp.float32
EVERYTHING: dict[str, Any] = {
    "window": 130, "soft_cap": 30.0, "query_positions": ((2, 700), _INT), "key_positions": ((2, 700), _INT),
    "query_segments": ((2, 700), _INT), "key_segments": ((2, 700), _INT), "sinks": ((4,), _FLOAT),
    "slopes": ((4,), _FLOAT), "bias": ((1, 4, 700, 700), _FLOAT),
}  # fmt: skip
HEADS = {"causal": (1, 2048, 4, 2), "window, soft cap": (1, 700, 4, 2), "tails": (2, 700, 4, 4)}
OPTIONS = {"causal": {}, "window, soft cap": {"window": 130, "soft_cap": 30.0}, "tails": {"causal": False}}


def arrays_of(b: int, t: int, n: int, k: int, h: int, dtype: str, options: dict[str, Any]) -> dict[str, Any]:
    """Types of the operands, and of the options that are arrays."""
    shapes = {"query": ((b, t, n, h), dtype), "key": ((b, t, k, h), dtype), "value": ((b, t, k, h), dtype)}
    shapes |= {name: x for name, x in options.items() if isinstance(x, tuple)}
    return {name: jax.ShapeDtypeStruct(*x) for name, x in shapes.items()}


def attend(implementation: str, options: dict[str, Any], *, gradient: bool) -> Callable[..., Any]:
    """Attention of arrays by name, or the gradient of everything that has one."""
    static = {name: x for name, x in options.items() if not isinstance(x, tuple)}

    def forward(arrays: dict[str, Any]) -> Any:
        given = dict(arrays)
        q, k, v = (given.pop(name) for name in ("query", "key", "value"))
        return attention(q, k, v, **given, **static, return_lse=True, implementation=implementation)

    def backward(arrays: dict[str, Any]) -> Any:
        def loss(part: dict[str, Any]) -> jax.Array:
            out, lse = forward({**arrays, **part})
            return jnp.sum(out.astype(jnp.float32)) + jnp.sum(lse)

        smooth = {n: x for n, x in arrays.items() if n != "block_mask" and jnp.issubdtype(x.dtype, jnp.floating)}
        return jax.grad(loss)(smooth)

    return backward if gradient else forward


def cases(chip: str) -> dict[str, tuple[Callable[[Any], Any], Any]]:
    """Every case of a chip: a function, and the types of its operands as one tree."""
    found: dict[str, tuple[Callable[[Any], Any], Any]] = {}
    for dtype in ("bfloat16", "float32"):
        for h in (32, 64, 128, 256):
            for kind, heads in HEADS.items():
                arrays = arrays_of(*heads, h, dtype, OPTIONS[kind])
                found[f"triton {dtype} {h} {kind}"] = attend("triton", OPTIONS[kind], gradient=True), arrays
        for h in (64, 128):
            arrays = arrays_of(2, 700, 4, 2, h, dtype, EVERYTHING)
            found[f"triton {dtype} {h} everything"] = attend("triton", EVERYTHING, gradient=True), arrays
            for by in ((1, 1), (2, 4)):
                mask = BlockMask(128, 128, *(jax.ShapeDtypeStruct((*by, 6, *m), _INT) for m in ((), (4,))))
                arrays = arrays_of(2, 700, 4, 2, h, dtype, {}) | {"block_mask": mask}
                found[f"triton {dtype} {h} blocks{' by head' if by[1] > 1 else ''}"] = (
                    attend("triton", {}, gradient=True), arrays,
                )  # fmt: skip
        for d in (1000, 4096, 8192):
            x, w = jax.ShapeDtypeStruct((2048, d), dtype), jax.ShapeDtypeStruct((d,), dtype)
            for op, arrays in (
                (rms_norm, (x, w, x)),
                (layer_norm, (x, w, w)),
                (glu, (x, x)),
                (bias_activation, (x, w)),
            ):
                found[f"triton {dtype} {d} {op.__name__}"] = over_rows(op), arrays
    found |= mosaic_cases(chip)
    for dtype in ("float8_e4m3fn", "float8_e5m2"):
        for h in (64, 128, 256):
            for kind, heads in HEADS.items():
                options = OPTIONS[kind] | {"key_scale": ((1, heads[3]), _FLOAT)}
                found[f"triton {dtype} {h} {kind}"] = (
                    attend("triton", options, gradient=False), arrays_of(*heads, h, dtype, options),
                )  # fmt: skip
    for name, (function, shapes) in more_cases("triton").items():
        arrays = {x: jax.ShapeDtypeStruct(*v) for x, v in shapes.items()}
        dtype = arrays["query" if "query" in arrays else "x"].dtype
        found[f"triton {dtype} {name}"] = function, arrays
    for name, (function, types, _) in row_cases("triton").items():
        if name == "norm, float8" and offline.CHIPS[chip].capability < (8, 9):
            continue  # refused there
        arrays = tuple(jax.ShapeDtypeStruct(*t) for t in types)
        found[f"triton {arrays[0].dtype} {name}"] = over_operands(function), arrays
    return found


def mosaic_cases(chip: str) -> dict[str, tuple[Callable[[Any], Any], Any]]:
    """Mosaic-GPU's attention, where this jax has it for the chip: each case that it does not refuse."""
    major, minor = offline.CHIPS[chip].capability
    target, found = Target("cuda", f"{major}.{minor}"), {}
    if mosaic_gpu.too_old(target):
        return found
    for dtype, h, kinds in (("bfloat16", 64, HEADS), ("bfloat16", 128, HEADS), ("float16", 128, ("causal",)),
                            ("bfloat16", 192, HEADS), ("bfloat16", 256, HEADS)):  # fmt: skip
        if h not in mosaic_gpu.SIZES[mosaic_gpu.engine_of(target)]:
            continue
        for kind in kinds:
            wide = h > mosaic_gpu.WIDEST_BACKWARD or (
                major == 9 and h > mosaic_gpu.NARROW and kind.startswith("window")
            )
            for gradient in (False,) if wide else (False, True):
                arrays = arrays_of(*HEADS[kind], h, dtype, OPTIONS[kind])
                name = f"mosaic_gpu {dtype} {h} {kind}, {'gradient' if gradient else 'forward'}"
                found[name] = attend("mosaic_gpu", OPTIONS[kind], gradient=gradient), arrays
    return found


def over_operands(function: Callable[..., Any]) -> Callable[[Any], Any]:
    """A function of operands as one of their tuple."""
    return lambda arrays: function(*arrays)


def over_rows(op: Callable[..., Any]) -> Callable[[Any], Any]:
    """An op by its kernels, and the gradient of its operands."""

    def both(arrays: Any) -> Any:
        def loss(arrays: Any) -> Any:
            results = op(*arrays, implementation="triton")
            return sum(jnp.sum(x.astype(jnp.float32)) for x in jax.tree.leaves(results)), results

        return jax.grad(loss, has_aux=True)(arrays)

    return both


def main(chip: str, names: list[str]) -> None:
    """Compiles the cases for one chip; on an L4, which takes an A10's tiles of Triton, Mosaic's alone."""
    begins = tuple(names) or (("mosaic_gpu",) if chip == "L4" else ("",))
    for name, (function, arrays) in cases(chip).items():
        if not name.startswith(begins):
            continue
        if name.startswith("triton float8") and offline.CHIPS[chip].capability < (8, 9):
            continue
        found: dict[str, Any] = {"chip": chip, "case": name, "ok": True}
        try:
            jax.clear_caches()
            _, reports = offline.compile_for(offline.CHIPS[chip], function, arrays)
            kernels = [r for r in reports if r.kernel.startswith(OURS)]
            found["kernels"] = [dataclasses.asdict(r) for r in kernels]
        except Exception as error:
            found.update(ok=False, error=str(error)[:800])
        print(json.dumps(found), flush=True)


def table(paths: list[str]) -> str:
    """The outcomes of files: for each kernel and chip registers, shared KiB, and what spills."""
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for row in (json.loads(line) for path in paths for line in Path(path).read_text().splitlines()):
        for k in row.get("kernels", ()):
            name = k["kernel"].removesuffix("_mosaic_gpu_kernel")
            name = name if name == "rope" else name.partition("_")[2]
            shared = f", {k['shared'] / 1024:.3g}" if k["shared"] else ""
            spilled = f", spills {k['spilled']} bytes" if k["spilled"] else ""
            cells.setdefault((row["case"], name), {})[row["chip"]] = f"{k['registers']}{shared}{spilled}"
    lines = [f"| case | kernel | {' | '.join(offline.CHIPS)} |", "|---" * (2 + len(offline.CHIPS)) + "|"]
    lines += [
        f"| {case} | {name} | {' | '.join(of.get(c, '') for c in offline.CHIPS)} |"
        for (case, name), of in cells.items()
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    if sys.argv[1] == "--table":
        print(table(sys.argv[2:]))
    else:
        main(sys.argv[1], sys.argv[2:])
