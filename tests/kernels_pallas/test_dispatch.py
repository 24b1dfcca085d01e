"""Which implementation runs and why not; one program for all platforms; parts of batch and heads under shard_map."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import export

import kernels_pallas
import trustcore
from kernels_pallas import _compat
from kernels_pallas.attention import ATTENTION, attention, explain
from trustcore.errors import ImplementationError
from trustcore.ops.attention import attention as front


def typed(*shape: int, dtype: str = "bfloat16") -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


X = typed(2, 300, 4, 64)
CHIPS = [
    ("cuda", "NVIDIA H200", "gpu"),
    ("cuda", "NVIDIA A10", "gpu"),
    ("rocm", "gfx942", "gpu"),
    ("tpu", "TPU v5 lite", "tpu"),
]
NAMES = {"cuda": "triton", "rocm": "triton", "tpu": "mosaic_tpu"}
MARKS = {"triton": "__gpu$xla.gpu.triton", "mosaic_tpu": "tpu_custom_call"}


def gradient(**options: Any) -> Any:
    def total(q: jax.Array, k: jax.Array, v: jax.Array, *rest: jax.Array) -> jax.Array:
        given = dict(zip(("sinks", "slopes", "bias", "query_segments", "key_segments"), rest, strict=False))
        return jnp.sum(attention(q, k, v, **given, **options).astype(jnp.float32))

    return jax.jit(jax.grad(total, (0, 1, 2)))


@pytest.mark.parametrize(
    ("platform", "architecture", "taken"),
    [("cpu", None, "xla"), ("cuda", "8.0", "triton"), ("cuda", "7.5", "xla"), ("rocm", "gfx942", "triton"),
     ("tpu", "TPU v5e", "mosaic_tpu"), ("metal", None, "xla")],
)  # fmt: skip
def test_explain_says_what_is_taken(platform: str, architecture: str | None, taken: str) -> None:
    found = trustcore.kernels.explain("attention", X, X, X, platform=platform, architecture=architecture)
    assert found.taken == taken
    assert [v.implementation for v in found.verdicts] == [i.name for i in ATTENTION.implementations]
    assert all(v.taken or v.reason for v in found.verdicts) and f"{taken}: taken" in str(found)


@pytest.mark.parametrize(
    ("shapes", "options", "reason"),
    [
        ((typed(1, 8, 2, 320), typed(1, 8, 2, 320), typed(1, 8, 2, 320)), {}, "head size 320 is above 256"),
        ((typed(1, 8, 2, 64, dtype="float64"),) * 3, {}, "takes float32, bfloat16, float16 and float8, not float64"),
        ((X, X, X), {"relative": typed(4, 5)}, "it has no relative positions; give them as a bias"),
        ((typed(1, 0, 2, 64),) * 3, {}, "an axis is empty"),
    ],
)
def test_a_refusal_says_why_and_a_named_implementation_raises_it(shapes: Any, options: Any, reason: str) -> None:
    found = explain(*shapes, platform="cuda", architecture="9.0", **options)
    assert found.taken == "xla" and reason in str(found)
    with jax.enable_x64(True), pytest.raises(kernels_pallas.ImplementationError, match=reason):
        jax.eval_shape(lambda *a: attention(*a[:3], **dict(zip(options, a[3:], strict=True)), implementation="triton"),
                       *shapes, *options.values())  # fmt: skip


def test_what_is_named_never_falls_back() -> None:
    x = jnp.ones((1, 20, 2, 16))
    with pytest.raises(
        kernels_pallas.ImplementationError, match=r"'triton' cannot compute .* on cpu: it runs on cuda and rocm"
    ):
        attention(x, x, x, implementation="triton")
    with pytest.raises(
        ImplementationError, match="'fast' is not known; choose of mosaic_gpu, triton, mosaic_tpu, cudnn, xla"
    ):
        front(x, x, x, implementation="fast")
    with pytest.raises(kernels_pallas.ImplementationError, match="interpret=True needs one of triton, mosaic_tpu"):
        attention(x, x, x, implementation="xla", interpret=True)
    with pytest.raises(ImplementationError, match="no op is called 'conv'; choose of attention"):
        trustcore.kernels.explain("conv", x)


@pytest.mark.parametrize(("platform", "kind", "family"), CHIPS)
def test_lowers_for_chips_that_are_not_here(platform: str, kind: str, family: str) -> None:
    """Forward and two backward kernels each, with every feature at once; nothing of them falls back to XLA."""
    name = NAMES[platform]
    heads, ids = typed(4, dtype="float32"), typed(2, 300, dtype="int32")
    more = heads, heads, typed(1, 4, 300, 300), ids, ids
    with kernels_pallas.abstract_device(kind, family):
        for operands, options in (
            ((X, X, X, *more), {"window": 70, "soft_cap": 20.0}),
            ((typed(2, 1, 4, 80, dtype="float32"), *(typed(2, 77, 2, 80, dtype="float32"),) * 2), {"causal": False}),
        ):
            lowered = gradient(implementation=name, **options).trace(*operands).lower(lowering_platforms=(platform,))
            assert lowered.as_text().count(MARKS[name]) >= 3
        x = typed(2, 300, 4, 80)  # a head size that Hopper's own kernels do not take
        chosen = gradient().trace(x, x, x).lower(lowering_platforms=(platform,)).as_text()
    assert chosen.count(MARKS[name]) >= 3


def test_dropout_lowers_for_chips_that_are_not_here() -> None:
    key = jax.random.key(0)
    for platform, kind, family in CHIPS[1:]:
        with kernels_pallas.abstract_device(kind, family):
            function = gradient(implementation=NAMES[platform], dropout=0.1, dropout_key=key)
            lowered = function.trace(X, X, X).lower(lowering_platforms=(platform,))
        assert lowered.as_text().count(MARKS[NAMES[platform]]) >= 3


def test_one_program_for_every_platform() -> None:
    """Each platform gets its own kernels out of one trace, and the CPU's part runs as it does by itself."""
    platforms = ("cpu", "cuda", "rocm", "tpu")
    x = typed(1, 40, 2, 64, dtype="float32")
    checks = [export.DisabledSafetyCheck.custom_call(c) for c in MARKS.values()]
    with kernels_pallas.abstract_device("NVIDIA H200", "gpu"):
        exported = export.export(gradient(), platforms=platforms, disabled_checks=checks)(x, x, x)
    text = exported.mlir_module()
    assert exported.platforms == platforms and all(mark in text for mark in MARKS.values())
    x = jax.random.normal(jax.random.key(0), x.shape)
    expected = gradient()(x, x, x)
    for a, b in zip(exported.call(x, x, x), expected, strict=True):
        assert jnp.max(jnp.abs(a - b)) < 1e-6


