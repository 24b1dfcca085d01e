"""Text generation side by side: trustcore, llama.cpp, transformers. Same file, same tokens, two threads, in turn.

    python benchmarks/generate.py                                  # contenders of this interpreter
    python benchmarks/generate.py --python llama.cpp=/venv/bin/python --python transformers=/other/bin/python

A contender runs in a process of its own, several rounds, the contenders taking turns; a figure is the median over the
rounds, with the lowest and the highest beside it. One that is not installed is skipped with a line. The result is
written to benchmarks/results/*.json, and docs/benchmarks.md is made from the file that `--table` names. Run it on a
quiet machine: on two cores every contender collapses when somebody else takes one.

With `--formats all` (or names of formats, joined by commas) it measures decoding alone, of a random model whose
matrices are stored in each format of GGUF (`random_model.py`), against llama.cpp on the same file.

What is measured, for each contender the same:
    load            opening the file until the model is ready; cold: the file dropped from the page cache and no
                    compiled programs kept; warm: the file cached, compiled programs kept
    start           process start to first token of a 16-token prompt, cold and warm
    first token     request to first token, 16 and 512 prompt tokens, greedy
    prefill         512 / (first token at 512)
    decode          128 tokens after the first, batch 1 (prompt 16) and batch 8 (8 prompts of 16)
    peak memory     highest resident size of the process: until batch 1 is done, and until batch 8 is done
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from harness import ROOT, THREADS, described, environment, fill, installed, origin, write_result

LONG, SHORT, ANSWER, BATCH = 512, 16, 128, 8
MODULES = {"trustcore": "trustcore", "llama.cpp": "llama_cpp", "transformers": "transformers"}


def prompt(length: int, row: int = 0) -> list[int]:
    """Ids of ordinary words, the same for every contender; rows differ."""
    return [1000 + (i * 7919 + row * 104729) % 40000 for i in range(length)]


# ---- contenders: each returns a function (prompts, tokens) -> iterator over token lists, one a step ------------------


def open_trustcore(path: str) -> Callable[[list[list[int]], int], Iterable[Any]]:
    import trustcore as tc

    model = tc.load(path)

    def answer(prompts: list[list[int]], count: int) -> Iterable[Any]:
        for step in tc.generate_tokens(model, prompts, max_tokens=count):
            yield from step.tokens.T.tolist()

    return answer


def open_llama_cpp(path: str) -> Callable[[list[list[int]], int], Iterable[Any]]:
    import llama_cpp as lib
    import numpy as np

    silence = lib.llama_log_callback(lambda level, text, data: None)
    lib.llama_log_set(silence, None)
    lib.llama_backend_init()
    model = lib.llama_model_load_from_file(path.encode(), lib.llama_model_default_params())
    size = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
    contexts: dict[int, Any] = {}
    batch = lib.llama_batch_init(LONG, 0, 1)

    def context(rows: int) -> Any:
        if rows not in contexts:
            options = lib.llama_context_default_params()
            options.n_ctx = 768 if rows == 1 else rows * 256
            options.n_batch = options.n_ubatch = LONG
            options.n_seq_max = rows
            options.n_threads = options.n_threads_batch = THREADS
            contexts[rows] = lib.llama_init_from_model(model, options)
        return contexts[rows]

    def decode(ctx: Any, entries: list[tuple[int, int, int, bool]]) -> None:
        batch.n_tokens = len(entries)
        for i, (token, position, row, wanted) in enumerate(entries):
            batch.token[i], batch.pos[i] = token, position
            batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, row, wanted
        assert lib.llama_decode(ctx, batch) == 0

    def likeliest(ctx: Any, i: int) -> int:
        return int(np.ctypeslib.as_array(lib.llama_get_logits_ith(ctx, i), (size,)).argmax())

    def answer(prompts: list[list[int]], count: int) -> Iterable[Any]:
        ctx = context(len(prompts))
        lib.llama_memory_clear(lib.llama_get_memory(ctx), True)
        entries, ends = [], []
        for row, ids in enumerate(prompts):
            entries += [(token, i, row, i == len(ids) - 1) for i, token in enumerate(ids)]
            ends.append(len(entries) - 1)
        decode(ctx, entries)
        tokens = [likeliest(ctx, end) for end in ends]
        yield tokens
        for n in range(count - 1):
            decode(ctx, [(token, len(prompts[row]) + n, row, True) for row, token in enumerate(tokens)])
            tokens = [likeliest(ctx, row) for row in range(len(prompts))]
            yield tokens

    context(1)
    answer.__dict__["kept"] = silence  # the callback must outlive the library's use of it
    return answer


def open_transformers(path: str) -> Callable[[list[list[int]], int], Iterable[Any]]:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(THREADS)
    file = Path(path)
    model = AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, dtype=torch.float32)

    def answer(prompts: list[list[int]], count: int) -> Iterable[Any]:
        with torch.inference_mode():
            tokens, past = torch.tensor(prompts), None
            for _ in range(count):
                out = model(tokens, past_key_values=past, use_cache=True, logits_to_keep=1)
                tokens, past = out.logits[:, -1:].argmax(-1), out.past_key_values
                yield tokens[:, 0].tolist()

    return answer


OPEN = {"trustcore": open_trustcore, "llama.cpp": open_llama_cpp, "transformers": open_transformers}


# ---- one contender in its own process --------------------------------------------------------------------------------


def first_token(answer: Any, prompts: list[list[int]], count: int) -> tuple[float, float]:
    """Returns seconds to the first token, and seconds from there to the last."""
    began = time.perf_counter()
    steps = iter(answer(prompts, count))
    next(steps)
    first = time.perf_counter()
    made = sum(1 for _ in steps)
    assert made == count - 1, (made, count)
    return first - began, time.perf_counter() - first


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20 if sys.platform == "darwin" else 1 << 10)


def decode_rate(answer: Any) -> float:
    """Returns tokens a second after the first: the median of three answers, after one that does not count."""
    first_token(answer, [prompt(SHORT)], ANSWER)
    return (ANSWER - 1) / statistics.median(first_token(answer, [prompt(SHORT, row)], ANSWER)[1] for row in range(3))


def work(name: str, path: str, part: str) -> None:
    """Prints the contender's figures as one line of JSON."""
    began = time.perf_counter()
    answer = OPEN[name](path)
    figures: dict[str, Any] = {"load_seconds": time.perf_counter() - began}
    first_token(answer, [prompt(SHORT)], 2)
    figures["first_token_at"] = time.time()
    if part == "decode":
        figures["decode_tokens_per_second"] = decode_rate(answer)
    elif part == "all":
        first_token(answer, [prompt(LONG)], 2)
        first_token(answer, [prompt(SHORT)], ANSWER)
        short, decode = zip(*(first_token(answer, [prompt(SHORT, row)], ANSWER) for row in range(3)), strict=True)
        long = [first_token(answer, [prompt(LONG, row)], 2)[0] for row in range(3)]
        figures["first_token_16_seconds"] = statistics.median(short)
        figures["first_token_512_seconds"] = statistics.median(long)
        figures["prefill_tokens_per_second"] = LONG / statistics.median(long)
        figures["decode_tokens_per_second"] = (ANSWER - 1) / statistics.median(decode)
        figures["peak_memory_mb"] = peak_mb()
        rows = [prompt(SHORT, row) for row in range(BATCH)]
        first_token(answer, rows, ANSWER)
        many = [first_token(answer, rows, ANSWER)[1] for _ in range(2)]
        figures["decode_batch_8_tokens_per_second"] = BATCH * (ANSWER - 1) / statistics.median(many)
        figures["peak_memory_batch_8_mb"] = peak_mb()
    print("FIGURES " + json.dumps(figures), flush=True)


