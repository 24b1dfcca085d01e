"""Attention for NVIDIA GPUs by Pallas-Mosaic-GPU, forward and backward. Oracle: `oracle.py`.

One algorithm (`mosaic_kernels.py`) over the tile engine of the chip: Ampere's and Ada's cp.async and mma.sync
(`mosaic_ampere.py`), Hopper's TMA and wgmma (`mosaic_hopper.py`), Blackwell's tcgen05 (`mosaic_blackwell.py`). Here is
what each can compute, and what a pass is made of.

Masks: causal and windows, of positions that count up. Operands bfloat16 or float16. The blocks of the engines compile
without spilling for sm_80, sm_86, sm_89, sm_90a and sm_100a (`make aot`); nothing here has been run on a GPU.
"""

from __future__ import annotations

import dataclasses
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas import _compat
from kernels_pallas.attention import mosaic_ampere, mosaic_blackwell, mosaic_hopper
from kernels_pallas.attention.facts import tuned
from kernels_pallas.attention.mosaic_ampere import Ampere
from kernels_pallas.attention.mosaic_blackwell import Blackwell
from kernels_pallas.attention.mosaic_hopper import Hopper
from kernels_pallas.attention.mosaic_kernels import LOG2E, Blocks, Made, dkv_kernel, dq_kernel, forward_kernel
from kernels_pallas.attention.spec import NO_KEY
from kernels_pallas.dispatch import ANY_CHIP, Target, no_sizes

SIZES = {"ampere": (64, 128), "hopper": (64, 128, 192, 256), "blackwell": (64, 128)}  # head sizes
WIDEST_BACKWARD = 128  # dK and dV of a wider head do not fit the registers beside the scores
NARROW = 64  # in Hopper's backward pass, with a window back or a soft cap: beyond, dK and dV spill
VERIFIED = ((0, 11), (0, 12))  # jax releases whose interpreter agreed with the oracle (tests/kernels_pallas)
_ENGINES: dict[str, tuple[ModuleType, Any]] = {
    "ampere": (mosaic_ampere, Ampere),
    "hopper": (mosaic_hopper, Hopper),
    "blackwell": (mosaic_blackwell, Blackwell),
}

_BY_MAJOR = {8: "ampere", 9: "hopper", 10: "blackwell"}  # compute capability


def engine_of(target: Target) -> str:
    """Returns the name of a chip's engine, "hopper" where any chip is asked for; "" where it has none."""
    if target.architecture == ANY_CHIP:
        return "hopper"
    return _BY_MAJOR.get(int(target.capability or 0), "")


def refusal(target: Target, call: Any) -> str:
    """Returns why these kernels cannot compute a call there; "" where they can."""
    if target.platform != "cuda":
        return f"it runs on cuda, not on {target.platform}."
    if target.architecture is None:
        return "the chip is not known; lower under kernels_pallas.abstract_device(kind, platform)."
    engine = engine_of(target)
    if not engine:
        return f"it needs compute capability 8.0 to 8.9, 9.0 or 10.0 to 10.3 and the chip has {target.architecture}."
    if reason := too_old(target) or _other_host(target):
        return reason
    ops, spec = call.ops, call.spec
    sizes = (*ops.query.shape, *ops.key.shape, ops.value.shape[3])
    if reason := no_sizes(sizes):
        return reason
    if ops.query.dtype.name not in ("bfloat16", "float16"):
        return f"it takes bfloat16 and float16, not {ops.query.dtype}."
    for size in (ops.query.shape[3], ops.value.shape[3]):
        if size not in SIZES[engine]:
            return f"head size {size} is none of {', '.join(map(str, SIZES[engine]))}."
        if call.cotangent is not None and size > WIDEST_BACKWARD:
            return f"head size {size} is above {WIDEST_BACKWARD} in the backward pass."
        if engine == "blackwell" and _more(call) and size != ops.query.shape[3]:
            return f"value size {size} is not head size {ops.query.shape[3]}, with a window or a soft cap."
        narrow = engine == "hopper" and call.cotangent is not None and size > NARROW
        if narrow and (spec.left is not None or spec.soft_cap is not None):
            return f"head size {size} is above {NARROW} in the backward pass with a window or a soft cap."
    if spec.scale <= 0:
        return f"scale is {spec.scale}, and it takes positive ones."
    if spec.dropout:
        return "it has no dropout."
    given = [n for n, x in ops._asdict().items() if x is not None and n not in ("query", "key", "value", "sinks")]
    return f"it has no {given[0].replace('_', ' ')}." if given else ""


def too_old(target: Target) -> str:
    """Returns why this jax has no engine for a chip; "" where it has."""
    if engine_of(target) == "hopper" or _compat.JAX_VERSION >= (0, 11):
        return ""
    return f"but for Hopper it needs jax 0.11, and this is {jax.__version__}."


