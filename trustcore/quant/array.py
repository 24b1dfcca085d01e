"""`QuantizedArray`: a weight matrix that stays packed and stands wherever a weight array stands.

A registered pytree: the format and the orientation are static, the fields of the format are array leaves. Its shape is
read off the leaves, so slicing a stack of weights (scan over layers), vmap and sharding need no special case.

    w[k, n] ~ decode(fields)[k // block, k % block, n]      (transposed: w[n, k])

Blocks run along the contraction axis K of the product the weight was made for; N is contiguous in memory. A table that
serves both as embedding (rows of K) and, transposed, as output layer is one array seen from two sides: `w.T` is free.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from trustcore.errors import QuantizationError
from trustcore.ops.weight import Weight
from trustcore.quant.encode import encode, no_encoder
from trustcore.quant.formats import Format, decode_matrix, get_format
from trustcore.quant.formats.names import storages


@jax.tree_util.register_pytree_with_keys_class
class QuantizedArray(Weight):
    """A packed matrix of logical shape `[..., K, N]`, or `[..., N, K]` when `transposed`.

    Args:
        format: a name in `trustcore.quant.FORMATS`.
        fields: the format's fields: `[..., K / block, (rows,) N]` where it has blocks, and as
            `trustcore.quant.formats.scaled` says where its scales have any granularity.
        transposed: whether the logical matrix is the transpose of the stored one.

    Raises:
        QuantizationError: the format is unknown, or a field is missing or unknown.
    """

    __slots__ = ("fields", "format", "transposed")

    def __init__(self, format: str, fields: Mapping[str, Any], *, transposed: bool = False):
        self.format = format
        self.fields = get_format(format).in_order(fields)
        self.transposed = transposed

    @classmethod
    def from_blocks(cls, format: str, blocks: np.ndarray, *, transposed: bool = False) -> QuantizedArray:
        """Returns the weight whose bytes lie on disk as `blocks`.

        Args:
            format: a name in `FORMATS`.
            blocks: uint8 `[..., N, bytes]`: N rows of K weights, as GGUF stores a matrix that maps K inputs to N
                outputs.
            transposed: False for a layer's kernel, `[K, N]`; True for a table whose rows are looked up, `[N, K]`.

        Raises:
            QuantizationError: the format is unknown or the rows are no whole number of blocks.
        """
        fields = get_format(format).unpack(blocks)
        return cls(format, {name: _to_device(field) for name, field in fields.items()}, transposed=transposed)

    @classmethod
    def quantize(
        cls, weights: Any, format: str, *, importance: Any = None, search: bool = True, transposed: bool = False
    ) -> QuantizedArray:
        """Returns `weights` packed, with the scales that fit them best.

        Args:
            weights: float `[..., K, N]`, or `[..., N, K]` when `transposed`; K is a multiple of the format's block.
            format: a name that `encode` takes, such as "q4_k", "int4:g64" or "fp8_e4m3:128x128"; "fp8" takes whichever
                of E4M3 and E5M2 has the smaller error.
            importance: what an error in each of the K inputs costs, `[K]`; None: all the same.
            search: see `trustcore.quant.encode.encode`.
            transposed: whether blocks run along the last axis: a table whose rows are looked up.

        Raises:
            QuantizationError: the weights cannot be packed in that format; see `encode`.
        """
        matrix = jnp.swapaxes(jnp.asarray(weights), -1, -2) if transposed else weights
        if why := no_encoder(format):
            raise QuantizationError(f"{format}: {why}.")
        choices = [
            cls(s.format.name, encode(s.name, matrix, importance=importance, search=search)) for s in storages(format)
        ]
        if len(choices) > 1 and isinstance(matrix, Tracer):
            raise QuantizationError(
                f"{format}: the weights decide between {' and '.join(c.description for c in choices)}, and they cannot "
                "be looked at under a trace. Name one of the two."
            )
        best = choices[0] if len(choices) == 1 else min(choices, key=lambda c: _error(c, matrix, importance))
        return best.T if transposed else best

    def to_blocks(self) -> np.ndarray:
        """Returns the bytes on disk, uint8 `[..., N, bytes]`: the exact inverse of `from_blocks`."""
        return self.spec.pack({name: np.asarray(field) for name, field in self.fields.items()})

    def tree_flatten_with_keys(self) -> tuple[list[tuple[Any, Any]], Any]:
        """Leaves are the fields, in the format's order, under their names."""
        return [(jax.tree_util.GetAttrKey(n), f) for n, f in self.fields.items()], (
            self.format,
            tuple(self.fields),
            self.transposed,
        )

    @classmethod
    def tree_unflatten(cls, aux: tuple[str, tuple[str, ...], bool], leaves: Sequence[Any]) -> QuantizedArray:
        """The inverse of flattening; leaves may be anything that a transform puts there."""
        packed = object.__new__(cls)
        packed.format, names, packed.transposed = aux
        packed.fields = dict(zip(names, leaves, strict=True))
        return packed

    @property
    def spec(self) -> Format:
        """The entry of the format table."""
        return get_format(self.format)

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape `[..., K, N]` of the matrix as it is stored."""
        return self.spec.stored_shape(self.fields)

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """Logical shape."""
        *lead, k, n = self.stored_shape
        return (*lead, n, k) if self.transposed else (*lead, k, n)

    @property
    def ndim(self) -> int:
        """Number of logical axes."""
        return len(self.stored_shape)

    @property
    def size(self) -> int:
        """Number of weights."""
        return int(np.prod(self.stored_shape))

    @property
    def dtype(self) -> np.dtype:
        """Dtype of a decoded weight: float32."""
        return np.dtype(np.float32)

    @property
    def nbytes(self) -> int:
        """Bytes of all fields."""
        return sum(int(np.prod(f.shape)) * np.dtype(f.dtype).itemsize for f in self.fields.values())

    @property
    def bits_per_weight(self) -> float:
        """Bits of all fields, scales included, for each weight."""
        return 8 * self.nbytes / max(self.size, 1)

    @property
    def description(self) -> str:
        """The format with the granularity of its scales, as `quantize` takes it: "int4:g64"."""
        return self.spec.describe(self.fields)

    @property
    def T(self) -> QuantizedArray:
        """The transpose, sharing the fields."""
        return QuantizedArray(self.format, self.fields, transposed=not self.transposed)

    def dequantize(self) -> jax.Array:
        """Returns the whole matrix as float32, in its logical orientation."""
        matrix = decode_matrix(self.spec, self.fields)
        return jnp.swapaxes(matrix, -1, -2) if self.transposed else matrix

    def take(self, indices: jax.Array) -> jax.Array:
        """Returns float32 `[*indices.shape, K]`: rows of a transposed matrix, decoded one by one.

        Only the rows' own bytes are read. Indices out of range are clamped, as jax does for `mode="clip"`.

        Raises:
            QuantizationError: the matrix is not transposed: its rows cross the blocks, so looking one up would decode
                all of them.
        """
        if not self.transposed or self.ndim != 2:
            raise QuantizationError(
                f"take needs a transposed [N, K] table, got {self!r}; build it with from_blocks(..., transposed=True)."
            )
        rows = self.spec.pick(self.fields, indices.reshape(-1))
        return decode_matrix(self.spec, rows).T.reshape(*indices.shape, self.stored_shape[0])

    @classmethod
    def products(
        cls, x: jax.Array, weights: Sequence[Weight], *, implementation: str | None = None
    ) -> tuple[jax.Array, ...]:
        """Returns `x @ w` for each weight; see `trustcore.quant.matmul`."""
        from trustcore.quant.matmul import packed_products

        return packed_products(x, list(weights), implementation=implementation)  # type: ignore[arg-type]

    def __rmatmul__(self, x: jax.Array) -> jax.Array:
        return self.products(jnp.asarray(x), [self])[0]

    def __repr__(self) -> str:
        return f"QuantizedArray({self.description}{list(self.shape)}, {self.bits_per_weight:g} bits/weight)"


def _error(packed: QuantizedArray, weights: Any, importance: Any) -> float:
    """Returns the sum of squares of what packing changed, relative to the largest weight, by importance."""
    weights = jnp.asarray(weights).astype(jnp.float32)
    unit = jnp.maximum(jnp.max(jnp.abs(weights), initial=0), 1e-30)
    squares = ((weights - packed.dequantize()) / unit) ** 2
    return float(jnp.sum(squares if importance is None else squares * jnp.asarray(importance, jnp.float32)[..., None]))


def _to_device(field: np.ndarray) -> jax.Array:
    """Returns the array on the default device; on the CPU it takes over the memory where alignment allows."""
    return jax.device_put(field, may_alias=True)
