"""Cross-entropy by chunks of the vocabulary beside the plain form: time and memory, forward and with the gradient.

    python benchmarks/cross_entropy.py [--rows 512 ...] [--shapes 576x49152 ...] [--seconds S] [--out FILE]
    python benchmarks/cross_entropy.py --chunks 512 2048 8192                 # prints our times by size of the chunk
    python benchmarks/cross_entropy.py --table FILE        # a table of a result, into docs/benchmarks.md

Both run in one process, in turn, on float32. The plain form is what one writes by hand: all logits, their log-sum-exp
and the label's logit. Memory is what the compiled program takes beyond operands and results. A form that would take
more than `--memory` bytes is compiled and not run. `--out` of a file that exists adds to it.
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

ROWS = (512, 2048, 8192)
SHAPES = ("576x49152", "896x151936")  # D x V: SmolLM2-135M, Qwen2-0.5B
OURS, PLAIN = "chunks", "plain"
DIRECTIONS = ("forward", "gradient", "gradient, frozen table")


def compiled(contender: str, direction: str, shapes: tuple[Any, ...], chunk: int | None = None) -> Any:
    """The program of one contender: the mean loss, or its value and gradients."""
    import jax
    import jax.numpy as jnp

    from kernels_pallas.cross_entropy import cross_entropy

    def ours(hidden: Any, table: Any, labels: Any) -> Any:
        return jnp.mean(cross_entropy(hidden, table, labels, transposed=True, chunk=chunk))

    def plain(hidden: Any, table: Any, labels: Any) -> Any:
        logits = hidden @ table.T
        picked = jnp.take_along_axis(logits, labels[:, None], axis=1)[:, 0]
        return jnp.mean(jax.nn.logsumexp(logits, axis=1) - picked)

    function = {OURS: ours, PLAIN: plain}[contender]
    if direction != "forward":
        function = jax.value_and_grad(function, (0, 1) if direction == "gradient" else 0)
    return jax.jit(function).lower(*shapes).compile()


def measure(args: argparse.Namespace) -> None:
    import jax

    path = Path(args.out) if args.out else None
    result = json.loads(path.read_text()) if path and path.exists() else origin({})
    kept = result.setdefault("rows", [])
    for shape, rows, direction in itertools.product(args.shapes, args.rows, args.directions):
        size, vocabulary = map(int, shape.split("x"))
        keys = jax.random.split(jax.random.key(0), 3)
        operands = (
            jax.random.normal(keys[0], (rows, size)),
            jax.random.normal(keys[1], (vocabulary, size)) * size**-0.5,
            jax.random.randint(keys[2], (rows,), 0, vocabulary),
        )
        types = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in operands)
        names = [f"{OURS} {c}" for c in args.chunks] or [OURS, PLAIN]
        makers = {}
        for name in names:
            contender, _, chunk = name.partition(" ")
            makers[name] = functools.partial(compiled, contender, direction, types, int(chunk) if chunk else None)
        what = {"shape": shape, "rows": rows, "direction": direction}
        kept.append(side_by_side(what, makers, operands, seconds=args.seconds, memory=args.memory))
        if args.out and not args.chunks:
            write_result(result, args.out, "cross_entropy")


def table(result: dict[str, Any]) -> str:
    """The result as Markdown: medians, their ratio, memory."""
    lines = [
        "| D x V | rows | | chunks, ms | plain, ms | plain / chunks | chunks, MB | plain, MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(result["rows"], key=lambda r: (r["shape"], r["rows"], DIRECTIONS.index(r["direction"]))):
        what = [row["shape"].replace("x", " x "), str(row["rows"]), row["direction"]]
        lines.append(f"| {' | '.join([*what, *figures(row, OURS, PLAIN)])} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    parser.add_argument("--directions", nargs="+", default=DIRECTIONS, choices=DIRECTIONS)
    parser.add_argument("--chunks", type=int, nargs="+", default=[])
    parser.add_argument("--seconds", type=float, default=1.5, help="of each row, at least two rounds")
    parser.add_argument("--memory", type=int, default=3 * 10**9)
    parser.add_argument("--out")
    parser.add_argument("--table", help="a result, to be written into docs/benchmarks.md")
    args = parser.parse_args()
    if args.table:
        result = json.loads(Path(args.table).read_text())
        name = Path(args.table).resolve().relative_to(ROOT)
        note = f"{described(result)}\nData: [{name}](../{name})."
        fill("docs/benchmarks.md", "cross_entropy", f"{table(result)}\n\n{note}\n")
    else:
        measure(args)


if __name__ == "__main__":
    main()
