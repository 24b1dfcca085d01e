"""Weight-and-activation quantization: a weight that quantizes what it is multiplied with.

    x[t, k] ~ input_scale[t] * (q[t, k] - input_zero[t])      q int8 or float8; a scale for each token t, or one for all
    y[t, n] = input_scale[t] * scale[n] * sum_k (q[t, k] - input_zero[t]) * (codes[k, n] - zero[n])

The sum is one product of codes: int8 by int8 in int32, exact; float8 by float8 in float32. With zero points it is

    sum_k q c - input_zero * sum_k c - zero * sum_k q + K * input_zero * zero

MX formats have their scales within the sum, 32 inputs to each, and need `jax.nn.scaled_matmul`'s hardware.

Scales of the activations are dynamic (the largest magnitude of each token, found on the way) or static: `input_scale`,
calibrated beforehand: the per-token and per-tensor variants of SmoothQuant (arXiv 2211.10438, section 3).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from trustcore.errors import ImplementationError, QuantizationError
from trustcore.ops.weight import Weight
from trustcore.quant.array import QuantizedArray
from trustcore.quant.encode.floats import round_to_float
from trustcore.quant.encode.search import inverse
from trustcore.quant.formats import ScaledFormat
from trustcore.quant.formats.format import stored_rows
from trustcore.quant.matmul import packed_products

INPUTS: Mapping[str, np.dtype] = {
    "int8": np.dtype(np.int8),
    "fp8_e4m3": np.dtype(ml_dtypes.float8_e4m3fn),
    "fp8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
    "mxfp8_e4m3": np.dtype(ml_dtypes.float8_e4m3fn),
    "mxfp8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
}
_FLOAT8_DOT = (8, 9)  # CUDA compute capability from which float8 dots run in hardware (Ada, Hopper)
_SCALED_DOT = (10, 0)  # and dots of MX formats (Blackwell)
_MX_BLOCK = 32


@jax.tree_util.register_pytree_with_keys_class
class ActivationQuantized(Weight):
    """A packed weight `[..., K, N]` whose product quantizes x to `inputs` first.

    Args:
        weight: int8 or float8 under one scale or one for each column, for `inputs` of the same kind (the two float8
            types mix); an MX weight for MX inputs.
        inputs: a name in `INPUTS`.
        input_scale: float32 scalar `[...]`, calibrated: x is clipped to what it reaches. None: each token has its own.
        input_zero: float32 scalar `[...]`, a whole number: the int8 code of x = 0, with a calibrated `input_scale`.
        asymmetric: whether dynamic int8 inputs use the range from the smallest to the largest of a token.

    Raises:
        QuantizationError: the weight and the inputs do not go together.

    Products (`implementation`): "codes" multiplies codes by codes; "dequantize" multiplies the rounded x by the decoded
    weight, tile by tile, the same numbers but for float32's rounding. None takes "codes" for int8 and where the
    hardware multiplies float8 (or MX), else "dequantize". Differentiable in x as if it were not rounded (straight
    through; zero where a calibrated scale clips), and in the weight's scales.
    """

    __slots__ = ("asymmetric", "input_scale", "input_zero", "inputs", "weight")

    def __init__(
        self,
        weight: QuantizedArray,
        inputs: str = "int8",
        *,
        input_scale: Any = None,
        input_zero: Any = None,
        asymmetric: bool = False,
    ):
        self.weight, self.inputs, self.asymmetric = weight, inputs, asymmetric
        self.input_scale, self.input_zero = input_scale, input_zero
        if why := _misfit(self):
            raise QuantizationError(f"{weight!r} with inputs of {inputs!r}: {why}")

    def tree_flatten_with_keys(self) -> tuple[list[tuple[Any, Any]], Any]:
        """Leaves are those of the weight, and the calibrated numbers."""
        names = ("weight", "input_scale", "input_zero")
        return [(jax.tree_util.GetAttrKey(n), getattr(self, n)) for n in names], (self.inputs, self.asymmetric)

    @classmethod
    def tree_unflatten(cls, aux: tuple[str, bool], leaves: Sequence[Any]) -> ActivationQuantized:
        """The inverse of flattening; leaves may be anything that a transform puts there."""
        made = object.__new__(cls)
        made.weight, made.input_scale, made.input_zero = leaves
        made.inputs, made.asymmetric = aux
        return made

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """Logical shape of the weight."""
        return self.weight.shape

    @property
    def ndim(self) -> int:
        """Number of logical axes."""
        return self.weight.ndim

    @property
    def size(self) -> int:
        """Number of weights."""
        return self.weight.size

    @property
    def dtype(self) -> np.dtype:
        """Dtype of a decoded weight: float32."""
        return self.weight.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the weight and the calibrated numbers."""
        own = [value for value in (self.input_scale, self.input_zero) if value is not None]
        return self.weight.nbytes + sum(int(np.prod(v.shape)) * np.dtype(v.dtype).itemsize for v in own)

    @property
    def T(self) -> ActivationQuantized:
        """The transpose, sharing the fields."""
        leaves = [self.weight.T, self.input_scale, self.input_zero]
        return self.tree_unflatten((self.inputs, self.asymmetric), leaves)

    def dequantize(self) -> jax.Array:
        """Returns the whole weight as float32."""
        return self.weight.dequantize()

    def take(self, indices: jax.Array) -> jax.Array:
        """Returns rows of a transposed table, decoded; see `QuantizedArray.take`."""
        return self.weight.take(indices)

    @classmethod
    def products(
        cls, x: jax.Array, weights: Sequence[Weight], *, implementation: str | None = None
    ) -> tuple[jax.Array, ...]:
        """Returns `x @ w` for each weight, x quantized for each on its own."""
        return tuple(_product(x, w, implementation) for w in weights)  # type: ignore[arg-type]

    def __rmatmul__(self, x: jax.Array) -> jax.Array:
        return self.products(jnp.asarray(x), [self])[0]

    def __repr__(self) -> str:
        how = "static" if self.input_scale is not None else "dynamic"
        return f"ActivationQuantized({self.weight!r}, {self.inputs} inputs, {how})"


