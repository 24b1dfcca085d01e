"""What every storage format answers, whatever its fields are: the interface between formats and all that uses them.

A format stores a matrix `[..., K, N]` as *fields*, arrays whose last axis follows N:

    fields --matrix--> float32 [..., K, N]

Products, rows of tables, gradients and reports know this interface only. `layout` holds the formats whose scales sit
in blocks of fixed size (GGUF's), `scaled` those whose scales have any granularity.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from trustcore.errors import QuantizationError

Fields = Mapping[str, jax.Array]

# Columns decoded at a time: 512 x 1536 float32 are 3 MB, which the cache of a core still holds. What `cut` takes starts
# at a multiple of it, and a column of any field stands for a divisor of it.
TILE = 512


@dataclasses.dataclass(frozen=True)
class Affine:
    """The shape of almost every format: small numbers under a scale and a shift for each run of weights.

        w[s * sub + j] = scale[s] * code[s * sub + j] + shift[s]        sub = block / subs

    Products use it to sum `x * code` over a sub-block first and scale the sum once.

    Args:
        codes: fields to numbers `[..., K / block, block, N]` (int8, uint8, or a float), in the order of the weights.
        scale: fields to float32 `[..., K / block, subs, N]`; `subs` is 1 where the whole block shares one.
        shift: the same, or None where it is zero.
    """

    codes: Callable[[Fields], jax.Array]
    scale: Callable[[Fields], jax.Array]
    shift: Callable[[Fields], jax.Array] | None = None


@dataclasses.dataclass(frozen=True)
class Streamed:
    """A matrix as a row of equal blocks, for a loop that takes one block at a time.

    Args:
        block: weights of K in a block.
        fields: arrays whose first axis counts the blocks, `[K / block, ..., N]`.
        rows: fields of one block to float32 `[block, N]`, where blocks are no `affine`; then `block` is 1.
        affine: the parts of a block.
    """

    block: int
    fields: Fields
    affine: Affine | None = None
    rows: Callable[[Fields], jax.Array] | None = None


class Format(abc.ABC):
    """One way to store weights. Subclasses are frozen dataclasses with a `name`."""

    name: str
    few_rows: ClassVar[int] = 16  # of x, up to which streaming the codes beats decoding tiles into a dot on the CPU

    @property
    @abc.abstractmethod
    def field_names(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Names of the fields that there must be, and of those that there may be, in the order they are kept in."""

    @abc.abstractmethod
    def stored_shape(self, fields: Fields) -> tuple[int, ...]:
        """Returns `[..., K, N]`, read off the fields' shapes."""

    @abc.abstractmethod
    def matrix(self, fields: Fields) -> jax.Array:
        """Returns float32 `[..., K, N]`, in the order of the stored rows."""

    @abc.abstractmethod
    def spans(self, fields: Fields) -> dict[str, int]:
        """Returns how many columns of the matrix one column of each field stands for; 0: all of them.

        Always a divisor of `TILE`.
        """

    @abc.abstractmethod
    def trained(self, fields: Fields) -> tuple[str, ...]:
        """Returns the fields that the weights are differentiable in."""

    @abc.abstractmethod
    def describe(self, fields: Fields) -> str:
        """Returns the format's name with the granularity of its scales, as a user writes it: "int4:g64"."""

    @abc.abstractmethod
    def streamed(self, fields: Fields) -> Streamed | str:
        """Returns the matrix `[K, N]` as blocks that can be taken one by one; or why it is none, as a string."""

    @abc.abstractmethod
    def unpack(self, blocks: Any) -> dict[str, Any]:
        """Returns the fields of weights as they lie on disk in blocks, where the format has such a form."""

    @abc.abstractmethod
    def pack(self, fields: Mapping[str, Any]) -> Any:
        """Returns the blocks on disk: the inverse of `unpack`."""

    def in_order(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the fields in the order they are kept in.

        Raises:
            QuantizationError: one is missing or unknown.
        """
        required, optional = self.field_names
        missing = [name for name in required if name not in fields]
        unknown = [name for name in fields if name not in required and name not in optional]
        if missing or unknown:
            may = f"; it may have {', '.join(optional)}" if optional else ""
            wrong = [f"{', '.join(missing)} missing"] * bool(missing) + [f"{', '.join(unknown)} unknown"] * bool(
                unknown
            )
            raise QuantizationError(
                f"{self.name}: {' and '.join(wrong)} among the fields {', '.join(fields)}. "
                f"It needs {', '.join(required)}{may}."
            )
        return {name: fields[name] for name in (*required, *optional) if name in fields}

    def readied(self, fields: Fields) -> Fields:
        """Returns the fields as a loop that cuts them should have them: the same weights, in dtypes that XLA slices."""
        return fields

    def cut(self, fields: Fields, start: Any, width: int) -> dict[str, jax.Array]:
        """Returns the fields of columns `start` to `start + width`; `start` is a multiple of `TILE`."""
        spans = self.spans(fields)
        return {name: part_of(field, spans[name], start, width) for name, field in fields.items()}

    def pick(self, fields: Fields, columns: jax.Array) -> dict[str, jax.Array]:
        """Returns the fields of single columns `[M]`; those out of range are clamped."""
        picked = {}
        for name, span in self.spans(fields).items():
            places = columns if span <= 1 else columns // span
            picked[name] = jnp.take(fields[name], places, axis=-1, mode="clip") if span else fields[name]
        return picked


def part_of(field: jax.Array, span: int, start: Any, width: int) -> jax.Array:
    """Returns what of a field belongs to columns `start` to `start + width` of the matrix."""
    if span == 0:
        return field
    return jax.lax.dynamic_slice_in_dim(field, start // span, -(-width // span), field.ndim - 1)


def add_part(field: jax.Array, part: jax.Array, span: int, start: Any) -> jax.Array:
    """Returns the field with `part` added where `part_of` took it from."""
    if span == 0:
        return field + part
    axis = field.ndim - 1
    here = jax.lax.dynamic_slice_in_dim(field, start // span, part.shape[-1], axis)
    return jax.lax.dynamic_update_slice_in_dim(field, here + part, start // span, axis)


def decode_matrix(format: Format, fields: Fields) -> jax.Array:
    """Returns float32 `[..., K, N]`: every weight, in the order of the logical rows."""
    shape = format.stored_shape(fields)
    if 0 in shape:
        return jnp.zeros(shape, jnp.float32)
    return logical_rows(format.matrix(fields), fields.get("order"), -2)


def stored_rows(x: jax.Array, order: jax.Array | None, axis: int) -> jax.Array:
    """Returns x with its logical rows of K, along `axis`, in the order they are stored in: `x[order]`."""
    if order is None:
        return x
    if order.ndim == 1:
        return jnp.take(x, order, axis=axis, mode="clip")
    return jnp.take_along_axis(x, _along(order, x.ndim, axis), axis=axis, mode="clip")


def logical_rows(x: jax.Array, order: jax.Array | None, axis: int) -> jax.Array:
    """Returns x with its stored rows of K, along `axis`, in logical order: the inverse of `stored_rows`."""
    return stored_rows(x, None if order is None else jnp.argsort(order, axis=-1), axis)


def _along(order: jax.Array, ndim: int, axis: int) -> jax.Array:
    """Returns `[..., K]` with axes of size 1 for all but its leading ones and `axis`, counted from the end."""
    order = order.reshape(*order.shape, *[1] * (-axis - 1))
    return order.reshape(*[1] * (ndim - order.ndim), *order.shape)
