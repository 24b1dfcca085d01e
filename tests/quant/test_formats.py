"""Every format against the `gguf` package: decoding is bit-exact, packing gives the same bytes back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.quant.blocks import a_few_blocks, blocks_of
from trustcore.errors import QuantizationError
from trustcore.quant import QuantizedArray, get_format
from trustcore.quant.formats import BLOCK_FORMATS

decode = jax.jit(lambda weight: weight.dequantize())


@pytest.mark.parametrize("name", BLOCK_FORMATS)
def test_decoding_is_bit_exact(name):
    k = a_few_blocks(name, 96)
    raw, oracle = blocks_of(name, k, 40)
    weight = QuantizedArray.from_blocks(name, raw)
    assert weight.shape == (k, 40)
    np.testing.assert_array_equal(np.asarray(decode(weight)), oracle.T)
    np.testing.assert_array_equal(np.asarray(decode(weight.T)), oracle)
    np.testing.assert_array_equal(weight.to_blocks(), raw)


@pytest.mark.parametrize("name", BLOCK_FORMATS)
def test_rows_of_a_table_are_looked_up_bit_exactly(name):
    raw, oracle = blocks_of(name, a_few_blocks(name, 64), 50)
    table = QuantizedArray.from_blocks(name, raw, transposed=True)
    ids = np.array([[3, 0], [49, 7]])
    take = jax.jit(lambda table, ids: table.take(ids))
    np.testing.assert_array_equal(np.asarray(take(table, jnp.asarray(ids))), oracle[ids])
    np.testing.assert_array_equal(np.asarray(take(table, jnp.asarray([[99, 3]]))), oracle[[[49, 3]]])


@settings(max_examples=40, deadline=None)
@given(name=st.sampled_from(sorted(BLOCK_FORMATS)), blocks=st.integers(1, 5), n=st.integers(1, 70), data=st.data())
def test_any_bytes_go_through_unpack_and_pack_unchanged(name, blocks, n, data):
    spec = get_format(name)
    size = blocks * spec.bytes_per_block
    raw = np.frombuffer(data.draw(st.binary(min_size=n * size, max_size=n * size)), np.uint8).reshape(n, size)
    fields = spec.unpack(raw)
    np.testing.assert_array_equal(spec.pack(fields), raw)
    shapes = spec.field_shapes(blocks * spec.block, n)
    assert {k: (v.shape, v.dtype) for k, v in fields.items()} == {k: (v.shape, v.dtype) for k, v in shapes.items()}


@pytest.mark.parametrize("name", BLOCK_FORMATS)
def test_memory_is_what_the_disk_has(name):
    raw, _ = blocks_of(name, a_few_blocks(name, 96), 40)
    weight = QuantizedArray.from_blocks(name, raw)
    assert weight.nbytes == raw.nbytes == weight.size * weight.spec.bits_per_weight / 8


def test_a_stack_of_weights_scans_and_unstacks():
    one, two = (QuantizedArray.from_blocks("q4_1", blocks_of("q4_1", 64, 48, seed)[0]) for seed in (1, 2))
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), one, two)
    assert stack.shape == (2, 64, 48) and stack.ndim == 3
    x = jnp.ones((3, 64))
    _, ys = jax.lax.scan(lambda carry, w: (carry, x @ w), None, stack)
    np.testing.assert_allclose(ys[1], x @ two, rtol=1e-6)


def test_a_wrong_row_length_is_named():
    with pytest.raises(QuantizationError, match=r"q4_0: rows must be uint8 and a multiple of 18 bytes.*\[2, 17\]"):
        QuantizedArray.from_blocks("q4_0", np.zeros((2, 17), np.uint8))
    with pytest.raises(QuantizationError, match="Known formats: bf16, f16, fp4"):
        get_format("q9_9")
    with pytest.raises(QuantizationError, match="take needs a transposed"):
        QuantizedArray.from_blocks("q4_0", np.zeros((2, 18), np.uint8)).take(jnp.asarray([0]))
    with pytest.raises(QuantizationError, match="33 weights are not a multiple of the block size 32"):
        get_format("q8_0").field_shapes(33, 4)