def test_lengths_may_be_symbols() -> None:
    b, t = export.symbolic_shape("b,t")
    q = jax.ShapeDtypeStruct((b, t, 4, 16), jnp.float32)
    exported = export.export(gradient(), platforms=("cpu", "tpu"))(q, q, q)
    x = jax.random.normal(jax.random.key(0), (2, 33, 4, 16))
    for a, b in zip(exported.call(x, x, x), gradient()(x, x, x), strict=True):
        assert jnp.max(jnp.abs(a - b)) < 1e-5


def test_shard_map_over_batch_and_heads(fresh_python: Any) -> None:
    """On four devices, with the check of what varies: no collective is added, and gradients are those of one device."""
    printed = fresh_python(
        """
        import jax, jax.numpy as jnp
        from jax.sharding import AxisType, PartitionSpec as P
        from kernels_pallas.attention import attention, attention_oracle
        mesh = jax.make_mesh((2, 2), ("b", "n"), axis_types=(AxisType.Auto,) * 2)
        keys = jax.random.split(jax.random.key(0), 3)
        q, k, v = (jax.random.normal(key, (4, 300, n, 16)) for key, n in zip(keys, (4, 2, 2)))
        slopes = jnp.linspace(0.1, 1.0, 4)
        segments = jnp.sort(jax.random.randint(jax.random.key(1), (4, 300), 0, 4))
        def run(f, q, k, v, slopes, s):
            return f(q, k, v, slopes=slopes, query_segments=s, key_segments=s)
        split = P("b", None, "n")
        sharded = jax.shard_map(
            lambda *a: run(attention, *a), mesh=mesh, in_specs=(split, split, split, P("n"), P("b")), out_specs=split
        )
        def loss(f):
            return jax.jit(jax.grad(lambda *a: jnp.sum(jnp.sin(f(*a))), (0, 1, 2, 3)))
        args = q, k, v, slopes, segments
        for n, a, b in zip("qkvs", loss(sharded)(*args), loss(lambda *a: run(attention_oracle, *a))(*args)):
            # the gradient of a slope sums scores' gradients times distances up to 300, over all rows
            assert jnp.max(jnp.abs(a - b)) < {"s": 1e-3}.get(n, 2e-5), (n, jnp.max(jnp.abs(a - b)))
        places = [jax.sharding.NamedSharding(mesh, s) for s in (split, split, split, P("n"), P("b"))]
        text = jax.jit(sharded, in_shardings=places).lower(*args).compile().as_text()
        assert not any(word in text for word in ("all-gather", "all-reduce", "all-to-all")), text
        print("same")
        """,
        devices=4,
    )
    assert printed.split() == ["same"]