# ---- all of them in turn ---------------------------------------------------------------------------------------------


def drop_from_page_cache(path: str) -> None:
    if hasattr(os, "posix_fadvise"):
        file = os.open(path, os.O_RDONLY)
        os.fsync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def measure(name: str, python: str, path: str, *, cache: str | None = None, part: str = "all") -> dict[str, float]:
    more = {"TRUSTCORE_CACHE": cache} if cache else {}
    began = time.time()
    done = subprocess.run(
        [python, str(Path(__file__).resolve()), "--worker", name, "--model", path, "--part", part],
        env=environment(**more),
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("FIGURES ")]
    if done.returncode or not lines:
        raise SystemExit(f"{name} failed:\n{done.stdout}\n{done.stderr}")
    figures = json.loads(lines[-1].removeprefix("FIGURES "))
    figures["start_seconds"] = figures.pop("first_token_at") - began
    return figures


def contenders_of(args: argparse.Namespace, among: tuple[str, ...]) -> dict[str, str]:
    """Returns the interpreter of each contender that is wanted and installed."""
    pythons = dict(pair.split("=", 1) for pair in args.python)
    contenders = {}
    for name in among:
        python = pythons.get(name, sys.executable)
        if args.only and name not in args.only:
            continue
        if installed(python, MODULES[name]):
            contenders[name] = python
        else:
            print(f"{name}: skipped, {python} has no {MODULES[name]}", flush=True)
    return contenders


