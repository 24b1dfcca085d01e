"""Records how well llama.cpp encodes seeded random weights, as `tests/data/encode_errors.json`.

The oracle is not a test dependency. In a virtual environment of its own, from the root of the checkout:

    pip install llama-cpp-python==0.3.36 gguf==0.19.0 -e .
    PYTHONPATH=. python tests/oracles/record_encode_errors.py --out tests/data

`ggml_quantize_chunk` encodes (q8_k: `quantize_row_q8_K_ref`), the `gguf` package decodes. For each format, distribution
and with or without an importance: the mean squared error, weighted by the importance where there is one. Without an
importance that is llama.cpp's plain encoder (iq2_xxs, iq2_xs and iq1_s have none: there every input has importance 1);
with one it is its encoder with an importance matrix. The weights come from `tests/quant/samples.py`; the same versions
write the same figures.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import platform
from pathlib import Path

import gguf
import llama_cpp
import numpy as np

from tests.quant.blocks import decoded
from tests.quant.samples import DISTRIBUTIONS, importance_of, mean_error, weights_of

FORMATS = (
    *("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q8_k", "q1_0", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k"),
    *("iq4_nl", "iq4_xs", "iq3_xxs", "iq3_s", "iq2_xxs", "iq2_xs", "iq2_s", "iq1_s", "iq1_m"),
    *("tq1_0", "tq2_0", "mxfp4", "nvfp4"),
)
NEED_IMPORTANCE = ("iq2_xxs", "iq2_xs", "iq1_s")  # refused without; "plain" gives them ones


class Encoder:
    """llama.cpp's encoders of rows of weights."""

    def __init__(self) -> None:
        self.library = ctypes.CDLL(str(Path(llama_cpp.__file__).parent / "lib" / "libggml-base.so"))
        pointer, size = ctypes.c_void_p, ctypes.c_int64
        self.library.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, size, size, size, pointer]
        self.library.ggml_quantize_chunk.restype = ctypes.c_size_t
        self.library.quantize_row_q8_K_ref.argtypes = [pointer, pointer, size]

    def __call__(self, name: str, weights: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
        """Returns what the encoded weights `[n, k]` decode to."""
        n, k = weights.shape
        kind = getattr(gguf.GGMLQuantizationType, name.upper())
        block, size = gguf.GGML_QUANT_SIZES[kind]
        raw = np.zeros((n, k // block * size), np.uint8)
        if name == "q8_k":
            self.library.quantize_row_q8_K_ref(weights.ctypes.data, raw.ctypes.data, n * k)
            return decoded(name, raw)
        if importance is None and name in NEED_IMPORTANCE:
            importance = np.ones(k, np.float32)
        self.library.ggml_quantize_init(int(kind))  # the tables of the grids
        scale = None if importance is None else importance.ctypes.data
        written = self.library.ggml_quantize_chunk(int(kind), weights.ctypes.data, raw.ctypes.data, 0, n, k, scale)
        if written != raw.nbytes:
            raise RuntimeError(f"{name}: {written} bytes written, {raw.nbytes} expected")
        return decoded(name, raw)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, type=Path)
    args = parser.parse_args()
    encode = Encoder()
    errors: dict[str, dict[str, dict[str, float]]] = {}
    for name in FORMATS:
        errors[name] = {}
        for distribution in DISTRIBUTIONS:
            weights, importance = weights_of(distribution), importance_of()
            errors[name][distribution] = {
                key: float(f"{mean_error(weights, encode(name, weights, used), used):.6e}")
                for key, used in (("plain", None), ("importance", importance))
            }
    about = {
        "llama_cpp_python": llama_cpp.__version__,
        "gguf": "0.19.0",
        "python": platform.python_version(),
        "machine": platform.machine(),
    }
    (args.out / "encode_errors.json").write_text(json.dumps({"about": about, "errors": errors}, indent=1) + "\n")


if __name__ == "__main__":
    main()
