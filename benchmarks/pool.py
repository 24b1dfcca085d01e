"""What a pool of buffers saves against letting XLA allocate: caches of repeated answers, batches that are streamed in.

    python benchmarks/pool.py                        # writes benchmarks/results/pool-DATE.json
    python benchmarks/pool.py --table FILE           # puts such a file into docs/benchmarks.md

An answer: a prompt of 4 tokens, one token made, of a decoder of little arithmetic and the cache of a large one; the
answer's cache goes when it ends. A batch: host memory that its producer will write to again, so that it must be copied,
then summed on the device. "put" is `jax.device_put`, which on a CPU copies nothing where the host's memory is aligned:
the producer may then not write. Contenders take turns; a figure is the median of the rounds, of a warm process. Page
faults are those of all threads. Run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from harness import described, fill, origin, write_result

# Heads, layers, rows, context: the cache has 2 * layers arrays of rows * heads * 64 * context floats.
ANSWERS = {
    "8 layers, 1 row, 1024 slots": (2, 8, 1, 1024),
    "8 layers, 4 rows, 2048 slots": (2, 8, 4, 2048),
    "8 layers, 8 rows, 4096 slots": (4, 8, 8, 4096),
}
BATCHES = {"a batch of 1 MB": 1 << 18, "a batch of 16 MB": 1 << 22, "a batch of 128 MB": 1 << 25}
add_up = jax.jit(jnp.sum)


def answers(sizes: tuple[int, int, int, int], pool: Any) -> tuple[dict[str, Callable[[], Any]], int]:
    """Returns the contenders, and the bytes of a cache."""
    from trustcore.generation import generate_tokens
    from trustcore.models import random_model

    heads, layers, rows, slots = sizes
    model = random_model(
        {
            "model_type": "llama", "vocab_size": 64, "hidden_size": 64 * heads, "num_attention_heads": heads,
            "num_key_value_heads": heads, "intermediate_size": 64, "num_hidden_layers": layers,
            "max_position_embeddings": slots,
        }
    )  # fmt: skip

    def answer(pool: Any) -> None:
        for _ in generate_tokens(model, [[1, 2, 3, 4]] * rows, max_tokens=slots - 8, pool=pool):
            break

    kept = jax.tree.leaves(jax.eval_shape(lambda: model.new_cache(rows, slots)))
    nbytes = sum(leaf.size * leaf.dtype.itemsize for leaf in kept)
    return {"allocated": lambda: answer(None), "pool": lambda: answer(pool)}, nbytes


def batches(elements: int, pool: Any) -> tuple[dict[str, Callable[[], Any]], int]:
    """Returns the contenders, and the bytes of a batch."""
    host = np.ones(elements, np.float32)

    def pooled() -> None:
        with pool.scope():
            add_up(pool.stage(host)).block_until_ready()

    return {
        "allocated": lambda: add_up(jax.block_until_ready(jnp.array(host, copy=True))).block_until_ready(),
        "pool": pooled,
        "put": lambda: add_up(jax.device_put(host)).block_until_ready(),
    }, host.nbytes


def measured(fn: Callable[[], Any]) -> tuple[float, int]:
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    began = time.perf_counter()
    fn()
    return time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out")
    parser.add_argument("--table", metavar="FILE")
    options = parser.parse_args()
    if options.table:
        put(json.loads(Path(options.table).read_text()))
        return
    from trustcore.memory import Pool

    result: dict[str, Any] = origin({"trustcore": "this"}) | {"rows": {}, "load": os.getloadavg()[0]}
    for make, rows in ((answers, ANSWERS), (batches, BATCHES)):
        for name, size in rows.items():
            pool = Pool()
            contenders, nbytes = make(size, pool)
            for fn in contenders.values():
                for _ in range(3):
                    fn()
            seconds: dict[str, list[float]] = {key: [] for key in contenders}
            faults: dict[str, list[int]] = {key: [] for key in contenders}
            for _ in range(options.rounds):
                for key, fn in contenders.items():
                    took, faulted = measured(fn)
                    seconds[key].append(took)
                    faults[key].append(faulted)
            result["rows"][name] = {
                "bytes": nbytes, "seconds": seconds, "faults": faults, "pool": pool.stats.as_json()
            }  # fmt: skip
            told = (f"{key} {1e3 * statistics.median(seconds[key]):.2f} ms, {statistics.median(faults[key]):.0f} faults"
                    for key in contenders)  # fmt: skip
            print(f"{name} ({nbytes / 1e6:.0f} MB): {'; '.join(told)}")
            pool.clear()
    write_result(result, options.out, "pool")


def put(result: dict[str, Any]) -> None:
    """Puts a result into docs/benchmarks.md."""
    lines = [
        "| | bytes | allocated | from a pool | pool / allocated | page faults | `device_put` without a copy |",
        "|---|" + "---|" * 6,
    ]
    for name, row in result["rows"].items():
        seconds, faults = row["seconds"], row["faults"]
        middle = {key: statistics.median(values) for key, values in seconds.items()}
        cells = [f"{1e3 * middle[k]:.2f} ms ({1e3 * min(seconds[k]):.2f} to {1e3 * max(seconds[k]):.2f})"
                 for k in ("allocated", "pool")]  # fmt: skip
        ratio = f"{middle['pool'] / middle['allocated']:.2f}"
        count = " and ".join(f"{statistics.median(faults[key]):.0f}" for key in ("allocated", "pool"))
        other = f"{1e3 * middle['put']:.2f} ms" if "put" in middle else ""
        lines.append("| " + " | ".join([name, f"{row['bytes'] / 1e6:.0f} MB", *cells, ratio, count, other]) + " |")
    fill("docs/benchmarks.md", "pool", "\n".join([described(result), "", *lines, ""]))


if __name__ == "__main__":
    main()
