"""Records what ggml's own C functions decode random blocks to, as `tests/data/ggml_blocks.json`.

The oracle is not a test dependency. In a virtual environment of its own:

    pip install llama-cpp-python==0.3.36 gguf==0.19.0
    python tests/oracles/record_ggml_blocks.py --out tests/data

For each format: `blocks`, the bytes in hexadecimal, and `decoded`, little-endian float32 in base 64, from
`dequantize_row_<format>` of the library that llama-cpp-python carries. Bytes are uniformly random; a draw that does not
decode to finite numbers is drawn again. A second run writes the same file.
"""

from __future__ import annotations

import argparse
import base64
import ctypes
import json
import platform
from pathlib import Path

import gguf
import llama_cpp
import numpy as np

NAMES = (
    *("q1_0", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_K", "q3_K", "q4_K", "q5_K", "q6_K", "q8_K"),
    *("iq4_nl", "iq4_xs", "iq3_xxs", "iq3_s", "iq2_xxs", "iq2_xs", "iq2_s", "iq1_s", "iq1_m"),
    *("tq1_0", "tq2_0", "mxfp4", "nvfp4"),
)
WEIGHTS = 256


def main() -> None:
    """Writes the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the file")
    args = parser.parse_args()
    library = next((Path(llama_cpp.__file__).parent / "lib").glob("libggml-base.*"))
    ggml = ctypes.CDLL(str(library))
    formats = {}
    for seed, name in enumerate(NAMES):
        block, size = gguf.GGML_QUANT_SIZES[getattr(gguf.GGMLQuantizationType, name.upper())]
        rng = np.random.default_rng(seed)
        decoded = np.full(WEIGHTS, np.nan, np.float32)
        while not np.isfinite(decoded).all():
            blocks = rng.integers(0, 256, WEIGHTS // block * size, dtype=np.uint8)
            decode = getattr(ggml, f"dequantize_row_{name}")
            decode(
                blocks.ctypes.data_as(ctypes.c_void_p), decoded.ctypes.data_as(ctypes.c_void_p), ctypes.c_int64(WEIGHTS)
            )
        formats[name.lower()] = {
            "blocks": blocks.tobytes().hex(),
            "decoded": base64.b64encode(decoded.astype("<f4").tobytes()).decode(),
        }
    about = {"llama-cpp-python": llama_cpp.__version__, "gguf": "0.19.0", "machine": platform.machine()}
    text = json.dumps({"about": about, "formats": formats}, indent=1)
    (args.out / "ggml_blocks.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
