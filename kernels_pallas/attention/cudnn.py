"""Attention by cuDNN, as jax offers it: taken only where it is asked for by name. Oracle: `oracle.py`.

jax asks cuDNN for its version while it lowers, so a host without an NVIDIA GPU cannot lower this; its refusal says so.
The backward pass runs cuDNN's forward pass again, for jax keeps what cuDNN wants of it to itself; the log-sum-exp has
no gradient. Not yet run: `benchmarks/gpu.py` checks it against the oracle where there is a GPU.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas import _compat
from kernels_pallas.dispatch import Target, no_sizes

OLDEST, HOPPER = 8.0, 9.0  # compute capabilities
WIDEST = {False: 128, True: 256}  # head size, before and from Hopper on


def refusal(target: Target, call: Any) -> str:
    """Returns why cuDNN cannot compute a call there; "" where it can."""
    if target.platform != "cuda":
        return f"it runs on cuda, not on {target.platform}."
    if target.capability is not None and target.capability < OLDEST:
        return f"it needs compute capability {OLDEST} and the chip has {target.capability}."
    ops, spec = call.ops, call.spec
    sizes = (*ops.query.shape, *ops.key.shape)
    if reason := no_sizes(sizes):
        return reason
    if ops.query.dtype.name not in ("bfloat16", "float16"):
        return f"it takes bfloat16 and float16, not {ops.query.dtype}."
    size, widest = ops.query.shape[3], WIDEST[(target.capability or 0.0) >= HOPPER]
    if size % 8 or size > widest or ops.value.shape[3] != size:
        return f"head size {size} (values: {ops.value.shape[3]}) is no multiple of 8 up to {widest}, alike for values."
    if spec.right not in (None, 0) or (spec.left is not None and spec.right is None):
        return "its windows are causal: they see back, not ahead."
    if spec.right == 0 and ops.query.shape[1] != ops.key.shape[1]:
        return "its causal mask wants as many keys as queries."
    if spec.soft_cap is not None or spec.dropout:
        return f"it has no {'dropout' if spec.dropout else 'soft cap'} here."
    given = [n for n, x in ops._asdict().items() if x is not None and n not in ("query", "key", "value")]
    if given:
        return f"it has no {given[0].replace('_', ' ')} here."
    if jax.default_backend() != "gpu":
        return "it cannot be lowered on a host without an NVIDIA GPU: jax asks cuDNN for its version."
    return ""


def reserve(target: Target, call: Any) -> str:
    """Returns why it is taken only where it is asked for by name."""
    return "name it to take it."


def forward(target: Target, call: Any, interpret: bool) -> list[jax.Array]:
    """Returns the output `[B, T, N, H]` and the log-sum-exp `[B, N, T]`."""
    out, lse = _compat.cudnn_attention(*call.ops[:3], **_options(call.spec), return_residual=True)
    return [out, lse.astype(jnp.float32)]


def backward(target: Target, call: Any, interpret: bool) -> list[jax.Array]:
    """Returns the gradients of query, key and value, that of the log-sum-exp left out."""
    _, pull = jax.vjp(lambda *qkv: _compat.cudnn_attention(*qkv, **_options(call.spec)), *call.ops[:3])
    return list(pull(call.cotangent))


def _options(spec: Any) -> dict[str, Any]:
    return {"scale": spec.scale, "causal": spec.right == 0, "left": spec.left}
