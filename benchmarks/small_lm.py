"""A small language model of bytes, trained here: its weights lie on no grid, and its rows fit every block.

    python benchmarks/small_lm.py --steps 600 --out small_lm.safetensors
    python benchmarks/small_lm.py --open small_lm.safetensors --gguf FOLDER     # for llama.cpp to read

The text is Python's standard library, as it lies beside the interpreter; every tenth file is kept for measuring. D and
F are multiples of 256, which the K-quants need. The same seed, steps and library give the same model.
"""

from __future__ import annotations

import argparse
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from trustcore.models import Decoder, DecoderConfig
from trustcore.ops.rope import RopeConfig

CONTEXT, BATCH = 256, 16
CONFIG = DecoderConfig(
    vocab_size=256,
    features=256,
    layers=4,
    heads=4,
    kv_heads=2,
    head_dim=64,
    hidden=768,
    context=CONTEXT,
    rope=RopeConfig(64, theta=1e4, interleaved=False, original_context=CONTEXT),
    norm_eps=1e-5,
)


def texts() -> tuple[np.ndarray, np.ndarray]:
    """Returns the bytes to train on and those to measure on."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for i, file in enumerate(files):
        parts[i % 10 == 9].append(file.read_bytes())
    train, held = (np.frombuffer(b"\n".join(part), np.uint8) for part in parts)
    return train, held


def train(steps: int, *, seed: int = 0) -> Decoder:
    """Returns the model after `steps` steps of AdamW; prints the loss every fifty."""
    import optax

    text, _ = texts()
    model = Decoder(CONFIG, rngs=nnx.Rngs(seed))
    schedule = optax.warmup_cosine_decay_schedule(0.0, 3e-3, steps // 10, steps, 1e-4)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.05))
    state = optimizer.init(model)

    def loss(model: Any, tokens: jax.Array) -> jax.Array:
        log = jax.nn.log_softmax(model(tokens[:, :-1]))
        return -jnp.mean(jnp.take_along_axis(log, tokens[:, 1:, None], axis=-1))

    @jax.jit
    def step(model: Any, state: Any, tokens: jax.Array) -> Any:
        value, gradient = jax.value_and_grad(loss)(model, tokens)
        updates, state = optimizer.update(gradient, state, model)
        return optax.apply_updates(model, updates), state, value

    rng = np.random.default_rng(seed)
    began = time.perf_counter()
    for i in range(steps):
        starts = rng.integers(0, len(text) - CONTEXT - 1, BATCH)
        tokens = jnp.asarray(np.stack([text[s : s + CONTEXT + 1] for s in starts]).astype(np.int32))
        model, state, value = step(model, state, tokens)
        if i % 50 == 49 or i == 0:
            print(f"step {i + 1}: loss {float(value):.3f}, {time.perf_counter() - began:.0f} s", flush=True)
    return model


def save(model: Decoder, path: Path) -> None:
    """Writes the weights, one tensor a path."""
    from safetensors.numpy import save_file

    from trustcore.quant.quantize import path_name

    leaves = jax.tree_util.tree_flatten_with_path(model)[0]
    save_file({path_name(path): np.asarray(leaf) for path, leaf in leaves}, path)


def open_saved(path: Path) -> Decoder:
    """Returns the model that `save` wrote."""
    from safetensors.numpy import load_file

    from trustcore.quant.quantize import path_name

    held = load_file(path)
    model = Decoder(CONFIG, rngs=nnx.Rngs(0))
    return jax.tree_util.tree_map_with_path(lambda p, leaf: jnp.asarray(held[path_name(p)], leaf.dtype), model)


def write_gguf_files(model: Decoder, folder: Path) -> None:
    """Writes F16.gguf, without a tokenizer; imatrix.gguf, mean squares of inputs; and text.bin to measure on."""
    import tempfile

    import trustcore as tc
    from trustcore.models import importance_by_tensor
    from trustcore.quant.calibration import MeanSquare, capture
    from trustcore.weights.checkpoint import TOKENIZER_GGUF
    from trustcore.weights.gguf_writer import write_gguf
    from trustcore.weights.imatrix import Entry, Imatrix, write_imatrix

    folder.mkdir(parents=True, exist_ok=True)
    text, held = texts()
    with tempfile.TemporaryDirectory() as made:
        tc.save(model, Path(made) / "model")
        none = {"general.architecture": "tokenizer", "tokenizer.ggml.model": "none"}
        write_gguf(Path(made) / "model" / TOKENIZER_GGUF, none, {})
        tc.quantize_checkpoint(Path(made) / "model", folder / "F16.gguf", "f16")
    collect = capture(
        lambda m, tokens: m.hidden_states(tokens)[0],
        model,
        MeanSquare(),
        where=lambda path, leaf: path.startswith("blocks.") and path.endswith("kernel"),
    )
    rows = text[100000 : 100000 + 64 * CONTEXT].astype(np.int32).reshape(64, CONTEXT)
    means = importance_by_tensor(collect.finish(collect(jnp.asarray(rows))), model.config)
    counts = np.full(1, rows.size, np.float32)
    entries = {name: Entry(mean, counts) for name, mean in means.items()}
    write_imatrix(folder / "imatrix.gguf", Imatrix(entries, ("python",), 64, CONTEXT))
    (folder / "text.bin").write_bytes(held[20000 : 20000 + 64 * CONTEXT].tobytes())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--open", type=Path, help="weights that are there, in place of training")
    parser.add_argument("--out", type=Path, help="where the weights are written")
    parser.add_argument("--gguf", type=Path, help="a folder for the model in float16, an importance matrix and a text")
    args = parser.parse_args()
    model = open_saved(args.open) if args.open else train(args.steps)
    if args.out:
        save(model, args.out)
    if args.gguf:
        write_gguf_files(model, args.gguf)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    main()
