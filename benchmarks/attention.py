"""Attention beside `jax.nn.dot_product_attention`: time and memory, forward and with the gradient.

    python benchmarks/attention.py [--lengths 128 512 ...] [--shapes 8x64 16x128] [--seconds S] [--out FILE]
    python benchmarks/attention.py --table FILE        # a table of a result, into docs/benchmarks.md

Both run in one process, in turn, on float32 of batch 1. Memory is what the compiled program takes beyond operands and
results. A form that would take more than `--memory` bytes is compiled and not run. `--out` of a file that exists adds
to it, so that a long table can be measured piece by piece.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from pathlib import Path
from typing import Any

from harness import ROOT, described, fill, origin, write_result

LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192)
SHAPES = ("8x64", "16x128")  # query heads x head size
OURS, THEIRS = "trustcore", "jax.nn"


def compiled(contender: str, direction: str, shape: tuple[int, ...], causal: bool) -> Any:
    """The program of one contender."""
    import jax
    import jax.numpy as jnp

    from kernels_pallas.attention import attention

    def ours(*qkv: Any) -> Any:
        return attention(*qkv, causal=causal)

    def theirs(*qkv: Any) -> Any:
        return jax.nn.dot_product_attention(*qkv, is_causal=causal, implementation="xla")

    function = {OURS: ours, THEIRS: theirs}[contender]
    if direction == "gradient":
        plain = function
        function = jax.value_and_grad(lambda q, k, v: jnp.sum(plain(q, k, v) * q), (0, 1, 2))
    x = jax.ShapeDtypeStruct(shape, "float32")
    return jax.jit(function).lower(x, x, x).compile()


def measure(args: argparse.Namespace) -> None:
    import jax

    path = Path(args.out) if args.out else None
    result = json.loads(path.read_text()) if path and path.exists() else origin({})
    rows = result.setdefault("rows", [])
    grid = itertools.product(args.shapes, args.lengths, (True, False), ("forward", "gradient"))
    for heads_size, length, causal, direction in grid:
        heads, size = map(int, heads_size.split("x"))
        shape = (1, length, heads, size)
        operands = [jax.random.normal(key, shape) for key in jax.random.split(jax.random.key(0), 3)]
        row: dict[str, Any] = {
            "shape": heads_size, "length": length, "causal": causal, "direction": direction,
            "seconds": {}, "bytes": {}, "compile": {},
        }  # fmt: skip
        programs = {}
        for contender in (OURS, THEIRS):
            begin = time.perf_counter()
            program = compiled(contender, direction, shape, causal)
            row["compile"][contender] = time.perf_counter() - begin
            row["bytes"][contender] = program.memory_analysis().temp_size_in_bytes
            if row["bytes"][contender] <= args.memory:
                programs[contender] = program
                row["seconds"][contender] = []
        results = {name: jax.block_until_ready(program(*operands)) for name, program in programs.items()}
        if len(results) == 2:
            pairs = zip(*map(jax.tree.leaves, results.values()), strict=True)
            worst = max(float(abs(a - b).max() / (abs(b).max() + 1e-9)) for a, b in pairs)
            assert worst < 1e-4, (row, worst)
        del results
        end = time.perf_counter() + args.seconds
        while time.perf_counter() < end or len(row["seconds"][OURS]) < 2:
            for name, program in programs.items():
                begin = time.perf_counter()
                jax.block_until_ready(program(*operands))
                row["seconds"][name].append(time.perf_counter() - begin)
        rows.append(row)
        if path:
            path.write_text(json.dumps(result))
        print({n: f"{statistics.median(t) * 1e3:.2f} ms" for n, t in row["seconds"].items()}, row["bytes"], flush=True)
        print({k: row[k] for k in ("shape", "length", "causal", "direction")}, flush=True)
    write_result(result, args.out, "attention")


def table(result: dict[str, Any]) -> str:
    """The result as Markdown: medians, their ratio, memory."""

    def ms(row: dict[str, Any], name: str) -> str:
        times = [1e3 * t for t in row["seconds"].get(name, [])]
        return f"{statistics.median(times):.3g} ({min(times):.3g} to {max(times):.3g})" if times else ""

    lines = [
        "| N x H | T | mask | | trustcore, ms | jax.nn, ms | jax.nn / trustcore | trustcore, MB | jax.nn, MB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(result["rows"], key=lambda r: (int(r["shape"].split("x")[0]), r["length"], not r["causal"])):
        seconds, memory = row["seconds"], row["bytes"]
        ratio = ""
        if THEIRS in seconds:
            ratio = f"{statistics.median(seconds[THEIRS]) / statistics.median(seconds[OURS]):.2f}"
        mask = "causal" if row["causal"] else "none"
        lines.append(
            f"| {row['shape'].replace('x', ' x ')} | {row['length']} | {mask} | {row['direction']} | {ms(row, OURS)} | "
            f"{ms(row, THEIRS)} | {ratio} | {memory[OURS] / 1e6:.3g} | {memory[THEIRS] / 1e6:.3g} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    parser.add_argument("--seconds", type=float, default=1.5, help="of each row, at least two rounds")
    parser.add_argument("--memory", type=int, default=3 * 10**9)
    parser.add_argument("--out")
    parser.add_argument("--table", help="a result, to be written into docs/benchmarks.md")
    args = parser.parse_args()
    if args.table:
        result = json.loads(Path(args.table).read_text())
        name = Path(args.table).resolve().relative_to(ROOT)
        note = f"{described(result)}\nData: [{name}](../{name}).\n"
        fill("docs/benchmarks.md", "attention", f"{table(result)}\n\n{note}")
    else:
        measure(args)


if __name__ == "__main__":
    main()
