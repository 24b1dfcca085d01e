"""Attention against its oracle: one table of cases, every implementation, forward, backward, vmap, cache."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels_pallas.attention as kernels
from kernels_pallas.decode.oracle import decoded
from trustcore.errors import ImplementationError
from trustcore.ops import cpu
from trustcore.ops.attention import LayerCache, _encode_half, _hadamard, cached_attention

# B, T, N, K, H, S, window, soft cap
CASES = {
    "one token": (1, 1, 9, 3, 64, 100, None, None, None),
    "rows of several tokens": (2, 5, 4, 4, 32, 80, None, None, None),
    "many rows, many slots": (3, 40, 8, 2, 64, 700, None, None, None),
    "window and soft cap": (2, 70, 6, 2, 16, 300, 17, 20.0, None),
    "one token, long cache": (2, 1, 9, 3, 64, 1000, None, None, None),
    "one token, window": (2, 1, 9, 3, 64, 1000, 100, None, None),
    "more than a block of queries": (1, 600, 2, 1, 32, 640, None, None, None),
    "head size 80": (1, 3, 2, 2, 80, 50, None, None, None),
    "head size 24": (1, 3, 2, 2, 24, 50, None, None, None),
    "chunks": (2, 40, 6, 2, 64, 300, None, None, 48),
    "one token, chunks and window": (3, 1, 9, 3, 64, 1000, 100, None, 130),
}
# Largest difference for standard normal inputs. Codes of 8 bits are off by 1/254 of a vector's largest channel, float8
# by 1/16 of each channel, codes of 4 bits by 1/30 of a vector's range, which is about 5 wide.
TOLERANCE = {"float32": 2e-6, "bfloat16": 2e-2, "int8": 4e-2, "float8_e4m3fn": 1e-1, "int4": 2.5e-1}


def native_refusal(size, dtype="float32"):
    if cpu.why_not():
        return cpu.why_not()
    return "head size" if size % (cpu.vector_lanes() * (2 if dtype == "int4" else 1)) else ""


def tokens(case, seed=0):
    b, t, n, k, h, s, *_ = case
    rng = np.random.default_rng(seed)
    start = rng.integers(0, s - t + 1, b).astype(np.int32)
    shapes = (b, t, n, h), (b, s, k, h), (b, s, k, h)
    query, key, value = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes)
    return query, key, value, jnp.asarray(start)


def filled(case, key, value, start, dtype):
    """Returns a cache that holds `start[b]` tokens of row b, and the keys and values of the T that follow."""
    b, t, n, k, h, s, *_ = case
    cache = LayerCache.zeros(b, k, s, h, dtype)
    none = jnp.zeros((b, s, n, h))
    fill = jax.jit(lambda *a: cached_attention(*a, implementation="xla")[1])
    cache = fill(none, key, value, cache, jnp.zeros((b,), jnp.int32))
    part = [jnp.stack([x[i, start[i] : start[i] + t] for i in range(b)]) for x in (key, value)]
    # What lies beyond a row's length must not be seen: fill it with something that would show.
    beyond = jnp.arange(s)[None, :] >= start[:, None]
    poison = {"int8": 100, "float8_e4m3fn": 400, "int4": 255}.get(dtype, 1000)
    if cache.key_scale is not None:  # of slots that are free, the scale is what shows
        hidden = jnp.broadcast_to(beyond.reshape(b, 1, *[1] * (cache.key_scale.ndim - 3), s), cache.key_scale.shape)
        cache = cache._replace(key_scale=jnp.where(hidden, jnp.asarray(9, cache.key_scale.dtype), cache.key_scale))
    keys = jnp.where(beyond[:, None, None, :], jnp.asarray(poison, cache.keys.dtype), cache.keys)
    return cache._replace(keys=keys), part


def cached_cases():
    """Codes share their code paths: a few shapes show them, `-m slow` takes the rest."""
    few = ("one token", "rows of several tokens", "window and soft cap", "head size 80", "one token, long cache")
    for name in CASES:
        for implementation in ("native", "xla"):
            for dtype in TOLERANCE:
                if name == "chunks" and dtype in ("float8_e4m3fn", "int4"):
                    continue  # a query that begins a chunk sees one vector, and has the whole of its error
                quick = dtype not in ("float8_e4m3fn", "int4") or name in few
                yield pytest.param(name, implementation, dtype, marks=() if quick else pytest.mark.slow)


@pytest.mark.parametrize(("name", "implementation", "dtype"), list(cached_cases()))
def test_cached_attention(name, implementation, dtype):
    case = CASES[name]
    _, t, _, _, h, s, window, soft_cap, chunk = case
    if implementation == "native" and native_refusal(h, dtype):
        pytest.skip(native_refusal(h, dtype))
    query, key, value, start = tokens(case)
    cache, (new_key, new_value) = filled(case, key, value, start, dtype)
    out, extended = jax.jit(
        lambda *a: cached_attention(*a, window=window, chunk=chunk, soft_cap=soft_cap, implementation=implementation)
    )(query, new_key, new_value, cache, start)
    positions = start[:, None] + jnp.arange(t)[None, :]
    places = jnp.broadcast_to(jnp.arange(s), (query.shape[0], s))
    chunks = {} if chunk is None else {"query_segments": positions // chunk, "key_segments": places // chunk}
    oracle = jax.jit(
        lambda *a: kernels.attention_oracle(
            *a[:3], query_positions=a[3], key_positions=places, window=window, soft_cap=soft_cap, **chunks
        )
    )
    expected = oracle(query, key, value, positions)
    assert jnp.max(jnp.abs(out - expected)) < TOLERANCE[dtype]
    assert out.shape == query.shape and jax.tree.structure(extended) == jax.tree.structure(cache)
    before = jnp.arange(s)[None, :] < start[:, None]
    kept = jnp.where(before[:, None, :, None], extended.values.astype(jnp.float32), 0.0)
    assert (kept == jnp.where(before[:, None, :, None], cache.values.astype(jnp.float32), 0.0)).all()


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_both_implementations_write_the_same_cache(dtype):
    case = CASES["many rows, many slots"]
    if native_refusal(case[4]):
        pytest.skip(native_refusal(case[4]))
    query, key, value, start = tokens(case)
    cache, (new_key, new_value) = filled(case, key, value, start, dtype)
    written = [
        cached_attention(query, new_key, new_value, cache, start, implementation=i)[1] for i in ("native", "xla")
    ]
    for ours, theirs in zip(*map(jax.tree.leaves, written), strict=True):
        np.testing.assert_allclose(
            np.asarray(ours, np.float32), np.asarray(theirs, np.float32), rtol=1e-6, atol=1 if dtype == "int8" else 0
        )


def test_each_narrower_cache_takes_about_half():
    """Of a head of 64 channels; scales take 4 bytes of a vector in every form that has them."""
    nbytes = {d: sum(x.nbytes for x in jax.tree.leaves(LayerCache.zeros(2, 3, 100, 64, d))) for d in TOLERANCE}
    vectors = 2 * 2 * 3 * 100
    assert nbytes == {
        "float32": vectors * 256,
        "bfloat16": vectors * 128,
        "int8": vectors * (64 + 4),
        "float8_e4m3fn": vectors * (64 + 4),
        "int4": vectors * (32 + 4),
    }
    with pytest.raises(ImplementationError, match="int4 packs channels in pairs and the head size is 7"):
        LayerCache.zeros(1, 1, 8, 7, "int4")


@settings(max_examples=30, deadline=None)
@given(size=st.integers(1, 130), seed=st.integers(0, 99))
def test_the_hadamard_transform_is_orthogonal_and_its_own_inverse(size, seed):
    x, y = jnp.asarray(np.random.default_rng(seed).standard_normal((2, 3, size)), jnp.float32)
    np.testing.assert_allclose(_hadamard(_hadamard(x)), x, atol=1e-5)
    np.testing.assert_allclose(jnp.sum(_hadamard(x) * _hadamard(y), -1), jnp.sum(x * y, -1), atol=1e-4)


def test_four_bits_bear_a_channel_that_is_larger_than_the_rest():
    """As keys have them: without the transform such a channel takes most of the codes."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 1, 64, 500)), jnp.float32).at[:, :, 5].add(12.0)

    def error(x):
        pair, scale = _encode_half(x, jnp.dtype(jnp.uint8), axis=2)
        return jnp.sqrt(jnp.mean((decoded(pair, scale, 2) - x) ** 2))

    turned = _hadamard(x.swapaxes(2, 3)).swapaxes(2, 3)  # orthogonal: errors keep their length
    assert error(turned) < 0.55 * error(x)


