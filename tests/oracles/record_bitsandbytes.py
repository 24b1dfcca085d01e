"""Records what bitsandbytes makes of known weights on the CPU: codes, scales, nested scales and decoded weights.

    python tests/oracles/record_bitsandbytes.py        (needs torch and bitsandbytes)

Writes tests/data/bitsandbytes.npz. Weights are `[N, K]`, as torch's linear layers have them; blocks run along the
flattened array, which is along K where the block size divides K. Two 4-bit codes share a byte, the first one above.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import bitsandbytes
import numpy as np
import torch
from bitsandbytes import functional

CASES = {"nf4": (24, 256, 64), "fp4": (24, 256, 64), "nf4_wide": (12, 512, 128), "nf4_tall": (3, 32768, 64)}


def weights_of(n: int, k: int, seed: int) -> np.ndarray:
    """Returns float32 `[n, k]`: normal numbers of rows of different sizes, a few of them far out, a block of zeros."""
    rng = np.random.default_rng(seed)
    weights = rng.standard_normal((n, k)) * np.exp(rng.standard_normal((n, 1)) - 4)
    weights[rng.random((n, k)) < 0.002] *= 20
    weights[1, :128] = 0
    return weights.astype(np.float32)


def main() -> None:
    """Writes the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "data", help="folder of the file")
    out = parser.parse_args().out
    recorded: dict[str, np.ndarray] = {}
    for seed, (case, (n, k, size)) in enumerate(CASES.items()):
        weights = torch.from_numpy(weights_of(n, k, seed))
        kind = case[:3]
        for name, double in (("single", False), ("double", True)):
            packed, state = functional.quantize_4bit(
                weights, blocksize=size, quant_type=kind, compress_statistics=double
            )
            key = f"{case}/{name}"
            recorded[f"{key}/packed"] = packed.numpy().reshape(n, k // 2)
            recorded[f"{key}/absmax"] = state.absmax.numpy().reshape(n, k // size)
            decoded = functional.dequantize_4bit(packed, state).numpy()
            if double:
                recorded[f"{key}/nested"] = state.state2.absmax.numpy()
                recorded[f"{key}/offset"] = state.offset.numpy()
                recorded[f"{key}/levels"] = state.state2.code.numpy()
            if k < 1000:
                recorded[f"{key}/decoded"] = decoded
        recorded[f"{case}/table"] = state.code.numpy()
    recorded["version"] = np.array(bitsandbytes.__version__)
    np.savez_compressed(out / "bitsandbytes.npz", **recorded)


if __name__ == "__main__":
    main()