def _other_host(target: Target) -> str:
    """Returns why this host does not assemble for a chip; "" where it does."""
    if engine_of(target) == "hopper":  # what jax takes where the host has no GPU
        return ""
    able = _compat.mosaic_gpu_assembles_for()
    if engine_of(target) == _BY_MAJOR.get(able[0]):
        return ""
    return (
        f"jax assembles it for the GPU of this host (compute capability {able[0]}.{able[1]}; 9.0 where there is none), "
        f"and the chip has {target.architecture}; compile with kernels_pallas.offline.compile_for."
    )


def reserve(target: Target, call: Any) -> str:
    """Returns why these kernels are taken only where they are asked for by name; "" where that is not needed."""
    if engine_of(target) == "ampere":
        return "its products were assembled and not run: name it to take it."
    if engine_of(target) == "blackwell":
        return "it was run in the interpreter alone: name it to take it."
    if any(_compat.JAX_VERSION[: len(v)] == v for v in VERIFIED):
        return ""
    known = ", ".join(".".join(map(str, v)) for v in VERIFIED)
    return f"verified on jax {known}, and this is {jax.__version__}: name it to take it."


def blocks_of(call: Any, kernel: str, engine: str = "hopper") -> Blocks:
    """Returns the blocks of `kernel`: "forward", "dq" or "dkv"."""
    return _ENGINES[engine][0].blocks_of(max(call.ops.query.shape[3], call.ops.value.shape[3]), kernel, _more(call))


def _more(call: Any) -> bool:
    """Whether a call has what takes more registers: a window or a soft cap."""
    return call.spec.left is not None or call.spec.soft_cap is not None


def tile_of(target: Target, call: Any, kernel: str) -> int:
    """Returns the queries (in "dkv" the keys) that a program of `kernel` holds."""
    engine = engine_of(target) or "hopper"
    return _ENGINES[engine][0].workers(kernel, _more(call)) * blocks_of(call, kernel, engine).rows


def _chosen(target: Target, call: Any, kernel: str, engine: str) -> Blocks:
    """The engine's blocks of `kernel`, but for the length and the stages that were found for its direction."""
    plain = blocks_of(call, kernel, engine)
    found = tuned(target, call, "forward" if kernel == "forward" else "backward", "mosaic_gpu")
    return dataclasses.replace(plain, length=found["length"], stages=found["stages"]) if "length" in found else plain


def forward(target: Target, call: Any, interpret: bool, blocks: Blocks | None = None) -> list[jax.Array]:
    """Returns the output `[B, T, N, Hv]` and the log-sum-exp `[B, N, T]`."""
    engine = engine_of(target)
    module, kind = _ENGINES[engine]
    blocks = blocks or _chosen(target, call, "forward", engine)
    made = Made(call, blocks, module.workers("forward", _more(call)), interpret)
    ops = call.ops
    rows, numbers = module.extents(made)
    shapes = [
        module.result(made, jax.ShapeDtypeStruct((*ops.query.shape[:3], made.value_size), ops.query.dtype), rows),
        jax.ShapeDtypeStruct((made.batch, made.heads, numbers), jnp.float32),
    ]
    inputs = _operands(module, made, call, ("query", "key", "value"))
    inputs |= {} if ops.sinks is None else {"sinks": ops.sinks.astype(jnp.float32)}
    scratch, threads = module.scratch(made, "forward"), module.threads(made)
    out, lse = made.run(kind, forward_kernel, "attention_forward", inputs, shapes, scratch, **threads)
    return [out[:, : made.length].reshape(*ops.query.shape[:3], -1), lse[:, :, : made.length]]


def backward(target: Target, call: Any, interpret: bool, blocks: Blocks | None = None) -> list[jax.Array]:
    """Returns the gradients of query, key and value."""
    engine = engine_of(target)
    module, kind = _ENGINES[engine]
    ops = call.ops
    lse = jnp.where(jnp.isneginf(call.lse), jnp.float32(NO_KEY), call.lse * jnp.float32(LOG2E))

    def run(kernel: Any, name: str, results: tuple[jax.Array, ...]) -> list[jax.Array]:
        chosen = blocks or _chosen(target, call, name, engine)
        made = Made(call, chosen, module.workers(name, _more(call)), interpret, of_queries=name == "dq")
        inputs = _operands(module, made, call, ("query", "key", "value", "cotangent"))
        inputs |= {"lse": module.numbers(made, lse, NO_KEY), "delta": module.numbers(made, call.delta, 0.0)}
        rows, _ = module.extents(made)
        shapes = [module.result(made, x, rows) for x in results]
        scratch, threads = module.scratch(made, name), module.threads(made)
        found = made.run(kind, kernel, f"attention_{name}", inputs, shapes, scratch, **threads)
        return [x[:, : made.extent].reshape(like.shape) for x, like in zip(found, results, strict=True)]

    return [*run(dq_kernel, "dq", (ops.query,)), *run(dkv_kernel, "dkv", (ops.key, ops.value))]


def _operands(module: ModuleType, made: Made, call: Any, names: tuple[str, ...]) -> dict[str, jax.Array]:
    arrays = {**call.ops._asdict(), "cotangent": call.cotangent}
    queries = ("query", "cotangent")
    return {name: module.operand(made, arrays[name], queries=name in queries) for name in names}
