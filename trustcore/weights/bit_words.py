"""Codes of 1 to 8 bits in words of 32: how other packages store integers narrower than a byte.

    dense     code i stands at bits i * bits and up of the words taken as one little-endian stream; 32 codes are
              exactly `bits` words, and a code may lie across two of them
    padded    each word holds 32 // bits codes from its lowest bit on; its uppermost bits stay empty

Both are the same for 1, 2, 4 and 8 bits. GPTQ's files are dense (with 3 bits too), as are those of compressed-tensors;
older ones of that package are padded. Bytes are taken as little-endian words, as safetensors stores them.
"""

from __future__ import annotations

import numpy as np

WHOLE = (1, 2, 4, 8)  # widths of which a byte holds a whole number


def word_count(count: int, bits: int, *, padded: bool = False) -> int:
    """Returns how many words `count` codes take."""
    return -(-count // (32 // bits)) if padded else -(-count * bits // 32)


def unpack_words(words: np.ndarray, bits: int, count: int, *, axis: int, padded: bool = False) -> np.ndarray:
    """Returns the codes in `words`, uint8, `count` of them along `axis`.

    Args:
        words: 32-bit integers, or bytes of a stream whose length need not be whole words.
        bits: 1 to 8.
        count: codes along the axis; the words hold at least as many.
        axis: the axis along which codes follow each other.
        padded: see the file's header.
    """
    moved = np.ascontiguousarray(np.moveaxis(words, axis, -1))
    if padded and bits not in WHOLE:
        shifts = np.arange(32 // bits, dtype=np.uint32) * np.uint32(bits)
        codes = (moved.view(np.uint32)[..., None] >> shifts) & np.uint32((1 << bits) - 1)
        codes = codes.astype(np.uint8).reshape(*moved.shape[:-1], -1)
    else:
        codes = _from_bytes(moved.view(np.uint8), bits)
    return np.moveaxis(codes[..., :count], -1, axis)


def pack_words(codes: np.ndarray, bits: int, *, axis: int) -> np.ndarray:
    """Returns `codes` (uint8, below 2**bits) densely packed along `axis`, int32; the last word is filled with zeros."""
    moved = np.moveaxis(codes, axis, -1)
    missing = word_count(moved.shape[-1], bits) * 4
    packed = pack_bytes(moved, bits)
    packed = np.pad(packed, [(0, 0)] * (packed.ndim - 1) + [(0, missing - packed.shape[-1])])
    return np.ascontiguousarray(np.moveaxis(np.ascontiguousarray(packed).view(np.int32), -1, axis))


def pack_bytes(codes: np.ndarray, bits: int) -> np.ndarray:
    """Returns `codes` densely packed along the last axis, uint8: `ceil(count * bits / 8)` bytes."""
    count = codes.shape[-1]
    nbytes = -(-count * bits // 8)
    if bits in WHOLE:
        each = 8 // bits
        filled = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, -count % each)])
        parts = filled.reshape(*codes.shape[:-1], -1, each)
        packed = np.zeros(parts.shape[:-1], np.uint8)
        for j in range(each):
            packed |= parts[..., j] << np.uint8(j * bits)
        return packed
    filled = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, -count % 8)])
    parts = filled.reshape(*codes.shape[:-1], -1, 8).astype(np.uint16)  # eight codes are `bits` bytes
    packed = np.zeros((*parts.shape[:-1], bits), np.uint8)
    for j in range(8):
        byte, shift = divmod(j * bits, 8)
        window = parts[..., j] << np.uint16(shift)
        packed[..., byte] |= (window & np.uint16(255)).astype(np.uint8)
        if shift + bits > 8:
            packed[..., byte + 1] |= (window >> np.uint16(8)).astype(np.uint8)
    return packed.reshape(*codes.shape[:-1], -1)[..., :nbytes]


def _from_bytes(stream: np.ndarray, bits: int) -> np.ndarray:
    """Codes in a dense stream of bytes along the last axis."""
    lead = stream.shape[:-1]
    if bits in WHOLE:
        shifts = np.arange(8 // bits, dtype=np.uint8) * np.uint8(bits)
        return ((stream[..., None] >> shifts) & np.uint8((1 << bits) - 1)).reshape(*lead, -1)
    stream = np.pad(stream, [(0, 0)] * len(lead) + [(0, -stream.shape[-1] % bits)])
    runs = stream.reshape(*lead, -1, bits).astype(np.uint16)
    codes = np.empty((*runs.shape[:-1], 8), np.uint8)
    for j in range(8):
        byte, shift = divmod(j * bits, 8)
        window = runs[..., byte]
        if shift + bits > 8:
            window = window | runs[..., byte + 1] << np.uint16(8)
        codes[..., j] = (window >> np.uint16(shift)) & np.uint16((1 << bits) - 1)
    return codes.reshape(*lead, -1)
