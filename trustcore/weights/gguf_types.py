"""The types of GGUF: metadata values and ggml's tensor encodings, by the number that stands in the file.

`GGML_TYPES[id]` is an `Encoding`: its name, weights and bytes of a block, and the multi-byte fields of that block,
which are what the byte order of a file changes. Sources: ggml.h (ids), ggml-common.h (the `block_*` structs).

Fields (`words`) follow the structs. Bytes that ggml reads one by one, or with an operation that works alike on every
byte, are not among them; `qh` of q5_0 and q5_1 is, because ggml copies it into a `uint32_t`. The iq1, iq2 and iq3
families mix words, bytes and tables of words, and nothing states what a big-endian file of them holds: their `words`
is None, and such a tensor is refused by name.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

from trustcore.weights.encoding import Encoding

# Metadata value types (GGUF specification): the scalars as NumPy type codes, and three that are no NumPy number.
BOOL, STRING, ARRAY = 7, 8, 9
SCALARS: dict[int, np.dtype] = {
    0: np.dtype(np.uint8),
    1: np.dtype(np.int8),
    2: np.dtype(np.uint16),
    3: np.dtype(np.int16),
    4: np.dtype(np.uint32),
    5: np.dtype(np.int32),
    6: np.dtype(np.float32),
    10: np.dtype(np.uint64),
    11: np.dtype(np.int64),
    12: np.dtype(np.float64),
}
UINT32 = 4

_F16 = (0, 2, 1)  # one scale at the start of a block
_F16_PAIR = (0, 2, 2)  # scale and minimum at the start of a block


def _packed(name: str, weights: int, nbytes: int, *words: tuple[int, int, int]) -> Encoding:
    return Encoding(name, weights, nbytes, None, words)


def _unsettled(name: str, weights: int, nbytes: int) -> Encoding:
    return Encoding(name, weights, nbytes, None, None)


GGML_TYPES: dict[int, Encoding] = {
    0: Encoding.plain("f32", np.float32),
    1: Encoding.plain("f16", np.float16),
    2: _packed("q4_0", 32, 18, _F16),
    3: _packed("q4_1", 32, 20, _F16_PAIR),
    6: _packed("q5_0", 32, 22, _F16, (2, 4, 1)),
    7: _packed("q5_1", 32, 24, _F16_PAIR, (4, 4, 1)),
    8: _packed("q8_0", 32, 34, _F16),
    9: _packed("q8_1", 32, 36, _F16_PAIR),
    10: _packed("q2_k", 256, 84, (80, 2, 2)),
    11: _packed("q3_k", 256, 110, (108, 2, 1)),
    12: _packed("q4_k", 256, 144, _F16_PAIR),
    13: _packed("q5_k", 256, 176, _F16_PAIR),
    14: _packed("q6_k", 256, 210, (208, 2, 1)),
    15: _packed("q8_k", 256, 292, (0, 4, 1), (260, 2, 16)),
    16: _unsettled("iq2_xxs", 256, 66),
    17: _unsettled("iq2_xs", 256, 74),
    18: _unsettled("iq3_xxs", 256, 98),
    19: _unsettled("iq1_s", 256, 50),
    20: _packed("iq4_nl", 32, 18, _F16),
    21: _unsettled("iq3_s", 256, 110),
    22: _unsettled("iq2_s", 256, 82),
    23: _packed("iq4_xs", 256, 136, (0, 2, 2)),
    24: Encoding.plain("i8", np.int8),
    25: Encoding.plain("i16", np.int16),
    26: Encoding.plain("i32", np.int32),
    27: Encoding.plain("i64", np.int64),
    28: Encoding.plain("f64", np.float64),
    29: _unsettled("iq1_m", 256, 56),
    30: Encoding.plain("bf16", ml_dtypes.bfloat16),
    34: _packed("tq1_0", 256, 54, (52, 2, 1)),
    35: _packed("tq2_0", 256, 66, (64, 2, 1)),
    39: _packed("mxfp4", 32, 17),
    40: _packed("nvfp4", 64, 36),
    41: _packed("q1_0", 128, 18, _F16),
    42: _packed("q2_0", 64, 18, _F16),  # forks give this id to a block of 128: their tensors then overlap or fall short
}

GGML_IDS: dict[str, int] = {encoding.name: number for number, encoding in GGML_TYPES.items()}

# Ids that ggml gave out and took back: such files need converting again.
REMOVED_TYPES: dict[int, str] = {
    4: "q4_2",
    5: "q4_3",
    31: "q4_0_4_4",
    32: "q4_0_4_8",
    33: "q4_0_8_8",
    36: "iq4_nl_4_4",
    37: "iq4_nl_4_8",
    38: "iq4_nl_8_8",
}
