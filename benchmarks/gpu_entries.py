"""What `gpu.py` measures: one table of entries. A further kernel is a further entry.

An entry has contenders, each a function of the same operands; the operands at a size that fills a chip; the work that a
perfect program could not avoid, in FLOPs or bytes; and a small case with its oracle, which a contender must pass first.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.attention import attention, attention_oracle
from kernels_pallas.cross_entropy import cross_entropy, cross_entropy_oracle
from kernels_pallas.decode import decode_attention, decode_oracle
from kernels_pallas.glu import bias_activation, bias_activation_oracle, glu, glu_oracle
from kernels_pallas.grouped_matmul import grouped_matmul, grouped_matmul_oracle
from kernels_pallas.norm import layer_norm, layer_norm_oracle, rms_norm, rms_norm_oracle
from kernels_pallas.packed import Layout, Plane, packed_matmul, packed_oracle
from kernels_pallas.rope import rope, rope_oracle
from kernels_pallas.selective_scan import selective_scan, selective_scan_oracle
from kernels_pallas.softmax import softmax, softmax_oracle

BFLOAT16 = jnp.bfloat16


class Missing(RuntimeError):
    """A contender cannot be had here."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """One row of the benchmark.

    Attributes:
        name: of the entry.
        unit: "flops" or "bytes", of `work`.
        work: of one call.
        contenders: by name; a function may raise `Missing`.
        operands: of a key, at full size.
        small: operands of the check.
        oracle: of the same operands as float32.
        tolerance: the largest norm of the error over the norm of the truth.
        backward: the gradients of `smooth` are timed, from what the forward pass keeps.
        smooth: positions of the operands that have gradients, of a backward entry.
        torch: of the operands as tensors: a function for each peer there; None has none.
    """

    name: str
    unit: str
    work: float
    contenders: dict[str, Callable[..., Any]]
    operands: Callable[[jax.Array], tuple[Any, ...]]
    small: Callable[[jax.Array], tuple[Any, ...]]
    oracle: Callable[..., Any]
    tolerance: float = 1e-2
    backward: bool = False
    smooth: tuple[int, ...] = (0, 1, 2)
    torch: dict[str, Any] | None = None


def entries(*, dry: bool = False) -> Iterator[Entry]:
    """Yields every entry, the most wanted first; `dry` with tiny shapes."""
    first, *others = _SHAPES if not dry else [(64, 64, True, 2, None)]
    yield from _attention(first, dry)
    yield from _packed(dry)
    yield from _decode(dry)
    yield from _rows(dry)
    yield from _cross_entropy(dry)
    yield from _grouped(dry)
    yield from _scans(dry)
    yield from _rope(dry)
    for shape in others:
        yield from _attention(shape, dry)


def normal(*shapes: tuple[int, ...], dtype: Any = BFLOAT16) -> Callable[[jax.Array], tuple[jax.Array, ...]]:
    """Returns a function of a key that makes arrays of those shapes."""

    def make(key: jax.Array) -> tuple[jax.Array, ...]:
        keys = jax.random.split(key, len(shapes))
        return tuple(jax.random.normal(k, s, dtype) for k, s in zip(keys, shapes, strict=True))

    return make


# Head size, length, causal, query heads for each key head, window
_SHAPES = [
    (128, 16384, True, 1, None),
    (128, 16384, False, 1, None),
    (64, 16384, True, 1, None),
    (128, 4096, True, 1, None),
    (128, 16384, True, 4, None),
    (256, 8192, True, 1, None),
    (64, 16384, True, 1, 1024),
]


def _attention(shape: tuple[int, int, bool, int, int | None], dry: bool) -> Iterator[Entry]:
    size, length, causal, group, window = shape
    heads, batch = (2, 1) if dry else (2048 // size, max(1, 16384 // length))
    full = (batch, length, heads, size), *((batch, length, heads // group, size),) * 2
    small = (2, 300, 4, size), *((2, 300, 4 // group, size),) * 2
    pairs = length * length * (0.5 if causal else 1.0)
    pairs = pairs if window is None else window * (length - window / 2)
    notes = (
        [", causal"] * causal + [f", {group} in a group"] * (group > 1) + [f", window {window}"] * (window is not None)
    )
    what = "x".join(map(str, full[0])) + "".join(notes)
    options = {"causal": causal, "window": window}
    contenders = {n: functools.partial(attention, **options, implementation=n) for n in ("mosaic_gpu", "triton", "xla")}
    contenders["cudnn"] = functools.partial(_jax_nn, **options, implementation="cudnn")
    contenders["trustcore cudnn"] = functools.partial(attention, **options, implementation="cudnn")
    if length <= 4096:
        contenders["jax.nn xla"] = functools.partial(_jax_nn, **options, implementation="xla")
    peers: dict[str, Any] = {}
    if window is None:
        contenders["tokamax"] = functools.partial(_tokamax, causal=causal)
        kinds = {"torch flash": "FLASH_ATTENTION", "torch cudnn": "CUDNN_ATTENTION"}
        peers = {n: functools.partial(_torch_sdpa, kind, causal) for n, kind in kinds.items()}
    for backward in (False, True):
        yield Entry(
            f"attention {'backward' if backward else 'forward'} {what}", "flops",
            4.0 * batch * heads * size * pairs * (2.5 if backward else 1.0), contenders, normal(*full), normal(*small),
            functools.partial(attention_oracle, **options), backward=backward, torch=peers,
        )  # fmt: skip


def _jax_nn(query: Any, key: Any, value: Any, *, causal: bool, window: int | None, implementation: Any) -> Any:
    if implementation == "cudnn" and jax.default_backend() != "gpu":
        raise Missing("cuDNN needs an NVIDIA GPU")
    sides = None if window is None else (window - 1, 0)
    return jax.nn.dot_product_attention(
        query, key, value, is_causal=causal, local_window_size=sides, implementation=implementation
    )


def _tokamax(query: Any, key: Any, value: Any, *, causal: bool) -> Any:
    try:
        import tokamax  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise Missing(f"tokamax is not installed: {error}") from error
    return tokamax.dot_product_attention(query, key, value, is_causal=causal)


def _torch_sdpa(kind: str, causal: bool, torch: Any, query: Any, key: Any, value: Any) -> Any:
    backend = getattr(torch.nn.attention.SDPBackend, kind)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    with torch.nn.attention.sdpa_kernel(backend):
        grouped = q.shape[1] != k.shape[1]
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)
    return out.transpose(1, 2)


def _rows(dry: bool) -> Iterator[Entry]:
    rows, size = (64, 128) if dry else (65536, 4096)
    matrix, column = (rows, size), (size,)
    table: dict[str, tuple[Any, Any, tuple[tuple[int, ...], ...], int]] = {
        "RMSNorm": (rms_norm, rms_norm_oracle, (matrix, column), 1),
        "RMSNorm and residual": (rms_norm, rms_norm_oracle, (matrix, column, matrix), 2),
        "LayerNorm": (layer_norm, layer_norm_oracle, (matrix, column, column), 1),
        "SwiGLU": (glu, glu_oracle, (matrix, matrix), 1),
        "bias and GELU": (bias_activation, bias_activation_oracle, (matrix, column), 1),
        "softmax": (softmax, softmax_oracle, (matrix,), 1),
    }
    for name, (op, oracle, shapes, results) in table.items():
        matrices = sum(s == matrix for s in shapes)
        small = tuple((77, 1000) if s == matrix else (1000,) for s in shapes)
        for backward in (False, True):
            # forward: operands and results; backward: one operand of a sum for all, cotangents and gradients
            moved = (
                results + (2 * matrices if name != "RMSNorm and residual" else 2) if backward else matrices + results
            )
            yield Entry(
                f"{name} {'backward' if backward else 'forward'} {rows}x{size}", "bytes", 2.0 * rows * size * moved,
                {"triton": functools.partial(op, implementation="triton"), "xla, plain": oracle}, normal(*shapes),
                normal(*small), oracle, backward=backward, smooth=tuple(range(len(shapes))),
            )  # fmt: skip


def _cross_entropy(dry: bool) -> Iterator[Entry]:
    rows, size, vocabulary = (32, 64, 100) if dry else (8192, 4096, 128256)

    def operands(rows: int, size: int, vocabulary: int) -> Callable[[jax.Array], tuple[Any, ...]]:
        def make(key: jax.Array) -> tuple[Any, ...]:
            hidden, table = normal((rows, size), (size, vocabulary))(key)
            return hidden, table * jnp.asarray(size**-0.5, table.dtype), jax.random.randint(key, (rows,), 0, vocabulary)

        return make

    for backward in (False, True):
        yield Entry(
            f"cross-entropy {'backward' if backward else 'forward'} {rows}x{size}x{vocabulary}", "flops",
            2.0 * rows * size * vocabulary * (2 if backward else 1),
            {"trustcore": cross_entropy, "xla, plain": cross_entropy_oracle}, operands(rows, size, vocabulary),
            operands(50, 64, 1000), cross_entropy_oracle, backward=backward, smooth=(0, 1),
        )  # fmt: skip


_CODES = (Plane("codes", 4, 16),)
_FLOAT4 = (0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0)  # doubled
_LAYOUTS = (
    Layout("int4 by 128", 128, (Plane("codes", 4),), extra="zero"),
    Layout("q4_0", 32, _CODES, offset=8),
    Layout("q8_0", 32, (Plane("codes", 8),), "signed"),
    Layout("mxfp4", 32, _CODES, "table", kind="power", table=(*_FLOAT4, *(-x for x in _FLOAT4)), halved=1),
    Layout("e4m3 by 128", 128, (Plane("codes", 8),), "e4m3"),
)


def _packed(dry: bool) -> Iterator[Entry]:
    """Products of one token, of some, and of a prompt with packed weights; and those of bfloat16 to set them beside."""
    size, width = (256, 128) if dry else (8192, 8192)
    for rows in (1, 16, 4096 if not dry else 32):
        few = rows < 256
        yield Entry(
            f"product of bfloat16 {rows}x{size}x{width}", *_product_work(rows, size, width, 16.0, few),
            {"xla": jnp.matmul}, normal((rows, size), (size, width)), normal((rows, 256), (256, 128)), jnp.matmul,
        )  # fmt: skip
        for layout in _LAYOUTS:
            shapes = _fields(layout, size, width)
            bits = 8.0 * sum(x.size * x.dtype.itemsize for x in shapes) / (size * width)
            both = {
                "triton": functools.partial(_multiply, packed_matmul, layout, implementation="triton"),
                "xla, decoded whole": functools.partial(_multiply, packed_oracle, layout),
            }
            yield Entry(
                f"product of {layout.name} {rows}x{size}x{width}", *_product_work(rows, size, width, bits, few), both,
                functools.partial(_packed_operands, layout, rows, size, width),
                functools.partial(_packed_operands, layout, rows, 256, 128), both["xla, decoded whole"],
            )  # fmt: skip


def _product_work(rows: int, size: int, width: int, bits: float, few: bool) -> tuple[str, float]:
    if few:
        return "bytes", size * width * bits / 8 + 2.0 * rows * (size + width)
    return "flops", 2.0 * rows * size * width


def _multiply(op: Callable[..., Any], layout: Layout, x: Any, *fields: Any, **options: Any) -> Any:
    return op(x, dict(zip(layout.fields, fields, strict=True)), layout=layout, **options).astype(x.dtype)


def _fields(layout: Layout, size: int, width: int) -> list[jax.ShapeDtypeStruct]:
    signed = {"signed": jnp.int8}.get(layout.number, jnp.uint8)
    blocks = size // layout.block
    codes = [jax.ShapeDtypeStruct((blocks, layout.rows(p), width), signed) for p in layout.planes]
    scale = jnp.uint8 if layout.kind == "power" else jnp.float16
    return [*codes, *(jax.ShapeDtypeStruct((blocks, width), scale) for _ in layout.fields[len(codes) :])]


def _packed_operands(layout: Layout, rows: int, size: int, width: int, key: jax.Array) -> tuple[Any, ...]:
    keys = jax.random.split(key, 4)
    codes, *scales = _fields(layout, size, width)
    # of e4m3 without its two NaN
    made = [
        jax.random.randint(keys[0], codes.shape, *((-127, 128) if codes.dtype == jnp.int8 else (0, 127)), jnp.int32)
    ]
    made[0] = made[0].astype(codes.dtype)
    for i, scale in enumerate(scales):
        if scale.dtype == jnp.uint8:
            made.append(jax.random.randint(keys[1], scale.shape, 120, 127, jnp.int32).astype(jnp.uint8))
        else:
            made.append((jax.random.uniform(keys[2 + i], scale.shape) * (0.02 if i == 0 else 8.0)).astype(scale.dtype))
    return jax.random.normal(keys[3], (rows, size), BFLOAT16), *made


def _decode(dry: bool) -> Iterator[Entry]:
    """A token of each row of a batch over a long cache: its bytes are the work."""
    batch, slots, kv_heads, group, size = (2, 64, 2, 2, 64) if dry else (32, 8192, 8, 4, 128)
    for kind in ("bfloat16", "int8"):
        full, small = (batch, slots, kv_heads, group, size), (2, 300, 2, 4, 64)
        contenders = {n: functools.partial(_over_cache, decode_attention, implementation=n) for n in ("triton", "xla")}
        each = 2.0 if kind == "bfloat16" else 1.0 + 4.0 / size
        yield Entry(
            f"decoding {batch}x{slots}, {kv_heads * group} and {kv_heads} heads of {size}, {kind}", "bytes",
            2.0 * batch * slots * kv_heads * size * each, contenders, functools.partial(_cache, kind, *full),
            functools.partial(_cache, kind, *small), functools.partial(_over_cache, decode_oracle),
        )  # fmt: skip


def _over_cache(
    op: Callable[..., Any], query: Any, keys: Any, values: Any, lengths: Any, *scales: Any, **options: Any
) -> Any:
    options |= dict(zip(("key_scale", "value_scale"), scales, strict=False))
    return op(query, keys, values, lengths, **options).astype(query.dtype)


def _cache(
    kind: str, batch: int, slots: int, kv_heads: int, group: int, size: int, key: jax.Array
) -> tuple[jax.Array, ...]:
    keys = jax.random.split(key, 5)
    query = jax.random.normal(keys[0], (batch, 1, kv_heads * group, size), BFLOAT16)
    shapes = (batch, kv_heads, size, slots), (batch, kv_heads, slots, size)
    lengths = jnp.full((batch,), slots, jnp.int32).at[0].set(slots - 7)
    if kind == "bfloat16":
        return query, *(jax.random.normal(k, s, BFLOAT16) for k, s in zip(keys[1:3], shapes, strict=True)), lengths
    codes = (jax.random.randint(k, s, -127, 128).astype(jnp.int8) for k, s in zip(keys[1:3], shapes, strict=True))
    scales = (0.01 + 0.02 * jax.random.uniform(k, (batch, kv_heads, slots)) for k in keys[3:])
    return query, *codes, lengths, *scales


def _grouped(dry: bool) -> Iterator[Entry]:
    """Products of experts: rows that fall unevenly to them."""
    rows, experts, size, width = (64, 4, 64, 128) if dry else (16384, 64, 2048, 1408)

    def operands(rows: int, experts: int, size: int, width: int) -> Callable[[jax.Array], tuple[Any, ...]]:
        def make(key: jax.Array) -> tuple[Any, ...]:
            x, w = normal((rows, size), (experts, size, width))(key)
            chosen = jnp.floor(experts * jax.random.uniform(key, (rows,)) ** 1.5).astype(jnp.int32)
            sizes = jnp.sum(chosen[:, None] == jnp.arange(experts, dtype=jnp.int32)[None], axis=0, dtype=jnp.int32)
            return x, w * jnp.asarray(size**-0.5, w.dtype), sizes

        return make

    def ragged(x: Any, w: Any, sizes: Any) -> Any:
        return jax.lax.ragged_dot(x, w, sizes)

    for backward in (False, True):
        yield Entry(
            f"grouped product {'backward' if backward else 'forward'} {rows}x{experts}x{size}x{width}", "flops",
            2.0 * rows * size * width * (2 if backward else 1),
            {
                **{n: functools.partial(grouped_matmul, implementation=n) for n in ("triton", "xla")},
                "jax.lax.ragged_dot": ragged,
            },
            operands(rows, experts, size, width), operands(200, 5, 64, 128), grouped_matmul_oracle, backward=backward,
            smooth=(0, 1),
        )  # fmt: skip


def _scans(dry: bool) -> Iterator[Entry]:
    """Mamba's selective scan, forward and with its gradients: each operand once is the work."""
    cases = [(1, 64, 32, 16)] if dry else [(8, 2048, 1536, 16), (2, 8192, 5120, 16), (4, 2048, 2048, 128)]

    def operands(batch: int, length: int, inner: int, size: int) -> Callable[[jax.Array], tuple[Any, ...]]:
        def make(key: jax.Array) -> tuple[Any, ...]:
            tokens, numbers = (batch, length, inner), (batch, length, size)
            x, dt, decay, b, c = normal(tokens, tokens, (inner, size), numbers, numbers)(key)
            return x, jax.nn.softplus(dt - jnp.asarray(2.0, dt.dtype)), -jnp.exp(decay.astype(jnp.float32)), b, c

        return make

    def outputs(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        return lambda *arrays: function(*arrays, **options)[0]

    for batch, length, inner, size in cases:
        for backward in (False, True):
            times = 6 if backward else 3  # x, dt and y; then they and their gradients, the states being left out
            yield Entry(
                f"selective scan {'backward' if backward else 'forward'} {batch}x{length}x{inner}x{size}", "bytes",
                2.0 * batch * length * (times * inner + (4 if backward else 2) * size),
                {n: outputs(selective_scan, implementation=n) for n in ("triton", "xla")},
                operands(batch, length, inner, size), operands(2, 50, 40, size), outputs(selective_scan_oracle),
                backward=backward, smooth=(0, 1, 2, 3, 4), tolerance=2e-2,
            )  # fmt: skip


def _rope(dry: bool) -> Iterator[Entry]:
    """Rotary positions of queries: x read and written once is the work."""
    cases = [(1, 64, 2, 32, 32, False)] if dry else [(8, 4096, 32, 128, 128, False), (8, 4096, 32, 128, 64, True)]

    def operands(batch: int, length: int, heads: int, size: int, turned: int) -> Callable[[jax.Array], tuple[Any, ...]]:
        def make(key: jax.Array) -> tuple[Any, ...]:
            turn = jnp.arange(length, dtype=jnp.float32)[:, None] * 1e4 ** -jnp.linspace(0, 1, turned // 2)[None]
            return *normal((batch, length, heads, size))(key), jnp.cos(turn)[None], jnp.sin(turn)[None]

        return make

    for batch, length, heads, size, turned, interleaved in cases:
        kind = f"{'interleaved ' if interleaved else ''}{batch}x{length}x{heads}x{size}, {turned} turned"
        for backward in (False, True):
            yield Entry(
                f"rope {'backward' if backward else 'forward'} {kind}", "bytes",
                4.0 * batch * length * heads * size,
                {
                    n: functools.partial(rope, implementation=n, interleaved=interleaved) for n in ("triton", "xla")
                },
                operands(batch, length, heads, size, turned), operands(1, 70, 3, size, turned),
                functools.partial(rope_oracle, interleaved=interleaved), backward=backward, smooth=(0,),
            )  # fmt: skip
