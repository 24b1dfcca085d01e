"""The selective scan against the recurrence, token by token: outputs, states, gradients, vmap, memory, other chips."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import kernels_pallas
import trustcore
from kernels_pallas.dispatch import Target
from kernels_pallas.selective_scan import SELECTIVE_SCAN, selective_scan, selective_scan_oracle, tpu, triton, xla
from kernels_pallas.selective_scan.front import Call

# B, T, I, S and the chunk.
CASES = {"whole chunks": (2, 12, 5, 3, 4), "a rest": (1, 11, 6, 4, 4), "one token": (3, 1, 4, 2, 8)}
NAMES = ("x", "dt", "decay", "b", "c", "state")


def operands(name: str, dtype: str = "float32") -> dict[str, jax.Array]:
    batch, length, inner, size, _ = CASES[name]
    rng = np.random.default_rng(length)
    sizes = [(batch, length, inner)] * 2 + [(inner, size)] + [(batch, length, size)] * 2 + [(batch, inner, size)]
    made = dict(zip(NAMES, (rng.standard_normal(s) for s in sizes), strict=True))
    made["dt"], made["decay"] = np.log1p(np.exp(made["dt"])), -np.exp(made["decay"])
    return {n: jnp.asarray(z, dtype) for n, z in made.items()}


def total(function: Any, arrays: Any) -> Any:
    y, last = function(**arrays)
    return jnp.sum(jnp.sin(y.astype(jnp.float32))) + jnp.sum(jnp.cos(2 * last.astype(jnp.float32))), (y, last)


def both(arrays: Any, function: Any, oracle: Any = selective_scan_oracle) -> Any:
    return tuple(jax.jit(jax.grad(functools.partial(total, f), has_aux=True))(arrays) for f in (function, oracle))


def close(found: Any, expected: Any, atol: float) -> None:
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, rtol=0, atol=atol * max(1.0, float(np.max(np.abs(b), initial=0))))


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
@pytest.mark.parametrize("name", CASES)
def test_outputs_states_and_gradients(name: str, platform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both forms; that of GPUs and TPUs is plain XLA as well and runs here."""
    if platform != "cpu":
        monkeypatch.setattr(xla, "_PARALLEL", ("cpu",))
    jax.clear_caches()
    close(*both(operands(name), functools.partial(selective_scan, chunk=CASES[name][4])), 3e-6)
    jax.clear_caches()


def test_bfloat16_and_float64() -> None:
    close(*both(operands("a rest", "bfloat16"), selective_scan), 2e-2)
    with jax.enable_x64(True):
        close(*both(operands("a rest", "float64"), selective_scan), 1e-6)  # the sum of the test is float32


@pytest.mark.parametrize("mapped", ["tokens", "decay, too"])
def test_vmap(mapped: str) -> None:
    arrays = operands("a rest")
    axes = {n: (1 if n == "x" else None) for n in NAMES} | {"c": 0} | ({"decay": 0} if "decay" in mapped else {})
    arrays = {n: z if axes[n] is None else jnp.stack([z, z * 0.5], axes[n]) for n, z in arrays.items()}

    def lifted(f: Any) -> Any:
        return lambda **arrays: jax.vmap(lambda a: f(**a), (axes,))(arrays)

    close(*both(arrays, lifted(functools.partial(selective_scan, chunk=4)), lifted(selective_scan_oracle)), 3e-6)


def test_memory_is_a_chunk_of_states() -> None:
    """Of 2048 tokens: the states of all would be 67 MB, and autodiff of the recurrence keeps several of them."""
    shapes = ((1, 2048, 256), (1, 2048, 256), (256, 32), (1, 2048, 32), (1, 2048, 32), (1, 256, 32))
    arrays = {n: jax.ShapeDtypeStruct(s, jnp.float32) for n, s in zip(NAMES, shapes, strict=True)}

    def temporary(function: Any) -> int:
        gradient = jax.jit(jax.grad(lambda a: total(function, a)[0]))
        memory = gradient.lower(arrays).compile().memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    every = 2048 * 256 * 32 * 4
    assert temporary(selective_scan) < every // 2
    assert temporary(selective_scan_oracle) > 2 * every


# B, T, I, S and the chunk: tails of tokens, channels and numbers; several blocks of channels
KERNEL_CASES = {
    "tails": (2, 21, 5, 3, 8), "blocks of channels": (1, 11, 140, 16, 16), "chunks": (1, 70, 6, 20, 32),
    "one token": (1, 1, 130, 2, 8), "a large state": (1, 9, 8, 128, 8),
}  # fmt: skip
QUICK = ("tails", "blocks of channels")
BLOCKS = {"triton": triton.Blocks(32, 4), "mosaic_tpu": tpu.Blocks(128)}


