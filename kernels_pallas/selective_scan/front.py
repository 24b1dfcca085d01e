"""`selective_scan`: checks a call, and computes it through one primitive forward and one backward.

The backward pass keeps the operands and the state before each chunk of tokens, and computes the states within a chunk
again: O(T / chunk + chunk) states of `[B, I, S]`, where plain autodiff of a loop keeps several for each token. Beside
them the operands are laid out by tokens: O(B T I).
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from kernels_pallas import _compat
from kernels_pallas.dispatch import Explanation, Implementation, Op, Target, primitive
from kernels_pallas.selective_scan import tpu, triton, xla
from kernels_pallas.selective_scan.facts import facts
from kernels_pallas.tuning import Facts

_NAMES = ("x", "dt", "decay", "b", "c", "state")


class Call(NamedTuple):
    """A call as implementations see it: arrays, or their types, by name; `keep`: states before chunks are wanted."""

    arrays: dict[str, Any]
    chunk: int
    keep: bool = False

    @property
    def wide(self) -> Any:
        """The dtype of states and sums."""
        return jnp.float64 if self.arrays["x"].dtype == jnp.float64 else jnp.float32

    def __str__(self) -> str:
        shapes = (f"{n} {x.dtype}[{','.join(map(str, x.shape))}]" for n, x in self.arrays.items())
        return f"({', '.join(shapes)})"


def selective_scan(
    x: jax.Array,
    dt: jax.Array,
    decay: jax.Array,
    b: jax.Array,
    c: jax.Array,
    state: jax.Array | None = None,
    *,
    chunk: int = 32,
    implementation: str | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Returns y and the state after the last token as `selective_scan_oracle` does.

    Decays are only ever multiplied, so nothing can overflow, however long the row. O(T * I * S) time. Differentiable
    (in reverse, once) in all arrays, of y and of the state.

    Args:
        x, dt, decay, b, c, state: see `selective_scan_oracle`.
        chunk: tokens between the states that are kept for the backward pass.
        implementation: "triton", "mosaic_tpu", "xla"; None takes the first that can compute the call where it runs,
            forward and backward each by itself. A name is taken for both, or raises.
        interpret: runs the named implementation in Pallas' interpreter, on any platform and slowly.

    Raises:
        ValueError: the shapes do not fit each other.
        ImplementationError: the named implementation cannot compute the call.
    """
    _check(x, dt, decay, b, c, state, chunk)
    given: dict[str, Any] = dict(zip(_NAMES, (x, dt, decay, b, c), strict=False))
    SELECTIVE_SCAN.check(Call(given, chunk), implementation, interpret)
    wide = jnp.float64 if x.dtype == jnp.float64 else jnp.float32
    state = jnp.zeros((x.shape[0], *decay.shape), wide) if state is None else state
    arrays = dict(zip(_NAMES, _compat.vary_alike([x, dt, decay, b, c, state]), strict=True))
    found: Any = _scan((chunk, implementation, interpret), arrays)
    return found[0], found[1]


def explain(
    x: Any,
    dt: Any,
    decay: Any,
    b: Any,
    c: Any,
    *,
    chunk: int = 32,
    platform: str | None = None,
    architecture: str | None = None,
) -> Explanation:
    """Returns for each implementation whether a scan of these operands (or their types) takes it, and why not."""
    _check(x, dt, decay, b, c, None, chunk)
    platform = platform or _compat.default_platform()
    call = Call(dict(zip(_NAMES, (x, dt, decay, b, c), strict=False)), chunk)
    return SELECTIVE_SCAN.explain(Target(platform, architecture or _compat.device_kind(platform)), call)


def _check(x: Any, dt: Any, decay: Any, b: Any, c: Any, state: Any, chunk: int) -> None:
    if len(x.shape) != 3 or len(decay.shape) != 2:
        raise ValueError(
            f"selective_scan: x [B, T, I] {list(x.shape)} and decay [I, S] {list(decay.shape)} must have 3 and 2 axes."
        )
    (batch, length, inner), size = x.shape, decay.shape[1]
    for name, given, expected in (
        ("dt", dt, (batch, length, inner)),
        ("decay", decay, (inner, size)),
        ("b", b, (batch, length, size)),
        ("c", c, (batch, length, size)),
        ("state", state, (batch, inner, size)),
    ):
        if given is not None and tuple(given.shape) != expected:
            raise ValueError(
                f"selective_scan: {name} has the shape {list(given.shape)} and must have {list(expected)} "
                f"(x {list(x.shape)}, decay {list(decay.shape)})."
            )
    if chunk < 1:
        raise ValueError(f"selective_scan: chunk is {chunk}; it counts tokens, at least 1.")


