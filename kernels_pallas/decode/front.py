"""`decode_attention`: checks a call, and computes it through one primitive forward and one backward.

The backward pass is plain XLA on every platform (`xla.py`); it puts pages together first. The choice among
implementations is `dispatch.py`'s.
"""

from __future__ import annotations

import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from kernels_pallas import _compat
from kernels_pallas.codes import as_bytes
from kernels_pallas.decode import tpu, triton, xla
from kernels_pallas.decode.facts import facts, tuned
from kernels_pallas.decode.spec import Call, Operands, Results, Spec
from kernels_pallas.dispatch import Explanation, Implementation, Op, Target, primitive
from kernels_pallas.tuning import Facts

_FLOATS = ("float16", "bfloat16", "float32", "float64")
_KINDS = {"int8": "int8", "float8_e4m3fn": "float8", "uint8": "int4"}
_POOLS = ("keys", "values", "key_scale", "value_scale")
_HEADS = ("slopes", "sinks")


def decode_attention(
    query: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    lengths: jax.Array,
    *,
    key_scale: jax.Array | None = None,
    value_scale: jax.Array | None = None,
    pages: jax.Array | None = None,
    window: int | None = None,
    chunk: int | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    slopes: jax.Array | None = None,
    sinks: jax.Array | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
    interpret: bool = False,
) -> Any:
    """Returns attention of T tokens over a cache that holds them already, `[B, T, N, Hv]` in the dtype of `query`.

    Made for one or a few tokens and a long cache; any T will do. Codes are unpacked tile by tile. Rows that see
    nothing give zeros.

    Differentiable (in reverse, once, in plain XLA) in query, scales, slopes and sinks, in keys and values that are
    floats; of the output and of the log-sum-exp.

    >>> q, cache = jnp.ones((1, 1, 4, 16)), jnp.ones((1, 2, 16, 64))  # [B, T, N, H] and [B, K, H, S]
    >>> decode_attention(q, cache, cache.swapaxes(2, 3), jnp.asarray([5])).shape
    (1, 1, 4, 16)

    Args:
        query, keys, values, lengths: see `decode_oracle`, as are all but the last two options. Floats of the cache may
            have another dtype than the query's.
        key_scale, value_scale, pages, slopes, sinks: arrays.
        window, chunk, scale, soft_cap: static.
        return_lse: the pair of output and log-sum-exp, `[B, N, T]`.
        implementation: None takes the first that can compute the call where it runs, see `explain`. A name is taken, or
            raises.
        interpret: runs the named implementation in Pallas' interpreter, on any platform and slowly.

    Raises:
        ValueError: the shapes do not fit each other.
        ImplementationError: the named implementation cannot compute the call.
    """
    ops = Operands(query, keys, values, lengths, key_scale, value_scale, pages, slopes, sinks)
    call = _checked(ops, window=window, chunk=chunk, scale=scale, soft_cap=soft_cap)
    DECODE.check(call, implementation, interpret)
    fields = {n: x for n, x in call.ops._asdict().items() if x is not None}
    fields = {
        n: as_bytes(x) if n in ("keys", "values") and call.spec.kind == "float8" else x for n, x in fields.items()
    }
    names = list(fields)
    alike = dict(zip(names, _compat.vary_alike([fields[n] for n in names]), strict=True))
    smooth = {n: x for n, x in alike.items() if jnp.issubdtype(x.dtype, jnp.floating)}
    fixed = {n: x for n, x in alike.items() if n not in smooth}
    out, lse = cast(tuple[Any, Any], _attend((call.spec, implementation, interpret), smooth, fixed))
    return (out, lse) if return_lse else out


def explain(
    query: Any,
    keys: Any,
    values: Any,
    lengths: Any = None,
    *,
    platform: str | None = None,
    architecture: str | None = None,
    **options: Any,
) -> Explanation:
    """Returns for each implementation whether `decode_attention` of these operands takes it, and why not.

    Args:
        query, keys, values, lengths: arrays or `jax.ShapeDtypeStruct`; `lengths` may be left out.
        platform: "cpu", "cuda", "rocm", "tpu" or another; None: where arrays are computed by default.
        architecture: the chip, as in `Target`; None: that of the first device of the platform, if there is one.
        options: arrays (or their types) and options as `decode_attention` takes them.
    """
    if platform is None:
        platform = _compat.default_platform()
    architecture = architecture or _compat.device_kind(platform)
    lengths = jax.ShapeDtypeStruct((query.shape[0],), jnp.int32) if lengths is None else lengths
    static = {n: options.pop(n) for n in ("window", "chunk", "scale", "soft_cap") if n in options}
    return DECODE.explain(
        Target(platform, architecture), _checked(Operands(query, keys, values, lengths, **options), **static)
    )


