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
weights equal those with decoded ones up to the order of sums, and one program then serves every format. Formats like
"int8:channel+int8" are weights and inputs that are both rounded, the inputs by the function that packed products use.

Methods, several of which may go together:
    nearest      the scale that fits the largest weight, codes to nearest: what "round to nearest" means elsewhere
    search       scales searched for the least squared error
    importance   the same, each input weighted by its mean square on the calibration text
    gptq, awq, hqq    as in their papers; see `trustcore.quant`
    rotate       a Hadamard matrix turns the residual stream and the heads' values first, then as search (QuaRot)
    smoothquant  ranges of activations are moved into the weights first, alpha 0.5, then as search
    unrotated    smollm2 with the residual stream that was published: the same function, with outlying channels
    static       one scale for all inputs of a matrix, from the calibration text's largest magnitude, in place of one
                 for each token
    cache        weights stay float; keys and values pass through a cache of that dtype. Bits are those of the cache
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
from trustcore.quant.activations import INPUTS, ActivationQuantized, quantize_activations, quantize_inputs

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
        links: for AWQ and SmoothQuant; empty where there is no description of the model.
        measure: a tree of float weights to figures by name.
        unrotated: makes the tree before the reference's own rotation; None where there was none.
    """

    name: str
    tree: Any
    fn: Callable[..., Any]
    batches: list[tuple[Any, ...]]
    where: Callable[[str, Any], bool]
    links: tuple[Any, ...]
    measure: Callable[[Any], dict[str, float]]
    unrotated: Callable[[], Any] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Cached:
    """A decoder that reads what it has seen from a cache of keys and values of `dtype`."""

    model: Any
    dtype: str = dataclasses.field(metadata={"static": True})

    @property
    def config(self) -> Any:
        return self.model.config

    def hidden_states(self, tokens: jax.Array) -> Any:
        cache = self.model.new_cache(*tokens.shape, dtype=jnp.dtype(self.dtype))
        return self.model.hidden_states(tokens, cache=cache)

    def logits(self, hidden: jax.Array) -> jax.Array:
        return self.model.logits(hidden)

    @property
    def bits(self) -> float:
        """Bits for each number of the cache, scales included."""
        slots, c = 64, self.model.config
        nbytes = self.model.new_cache(1, slots, dtype=jnp.dtype(self.dtype)).nbytes - 4  # the length
        return 8 * nbytes / (2 * c.layers * c.kv_heads * c.head_dim * slots)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class RoundedInputs(Weight):
    """A float matrix whose product rounds x first, as the `ActivationQuantized` that it stands for."""

    matrix: jax.Array
    input_scale: Any
    inputs: str = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.matrix.shape

    @property
    def dtype(self) -> Any:
        return self.matrix.dtype

    @classmethod
    def products(cls, x: jax.Array, weights: Any, *, implementation: str | None = None) -> tuple[jax.Array, ...]:
        rows = x.reshape(-1, x.shape[-1])
        made = []
        for weight in weights:
            codes, scale, _ = quantize_inputs(rows, weight.inputs, scale=weight.input_scale)
            made.append((codes.astype(jnp.float32) * scale @ weight.matrix).reshape(*x.shape[:-1], -1))
        return tuple(made)

    def take(self, indices: jax.Array) -> jax.Array:
        return self.matrix[indices]

    def dequantize(self) -> jax.Array:
        return self.matrix


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
    import trustcore as tc
    from benchmarks.rotated_smollm2 import rotated_smollm2
    from trustcore.models import untie

    model = rotated_smollm2()
    ids = model.tokenizer.encode(TEXT.read_text(encoding="utf-8"))
    half = len(ids) // 2
    reference = language_model("smollm2", model, ids[:half], ids[half:])
    reference.unrotated = lambda: untie(tc.load("smollm2", dtype="float32"))
    return reference


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
    from trustcore.quant.folding import Link

    encoder = tc.load("minilm", dtype="float32")
    sentences = [s.strip() for s in TEXT.read_text(encoding="utf-8").replace("\n", " ").split(".") if len(s) > 40]
    tokens, mask = model.tokenize(encoder, sentences)
    half = len(sentences) // 2
    embed = jax.jit(model.embed)
    expected = np.asarray(embed(encoder, tokens[:half], mask[:half]), np.float64)
    pairs = np.triu_indices(half, 1)
    # Its norms stand behind the products and are read by the residual stream, too: values alone are a link.
    attention = [f"blocks.{i}.attention." for i in range(encoder.config.layers)]
    heads = (encoder.config.heads, encoder.config.heads)
    links = [Link((f"{a}value.kernel", f"{a}value.bias"), (f"{a}out.kernel",), heads=heads) for a in attention]

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
        tuple(links),
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
        if method == "cache":
            return Cached(r.tree, format.removeprefix("cache "))
        if "+" in format or "rotate" in method:
            return self._folded(format, method.split())
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

    def _folded(self, format: str, steps: list[str]) -> Any:
        """Weights packed behind other steps, and inputs rounded where the format says so."""
        from trustcore.models import decoder_stream, untie
        from trustcore.quant import rotate, smoothquant
        from trustcore.quant.calibration import MinMax

        r, (weights, _, inputs) = self.reference, format.partition("+")
        tree = r.tree
        if "unrotated" in steps:
            assert r.unrotated is not None
            tree = r.unrotated()
        if "rotate" in steps:
            tree = untie(tree)
            tree = rotate(tree, decoder_stream(tree))
        if "smoothquant" in steps:
            tree = smoothquant(tree, r.links, self._collected(MinMax(per_channel=True), tree))
        scales: dict[str, Any] = {}
        if "static" in steps:
            top = 127 if inputs == "int8" else float(jnp.finfo(INPUTS[inputs]).max)
            found = self._collected(MinMax(), tree)
            scales = {path: jnp.float32(at.largest / top) for path, at in found.items()}
        packed = quantize(tree, weights, where=r.where, search="nearest" not in steps)
        return quantize_activations(packed, inputs, input_scales=scales) if inputs else packed

    def _collected(self, observer: Any, tree: Any = None) -> Any:
        from trustcore.quant.calibration import capture

        r = self.reference
        collect = capture(r.fn, r.tree if tree is None else tree, observer, where=r.where)
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
    *((f"int{bits}:g32", m) for bits in (7, 6, 5) for m in ("nearest", "search")),
    *((f, m) for f in ("int2:g32", "ternary:g32", "int1:g32") for m in ("search", "importance")),
]
INPUTS_TOO = [
    *(("int8:channel+int8", m) for m in ("search", "search static")),
    *(("fp8_e4m3+fp8_e4m3", m) for m in ("search", "search static")),
]
FOLDED = [
    *(("int8:channel+int8", m) for m in ("smoothquant", "smoothquant static", "rotate", "rotate static")),
    *((f"int{bits}:g32", "rotate") for bits in (4, 3)),
]
UNROTATED = [
    *(
        ("int8:channel+int8", f"unrotated {m}")
        for m in ("search", "search static", "smoothquant", "smoothquant static")
    ),
    *(("fp8_e4m3+fp8_e4m3", f"unrotated {m}") for m in ("search", "search static")),
]
CACHES = [(f"cache {dtype}", "cache") for dtype in ("int8", "float8_e4m3fn", "int4")]
MX = ("mxfp8_e4m3", "mxfp8_e5m2", "mxfp6_e2m3", "mxfp6_e3m2")
FLOATS = [
    *((f, m) for f in ("fp8_e4m3", "fp8_e5m2", *MX) for m in ("search",)),
    *((f, m) for f in ("mxfp4", "nvfp4", "nf4:g64", "fp4:g64") for m in ("search", "importance")),
]
SHORT_BLOCKS = [
    *((f, m) for f in ("q8_0", "q5_1", "q5_0", "q4_1", "iq4_nl") for m in ("search", "importance")),
    *(("q4_0", m) for m in ("search", "importance", "gptq")),
]
LONG_BLOCKS = [
    *((f, m) for f in ("q6_k", "q5_k", "q4_k", "q3_k", "q2_k", "iq4_xs") for m in ("search", "importance")),
    *((f, "importance") for f in ("iq3_s", "iq3_xxs", "iq2_s", "iq2_xs", "iq2_xxs", "iq1_m", "iq1_s")),
    *((f, "search") for f in ("tq2_0", "tq1_0", "q1_0")),
    ("q4_k", "gptq"),
]
DECODER = [*INPUTS_TOO, *FOLDED, *CACHES]
PLANS = {
    "smollm2": [
        case
        for case in (*INTEGERS, *FLOATS, *SHORT_BLOCKS, *DECODER, *UNROTATED)
        if case[1] != "awq" or "asym" not in case[0]
    ],
    "small": [*INTEGERS, *FLOATS, *SHORT_BLOCKS, *LONG_BLOCKS, *DECODER],
    "minilm": [*INTEGERS, *FLOATS, *SHORT_BLOCKS, *INPUTS_TOO],
}


# ---- a run -----------------------------------------------------------------------------------------------------------


def decoded(tree: Any) -> Any:
    """Returns the tree with every packed matrix as the floats it stands for."""

    def floats(leaf: Any) -> Any:
        if isinstance(leaf, ActivationQuantized):
            return RoundedInputs(leaf.dequantize(), leaf.input_scale, leaf.inputs)
        return leaf.dequantize() if isinstance(leaf, Weight) else leaf

    return jax.tree.map(
        floats,
        tree,
        is_leaf=lambda leaf: isinstance(leaf, Weight),
    )


def packed_matrices(tree: Any) -> list[QuantizedArray]:
    leaves = jax.tree.leaves(tree, is_leaf=lambda leaf: isinstance(leaf, Weight))
    leaves = [leaf.weight if isinstance(leaf, ActivationQuantized) else leaf for leaf in leaves]
    return [leaf for leaf in leaves if isinstance(leaf, QuantizedArray)]


def measure(methods: Methods, format: str, method: str) -> dict[str, Any]:
    """Returns the figures of one row. Quick methods run twice; the second run, which compiles nothing, is timed.

    What is folded or calibrated first has no speed of packing.
    """
    if method == "cache":
        tree = methods.pack(format, method)
        return {"format": format, "method": method, "bits": tree.bits, **methods.reference.measure(tree)}
    if "+" in format or "rotate" in method:
        tree = methods.pack(format, method)
        matrices = packed_matrices(tree)
        bits = 8 * sum(m.nbytes for m in matrices) / sum(m.size for m in matrices)
        return {"format": format, "method": method, "bits": bits, **methods.reference.measure(decoded(tree))}
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
