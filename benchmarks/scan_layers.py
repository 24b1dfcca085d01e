"""Compiling forward and backward of a deep decoder, layers as a list and as a scan (`trustcore.models.scan_layers`).

    python benchmarks/scan_layers.py                    SmolLM2-135M's shape, several depths, float and packed
    python benchmarks/scan_layers.py --table JSON       makes docs/benchmarks.md from a result

Weights are random; a batch of 1 row of 128 tokens; the gradient is of the mean square of the logits, with respect to
all float32 weights, or to the scales of packed ones. Seconds are those of the processor, which other processes disturb
less than the clock: to trace, to compile (no cache of programs), and of a call (median of `--calls`), forms in turn,
one process. The result is written to benchmarks/results/scan_layers-DATE.json. About ten minutes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness import ROOT, described, fill, origin, write_result

SHAPE = {
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 1536,
    "tie_word_embeddings": True,
}
CASES = (("float32", 6), ("float32", 30), ("float32", 60), ("q4_1", 6), ("q4_1", 30))
LENGTH = 128
FORMS = ("list", "scan", "scan, remat")


def measure(rounds: int, calls: int) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp
    import numpy as np

    import trustcore
    from trustcore.models import random_model, scan_layers

    jax.config.update("jax_enable_compilation_cache", False)
    make: dict[str, Callable[[Any], Any]] = {
        "list": lambda model: model,
        "scan": scan_layers,
        "scan, remat": lambda model: scan_layers(model, remat=True),
    }
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, SHAPE["vocab_size"], (1, LENGTH)), jnp.int32)

    def loss(model: Any, tokens: jax.Array) -> jax.Array:
        return jnp.mean(jnp.square(model(tokens)))

    found: dict[str, Any] = {}
    for kind, layers in CASES:
        plain = random_model({**SHAPE, "num_hidden_layers": layers})
        plain = plain if kind == "float32" else trustcore.quantize(plain, kind, search=False)
        for _ in range(rounds):
            for form in FORMS:
                model = make[form](plain)
                jax.clear_caches()
                began = time.process_time()
                lowered = jax.jit(jax.value_and_grad(loss, allow_int=True)).lower(model, tokens)
                traced = time.process_time()
                program = lowered.compile()
                compiled = time.process_time()
                seconds = []
                for _ in range(calls + 1):  # the first one warms up
                    start = time.process_time()
                    value = jax.block_until_ready(program(model, tokens))[0]
                    seconds.append(time.process_time() - start)
                rows = found.setdefault(f"{kind}, {layers}", {})
                row = rows.setdefault(form, {"trace": [], "compile": [], "call": []})
                row["trace"].append(traced - began)
                row["compile"].append(compiled - traced)
                row["call"].append(statistics.median(seconds[1:]))
                row["loss"] = float(value)
                row["temporaries"] = program.memory_analysis().temp_size_in_bytes
                told = ", ".join(f"{name} {row[name][-1]:.2f} s" for name in ("trace", "compile", "call"))
                print(f"{kind}, {layers} layers, {form}: {told}, loss {row['loss']:.6g}", flush=True)
    return found


def table(result: dict[str, Any]) -> str:
    """The result as Markdown, a row for each depth and form."""
    lines = ["| weights, layers | form | trace, s | compile, s | a call, s | temporaries, MB |", "|---" * 6 + "|"]
    for layers, forms in result["cases"].items():
        for form, row in forms.items():
            cells = [f"{statistics.median(row[name]):.2f}" for name in ("trace", "compile", "call")]
            lines.append(f"| {layers} | {form} | " + " | ".join(cells) + f" | {row['temporaries'] / 1e6:.0f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--calls", type=int, default=5)
    parser.add_argument("--out", help="JSON file to write")
    parser.add_argument("--table", type=Path, metavar="JSON", help="make docs/benchmarks.md from a result, and stop")
    args = parser.parse_args()
    if args.table:
        result, name = json.loads(args.table.read_text()), args.table.resolve().relative_to(ROOT)
        fill("docs/benchmarks.md", "scan", f"{table(result)}\n\n{described(result)} Data: [{name}](../{name}).\n")
        return
    about = origin({"trustcore": ""})
    result = about | {"threads": about["machine"]["cores"], "cases": measure(args.rounds, args.calls)}
    write_result(result, args.out, "scan_layers")
    print(table(result))


if __name__ == "__main__":
    main()