@pytest.mark.parametrize("implementation", ("native", "xla"))
def test_tokens_beyond_the_last_slot_are_dropped(implementation):
    if implementation == "native" and native_refusal(32):
        pytest.skip(native_refusal(32))
    cache = LayerCache.zeros(2, 1, 10, 32, "float32")
    x = jnp.ones((2, 4, 1, 32)) * (1 + jnp.arange(4)).astype(jnp.float32)[None, :, None, None]
    _, cache = cached_attention(x, x, x, cache, jnp.asarray([8, 3], jnp.int32), implementation=implementation)
    assert cache.values[:, 0, :, 0].tolist() == [[0] * 8 + [1, 2], [0] * 3 + [1, 2, 3, 4] + [0] * 3]
    assert cache.keys[:, 0, 0, :].tolist() == cache.values[:, 0, :, 0].tolist()


@pytest.mark.parametrize("name", CASES)
def test_attention_without_a_cache(name):
    case = CASES[name]
    _, t, _, _, _, _, window, soft_cap, _ = case
    query, key, value, start = tokens(case)
    options = {"query_positions": start[:, None] + jnp.arange(t)[None, :], "window": window, "soft_cap": soft_cap}

    def loss(f, *a):
        out = f(*a, **options)
        return jnp.sum(out * jnp.cos(jnp.arange(out.size, dtype=jnp.float32).reshape(out.shape)))

    ours, oracle = (jax.jit(lambda *a, f=f: f(*a, **options)) for f in (kernels.attention, kernels.attention_oracle))
    assert jnp.max(jnp.abs(ours(query, key, value) - oracle(query, key, value))) < TOLERANCE["float32"]
    ours = jax.jit(jax.grad(lambda *a: loss(kernels.attention, *a), (0, 1, 2)))(query, key, value)
    oracle = jax.jit(jax.grad(lambda *a: loss(kernels.attention_oracle, *a), (0, 1, 2)))(query, key, value)
    for a, b in zip(ours, oracle, strict=True):
        assert jnp.max(jnp.abs(a - b)) < 2e-5