def compare_formats(args: argparse.Namespace) -> None:
    sys.path.insert(0, str(ROOT))  # a checkout that is not installed serves too
    from benchmarks.random_model import write_random_model
    from trustcore.quant import FORMATS
    from trustcore.weights.gguf_types import GGML_IDS

    files = [name for name in FORMATS if name in GGML_IDS and name != "q8_k"]  # which no file holds
    formats = files if args.formats == "all" else args.formats.split(",")
    contenders = contenders_of(args, ("trustcore", "llama.cpp"))
    result = origin(contenders) | {"bits_per_weight": {}, "formats": {}}
    out = Path(args.out or ROOT / "benchmarks" / "results" / f"formats-{result['date']}.json")
    if out.exists():  # formats that are not measured anew stay
        before = json.loads(out.read_text())
        result |= {key: before[key] for key in ("bits_per_weight", "formats")}
    result["formats"] |= {format: {name: [] for name in contenders} for format in formats}
    with tempfile.TemporaryDirectory() as folder:
        for format in formats:
            path = Path(folder) / f"{format}.gguf"
            result["parameters"] = write_random_model(path, format)
            result["bits_per_weight"][format] = FORMATS[format].bits_per_weight
            for _ in range(args.rounds):
                for name, python in contenders.items():
                    rate = measure(name, python, str(path), part="decode")["decode_tokens_per_second"]
                    result["formats"][format][name].append(rate)
            rates = result["formats"][format].items()
            print(f"{format}: " + ", ".join(f"{n} {statistics.median(v):.4g}" for n, v in rates), flush=True)
            path.unlink()
            write_result(result, out, "formats")
    print(formats_table(result))


def formats_table(result: dict[str, Any]) -> str:
    """Tokens a second of each format as Markdown."""
    lines = ["| format | bits per weight | trustcore | llama.cpp | trustcore / llama.cpp |", "|---|---|---|---|---|"]
    for format, rounds in result["formats"].items():
        cells = []
        for name in ("trustcore", "llama.cpp"):
            v = rounds.get(name)
            cells.append(f"{statistics.median(v):.0f} ({min(v):.0f} to {max(v):.0f})" if v else "")
        ratio = (
            f"{statistics.median(rounds['trustcore']) / statistics.median(rounds['llama.cpp']):.2f}"
            if all(cells)
            else ""
        )
        lines.append(f"| {format} | {result['bits_per_weight'][format]:g} | {cells[0]} | {cells[1]} | {ratio} |")
    return "\n".join(lines)


def compare(args: argparse.Namespace) -> None:
    path = args.model or demo_model()
    contenders = contenders_of(args, tuple(MODULES))
    rounds: dict[str, dict[str, list[float]]] = {name: {} for name in contenders}

    def note(name: str, figures: dict[str, float], prefix: str = "") -> None:
        for key, value in figures.items():
            rounds[name].setdefault(prefix + key, []).append(value)

    with tempfile.TemporaryDirectory() as folder:
        for turn in range(args.rounds):
            for name, python in contenders.items():
                if turn < args.cold_rounds:
                    drop_from_page_cache(path)
                    cache = str(Path(folder) / f"{name}-{turn}")
                    note(name, measure(name, python, path, cache=cache, part="start"), "cold_")
                    kept = native_kernels(python, cache) if name == "trustcore" else None
                    if kept:
                        rounds[name].setdefault("cold_kernel_build_seconds", []).append(kept)
                figures = measure(name, python, path)
                note(name, figures)
                print(f"round {turn + 1}, {name}: " + ", ".join(f"{k} {v:.4g}" for k, v in figures.items()), flush=True)
    result = origin(contenders) | {"model": Path(path).name, "rounds": rounds}
    write_result(result, args.out, "generate")
    print(table(result))


def native_kernels(python: str, cache: str) -> float | None:
    """Seconds the one-time compilation of the CPU handlers takes: part of a cold start, once a machine."""
    source = (
        "import shutil, time; from trustcore.cache import cache_folder; shutil.rmtree(cache_folder('native'));"
        "from trustcore.ops import cpu; t = time.time(); why = cpu.why_not(); print(0 if why else time.time() - t)"
    )
    done = subprocess.run(
        [python, "-c", source], env=environment(TRUSTCORE_CACHE=cache), capture_output=True, text=True, check=True
    )
    return float(done.stdout) or None


def demo_model() -> str:
    sys.path.insert(0, str(ROOT))  # a checkout that is not installed serves too
    from trustcore.catalogue import pull

    return str(pull("smollm2"))