def quantize_activations(
    tree: Any,
    inputs: str = "int8",
    *,
    where: Callable[[str, Any], bool] | None = None,
    input_scales: Mapping[str, Any] | None = None,
    input_zeros: Mapping[str, Any] | None = None,
    asymmetric: bool = False,
) -> Any:
    """Returns `tree` with its packed weights quantizing their inputs too; the tree that was given stays as it is.

    Args:
        tree: a pytree with `QuantizedArray`s.
        inputs: a name in `INPUTS`.
        where: which of them, by (path, weight). None: all that go with `inputs`, but for transposed tables.
        input_scales: paths to calibrated scales. Weights without one find theirs on the way.
        input_zeros: paths to calibrated zero points.
        asymmetric: see `ActivationQuantized`.

    Raises:
        QuantizationError: a selected weight does not go with `inputs`, a path is not there, or nothing is selected; all
            faults in one message.
    """
    from trustcore.quant.quantize import path_name

    scales, zeros = dict(input_scales or {}), dict(input_zeros or {})
    flat, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda node: isinstance(node, Weight))
    faults, leaves, paths, selected = [], [], [], 0
    for place, leaf in flat:
        path = path_name(place)
        paths.append(path)
        wrapped = leaf
        chosen = isinstance(leaf, QuantizedArray) and (
            where(path, leaf) if where else not leaf.transposed and not _weight_misfit(leaf, inputs)
        )
        if chosen:
            selected += 1
            try:
                wrapped = ActivationQuantized(
                    leaf, inputs, input_scale=scales.get(path), input_zero=zeros.get(path), asymmetric=asymmetric
                )
            except QuantizationError as error:
                faults.append(f"{path}: {error}")
        leaves.append(wrapped)
    faults += [f"input scale {path!r} is no path of the tree" for path in {**scales, **zeros} if path not in paths]
    if not selected and not faults:
        faults.append(f"no packed weight of the tree goes with inputs of {inputs!r}; quantize the weights first")
    if faults:
        raise QuantizationError(f"quantize_activations: {'; '.join(faults[:20])}")
    return jax.tree_util.tree_unflatten(structure, leaves)


