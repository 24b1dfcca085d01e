"""What tuning gains: each call is tuned, then its defaults and what was found run side by side.

    python benchmarks/tune.py [--calls "attention_forward:B=1,T=1024,N=8,H=64" ...] [--seconds S] [--out FILE]
    python benchmarks/tune.py --package FILE         # what was found, as a table that comes with the package
    python benchmarks/tune.py --table FILE           # a table of a result, into docs/benchmarks.md

The search chooses among candidates by its own measurements; the figures are those of a second one, of programs that
were traced in the modes "off" and "cached", so that they show what a user gets. What it does not confirm is not put
into a table for the package. Earlier tables take no part.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

from harness import ROOT, described, fill, origin, write_result
from programs import side_by_side

CALLS = (
    "attention_forward:B=1,T=256,N=9,K=3,H=64",
    "attention_forward:B=1,T=1024,N=8,H=64",
    "attention_forward:B=1,T=4096,N=8,H=64,window=128",
    "attention_backward:B=1,T=1024,N=8,H=64",
    "packed_product:R=1,K=2048,N=8192,format=int4:g64",
    "packed_product:R=8,K=2048,N=8192,format=int4:g64",
    "packed_product:R=1,K=2048,N=8192,format=fp8_e4m3:128x128",
    "cross_entropy_forward:R=512,D=576,V=49152",
)


def compiled(mode: Any, op: str, facts: Any, operands: Any) -> Any:
    import jax

    from trustcore import tune

    with tune.using(mode):
        return jax.jit(tune.declared(op).run(facts)).lower(*operands).compile()


def measure(args: argparse.Namespace) -> None:
    from trustcore import tune
    from trustcore.tune import table as tables

    device, kept = tune.this_device(), []
    result = origin({})
    result["rows"] = []
    for call in args.calls:
        op, _, text = call.partition(":")
        found = tune.search(op, text, seconds=args.seconds, most=args.most)
        print(found, flush=True)
        tunable = tune.declared(op)
        operands = tunable.prepare(found.facts, tunable.operands(found.facts))
        makers = {name: functools.partial(compiled, mode, op, found.facts, operands) for name, mode in MODES.items()}
        row = {"op": op, "facts": text, "values": dict(found.values), "tried": len(found.trials)}
        result["rows"].append(side_by_side(row, makers, operands, seconds=args.seconds, memory=4 * 10**9))
        if args.out:
            write_result(result, args.out, "tune")
        defaults, tuned = (statistics.median(result["rows"][-1]["seconds"][name]) for name in MODES)
        kept += [found.entry] if tuned < defaults or not found.values else []
        if args.package:
            tables.write(Path(args.package), device, kept)


MODES = {"defaults": "off", "tuned": "cached"}


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    lines = [
        "| op | call | what was found | defaults, ms | tuned, ms | defaults / tuned |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        values = ", ".join(f"{n} {v}" for n, v in row["values"].items() if n != "implementation")
        what = f"{row['values'].get('implementation', 'the defaults')}{': ' if values else ''}{values}"
        median = {n: statistics.median(times) for n, times in row["seconds"].items()}
        cells = [
            f"{median[n] * 1e3:.3g} ({min(times) * 1e3:.3g} to {max(times) * 1e3:.3g})"
            for n, times in row["seconds"].items()
        ]
        ratio = f"{median['defaults'] / median['tuned']:.2f}"
        lines.append(f"| {row['op']} | {row['facts'].replace(',', ' ')} | {what} | {' | '.join(cells)} | {ratio} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", nargs="+", default=CALLS)
    parser.add_argument("--seconds", type=float, default=2.0, help="of timing a search, and of each row")
    parser.add_argument("--most", type=int, default=8)
    parser.add_argument("--out")
    parser.add_argument("--package", help="a table for trustcore/tune/tables")
    parser.add_argument("--table", help="a result, to be written into docs/benchmarks.md")
    args = parser.parse_args()
    if args.table:
        result = json.loads(Path(args.table).read_text())
        name = Path(args.table).resolve().relative_to(ROOT)
        fill("docs/benchmarks.md", "tune", f"{table(result)}\n\n{described(result)}\nData: [{name}](../{name}).\n")
        return
    with tempfile.TemporaryDirectory() as folder:
        from trustcore.cache import cache_folder

        (Path(folder) / "native").symlink_to(cache_folder("native"))  # compiled handlers stay where they are
        os.environ["TRUSTCORE_CACHE"] = folder
        measure(args)


if __name__ == "__main__":
    main()
