"""The kernels for TPUs in the interpreter that models cores, memories and copies: no races, results of the oracle.

Two cores share the steps of a grid that may run in parallel; memory that nothing was written to holds NaN. Tiles are
small, so that short axes have several and the last one of an axis has a tail.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import _compat, rows
from kernels_pallas.attention import BlockMask, attention_oracle, front, tpu
from kernels_pallas.attention.spec import Operands
from kernels_pallas.decode import decode_oracle
from kernels_pallas.decode import front as decode_front
from kernels_pallas.decode import tpu as decode_tpu
from kernels_pallas.decode.spec import Operands as Cache
from kernels_pallas.dispatch import ANY_CHIP, Target
from kernels_pallas.glu import front as glu_front
from kernels_pallas.glu import glu_oracle
from kernels_pallas.grouped_matmul import front as grouped_front
from kernels_pallas.grouped_matmul import grouped_matmul_oracle
from kernels_pallas.grouped_matmul import tpu as grouped_tpu
from kernels_pallas.norm import front as norm_front
from kernels_pallas.norm import rms_norm_oracle
from kernels_pallas.packed import Layout, Plane, packed_oracle
from kernels_pallas.packed import tpu as packed_tpu
from kernels_pallas.packed.spec import Call as Packed
from kernels_pallas.softmax import front as softmax_front
from kernels_pallas.softmax import softmax_oracle

TPU = Target("tpu", ANY_CHIP)


def detected(run: Callable[[], Any]) -> Any:
    """The results of kernels that have no race."""
    results, raced = _compat.races_found(run)
    assert not raced
    return results


def random(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(len(shape)).standard_normal(shape), jnp.float32)


def close(found: Any, expected: Any) -> None:
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=3e-5 * max(1.0, float(np.max(np.abs(b), initial=0.0))))


def test_a_race_is_found() -> None:
    """Two steps that may run in parallel add to one block."""

    def body(x_ref: Any, o_ref: Any) -> None:
        o_ref[...] = o_ref[...] + x_ref[...]

    def run() -> Any:
        return pl.pallas_call(
            body,
            grid=(2,),
            in_specs=[pl.BlockSpec((8, 128), lambda i: (i, 0))],
            out_specs=pl.BlockSpec((8, 128), lambda i: (0, 0)),
            out_shape=jax.ShapeDtypeStruct((8, 128), jnp.float32),
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
            interpret=_compat.race_detector(),
        )(jnp.ones((16, 128)))

    assert _compat.races_found(run)[1]


@pytest.mark.parametrize("blocks", [False, True], ids=["runs", "lists"])
def test_attention(blocks: bool) -> None:
    """Forward, dq, and dk with dv, of grouped heads; whole runs of blocks, and lists by head."""
    q, k, v, do = random(1, 24, 2, 16), random(1, 40, 1, 16), random(1, 40, 1, 16) + 1, random(1, 24, 2, 16)
    options: dict[str, Any] = {"window": 30, "soft_cap": 5.0}
    if blocks:
        pairs = np.random.default_rng(0).random((1, 2, 2, 2)) < 0.7
        options["block_mask"] = BlockMask.from_dense(pairs, 16, 32)
    call, tile = front._checked(Operands(q, k, v), **options), tpu.Blocks(16, 32)
    out, lse = detected(lambda: tpu.forward(TPU, call, _compat.race_detector(), tile))
    (expected, expected_lse), pull = jax.vjp(lambda *qkv: attention_oracle(*qkv, **options, return_lse=True), q, k, v)
    seen = jnp.isfinite(expected_lse)
    assert (jnp.isfinite(lse) == seen).all()
    close([out, jnp.where(seen, lse, 0)], [expected, jnp.where(seen, expected_lse, 0)])
    back = call._replace(lse=lse, delta=jnp.einsum("btnh,btnh->bnt", out, do), cotangent=do)
    close(
        detected(lambda: tpu.backward(TPU, back, _compat.race_detector(), tile)),
        pull((do, jnp.zeros_like(expected_lse))),
    )


def over_rows(op: rows.RowOp, backward: Any, spec: Any, arrays: dict[str, Any], wanted: tuple[str, ...]) -> Any:
    """Results by name of an op's forward kernel, and gradients for the cotangent `of_y` by its backward one."""
    tile = rows.Blocks(8, 100)

    def run(program: Any, given: dict[str, Any]) -> dict[str, Any]:
        call = rows.Call(program, given)
        found = detected(lambda: rows.run_tpu(TPU, call, _compat.race_detector(), tile))
        return dict(zip(program.outputs, found, strict=True))

    found = run(op.program(spec, tuple(arrays)), arrays)
    of_y = random(*found["y"].shape) + 0.5
    given = {**op.keep(spec, arrays, found), "of_y": of_y}
    return found["y"], run(backward(spec, tuple(given), wanted), given), of_y