def quantize_inputs(
    x: jax.Array, inputs: str, *, scale: Any = None, zero: Any = None, asymmetric: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Returns codes `[rows, K]`, scales and zero points (float32 `[rows, 1]`, or `[1, 1]` where calibrated).

        x ~ scale * (codes - zero)

    Args:
        x: float32 `[rows, K]`.
        inputs: "int8", "fp8_e4m3" or "fp8_e5m2".
        scale: calibrated, a scalar; None: from each row.
        zero: calibrated, a scalar.
        asymmetric: whether rows of int8 codes get a zero point.
    """
    dtype = INPUTS[inputs]
    shift = None
    if scale is not None:
        scale = jnp.asarray(scale, jnp.float32).reshape(1, 1)
        shift = None if zero is None else jnp.asarray(zero, jnp.float32).reshape(1, 1)
    elif asymmetric:
        low = jnp.minimum(jnp.min(x, axis=1, keepdims=True), 0)
        scale = (jnp.maximum(jnp.max(x, axis=1, keepdims=True), 0) - low) / 255
        shift = jnp.round(-low * inverse(scale)) - 128
    else:
        largest = 127.0 if dtype == np.int8 else float(ml_dtypes.finfo(dtype).max)
        scale = jnp.max(jnp.abs(x), axis=1, keepdims=True) / largest
    relative = x * inverse(scale)
    if dtype != np.int8:
        return round_to_float(relative, dtype).astype(dtype), scale, None
    if shift is None:
        return jnp.clip(jnp.round(relative), -127, 127).astype(jnp.int8), scale, None
    return jnp.clip(jnp.round(relative) + shift, -128, 127).astype(jnp.int8), scale, shift


def choose(w: ActivationQuantized, implementation: str | None = None) -> str:
    """Returns "codes" or "dequantize".

    Raises:
        ImplementationError: the one that was named cannot compute this product, and why.
    """
    why = _codes_refusal(w)
    if implementation is None:
        return "dequantize" if why or _slow_here(w.inputs) else "codes"
    if implementation not in ("codes", "dequantize"):
        raise ImplementationError(
            f"linear: implementation {implementation!r} is not known for {w!r}; choose from codes, dequantize or None."
        )
    if implementation == "codes" and why:
        raise ImplementationError(f"linear: 'codes' cannot multiply by {w!r}: {why}")
    return implementation


def _product(x: jax.Array, w: ActivationQuantized, implementation: str | None) -> jax.Array:
    if w.ndim != 2 or w.shape[0] != x.shape[-1]:
        raise ImplementationError(f"linear: x {x.dtype}{list(x.shape)} does not fit {w!r}: K must agree.")
    rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    y: jax.Array = _rounded(rows, w, choose(w, implementation))
    return y.reshape(*x.shape[:-1], -1).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _rounded(x: jax.Array, w: ActivationQuantized, implementation: str) -> jax.Array:
    if implementation == "codes":
        return _mx_codes(x, w) if w.inputs.startswith("mx") else _codes(x, w)
    return packed_products(_rounded_inputs(x, w), [w.weight])[0]


def _rounded_inputs(x: jax.Array, w: ActivationQuantized) -> jax.Array:
    """Returns x as its codes have it, float32."""
    if w.inputs.startswith("mx"):
        return QuantizedArray.quantize(x.T, w.inputs, search=False).dequantize().T
    codes, scale, zero = quantize_inputs(x, w.inputs, scale=w.input_scale, zero=w.input_zero, asymmetric=w.asymmetric)
    numbers = codes.astype(jnp.float32)
    return (numbers if zero is None else numbers - zero) * scale


def _codes(x: jax.Array, w: ActivationQuantized) -> jax.Array:
    codes, fields = _spec(w.weight).codes(w.weight.fields), w.weight.fields
    x = stored_rows(x, fields.get("order"), -1)
    q, scale, shift = quantize_inputs(x, w.inputs, scale=w.input_scale, zero=w.input_zero, asymmetric=w.asymmetric)
    whole = w.inputs == "int8"
    accumulate = jnp.int32 if whole else jnp.float32
    total = jax.lax.dot_general(q, codes, (((1,), (0,)), ((), ())), preferred_element_type=accumulate)
    total = total.astype(jnp.float32)
    zero = fields.get("zero")
    if shift is not None:
        total = total - shift * jnp.sum(codes, axis=0, keepdims=True, dtype=jnp.int32).astype(jnp.float32)
    if zero is not None:
        zero = zero.astype(jnp.float32)
        total = total - jnp.sum(q, axis=1, keepdims=True, dtype=jnp.int32).astype(jnp.float32) * zero
        total = total if shift is None else total + x.shape[1] * shift * zero
    return total * scale * fields["scale"].astype(jnp.float32)


def _mx_codes(x: jax.Array, w: ActivationQuantized) -> jax.Array:
    """The hardware's own product: blocks of 32 along K under powers of two on both sides."""
    return jax.nn.scaled_matmul(*mx_operands(x, w))[0]


def mx_operands(x: jax.Array, w: ActivationQuantized) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Returns what a scaled dot takes: codes `[1, rows, K]`, `[1, N, K]`, scales `[1, rows, K/32]`, `[1, N, K/32]`."""
    fields = w.weight.fields
    inputs = QuantizedArray.quantize(stored_rows(x, fields.get("order"), -1).T, w.inputs, search=False).fields

    def powers(scale: jax.Array) -> jax.Array:
        return jax.lax.bitcast_convert_type(scale, jnp.float8_e8m0fnu)

    return (
        inputs["codes"].T[None],
        fields["codes"].T[None],
        powers(inputs["scale"]).T[None],
        powers(fields["scale"]).T[None],
    )


def _forward(x: jax.Array, w: ActivationQuantized, implementation: str) -> Any:
    return _rounded(x, w, implementation), (x, w)


def _backward(implementation: str, residuals: Any, g: jax.Array) -> Any:
    x, w = residuals
    _, pull = jax.vjp(lambda x, weight: packed_products(x, [weight])[0], _rounded_inputs(x, w), w.weight)
    dx, dweight = pull(g)
    if w.input_scale is not None:
        dx = jnp.where(_within(x, w), dx, 0)
    fixed = [None if v is None else jnp.zeros_like(v) for v in (w.input_scale, w.input_zero)]
    return dx, ActivationQuantized.tree_unflatten((w.inputs, w.asymmetric), [dweight, *fixed])


def _within(x: jax.Array, w: ActivationQuantized) -> jax.Array:
    """Returns where x is not clipped."""
    dtype = INPUTS[w.inputs]
    high = 127.0 if dtype == np.int8 else float(ml_dtypes.finfo(dtype).max)
    relative = x * inverse(jnp.asarray(w.input_scale, jnp.float32)).reshape(1, 1)
    if dtype != np.int8:
        return jnp.abs(relative) <= high
    zero = 0 if w.input_zero is None else jnp.asarray(w.input_zero, jnp.float32).reshape(1, 1)
    relative = jnp.round(relative) + zero
    return (relative >= (-127 if w.input_zero is None else -128)) & (relative <= high)


_rounded.defvjp(_forward, _backward)


def _spec(weight: QuantizedArray) -> ScaledFormat:
    spec = weight.spec
    assert isinstance(spec, ScaledFormat)
    return spec


def _misfit(w: ActivationQuantized) -> str:
    """Returns why the parts do not go together; "" when they do."""
    if why := _weight_misfit(w.weight, w.inputs):
        return why
    if w.asymmetric and (w.inputs != "int8" or w.input_scale is not None):
        return "asymmetric is for dynamic int8 inputs; calibrated ones take an input_zero."
    if w.input_zero is not None and (w.inputs != "int8" or w.input_scale is None):
        return "an input_zero goes with int8 inputs and a calibrated input_scale."
    if w.input_scale is not None and w.inputs.startswith("mx"):
        return "MX inputs have a scale for each 32 and take no input_scale."
    return ""


def _weight_misfit(weight: QuantizedArray, inputs: str) -> str:
    if inputs not in INPUTS:
        return f"inputs must be one of {', '.join(INPUTS)}."
    kind = inputs[:3]
    kinds = [name for name in INPUTS if name.startswith(kind)]
    if weight.format not in kinds:
        return f"the weight must be {' or '.join(kinds)}; quantize it so first."
    if kind == "mxf":
        return ""
    *_, g, _ = weight.fields["scale"].shape
    _, span = _spec(weight).granularity(weight.fields)
    if g != 1 or span > 1:
        return f"its scales must not change along K: write {weight.format}:channel or {weight.format}:tensor."
    return ""


def _codes_refusal(w: ActivationQuantized) -> str:
    """Returns why codes cannot be multiplied with codes."""
    if w.inputs.startswith("mx"):
        if w.weight.transposed:
            return "its blocks run along the output axis; use 'dequantize'."
        if not _capable(_SCALED_DOT):
            return f"scaled dots need an NVIDIA GPU of compute capability 10 (Blackwell); this is {_device()}."
        return ""
    if w.weight.transposed:
        return "its scales belong to the axis that is summed over; use 'dequantize'."
    return ""


def _slow_here(inputs: str) -> bool:
    """Returns whether a product of such codes has no hardware here: XLA then widens them, whole."""
    return inputs.startswith("fp8") and not (jax.default_backend() == "tpu" or _capable(_FLOAT8_DOT))


def _capable(least: tuple[int, int]) -> bool:
    if jax.default_backend() != "gpu":
        return False
    capability = getattr(jax.devices()[0], "compute_capability", "0.0")
    return tuple(int(part) for part in str(capability).split(".")) >= least


def _device() -> str:
    device = jax.devices()[0]
    return f"{device.platform} ({device.device_kind})"
