"""`grouped_matmul`: checks a call, and computes it through one primitive for rows and one for matrices.

    rows   y[r] = x[r] @ w[e]                                       (or w[e]^T)
    sums   d[e] = sum over the rows of group e of x[r] y[r]^T

Each is the other's gradient, so that derivatives of any order in reverse follow:

    dx = rows(dy, w^T)      dw = sums(x, dy)      and of d:   dx = rows(y, d^T)      dy = rows(x, d)

The primitives see segments, which `vmap` multiplies: segment s is of the rows `start[s] .. start[s] + size[s] - 1`
and has the matrix `s mod E`. So a mapped axis becomes more rows and more segments, and nothing runs in turn. Segments
lie in ascending order and do not overlap; rows of no segment give zeros.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas import _compat
from kernels_pallas.dispatch import Explanation, Implementation, Op, Target, primitive
from kernels_pallas.grouped_matmul import tpu, triton, xla
from kernels_pallas.grouped_matmul.facts import facts
from kernels_pallas.tuning import Facts

_DTYPES = ("float16", "bfloat16", "float32", "float64")


class Call(NamedTuple):
    """A call as implementations see it: arrays, or their types.

    `second` is w `[E, K, N]` (`[E, N, K]` where `transposed`) for rows, y `[R, N]` for sums. Rows of no segment lie
    behind the others in each of `parts` equal parts of the rows.
    """

    direction: str
    x: Any
    second: Any
    starts: Any
    sizes: Any
    transposed: bool = False
    parts: int = 1

    @property
    def width(self) -> Any:
        """N."""
        return self.second.shape[1 if self.transposed else -1]

    def __str__(self) -> str:
        named = {"x": self.x, "w" if self.direction == "rows" else "y": self.second, "sizes": self.sizes}
        return "(" + ", ".join(f"{n} {x.dtype}[{','.join(map(str, x.shape))}]" for n, x in named.items()) + ")"


def grouped_matmul(
    x: jax.Array, w: jax.Array, sizes: jax.Array, *, implementation: str | None = None, interpret: bool = False
) -> jax.Array:
    """Returns the products `[R, N]` as `grouped_matmul_oracle` defines them, in the dtype of x.

    O(R * K * N) time, whatever E is. Differentiable (in reverse, any number of times) in x and w.

    Args:
        x: `[R, K]`, rows sorted by group.
        w: `[E, K, N]`, of the same dtype.
        sizes: integers `[E]`, rows of each group; their sum is at most R.
        implementation: "triton", "mosaic_tpu", "xla"; None takes the first that can compute the call where it runs. A
            name is taken, or raises.
        interpret: runs the named implementation in Pallas' interpreter, on any platform and slowly.

    Raises:
        ValueError: the shapes do not fit each other.
        ImplementationError: the named implementation cannot compute the call.
    """
    call = _checked(x, w, sizes)
    GROUPED_MATMUL.check(call, implementation, interpret)
    sizes = sizes.astype(jnp.int32)
    x, w, starts, sizes = _compat.vary_alike([x, w, jnp.cumsum(sizes, dtype=jnp.int32) - sizes, sizes])
    return _rows((False, implementation, interpret), x, w, (starts, sizes))


def explain(x: Any, w: Any, sizes: Any, *, platform: str | None = None, architecture: str | None = None) -> Explanation:
    """Returns for each implementation whether a product of these operands (or their types) takes it, and why not."""
    platform = platform or _compat.default_platform()
    return GROUPED_MATMUL.explain(
        Target(platform, architecture or _compat.device_kind(platform)), _checked(x, w, sizes)
    )


def _checked(x: Any, w: Any, sizes: Any) -> Call:
    shapes = f"x [R, K] {list(x.shape)}, w [E, K, N] {list(w.shape)} and sizes [E] {list(sizes.shape)}"
    if (len(x.shape), len(w.shape), len(sizes.shape)) != (2, 3, 1):
        raise ValueError(f"grouped_matmul: {shapes} must have 2, 3 and 1 axes.")
    if x.shape[1] != w.shape[1] or w.shape[0] != sizes.shape[0]:
        raise ValueError(f"grouped_matmul: {shapes} do not fit each other: K and E must agree.")
    if isinstance(w.shape[0], int) and w.shape[0] == 0:
        raise ValueError(f"grouped_matmul: {shapes} have no group, and there must be one.")
    if x.dtype != w.dtype or x.dtype.name not in _DTYPES:
        raise ValueError(
            f"grouped_matmul: x and w are {x.dtype} and {w.dtype}; they must be of one dtype of {', '.join(_DTYPES)}: "
            "write w.astype(x.dtype)."
        )
    if not jnp.issubdtype(sizes.dtype, jnp.integer):
        raise ValueError(f"grouped_matmul: sizes are {sizes.dtype} and must be integers.")
    return Call("rows", x, w, sizes, sizes)


def _rows_call(x: Any, w: Any, starts: Any, sizes: Any, *, transposed: bool, parts: int) -> Call:
    return Call("rows", x, w, starts, sizes, transposed, parts)


def _sums_call(x: Any, y: Any, starts: Any, sizes: Any, *, parts: int) -> Call:
    return Call("sums", x, y, starts, sizes, parts=parts)


def _rows_shapes(call: Call) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct((call.x.shape[0], call.width), call.x.dtype)]


def _sums_shapes(call: Call) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct((call.sizes.shape[0], call.x.shape[1], call.width), call.x.dtype)]


def _folded(bind: Any, operands: Any, axes: Any, **params: Any) -> Any:
    """A mapped axis becomes more rows and more segments; matrices that are not mapped stay as they are."""
    count = next(x.shape[a] for x, a in zip(operands, axes, strict=True) if a is not None)
    x, second, starts, sizes = (
        None if a is None else jnp.moveaxis(x, a, 0) for x, a in zip(operands, axes, strict=True)
    )
    sums = "transposed" not in params

    def spread(moved: Any, plain: Any) -> jax.Array:
        return jnp.broadcast_to(plain[None], (count, *plain.shape)) if moved is None else moved

    x = spread(x, operands[0])
    rows = x.shape[1]
    if sums or second is not None:
        second = spread(second, operands[1])
        second = second.reshape(-1, *second.shape[2:])
    else:
        second = operands[1]
    starts = spread(starts, operands[2]) + (jnp.arange(count, dtype=jnp.int32) * rows)[:, None]
    sizes = spread(sizes, operands[3])
    segments = sizes.shape[1]
    params = {**params, "parts": params["parts"] * count}
    (found,) = bind.bind(x.reshape(-1, x.shape[2]), second, starts.reshape(-1), sizes.reshape(-1), **params)
    return [found.reshape(count, segments if sums else rows, *found.shape[1:])], [0]


def _both(run: Any) -> dict[str, Any]:
    return {"rows": run.rows, "sums": run.sums}


def _asks(direction: str, call: Call) -> tuple[str, Facts | None]:
    return f"grouped_matmul_{direction}", facts(call)


GROUPED_MATMUL = Op(
    "grouped_matmul",
    (
        Implementation("triton", triton.refusal, _both(triton), home="cuda"),
        Implementation("mosaic_tpu", tpu.refusal, _both(tpu), home="tpu"),
        Implementation("xla", lambda target, call: "", _both(xla)),
    ),
    _asks,
)
_rows_primitive = primitive(GROUPED_MATMUL, "rows", _rows_call, _rows_shapes, _folded)
_sums_primitive = primitive(GROUPED_MATMUL, "sums", _sums_call, _sums_shapes, _folded)


def _bind(made: Any, static: Any, *arrays: Any, **params: Any) -> jax.Array:
    alike = _compat.vary_alike(list(arrays))
    return made.bind(*alike, implementation=static[1], interpret=static[2], parts=1, **params)[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rows(static: Any, x: jax.Array, w: jax.Array, segments: Any) -> jax.Array:
    return _bind(_rows_primitive, static, x, w, *segments, transposed=static[0])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sums(static: Any, x: jax.Array, y: jax.Array, segments: Any) -> jax.Array:
    return _bind(_sums_primitive, static, x, y, *segments)


def _turned(static: Any, transposed: bool) -> Any:
    return (transposed, *static[1:])


def _rows_backward(static: Any, kept: Any, dy: jax.Array) -> Any:
    x, w, segments = kept
    pair = (dy, x) if static[0] else (x, dy)
    return _rows(_turned(static, not static[0]), dy, w, segments), _sums(static, *pair, segments), None


def _sums_backward(static: Any, kept: Any, d: jax.Array) -> Any:
    x, y, segments = kept
    return _rows(_turned(static, True), y, d, segments), _rows(_turned(static, False), x, d, segments), None


_rows.defvjp(lambda static, *args: (_rows(static, *args), args), _rows_backward)
_sums.defvjp(lambda static, *args: (_sums(static, *args), args), _sums_backward)
