"""A transformer in plain jnp, as it is and as `trustcore.graph.optimize` makes it: time and memory.

    python benchmarks/optimize.py [--lengths 512 2048] [--seconds S] [--out FILE]
    python benchmarks/optimize.py --table FILE        # a table of a result, into docs/rewriting.md

Two blocks (RMSNorm, causal softmax attention with scores in full, SwiGLU), float32, batch 1. Contenders run in turn in
one process: the plain function, the one with attention rewritten alone, and the one with all rules of `optimize`.
Memory is what the compiled program takes beyond operands and results.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from pathlib import Path
from typing import Any

from harness import ROOT, described, fill, origin, write_result
from programs import side_by_side

LENGTHS = (512, 2048)
D, N, H, F, LAYERS = 512, 8, 64, 1408, 2
CONTENDERS = ("plain", "attention", "all rules")


def model(params: list[dict[str, Any]], x: Any) -> Any:
    """The transformer, with nothing of this project in it."""
    import jax
    import jax.numpy as jnp

    def norm(x: Any, weight: Any) -> Any:
        return x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6) * weight

    length = x.shape[1]
    for layer in params:
        h = norm(x, layer["norm"])
        q, k, v = (jnp.einsum("btd,dnh->btnh", h, layer[name]) for name in "qkv")
        scores = jnp.einsum("btnh,bsnh->bnts", q, k) / jnp.sqrt(H)
        scores = jnp.where(jnp.tril(jnp.ones((length, length), bool)), scores, -jnp.inf)
        mixed = jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores, axis=-1), v)
        x = x + jnp.einsum("btnh,nhd->btd", mixed, layer["o"])
        h = norm(x, layer["norm_2"])
        x = x + (jax.nn.silu(h @ layer["gate"]) * (h @ layer["up"])) @ layer["down"]
    return x


def loss(params: list[dict[str, Any]], x: Any) -> Any:
    """The mean square of the model's outputs."""
    import jax.numpy as jnp

    return jnp.mean(jnp.square(model(params, x)))


def parameters() -> list[dict[str, Any]]:
    """Random weights of a size that keeps activations near one."""
    import jax

    shapes = {**{name: (D, N, H) for name in "qkv"}, "o": (N, H, D), "norm": (D,), "norm_2": (D,)}
    shapes |= {"gate": (D, F), "up": (D, F), "down": (F, D)}
    keys = iter(jax.random.split(jax.random.key(0), LAYERS * len(shapes)))
    return [{n: D**-0.5 * jax.random.normal(next(keys), s) for n, s in shapes.items()} for _ in range(LAYERS)]


def rewritten(contender: str, plain: Any) -> Any:
    """A contender's function."""
    from trustcore.graph import optimize, rewrite
    from trustcore.graph.rewriting.attention import ATTENTION

    return {"plain": plain, "attention": rewrite(plain, ATTENTION), "all rules": optimize(plain)}[contender]


def compiled(contender: str, direction: str, operands: tuple[Any, ...], seconds: dict[str, float]) -> Any:
    """The program of one contender; notes how long it took to rewrite it."""
    import jax

    plain = model if direction == "forward" else loss
    function = rewritten(contender, plain)
    begin = time.perf_counter()
    if contender != "plain":
        function.explain(*operands)
    seconds[contender] = time.perf_counter() - begin
    function = function if direction == "forward" else jax.value_and_grad(function, (0, 1))
    return jax.jit(function).lower(*operands).compile()


def measure(args: argparse.Namespace) -> None:
    import jax

    path = Path(args.out) if args.out else None
    result = json.loads(path.read_text()) if path and path.exists() else origin({})
    rows = result.setdefault("rows", [])
    params = parameters()
    for length in args.lengths:
        operands = (params, jax.random.normal(jax.random.key(1), (1, length, D)))
        for direction in ("forward", "gradient"):
            rewriting: dict[str, float] = {}
            makers = {name: functools.partial(compiled, name, direction, operands, rewriting) for name in CONTENDERS}
            what = {"length": length, "direction": direction, "rewriting": rewriting}
            rows.append(side_by_side(what, makers, operands, seconds=args.seconds, memory=3 * 10**9))
    write_result(result, args.out, "optimize")


def table(result: dict[str, Any]) -> str:
    """The result as Markdown: medians, ratios to the plain program, memory, seconds of rewriting.

    The latter of both contenders together: the second keeps the first one's proof of attention."""
    import statistics

    lines = [
        "| T | | plain, ms | attention, ms | all rules, ms | plain / attention | plain / all | plain, MB "
        "| attention, MB | all rules, MB | rewriting, s |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        median = [statistics.median(row["seconds"][name]) for name in CONTENDERS]
        cells = [str(row["length"]), row["direction"], *(f"{1e3 * seconds:.4g}" for seconds in median)]
        cells += [f"{median[0] / seconds:.2f}" for seconds in median[1:]]
        cells += [f"{row['bytes'][name] / 1e6:.4g}" for name in CONTENDERS]
        lines.append(f"| {' | '.join([*cells, format(sum(row['rewriting'].values()), '.1f')])} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each row, at least two rounds")
    parser.add_argument("--out")
    parser.add_argument("--table", help="a result, to be written into docs/rewriting.md")
    args = parser.parse_args()
    if args.table:
        result = json.loads(Path(args.table).read_text())
        name = Path(args.table).resolve().relative_to(ROOT)
        note = f"{described(result)}\nData: [{name}](../{name}).\n"
        fill("docs/rewriting.md", "optimize", f"{table(result)}\n\n{note}")
    else:
        measure(args)


if __name__ == "__main__":
    main()
