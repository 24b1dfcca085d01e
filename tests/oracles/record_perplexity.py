"""Records what llama.cpp makes of GGUF files: its own, and those that trustcore wrote from the same weights.

The oracle is not a test dependency. In a virtual environment of its own, `pip install llama-cpp-python==0.3.36`, then

    trustcore quantize smollm2 -o F16.gguf --format f16
    for f in q4_0 q4_k_m; do trustcore quantize F16.gguf -o written/$f.gguf --format $f; done
    python tests/oracles/record_perplexity.py --source F16.gguf --written written --out tests/data/perplexity.json

and the same, into tests/data/perplexity_rotated.json, from the F16 file of `python benchmarks/rotated_smollm2.py`.

Formats of blocks of 256, most of which want an importance, are measured on the small language model of
`benchmarks/small_lm.py`, whose rows they divide. It has no tokenizer; its tokens are bytes:

    python benchmarks/small_lm.py --open small_lm.safetensors --gguf small
    for f in iq2_xxs q2_k; do  # not mxfp4: llama.cpp gives dense models q8_0 under that name
        trustcore quantize small/F16.gguf -o written/$f.gguf --format $f --importance small/imatrix.gguf
    done
    python tests/oracles/record_perplexity.py --source small/F16.gguf --importance small/imatrix.gguf \
        --text small/text.bin --written written --out tests/data/perplexity_small.json

and trustcore's own perplexity of all those files is added to a record in trustcore's environment, by
`python tests/oracles/record_perplexity.py --ours --source F16.gguf --written written --text TEXT --out RECORD`.

Perplexity is that of llama.cpp's `perplexity` tool: the text without its last line feed, encoded with what the model
puts before a text; chunks of 512 tokens (or of the model's context), each on its own, its first token replaced by BOS
where the model wants one; the tokens after the first half of a chunk count, `exp(mean negative log-likelihood)`. Beside
it stand the mean KL divergence from the source's predictions, and for files that trustcore wrote how far the logarithm
of the perplexity is from that of llama.cpp's own file, token by token, with its standard error, and the greedy
continuation of a prompt.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

try:
    import llama_cpp
except ImportError:  # in trustcore's environment, for --ours
    llama_cpp = None

# trustcore's name for a format -> llama.cpp's number for a file of it (llama.h, `llama_ftype`).
FILE_TYPES = {
    "f16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q5_1": 9, "q2_k": 10, "q3_k_s": 11, "q3_k_m": 12,
    "q3_k_l": 13, "q4_k_s": 14, "q4_k_m": 15, "q5_k_s": 16, "q5_k_m": 17, "q6_k": 18, "iq2_xxs": 19, "iq2_xs": 20,
    "q2_k_s": 21, "iq3_xs": 22, "iq3_xxs": 23, "iq1_s": 24, "iq4_nl": 25, "iq3_s": 26, "iq3_m": 27, "iq2_s": 28,
    "iq2_m": 29, "iq4_xs": 30, "iq1_m": 31, "bf16": 32, "tq1_0": 36, "tq2_0": 37, "mxfp4": 38, "nvfp4": 39, "q1_0": 40,
}  # fmt: skip
CONTEXT = 512
PROMPT = "The capital of France is"
CONTINUED = 16  # tokens


def read_importance(path: Path) -> dict[str, np.ndarray]:
    """Returns {tensor name: mean squares of its inputs, [K]} of an importance matrix in GGUF."""
    from gguf import GGUFReader

    tensors = {tensor.name: np.array(tensor.data, np.float32).reshape(-1) for tensor in GGUFReader(path).tensors}
    names = [name.removesuffix(".in_sum2") for name in tensors if name.endswith(".in_sum2")]
    return {name: tensors[f"{name}.in_sum2"] / tensors[f"{name}.counts"] for name in names}


def quantize(source: Path, out: Path, file_type: int, threads: int, importance: dict[str, np.ndarray]) -> bool:
    """Whether llama.cpp could write the file."""
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype, options.nthread, options.allow_requantize = file_type, threads, True
    if importance:
        entry = llama_cpp.llama_model_imatrix_data
        entries = [
            entry(name.encode(), values.ctypes.data_as(ctypes.POINTER(ctypes.c_float)), values.size)
            for name, values in importance.items()
        ]
        held = (entry * (len(entries) + 1))(*entries)  # ends with an entry without a name
        options.imatrix = ctypes.cast(held, ctypes.POINTER(entry))
    return llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(out), ctypes.byref(options)) == 0


def context_of(model: Any) -> int:
    return min(CONTEXT, llama_cpp.llama_model_n_ctx_train(model.model))


def evaluate(path: Path, text: bytes, threads: int, reference: Path) -> dict[str, np.ndarray]:
    """Returns for each token that counts its negative log-likelihood, and the KL divergence from the reference.

    The log-probabilities of the first file that is evaluated become the reference.
    """
    model = llama_cpp.Llama(
        str(path), n_ctx=CONTEXT, n_batch=CONTEXT, logits_all=True, n_threads=threads, n_threads_batch=threads,
        verbose=False,
    )  # fmt: skip
    vocab, context = llama_cpp.llama_model_get_vocab(model.model), context_of(model)
    nameless = llama_cpp.llama_vocab_type(vocab) == llama_cpp.LLAMA_VOCAB_TYPE_NONE
    tokens = list(text) if nameless else model.tokenize(text.removesuffix(b"\n"), add_bos=True, special=False)
    bos = None
    if not nameless and llama_cpp.llama_vocab_get_add_bos(vocab):
        bos = llama_cpp.llama_vocab_bos(vocab)
    chunks, first = len(tokens) // context, context // 2
    shape = (chunks, context - 1 - first, model.n_vocab())
    fresh = not reference.exists()
    kept = np.lib.format.open_memmap(reference, "w+" if fresh else "r", np.float32, shape if fresh else None)
    losses, divergences = [], []
    for i in range(chunks):
        chunk = tokens[i * context : (i + 1) * context]
        model.reset()
        model.eval([bos, *chunk[1:]] if bos is not None else chunk)
        logits = np.array(model.scores[first : context - 1], np.float32)
        logits -= logits.max(-1, keepdims=True)
        logits -= np.log(np.exp(logits).sum(-1, keepdims=True, dtype=np.float64)).astype(np.float32)
        losses.append(-np.take_along_axis(logits, np.array(chunk[first + 1 :])[:, None], -1)[:, 0])
        if fresh:
            kept[i] = logits
        before = kept[i]
        divergences.append((np.exp(before) * (before - logits)).sum(-1, dtype=np.float64))
    found = {"losses": np.concatenate(losses).astype(np.float64), "divergences": np.concatenate(divergences)}
    return {**found, "context": np.array(context)}


def figures(found: dict[str, np.ndarray], path: Path) -> dict[str, float]:
    return {
        "perplexity": float(np.exp(found["losses"].mean())),
        "kl_divergence": float(found["divergences"].mean()),
        "bytes": path.stat().st_size,
    }


def continuation(path: Path, threads: int) -> list[int]:
    model = llama_cpp.Llama(str(path), n_ctx=CONTEXT, n_threads=threads, n_threads_batch=threads, verbose=False)
    if llama_cpp.llama_vocab_type(llama_cpp.llama_model_get_vocab(model.model)) == llama_cpp.LLAMA_VOCAB_TYPE_NONE:
        return []
    tokens = model.tokenize(PROMPT.encode(), add_bos=True, special=False)
    out = []
    for token in model.generate(tokens, temp=0.0, top_k=1, repeat_penalty=1.0):
        out.append(int(token))
        if len(out) == CONTINUED:
            break
    return out


def add_ours(out: Path, source: Path, written: Path, text: bytes) -> None:
    """Adds "own_perplexity", what trustcore finds, to the files of a record and to their source."""
    from trustcore import load
    from trustcore.evaluation import perplexity

    record = json.loads(out.read_text())
    for name, entry in {"source": record["source"], **record["trustcore"]}.items():
        model = load(source if name == "source" else written / f"{name}.gguf")
        tokens = list(text) if model.tokenizer is None else text.decode().removesuffix("\n")
        found = perplexity(model, tokens, context=min(CONTEXT, model.config.context))
        entry["own_perplexity"] = found.perplexity
        print(f"{name:8} {entry['perplexity']:.4f} {found.perplexity:.4f}", flush=True)
    out.write_text(json.dumps(record, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="an F16 file of the model")
    parser.add_argument(
        "--written", type=Path, required=True, help="a folder of files that trustcore wrote, called FORMAT.gguf"
    )
    parser.add_argument("--text", type=Path, default=Path(__file__).parents[1] / "data" / "moby_dick.txt")
    parser.add_argument("--out", type=Path, required=True, help="the record")
    parser.add_argument("--formats", nargs="*", default=list(FILE_TYPES))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--importance", type=Path, help="an importance matrix in GGUF, for llama.cpp's files")
    parser.add_argument("--ours", action="store_true", help="add trustcore's own perplexity of its files to a record")
    options = parser.parse_args()
    text = options.text.read_bytes()
    if options.ours:
        add_ours(options.out, options.source, options.written, text)
        return
    importance = {} if options.importance is None else read_importance(options.importance)
    record: dict = {"llama_cpp": {}, "trustcore": {}, "not_written": []}
    record["about"] = {
        "llama-cpp-python": llama_cpp.__version__,
        "processor": platform.processor() or platform.machine(),
        "text": options.text.name,
        "text_sha256": hashlib.sha256(text).hexdigest(),
        "importance": bool(importance),
        "context": CONTEXT,
        "prompt": PROMPT,
    }
    with tempfile.TemporaryDirectory() as folder:
        reference, own = Path(folder) / "reference.npy", Path(folder) / "own.gguf"
        found = evaluate(options.source, text, options.threads, reference)
        record["source"] = figures(found, options.source)
        record["about"]["context"] = int(found["context"])
        for name in options.formats:
            begin = time.perf_counter()
            if not quantize(options.source, own, FILE_TYPES[name], options.threads, importance):
                record["not_written"].append(name)
                print(f"{name:8} llama.cpp does not write it")
                continue
            theirs = evaluate(own, text, options.threads, reference)
            record["llama_cpp"][name] = figures(theirs, own)
            path = options.written / f"{name}.gguf"
            ours = evaluate(path, text, options.threads, reference)
            apart = ours["losses"] - theirs["losses"]
            record["trustcore"][name] = {
                **figures(ours, path),
                "continuation": continuation(path, options.threads),
                # mean and standard error, over the same tokens, of log(our perplexity / theirs)
                "log_ratio": float(apart.mean()),
                "log_ratio_error": float(apart.std() / np.sqrt(apart.size - 1)),
            }
            options.out.write_text(json.dumps(record, indent=1) + "\n")
            one, other = record["llama_cpp"][name], record["trustcore"][name]
            print(
                f"{name:8} perplexity {one['perplexity']:.4f} {other['perplexity']:.4f} "
                f"KL {one['kl_divergence']:.5f} {other['kl_divergence']:.5f} "
                f"ratio {other['log_ratio']:+.4f} +/- {other['log_ratio_error']:.4f} "
                f"{time.perf_counter() - begin:.0f} s"
            )


if __name__ == "__main__":
    main()