ROWS = (
    ("cold_load_seconds", "load, cold", "s"),
    ("load_seconds", "load, warm", "s"),
    ("cold_start_seconds", "process start to first token, cold", "s"),
    ("start_seconds", "process start to first token, warm", "s"),
    ("first_token_16_seconds", "first token, 16-token prompt", "ms"),
    ("first_token_512_seconds", "first token, 512-token prompt", "ms"),
    ("prefill_tokens_per_second", "prefill (512), tokens/s", ""),
    ("decode_tokens_per_second", "decode, batch 1, tokens/s", ""),
    ("decode_batch_8_tokens_per_second", "decode, batch 8, tokens/s", ""),
    ("peak_memory_mb", "peak memory, batch 1", "MB"),
    ("peak_memory_batch_8_mb", "peak memory, batch 8", "MB"),
)


def table(result: dict[str, Any]) -> str:
    """The result as Markdown: medians, ranges, and ratios to trustcore's figure."""
    names = list(result["rounds"])
    peers = [n for n in names if n != "trustcore"]
    lines = ["| | " + " | ".join(names + [f"trustcore / {p}" for p in peers]) + " |"]
    lines.append("|---" * (1 + len(names) + len(peers)) + "|")
    for key, label, unit in ROWS:
        cells, medians = [], {}
        for name in names:
            values = result["rounds"][name].get(key)
            if not values:
                cells.append("")
                continue
            medians[name] = statistics.median(values)
            factor = 1000 if unit == "ms" else 1
            shown = [f"{v * factor:.3g}" if v * factor < 100 else f"{v * factor:.0f}" for v in values]
            middle = medians[name] * factor
            text = f"{middle:.3g}" if middle < 100 else f"{middle:.0f}"
            low, high = shown[values.index(min(values))], shown[values.index(max(values))]
            cells.append(f"{text}{' ' + unit if unit else ''} ({low} to {high})")
        ratios = [f"{medians['trustcore'] / medians[p]:.2f}" if {"trustcore", p} <= set(medians) else "" for p in peers]
        lines.append(f"| {label} | " + " | ".join([*cells, *ratios]) + " |")
    return "\n".join(lines)


def page(result: dict[str, Any], source: str) -> str:
    """The section of docs/benchmarks.md."""
    if "formats" in result:
        table_, note = (
            formats_table(result),
            f"A random Llama of {result['parameters'] / 1e6:.0f} M weights, 16-token prompt.",
        )
    else:
        build = result["rounds"].get("trustcore", {}).get("cold_kernel_build_seconds")
        table_, note = table(result), f"{result['model']}."
        if build:
            note += (
                f" A cold start of trustcore compiles its CPU kernels ({statistics.median(build):.1f} s of it, once a "
                "machine) and its XLA programs (once for each shape)."
            )
    return f"{table_}\n\n{described(result)} {note}\nData: [{source}](../{source}).\n"


def write_page(source: Path) -> None:
    result = json.loads(source.read_text())
    section = "formats" if "formats" in result else "generate"
    pages = {"docs/benchmarks.md": page(result, str(source.resolve().relative_to(ROOT)))}
    if section == "generate":
        pages["README.md"] = short(result)
    for name, text in pages.items():
        fill(name, section, text)


def short(result: dict[str, Any]) -> str:
    """The few rows that the README shows: medians, and the machine."""
    shown = ("decode_tokens", "decode_batch", "prefill", "start_seconds", "peak_memory_mb")
    names = list(result["rounds"])
    lines = ["| | " + " | ".join(names) + " |", "|---" * (1 + len(names)) + "|"]
    for key, label, unit in ROWS:
        if key.startswith(shown):
            medians = [statistics.median(result["rounds"][name][key]) for name in names]
            cells = [(f"{m:.3g}" if m < 100 else f"{m:.0f}") + (f" {unit}" if unit else "") for m in medians]
            lines.append(f"| {label} | " + " | ".join(cells) + " |")
    m = result["machine"]
    return "\n".join(lines) + f"\n\n{m['cpu']}, {m['cores']} cores, {result['model']}, {result['date']}.\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a GGUF file; default: the demo model")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cold-rounds", type=int, default=1, help="rounds that also measure a cold start")
    parser.add_argument("--python", action="append", default=[], metavar="NAME=PATH", help="interpreter of a contender")
    parser.add_argument("--only", action="append", choices=list(MODULES), help="contender to run (repeatable)")
    parser.add_argument("--out", help="JSON file to write")
    parser.add_argument("--table", type=Path, metavar="JSON", help="make docs/benchmarks.md from a result, and stop")
    parser.add_argument("--worker", choices=list(MODULES), help=argparse.SUPPRESS)
    parser.add_argument("--formats", metavar="NAMES", help="all, or names joined by commas: decode each format")
    parser.add_argument("--part", choices=("all", "start", "decode"), default="all", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.worker, args.model, args.part)
    elif args.table:
        write_page(args.table)
    elif args.formats:
        compare_formats(args)
    else:
        compare(args)


if __name__ == "__main__":
    main()
