"""`packed_matmul`: checks a product with packed weights, and computes it through one primitive.

Its form in XLA is the caller's, `plain`, who knows the packed format best; without one the matrix is decoded whole. The
choice among implementations is `dispatch.py`'s.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas import _compat
from kernels_pallas.codes import as_bytes
from kernels_pallas.dispatch import Explanation, Implementation, Op, Target, primitive
from kernels_pallas.packed import tpu, triton
from kernels_pallas.packed.layout import KINDS, NUMBERS, Layout, decoded
from kernels_pallas.packed.spec import Call

Plain = Callable[[jax.Array, Mapping[str, jax.Array]], jax.Array]


def packed_oracle(x: jax.Array, fields: Mapping[str, jax.Array], *, layout: Layout) -> jax.Array:
    """Returns `x @ w`, float32 `[R, N]`: the matrix decoded whole, a product at highest precision."""
    return jnp.matmul(x.astype(jnp.float32), decoded(layout, dict(fields)), precision="highest")


def packed_matmul(
    x: jax.Array,
    fields: Mapping[str, jax.Array],
    *,
    layout: Layout,
    plain: Plain | None = None,
    implementation: str | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Returns `x @ w`, float32 `[R, N]`, without the decoded matrix where a kernel computes it.

    Differentiable in x (in reverse, once; the backward pass decodes the matrix whole). Codes and scales are taken for
    constants.

    Args:
        x: float `[R, K]`.
        fields: the arrays that `layout` names. Arrays of float8 are read as bytes.
        layout: how they are packed.
        plain: the product in XLA, of x and the fields, for platforms without a kernel; a function that hashes. None:
            `packed_oracle`.
        implementation: None takes the first that can compute the call where it runs, see `explain`. A name is taken, or
            raises.
        interpret: runs the named implementation in Pallas' interpreter, on any platform and slowly.

    Raises:
        ValueError: the shapes do not fit each other or the layout.
        ImplementationError: the named implementation cannot compute the call.
    """
    call = _checked(layout, x, fields, plain)
    PACKED.check(call, implementation, interpret)
    given = [as_bytes(f) if f.dtype.itemsize == 1 else f for f in (call.fields[n] for n in layout.fields)]
    x, *given = _compat.vary_alike([x, *given])
    return _product((layout, plain, implementation, interpret), x, given)


def explain(
    x: Any,
    fields: Mapping[str, Any],
    *,
    layout: Layout,
    platform: str | None = None,
    architecture: str | None = None,
) -> Explanation:
    """Returns for each implementation whether `packed_matmul` of these operands takes it, and why not.

    Args:
        x, fields: arrays or `jax.ShapeDtypeStruct`.
        layout: as `packed_matmul` takes it.
        platform: "cpu", "cuda", "rocm", "tpu" or another; None: where arrays are computed by default.
        architecture: the chip, as in `Target`; None: that of the first device of the platform, if there is one.
    """
    if platform is None:
        platform = _compat.default_platform()
    architecture = architecture or _compat.device_kind(platform)
    return PACKED.explain(Target(platform, architecture), _checked(layout, x, fields, None))


