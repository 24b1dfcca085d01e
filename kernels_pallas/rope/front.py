"""`rope`: checks a call, and computes it through one primitive.

The transpose of a rotation (times a factor) is the rotation by minus the angle: the backward pass is the same program
with the sign of the sine turned. So nothing of x is kept, and the gradient is turned in place as x is.

In place: the kernels declare that their result lies where their operand was (`input_output_aliases`). Where the operand
is a temporary, or donated, XLA then makes no second array; where it is needed afterwards, XLA copies it first, and the
result is as right.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas import _compat
from kernels_pallas.dispatch import Explanation, Implementation, Op, Target, primitive
from kernels_pallas.rope import tpu, triton
from kernels_pallas.rope.xla import turned

_FLOATS = ("float16", "bfloat16", "float32", "float64")


class Call(NamedTuple):
    """A call as implementations see it: arrays, or their types; `inverse` turns by minus the angle."""

    x: Any  # [B, T, N, H]
    cos: Any  # [B or 1, T, R / 2]
    sin: Any
    interleaved: bool
    inverse: bool = False

    @property
    def pairs(self) -> Any:
        """R / 2."""
        return self.cos.shape[2]

    def __str__(self) -> str:
        named = {"x": self.x, "cos": self.cos}
        return "(" + ", ".join(f"{n} {z.dtype}[{','.join(map(str, z.shape))}]" for n, z in named.items()) + ")"


def rope(
    x: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    *,
    interleaved: bool = False,
    implementation: str | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Returns what `rope_oracle` does, `[B, T, N, H]` in the dtype of x.

    Differentiable in x (in reverse, any number of times); cos and sin count as constants.

    >>> x, turn = jnp.ones((1, 2, 1, 4)), jnp.asarray([[[0.0, 0.0], [1.0, 1.0]]])
    >>> rope(x, jnp.cos(turn), jnp.sin(turn))[0, 0, 0]  # the first token is not turned
    Array([1., 1., 1., 1.], dtype=float32)

    Args:
        x, cos, sin, interleaved: see `rope_oracle`.
        implementation: "triton", "mosaic_tpu", "xla"; None takes the first that can compute the call where it runs. A
            name is taken, or raises.
        interpret: runs the named implementation in Pallas' interpreter, on any platform and slowly.

    Raises:
        ValueError: the shapes do not fit each other.
        ImplementationError: the named implementation cannot compute the call.
    """
    call = _checked(x, cos, sin, interleaved)
    ROPE.check(call, implementation, interpret)
    x, cos, sin = _compat.vary_alike([x, *jax.lax.stop_gradient((cos, sin))])
    return _turn((interleaved, implementation, interpret, False), x, (cos, sin))


def explain(
    x: Any,
    cos: Any,
    sin: Any,
    *,
    interleaved: bool = False,
    platform: str | None = None,
    architecture: str | None = None,
) -> Explanation:
    """Returns for each implementation whether a call of these operands (or their types) takes it, and why not."""
    platform = platform or _compat.default_platform()
    target = Target(platform, architecture or _compat.device_kind(platform))
    return ROPE.explain(target, _checked(x, cos, sin, interleaved))


def _checked(x: Any, cos: Any, sin: Any, interleaved: bool) -> Call:
    shapes = f"x [B, T, N, H] {list(x.shape)}, cos [B or 1, T, R / 2] {list(cos.shape)} and sin {list(sin.shape)}"
    if (len(x.shape), len(cos.shape)) != (4, 3) or cos.shape != sin.shape:
        raise ValueError(f"rope: {shapes} must have 4, 3 and 3 axes, and cos and sin one shape.")
    if cos.shape[0] not in (1, x.shape[0]) or cos.shape[1] != x.shape[1]:
        raise ValueError(f"rope: {shapes} do not fit each other: B and T must agree.")
    if isinstance(x.shape[3], int) and not 0 < 2 * cos.shape[2] <= x.shape[3]:
        raise ValueError(f"rope: {shapes}: {2 * cos.shape[2]} of {x.shape[3]} channels cannot be turned.")
    if x.dtype.name not in _FLOATS:
        raise ValueError(f"rope: x is {x.dtype}; it must be one of {', '.join(_FLOATS)}.")
    return Call(x, cos, sin, interleaved)


def _call(x: Any, cos: Any, sin: Any, *, interleaved: bool, inverse: bool) -> Call:
    return Call(x, cos, sin, interleaved, inverse)


def _folded(bind: Any, operands: Any, axes: Any, **params: Any) -> Any:
    """A mapped axis becomes a part of the batch; angles that all share stay as they are."""
    count = next(z.shape[a] for z, a in zip(operands, axes, strict=True) if a is not None)
    spread = [
        None if a is None else jnp.moveaxis(z, a, 0) for z, a in zip(operands, axes, strict=True)
    ]  # fmt: skip
    x = jnp.broadcast_to(operands[0][None], (count, *operands[0].shape)) if spread[0] is None else spread[0]
    batch = x.shape[1]

    def folded(moved: Any, plain: Any) -> jax.Array:
        if moved is None and plain.shape[0] == 1:
            return plain
        z = jnp.broadcast_to(plain[None], (count, *plain.shape)) if moved is None else moved
        return jnp.broadcast_to(z, (count, batch, *z.shape[2:])).reshape(-1, *z.shape[2:])

    # One of cos and sin may be mapped alone: both then have every row.
    alike = any(z is not None for z in spread[1:])
    cos, sin = (
        folded(jnp.broadcast_to(z[None], (count, *z.shape)) if alike and m is None else m, z)
        for m, z in zip(spread[1:], operands[1:], strict=True)
    )
    (found,) = bind.bind(x.reshape(-1, *x.shape[2:]), cos, sin, **params)
    return [found.reshape(count, batch, *found.shape[1:])], [0]


def _xla(target: Target, call: Call, interpret: bool) -> list[jax.Array]:
    """Plain jax, which XLA fuses with what is around."""
    cos, sin = (z[:, :, None] for z in (call.cos, call.sin))
    return [turned(call.x, cos, -sin if call.inverse else sin, interleaved=call.interleaved)]


ROPE = Op(
    "rope",
    (
        Implementation("triton", triton.refusal, {"forward": triton.forward}, home="cuda"),
        Implementation("mosaic_tpu", tpu.refusal, {"forward": tpu.forward}, home="tpu"),
        Implementation("xla", lambda target, call: "", {"forward": _xla}),
    ),
)
_primitive = primitive(
    ROPE, "forward", _call, lambda call: [jax.ShapeDtypeStruct(call.x.shape, call.x.dtype)], _folded
)  # fmt: skip


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _turn(static: Any, x: jax.Array, turn: Any) -> jax.Array:
    interleaved, implementation, interpret, inverse = static
    params = {"implementation": implementation, "interpret": interpret, "interleaved": interleaved}
    return _primitive.bind(*_compat.vary_alike([x, *turn]), **params, inverse=inverse)[0]


def _backward(static: Any, turn: Any, dy: jax.Array) -> Any:
    return _turn((*static[:3], not static[3]), dy, turn), jax.tree.map(jnp.zeros_like, turn)


_turn.defvjp(lambda static, x, turn: (_turn(static, x, turn), turn), _backward)