def test_the_chip_of_an_abstract_device_is_known() -> None:
    assert _compat.device_kind("cuda") is None
    with kernels_pallas.abstract_device("NVIDIA A10", "gpu"):
        assert _compat.device_kind("cuda") == "8.6" and _compat.device_kind("rocm") is None
    with kernels_pallas.abstract_device("gfx942", "gpu"):
        assert _compat.device_kind("rocm") == "gfx942" and _compat.device_kind("cuda") is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask": jnp.ones((1, 1, 3, 5))}, r"mask is float32 and must be bool"),
        ({"mask": jnp.ones((1, 1, 3, 4), bool)}, r"mask has the shape \[1, 1, 3, 4\] and must have \[2, 4, 3, 5\]"),
        ({"slopes": jnp.ones(3)}, r"slopes has the shape \[3\] and must have \[4\]"),
        ({"relative": jnp.ones((4, 6))}, r"relative has the shape \[4, 6\] and must have \[4, 2 R \+ 1\]"),
        ({"query_segments": jnp.ones((2, 3), jnp.int32)}, "come together, and one of them is None"),
        ({"dropout": 1.0, "dropout_key": None}, "dropout needs a dropout_key|dropout is 1.0"),
        ({"dropout": 0.1}, "dropout needs a dropout_key"),
        ({"window": 0}, "window is 0; as a number it counts at least the query itself"),
    ],
)
def test_errors_name_what_is_wrong(options: dict[str, Any], message: str) -> None:
    q, k = jnp.ones((2, 3, 4, 16)), jnp.ones((2, 5, 2, 16))
    with pytest.raises(ValueError, match=message):
        attention(q, k, k, **options)
    with pytest.raises(ValueError, match="float32, float32 and bfloat16; they must be of one dtype"):
        attention(q, k, k.astype(jnp.bfloat16))


def test_a_second_derivative_is_refused_by_name() -> None:
    x = jnp.ones((1, 5, 1, 8))
    with pytest.raises(NotImplementedError, match="attention_backward has no derivative of its own"):
        jax.grad(lambda q: jnp.sum(jax.grad(lambda q: jnp.sum(jnp.sin(attention(q, x, x))))(q)))(x)
