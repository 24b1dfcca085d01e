"""Attention by Mosaic-GPU: in the GPU interpreter with its barriers and TMA, lowered for each engine; what it lacks.

The interpreter knows what Hopper and Blackwell use, except sums that start from a value and operands in registers
(Hopper). Of Ampere it knows neither cp.async without a barrier nor mma: there copies and products are plain, and what
is shown is the algorithm, the order of blocks and the indices; that cp.async and mma do what they should, is not.
"""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernels_pallas
from kernels_pallas import _compat
from kernels_pallas.attention import ATTENTION, attention, attention_oracle, explain, front, mosaic_gpu
from kernels_pallas.attention.spec import Operands
from kernels_pallas.dispatch import Target

HOPPER = Target("cuda", "9.0")
ENGINES = {"ampere": Target("cuda", "8.0"), "hopper": HOPPER, "blackwell": Target("cuda", "10.0")}
# B, T, N, K, H, S; options
CASES: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "causal, fewer queries than keys, grouped": ((1, 150, 2, 1, 64, 200), {}),
    "tails, other value size": ((1, 130, 1, 1, 64, 70), {"causal": False, "value_size": 128}),
    "window, soft cap, sinks": ((1, 200, 2, 2, 64, 200), {"window": 50, "soft_cap": 5.0, "sinks": True}),
    "rows that see nothing": ((1, 200, 1, 1, 64, 60), {"window": 20}),
    "one query, one key": ((2, 1, 1, 1, 64, 1), {}),
    "head size 128": ((1, 200, 1, 1, 128, 200), {"dtype": "float16"}),
    "head size 256, forward": ((1, 70, 1, 1, 256, 130), {"forward": True, "only": "hopper"}),
    "window to both sides, head size 128": ((1, 150, 1, 1, 128, 150), {"window": (20, 30), "not": "hopper"}),
}
GROUPED, EVERY = "causal, fewer queries than keys, grouped", "window, soft cap, sinks"
QUICK = {("hopper", GROUPED), ("hopper", EVERY), ("ampere", GROUPED), ("ampere", EVERY), ("blackwell", GROUPED)}
RUNS = [
    pytest.param(engine, name, marks=() if (engine, name) in QUICK else pytest.mark.slow)
    for engine in ENGINES
    for name, (_, options) in CASES.items()
    if options.get("only", engine) == engine and options.get("not") != engine
]
interpreter = pytest.mark.skipif(_compat.JAX_VERSION < (0, 11), reason="jax 0.10 has no interpreter for Mosaic-GPU")


def typed(*shape: int, dtype: str = "bfloat16") -> Any:
    return jax.ShapeDtypeStruct(shape, dtype)


