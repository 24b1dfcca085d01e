"""Forward, and forward and backward, of each family beside transformers and torch: same shapes, two threads, in turn.

    python benchmarks/models.py                                    # contenders of this interpreter
    python benchmarks/models.py --python transformers=/venv/bin/python --only llama --only bert

Weights are random, shapes small but real (`CONFIGS`, in the words of config.json), float32; texts are a batch of 8 rows
of 128 tokens, images a batch of 8. Backward is of the mean square of what the model returns, with respect to all
weights. Compiling is counted apart: trustcore's first call. Contenders live in processes of their own and take turns; a
figure is the median over the rounds. The result is written to benchmarks/results/models-DATE.json; `--table` puts such
a file into docs/benchmarks.md. Run it on a quiet machine. About ten minutes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness import ROOT, THREADS, Contender, answering, described, fill, installed, origin, write_result

BATCH, LENGTH = 8, 128
MODULES = {"trustcore": "trustcore", "transformers": "transformers"}
TASKS = ("forward", "forward and backward")

_DECODER = {
    "vocab_size": 16384,
    "hidden_size": 576,
    "num_hidden_layers": 6,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 1536,
    "max_position_embeddings": 2048,
}
_ENCODER = {
    "vocab_size": 30522,
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
    "max_position_embeddings": 512,
}
# model_type -> the rest of its config.json, and what it reads.
CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "llama": (_DECODER, "text"),
    "qwen3": ({**_DECODER, "head_dim": 64}, "text"),
    "gemma3_text": ({**_DECODER, "head_dim": 64, "sliding_window": 64}, "text"),
    "phi3": ({**_DECODER, "pad_token_id": 0}, "text"),
    "gpt2": ({"vocab_size": 16384, "n_embd": 576, "n_layer": 6, "n_head": 9, "n_positions": 1024}, "text"),
    "gpt_neox": (_DECODER, "text"),
    "mixtral": (
        {
            **_DECODER,
            "num_hidden_layers": 4,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "intermediate_size": 768,
        },
        "text",
    ),
    "mamba": ({"vocab_size": 16384, "hidden_size": 384, "num_hidden_layers": 4, "state_size": 16}, "text"),
    "bert": (_ENCODER, "text"),
    "modernbert": ({**_ENCODER, "intermediate_size": 768, "pad_token_id": 0}, "text"),
    "deberta-v2": ({**_ENCODER, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]}, "text"),
    "t5": (
        {"vocab_size": 16384, "d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 4, "num_heads": 8},
        "text to text",
    ),
    "bart": (
        {
            "vocab_size": 16384,
            "d_model": 512,
            "encoder_layers": 4,
            "decoder_layers": 4,
            "encoder_attention_heads": 8,
            "decoder_attention_heads": 8,
            "encoder_ffn_dim": 2048,
            "decoder_ffn_dim": 2048,
        },
        "text to text",
    ),
    "vit": ({"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6, "intermediate_size": 1536}, "image"),
    "resnet": ({"depths": [3, 4, 6, 3], "layer_type": "bottleneck"}, "image"),
    "convnext": ({"depths": [3, 3, 9, 3], "hidden_sizes": [96, 192, 384, 768]}, "image"),
}


def inputs(kind: str, vocab: int) -> list[Any]:
    """NumPy arguments, images as [B, C, h, w]."""
    import numpy as np

    rng = np.random.default_rng(0)
    if kind == "image":
        return [rng.standard_normal((BATCH, 3, 224, 224)).astype(np.float32)]
    return [rng.integers(3, vocab, (BATCH, LENGTH)) for _ in range(2 if kind == "text to text" else 1)]


# ---- contenders: each returns a function (family, task) -> (seconds of the first call, a call to be timed) -----------


def open_trustcore() -> Callable[[str, str], tuple[float, Callable[[], Any]]]:
    import jax
    import jax.numpy as jnp
    import numpy as np

    from trustcore.models import random_model

    made: dict[str, Any] = {}

    def prepare(family: str, task: str) -> tuple[float, Callable[[], Any]]:
        if family not in made:
            made.clear()
            config, _ = CONFIGS[family]
            made[family] = random_model({"model_type": family, **config}, seed=0)
        model = made[family]
        config, kind = CONFIGS[family]
        given = [jnp.asarray(a) for a in inputs(kind, config.get("vocab_size", 0))]
        if kind == "image":
            given = [jnp.moveaxis(given[0], 1, -1)]

        def forward(model: Any, *given: Any) -> Any:
            if kind == "text to text":
                return model(given[0], decoder_tokens=given[1])
            out = model(*given)
            return out[0] if isinstance(out, tuple) else out  # Mamba's states go with its logits

        def loss(model: Any, *given: Any) -> Any:
            return jnp.mean(jnp.square(forward(model, *given)))

        program = jax.jit(forward if task == "forward" else jax.value_and_grad(loss, allow_int=True))
        began = time.perf_counter()
        result = jax.block_until_ready(program(model, *given))
        first = time.perf_counter() - began
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(result) if leaf.size < 10**6)
        return first, lambda: jax.block_until_ready(program(model, *given))

    return prepare


def open_transformers() -> Callable[[str, str], tuple[float, Callable[[], Any]]]:
    import torch
    import transformers

    torch.set_num_threads(THREADS)
    made: dict[str, Any] = {}

    def prepare(family: str, task: str) -> tuple[float, Callable[[], Any]]:
        config, kind = CONFIGS[family]
        if family not in made:
            made.clear()
            described = transformers.AutoConfig.for_model(family, **config)
            torch.manual_seed(0)
            by_kind = (
                transformers.AutoModelForSeq2SeqLM if kind == "text to text" else transformers.AutoModelForCausalLM
            )
            decoder = kind == "text to text" or family in DECODERS
            made[family] = (by_kind if decoder else transformers.AutoModel).from_config(described).eval()
        model = made[family]
        given = [torch.tensor(a) for a in inputs(kind, config.get("vocab_size", 0))]

        def forward() -> Any:
            if kind == "text to text":
                return model(input_ids=given[0], decoder_input_ids=given[1])[0]
            return model(given[0])[0]

        def call() -> None:
            if task == "forward":
                with torch.inference_mode():
                    forward()
                return
            model.zero_grad(set_to_none=True)
            forward().square().mean().backward()

        began = time.perf_counter()
        call()
        return time.perf_counter() - began, call

    return prepare


DECODERS = ("llama", "qwen3", "gemma3_text", "phi3", "gpt2", "gpt_neox", "mixtral", "mamba")
OPEN = {"trustcore": open_trustcore, "transformers": open_transformers}


def work(contender: str) -> None:
    """Answers (family, task) with the seconds of a call, and of the first one where it was asked anew."""
    prepare = OPEN[contender]()
    asked, call, first = None, None, 0.0

    def seconds(question: Any) -> dict[str, float]:
        nonlocal asked, call, first
        if question != asked:
            first, call = prepare(*question)
            asked = question
        assert call
        began = time.perf_counter()
        call()
        return {"first": first, "seconds": time.perf_counter() - began}

    answering(seconds)


# ---- all of them in turn ---------------------------------------------------------------------------------------------


def compare(args: argparse.Namespace) -> None:
    pythons = dict(pair.split("=", 1) for pair in args.python)
    contenders = {}
    for name, module in MODULES.items():
        python = pythons.get(name, sys.executable)
        if installed(python, module):
            contenders[name] = python
        else:
            print(f"{name}: skipped, {python} has no {module}", flush=True)
    running = [Contender(__file__, name, python) for name, python in contenders.items()]
    out = Path(args.out) if args.out else None
    kept = json.loads(out.read_text())["models"] if out is not None and out.exists() else {}
    result = origin(contenders) | {"models": kept}  # families that are not measured anew stay
    for family in args.only or CONFIGS:
        for task in TASKS:
            rows: dict[str, dict[str, Any]] = {}
            result["models"].setdefault(family, {})[task] = rows
            for _ in range(args.rounds):
                for contender in running:
                    answer = contender.ask([family, task])
                    if answer:
                        row = rows.setdefault(contender.name, {"first": answer["first"], "seconds": []})
                        row["seconds"].append(answer["seconds"])
            told = (f"{n} {statistics.median(r['seconds']):.3f} s (first {r['first']:.1f} s)" for n, r in rows.items())
            print(f"{family}, {task}: " + ", ".join(told), flush=True)
    for contender in running:
        contender.close()
    write_result(result, args.out, "models")
    print(table(result))


def table(result: dict[str, Any]) -> str:
    """The result as Markdown: milliseconds, and how many times as fast as transformers trustcore is."""
    lines = ["| | trustcore, ms | transformers, ms | times as fast | first call, s |", "|---|---|---|---|---|"]
    for family, tasks in result["models"].items():
        for task, rows in tasks.items():
            medians = {name: statistics.median(row["seconds"]) for name, row in rows.items()}
            cells = [f"{1000 * medians[name]:.0f}" if name in medians else "" for name in MODULES]
            both = set(MODULES) <= set(medians)
            cells.append(f"{medians['transformers'] / medians['trustcore']:.2f}" if both else "")
            cells.append(f"{rows['trustcore']['first']:.1f}" if "trustcore" in rows else "")
            lines.append(f"| {family}, {task} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--python", action="append", default=[], metavar="NAME=PATH", help="interpreter of a contender")
    parser.add_argument("--only", action="append", choices=list(CONFIGS), help="family to measure (repeatable)")
    parser.add_argument("--out", help="JSON file to write")
    parser.add_argument("--table", type=Path, metavar="JSON", help="make docs/benchmarks.md from a result, and stop")
    parser.add_argument("--worker", choices=list(MODULES), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.worker)
    elif args.table:
        result, name = json.loads(args.table.read_text()), args.table.resolve().relative_to(ROOT)
        fill("docs/benchmarks.md", "models", f"{table(result)}\n\n{described(result)} Data: [{name}](../{name}).\n")
    else:
        compare(args)


if __name__ == "__main__":
    main()