def _checked(
    ops: Operands,
    *,
    window: int | None = None,
    chunk: int | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
) -> Call:
    query, keys, values = ops[:3]
    shapes = (
        f"query [B, T, N, H] {query.dtype}{list(query.shape)}, keys [B, K, H, S] {keys.dtype}{list(keys.shape)}, "
        f"values [B, K, S, H] {values.dtype}{list(values.shape)}"
    )
    if not (len(query.shape) == len(keys.shape) == len(values.shape) == 4):
        raise ValueError(f"decode_attention: {shapes} must have 4 axes each.")
    if query.dtype.name not in _FLOATS:
        raise ValueError(f"decode_attention: query is {query.dtype}; it must be one of {', '.join(_FLOATS)}.")
    kind = "float" if keys.dtype.name in _FLOATS else _KINDS.get(keys.dtype.name)
    if kind is None or keys.dtype != values.dtype:
        raise ValueError(
            f"decode_attention: keys are {keys.dtype} and values {values.dtype}; they must be of one dtype of "
            f"{', '.join((*_FLOATS, *_KINDS))} (uint8: two codes of 4 bits)."
        )
    halves = 2 if kind == "int4" else 1
    batch, _, heads, size = query.shape
    kv_heads, slots = keys.shape[1], keys.shape[3]
    first = keys.shape[0]
    if keys.shape[2] * halves != size or heads % kv_heads or (ops.pages is None and first != batch):
        raise ValueError(
            f"decode_attention: {shapes}: B and H must agree{', two channels a byte,' if halves == 2 else ''} and K "
            "must divide N."
        )
    expected: dict[str, tuple[Any, ...]] = {
        "values": (first, kv_heads, slots, values.shape[3]),
        "lengths": (batch,),
        "slopes": (heads,),
        "sinks": (heads,),
    }
    if ops.pages is not None:
        expected["pages"] = (batch, *ops.pages.shape[1:2])
    scales = (first, kv_heads, 2, slots) if kind == "int4" else (first, kv_heads, slots)
    for name in ("key_scale", "value_scale"):
        expected[name] = scales
        if (getattr(ops, name) is None) != (kind == "float"):
            which = "has no place beside floats" if kind == "float" else f"is missing beside codes of {keys.dtype}"
            raise ValueError(f"decode_attention: {name} {which} ({shapes}).")
    for name, shape in expected.items():
        x = getattr(ops, name)
        if x is not None and tuple(x.shape) != shape:
            raise ValueError(
                f"decode_attention: {name} has the shape {list(x.shape)} and must have {list(shape)} ({shapes})."
            )
    for name in ("lengths", "pages"):
        x = getattr(ops, name)
        if x is not None and x.dtype != jnp.int32:
            raise ValueError(f"decode_attention: {name} is {x.dtype} and must be int32.")
    if window is not None and window < 1:
        raise ValueError(f"decode_attention: window is {window}; it counts at least the query itself, 1.")
    if chunk is not None and chunk < 1:
        raise ValueError(f"decode_attention: chunk is {chunk}; a chunk has at least one position.")
    factor = size**-0.5 if scale is None else float(scale)
    return Call(Spec(factor, kind, window, chunk, None if soft_cap is None else float(soft_cap)), ops)


def _call(*operands: Any, spec: Spec, fields: tuple[str, ...], wanted: tuple[str, ...] = ()) -> Call:
    given = dict(zip(fields, operands, strict=True))
    results = Results(*(given.pop(n) for n in Results._fields)) if wanted else None
    return Call(spec, Operands(**given), results, wanted)


def _forward_shapes(call: Call) -> list[jax.ShapeDtypeStruct]:
    query = call.ops.query
    batch, length, heads, _ = query.shape
    wide = jnp.float64 if query.dtype == jnp.float64 else jnp.float32
    size = call.sizes[1] * call.spec.parts
    return [
        jax.ShapeDtypeStruct((batch, length, heads, size), query.dtype),
        jax.ShapeDtypeStruct((batch, heads, length), wide),
    ]


def _backward_shapes(call: Call) -> list[jax.ShapeDtypeStruct]:
    arrays = call.ops._asdict()
    heads = {
        n: jax.ShapeDtypeStruct((call.batch, *arrays[n].shape), arrays[n].dtype) for n in call.wanted if n in _HEADS
    }
    return [heads.get(n, jax.ShapeDtypeStruct(arrays[n].shape, arrays[n].dtype)) for n in call.wanted]


