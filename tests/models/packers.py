"""Packs matrices as other packages do, by big integers and plain loops: an independent way to write their files.

Each packer takes a torch-like weight [N, K] and returns ({suffix: array}, the weight that the tensors stand for).
"""

import json

import ml_dtypes
import numpy as np

NF4 = [
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022833334),
    *(-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
]
E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6]


def stream(codes, bits, words=None):
    """Codes of a row as one number, lowest first, cut into 32-bit words."""
    number = sum(int(code) << (bits * i) for i, code in enumerate(codes))
    words = -(-len(codes) * bits // 32) if words is None else words
    return np.frombuffer(number.to_bytes(4 * words, "little"), "<i4")


def rows_of_words(codes, bits):
    return np.stack([stream(row, bits) for row in codes])


def grouped(weight, bits, size, group=None, sym=False):
    """Codes [N, K], scales and zero points [N, G] of integers; `group` is the group of each input."""
    n, k = weight.shape
    group = np.arange(k) // size if group is None else group
    count = int(group.max()) + 1
    codes, scale, zero = np.zeros((n, k), int), np.zeros((n, count), np.float16), np.zeros((n, count), int)
    for g in range(count):
        part = weight[:, group == g]
        if sym:
            zero[:, g] = 2 ** (bits - 1)
            scale[:, g] = np.abs(part).max(1) / (2 ** (bits - 1) - 0.5)
        else:
            low, high = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
            scale[:, g] = (high - low) / (2**bits - 1)
            zero[:, g] = np.clip(np.round(-low / scale[:, g].astype(float)), 0, 2**bits - 1)
        steps = part / scale[:, g, None].astype(float) + zero[:, g, None]
        codes[:, group == g] = np.clip(np.round(steps), 0, 2**bits - 1)
    held = scale[:, group].astype(np.float32) * (codes - zero[:, group]).astype(np.float32)
    return codes, scale, zero, held


def gptq(weight, *, bits=4, size=32, version=1, order=None, sym=False, index=True):
    """`order`: a random generator that draws which inputs share a group."""
    k = weight.shape[1]
    group = np.arange(k) // size
    if order is not None:
        group = order.permutation(group)
    codes, scale, zero, held = grouped(weight, bits, size, group, sym)
    stored = (zero - 1) % 2**bits if version == 1 else zero
    tensors = {
        "qweight": rows_of_words(codes, bits).T,
        "qzeros": rows_of_words(stored.T, bits),
        "scales": scale.T,
        "g_idx": group.astype(np.int32),
    }
    if not index:
        del tensors["g_idx"]
    return tensors, held


def awq(weight, *, size=32):
    codes, scale, zero, held = grouped(weight, 4, size)

    def words(rows):  # [rows, N] -> [rows, N / 8]
        order = [0, 2, 4, 6, 1, 3, 5, 7]
        return np.stack(
            [np.concatenate([stream(row[c : c + 8][order], 4) for c in range(0, len(row), 8)]) for row in rows]
        )

    return {"qweight": words(codes.T), "qzeros": words(zero.T), "scales": scale.T}, held


def bitsandbytes(weight, *, block=64, nested=False):
    n, k = weight.shape
    blocks = weight.reshape(-1, block)
    absmax = np.abs(blocks).max(1).astype(np.float32)
    state = {"quant_type": "nf4", "blocksize": block, "dtype": "float16", "shape": [n, k]}
    tensors = {"weight.quant_map": np.array(NF4, np.float32)}
    if nested:
        levels = np.linspace(-1, 1, 256).astype(np.float32)
        offset = np.float32(absmax.mean())
        runs = np.pad(absmax - offset, (0, -len(absmax) % 256)).reshape(-1, 256)
        outer = np.abs(runs).max(1).astype(np.float32)
        indices = np.array([np.abs(levels - v).argmin() for v in (runs / outer[:, None]).reshape(-1)[: len(absmax)]])
        absmax = levels[indices] * np.repeat(outer, 256)[: len(absmax)] + offset
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": float(offset)}
        tensors |= {"weight.absmax": indices.astype(np.uint8), "weight.nested_absmax": outer}
        tensors["weight.nested_quant_map"] = levels
    else:
        tensors["weight.absmax"] = absmax
    codes = np.abs((blocks / absmax[:, None])[..., None] - np.array(NF4)).argmin(-1).reshape(-1)
    tensors["weight"] = np.array([16 * a + b for a, b in zip(codes[::2], codes[1::2], strict=True)], np.uint8)[:, None]
    text = json.dumps(state).encode()
    tensors["weight.quant_state.bitsandbytes__nf4"] = np.frombuffer(text, np.uint8)
    return tensors, (np.array(NF4, np.float32)[codes].reshape(-1, block) * absmax[:, None]).reshape(n, k)


def llm_int8(weight):
    largest = np.abs(weight).max(1).astype(np.float32)
    codes = np.round(weight / largest[:, None] * 127).astype(np.int8)
    return {"weight": codes, "SCB": largest}, codes.astype(np.float32) * (largest * np.float32(1 / 127))[:, None]


def pack_quantized(weight, *, bits=4, size=32, sym=True):
    codes, scale, zero, held = grouped(weight, bits, size, sym=sym)
    tensors = {
        "weight_packed": rows_of_words(codes, bits),
        "weight_scale": scale,
        "weight_shape": np.array(weight.shape, np.int64),
    }
    if not sym:
        tensors["weight_zero_point"] = rows_of_words(zero.T, bits).T
    return tensors, held


def int_quantized(weight):
    codes, scale, _, held = grouped(weight, 8, weight.shape[1], sym=True)
    return {"weight": (codes - 128).astype(np.int8), "weight_scale": scale}, held


def float8(weight, *, rows, columns, suffix="weight_scale"):
    """Blocks of `rows` by `columns`; 0 means all."""
    n, k = weight.shape
    rows, columns = rows or n, columns or k
    scale = np.zeros((-(-n // rows), -(-k // columns)), np.float32)
    codes, held = np.zeros(weight.shape, ml_dtypes.float8_e4m3fn), np.zeros(weight.shape, np.float32)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            here = np.s_[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
            scale[i, j] = np.abs(weight[here]).max() / 448
            codes[here] = (weight[here] / scale[i, j]).astype(codes.dtype)
            held[here] = codes[here].astype(np.float32) * scale[i, j]
    return {"weight": codes, suffix: scale}, held


def nvfp4(weight):
    n, k = weight.shape
    whole = np.float32(448 * 6 / np.abs(weight).max())
    parts = weight.reshape(n, k // 16, 16)
    scale = (np.abs(parts).max(-1) / 6 * whole).astype(ml_dtypes.float8_e4m3fn)
    each = scale.astype(np.float32) / whole
    codes = np.abs((parts / each[..., None])[..., None] - np.array(E2M1)).argmin(-1).reshape(n, k)
    held = np.array(E2M1, np.float32)[codes].reshape(n, k // 16, 16) * each[..., None]
    packed = (codes[:, ::2] + 16 * codes[:, 1::2]).astype(np.uint8)
    tensors = {"weight_packed": packed, "weight_scale": scale, "weight_global_scale": np.array([whole])}
    return tensors, held.reshape(n, k)


def mxfp4(weight):
    """As gpt-oss has it; suffixes without a dot."""
    n, k = weight.shape
    parts = weight.reshape(n, k // 32, 32)
    exponent = np.ceil(np.log2(np.abs(parts).max(-1) / 6)).astype(int) + 127
    each = np.exp2(exponent - 127.0).astype(np.float32)
    codes = np.abs((parts / each[..., None])[..., None] - np.array(E2M1)).argmin(-1)
    held = np.array(E2M1, np.float32)[codes] * each[..., None]
    blocks = (codes[..., ::2] + 16 * codes[..., 1::2]).astype(np.uint8)
    return {"_blocks": blocks, "_scales": exponent.astype(np.uint8)}, held.reshape(n, k)