@settings(max_examples=15, deadline=None)
@given(
    b=st.integers(1, 3),
    t=st.integers(1, 9),
    k=st.integers(1, 3),
    g=st.integers(1, 4),
    s=st.integers(1, 40),
    h=st.sampled_from((8, 16, 48)),
    causal=st.booleans(),
    window=st.none() | st.integers(1, 12),
    seed=st.integers(0, 99),
)
def test_any_shape(b, t, k, g, s, h, causal, window, seed):
    rng = np.random.default_rng(seed)
    shapes = (b, t, k * g, h), (b, s, k, h), (b, s, k, h)
    query, key, value = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes)
    places = rng.integers(0, s + 5, (b, t)), rng.integers(-2, s + 5, (b, s))  # negative: never visible
    positions = [jnp.asarray(p, jnp.int32) for p in places]

    @jax.jit
    def difference(query, key, value, query_positions, key_positions):
        given = {"query_positions": query_positions, "key_positions": key_positions, "causal": causal, "window": window}
        args = (query, key, value)
        return jnp.max(jnp.abs(kernels.attention(*args, **given) - kernels.attention_oracle(*args, **given)))

    assert difference(query, key, value, *positions) < TOLERANCE["float32"]


def test_a_query_that_sees_nothing_gives_zeros_and_no_nan():
    x = jnp.ones((1, 2, 2, 16))
    hidden = jnp.full((1, 2), -1, jnp.int32)
    out, grads = jax.value_and_grad(lambda q: kernels.attention(q, x, x, key_positions=hidden).sum())(x)
    assert out == 0 and (grads == 0).all()


@pytest.mark.parametrize("implementation", ("native", "xla"))
def test_cached_attention_under_vmap_and_grad(implementation):
    case = CASES["rows of several tokens"]
    if implementation == "native" and native_refusal(case[4]):
        pytest.skip(native_refusal(case[4]))
    query, key, value, start = tokens(case)
    cache, (new_key, new_value) = filled(case, key, value, start, "float32")
    args = (query, new_key, new_value, cache, start)
    out, extended = cached_attention(*args, implementation=implementation)

    lifted = jax.tree.map(lambda x: jnp.stack([x, x]), args)
    outs, caches = jax.vmap(lambda *a: cached_attention(*a, implementation=implementation))(*lifted)
    assert jnp.max(jnp.abs(outs[1] - out)) < 1e-6
    assert all((a[1] == b).all() for a, b in zip(*map(jax.tree.leaves, (caches, extended)), strict=True))

    def loss(implementation, query, new_key):
        return jnp.sum(cached_attention(query, new_key, *args[2:], implementation=implementation)[0] ** 2)

    ours = jax.jit(jax.grad(lambda *a: loss(implementation, *a), (0, 1)))(query, new_key)
    plain = jax.jit(jax.grad(lambda *a: loss("xla", *a), (0, 1)))(query, new_key)
    for a, b in zip(ours, plain, strict=True):
        assert jnp.max(jnp.abs(a - b)) < 1e-5 and jnp.any(a != 0)


