"""Records llama.cpp's logits of GGUF files that trustcore wrote, as `tests/data/gguf_decoders.npz`.

The oracle is no test dependency; it has a virtual environment of its own. In trustcore's, then in that one:

    PYTHONPATH=. python tests/oracles/record_gguf_decoders.py --write FOLDER
    pip install llama-cpp-python==0.3.36
    python tests/oracles/record_gguf_decoders.py --read FOLDER --out tests/data/gguf_decoders.npz

The files hold the small random models of `tests/models/gguf_models.py`, all in float32; the cache is float32, too.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np


def main() -> None:
    """Writes the models, or reads them and writes their logits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="folder that the models are written to")
    parser.add_argument("--read", type=Path, help="folder that the models are read from")
    parser.add_argument("--out", type=Path, help="file of the logits")
    args = parser.parse_args()
    if args.write is not None:
        from tests.models.gguf_models import CONFIGS, TOKENS, random_model, write

        args.write.mkdir(parents=True, exist_ok=True)
        np.save(args.write / "tokens.npy", TOKENS)
        for name in CONFIGS:
            write(args.write / f"{name}.gguf", random_model(name))
        return
    import llama_cpp

    tokens = np.load(args.read / "tokens.npy")
    found = {path.stem: logits(path, tokens.tolist()) for path in sorted(args.read.glob("*.gguf"))}
    versions = np.array(f"llama-cpp-python {llama_cpp.__version__}")
    np.savez_compressed(args.out, tokens=tokens, versions=versions, **found)
    print({name: float(np.abs(values).max()) for name, values in found.items()}, args.out.stat().st_size, "bytes")


def logits(path: Path, tokens: list[int]) -> np.ndarray:
    """Returns float32 `[T, V]` logits of llama.cpp."""
    import llama_cpp

    model = llama_cpp.Llama(
        str(path), n_ctx=32, n_batch=32, n_threads=1, logits_all=True, verbose=False,
        type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32,
    )  # fmt: skip
    model.eval(tokens)
    return np.array(model.scores[: len(tokens)], np.float32)


if __name__ == "__main__":
    main()