def _call(*operands: Any, fields: tuple[str, ...], chunk: int, keep: bool = False) -> Call:
    return Call(dict(zip(fields, operands, strict=True)), chunk, keep)


def _forward_shapes(call: Call) -> list[jax.ShapeDtypeStruct]:
    x, state = call.arrays["x"], call.arrays["state"]
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype), jax.ShapeDtypeStruct(state.shape, call.wide)]
    if call.keep:
        batch, inner, size = state.shape
        shapes.append(jax.ShapeDtypeStruct((batch, -(-x.shape[1] // call.chunk), size, inner), call.wide))
    return shapes


def _backward_shapes(call: Call) -> list[jax.ShapeDtypeStruct]:
    """Of the operands; of decay for each row of the batch, so that a mapped axis may join it."""
    batch = call.arrays["x"].shape[0]
    operands = {n: call.arrays[n].shape for n in _NAMES}
    operands["decay"] = (batch, *operands["decay"])
    return [jax.ShapeDtypeStruct(shape, call.wide) for shape in operands.values()]


def _folded(bind: Any, operands: Any, axes: Any, **params: Any) -> Any:
    """A mapped axis becomes a part of the batch; one by one where decays are mapped."""
    fields = params["fields"]
    mapped = dict(zip(fields, axes, strict=True))
    count = next(z.shape[a] for z, a in zip(operands, axes, strict=True) if a is not None)
    front = {
        n: z if mapped[n] is None else jnp.moveaxis(z, mapped[n], 0) for n, z in zip(fields, operands, strict=True)
    }
    if mapped["decay"] is not None:
        moving = {n: z for n, z in front.items() if mapped[n] is not None}
        found = jax.lax.map(lambda part: bind.bind(*({**front, **part}[n] for n in fields), **params), moving)
        return found, [0] * len(found)

    def folded(name: str, z: jax.Array) -> jax.Array:
        if name == "decay":
            return z
        z = jnp.broadcast_to(z[None], (count, *z.shape)) if mapped[name] is None else z
        return z.reshape(-1, *z.shape[2:])

    found = bind.bind(*(folded(n, front[n]) for n in fields), **params)
    return [z.reshape(count, -1, *z.shape[1:]) for z in found], [0] * len(found)


def _asks(direction: str, call: Call) -> tuple[str, Facts | None]:
    return f"selective_scan_{direction}", facts(call)


def _both(run: Any) -> dict[str, Any]:
    return {"forward": run.forward, "backward": run.backward}


SELECTIVE_SCAN = Op(
    "selective_scan",
    (
        Implementation("triton", triton.refusal, _both(triton), home="cuda"),
        Implementation("mosaic_tpu", tpu.refusal, _both(tpu), home="tpu"),
        Implementation("xla", lambda target, call: "", _both(xla)),
    ),
    _asks,
)
_forward = primitive(SELECTIVE_SCAN, "forward", _call, _forward_shapes, _folded)
_backward = primitive(SELECTIVE_SCAN, "backward", _call, _backward_shapes, _folded)


def _bind(made: Any, static: Any, arrays: dict[str, jax.Array], **params: Any) -> Any:
    chunk, implementation, interpret = static
    params = {"chunk": chunk, "implementation": implementation, "interpret": interpret, **params}
    return made.bind(*arrays.values(), fields=tuple(arrays), **params)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(static: Any, arrays: dict[str, jax.Array]) -> Any:
    return tuple(_bind(_forward, static, arrays, keep=False))


def _scan_forward(static: Any, arrays: Any) -> Any:
    arrays = {n: z.value for n, z in arrays.items()}
    y, last, states = _bind(_forward, static, arrays, keep=True)
    return (y, last), (arrays, states)


def _scan_backward(static: Any, kept: Any, cotangents: Any) -> Any:
    arrays, states = kept
    of_y, of_last = cotangents
    of_y = jnp.zeros_like(arrays["x"]) if isinstance(of_y, SymbolicZero) else of_y
    of_last = jnp.zeros(arrays["state"].shape, states.dtype) if isinstance(of_last, SymbolicZero) else of_last
    given = {**arrays, "states": states, "of_y": of_y, "of_last": of_last}
    given = dict(zip(given, _compat.vary_alike(list(given.values())), strict=True))
    found = dict(zip(_NAMES, _bind(_backward, static, given), strict=True))
    found["decay"] = jnp.sum(found["decay"], axis=0)
    return ({n: g.astype(arrays[n].dtype) for n, g in found.items()},)


_scan.defvjp(_scan_forward, _scan_backward, symbolic_zeros=True)
