"""Encoding speed side by side: trustcore, llama.cpp, gguf. Same weights, two threads, in turn, for every GGUF format.

    python benchmarks/encode.py                                    # contenders of this interpreter
    python benchmarks/encode.py --python llama.cpp=/venv/bin/python --only-format q4_k

Measured is one call, from a float32 matrix in memory to the contender's packed form in new memory:
`trustcore.quant.encode` (arrays of fields), `ggml_quantize_chunk` (bytes of the file; rows shared out among the
threads, as llama.cpp does), `gguf.quants.quantize` (NumPy; the formats that it has an encoder for). Each format without
and with an importance; llama.cpp's iq2_xxs, iq2_xs and iq1_s refuse to go without, and get one of ones. A contender
that dies of a format, as llama.cpp 0.3.36 does of an assertion in two of those, starts anew without a figure.
`--no-search` measures `encode(search=False)` as a fourth contender.

Contenders live in processes of their own for the whole run and take turns at every format; a figure is the median over
the rounds. The result is written to benchmarks/results/encode-DATE.json; `--table` puts such a file into
docs/benchmarks.md. Run it on a quiet machine. About three minutes.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness import ROOT, THREADS, Contender, answering, described, fill, installed, machine, versions, write_result

SIMPLE = ("f16", "bf16", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q1_0", "tq1_0", "tq2_0", "mxfp4", "nvfp4")
K_QUANTS = ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k")
IQ = ("iq4_nl", "iq4_xs", "iq3_xxs", "iq3_s", "iq2_xxs", "iq2_xs", "iq2_s", "iq1_s", "iq1_m")
FORMATS = (*SIMPLE, *K_QUANTS, *IQ)
NO_IMPORTANCE = ("f16", "bf16")
NEED_IMPORTANCE = ("iq2_xxs", "iq2_xs", "iq1_s")
MODULES = {"trustcore": "trustcore", "no search": "trustcore", "llama.cpp": "llama_cpp", "gguf": "gguf"}
K, LEAST = 4096, 0.15  # inputs; seconds a figure is measured for at least


def columns(name: str) -> int:
    """Outputs of the matrix: enough for both threads, not so many that the slow formats take minutes."""
    return 4096 if name in SIMPLE else 1024 if name in K_QUANTS else 512


def weights_of(name: str) -> tuple[Any, Any]:
    """Float32 `[N, K]` with a tail, and the importance `[K]`, the same for every contender."""
    import numpy as np

    rng = np.random.default_rng(0)
    few = (0.02 * rng.standard_t(4, (256, K))).astype(np.float32)
    importance = np.exp(1.5 * rng.standard_normal(K)).astype(np.float32)
    return np.tile(few, (columns(name) // 256, 1)), importance


# ---- contenders: each returns a function (format, weights, importance) -> a call to be timed, or None ----------------


def open_trustcore(search: bool = True) -> Callable[[str, Any, Any], Callable[[], Any] | None]:
    import jax
    import jax.numpy as jnp

    from trustcore.quant.encode import encode

    def prepare(name: str, weights: Any, importance: Any) -> Callable[[], Any] | None:
        matrix = jnp.asarray(weights.T)
        return lambda: jax.block_until_ready(encode(name, matrix, importance=importance, search=search))

    return prepare


def open_llama_cpp() -> Callable[[str, Any, Any], Callable[[], Any] | None]:
    import ctypes
    from concurrent.futures import ThreadPoolExecutor

    import gguf
    import llama_cpp
    import numpy as np

    library = ctypes.CDLL(str(next((Path(str(llama_cpp.__file__)).parent / "lib").glob("libggml-base.*"))))
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, size, size, size, pointer]
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    pool = ThreadPoolExecutor(THREADS)

    def prepare(name: str, weights: Any, importance: Any) -> Callable[[], Any] | None:
        kind = getattr(gguf.GGMLQuantizationType, name.upper())
        library.ggml_quantize_init(int(kind))
        n, k = weights.shape
        block, nbytes = gguf.GGML_QUANT_SIZES[kind]
        if importance is None and name in NEED_IMPORTANCE:
            importance = np.ones(k, np.float32)
        scale = None if importance is None else importance.ctypes.data
        parts = min(4 * THREADS, n)

        def call() -> None:
            raw = np.empty((n, k // block * nbytes), np.uint8)

            def part(i: int) -> None:
                first, last = n * i // parts, n * (i + 1) // parts
                library.ggml_quantize_chunk(
                    int(kind), weights.ctypes.data, raw.ctypes.data, first * k, last - first, k, scale
                )

            list(pool.map(part, range(parts)))

        return call

    return prepare


def open_gguf() -> Callable[[str, Any, Any], Callable[[], Any] | None]:
    import gguf

    def prepare(name: str, weights: Any, importance: Any) -> Callable[[], Any] | None:
        kind = getattr(gguf.GGMLQuantizationType, name.upper())
        try:
            gguf.quants.quantize(weights[:1], kind)
        except NotImplementedError:
            return None
        return None if importance is not None else lambda: gguf.quants.quantize(weights, kind)

    return prepare


OPEN = {
    "trustcore": open_trustcore,
    "no search": lambda: open_trustcore(False),
    "llama.cpp": open_llama_cpp,
    "gguf": open_gguf,
}


# ---- one contender in its own process --------------------------------------------------------------------------------


def work(contender: str) -> None:
    """Answers every line (format, weighted) with its speed in weights per second, or null."""
    prepare = OPEN[contender]()
    asked, call, size = None, None, 0

    def speed(question: Any) -> float | None:
        nonlocal asked, call, size
        name, weighted = question
        if question != asked:
            weights, importance = weights_of(name)
            call, size, asked = prepare(name, weights, importance if weighted else None), weights.size, question
            if call:
                call()  # compiles
        calls, began = 0, time.perf_counter()
        while call and (calls == 0 or time.perf_counter() - began < LEAST):
            call()
            calls += 1
        return calls * size / (time.perf_counter() - began) if call else None

    answering(speed)


# ---- all of them in turn ---------------------------------------------------------------------------------------------


def compare(args: argparse.Namespace) -> None:
    pythons = dict(pair.split("=", 1) for pair in args.python)
    chosen = [name for name in MODULES if name != "no search" or args.no_search]
    contenders = []
    for name in chosen:
        python = pythons.get(name, sys.executable)
        if installed(python, MODULES[name]):
            contenders.append(Contender(__file__, name, python))
        else:
            print(f"{name}: skipped, {python} has no {MODULES[name]}", flush=True)
    speeds: dict[str, dict[str, dict[str, list[float]]]] = {c.name: {} for c in contenders}
    for format in args.only_format or FORMATS:
        for key in ("plain", "importance"):
            if key == "importance" and format in NO_IMPORTANCE:
                continue
            for _ in range(args.rounds):
                for contender in contenders:
                    speed = contender.ask([format, key == "importance"])
                    if speed is not None:
                        speeds[contender.name].setdefault(format, {}).setdefault(key, []).append(speed)
            print(
                f"{format}, {key}: " + ", ".join(shown(speeds[c.name], format, key, c.name) for c in contenders),
                flush=True,
            )
    for contender in contenders:
        contender.close()
    result = {
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "threads": THREADS,
        "matrix": {"k": K, "n": {name: columns(name) for name in speeds["trustcore"]}},
        "versions": {
            "trustcore": versions(sys.executable, ["jax", "jaxlib", "numpy"]),
            **{
                c.name: versions(pythons.get(c.name, sys.executable), ["llama-cpp-python", "gguf", "numpy"])
                for c in contenders
                if MODULES[c.name] != "trustcore"
            },
        },
        "weights_per_second": speeds,
    }
    write_result(result, args.out, "encode")
    print(table(result))


def shown(speeds: dict[str, dict[str, list[float]]], format: str, key: str, name: str) -> str:
    values = speeds.get(format, {}).get(key)
    return f"{name} {in_millions(statistics.median(values))} M/s" if values else f"{name} none"


def in_millions(speed: float) -> str:
    return f"{speed / 1e6:.0f}" if speed >= 1e8 else f"{speed / 1e6:.3g}"


def table(result: dict[str, Any]) -> str:
    """The result as Markdown: medians in millions of weights a second, and ratios of trustcore's to the others'."""
    speeds = result["weights_per_second"]
    peers = [name for name in speeds if name != "trustcore"]
    lines = ["| | " + " | ".join(["trustcore", *peers, *(f"trustcore / {p}" for p in peers)]) + " |"]
    lines.append("|---" * (2 + 2 * len(peers)) + "|")
    for format, by_key in speeds["trustcore"].items():
        for key, ours in by_key.items():
            medians = {"trustcore": statistics.median(ours)}
            for peer in peers:
                values = speeds[peer].get(format, {}).get(key)
                if values:
                    medians[peer] = statistics.median(values)
            cells = [in_millions(medians[n]) if n in medians else "" for n in ("trustcore", *peers)]
            cells += [f"{medians['trustcore'] / medians[p]:.2f}" if p in medians else "" for p in peers]
            lines.append(f"| {format}{', importance' if key == 'importance' else ''} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--python", action="append", default=[], metavar="NAME=PATH", help="interpreter of a contender")
    parser.add_argument("--only-format", action="append", choices=FORMATS, help="format to measure (repeatable)")
    parser.add_argument("--no-search", action="store_true", help="measure encode(search=False) as well")
    parser.add_argument("--out", help="JSON file to write")
    parser.add_argument("--table", type=Path, metavar="JSON", help="make docs/benchmarks.md from a result, and stop")
    parser.add_argument("--worker", choices=list(MODULES), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.worker)
    elif args.table:
        result, name = json.loads(args.table.read_text()), args.table.resolve().relative_to(ROOT)
        note = f"{described(result)} Data: [{name}](../{name}).\n"
        fill("docs/benchmarks.md", "encode", f"{table(result)}\n\n{note}")
    else:
        compare(args)


if __name__ == "__main__":
    main()