def _folded(bind: Any, operands: Any, axes: Any, **params: Any) -> Any:
    """A mapped axis becomes the outer part of the batch, or of the pages; mapped slopes and sinks go one by one."""
    fields = params["fields"]
    given, mapped = dict(zip(fields, operands, strict=True)), dict(zip(fields, axes, strict=True))
    count = next(x.shape[a] for x, a in zip(operands, axes, strict=True) if a is not None)
    front = {n: x if mapped[n] is None else jnp.moveaxis(x, mapped[n], 0) for n, x in given.items()}
    if any(mapped.get(n) is not None for n in _HEADS):
        moving = {n: x for n, x in front.items() if mapped[n] is not None}
        results = jax.lax.map(lambda parts: bind.bind(*({**front, **parts}[n] for n in fields), **params), moving)
        return results, [0] * len(results)
    # Pages that all share stay as they are, but for gradients, which each has of its own.
    apart = "pages" not in given or "wanted" in params or any(mapped[n] is not None for n in _POOLS if n in given)

    def folded(name: str) -> jax.Array:
        x = front[name]
        if name in _HEADS or (name in _POOLS and not apart):
            return x
        x = jnp.broadcast_to(x[None], (count, *x.shape)) if mapped[name] is None else x
        if name == "pages" and apart:
            pool = front["keys"].shape[0 if mapped["keys"] is None else 1]
            first = jax.lax.broadcasted_iota(x.dtype, (count, 1, 1), 0) * pool
            x = jnp.where((x >= 0) & (x < pool), x + first, -1)
        return x.reshape(count * x.shape[1], *x.shape[2:])

    results = bind.bind(*(folded(n) for n in fields), **params)
    return [x.reshape(count, x.shape[0] // count, *x.shape[1:]) for x in results], [0] * len(results)


def _xla_forward(target: Target, call: Call, interpret: bool) -> Any:
    return xla.forward(call, target.platform, tuned(target, call, "xla"))


def _xla_backward(target: Target, call: Call, interpret: bool) -> Any:
    return xla.backward(call, target.platform)


def _asks(direction: str, call: Call) -> tuple[str, Facts | None]:
    """The backward pass has one implementation, and nothing to ask."""
    return f"decode_attention_{direction}", facts(call) if direction == "forward" else None


DECODE = Op(
    "decode_attention",
    (
        Implementation("triton", triton.refusal, {"forward": triton.forward}, home="cuda"),
        Implementation("mosaic_tpu", tpu.refusal, {"forward": tpu.forward}, home="tpu"),
        Implementation("xla", lambda target, call: "", {"forward": _xla_forward, "backward": _xla_backward}),
    ),
    _asks,
)
_forward = primitive(DECODE, "forward", _call, _forward_shapes, _folded)
_backward = primitive(DECODE, "backward", _call, _backward_shapes, _folded)


@jax.tree_util.register_static
class _Wanted(tuple):
    """Names of operands whose gradients are asked for: static in what the backward pass keeps."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(static: Any, smooth: dict[str, jax.Array], fixed: dict[str, jax.Array]) -> Any:
    spec, implementation, interpret = static
    arrays = {**smooth, **fixed}
    params = {"spec": spec, "implementation": implementation, "interpret": interpret}
    return tuple(_forward.bind(*arrays.values(), fields=tuple(arrays), **params))


def _attend_forward(static: Any, smooth: Any, fixed: Any) -> Any:
    wanted = _Wanted(n for n in smooth if smooth[n].perturbed)
    smooth, fixed = ({n: x.value for n, x in part.items()} for part in (smooth, fixed))
    out, lse = cast(tuple[Any, Any], _attend(static, smooth, fixed))
    return (out, lse), (smooth, fixed, out, lse, wanted)


def _attend_backward(static: Any, kept: Any, cotangents: Any) -> Any:
    smooth, fixed, out, lse, wanted = kept
    given = (
        jnp.zeros_like(x) if isinstance(g, SymbolicZero) else g for g, x in zip(cotangents, (out, lse), strict=True)
    )
    arrays = {**smooth, **fixed, **Results(out, lse, *given)._asdict()}
    names = list(arrays)
    arrays = dict(zip(names, _compat.vary_alike([arrays[n] for n in names]), strict=True))
    gradients: dict[str, Any] = dict.fromkeys(smooth)
    if wanted:
        found = _backward.bind(
            *arrays.values(), fields=tuple(arrays), wanted=tuple(wanted), spec=static[0], implementation="xla",
            interpret=False,
        )  # fmt: skip
        gradients.update(zip(wanted, found, strict=True))
    for name in _HEADS:
        if gradients.get(name) is not None:
            gradients[name] = jnp.sum(gradients[name], axis=0)
    return gradients, None


_attend.defvjp(_attend_forward, _attend_backward, symbolic_zeros=True)
