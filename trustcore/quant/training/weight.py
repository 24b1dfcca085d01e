"""Weights in training that act as the packed weights they will become.

    FakeQuantized       trained; every use goes through the codes     x @ fake_quantize(values)
    QuantizedInputs     afterwards, where activations are quantized   fake_quantize(x) @ QuantizedArray
                        and `ActivationQuantized` does not serve

Both stand wherever a weight array stands: `ops.linear`, nnx parameters, dicts. As pytrees their leaves are float arrays
that an optimizer updates; what may not move is held still by its gradient, which is zero.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from trustcore.dtypes import accumulation_dtype
from trustcore.errors import ImplementationError
from trustcore.ops.weight import Weight
from trustcore.quant.activations import INPUTS, ActivationQuantized
from trustcore.quant.array import QuantizedArray
from trustcore.quant.encode.encoder import fold
from trustcore.quant.training.fake import codes_of, fake_quantize, scaled_gradient, start_of
from trustcore.quant.training.inputs import Inputs, observing
from trustcore.quant.training.scheme import Scheme

METHODS = ("lsq", "ste", "minmax")


@jax.tree_util.register_pytree_with_keys_class
class FakeQuantized(Weight):
    """A trainable matrix `[..., K, N]`, or `[..., N, K]` when `transposed`, that is always seen through its codes.

    Args:
        leaves: float arrays: "values" `[..., K, N]`, and by method and scheme "scale" and "offset" `[..., G, C]`,
            "input_scale" `[]`, or, while inputs are watched, "seen".
        scheme: of the weights.
        method: "lsq", scales are trained; "ste", they stay; "minmax", they follow the values.
        clipped: see `fake_quantize`.
        inputs: of the activations; None leaves them.
        transposed: whether the logical matrix is the transpose of `values`.
    """

    __slots__ = ("clipped", "inputs", "leaves", "method", "scheme", "transposed")

    def __init__(
        self,
        leaves: Mapping[str, Any],
        scheme: Scheme,
        *,
        method: str = "lsq",
        clipped: bool = True,
        inputs: Inputs | None = None,
        transposed: bool = False,
    ):
        self.leaves = dict(leaves)
        self.scheme, self.method, self.clipped, self.inputs = scheme, method, clipped, inputs
        self.transposed = transposed

    @classmethod
    def of(cls, array: jax.Array, scheme: Scheme, *, transposed: bool = False, **options: Any) -> FakeQuantized:
        """Returns the weight that starts from `array`, in its logical orientation, with the options of the class."""
        values = jnp.swapaxes(jnp.asarray(array), -1, -2) if transposed else jnp.asarray(array)
        made = cls({"values": values}, scheme, transposed=transposed, **options)
        if made.method != "minmax":
            start = start_of(values, scheme, made.method)
            made.leaves["scale"] = start.scale
            if start.offset is not None:
                made.leaves["offset"] = start.offset
        if made.inputs is not None and made.inputs.trained:
            made.leaves["input_scale"] = jnp.full((), jnp.nan, jnp.float32)  # until `calibrate` has seen inputs
        return made

    def tree_flatten_with_keys(self) -> tuple[list[tuple[Any, Any]], Any]:
        """Leaves under their names; everything else is static."""
        aux = (tuple(self.leaves), self.scheme, self.method, self.clipped, self.inputs, self.transposed)
        return [(jax.tree_util.GetAttrKey(name), leaf) for name, leaf in self.leaves.items()], aux

    @classmethod
    def tree_unflatten(cls, aux: Any, leaves: Sequence[Any]) -> FakeQuantized:
        """The inverse of flattening; leaves may be anything that a transform puts there."""
        names, scheme, method, clipped, inputs, transposed = aux
        held = dict(zip(names, leaves, strict=True))
        return cls(held, scheme, method=method, clipped=clipped, inputs=inputs, transposed=transposed)

    def replace(self, **changes: Any) -> FakeQuantized:
        """Returns a weight with leaves added or changed; None takes one away."""
        leaves = {n: leaf for n, leaf in {**self.leaves, **changes}.items() if leaf is not None}
        return self.tree_unflatten(
            (tuple(leaves), self.scheme, self.method, self.clipped, self.inputs, self.transposed), list(leaves.values())
        )

    def with_input_scale(self, scale: jax.Array | None) -> FakeQuantized:
        """Returns a weight whose inputs have that scale; None: a weight that leaves its inputs alone."""
        made = self.replace(input_scale=scale)
        made.inputs = None if scale is None else self.inputs
        return made

    @property
    def values(self) -> jax.Array:
        """The full-precision matrix `[..., K, N]` that is trained."""
        return self.leaves["values"]

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """Logical shape."""
        *lead, k, n = self.values.shape
        return (*lead, n, k) if self.transposed else (*lead, k, n)

    @property
    def ndim(self) -> int:
        """Number of logical axes."""
        return self.values.ndim

    @property
    def dtype(self) -> Any:
        """Dtype of the values that are trained."""
        return self.values.dtype

    @property
    def T(self) -> FakeQuantized:
        """The transpose, sharing the leaves."""
        turned = self.replace()
        turned.transposed = not self.transposed
        return turned

    def dequantize(self) -> jax.Array:
        """Returns the matrix as its codes stand for it, float32, in its logical orientation."""
        scale, offset = self._scales()
        values = self.values.astype(jnp.float32)
        seen = fake_quantize(values, scale, offset, format=self.scheme, clipped=self.clipped)
        return jnp.swapaxes(seen, -1, -2) if self.transposed else seen

    def take(self, indices: jax.Array) -> jax.Array:
        """Returns rows of the first axis as their codes stand for them: float32 `[*indices.shape, ...]`."""
        return jnp.take(self.dequantize(), indices, axis=0, mode="clip")

    @classmethod
    def products(
        cls, x: jax.Array, weights: Sequence[Weight], *, implementation: str | None = None
    ) -> tuple[jax.Array, ...]:
        """Returns `x @ w` for each weight, x going through its codes first where the weight says so.

        Raises:
            ImplementationError: another implementation than "dot" is named, or the shapes do not fit.
        """
        if implementation not in (None, "dot"):
            raise ImplementationError(
                f"linear: implementation {implementation!r} was asked for, but the weight is being trained; "
                'pass implementation="dot" or None.'
            )
        return tuple(w._product(x) for w in weights if isinstance(w, FakeQuantized))

    def packed(self) -> QuantizedArray | ActivationQuantized | QuantizedInputs:
        """Returns the weight packed: it decodes to `dequantize()`, bit for bit.

        With quantized inputs it becomes an `ActivationQuantized`, which multiplies codes by codes, if the weight is of
        the same kind and has no groups along K; else `QuantizedInputs`.
        """
        scale, offset = self._scales()
        codes = codes_of(self.values, scale, offset, self.scheme)
        fields = {**_planes(codes, self.scheme), "scale": scale}
        if offset is not None:
            fields["zero"] = -(offset / scale)
        array = QuantizedArray(self.scheme.format, fields, transposed=self.transposed)
        if self.inputs is None:
            return array
        input_scale, format = self.leaves.get("input_scale"), self.inputs.format
        whole = [name == "int8" for name in (self.scheme.format, format)]
        if {self.scheme.format, format} <= set(INPUTS) and whole[0] == whole[1] and self.scheme.rows is None:
            return ActivationQuantized(array, format, input_scale=input_scale)
        return QuantizedInputs(array, input_scale, self.inputs)

    def _scales(self) -> tuple[jax.Array, jax.Array | None]:
        if self.method == "minmax":
            return jax.lax.stop_gradient(start_of(self.values, self.scheme, "minmax"))
        scale, offset = self.leaves["scale"], self.leaves.get("offset")
        if self.method == "ste":
            return jax.lax.stop_gradient((scale, offset))
        # LSQ, section 2.2: the gradient of a step size is divided by sqrt(N Q_P), N the weights that share it.
        factor = (self.values.size / scale.size * self.scheme.grid.high) ** -0.5
        return scaled_gradient(scale, factor), None if offset is None else _slowed(offset, factor)

    def _product(self, x: jax.Array) -> jax.Array:
        if self.ndim != 2 or self.shape[0] != x.shape[-1]:
            raise ImplementationError(f"linear: x {x.dtype}{list(x.shape)} does not fit {self!r}: K must agree.")
        if "seen" in self.leaves:
            x = observing(x, self.leaves["seen"])
        elif self.inputs is not None:
            x = self.inputs(x, self.leaves.get("input_scale"))
        dims = (((x.ndim - 1,), (0,)), ((), ()))
        kind = accumulation_dtype(x.dtype)
        y = jax.lax.dot_general(x, self.dequantize().astype(x.dtype), dims, preferred_element_type=kind)
        return y.astype(x.dtype)

    def __rmatmul__(self, x: jax.Array) -> jax.Array:
        return self._product(jnp.asarray(x))

    def __repr__(self) -> str:
        return f"FakeQuantized({self.scheme.format}{list(self.shape)}, {self.method})"


@jax.tree_util.register_pytree_with_keys_class
class QuantizedInputs(Weight):
    """A packed weight of any granularity whose inputs go through codes as well, multiplied as decoded numbers.

    What training with quantized activations leaves behind where `ActivationQuantized` cannot multiply codes by codes.

    Args:
        weight: the packed matrix.
        scale: of the inputs, `[]`; None: each token has its own.
        inputs: the codes.
    """

    __slots__ = ("inputs", "scale", "weight")

    def __init__(self, weight: QuantizedArray, scale: jax.Array | None, inputs: Inputs):
        self.weight, self.scale, self.inputs = weight, scale, inputs

    def tree_flatten_with_keys(self) -> tuple[list[tuple[Any, Any]], Any]:
        """Leaves are the packed weight's and the scale."""
        key = jax.tree_util.GetAttrKey
        return [(key("weight"), self.weight), (key("scale"), self.scale)], self.inputs

    @classmethod
    def tree_unflatten(cls, aux: Inputs, leaves: Sequence[Any]) -> QuantizedInputs:
        """The inverse of flattening."""
        return cls(leaves[0], leaves[1], aux)

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """Logical shape."""
        return self.weight.shape

    @property
    def T(self) -> QuantizedInputs:
        """The transpose, sharing the fields."""
        return QuantizedInputs(self.weight.T, self.scale, self.inputs)

    def dequantize(self) -> jax.Array:
        """Returns the whole matrix as float32."""
        return self.weight.dequantize()

    def take(self, indices: jax.Array) -> jax.Array:
        """Returns rows of a transposed matrix; see `QuantizedArray.take`."""
        return self.weight.take(indices)

    @classmethod
    def products(
        cls, x: jax.Array, weights: Sequence[Weight], *, implementation: str | None = None
    ) -> tuple[jax.Array, ...]:
        """Returns `x @ w` for each weight, x going through its codes first; see `trustcore.quant.matmul`."""
        found = []
        for w in weights:
            assert isinstance(w, QuantizedInputs)
            found += w.weight.products(w.inputs(x, w.scale), [w.weight], implementation=implementation)
        return tuple(found)

    def __rmatmul__(self, x: jax.Array) -> jax.Array:
        return self.products(jnp.asarray(x), [self])[0]

    def __repr__(self) -> str:
        return f"QuantizedInputs({self.inputs.format}, {self.weight!r})"


def _planes(codes: jax.Array, scheme: Scheme) -> dict[str, jax.Array]:
    """Returns the fields of codes `[..., K, N]`, as `formats.scaled` lays them out."""
    stored, grid = scheme.stored, scheme.grid
    if stored.planes[0].bits == 8:
        return {"codes": codes.astype(stored.planes[0].dtype)}
    # Stored codes count from 0; a zero point is in their units already.
    unsigned = (codes + 1.0) * 0.5 if grid.binary else codes - grid.low
    whole, below, fields = unsigned.astype(jnp.uint8), 0, {}
    for plane in stored.planes:
        part = whole >> jnp.uint8(below) & jnp.uint8(2**plane.bits - 1)
        folded = functools.partial(fold, bits=plane.bits)
        for _ in range(part.ndim - 2):
            folded = jax.vmap(folded)
        fields[plane.name] = folded(part)
        below += plane.bits
    return fields


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _slowed(x: jax.Array, factor: float) -> jax.Array:
    return x


_slowed.defvjp(lambda x, factor: (x, None), lambda factor, _, g: (g * jnp.asarray(factor, g.dtype),))
