"""One table of calls of decode attention, every implementation, against the oracle; gradients, vmap, shard_map, chips.

Pallas kernels run in the interpreter. Tiles and splits are made small, so that short caches have several.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import export

import kernels_pallas
import trustcore
from kernels_pallas.decode import DECODE, decode_attention, decode_oracle, explain, tpu, triton, xla

IMPLEMENTATIONS = ("xla", "triton", "mosaic_tpu")
# B, T, N, K, H, S, kind; options, in which True stands for an array of the name
CASES: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "one token": ((3, 1, 4, 2, 16, 90, "float"), {}),
    "window, soft cap, values of another size": (
        (2, 3, 4, 1, 16, 90, "float"), {"window": 20, "soft_cap": 3.0, "value_size": 24},
    ),
    "sinks and slopes": ((2, 2, 4, 2, 16, 70, "float"), {"sinks": True, "slopes": True}),
    "int8, one slot": ((2, 1, 2, 1, 16, 1, "int8"), {}),
    "int8": ((3, 2, 6, 2, 16, 90, "int8"), {"window": 33}),
    "float8": ((2, 1, 4, 2, 16, 75, "float8"), {"sinks": True}),
    "int4": ((3, 2, 4, 2, 16, 90, "int4"), {"slopes": True}),
    "pages": ((3, 2, 4, 2, 16, 250, "float"), {"page": 128, "sinks": True}),
    "pages of int4": ((2, 1, 4, 2, 16, 384, "int4"), {"page": 128, "window": 150}),
    "more rows than a block": ((1, 30, 6, 1, 16, 90, "int8"), {"window": 40}),
    "chunks": ((2, 5, 4, 2, 16, 90, "float"), {"chunk": 35}),
    "chunks, window, pages": ((2, 20, 4, 2, 16, 250, "float"), {"page": 128, "chunk": 60, "window": 50}),
}  # fmt: skip
SLOW = {
    ("pages of int4", "triton"),
    ("pages of int4", "mosaic_tpu"),
    ("float8", "triton"),
    ("sinks and slopes", "mosaic_tpu"),
}
CHIPS = [("cuda", "NVIDIA H200", "triton"), ("rocm", "gfx942", "triton"), ("tpu", "TPU v5 lite", "mosaic_tpu")]
MARKS = {"triton": "__gpu$xla.gpu.triton", "mosaic_tpu": "tpu_custom_call"}


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xla, "SPLIT", 32)
    monkeypatch.setattr(triton, "blocks_of", lambda call: triton.Blocks(32, 16, 1 if call.slots < 40 else 3))
    monkeypatch.setattr(tpu, "blocks_of", lambda call: tpu.Blocks(min(64, call.rows), min(32, call.slots)))


def cache(shape: tuple[Any, ...], rng: np.random.Generator, value_size: int | None = None) -> dict[str, Any]:
    """Keys, values and scales of so many rows or pages, `[B, K, H, S]` and `[B, K, S, H]`."""
    b, k, h, s, kind = shape
    hv = value_size or h
    shapes = {"keys": (b, k, h, s), "values": (b, k, s, hv)}
    if kind == "float":
        return {n: jnp.asarray(rng.standard_normal(x), jnp.float32) for n, x in shapes.items()}
    if kind == "int4":
        shapes = {"keys": (b, k, h // 2, s), "values": (b, k, s, hv // 2)}
        arrays: dict[str, Any] = {n: jnp.asarray(rng.integers(0, 256, x), jnp.uint8) for n, x in shapes.items()}
        scales = rng.uniform(-0.2, 0.2, (2, b, k, 2, s))
        return arrays | dict(zip(("key_scale", "value_scale"), jnp.asarray(scales, jnp.bfloat16), strict=True))
    arrays = {n: jnp.asarray(rng.integers(-100, 101, x), jnp.int8) for n, x in shapes.items()}
    if kind == "float8":
        arrays = {n: x.astype(jnp.float8_e4m3fn) for n, x in arrays.items()}
    scales = jnp.asarray(rng.uniform(0, 0.03, (2, b, k, s)), jnp.float32)
    return arrays | dict(zip(("key_scale", "value_scale"), scales, strict=True))


def operands(shape: tuple[Any, ...], options: dict[str, Any], seed: int = 0) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arrays and static options of a case. Row 0 is empty where there are several; a page is missing."""
    b, t, n, k, h, s, kind = shape
    rng, options = np.random.default_rng(seed), dict(options)
    page, value_size = options.pop("page", None), options.pop("value_size", None)
    arrays: dict[str, Any] = {"query": jnp.asarray(rng.standard_normal((b, t, n, h)), jnp.float32)}
    if page is None:
        arrays |= cache((b, k, h, s, kind), rng, value_size)
    else:
        count = -(-s // page)
        arrays |= cache((b * count + 1, k, h, page, kind), rng, value_size)
        table = rng.permutation(b * count).reshape(b, count)
        table[-1, 0] = -1
        table[0, -1] = b * count + 1  # one that does not exist
        arrays["pages"] = jnp.asarray(table, jnp.int32)
    lengths = rng.integers(min(t, s), s + 1, b)
    lengths[0] = 0 if b > 1 else lengths[0]
    arrays["lengths"] = jnp.asarray(lengths, jnp.int32)
    for name in ("slopes", "sinks"):
        if options.pop(name, False):
            arrays[name] = jnp.asarray(rng.uniform(0.1, 1, n), jnp.float32)
    return arrays, options


def oracle(arrays: dict[str, Any], **static: Any) -> Any:
    return jax.jit(lambda a: decode_oracle(**a, **static))(arrays)


def close(found: Any, expected: Any, atol: float) -> None:
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        size = max(1.0, float(np.max(np.abs(b), where=np.isfinite(b), initial=0)))
        np.testing.assert_allclose(a, b, rtol=0, atol=atol * size)


def table() -> Iterator[Any]:
    for name in CASES:
        for implementation in IMPLEMENTATIONS:
            marks = (pytest.mark.slow,) if (name, implementation) in SLOW else ()
            yield pytest.param(name, implementation, marks=marks)


@pytest.mark.parametrize(("name", "implementation"), list(table()))
def test_outputs_and_log_sum_exp(name: str, implementation: str) -> None:
    arrays, static = operands(*CASES[name])
    run = functools.partial(decode_attention, implementation=implementation, interpret=implementation != "xla")
    found = jax.jit(lambda a: run(**a, **static, return_lse=True))(arrays)
    close(found, oracle(arrays, **static, return_lse=True), 3e-6)
    if arrays["query"].shape[0] > 1:
        assert (found[0][0] == 0).all() and ("sinks" in arrays or jnp.isneginf(found[1][0]).all())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", ["float", "int4"])
def test_narrow_queries(kind: str, implementation: str) -> None:
    """Queries of bfloat16, over a cache of bfloat16 or of codes: the error is that of rounding operands and weights."""
    arrays, _ = operands((2, 1, 4, 2, 16, 60, kind), {})
    narrow = ("query", "keys", "values") if kind == "float" else ("query",)
    arrays |= {n: arrays[n].astype(jnp.bfloat16) for n in narrow}
    run = functools.partial(decode_attention, implementation=implementation, interpret=implementation != "xla")
    found = jax.jit(lambda a: run(**a))(arrays)
    assert found.dtype == jnp.bfloat16
    close(found, oracle(arrays), 2e-2)


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize(
    "name", ["window, soft cap, values of another size", "sinks and slopes", "int8", "int4", "pages", "chunks"]
)
def test_gradients(name: str, together: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of everything that is a float, of output and log-sum-exp; all heads at once, or cell by cell."""
    if not together:
        monkeypatch.setattr(xla, "TOGETHER", {"cpu": 0})
        monkeypatch.setattr(xla, "TOKENS", 2)
    arrays, static = operands(*CASES[name])
    smooth = {n: arrays.pop(n) for n in list(arrays) if jnp.issubdtype(arrays[n].dtype, jnp.floating)}
    rng = np.random.default_rng(1)
    b, t, n, *_ = CASES[name][0]
    weights = jnp.asarray(rng.standard_normal((b, n, t)), jnp.float32)

    def loss(function: Any, smooth: dict[str, Any]) -> Any:
        out, lse = function(**{**arrays, **smooth}, **static, return_lse=True)
        waves = jnp.sin(jnp.arange(out.size, dtype=jnp.float32).reshape(out.shape))
        return jnp.sum(out * waves) + jnp.sum(jnp.where(jnp.isneginf(lse), 0.0, lse) * weights)

    found, expected = (jax.jit(jax.grad(functools.partial(loss, f)))(smooth) for f in (decode_attention, decode_oracle))
    assert found.keys() == expected.keys()
    for name in found:
        # scales are bfloat16 in int4's cache, and so are their gradients
        close(found[name], expected[name], 3e-5 if smooth[name].dtype == jnp.float32 else 1e-2)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("mapped", ["query over shared pages", "pages and pools", "sinks", "keys"])
def test_vmap(mapped: str, implementation: str) -> None:
    """As one call after the other."""
    if mapped in ("sinks", "keys") and implementation != "xla":
        pytest.skip("the rule is the same for all implementations")
    case = "sinks and slopes" if mapped in ("sinks", "keys") else "pages"
    arrays, static = operands(*CASES[case])
    other, _ = operands(*CASES[case], seed=1)
    names = {
        "query over shared pages": ("query", "lengths", "pages"),
        "pages and pools": ("query", "keys", "values", "pages"),
        "sinks": ("sinks", "query"),
        "keys": ("keys",),
    }[mapped]
    axes = {n: 0 if n in names else None for n in arrays}
    lifted = {n: jnp.stack([x, other[n]]) if n in names else x for n, x in arrays.items()}
    run = functools.partial(
        decode_attention, implementation=implementation, interpret=implementation != "xla", **static
    )
    found = jax.jit(jax.vmap(lambda a: run(**a), in_axes=(axes,)))(lifted)
    for i, single in enumerate((arrays, {n: other[n] if n in names else x for n, x in arrays.items()})):
        close(found[i], oracle(single, **static), 3e-6)

    def total(function: Any, query: jax.Array) -> jax.Array:
        return jnp.sum(jax.vmap(lambda a: function(**a), in_axes=(axes,))({**lifted, "query": query}) ** 2)

    if implementation == "xla" and "query" in names:
        ours, theirs = (
            jax.jit(jax.grad(functools.partial(total, functools.partial(f, **static))))(lifted["query"])
            for f in (decode_attention, decode_oracle)
        )
        close(ours, theirs, 3e-5)


@settings(max_examples=5, deadline=None)
@given(
    b=st.integers(1, 3), t=st.integers(1, 5), k=st.integers(1, 2), g=st.integers(1, 3), s=st.integers(1, 100),
    kind=st.sampled_from(("float", "int8", "int4")), window=st.none() | st.integers(1, 50),
    page=st.none() | st.sampled_from((1, 8, 24)), chunk=st.none() | st.integers(1, 40), sinks=st.booleans(),
    cells=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_shape(b, t, k, g, s, kind, window, page, chunk, sinks, cells, seed) -> None:
    """Any lengths and pages: S=1, rows that are empty or shorter than T, splits that do not divide S."""
    options = {"window": window, "chunk": chunk, "sinks": sinks, **({} if page is None else {"page": page})}
    arrays, static = operands((b, t, k * g, k, 8, s, kind), options, seed)
    arrays["lengths"] = jnp.asarray(np.random.default_rng(seed).integers(0, s + 1, b), jnp.int32)
    with pytest.MonkeyPatch.context() as patch:
        if cells:
            patch.setattr(xla, "TOGETHER", {"cpu": 0})
            patch.setattr(xla, "TOKENS", 2)
        found = jax.jit(lambda a: decode_attention(**a, **static, return_lse=True))(arrays)
    close(found, oracle(arrays, **static, return_lse=True), 3e-6)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["triton", "mosaic_tpu"])
@settings(max_examples=20, deadline=None)
@given(
    b=st.integers(1, 3), t=st.integers(1, 40), k=st.integers(1, 2), g=st.integers(1, 3), s=st.integers(1, 300),
    kind=st.sampled_from(("float", "int8", "float8", "int4")), window=st.none() | st.integers(1, 50),
    chunk=st.none() | st.integers(1, 200), paged=st.booleans(), sinks=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_shape_by_kernels(implementation, b, t, k, g, s, kind, window, chunk, paged, sinks, seed) -> None:
    options = {"window": window, "chunk": chunk, "sinks": sinks, **({"page": 128} if paged else {})}
    arrays, static = operands((b, t, k * g, k, 16, s, kind), options, seed)
    arrays["lengths"] = jnp.asarray(np.random.default_rng(seed).integers(0, s + 1, b), jnp.int32)
    run = functools.partial(decode_attention, implementation=implementation, interpret=True, return_lse=True, **static)
    found = jax.jit(lambda a: run(**a))(arrays)
    close(found, oracle(arrays, **static, return_lse=True), 3e-6)


def test_nothing_seen_gives_zeros_and_zero_gradients() -> None:
    arrays, _ = operands((2, 1, 2, 1, 16, 80, "float"), {})
    arrays["lengths"] = jnp.zeros((2,), jnp.int32)
    names = ("query", "keys", "values")
    total = jax.jit(jax.value_and_grad(lambda part: jnp.sum(decode_attention(**{**arrays, **part}))))
    out, gradients = total({n: arrays[n] for n in names})
    assert out == 0 and all((g == 0).all() for g in gradients.values())


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_codes_are_unpacked_a_split_at_a_time(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Temporaries of the compiled program: less than an eighth of the cache in floats, which the oracle makes."""
    monkeypatch.undo()
    arrays, _ = operands((1, 1, 4, 2, 64, 16384, kind), {})
    floats = 2 * 2 * 64 * 16384 * 4

    def temporary(function: Any) -> int:
        return jax.jit(lambda a: function(**a)).lower(arrays).compile().memory_analysis().temp_size_in_bytes

    assert temporary(decode_attention) < floats / 8
    assert temporary(decode_oracle) > floats / 2


def typed(kind: str, *, page: int | None = None, dtype: str = "bfloat16") -> dict[str, Any]:
    b, t, n, k, h, s = 2, 2, 16, 4, 128, 1000
    first, slots = (b, s) if page is None else (99, page)
    code = {"float": dtype, "int8": "int8", "float8": "float8_e4m3fn", "int4": "uint8"}[kind]
    half = 2 if kind == "int4" else 1
    shapes: dict[str, Any] = {"query": ((b, t, n, h), dtype), "keys": ((first, k, h // half, slots), code)}
    shapes |= {"values": ((first, k, slots, h // half), code), "lengths": ((b,), "int32")}
    if kind != "float":
        scale = ((first, k, 2, slots), "bfloat16") if kind == "int4" else ((first, k, slots), "float32")
        shapes |= {"key_scale": scale, "value_scale": scale}
    if page is not None:
        shapes["pages"] = ((b, -(-s // page)), "int32")
    return {name: jax.ShapeDtypeStruct(*x) for name, x in shapes.items()}


@pytest.mark.parametrize(("platform", "kind", "name"), CHIPS)
def test_lowers_for_chips_that_are_not_here(
    platform: str, kind: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    heads = jax.ShapeDtypeStruct((16,), jnp.float32)
    more = {"slopes": heads, "sinks": heads}
    with kernels_pallas.abstract_device(kind, "tpu" if platform == "tpu" else "gpu"):
        for arrays, static, pinned in (
            (typed("float"), {}, None),
            (typed("int8", page=128) | more, {"window": 300, "soft_cap": 20.0}, name),
            (typed("float8"), {"chunk": 512}, name),
            (typed("int4", dtype="float32") | more, {}, name),
        ):
            run = jax.jit(lambda a, s=static, i=pinned: decode_attention(**a, **s, implementation=i))
            assert run.trace(arrays).lower(lowering_platforms=(platform,)).as_text().count(MARKS[name]) == 1


def test_one_program_for_every_platform(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    arrays = operands((2, 1, 4, 2, 16, 80, "int8"), {})[0]
    checks = [export.DisabledSafetyCheck.custom_call(c) for c in MARKS.values()]
    function = jax.jit(lambda a: decode_attention(**a))
    with kernels_pallas.abstract_device("NVIDIA H200", "gpu"):
        exported = export.export(function, platforms=("cpu", "cuda", "rocm", "tpu"), disabled_checks=checks)(arrays)
    assert all(mark in exported.mlir_module() for mark in MARKS.values())
    close(exported.call(arrays), function(arrays), 1e-6)


def test_lengths_may_be_symbols() -> None:
    b, s = export.symbolic_shape("b,s")
    shapes = {"query": (b, 1, 4, 16), "keys": (b, 2, 16, s), "values": (b, 2, s, 16)}
    types: dict[str, Any] = {n: jax.ShapeDtypeStruct(x, jnp.float32) for n, x in shapes.items()}
    types["lengths"] = jax.ShapeDtypeStruct((b,), jnp.int32)
    exported = export.export(jax.jit(lambda a: decode_attention(**a)), platforms=("cpu", "tpu"))(types)
    arrays = operands((3, 1, 4, 2, 16, 70, "float"), {})[0]
    close(exported.call(arrays), oracle(arrays), 3e-6)


def test_shard_map_over_batch_and_heads(fresh_python: Any) -> None:
    """On four devices, with the check of what varies: no collective is added; gradients are those of one device."""
    printed = fresh_python(
        """
        import jax, jax.numpy as jnp
        from jax.sharding import AxisType, PartitionSpec as P
        from kernels_pallas.decode import decode_attention, decode_oracle
        mesh = jax.make_mesh((2, 2), ("b", "n"), axis_types=(AxisType.Auto,) * 2)
        keys = jax.random.split(jax.random.key(0), 3)
        q = jax.random.normal(keys[0], (4, 2, 4, 16))
        k, v = (jax.random.normal(key, x) for key, x in zip(keys[1:], ((4, 2, 16, 600), (4, 2, 600, 16))))
        lengths, sinks = jnp.asarray([0, 5, 600, 300]), jnp.linspace(0.1, 1.0, 4)
        def run(f, q, k, v, lengths, sinks):
            return f(q, k, v, lengths, sinks=sinks)
        splits = P("b", None, "n"), P("b", "n"), P("b", "n"), P("b"), P("n")
        sharded = jax.shard_map(lambda *a: run(decode_attention, *a), mesh=mesh, in_specs=splits, out_specs=splits[0])
        def loss(f):
            return jax.jit(jax.grad(lambda *a: jnp.sum(jnp.sin(f(*a))), (0, 1, 2, 4)))
        args = q, k, v, lengths, sinks
        for a, b in zip(loss(sharded)(*args), loss(lambda *a: run(decode_oracle, *a))(*args)):
            assert jnp.max(jnp.abs(a - b)) < 2e-5, jnp.max(jnp.abs(a - b))
        places = [jax.sharding.NamedSharding(mesh, s) for s in splits]
        text = jax.jit(sharded, in_shardings=places).lower(*args).compile().as_text()
        assert not any(word in text for word in ("all-gather", "all-reduce", "all-to-all")), text
        print("same")
        """,
        devices=4,
    )
    assert printed.split() == ["same"]


@pytest.mark.parametrize(
    ("platform", "architecture", "taken"),
    [("cpu", None, "xla"), ("cuda", "9.0", "triton"), ("cuda", "7.5", "xla"), ("rocm", "gfx942", "triton"),
     ("tpu", "TPU v5e", "mosaic_tpu"), ("metal", None, "xla")],
)  # fmt: skip
def test_explain_says_what_is_taken(platform: str, architecture: str | None, taken: str) -> None:
    arrays = typed("int4")
    found = trustcore.kernels.explain("decode_attention", **arrays, platform=platform, architecture=architecture)
    assert found.taken == taken and f"{taken}: taken" in str(found)
    assert [v.implementation for v in found.verdicts] == [i.name for i in DECODE.implementations]
    assert all(v.taken or v.reason for v in found.verdicts)


@pytest.mark.parametrize(
    ("arrays", "platform", "reason"),
    [
        (typed("float", page=24), "cuda", "pages of 24 slots are no multiple of 16"),
        (typed("float", page=64), "tpu", "pages of 64 slots are no multiple of 128 up to 4096"),
        (typed("float", dtype="float16"), "tpu", "it takes float32 and bfloat16, not float16"),
        (typed("float", dtype="float64"), "cuda", "it takes float32, bfloat16 and float16, not float64"),
    ],
)
def test_a_refusal_says_why(arrays: dict[str, Any], platform: str, reason: str) -> None:
    found = explain(**arrays, platform=platform, architecture="9.0")
    assert found.taken == "xla" and reason in str(found)


def test_what_is_named_never_falls_back() -> None:
    arrays = operands((1, 1, 2, 1, 16, 8, "float"), {})[0]
    with pytest.raises(
        kernels_pallas.ImplementationError, match=r"'triton' cannot compute .* on cpu: it runs on cuda and"
    ):
        decode_attention(**arrays, implementation="triton")
    with pytest.raises(
        kernels_pallas.ImplementationError, match="'fast' is not known; choose of triton, mosaic_tpu, xla"
    ):
        decode_attention(**arrays, implementation="fast")
    with pytest.raises(kernels_pallas.ImplementationError, match="interpret=True needs one of triton, mosaic_tpu"):
        decode_attention(**arrays, interpret=True)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"lengths": jnp.zeros((2,), jnp.int32)}, r"lengths has the shape \[2\] and must have \[1\]"),
        ({"lengths": jnp.zeros((1,))}, "lengths is float32 and must be int32"),
        ({"keys": jnp.zeros((1, 1, 16, 8), jnp.int8)}, "keys are int8 and values float32; they must be of one dtype"),
        ({"values": jnp.zeros((1, 1, 7, 16))}, r"values has the shape \[1, 1, 7, 16\] and must have \[1, 1, 8, 16\]"),
        ({"key_scale": jnp.zeros((1, 1, 8))}, "key_scale has no place beside floats"),
        ({"query": jnp.zeros((1, 1, 2, 12))}, "B and H must agree and K must divide N"),
        ({"query": jnp.zeros((1, 2, 12))}, "must have 4 axes each"),
        ({"pages": jnp.zeros((2, 3), jnp.int32)}, r"pages has the shape \[2, 3\] and must have \[1, 3\]"),
        ({"window": 0}, "window is 0; it counts at least the query itself, 1"),
        ({"chunk": 0}, "chunk is 0; a chunk has at least one position"),
    ],
)
def test_errors_name_what_is_wrong(changed: dict[str, Any], message: str) -> None:
    arrays = operands((1, 1, 2, 1, 16, 8, "float"), {})[0]
    with pytest.raises(ValueError, match=message):
        decode_attention(**{**arrays, **changed})
