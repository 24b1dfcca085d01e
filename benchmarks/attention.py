"""Attention beside `jax.nn.dot_product_attention`: time and memory, forward and with the gradient.

    python benchmarks/attention.py [--lengths 128 512 ...] [--shapes 8x64 16x128] [--seconds S] [--out FILE]
    python benchmarks/attention.py --table FILE        # a table of a result, into docs/benchmarks.md

Both run in one process, in turn, on float32 of batch 1. Memory is what the compiled program takes beyond operands and
results. A form that would take more than `--memory` bytes is compiled and not run. `--out` of a file that exists adds
to it, so that a long table can be measured piece by piece.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
from pathlib import Path
from typing import Any

from harness import ROOT, described, fill, origin, write_result
from programs import figures, side_by_side

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
        what = {"shape": heads_size, "length": length, "causal": causal, "direction": direction}
        makers = {name: functools.partial(compiled, name, direction, shape, causal) for name in (OURS, THEIRS)}
        rows.append(side_by_side(what, makers, operands, seconds=args.seconds, memory=args.memory))
        if path:
            path.write_text(json.dumps(result))
    write_result(result, args.out, "attention")


def table(result: dict[str, Any]) -> str:
    """The result as Markdown: medians, their ratio, memory."""
    lines = [
        "| N x H | T | mask | | trustcore, ms | jax.nn, ms | jax.nn / trustcore | trustcore, MB | jax.nn, MB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(result["rows"], key=lambda r: (int(r["shape"].split("x")[0]), r["length"], not r["causal"])):
        mask = "causal" if row["causal"] else "none"
        what = [row["shape"].replace("x", " x "), str(row["length"]), mask, row["direction"]]
        lines.append(f"| {' | '.join([*what, *figures(row, OURS, THEIRS)])} |")
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
