"""`attention`: checks a call, and computes it through one primitive forward and one backward.

The backward pass keeps operands, output and log-sum-exp. Gradients of bias, slopes and relative positions are computed
where they are asked for alone. The choice among implementations is `dispatch.py`'s.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.sharding import PartitionSpec

from kernels_pallas import _compat, sharded
from kernels_pallas.attention import cudnn, mosaic_gpu, tpu, triton, xla
from kernels_pallas.attention import split as splitting
from kernels_pallas.attention.block_mask import BlockMask, checked
from kernels_pallas.attention.facts import facts, tuned
from kernels_pallas.attention.oracle import dropout_seed, window_bounds
from kernels_pallas.attention.spec import FLOAT8, Operands, Spec, working_dtype
from kernels_pallas.dispatch import Explanation, Implementation, ImplementationError, Op, Target, primitive

_BY_BATCH = ("query", "key", "value", "query_positions", "key_positions", "query_segments", "key_segments")
_BROADCAST = ("mask", "bias", "block_counts", "block_indices", "query_scale", "key_scale", "value_scale")
_ROWS = ("lse", "delta", "cotangent")
_SMOOTH = ("query", "key", "value", "bias", "slopes", "relative", "sinks")
_DTYPES = ("float16", "bfloat16", "float32", "float64")


class Call(NamedTuple):
    """A call as implementations see it: arrays or their types, `lse` and what follows for the backward pass alone."""

    spec: Spec
    ops: Operands
    lse: Any = None
    delta: Any = None
    cotangent: Any = None
    wanted: tuple[str, ...] = ()

    def __str__(self) -> str:
        shapes = {n: x for n, x in self.ops._asdict().items() if x is not None}
        return "(" + ", ".join(f"{n} {x.dtype}[{','.join(map(str, x.shape))}]" for n, x in shapes.items()) + ")"


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    query_positions: jax.Array | None = None,
    key_positions: jax.Array | None = None,
    query_segments: jax.Array | None = None,
    key_segments: jax.Array | None = None,
    mask: jax.Array | None = None,
    block_mask: BlockMask | None = None,
    bias: jax.Array | None = None,
    slopes: jax.Array | None = None,
    relative: jax.Array | None = None,
    sinks: jax.Array | None = None,
    causal: bool = True,
    window: int | tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    dropout: float = 0.0,
    dropout_key: jax.Array | None = None,
    query_scale: jax.Array | None = None,
    key_scale: jax.Array | None = None,
    value_scale: jax.Array | None = None,
    split: PartitionSpec | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
    interpret: bool = False,
) -> Any:
    """Returns attention outputs `[B, T, N, Hv]` in the dtype of `query`; arguments as in `attention_oracle`.

    float8 codes give outputs in bfloat16 and no gradient. Their products are those of the codes, exact but for the sum;
    the weights of the softmax are bfloat16 where they meet the values, which become bfloat16 as well, exactly (on the
    CPU both are float32).

    Scores and sums are float32 (float64 for float64). Beyond operands and results it takes O(T) memory, forward and
    backward. Blocks that no query sees are skipped.

    Differentiable (in reverse, once) in query, key, value, bias, slopes, relative and sinks, of the output and of the
    log-sum-exp.

    Args:
        query, key, value: float16, bfloat16, float32, float64, float8_e4m3fn or float8_e5m2, all of one dtype.
        query_positions, key_positions, query_segments, key_segments: see `attention_oracle`, as are those that follow.
        mask, bias, slopes, relative, sinks: arrays.
        block_mask: a `BlockMask`: blocks that it does not list are not computed.
        causal, window, scale, soft_cap, dropout: static.
        dropout_key: a key of `jax.random`.
        query_scale, key_scale, value_scale: of float8 codes, see `attention_oracle`; None: 1.
        split: on a mesh with automatic axes (that of `jax.set_mesh`), over which of them batch and heads are split:
            `jax.P("data", "model")`. On one with explicit axes the operands' types say it. Each device computes its
            own rows and heads; with dropout, drops others than one device alone would.
        return_lse: the pair of output and log-sum-exp, `[B, N, T]`.
        implementation: None takes the first that can compute the call where it runs, see `explain`. A name is taken, or
            raises.
        interpret: runs the named implementation in Pallas' interpreter, on any platform and slowly.

    Raises:
        ValueError: the shapes do not fit each other.
        ImplementationError: the named implementation cannot compute the call.
    """
    call = _checked(
        Operands(
            query, key, value, query_positions, key_positions, query_segments, key_segments, mask, bias, slopes,
            relative, sinks, dropout_seed(dropout_key) if dropout else None,
            query_scale=query_scale, key_scale=key_scale, value_scale=value_scale,
        ),
        causal=causal, window=window, scale=scale, soft_cap=soft_cap, dropout=dropout, block_mask=block_mask,
    )  # fmt: skip
    ATTENTION.check(call, implementation, interpret)
    arrays = {n: x for n, x in call.ops._asdict().items() if x is not None}
    static = call.spec, implementation, interpret
    parts = splitting.parts(arrays, split)
    if parts is None:
        out, lse = _attended(static, arrays)
    else:
        batch, heads = parts
        out, lse = sharded.over(
            functools.partial(_attended, static, parts=parts),
            arrays,
            splitting.specs(arrays, parts),
            (PartitionSpec(batch, None, heads), PartitionSpec(batch, heads)),
        )
    return (out, lse) if return_lse else out


def _attended(static: Any, arrays: dict[str, jax.Array], parts: PartitionSpec | None = None) -> tuple[Any, Any]:
    if parts is not None and "seed" in arrays:
        arrays = {**arrays, "seed": splitting.own_seed(arrays["seed"], parts)}
    alike = dict(zip(arrays, _compat.vary_alike(list(arrays.values())), strict=True))
    smooth = {n: x for n, x in alike.items() if n in _SMOOTH}
    fixed = {n: x for n, x in alike.items() if n not in _SMOOTH}
    return cast(tuple[Any, Any], _attend(static, smooth, fixed))


def explain(
    query: Any, key: Any, value: Any, *, platform: str | None = None, architecture: str | None = None, **options: Any
) -> Explanation:
    """Returns for each implementation whether `attention` of these operands takes it, and why not.

    Args:
        query, key, value: arrays or `jax.ShapeDtypeStruct`.
        platform: "cpu", "cuda", "rocm", "tpu" or another; None: where arrays are computed by default.
        architecture: the chip, as in `Target`; None: that of the first device of the platform, if there is one.
        options: arrays (or their types) and options as `attention` takes them.
    """
    if platform is None:
        platform = _compat.default_platform()
    architecture = architecture or _compat.device_kind(platform)
    static = {
        n: options.pop(n) for n in ("causal", "window", "scale", "soft_cap", "dropout", "block_mask") if n in options
    }
    if static.get("dropout"):
        options.pop("dropout_key", None)
        options["seed"] = jax.ShapeDtypeStruct((2,), jnp.uint32)
    operands = Operands(query, key, value, **options)
    return ATTENTION.explain(Target(platform, architecture), _checked(operands, **static))


def _checked(
    ops: Operands,
    *,
    causal: bool = True,
    window: int | tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    dropout: float = 0.0,
    block_mask: BlockMask | None = None,
) -> Call:
    query, key, value = ops[:3]
    shapes = f"query [B, T, N, H] {list(query.shape)}"
    if not (len(query.shape) == len(key.shape) == len(value.shape) == 4):
        raise ValueError(f"attention: {shapes}, key {list(key.shape)} and value {list(value.shape)} must have 4 axes.")
    if query.shape[0] != key.shape[0] or query.shape[3] != key.shape[3] or query.shape[2] % key.shape[2]:
        raise ValueError(
            f"attention: {shapes} does not fit key [B, S, K, H] {list(key.shape)}: B and H must agree and K must "
            "divide N."
        )
    if key.shape[:3] != value.shape[:3]:
        raise ValueError(
            f"attention: key {list(key.shape)} and value {list(value.shape)} must agree in all but their last axis."
        )
    if not (query.dtype == key.dtype == value.dtype) or query.dtype.name not in (*_DTYPES, *FLOAT8):
        raise ValueError(
            f"attention: query, key and value are {query.dtype}, {key.dtype} and {value.dtype}; they must be of one "
            f"dtype of {', '.join((*_DTYPES, *FLOAT8))}: write key.astype(query.dtype)."
        )
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"attention: dropout is {dropout}; it must be at least 0 and below 1.")
    if (ops.query_segments is None) != (ops.key_segments is None):
        raise ValueError("attention: query_segments and key_segments come together, and one of them is None.")
    batch, length, heads, size = query.shape
    span = key.shape[1]
    for name, expected in (
        ("query_positions", (batch, length)),
        ("key_positions", (batch, span)),
        ("query_segments", (batch, length)),
        ("key_segments", (batch, span)),
        ("slopes", (heads,)),
        ("sinks", (heads,)),
    ):
        x = getattr(ops, name)
        if x is not None and tuple(x.shape) != expected:
            raise ValueError(
                f"attention: {name} has the shape {list(x.shape)} and must have {list(expected)} ({shapes})."
            )
    for name in ("mask", "bias"):
        x = getattr(ops, name)
        if x is None:
            continue
        allowed = ((1, batch), (1, heads), (1, length), (span,))
        if len(x.shape) != 4 or any(n not in able for n, able in zip(x.shape, allowed, strict=True)):
            raise ValueError(
                f"attention: {name} has the shape {list(x.shape)} and must have {[batch, heads, length, span]}, where "
                "each but the last may be 1."
            )
    if ops.mask is not None and ops.mask.dtype != jnp.bool_:
        raise ValueError(f"attention: mask is {ops.mask.dtype} and must be bool; what is to be added is called bias.")
    if ops.relative is not None and (
        len(ops.relative.shape) != 2 or ops.relative.shape[0] != heads or ops.relative.shape[1] % 2 == 0
    ):
        raise ValueError(
            f"attention: relative has the shape {list(ops.relative.shape)} and must have [{heads}, 2 R + 1]."
        )
    left, right = window_bounds(causal, window)
    if (left is not None and left < 0) or (right is not None and right < 0):
        raise ValueError(f"attention: window is {window}; as a number it counts at least the query itself, 1.")
    factor = size**-0.5 if scale is None else float(scale)
    ops = _with_scales(ops)
    spec = Spec(factor, left, right, None if soft_cap is None else float(soft_cap), float(dropout))
    if block_mask is not None:
        counts, indices = checked(block_mask, batch, heads, length, span)
        spec = dataclasses.replace(spec, blocks=(block_mask.block_q, block_mask.block_k))
        ops = ops._replace(block_counts=counts, block_indices=indices)
    return Call(spec, ops)


def _with_scales(ops: Operands) -> Operands:
    """The operands with all scales as `[B0, N0]` or `[B0, K0]` where they are float8."""
    batch, _, heads, _ = ops.query.shape
    made = {}
    for name, count in (("query_scale", heads), ("key_scale", ops.key.shape[2]), ("value_scale", ops.key.shape[2])):
        x = getattr(ops, name)
        if ops.query.dtype.name not in FLOAT8:
            if x is not None:
                raise ValueError(
                    f"attention: {name} goes with float8 codes, and query, key and value are {ops.query.dtype}: "
                    "multiply them, or leave it out."
                )
            continue
        if x is None:
            x = jnp.ones((1, 1), jnp.float32)
        if x.dtype != jnp.float32 or not (
            len(x.shape) == 0 or (len(x.shape) == 2 and x.shape[0] in (1, batch) and x.shape[1] in (1, count))
        ):
            raise ValueError(
                f"attention: {name} is {x.dtype}{list(x.shape)} and must be float32, [] or {[batch, count]}, where "
                "each axis may be 1."
            )
        if not x.shape:
            x = jax.ShapeDtypeStruct((1, 1), x.dtype) if isinstance(x, jax.ShapeDtypeStruct) else x.reshape(1, 1)
        made[name] = x
    return ops._replace(**made)


def _call(*operands: Any, spec: Spec, fields: tuple[str, ...], wanted: tuple[str, ...] = ()) -> Call:
    given = dict(zip(fields, operands, strict=True))
    rows = {n: given.pop(n) for n in _ROWS if n in given}
    return Call(spec, Operands(**given), **rows, wanted=wanted)


def _forward_shapes(call: Call) -> list[jax.ShapeDtypeStruct]:
    query, value = call.ops.query, call.ops.value
    wide = jnp.float64 if query.dtype == jnp.float64 else jnp.float32
    batch, length, heads, _ = query.shape
    return [
        jax.ShapeDtypeStruct((batch, length, heads, value.shape[3]), working_dtype(call.ops)),
        jax.ShapeDtypeStruct((batch, heads, length), wide),
    ]


def _backward_shapes(call: Call) -> list[jax.ShapeDtypeStruct]:
    batch, _, heads, _ = call.ops.query.shape
    wide = jnp.float64 if call.ops.query.dtype == jnp.float64 else jnp.float32
    shapes: dict[str, tuple[Any, ...]] = {"slopes": (batch, heads)}
    if call.ops.relative is not None:
        shapes["relative"] = (batch, *call.ops.relative.shape)
    if call.ops.bias is not None:
        shapes["bias"] = call.ops.bias.shape
    return [
        *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in call.ops[:3]),
        *(jax.ShapeDtypeStruct(shapes[name], wide) for name in call.wanted),
    ]


def _folded(bind: Any, operands: Any, axes: Any, **params: Any) -> Any:
    """A mapped axis becomes the outer part of the batch; one by one where that would change what is computed.

    So it is for operands that have no batch and are mapped, for dropout, which counts rows of the batch, and for the
    gradient of a bias that the batch shares.
    """
    fields = params["fields"]
    given, mapped = dict(zip(fields, operands, strict=True)), dict(zip(fields, axes, strict=True))
    count = next(x.shape[a] for x, a in zip(operands, axes, strict=True) if a is not None)
    front = {n: x if mapped[n] is None else jnp.moveaxis(x, mapped[n], 0) for n, x in given.items()}
    batch = front["query"].shape[0 if mapped["query"] is None else 1]
    single = any(mapped.get(n) is not None for n in ("slopes", "relative", "sinks")) or "seed" in given
    if "bias" in params.get("wanted", ()):
        single = single or front["bias"].shape[0 if mapped["bias"] is None else 1] != batch or mapped["bias"] is None
    if single:
        moving = {n: x for n, x in front.items() if mapped[n] is not None}

        def one(parts: dict[str, jax.Array]) -> Any:
            return bind.bind(*({**front, **parts}[n] for n in fields), **params)

        results = jax.lax.map(one, moving)
        return results, [0] * len(results)

    def folded(name: str, x: jax.Array) -> jax.Array:
        if name not in (*_BY_BATCH, *_ROWS, *_BROADCAST):
            return x
        if mapped[name] is None:
            if x.shape[0] != batch or (batch == 1 and name in _BROADCAST):
                return x
            x = jnp.broadcast_to(x[None], (count, *x.shape))
        elif x.shape[1] != batch:
            x = jnp.broadcast_to(x, (count, batch, *x.shape[2:]))
        return x.reshape(count * batch, *x.shape[2:])

    results = bind.bind(*(folded(n, front[n]) for n in fields), **params)
    return [x.reshape(count, batch, *x.shape[1:]) for x in results], [0] * len(results)


def _xla_forward(target: Target, call: Call, interpret: bool) -> Any:
    plan = xla.plan_of(call.ops, target.platform, tuned(target, call, "forward", "xla"), call.spec.blocks)
    return xla.forward(call.spec, call.ops, platform=target.platform, plan=plan)


def _xla_backward(target: Target, call: Call, interpret: bool) -> Any:
    plan = xla.plan_of(call.ops, target.platform, tuned(target, call, "backward", "xla"), call.spec.blocks)
    made = call.lse, call.delta, call.cotangent
    return xla.backward(call.spec, call.ops, *made, wanted=call.wanted, platform=target.platform, plan=plan)


def _asks(direction: str, call: Call) -> tuple[str, Any]:
    return f"attention_{direction}", facts(call.spec, call.ops)


_XLA = Implementation("xla", lambda target, call: "", {"forward": _xla_forward, "backward": _xla_backward})
_TRITON = Implementation(
    "triton", triton.refusal, {"forward": triton.forward, "backward": triton.backward}, home="cuda"
)
_MOSAIC_TPU = Implementation("mosaic_tpu", tpu.refusal, {"forward": tpu.forward, "backward": tpu.backward}, home="tpu")
_MOSAIC_GPU = Implementation(
    "mosaic_gpu",
    mosaic_gpu.refusal,
    {"forward": mosaic_gpu.forward, "backward": mosaic_gpu.backward},
    home="cuda",
    interpreter=False,  # Mosaic-GPU's keeps a state, which custom gradients do not take; the tests call it themselves
    reserve=mosaic_gpu.reserve,
)
_CUDNN = Implementation(
    "cudnn",
    cudnn.refusal,
    {"forward": cudnn.forward, "backward": cudnn.backward},
    home="cuda",
    interpreter=False,
    reserve=cudnn.reserve,
)
ATTENTION = Op("attention", (_MOSAIC_GPU, _TRITON, _MOSAIC_TPU, _CUDNN, _XLA), _asks)
_forward = primitive(ATTENTION, "forward", _call, _forward_shapes, _folded)
_backward = primitive(ATTENTION, "backward", _call, _backward_shapes, _folded)


@jax.tree_util.register_static
class _Wanted(tuple):
    """Names of operands whose gradients are asked for: static in what the backward pass keeps."""


def _run(primitive_: Any, static: Any, arrays: dict[str, jax.Array], **params: Any) -> Any:
    spec, implementation, interpret = static
    params = {"spec": spec, "implementation": implementation, "interpret": interpret, **params}
    return primitive_.bind(*arrays.values(), fields=tuple(arrays), **params)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(static: Any, smooth: dict[str, jax.Array], fixed: dict[str, jax.Array]) -> Any:
    return tuple(_run(_forward, static, {**smooth, **fixed}))


def _attend_forward(static: Any, smooth: Any, fixed: Any) -> Any:
    if smooth["query"].value.dtype.name in FLOAT8 and any(x.perturbed for x in (*smooth.values(), *fixed.values())):
        raise ImplementationError(
            "attention: float8 operands have a forward pass alone and no gradient; attend in bfloat16 where it is "
            "wanted, or write jax.lax.stop_gradient around them."
        )
    wanted = _Wanted(n for n in ("slopes", "relative", "bias") if n in smooth and smooth[n].perturbed)
    smooth, fixed = ({n: x.value for n, x in part.items()} for part in (smooth, fixed))
    out, lse = cast(tuple[Any, Any], _attend(static, smooth, fixed))
    return (out, lse), (smooth, fixed, out, lse, wanted)


def _attend_backward(static: Any, kept: Any, cotangents: Any) -> Any:
    smooth, fixed, out, lse, wanted = kept
    of_out, of_lse = cotangents
    if static[1] == "cudnn" and not isinstance(of_lse, SymbolicZero):
        raise ImplementationError("attention: 'cudnn' has no gradient of the log-sum-exp; leave out return_lse.")
    wide = lse.dtype
    if isinstance(of_out, SymbolicZero):
        of_out = jnp.zeros_like(out)
    delta = jnp.einsum("btnh,btnh->bnt", out.astype(wide), of_out.astype(wide))
    if not isinstance(of_lse, SymbolicZero):
        delta = delta - jnp.where(jnp.isneginf(lse), jnp.zeros((), wide), of_lse.astype(wide))
    arrays = {**smooth, **fixed, "lse": lse, "delta": delta, "cotangent": of_out}
    names = list(arrays)
    arrays = dict(zip(names, _compat.vary_alike([arrays[n] for n in names]), strict=True))
    found = _run(_backward, static, arrays, wanted=tuple(wanted))
    gradients: dict[str, Any] = dict.fromkeys(smooth)
    gradients.update(zip(("query", "key", "value", *wanted), found, strict=True))
    for name in ("slopes", "relative"):
        if name in wanted:
            gradients[name] = jnp.sum(gradients[name], axis=0)
    if "sinks" in smooth:
        share = jnp.exp(smooth["sinks"].astype(wide)[None, :, None] - jnp.maximum(lse, -1e30))
        gradients["sinks"] = -jnp.sum(share * delta, axis=(0, 2))
    gradients = {n: None if g is None else g.astype(smooth[n].dtype) for n, g in gradients.items()}
    return gradients, None


_attend.defvjp(_attend_forward, _attend_backward, symbolic_zeros=True)
