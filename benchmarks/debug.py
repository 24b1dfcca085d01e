"""What looking costs: a decoder's training step plain, under `inspect` with nothing watched, some of it, and all of it.

    python benchmarks/debug.py                        # writes benchmarks/results/debug-DATE.json
    python benchmarks/debug.py --table FILE           # puts such a file into docs/benchmarks.md

The step is loss, gradient and AdamW of a small decoder on random tokens, one jitted function. The contenders take
turns; a figure is the median of the rounds. "reading" is what the report takes on the host afterwards, up to its
issues; it is paid only where somebody reads. Run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from harness import described, fill, origin, write_result

SIZES = {
    "D 256, 4 layers, 8 x 128 tokens": (256, 4, 768, 8, 128),
    "D 512, 4 layers, 4 x 256 tokens": (512, 4, 1536, 4, 256),
}
CONTENDERS = ("plain", "nothing watched", "attention of one layer", "everything")


def step_of(features: int, layers: int, hidden: int, batch: int, length: int) -> tuple[Callable[..., Any], Any]:
    """Returns a jitted training step and its arguments."""
    import optax
    from flax import nnx

    from trustcore.models import Decoder, DecoderConfig
    from trustcore.ops.rope import RopeConfig

    config = DecoderConfig(
        vocab_size=1024,
        features=features,
        layers=layers,
        heads=features // 64,
        kv_heads=features // 128,
        head_dim=64,
        hidden=hidden,
        context=length,
        rope=RopeConfig(64, theta=1e4, interleaved=False, original_context=length),
        norm_eps=1e-5,
    )
    model: Any = Decoder(config, rngs=nnx.Rngs(0))
    optimizer = optax.adamw(1e-3)

    def loss(model: Any, tokens: jax.Array) -> jax.Array:
        log = jax.nn.log_softmax(model(tokens[:, :-1]))
        return -jnp.mean(jnp.take_along_axis(log, tokens[:, 1:, None], axis=-1))

    @jax.jit
    def step(model: Any, state: Any, tokens: jax.Array) -> Any:
        value, gradient = jax.value_and_grad(loss)(model, tokens)
        updates, state = optimizer.update(gradient, state, model)
        return optax.apply_updates(model, updates), state, value

    tokens = np.random.default_rng(0).integers(0, 1024, (batch, length + 1)).astype(np.int32)
    return step, (model, optimizer.init(model), jnp.asarray(tokens))


def measured(fn: Callable[[], Any]) -> float:
    began = time.perf_counter()
    jax.block_until_ready(fn())
    return time.perf_counter() - began


def runs(step: Callable[..., Any], args: Any) -> dict[str, Callable[[], Any]]:
    from trustcore.debug import inspect

    nothing = inspect(step, watch=None)
    assert nothing is step
    one, everything = inspect(step, "blocks/1/attention/*"), inspect(step)
    return {
        "plain": lambda: step(*args),
        "nothing watched": lambda: nothing(*args),
        "attention of one layer": lambda: _both(one, args),
        "everything": lambda: _both(everything, args),
        "report": lambda: everything.run(*args)[1],
    }


def _both(inspected: Any, args: Any) -> Any:
    outputs, report = inspected.run(*args)
    return outputs, report.pending


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", help="a part of the name of a size")
    parser.add_argument("--out")
    parser.add_argument("--table", metavar="FILE")
    options = parser.parse_args()
    if options.table:
        put(json.loads(Path(options.table).read_text()))
        return
    result: dict[str, Any] = origin({"trustcore": "this"}) | {"sizes": {}, "load": os.getloadavg()[0]}
    for name, size in SIZES.items():
        if options.only and options.only not in name:
            continue
        step, args = step_of(*size)
        contenders = runs(step, args)
        for key in CONTENDERS:  # compiled
            measured(contenders[key])
        times: dict[str, list[float]] = {key: [] for key in CONTENDERS}
        for _ in range(options.rounds):
            for key in CONTENDERS:
                times[key].append(measured(contenders[key]))
        report = contenders["report"]()
        jax.block_until_ready(report.pending)
        began = time.perf_counter()
        found = report.issues
        reading = time.perf_counter() - began
        equations = len(report.traced.program.nodes)
        result["sizes"][name] = {
            "seconds": times,
            "reading": reading,
            "values": len(report.statistics),
            "equations": equations,
            "issues": [issue.message for issue in found],
        }
        plain = statistics.median(times["plain"])
        for key, values in times.items():
            print(f"{name}: {key}: {1e3 * statistics.median(values):.1f} ms, {statistics.median(values) / plain:.2f}x")
        print(f"  reading {reading:.2f} s, {equations} equations, {result['sizes'][name]['values']} values")
    write_result(result, options.out, "debug")


def put(result: dict[str, Any]) -> None:
    """Puts a result into docs/benchmarks.md."""
    lines = [
        "| step | plain | nothing watched | attention of one layer | everything | everything / plain |",
        "|---|" + "---|" * 5,
    ]
    for name, size in result["sizes"].items():
        seconds = size["seconds"]
        cells = [
            f"{1e3 * statistics.median(v):.0f} ms ({1e3 * min(v):.0f} to {1e3 * max(v):.0f})"
            for v in (seconds[key] for key in CONTENDERS)
        ]
        ratio = statistics.median(seconds["everything"]) / statistics.median(seconds["plain"])
        lines.append(f"| {name} | {' | '.join(cells)} | {ratio:.2f} |")
    told = ", ".join(f"{s['values']} values of {s['equations']} equations" for s in result["sizes"].values())
    read = " and ".join(f"{s['reading']:.2f} s" for s in result["sizes"].values())
    note = f"Measured are {told}. Reading a report up to its issues takes {read} on the host."
    fill("docs/benchmarks.md", "debug", "\n".join([*lines, "", note, described(result), ""]))


if __name__ == "__main__":
    main()
