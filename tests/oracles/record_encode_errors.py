"""Records how well llama.cpp encodes seeded random weights, as `tests/data/encode_errors.json`.

The oracle is not a test dependency. In a virtual environment of its own, from the root of the checkout:

    pip install llama-cpp-python==0.3.36 gguf==0.19.0
    PYTHONPATH=. python tests/oracles/record_encode_errors.py --out tests/data

`ggml_quantize_chunk` encodes, the `gguf` package decodes. For each format, distribution and with or without an
importance: the mean squared error, weighted by the importance where there is one. Without an importance that is
llama.cpp's plain encoder; with one it is its encoder with an importance matrix. The weights come from
`tests/quant/samples.py`; the same versions write the same figures.
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

from tests.quant.samples import DISTRIBUTIONS, importance_of, mean_error, weights_of

FORMATS = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k")


def encoder() -> ctypes._CFuncPtr:
    library = Path(llama_cpp.__file__).parent / "lib" / "libggml-base.so"
    function = ctypes.CDLL(str(library)).ggml_quantize_chunk
    pointer = ctypes.c_void_p
    function.argtypes = [ctypes.c_int, pointer, pointer, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, pointer]
    function.restype = ctypes.c_size_t
    return function


def encode(function: ctypes._CFuncPtr, name: str, weights: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    """Returns what the encoded weights `[n, k]` decode to."""
    kind = getattr(gguf.GGMLQuantizationType, name.upper())
    n, k = weights.shape
    block, size = gguf.GGML_QUANT_SIZES[kind]
    raw = np.zeros((n, k // block * size), np.uint8)
    scale = None if importance is None else importance.ctypes.data
    written = function(int(kind), weights.ctypes.data, raw.ctypes.data, 0, n, k, scale)
    if written != raw.nbytes:
        raise RuntimeError(f"{name}: {written} bytes written, {raw.nbytes} expected")
    return gguf.quants.dequantize(raw, kind).reshape(n, k)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, type=Path)
    args = parser.parse_args()
    function = encoder()
    errors: dict[str, dict[str, dict[str, float]]] = {}
    for name in FORMATS:
        errors[name] = {}
        for distribution in DISTRIBUTIONS:
            weights, importance = weights_of(distribution), importance_of()
            errors[name][distribution] = {
                key: float(f"{mean_error(weights, encode(function, name, weights, used), used):.6e}")
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
