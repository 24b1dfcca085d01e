"""GGUF's formats one by one: every bit pattern against the `gguf` package and against llama.cpp's own functions."""

import base64
import json
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.quant.blocks import a_few_blocks, blocks_of, decoded
from trustcore.quant import QuantizedArray, get_format
from trustcore.quant.formats import BLOCK_FORMATS
from trustcore.quant.formats.bits import even_signs, lookup, spread, unfold
from trustcore.quant.formats.iq_grids import GRIDS

RECORDED = json.loads((Path(__file__).parents[1] / "data" / "ggml_blocks.json").read_text())["formats"]
PACKED = [name for name, spec in BLOCK_FORMATS.items() if spec.block > 1]
WITHOUT_FLOATS = ("iq1_m", "mxfp4", "nvfp4")  # their scales are codes as well

# FACTS.md's figures, and the sizes of ggml's structures for the rest.
BITS = {
    "f16": 16, "bf16": 16, "q1_0": 1.125, "q4_0": 4.5, "q4_1": 5, "q5_0": 5.5, "q5_1": 6, "q8_0": 8.5, "q8_k": 9.125,
    "q2_k": 2.625, "q3_k": 3.4375, "q4_k": 4.5, "q5_k": 5.5, "q6_k": 6.5625, "iq4_nl": 4.5, "iq4_xs": 4.25,
    "iq3_xxs": 3.0625, "iq3_s": 3.4375, "iq2_xxs": 2.0625, "iq2_xs": 2.3125, "iq2_s": 2.5625, "iq1_s": 1.5625,
    "iq1_m": 1.75, "tq1_0": 1.6875, "tq2_0": 2.0625, "mxfp4": 4.25, "nvfp4": 4.5,
}  # fmt: skip


decode = jax.jit(lambda w: w.dequantize())  # compiled whole: operation by operation takes twenty times as long


def same_bits(found, expected):
    np.testing.assert_array_equal(np.asarray(found).view(np.uint32), np.ascontiguousarray(expected).view(np.uint32))


def test_the_table_is_complete_and_its_sizes_are_true():
    assert {name: spec.bits_per_weight for name, spec in BLOCK_FORMATS.items()} == BITS
    for name, spec in BLOCK_FORMATS.items():
        if spec.block > 1:
            kind = getattr(gguf.GGMLQuantizationType, name.upper())
            assert (spec.block, spec.bytes_per_block) == gguf.GGML_QUANT_SIZES[kind]


@pytest.mark.parametrize("name", PACKED)
def test_random_bytes_decode_to_the_oracles_bits(name):
    """Bit for bit, the sign of a zero included."""
    raw, oracle = blocks_of(name, 2 * get_format(name).block, 256, seed=5)
    assert np.isfinite(oracle).all() and len(np.unique(oracle)) > 100
    same_bits(decode(QuantizedArray.from_blocks(name, raw, transposed=True)), oracle)


@pytest.mark.parametrize("name", PACKED)
def test_recorded_blocks_decode_to_llama_cpps_bits(name):
    record = RECORDED[name]
    raw = np.frombuffer(bytes.fromhex(record["blocks"]), np.uint8)[None, :]
    expected = np.frombuffer(base64.b64decode(record["decoded"]), "<f4")
    same_bits(decode(QuantizedArray.from_blocks(name, raw))[:, 0], expected)
    same_bits(decoded(name, raw)[0], expected)  # the oracle of the other tests


@pytest.mark.parametrize("name", PACKED)
def test_every_value_of_a_byte_of_each_field(name):
    """The first and last bytes of each field take all 256 values, the others being random; infinities and NaN too."""
    spec = get_format(name)
    at = sorted({f.offset + i for f in spec.fields for i in (0, 1, f.nbytes - 2, f.nbytes - 1) if 0 <= i < f.nbytes})
    raw, _ = blocks_of(name, 2 * spec.block, 256, seed=6)
    weight = QuantizedArray.from_blocks(name, raw, transposed=True)
    for byte in at:
        varied = raw.copy()
        varied[:, byte] = np.arange(256)
        with np.errstate(all="ignore"):
            expected = decoded(name, varied)
        found = np.asarray(decode(QuantizedArray.from_blocks(name, varied, transposed=weight.transposed)))
        usual = np.isfinite(expected)
        # A scale below 2**-126 is zero to XLA on the CPU.
        if name == "mxfp4" and byte == 0:
            usual[:2, : spec.block] = False
            assert not found[:2, : spec.block].any()
        if name == "q8_k":
            subnormal = np.abs(varied[:, :4].copy().view(np.float32)[:, 0]) < np.finfo(np.float32).tiny
            usual[subnormal, : spec.block] = False
        assert usual.mean() > 0.9
        same_bits(found[usual], expected[usual])
        np.testing.assert_array_equal(found[~np.isfinite(expected)], expected[~np.isfinite(expected)])


