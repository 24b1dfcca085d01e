"""SmolLM2 with its residual stream turned by a fixed random orthogonal matrix: the same function, other weights.

Its published weights come from a 4-bit file and lie on 16 levels a block, on which 4-bit formats look lossless. Turned,
they lie on no grid.

    python benchmarks/rotated_smollm2.py F16.gguf        # writes it, for others to read
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any


def rotated_smollm2() -> Any:
    """Returns the model in float32, its output layer untied, after comparing its logits with the original's."""
    import jax.numpy as jnp

    import trustcore as tc
    from trustcore.models import decoder_stream, untie
    from trustcore.quant import rotate

    plain = tc.load("smollm2", dtype="float32")
    whole = untie(plain)
    model = rotate(whole, decoder_stream(whole), rotation="orthogonal", values="orthogonal", seed=1)
    model.tokenizer, model.origin = plain.tokenizer, plain.origin
    probe = jnp.asarray([plain.tokenizer.encode("The whale rose, and the boats were lowered one after the other.")])
    before, after = whole(probe), model(probe)
    apart = float(jnp.max(jnp.abs(before - after)))
    assert apart < 2e-3 * float(jnp.max(jnp.abs(before))), f"the rotated model's logits differ by {apart}"
    return model


def main() -> None:
    if len(sys.argv) != 2 or not sys.argv[1].endswith(".gguf"):
        raise SystemExit(__doc__)
    import trustcore as tc

    with tempfile.TemporaryDirectory() as folder:
        tc.save(rotated_smollm2(), Path(folder) / "model")
        tc.quantize_checkpoint(Path(folder) / "model", sys.argv[1], "f16")


if __name__ == "__main__":
    main()