@pytest.mark.parametrize("implementation", ["triton", "mosaic_tpu"])
@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in KERNEL_CASES])
def test_kernels_in_the_interpreter(name: str, implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs, the last state, and every gradient, of y and of the state."""
    module = triton if implementation == "triton" else tpu
    width = min(BLOCKS[implementation].channels, KERNEL_CASES[name][2])
    width = 1 << (width - 1).bit_length() if implementation == "triton" else width
    monkeypatch.setattr(module, "blocks_of", lambda call: dataclasses.replace(BLOCKS[implementation], channels=width))
    monkeypatch.setitem(CASES, name, KERNEL_CASES[name])
    chosen = {"chunk": KERNEL_CASES[name][4], "implementation": implementation, "interpret": True}
    # The test's cotangents are cosines of sums of S numbers, whose rounding is theirs.
    close(*both(operands(name), functools.partial(selective_scan, **chosen)), 3e-6 if name != "a large state" else 3e-4)
    y, last = selective_scan(**operands(name), **chosen)  # no gradient, so no states are kept
    close((y, last), selective_scan_oracle(**operands(name)), 3e-6)


@pytest.mark.parametrize("implementation", ["triton", "mosaic_tpu"])
def test_kernels_take_half_floats_and_vmap(implementation: str) -> None:
    run = functools.partial(selective_scan, chunk=8, implementation=implementation, interpret=True)
    found, expected = (f(**operands("a rest", "bfloat16")) for f in (run, selective_scan_oracle))
    close(found, expected, 2e-2)
    arrays = operands("a rest")
    several = {**arrays, "x": jnp.stack([arrays["x"], 2 * arrays["x"]])}
    axes = {n: 0 if n == "x" else None for n in NAMES}
    close(*(jax.vmap(lambda a, f=f: f(**a), (axes,))(several) for f in (run, selective_scan_oracle)), 3e-6)


@pytest.mark.parametrize(
    ("platform", "kind", "mark"),
    [
        ("cuda", "NVIDIA H200", "__gpu$xla.gpu.triton"),
        ("rocm", "gfx942", "__gpu$xla.gpu.triton"),
        ("tpu", "TPU v5 lite", "tpu_custom_call"),
    ],
)
def test_kernels_lower_for_their_platforms(platform: str, kind: str, mark: str) -> None:
    """Forward and backward, taken without a name; memory is what is given and returned."""
    shapes = ((2, 100, 300), (2, 100, 300), (300, 16), (2, 100, 16), (2, 100, 16), (2, 300, 16))
    arrays = {n: jax.ShapeDtypeStruct(s, jnp.float32) for n, s in zip(NAMES, shapes, strict=True)}
    gradient = jax.jit(jax.grad(lambda a: total(selective_scan, a)[0]))
    with kernels_pallas.abstract_device(kind, platform if platform == "tpu" else "gpu"):
        text = gradient.trace(arrays).lower(lowering_platforms=(platform,)).as_text()
    assert text.count(mark) == 2 and "stablehlo.while" not in text


@pytest.mark.parametrize(
    ("change", "options", "platform", "reason"),
    [
        ({"x": "float64"}, {}, "cuda", "x is float64"),
        ({}, {"chunk": 12}, "tpu", "chunks of 12 tokens are no multiple of 8"),
        ({"b": "float16"}, {}, "tpu", "b is float16"),
        ({}, {}, "cpu", "runs on cuda and rocm, not on cpu"),
    ],
)
def test_kernels_say_why_they_cannot(change: Any, options: Any, platform: str, reason: str) -> None:
    arrays = {n: jax.ShapeDtypeStruct(z.shape, change.get(n, "float32")) for n, z in operands("a rest").items()}
    call = Call(arrays, options.get("chunk", 32))
    target = Target(platform, "any chip")
    name = "mosaic_tpu" if platform == "tpu" else "triton"
    assert reason in SELECTIVE_SCAN.named(name).refusal(target, call)
    backward = Call({**arrays, "of_y": arrays["x"]}, 128)
    assert "longer than 64" in triton.refusal(
        Target("rocm", "gfx942"),
        backward._replace(
            arrays=backward.arrays | {n: jax.ShapeDtypeStruct(arrays[n].shape, "float32") for n in ("x", "b")}
        ),
    )


@pytest.mark.parametrize("platform", ["cuda", "rocm", "tpu"])
def test_xla_has_no_loop_over_tokens_on_other_platforms(platform: str) -> None:
    """On a CPU the loop is over 64 tokens, elsewhere over two chunks of 32."""
    z = jax.ShapeDtypeStruct((1, 64, 8), jnp.float32)
    plain = functools.partial(selective_scan, implementation="xla")
    traced = jax.jit(lambda *a: plain(*a)[0]).trace(z, z, jax.ShapeDtypeStruct((8, 8), jnp.float32), z, z)
    lowered = {p: traced.lower(lowering_platforms=(p,)).as_text() for p in (platform, "cpu")}
    assert "dense<64> : tensor<i32>" in lowered["cpu"] and "dense<64> : tensor<i32>" not in lowered[platform]


def test_one_program_for_every_platform_and_any_length() -> None:
    (length,) = export.symbolic_shape("t")
    arrays = operands("a rest")
    shapes = {
        n: jax.ShapeDtypeStruct((1, length, z.shape[2]) if n in ("x", "dt", "b", "c") else z.shape, z.dtype)
        for n, z in arrays.items()
    }
    gradient = jax.jit(jax.grad(lambda a: total(selective_scan, a)[0]))
    exported = export.export(gradient, platforms=("cpu", "cuda", "tpu"))(shapes)
    close(exported.call(arrays), gradient(arrays), 1e-6)


def test_explain_and_errors() -> None:
    a = operands("a rest")
    given = [a[n] for n in NAMES[:5]]
    for platform, chip, taken in (("cuda", "9.0", "triton"), ("tpu", "TPU v5e", "mosaic_tpu"), ("cpu", None, "xla")):
        found = trustcore.kernels.explain("selective_scan", *given, platform=platform, architecture=chip)
        assert found.taken == taken
    assert Target("cpu") == trustcore.kernels.explain("selective_scan", *given, platform="cpu").target
    with pytest.raises(ValueError, match=r"b has the shape \[1, 10, 4\] and must have \[1, 11, 4\]"):
        selective_scan(**{**a, "b": a["b"][:, 1:]})
    with pytest.raises(ValueError, match="chunk is 0; it counts tokens, at least 1"):
        selective_scan(**a, chunk=0)
    with pytest.raises(
        kernels_pallas.ImplementationError, match="'fast' is not known; choose of triton, mosaic_tpu, xla"
    ):
        selective_scan(**a, implementation="fast")