@pytest.mark.parametrize("name", PACKED)
def test_a_stack_of_layers(name):
    """Two layers stacked, decoded together and by vmap, and packed again."""
    k = a_few_blocks(name)
    raw, oracle = blocks_of(name, k, 20, seed=7)
    raw, oracle = np.stack([raw, raw[::-1]]), np.stack([oracle.T, oracle[::-1].T])
    stack = QuantizedArray.from_blocks(name, raw)
    assert stack.shape == (2, k, 20)
    np.testing.assert_array_equal(stack.to_blocks(), raw)
    same_bits(decode(stack), oracle)
    same_bits(jax.vmap(decode)(stack), oracle)


@pytest.mark.parametrize("name", PACKED)
def test_weights_are_linear_in_the_float_fields(name):
    """Scales and minima have exact derivatives; formats whose scales are codes have no float field at all."""
    weight = QuantizedArray.from_blocks(name, blocks_of(name, get_format(name).block, 6, seed=8)[0])
    floats = {n: f.astype(jnp.float32) for n, f in weight.fields.items() if jnp.issubdtype(f.dtype, jnp.floating)}
    assert (not floats) == (name in WITHOUT_FLOATS)

    @jax.jit
    def slope_and_unit(floats, direction):
        def value(floats):
            return weight.spec.decode({**weight.fields, **floats})

        return jax.jvp(value, (floats,), (direction,))[1], value(direction)

    for field in floats:
        direction = {n: jnp.ones_like(f) if n == field else jnp.zeros_like(f) for n, f in floats.items()}
        slope, unit = slope_and_unit(floats, direction)
        np.testing.assert_array_equal(slope, unit)  # linear: the slope is the value at a unit
        assert np.abs(slope).max() > 0


def test_grids_are_the_oracles():
    """Ascending, without repetition, and level by level those of the `gguf` package."""
    for name, grid in GRIDS.items():
        oracle = getattr(gguf.quants, "IQ1_S" if name == "iq1" else name.upper())
        oracle.init_grid()
        entries = oracle.grid.reshape(oracle.grid_shape)
        bits = 16 // oracle.grid_shape[1] if oracle.grid_shape[1] == 8 else 3
        levels = grid[:, None].astype(int) >> bits * np.arange(oracle.grid_shape[1]) & ((1 << bits) - 1)
        np.testing.assert_array_equal(np.array(oracle.grid_map)[levels], entries)
        assert (np.diff(grid.astype(int)) > 0).all()


def test_bits_come_apart_in_the_documented_order():
    words = jnp.asarray([[0x21], [0x43], [0x65], [0x87]], jnp.uint8)
    assert unfold(words, 4)[:, 0].tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert unfold(words, 4, chunk=2)[:, 0].tolist() == [1, 3, 2, 4, 5, 7, 6, 8]
    assert unfold(words, 4, chunk=4)[:, 0].tolist() == [1, 3, 5, 7, 2, 4, 6, 8]
    assert unfold(jnp.asarray([[0x8421]], jnp.uint16), 4)[:, 0].tolist() == [1, 2, 4, 8]
    assert unfold(jnp.asarray([[0b10110010]], jnp.uint8), 1)[:, 0].tolist() == [0, 1, 0, 0, 1, 1, 0, 1]
    assert spread(words[:1], (0, 3, 5))[:, 0].tolist() == [0x21, 0x21 >> 3, 1]
    table = np.random.default_rng(0).integers(-128, 128, 16)
    assert lookup(jnp.arange(16, dtype=jnp.uint8), table.tolist()).tolist() == table.tolist()
    signs = np.asarray(even_signs(jnp.arange(128, dtype=jnp.uint8)))
    assert all(bin(s).count("1") % 2 == 0 and s & 127 == i for i, s in enumerate(signs.tolist()))