@interpreter
@pytest.mark.parametrize(("engine", "name"), RUNS)
def test_outputs_log_sum_exp_and_gradients(engine: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter's threads wait for each other as the chip's warpgroups: a barrier too few is an error there."""
    (b, t, n, k, h, s), options = CASES[name]
    target = ENGINES[engine]
    options = {x: v for x, v in options.items() if x not in ("only", "not")}
    major = int(target.capability or 0)
    monkeypatch.setattr(_compat, "mosaic_gpu_assembles_for", lambda: (major, 0))
    dtype, only_forward = options.pop("dtype", "bfloat16"), options.pop("forward", False)
    rng = np.random.default_rng(0)
    hv = options.pop("value_size", h)
    shapes = (b, t, n, h), (b, s, k, h), (b, s, k, hv), (b, t, n, hv)
    query, key, value, cotangent = (jnp.asarray(rng.standard_normal(x), dtype) for x in shapes)
    sinks = jnp.asarray(rng.standard_normal(n), jnp.float32) if options.pop("sinks", False) else None
    of_lse = jnp.asarray(rng.standard_normal((b, n, t)), jnp.float32)
    call = front._checked(Operands(query, key, value, sinks=sinks), **options)
    assert mosaic_gpu.refusal(target, call) == ""

    @jax.jit
    def ours(query: jax.Array, key: jax.Array, value: jax.Array) -> Any:
        here = call._replace(ops=call.ops._replace(query=query, key=key, value=value))
        out, lse = mosaic_gpu.forward(target, here, True)
        if only_forward:
            return out, lse
        wide = out.astype(jnp.float32), cotangent.astype(jnp.float32)
        delta = jnp.einsum("btnh,btnh->bnt", *wide) - jnp.where(jnp.isneginf(lse), 0.0, of_lse)
        here = here._replace(lse=lse, delta=delta, cotangent=cotangent)
        assert mosaic_gpu.refusal(target, here) == ""
        return out, lse, *mosaic_gpu.backward(target, here, True)

    @jax.jit
    def truth(query: jax.Array, key: jax.Array, value: jax.Array) -> Any:
        def run(*qkv: jax.Array) -> Any:
            return attention_oracle(*qkv, **options, sinks=sinks, return_lse=True)

        (out, lse), pull = jax.vjp(run, query, key, value)
        if only_forward:
            return out, lse
        return out, lse, *pull((cotangent.astype(jnp.float32), jnp.where(jnp.isneginf(lse), 0.0, of_lse)))

    tolerance = {"bfloat16": 5e-3, "float16": 1e-3}[dtype]
    for a, e in zip(ours(query, key, value), truth(query, key, value), strict=True):
        a, e = np.asarray(a, np.float32), np.asarray(e, np.float32)
        assert a.shape == e.shape and (np.isneginf(a) == np.isneginf(e)).all()
        seen = np.isfinite(e)
        assert np.isfinite(a[seen]).all()
        assert np.linalg.norm(a[seen] - e[seen]) <= tolerance * max(np.linalg.norm(e[seen]), 1e-6)


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("options", [{}, {"causal": False, "scale": 0.3}])
def test_lowers_for_hopper(size: int, options: dict[str, Any]) -> None:
    """Asked for by name on every jax; forward, dq, and dk with dv."""
    q, k = typed(2, 300, 4, size), typed(2, 200, 2, size)

    def gradient(*qkv: jax.Array) -> Any:
        return jax.grad(
            lambda *x: jnp.sum(attention(*x, **options, implementation="mosaic_gpu").astype(jnp.float32)), (0, 1, 2)
        )(*qkv)

    with kernels_pallas.abstract_device("NVIDIA H200", "gpu"):
        text = jax.jit(gradient).trace(q, k, k).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu_v2") >= 3


@pytest.mark.skipif(_compat.JAX_VERSION < (0, 11), reason="jax 0.10 has neither mma nor cp.async")
@pytest.mark.parametrize("kind", ["NVIDIA A100-SXM4-80GB", "NVIDIA L4", "NVIDIA B200"])
def test_lowers_for_other_engines(kind: str) -> None:
    """Forward, dq, and dk with dv; a host without such a GPU must say for which one it assembles."""
    q, k = typed(2, 300, 4, 64), typed(2, 200, 2, 64)
    major, minor = map(int, _compat._CAPABILITIES[kind].split("."))

    def gradient(*qkv: jax.Array) -> Any:
        return jax.grad(lambda *x: jnp.sum(attention(*x, implementation="mosaic_gpu").astype(jnp.float32)), (0, 1, 2))(
            *qkv
        )

    with kernels_pallas.abstract_device(kind, "gpu"):
        with pytest.raises(
            kernels_pallas.ImplementationError, match=r"for the GPU of this host \(compute capability 9"
        ):
            jax.jit(gradient).trace(q, k, k).lower(lowering_platforms=("cuda",))
        with _compat.mosaic_gpu_for((major, minor)):
            text = jax.jit(gradient).trace(q, k, k).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu_v2") >= 3


def test_what_a_kernel_takes_of_shared_memory_is_told_and_bounded() -> None:
    q = typed(1, 256, 2, 64)

    def lower(shared: int) -> dict[str, int]:
        run = jax.jit(lambda *x: attention(*x, implementation="mosaic_gpu"))
        with kernels_pallas.abstract_device("NVIDIA H200", "gpu"), _compat.mosaic_gpu_for((9, 0), shared) as taken:
            run.trace(q, q, q).lower(lowering_platforms=("cuda",))
        return taken

    queries, blocks = 2 * 64 * 64 * 2, 2 * 3 * 128 * 64 * 2
    assert queries + blocks <= lower(2**17)["attention_forward"] < queries + blocks + 4096
    with pytest.raises(ValueError, match="exceeds available shared memory"):
        lower(queries + blocks)


def test_older_jax_has_hoppers_engine_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    q = typed(1, 8, 2, 64)
    call = front._checked(Operands(q, q, q))
    monkeypatch.setattr(_compat, "JAX_VERSION", (0, 10, 2))
    for engine, target in ENGINES.items():
        reason = mosaic_gpu.refusal(target, call)
        assert reason == "" if engine == "hopper" else reason.startswith("but for Hopper it needs jax 0.11")


@pytest.mark.parametrize(
    ("engine", "q", "v", "options", "reason"),
    [
        ("ampere", typed(1, 8, 2, 192), None, {}, "head size 192 is none of 64, 128"),
        ("blackwell", typed(1, 8, 2, 256), None, {}, "head size 256 is none of 64, 128"),
        ("blackwell", typed(1, 8, 2, 64), typed(1, 8, 2, 128), {"window": 4}, "value size 128 is not head size 64"),
        ("ampere", typed(1, 8, 2, 64), None, {"dropout": 0.1}, "it has no dropout"),
    ],
)
def test_refusals_of_other_engines(
    engine: str, q: Any, v: Any, options: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = ENGINES[engine]
    monkeypatch.setattr(_compat, "JAX_VERSION", (0, 12, 0))
    monkeypatch.setattr(_compat, "mosaic_gpu_assembles_for", lambda: (int(target.capability or 0), 0))
    call = front._checked(Operands(q, q, q if v is None else v), **options)
    assert mosaic_gpu.refusal(target, call).startswith(reason)
    assert "name it to take it" in mosaic_gpu.reserve(target, call)


@pytest.mark.parametrize(
    ("q", "options", "target", "reason"),
    [
        (typed(1, 8, 2, 64, dtype="float32"), {}, HOPPER, "it takes bfloat16 and float16, not float32"),
        (typed(1, 8, 2, 80), {}, HOPPER, "head size 80 is none of 64, 128, 192, 256"),
        (typed(1, 8, 2, 64), {"slopes": typed(2, dtype="float32")}, HOPPER, "it has no slopes"),
        (typed(1, 8, 2, 64), {"key_positions": typed(1, 8, dtype="int32")}, HOPPER, "it has no key positions"),
        (typed(1, 8, 2, 64), {"dropout": 0.1}, HOPPER, "it has no dropout"),
        (typed(1, 8, 2, 64), {"scale": -1.0}, HOPPER, "scale is -1.0, and it takes positive ones"),
        (typed(1, 8, 2, 64), {}, Target("cuda", "7.5"), "needs compute capability 8.0 to 8.9, .* and the chip has 7.5"),
        (typed(1, 8, 2, 64), {}, Target("cuda"), "the chip is not known"),
        (typed(1, 8, 2, 64), {}, Target("rocm", "gfx942"), "it runs on cuda, not on rocm"),
    ],
)
def test_refusals_name_what_it_lacks(q: Any, options: dict[str, Any], target: Target, reason: str) -> None:
    found = explain(q, q, q, platform=target.platform, architecture=target.architecture, **options)
    verdict = next(v for v in found.verdicts if v.implementation == "mosaic_gpu")
    assert not verdict.taken
    assert re.search(reason, verdict.reason), verdict.reason


def test_the_backward_pass_refuses_what_would_spill() -> None:
    q = typed(1, 8, 2, 128)
    call = front._checked(Operands(q, q, q), window=4)
    assert mosaic_gpu.refusal(HOPPER, call) == ""
    assert "window or a soft cap" in mosaic_gpu.refusal(HOPPER, call._replace(cotangent=q))


def test_it_is_first_where_it_was_verified_and_else_taken_by_name_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    q = typed(1, 300, 4, 128)
    for version, taken in (
        ((0, 10, 2), "triton"),
        ((0, 11, 2), "mosaic_gpu"),
        ((0, 12, 0), "mosaic_gpu"),
        ((0, 13), "triton"),
    ):
        monkeypatch.setattr(_compat, "JAX_VERSION", version)
        found = explain(q, q, q, platform="cuda", architecture="9.0")
        assert found.taken == taken
        if taken == "triton":
            assert "able; verified on jax 0.11, 0.12" in str(found)
        call = front._checked(Operands(q, q, q))
        assert ATTENTION.choose(HOPPER, call, "mosaic_gpu").name == "mosaic_gpu"


def test_cudnn_is_taken_by_name_alone_and_needs_a_gpu_to_be_lowered(monkeypatch: pytest.MonkeyPatch) -> None:
    q = typed(1, 300, 4, 128)
    call = front._checked(Operands(q, q, q))
    with pytest.raises(kernels_pallas.ImplementationError, match="cannot be lowered on a host without an NVIDIA GPU"):
        ATTENTION.choose(HOPPER, call, "cudnn")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert ATTENTION.choose(HOPPER, call, "cudnn").name == "cudnn" and ATTENTION.choose(HOPPER, call).name != "cudnn"
    capped = front._checked(Operands(q, q, q), soft_cap=20.0)
    with pytest.raises(kernels_pallas.ImplementationError, match="it has no soft cap here"):
        ATTENTION.choose(HOPPER, capped, "cudnn")
    ahead = front._checked(Operands(q, q, q), causal=False, window=20)
    with pytest.raises(kernels_pallas.ImplementationError, match="they see back, not ahead"):
        ATTENTION.choose(HOPPER, ahead, "cudnn")