def test_a_donated_cache_is_extended_in_place():
    cache = LayerCache.zeros(1, 2, 4096, 64, "float32")
    x, start = jnp.ones((1, 1, 2, 64)), jnp.zeros((1,), jnp.int32)
    step = jax.jit(cached_attention, donate_argnums=3)
    compiled = step.lower(x, x, x, cache, start).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= cache.keys.nbytes + cache.values.nbytes
    assert memory.temp_size_in_bytes < cache.keys.nbytes / 4  # nothing is held of that size


def test_errors_name_shapes_and_reasons():
    q = jnp.ones((1, 2, 3, 16))
    with pytest.raises(ValueError, match=r"query \[B, T, N, H\] \[1, 2, 3, 16\] does not fit key .* \[1, 4, 2, 16\]"):
        kernels.attention(q, jnp.ones((1, 4, 2, 16)), jnp.ones((1, 4, 2, 16)))
    with pytest.raises(ValueError, match=r"key \[1, 4, 3, 16\] and value \[1, 5, 3, 16\] must agree"):
        kernels.attention(q, jnp.ones((1, 4, 3, 16)), jnp.ones((1, 5, 3, 16)))
    cache = LayerCache.zeros(1, 3, 1, 16, "float32")
    with pytest.raises(ValueError, match="2 tokens do not fit a cache of 1 slots"):
        cached_attention(q, q, q, cache, jnp.zeros((1,), jnp.int32), implementation="xla")
    with pytest.raises(ImplementationError, match="'fast' is not known; choose of native, triton, mosaic_tpu, xla"):
        cached_attention(q, q, q, cache, jnp.zeros((1,), jnp.int32), implementation="fast")
    with pytest.raises(ImplementationError, match="a cache of float16 is not float32, bfloat16, int8, float8_e4m3fn"):
        half = LayerCache.zeros(1, 3, 8, 16, "float16")
        cached_attention(q, q, q, half, jnp.zeros((1,), jnp.int32), implementation="native")


@pytest.mark.parametrize(
    ("case", "options"),
    [
        ("rows of several tokens", "slopes"),
        ("window and soft cap", "sinks"),
        ("more than a block of queries", "both"),
    ],
)
def test_slopes_sinks_and_values_of_another_size(case, options):
    """Without a cache and with one; the CPU handler says why it does not take them."""
    case = CASES[case]
    query, key, value, start = tokens(case)
    window, soft_cap, _ = case[6:]
    value = value[..., :8]
    rng = np.random.default_rng(5)
    given = {name: jnp.asarray(rng.uniform(0.1, 1, case[2]), jnp.float32) for name in ("slopes", "sinks")}
    given = given if options == "both" else {options: given[options]}
    positions = start[:, None] + jnp.arange(case[1])[None]
    shape = {"window": window, "soft_cap": soft_cap, "query_positions": positions}
    expected = kernels.attention_oracle(query, key, value, **shape, **given)
    found = kernels.attention(query, key, value, **shape, **given)
    np.testing.assert_allclose(found, expected, atol=2e-5)

    b, t, _, k, h, s, *_ = case
    cache = LayerCache.zeros(b, k, s, h, "float32", value_size=8)
    cache = cache._replace(keys=key.transpose(0, 2, 3, 1), values=value.transpose(0, 2, 1, 3))
    part = [jnp.stack([x[i, start[i] : start[i] + t] for i in range(b)]) for x in (key, value)]
    cached, _ = cached_attention(query, *part, cache, start, window=window, soft_cap=soft_cap, **given)
    np.testing.assert_allclose(cached, expected, atol=2e-5)

    def total(function):
        options = {k: v for k, v in shape.items() if k != "query_positions"}

        def sum_of(given, positions):
            return jnp.sum(jnp.sin(function(query, key, value, query_positions=positions, **options, **given)))

        return jax.jit(jax.grad(sum_of))(given, positions)

    for found, wanted in zip(
        *map(jax.tree.leaves, map(total, (kernels.attention, kernels.attention_oracle))), strict=True
    ):
        np.testing.assert_allclose(found, wanted, atol=2e-4)
    if not native_refusal(h):
        with pytest.raises(ImplementationError, match=r"'native' cannot compute this call: it has no"):
            cached_attention(query, *part, cache, start, implementation="native", **given)
        with pytest.raises(ImplementationError, match=f"values of size 8 beside keys of size {h}"):
            cached_attention(query, *part, cache, start, implementation="native")