def _checked(layout: Layout, x: Any, fields: Mapping[str, Any], plain: Plain | None) -> Call:
    if layout.number not in NUMBERS or layout.kind not in KINDS or layout.extra not in ("", "zero", "minimum"):
        raise ValueError(
            f"packed_matmul: the layout {layout.name} has number {layout.number!r}, kind {layout.kind!r} and extra "
            f"{layout.extra!r}; allowed are {', '.join(NUMBERS)}; {', '.join(KINDS)}; zero, minimum or nothing."
        )
    missing = [n for n in layout.fields if n not in fields]
    if missing:
        raise ValueError(
            f"packed_matmul: {', '.join(missing)} missing among {', '.join(fields)}; {layout.name} has "
            f"{', '.join(layout.fields)}."
        )
    call = Call(layout, x, {n: fields[n] for n in layout.fields}, plain)
    if len(x.shape) != 2 or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"packed_matmul: x is {x.dtype}{list(x.shape)} and must be floats [R, K].")
    blocks, columns = call.blocks, call.columns
    if x.shape[1] != blocks * layout.block:
        raise ValueError(
            f"packed_matmul: x [R, K] {list(x.shape)} does not fit {blocks} blocks of {layout.block} weights, which "
            f"are K={blocks * layout.block}."
        )
    shapes: dict[str, tuple[Any, ...]] = {p.name: (blocks, layout.rows(p), columns) for p in layout.planes}
    runs = blocks * layout.block // layout.run if layout.run else blocks
    shapes |= {n: (runs, columns) for n in layout.fields if n not in shapes}
    if layout.kind in ("six_bits", "int8"):
        shapes["scales"] = (blocks, 12 if layout.kind == "six_bits" else layout.block // layout.sub, columns)
    for name, shape in shapes.items():
        if tuple(call.fields[name].shape) != shape:
            raise ValueError(
                f"packed_matmul: {name} of {layout.name} has the shape {list(call.fields[name].shape)} and must have "
                f"{list(shape)}."
            )
    return call


def _call(x: Any, *fields: Any, layout: Layout, plain: Any) -> Call:
    return Call(layout, x, dict(zip(layout.fields, fields, strict=True)), plain)


def _shapes(call: Call) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct((call.x.shape[0], call.columns), jnp.float32)]


def _folded(bind: Any, operands: Any, axes: Any, **params: Any) -> Any:
    """A mapped x becomes more rows; mapped weights go one by one."""
    x, *fields = operands
    if all(axis is None for axis in axes[1:]):
        x = jnp.moveaxis(x, axes[0], 0)
        (y,) = bind.bind(x.reshape(-1, x.shape[2]), *fields, **params)
        return [y.reshape(x.shape[0], -1, y.shape[1])], [0]
    front = [a if axis is None else jnp.moveaxis(a, axis, 0) for a, axis in zip(operands, axes, strict=True)]
    moving = [a for a, axis in zip(front, axes, strict=True) if axis is not None]

    def one(parts: list[jax.Array]) -> Any:
        left = iter(parts)
        return bind.bind(*(a if axis is None else next(left) for a, axis in zip(front, axes, strict=True)), **params)

    return jax.lax.map(one, moving), [0]


def _xla(target: Target, call: Call, interpret: bool) -> list[jax.Array]:
    if call.plain is None:
        return [packed_oracle(call.x, call.fields, layout=call.layout)]
    return [call.plain(call.x, call.fields)]


PACKED = Op(
    "packed_matmul",
    (
        Implementation("triton", triton.refusal, {"forward": triton.forward}, home="cuda"),
        Implementation("mosaic_tpu", tpu.refusal, {"forward": tpu.forward}, home="tpu"),
        Implementation("xla", lambda target, call: "", {"forward": _xla}),
    ),
)
_forward = primitive(PACKED, "forward", _call, _shapes, _folded)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(static: Any, x: jax.Array, fields: list[jax.Array]) -> jax.Array:
    layout, plain, implementation, interpret = static
    params = {"layout": layout, "plain": plain, "implementation": implementation, "interpret": interpret}
    return _forward.bind(x, *fields, **params)[0]


def _product_forward(static: Any, x: jax.Array, fields: list[jax.Array]) -> Any:
    return _product(static, x, fields), (jnp.zeros((0,), x.dtype), fields)


def _product_backward(static: Any, kept: Any, cotangent: jax.Array) -> Any:
    like, fields = kept
    matrix = decoded(static[0], dict(zip(static[0].fields, fields, strict=True)))
    gradient = jnp.matmul(cotangent, matrix.T, precision="highest").astype(like.dtype)
    return gradient, None


_product.defvjp(_product_forward, _product_backward)