def test_norm() -> None:
    x, w = random(20, 100), random(100)
    y, found, of_y = over_rows(
        norm_front.NORM, norm_front._backward, norm_front.Spec(False, 1e-6), {"x": x, "weight": w}, ("x", "weight")
    )
    expected, pull = jax.vjp(rms_norm_oracle, x, w)
    close([y, found["x"], found["weight"]], [expected, *pull(of_y)])


def test_glu() -> None:
    gate, up = random(20, 100), random(20, 100) + 1
    y, found, of_y = over_rows(
        glu_front.GLU, glu_front._backward, glu_front.Spec("silu"), {"x": gate, "up": up}, ("x", "up")
    )
    expected, pull = jax.vjp(glu_oracle, gate, up)
    close([y, found["x"], found["up"]], [expected, *pull(of_y)])


def test_softmax() -> None:
    x = random(20, 100)
    y, found, of_y = over_rows(
        softmax_front.SOFTMAX, softmax_front._backward, softmax_front.Spec(1.0), {"x": x}, ("x",)
    )
    expected, pull = jax.vjp(softmax_oracle, x)
    close([y, found["x"]], [expected, *pull(of_y)])


@pytest.mark.parametrize("paged", [False, True])
def test_decode(paged: bool) -> None:
    q, keys, values = random(2, 1, 4, 16), random(2, 2, 16, 48), random(2, 2, 48, 16)
    lengths, pages = jnp.asarray([48, 21], jnp.int32), None
    if paged:
        keys, values = (random(5, 2, *x) for x in ((16, 16), (16, 16)))
        pages = jnp.asarray([[3, 0, 4], [1, 2, 0]], jnp.int32)
    ops = Cache(q, keys, values, lengths, None, None, pages)
    call = decode_front._checked(ops, window=None, scale=None, soft_cap=None)
    out, _ = detected(lambda: decode_tpu.forward(TPU, call, _compat.race_detector(), decode_tpu.Blocks(8, 16)))
    close(out, decode_oracle(q, keys, values, lengths, pages=pages))


def test_packed_products() -> None:
    layout = Layout("int4", 128, (Plane("codes", 4),))
    rng = np.random.default_rng(0)
    fields = {
        "codes": jnp.asarray(rng.integers(0, 256, (2, 64, 20)), jnp.uint8),
        "scale": jnp.asarray(rng.random((2, 20)), jnp.float16),
    }
    call = Packed(layout, random(10, 256), {n: fields[n] for n in layout.fields})
    (out,) = detected(lambda: packed_tpu.forward(TPU, call, _compat.race_detector(), packed_tpu.Blocks(8, 20, 1)))
    close(out, packed_oracle(call.x, fields, layout=layout))


def test_grouped_products() -> None:
    x, w, y = random(40, 20), random(4, 20, 24), random(40, 24)
    sizes = jnp.asarray([0, 17, 9, 14], jnp.int32)
    starts = jnp.cumsum(sizes) - sizes
    call = grouped_front.Call("rows", x, w, starts, sizes)
    (out,) = detected(lambda: grouped_tpu.rows(TPU, call, _compat.race_detector(), grouped_tpu.Blocks(8, 20, 16)))
    expected, pull = jax.vjp(lambda w: grouped_matmul_oracle(x, w, sizes), w)
    close(out, expected)
    call = grouped_front.Call("sums", x, y, starts, sizes)
    (sums,) = detected(lambda: grouped_tpu.sums(TPU, call, _compat.race_detector(), grouped_tpu.Blocks(8, 16, 16)))
    close(sums, pull(y)[0])
