"""Products with packed weights: `y = x @ decode(w)` without the decoded matrix.

Implementations, all accumulating in float32:

- `native`: the CPU handler in `trustcore/ops/cpu/packed_matmul.cc`; several weights in one call. Decodes in registers
  for few rows, into a strip in the L2 cache for many. Needs a C++ compiler on the machine once.
- `stream`: plain XLA for few rows. A scan over blocks unpacks the codes of one block to bytes and adds
  `x[k] * code[k, :]` row by row, scaling the sum once a sub-block. The temporaries are one block's, `[block, N]` bytes.
- `tiles`: plain XLA for many rows and for transposed weights. A loop decodes `TILE` columns at a time into a dot.
- `triton`, `mosaic_tpu`: the kernels of `kernels_pallas.packed` for GPUs and TPUs, which unpack codes in registers; x
  stays of 16 bits where it is.
- `platform`: one program for every platform, which is known when it is lowered: `triton` on cuda and rocm, `mosaic_tpu`
  on tpu where they can compute the product (`trustcore.kernels.explain`), else `tiles`. Chosen where the default
  backend is not the CPU.
- `dequantize`: decodes everything, then one dot at highest precision. The oracle; never chosen.

Which of the first three is taken, how far `stream` unrolls and how wide a tile is, may be tuned (`tunable.py`).

Gradients: with respect to x, `g @ decode(w).T` by tiles; with respect to the float fields (scales, minima), the exact
derivative through `decode`, by tiles; codes have none, nor have formats whose scales are codes as well.

Where the rows of a weight are stored in another order (`order`), x or the result is put in order, never the weight.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

import kernels_pallas
from kernels_pallas import Target, tuning
from kernels_pallas._compat import default_platform, device_kind
from kernels_pallas.packed import Layout, packed_matmul
from trustcore import _jax
from trustcore.errors import ImplementationError
from trustcore.ops import cpu
from trustcore.quant.array import QuantizedArray
from trustcore.quant.formats import BlockFormat
from trustcore.quant.formats.format import TILE, add_part, logical_rows, stored_rows
from trustcore.quant.formats.iq import NAMED_GRIDS
from trustcore.quant.layouts import from_kernel, kernel_layout

# They take x as it is.
_KERNELS = ("platform", "triton", "mosaic_tpu")
Products = Callable[[jax.Array, tuple[QuantizedArray, ...]], tuple[jax.Array, ...]]


def packed_products(
    x: jax.Array, weights: list[QuantizedArray], *, implementation: str | None = None
) -> tuple[jax.Array, ...]:
    """Returns `x @ w` for each packed weight.

    Args:
        x: float `[..., K]`.
        weights: logical shapes `[K, N_i]`.
        implementation: None, "native", "stream", "tiles", "platform", "triton", "mosaic_tpu" or "dequantize".

    Returns:
        Arrays `[..., N_i]` in the dtype of x.

    Raises:
        ImplementationError: shapes disagree, or the named implementation cannot compute this product.
    """
    for w in weights:
        if w.ndim != 2 or w.shape[0] != x.shape[-1]:
            raise ImplementationError(f"linear: x {x.dtype}{list(x.shape)} does not fit {w!r}: K must agree.")
    if x.size == 0 or any(w.size == 0 for w in weights):  # nothing to sum, or nowhere to put it
        return tuple(jnp.zeros((*x.shape[:-1], w.shape[1]), x.dtype) for w in weights)
    rows = x.reshape(-1, x.shape[-1])
    if jax.default_backend() == "cpu" and implementation not in _KERNELS:
        rows = rows.astype(jnp.float32)
    if tuning.CHOOSER.value is not None and not any(isinstance(a, Tracer) for a in jax.tree.leaves((x, weights))):
        for w in weights:
            tuning.before("packed_product", _here(), functools.partial(facts, rows.shape[0], w))
    results: tuple[jax.Array, ...] = _products(rows, tuple(weights), implementation)
    return tuple(y.reshape(*x.shape[:-1], y.shape[-1]).astype(x.dtype) for y in results)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _products(x: jax.Array, weights: tuple[QuantizedArray, ...], implementation: str | None) -> tuple[jax.Array, ...]:
    results: list[Any] = [None] * len(weights)
    groups: dict[str, list[int]] = {}
    for i, w in enumerate(weights):
        groups.setdefault(choose(x.shape[0], w, implementation), []).append(i)
    for name, places in groups.items():
        here = x if name in _KERNELS else x.astype(jnp.float32)
        for i, y in zip(places, IMPLEMENTATIONS[name](here, tuple(weights[i] for i in places)), strict=True):
            results[i] = y
    return tuple(results)


def choose(rows: int, w: QuantizedArray, implementation: str | None = None) -> str:
    """Returns the implementation that computes a product of `rows` rows with w.

    Raises:
        ImplementationError: `implementation` names one that cannot, and why.
    """
    reasons = {name: why(rows, w) for name, why in _REFUSALS.items()}
    if implementation is not None:
        if implementation not in reasons:
            raise ImplementationError(
                f"linear: implementation {implementation!r} is not known for packed weights; "
                f"choose from {', '.join(reasons)} or pass None."
            )
        if reasons[implementation]:
            raise ImplementationError(f"linear: {implementation!r} cannot multiply by {w!r}: {reasons[implementation]}")
        return implementation
    found = tuned(rows, w).get("implementation")
    if found in ("native", "stream", "tiles") and not reasons[found]:
        return found
    if jax.default_backend() == "cpu":
        if not reasons["native"]:
            return "native"
        if rows <= w.spec.few_rows and not reasons["stream"]:
            return "stream"
        return "tiles"
    return "tiles" if reasons["platform"] else "platform"


def facts(rows: int, w: QuantizedArray) -> tuning.Facts | None:
    """Returns what the speed of a product of `rows` rows with w depends on; None where a size is symbolic or 0."""
    sizes = {"R": rows, "K": w.shape[0], "N": w.shape[1]}
    if not all(isinstance(n, int) and n > 0 for n in sizes.values()):
        return None
    return {**sizes, "format": w.description, "transposed": w.transposed, "order": "order" in w.fields}


def tuned(rows: int, w: QuantizedArray, implementation: str | None = None) -> tuning.Values:
    """Returns the values that were found for a product, of the named implementation or of all; {} for the defaults."""
    if tuning.CHOOSER.value is None:
        return tuning.NO_VALUES
    return tuning.values("packed_product", _here(), lambda: facts(rows, w), implementation)


def _here() -> Target:
    platform = default_platform()
    return Target(platform, device_kind(platform))


def _native_refusal(rows: int, w: QuantizedArray) -> str:
    if w.transposed:
        return "its blocks run along the output axis; use 'tiles'."
    if jax.default_backend() != "cpu":
        return f"it runs on the CPU and the default backend is {jax.default_backend()}."
    if isinstance(w.spec, BlockFormat):
        for field in w.spec.fields:
            if w.fields[field.name].dtype != field.dtype:
                return f"its {field.name} is {w.fields[field.name].dtype}, the format's {field.dtype}."
    return cpu.packed_refusal(w.format, w.stored_shape[-1])


_REFUSALS: dict[str, Callable[[int, QuantizedArray], str]] = {
    "native": _native_refusal,
    "stream": lambda rows, w: _stream_refusal(w),
    "tiles": lambda rows, w: "",
    "platform": lambda rows, w: _kernel_refusal(w),
    "triton": lambda rows, w: _kernel_refusal(w),
    "mosaic_tpu": lambda rows, w: _kernel_refusal(w),
    "dequantize": lambda rows, w: "",
}


def _stream_refusal(w: QuantizedArray) -> str:
    if w.transposed:
        return "its blocks run along the output axis; use 'tiles'."
    blocks = w.spec.streamed(w.fields)
    return blocks if isinstance(blocks, str) else ""


def _kernel_refusal(w: QuantizedArray) -> str:
    found = kernel_layout(w)
    return found if isinstance(found, str) else ""


# ---- implementations -------------------------------------------------------------------------------------------------


def _native(x: jax.Array, weights: tuple[QuantizedArray, ...]) -> tuple[jax.Array, ...]:
    ys = cpu.packed_matmul(x, [(w.format, w.fields) for w in weights], NAMED_GRIDS)
    scales = [w.fields.get("tensor_scale") for w in weights]
    return tuple(y if s is None else y * s.astype(jnp.float32) for y, s in zip(ys, scales, strict=True))


def _stream(x: jax.Array, weights: tuple[QuantizedArray, ...]) -> tuple[jax.Array, ...]:
    return tuple(_stream_one(x, w) for w in weights)


def _stream_one(x: jax.Array, w: QuantizedArray) -> jax.Array:
    streamed = w.spec.streamed(w.fields)
    assert not isinstance(streamed, str), streamed
    k, n = w.stored_shape
    x = stored_rows(x, w.fields.get("order"), -1)
    rows = x.shape[0]
    unroll = tuned(rows, w, "stream").get("unroll", _jax.STREAM_UNROLL)
    if streamed.affine is None:  # 16-bit floats: every row of w stands alone
        decode = streamed.rows
        assert decode is not None

        def add_weights(acc: jax.Array, step: tuple[jax.Array, Any]) -> tuple[jax.Array, None]:
            xk, fields = step
            return acc + xk[:, None] * decode(fields)[None, :], None

        return jax.lax.scan(add_weights, jnp.zeros((rows, n)), (x.T, streamed.fields), unroll=unroll)[0]

    affine = streamed.affine

    def add_code(total: jax.Array, row: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        xs, codes = row  # [rows], [n]
        return total + xs[:, None] * codes.astype(jnp.float32)[None, :], None

    def add_sub(acc: jax.Array, step: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        xs, codes, scale, *shift = step  # [sub, rows], [sub, n], [n]
        total = jax.lax.scan(add_code, jnp.zeros((rows, n)), (xs, codes), unroll=unroll)[0]
        acc = acc + total * scale[None, :]
        return (acc + xs.sum(0)[:, None] * shift[0][None, :] if shift else acc), None

    def add_block(acc: jax.Array, step: tuple[jax.Array, Any]) -> tuple[jax.Array, None]:
        xb, fields = step  # [block, rows], the fields of one block
        scale = affine.scale(fields)
        subs = scale.shape[0]
        shift = () if affine.shift is None else (affine.shift(fields),)
        codes = affine.codes(fields).reshape(subs, -1, n)
        return jax.lax.scan(add_sub, acc, (xb.reshape(subs, -1, rows), codes, scale, *shift))[0], None

    blocks = x.T.reshape(k // streamed.block, streamed.block, rows)
    return jax.lax.scan(add_block, jnp.zeros((rows, n)), (blocks, streamed.fields))[0]


def _tiles(x: jax.Array, weights: tuple[QuantizedArray, ...]) -> tuple[jax.Array, ...]:
    results = []
    for w in weights:
        order, tile = w.fields.get("order"), tuned(x.shape[0], w, "tiles").get("tile", TILE)
        ready = _readied(w)
        if w.transposed:
            results.append(logical_rows(_transposed_tiles(x, ready, tile), order, -1))
        else:
            results.append(_forward_tiles(stored_rows(x, order, -1), ready, tile))
    return tuple(results)


def _forward_tiles(x: jax.Array, w: QuantizedArray, tile: int) -> jax.Array:
    """y[:, tile] = x @ decode(w[:, tile]), x in the order of the stored rows; a tile is some `TILE`s wide."""
    n = w.stored_shape[-1]

    def one(start: Any, width: int) -> jax.Array:
        return x @ _decode_tile(w, start, width)

    def step(i: jax.Array, y: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice(y, one(i * tile, tile), (0, i * tile))

    y = jax.lax.fori_loop(0, n // tile, step, jnp.zeros((x.shape[0], n))) if n >= tile else jnp.zeros((x.shape[0], n))
    rest = n % tile
    return jax.lax.dynamic_update_slice(y, one(n - rest, rest), (0, n - rest)) if rest else y


def _transposed_tiles(x: jax.Array, w: QuantizedArray, tile: int) -> jax.Array:
    """y = sum over tiles of x[:, tile] @ decode(w)[:, tile].T, y in the order of the stored rows."""
    k, n = w.stored_shape

    def one(start: Any, width: int) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(x, start, width, 1) @ _decode_tile(w, start, width).T

    def step(i: jax.Array, y: jax.Array) -> jax.Array:
        return y + one(i * tile, tile)

    y = jax.lax.fori_loop(0, n // tile, step, jnp.zeros((x.shape[0], k))) if n >= tile else jnp.zeros((x.shape[0], k))
    rest = n % tile
    return y + one(n - rest, rest) if rest else y


def _readied(w: QuantizedArray) -> QuantizedArray:
    return QuantizedArray(w.format, w.spec.readied(w.fields), transposed=w.transposed)


def _decode_tile(w: QuantizedArray, start: Any, width: int) -> jax.Array:
    return w.spec.matrix(w.spec.cut(w.fields, start, width))


def _by_kernel(implementation: str | None, x: jax.Array, weights: tuple[QuantizedArray, ...]) -> tuple[jax.Array, ...]:
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        x = x.astype(jnp.float32)
    results = []
    for w in weights:
        found = kernel_layout(w)
        assert not isinstance(found, str), found
        layout, fields = found
        rows = stored_rows(x, w.fields.get("order"), -1)
        plain = _Plain(w.format, layout)
        try:
            results.append(packed_matmul(rows, fields, layout=layout, plain=plain, implementation=implementation))
        except kernels_pallas.ImplementationError as error:
            raise ImplementationError(str(error)) from error
    return tuple(results)


@dataclasses.dataclass(frozen=True)
class _Plain:
    """The product by tiles, of the arrays that a kernel takes."""

    format: str
    layout: Layout

    def __call__(self, x: jax.Array, fields: Mapping[str, jax.Array]) -> jax.Array:
        return _tiles(x.astype(jnp.float32), (from_kernel(self.format, self.layout, fields),))[0]


def _dequantize(x: jax.Array, weights: tuple[QuantizedArray, ...]) -> tuple[jax.Array, ...]:
    return tuple(jnp.matmul(x, w.dequantize(), precision="highest") for w in weights)


IMPLEMENTATIONS: dict[str, Products] = {
    "native": _native,
    "stream": _stream,
    "tiles": _tiles,
    "platform": functools.partial(_by_kernel, None),
    "triton": functools.partial(_by_kernel, "triton"),
    "mosaic_tpu": functools.partial(_by_kernel, "mosaic_tpu"),
    "dequantize": _dequantize,
}


# ---- gradients -------------------------------------------------------------------------------------------------------


def _forward(x: jax.Array, weights: tuple[QuantizedArray, ...], implementation: str | None) -> Any:
    return _products(x, weights, implementation), (x, weights)


def _backward(implementation: str | None, residuals: Any, cotangents: tuple[jax.Array, ...]) -> Any:
    x, weights = residuals
    dx = sum(_tiles(g, (w.T,))[0] for g, w in zip(cotangents, weights, strict=True))
    wide = x.astype(jnp.float32)
    return jnp.asarray(dx, x.dtype), tuple(
        _field_gradients(wide, w, g) for g, w in zip(cotangents, weights, strict=True)
    )


def _field_gradients(x: jax.Array, w: QuantizedArray, g: jax.Array) -> QuantizedArray:
    """Cotangents of the fields: `decode`'s own derivative applied to x.T @ g, tile by tile."""
    n = w.stored_shape[-1]
    spans, order = w.spec.spans(w.fields), w.fields.get("order")
    trained = {name: w.fields[name] for name in w.spec.trained(w.fields)}
    ready = w.spec.readied(w.fields)
    here, other = (x, stored_rows(g, order, -1)) if w.transposed else (g, stored_rows(x, order, -1))

    def add(grads: dict[str, jax.Array], start: Any, width: int) -> dict[str, jax.Array]:
        cut = w.spec.cut(ready, start, width)
        tile = jax.lax.dynamic_slice_in_dim(here, start, width, 1)
        _, pull = jax.vjp(lambda floats: w.spec.matrix({**cut, **floats}), {name: cut[name] for name in trained})
        parts = pull(other.T @ tile)[0]
        return {name: add_part(grads[name], parts[name], spans[name], start) for name in grads}

    grads = {name: jnp.zeros_like(f) for name, f in trained.items()}
    if trained and n >= TILE:
        grads = jax.lax.fori_loop(0, n // TILE, lambda i, t: add(t, i * TILE, TILE), grads)
    if trained and n % TILE:
        grads = add(grads, n - n % TILE, n % TILE)
    fixed = {name: f for name, f in w.fields.items() if name not in trained}
    none = {name: _no_gradient(f) for name, f in fixed.items()}
    # Fields keep the format's order: the pytree structure must be that of w.
    return QuantizedArray(w.format, {name: {**grads, **none}[name] for name in w.fields}, transposed=w.transposed)


def _no_gradient(codes: jax.Array) -> Any:
    """Returns the cotangent of codes: nothing of integers, zero of 8-bit floats."""
    if jnp.issubdtype(codes.dtype, jnp.floating):
        return jnp.zeros_like(codes)
    return np.zeros(codes.shape, jax.dtypes.float0)


_products.defvjp(_forward, _backward)
