"""Codes in words, against sums of powers of two."""

import numpy as np
import pytest

from trustcore.weights.bit_words import pack_bytes, pack_words, unpack_words, word_count

RNG = np.random.default_rng(0)


def stream(codes, bits):
    number = sum(int(code) << (bits * i) for i, code in enumerate(codes))
    return np.frombuffer(number.to_bytes(4 * -(-len(codes) * bits // 32), "little"), "<i4")


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [0, 1, 10, 32, 33, 96, 100])
def test_dense_words(bits, count):
    codes = RNG.integers(0, 1 << bits, (3, count), dtype=np.uint8)
    words = pack_words(codes, bits, axis=1)
    assert words.shape == (3, word_count(count, bits)) and words.dtype == np.int32
    if count:
        np.testing.assert_array_equal(words, np.stack([stream(row, bits) for row in codes]))
    np.testing.assert_array_equal(unpack_words(words, bits, count, axis=1), codes)
    np.testing.assert_array_equal(pack_words(codes.T, bits, axis=0), words.T)
    np.testing.assert_array_equal(unpack_words(words.T, bits, count, axis=0), codes.T)
    nbytes = -(-count * bits // 8)
    np.testing.assert_array_equal(pack_bytes(codes, bits), words.view(np.uint8)[:, :nbytes])


@pytest.mark.parametrize("bits", [3, 5, 6, 7, 4])
def test_padded_words(bits):
    each = 32 // bits
    codes = RNG.integers(0, 1 << bits, (2, 5 * each - 1), dtype=np.uint8)
    filled = np.pad(codes, [(0, 0), (0, 1)]).reshape(2, 5, each).astype(np.uint32)
    words = (filled << (np.arange(each, dtype=np.uint32) * np.uint32(bits))).sum(-1).astype(np.uint32).view(np.int32)
    assert words.shape[1] == word_count(codes.shape[1], bits, padded=True)
    np.testing.assert_array_equal(unpack_words(words, bits, codes.shape[1], axis=1, padded=True), codes)
