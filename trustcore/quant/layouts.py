"""Formats as `kernels_pallas.packed` reads them: a `Layout` and the arrays that it names.

    block formats     the fields as they are
    scaled formats    codes by blocks, [K / block, rows, N]; scales one a column, [K / run, N], where they are powers of
                      two as `exponent`

Runs of up to 128 weights are blocks themselves; longer ones are many blocks under one scale. Scales for square blocks
or for the whole matrix are repeated along N, and those that are codes themselves are looked up first: a hundredth of
the codes' bytes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

import jax
import jax.numpy as jnp

from kernels_pallas.packed import Layout, Plane
from trustcore.quant.array import QuantizedArray
from trustcore.quant.formats.block_floats import E2M1_DOUBLED
from trustcore.quant.formats.numbers import FP4, NF4
from trustcore.quant.formats.scaled import ScaledFormat, widened

_HALVES = (Plane("codes", 4, 16),)
_BLOCKS: Mapping[str, Layout] = MappingProxyType(
    {
        layout.name: layout
        for layout in (
            Layout("q4_0", 32, _HALVES, offset=8),
            Layout("q4_1", 32, _HALVES, extra="minimum"),
            Layout("q8_0", 32, (Plane("codes", 8),), "signed"),
            Layout("q4_k", 256, (Plane("codes", 4, 32),), sub=32, kind="six_bits"),
            Layout("q5_k", 256, (Plane("codes", 4, 32), Plane("high", 1, 32)), sub=32, kind="six_bits"),
            Layout("q6_k", 256, (Plane("codes", 4, 64), Plane("high", 2, 32)), sub=16, kind="int8", offset=32),
            Layout("mxfp4", 32, _HALVES, "table", kind="power", table=tuple(map(float, E2M1_DOUBLED)), halved=1),
        )
    }
)
_FOUR_BITS, _EIGHT_BITS = (Plane("codes", 4),), (Plane("codes", 8),)
# What is known of a scaled format before its granularity: block and run follow from that.
_SCALED: Mapping[str, Layout] = MappingProxyType(
    {
        layout.name: layout
        for layout in (
            Layout("int4", 0, _FOUR_BITS, offset=8),
            Layout("int8", 0, _EIGHT_BITS, "signed"),
            Layout("fp8_e4m3", 0, _EIGHT_BITS, "e4m3"),
            Layout("fp8_e5m2", 0, _EIGHT_BITS, "e5m2"),
            Layout("mxfp8_e4m3", 0, _EIGHT_BITS, "e4m3", kind="power"),
            Layout("mxfp8_e5m2", 0, _EIGHT_BITS, "e5m2", kind="power"),
            Layout("nf4", 0, _FOUR_BITS, "table", table=NF4),
            Layout("fp4", 0, _FOUR_BITS, "table", table=FP4),
        )
    }
)
_LONGEST = 128  # weights of a block


def kernel_layout(w: QuantizedArray) -> tuple[Layout, dict[str, jax.Array]] | str:
    """Returns how kernels read a packed matrix `[K, N]`, in the order of its stored rows; or why they do not.

    >>> import trustcore as tc
    >>> w = QuantizedArray.quantize(jnp.ones((128, 8)), "int4:g64")
    >>> layout, fields = kernel_layout(w)
    >>> print(tc.kernels.explain("packed_matmul", jnp.ones((1, 128)), fields, layout=layout, platform="tpu").taken)
    mosaic_tpu
    """
    if w.transposed:
        return "its blocks run along the output axis; use 'tiles'."
    if w.format in _BLOCKS:
        return _BLOCKS[w.format], {name: w.fields[name] for name in _BLOCKS[w.format].fields}
    if w.format not in _SCALED:
        return f"it does not know {w.format}; it knows {', '.join((*_BLOCKS, *_SCALED))}."
    spec, (k, n) = w.spec, w.stored_shape
    assert isinstance(spec, ScaledFormat)
    run, span = spec.granularity(w.fields)
    if k % run:
        return f"its runs of {run} rows do not divide K={k}; use 'tiles'."
    block = run if run <= _LONGEST else next((b for b in (128, 64, 32, 16) if run % b == 0), run)
    layout = dataclasses.replace(_SCALED[w.format], block=block, run=0 if block == run else run)
    if layout.unit % 8:
        return f"its runs of {run} rows fall into no parts of 8 rows; use 'tiles'."
    codes, scale = w.fields["codes"], w.fields["scale"]
    fields = {"codes": codes.reshape(k // block, -1, n)}
    if layout.kind == "power":
        return layout, fields | {"exponent": scale}
    if "levels" in w.fields:
        scale = spec.scale(w.fields)
    fields["scale"] = _by_column(scale, span, n)
    if "zero" in w.fields:
        layout = dataclasses.replace(layout, extra="zero", offset=0)
        fields["zero"] = _by_column(w.fields["zero"], span, n)
    return layout, fields


def from_kernel(format: str, layout: Layout, fields: Mapping[str, jax.Array]) -> QuantizedArray:
    """Returns the matrix of what `kernel_layout` gave: the same weights, codes of float8 as bytes."""
    if format in _BLOCKS:
        return QuantizedArray(format, fields)
    codes = fields["codes"]
    given = {"codes": codes.reshape(-1, codes.shape[2]), "scale": fields.get("scale", fields.get("exponent"))}
    return QuantizedArray(format, given | ({"zero": fields["zero"]} if layout.extra == "zero" else {}))


def _by_column(values: jax.Array, span: int, n: int) -> jax.Array:
    """Returns `[G, N]`; integers as float32."""
    values = values if jnp.issubdtype(values.dtype, jnp.floating) else values.astype(jnp.float32)
    return jnp.broadcast_to(widened(values, span, n), (values.shape[0], n))
