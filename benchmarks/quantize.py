"""What packing costs: bits, perplexity, KL divergence, agreement and speed of every format and method, side by side.

    python benchmarks/quantize.py                                   # all references, about an hour on two cores
    python benchmarks/quantize.py --references small --only int4:g32
    python benchmarks/quantize.py --table benchmarks/results/quantize-DATE.json      # makes docs/quantization.md

References, none of which lies on the grid of a format:
    smollm2   SmolLM2-135M-Instruct in float32, its residual stream rotated by a fixed random orthogonal matrix: the
              same function (which is asserted), but its weights, which come from a 4-bit file, are spread
    small     a language model of bytes that is trained here (`small_lm.py`); its rows fit blocks of 256
    minilm    all-MiniLM-L6-v2, float32, by the vectors of sentences (`minilm.py`)

The matrices of the blocks are packed; embedding, output layer and norms stay. Perplexity and divergence are measured on
one half of a text, calibration reads another. Packed weights are decoded before they are measured: products with packed
weights equal those with decoded ones up to the order of sums, and one program then serves every format.

Methods:
    nearest      the scale that fits the largest weight, codes to nearest: what "round to nearest" means elsewhere
    search       scales searched for the least squared error
    importance   the same, each input weighted by its mean square on the calibration text
    gptq, awq, hqq    as in their papers; see `trustcore.quant`
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import math
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness import ROOT, fill, machine, versions, write_result
from trustcore.ops.weight import Weight
from trustcore.quant import QuantizedArray, quantize

CONTEXT = 256
TEXT = ROOT / "tests" / "data" / "moby_dick.txt"


# ---- references ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Reference:
    """A model to be packed.

    Attributes:
        name: of the reference.
        tree: its weights.
        fn: a function of (tree, *batch).
        batches: calibration data.
        where: which leaves are packed.
        links: for AWQ; empty where there is no description of the model.
        measure: a tree of float weights to figures by name.
    """

    name: str
    tree: Any
    fn: Callable[..., Any]
    batches: list[tuple[Any, ...]]
    where: Callable[[str, Any], bool]
    links: tuple[Any, ...]
    measure: Callable[[Any], dict[str, float]]


def language_model(name: str, model: Any, ids: list[int], calibration: list[int]) -> Reference:
    import trustcore as tc
    from trustcore.models import decoder_links

    count = len(calibration) // CONTEXT
    rows = np.asarray(calibration[: count * CONTEXT], np.int32).reshape(count, CONTEXT)

    def measure(tree: Any) -> dict[str, float]:
        found = tc.compare(model, tree, ids, context=CONTEXT)
        return {
            "perplexity": found.second.perplexity,
            "kl": found.kl_divergence,
            "top1": found.top1_agreement,
        }

    return Reference(
        name,
        model,
        lambda m, tokens: m.hidden_states(tokens)[0],
        [(jnp.asarray(part),) for part in np.array_split(rows, max(count // 4, 1)) if len(part) == 4],
        lambda path, leaf: path.startswith("blocks.") and path.endswith("kernel"),
        decoder_links(model),
        measure,
    )


def smollm2() -> Reference:
    from benchmarks.rotated_smollm2 import rotated_smollm2

    model = rotated_smollm2()
    ids = model.tokenizer.encode(TEXT.read_text(encoding="utf-8"))
    half = len(ids) // 2
    return language_model("smollm2", model, ids[:half], ids[half:])


def small(path: Path) -> Reference:
    from benchmarks import small_lm

    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        small_lm.save(small_lm.train(600), path)
    model = small_lm.open_saved(path)
    train, held = small_lm.texts()
    return language_model("small", model, held[20000:36384].tolist(), train[100000:108192].tolist())


def minilm() -> Reference:
    import trustcore as tc
    from benchmarks import minilm as model

    encoder = tc.load("minilm", dtype="float32")
    sentences = [s.strip() for s in TEXT.read_text(encoding="utf-8").replace("\n", " ").split(".") if len(s) > 40]
    tokens, mask = model.tokenize(encoder, sentences)
    half = len(sentences) // 2
    embed = jax.jit(model.embed)
    expected = np.asarray(embed(encoder, tokens[:half], mask[:half]), np.float64)
    pairs = np.triu_indices(half, 1)

    def measure(tree: Any) -> dict[str, float]:
        found = np.asarray(embed(tree, tokens[:half], mask[:half]), np.float64)
        before, after = ((e @ e.T)[pairs] for e in (expected, found))
        ranks = [np.argsort(np.argsort(values)).astype(np.float64) for values in (before, after)]
        return {"cosine": float((expected * found).sum(1).mean()), "rank": float(np.corrcoef(*ranks)[0, 1])}

    return Reference(
        "minilm",
        encoder,
        model.embed,
        [(jnp.asarray(tokens[half:]), jnp.asarray(mask[half:]))],
        lambda path, leaf: path.startswith("blocks.") and path.endswith("kernel"),
        (),
        measure,
    )


# ---- methods ---------------------------------------------------------------------------------------------------------


class Methods:
    """The ways to pack a reference; statistics are collected once, when a method first asks for them."""

    def __init__(self, reference: Reference):
        self.reference = reference
        self._importance: Any = None
        self._samples: Any = None

    def importance(self) -> Any:
        if self._importance is None:
            from trustcore.quant.calibration import MeanSquare

            self._importance = self._collected(MeanSquare())
        return self._importance

    def samples(self) -> Any:
        if self._samples is None:
            from trustcore.quant import Sample

            self._samples = self._collected(Sample(512))
        return self._samples

    def pack(self, format: str, method: str) -> Any:
        r = self.reference
        if method == "gptq":
            from trustcore.quant import gptq

            return gptq(r.fn, r.tree, r.batches, format=format, where=r.where)
        if method == "awq":
            from trustcore.quant import awq

            return awq(r.tree, format, r.links, self.samples(), where=r.where)
        if method == "hqq":
            from trustcore.quant import hqq

            return hqq(r.tree, format, where=r.where)
        importance = self.importance() if method == "importance" else None
        return quantize(r.tree, format, where=r.where, importance=importance, search=method != "nearest")

    def _collected(self, observer: Any) -> Any:
        from trustcore.quant.calibration import capture

        r = self.reference
        collect = capture(r.fn, r.tree, observer, where=r.where)
        state = None
        for batch in r.batches:
            state = collect(*batch, state=state)
        return collect.finish(state)


INTEGERS = [
    *(("int8:channel", m) for m in ("nearest", "search")),
    *(("int8:g64", m) for m in ("nearest", "search")),
    *(("int4:g32", m) for m in ("nearest", "search", "importance", "gptq", "awq")),
    *(("int4:g32:asym", m) for m in ("nearest", "search", "importance", "gptq", "awq")),
    ("int4:g32", "hqq"),
    *(("int3:g32", m) for m in ("nearest", "search", "importance", "gptq", "awq")),
    *(("int3:g32:asym", m) for m in ("nearest", "search", "importance", "gptq", "awq")),
    ("int3:g32", "hqq"),
    *(("int2:g32:asym", m) for m in ("search", "importance", "gptq")),
]
FLOATS = [
    *((f, m) for f in ("fp8_e4m3", "fp8_e5m2", "mxfp8_e4m3", "mxfp6_e2m3", "mxfp6_e3m2") for m in ("search",)),
    *((f, m) for f in ("mxfp4", "nvfp4", "nf4:g64", "fp4:g64") for m in ("search", "importance")),
]
SHORT_BLOCKS = [
    *((f, m) for f in ("q8_0", "q5_1", "q5_0", "q4_1", "iq4_nl") for m in ("search", "importance")),
    *(("q4_0", m) for m in ("search", "importance", "gptq")),
]
LONG_BLOCKS = [
    *((f, m) for f in ("q6_k", "q5_k", "q4_k", "q3_k", "q2_k", "iq4_xs") for m in ("search", "importance")),
    *((f, "importance") for f in ("iq3_s", "iq3_xxs", "iq2_s", "iq2_xs", "iq2_xxs", "iq1_m", "iq1_s")),
    *((f, "search") for f in ("tq2_0", "q1_0")),
    ("q4_k", "gptq"),
]
PLANS = {
    "smollm2": [case for case in (*INTEGERS, *FLOATS, *SHORT_BLOCKS) if case[1] != "awq" or "asym" not in case[0]],
    "small": [*INTEGERS, *FLOATS, *SHORT_BLOCKS, *LONG_BLOCKS],
    "minilm": [case for case in (*INTEGERS, *SHORT_BLOCKS) if case[1] != "awq"],
}


# ---- a run -----------------------------------------------------------------------------------------------------------


def decoded(tree: Any) -> Any:
    """Returns the tree with every packed matrix as the floats it stands for."""
    return jax.tree.map(
        lambda leaf: leaf.dequantize() if isinstance(leaf, Weight) else leaf,
        tree,
        is_leaf=lambda leaf: isinstance(leaf, Weight),
    )


def packed_matrices(tree: Any) -> list[QuantizedArray]:
    leaves = jax.tree.leaves(tree, is_leaf=lambda leaf: isinstance(leaf, Weight))
    return [leaf for leaf in leaves if isinstance(leaf, QuantizedArray)]


def measure(methods: Methods, format: str, method: str) -> dict[str, Any]:
    """Returns the figures of one row. Quick methods run twice; the second run, which compiles nothing, is timed."""
    if method in ("importance", "awq"):  # collecting is not packing
        methods.importance() if method == "importance" else methods.samples()
    for _ in range(1 if method in ("gptq", "awq") else 2):
        began = time.perf_counter()
        tree = methods.pack(format, method)
        matrices = packed_matrices(tree)
        jax.block_until_ready([m.fields for m in matrices])
        seconds = time.perf_counter() - began
    weights = sum(m.size for m in matrices)
    return {
        "format": format,
        "method": method,
        "bits": 8 * sum(m.nbytes for m in matrices) / weights,
        "weights_per_second": weights / seconds,
        **methods.reference.measure(decoded(tree)),
    }


def run(args: argparse.Namespace) -> None:
    made: dict[str, Callable[[], Reference]] = {
        "smollm2": smollm2,
        "small": lambda: small(args.small_lm),
        "minilm": minilm,
    }
    result: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "versions": versions(sys.executable, ["jax", "jaxlib", "numpy"]),
        "references": {},
    }
    out = args.out or ROOT / "benchmarks" / "results" / f"quantize-{result['date']}.json"
    if out.exists():  # references that are not measured anew stay
        result["references"] = json.loads(out.read_text())["references"]
    for name in args.references.split(","):
        reference = made[name]()
        rows = [{"format": "float32", "method": "", "bits": 32.0, **reference.measure(reference.tree)}]
        print(f"{name}: {json.dumps(rows[0])}", flush=True)
        methods = Methods(reference)
        held = result["references"].get(name, []) if args.resume else []
        rows += [row for row in held if row["method"]]
        there = {(row["format"], row["method"]) for row in rows}
        for format, method in PLANS[name]:
            if (format, method) in there:
                continue
            if args.only and args.only not in (format, method, format.partition(":")[0]):
                continue
            rows.append(measure(methods, format, method))
            print(f"{name}: {json.dumps(rows[-1])}", flush=True)
            result["references"][name] = rows
            write_result(result, out, "quantize")
            jax.clear_caches()  # programs of all formats together are more than a process may map
    print(tables(result))


# ---- the page --------------------------------------------------------------------------------------------------------

_COLUMNS: dict[str, tuple[str, str]] = {
    "bits": ("bits per weight", "{:.3f}"),
    "perplexity": ("perplexity", "{:.3f}"),
    "kl": ("KL divergence", "{:.4f}"),
    "top1": ("same likeliest token", "{:.1%}"),
    "cosine": ("cosine", "{:.5f}"),
    "rank": ("rank correlation", "{:.5f}"),
    "weights_per_second": ("packed, M weights/s", "{:.0f}"),
}


def tables(result: dict[str, Any]) -> str:
    """A table for each reference, rows from many bits to few."""
    parts = []
    for name, rows in result["references"].items():
        keys = [key for key in _COLUMNS if any(key in row for row in rows)]
        lines = ["| format | method | " + " | ".join(_COLUMNS[key][0] for key in keys) + " |"]
        lines.append("|---" * (2 + len(keys)) + "|")
        for row in sorted(rows, key=lambda row: -row["bits"]):
            lines.append(f"| {row['format']} | {row['method']} | " + " | ".join(_cells(row, keys)) + " |")
        parts.append(f"### {name}\n\n" + "\n".join(lines) + "\n")
        parts += _ratios(rows)
    return "\n".join(parts)


def _cells(row: dict[str, Any], keys: Iterable[str]) -> list[str]:
    cells = []
    for key in keys:
        value = row.get(key)
        if key == "weights_per_second" and value is not None:
            value /= 1e6
        known = value is not None and not math.isnan(value)
        cells.append(_COLUMNS[key][1].format(value) if known else "")
    return cells


def _ratios(rows: list[dict[str, Any]]) -> list[str]:
    """What importance and GPTQ leave of the divergence of plain symmetric rounding, at the same size."""
    kl = {(row["format"], row["method"]): row["kl"] for row in rows if "kl" in row}
    lines = []
    for bits in (4, 3):
        plain = kl.get((f"int{bits}:g32", "nearest"))
        for form in (f"int{bits}:g32", f"int{bits}:g32:asym"):
            methods = [m for f, m in kl if f == form and (f, m) != (f"int{bits}:g32", "nearest")]
            if plain and methods:
                shares = ", ".join(f"{m} {kl[form, m] / plain:.2f}" for m in methods)
                lines.append(f"- {form}, of the divergence of plain symmetric rounding at {bits} bits: {shares}.\n")
    return lines


def write_page(source: Path) -> None:
    result = json.loads(source.read_text())
    m = result["machine"]
    described = ", ".join(f"{k} {v}" for k, v in result["versions"].items())
    name = source.resolve().relative_to(ROOT)
    note = f"{m['cpu']}, {m['cores']} cores, {result['date']}; {described}. Data: [{name}](../{name}).\n"
    fill("docs/quantization.md", "quality", f"{tables(result)}\n{note}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--references", default="smollm2,small,minilm", help="names joined by commas")
    parser.add_argument("--only", help="a format or a method: rows of it alone")
    parser.add_argument("--resume", action="store_true", help="keep the rows that the file has, and measure the others")
    parser.add_argument("--small-lm", type=Path, default=ROOT / "build" / "small_lm.safetensors", metavar="FILE")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--table", type=Path, metavar="JSON", help="make the tables of docs/quantization.md, and stop")
    args = parser.parse_args()
    if args.table:
        write_page(args.table)
    else:
        run(args)


if __name__ == "__main__":
    main()
