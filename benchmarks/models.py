"""Forward, and forward and backward, of each family beside transformers and torch: same shapes, two threads, in turn.

    python benchmarks/models.py                                    # contenders of this interpreter
    python benchmarks/models.py --python transformers=/venv/bin/python --only llama --only bert

Weights are random, shapes small but real (`CONFIGS`, in the words of config.json), float32; texts are a batch of 8 rows
of 128 tokens, images a batch of 8, sounds one of ten seconds each. Backward is of the mean square of what the model
returns, with respect to all weights. Compiling is counted apart: trustcore's first call. Contenders live in processes
of their own and take turns; a figure is the median over the rounds. The result is written to
benchmarks/results/models-DATE.json; `--table` puts such a file into docs/benchmarks.md. Run it on a quiet machine:
half an hour.
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

BATCH, LENGTH, FRAMES = 8, 128, 1000
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
_EXPERTS = {**_DECODER, "num_hidden_layers": 4, "intermediate_size": 768, "num_experts_per_tok": 2}
_GEMMA = {**_DECODER, "head_dim": 64}
_LATENT = {"q_lora_rank": 192, "kv_lora_rank": 128, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 64}
_DEEPSEEK = {
    **_EXPERTS,
    **_LATENT,
    "num_key_value_heads": 9,
    "n_routed_experts": 4,
    "moe_intermediate_size": 512,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}
_VISION = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6}
_SEQ2SEQ = {
    "vocab_size": 16384,
    "d_model": 512,
    "encoder_layers": 4,
    "decoder_layers": 4,
    "encoder_attention_heads": 8,
    "decoder_attention_heads": 8,
    "encoder_ffn_dim": 2048,
    "decoder_ffn_dim": 2048,
}
_TOWERS = {
    "text_config": {
        "vocab_size": 16384,
        "hidden_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "intermediate_size": 1536,
        "max_position_embeddings": LENGTH,
    },
    "vision_config": {**_VISION, "num_hidden_layers": 4, "intermediate_size": 1536, "patch_size": 16},
}
# model_type -> the rest of its config.json, and what it is.
CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "llama": (_DECODER, "decoder"),
    "mistral": ({**_DECODER, "sliding_window": 64}, "decoder"),
    "qwen2": (_DECODER, "decoder"),
    "qwen3": ({**_DECODER, "head_dim": 64}, "decoder"),
    "smollm3": ({**_DECODER, "pad_token_id": 0}, "decoder"),
    "granite": (_DECODER, "decoder"),
    "olmo2": (_DECODER, "decoder"),
    "phi3": ({**_DECODER, "pad_token_id": 0}, "decoder"),
    "stablelm": (_DECODER, "decoder"),
    "cohere": (_DECODER, "decoder"),
    "gemma": (_GEMMA, "decoder"),
    "gemma2": ({**_GEMMA, "sliding_window": 64}, "decoder"),
    "gemma3_text": ({**_GEMMA, "sliding_window": 64}, "decoder"),
    "mixtral": ({**_EXPERTS, "num_local_experts": 4}, "decoder"),
    "qwen2_moe": (
        {**_EXPERTS, "num_experts": 4, "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512},
        "decoder",
    ),
    "qwen3_moe": ({**_EXPERTS, "num_experts": 4, "moe_intermediate_size": 512, "head_dim": 64}, "decoder"),
    "gpt_oss": ({**_EXPERTS, "num_local_experts": 4, "head_dim": 64, "sliding_window": 64}, "decoder"),
    "llama4_text": (
        {**_EXPERTS, "num_local_experts": 4, "head_dim": 64, "intermediate_size_mlp": 1536, "attention_chunk_size": 64},
        "decoder",
    ),
    "deepseek_v2": ({**_DEEPSEEK, "topk_method": "greedy"}, "decoder"),
    "deepseek_v3": ({**_DEEPSEEK, "n_group": 1, "topk_group": 1}, "decoder"),
    "gpt2": ({"vocab_size": 16384, "n_embd": 576, "n_layer": 6, "n_head": 9, "n_positions": 1024}, "decoder"),
    "gpt_neox": (_DECODER, "decoder"),
    "opt": ({**_DECODER, "ffn_dim": 1536, "word_embed_proj_dim": 576}, "decoder"),
    "bloom": ({"vocab_size": 16384, "hidden_size": 576, "n_layer": 6, "n_head": 9}, "decoder"),
    "falcon": (_DECODER, "decoder"),
    "mamba": ({"vocab_size": 16384, "hidden_size": 384, "num_hidden_layers": 4, "state_size": 16}, "decoder"),
    "mamba2": (
        {
            "vocab_size": 16384,
            "hidden_size": 384,
            "num_hidden_layers": 4,
            "state_size": 64,
            "num_heads": 12,
            "head_dim": 64,
            "n_groups": 1,
        },
        "decoder",
    ),
    "bert": (_ENCODER, "encoder"),
    "roberta": (_ENCODER, "encoder"),
    "distilbert": (
        {"vocab_size": 30522, "dim": 384, "n_layers": 6, "n_heads": 12, "hidden_dim": 1536},
        "encoder",
    ),
    "electra": ({**_ENCODER, "embedding_size": 128}, "encoder"),
    "modernbert": ({**_ENCODER, "intermediate_size": 768, "pad_token_id": 0}, "encoder"),
    "deberta-v2": ({**_ENCODER, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]}, "encoder"),
    "t5": (
        {"vocab_size": 16384, "d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 4, "num_heads": 8},
        "text to text",
    ),
    "bart": (_SEQ2SEQ, "text to text"),
    "whisper": (
        {**_SEQ2SEQ, "num_mel_bins": 80, "max_source_positions": FRAMES // 2, "pad_token_id": 0},
        "sound to text",
    ),
    "vit": ({**_VISION, "intermediate_size": 1536}, "image"),
    "dinov2": ({**_VISION, "mlp_ratio": 4, "image_size": 224, "patch_size": 16}, "image"),
    "clip": (_TOWERS, "image and text"),
    "siglip": (_TOWERS, "image and text"),
    "resnet": ({"depths": [3, 4, 6, 3], "layer_type": "bottleneck"}, "image"),
    "convnext": ({"depths": [3, 3, 9, 3], "hidden_sizes": [96, 192, 384, 768]}, "image"),
    "efficientnet": (
        {"image_size": 224, "hidden_dim": 1280, "width_coefficient": 1.0, "depth_coefficient": 1.0},
        "image",
    ),
}


def inputs(config: dict[str, Any], kind: str) -> list[Any]:
    """NumPy arguments in the order of the parts of a kind; images are [B, C, h, w], sounds [B, M, frames]."""
    import numpy as np

    rng = np.random.default_rng(0)
    vocab = config.get("text_config", config).get("vocab_size", 0)
    parts = {"image": (BATCH, 3, 224, 224), "sound": (BATCH, 80, FRAMES)}
    return [
        rng.standard_normal(parts[part]).astype(np.float32)
        if part in parts
        else rng.integers(3, vocab, (BATCH, LENGTH))
        for part in {"decoder": "text", "encoder": "text"}.get(kind, kind).replace(" and ", " to ").split(" to ")
    ]


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
        given = [jnp.moveaxis(jnp.asarray(a), 1, -1) if a.ndim > 2 else jnp.asarray(a) for a in inputs(config, kind)]

        def forward(model: Any, *given: Any) -> Any:
            out = model(given[0], decoder_tokens=given[1]) if kind.endswith("to text") else model(*given)
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
            made[family] = getattr(transformers, AUTO.get(kind, "AutoModel")).from_config(described).eval()
        model = made[family]
        given = [torch.tensor(a) for a in inputs(config, kind)]

        def forward() -> Any:
            named = zip(NAMES.get(kind, [model.main_input_name]), given, strict=True)
            return model(**dict(named))[0]

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


AUTO = {
    "decoder": "AutoModelForCausalLM",
    "text to text": "AutoModelForSeq2SeqLM",
    "sound to text": "AutoModelForSpeechSeq2Seq",
}
NAMES = {
    "text to text": ["input_ids", "decoder_input_ids"],
    "sound to text": ["input_features", "decoder_input_ids"],
    "image and text": ["pixel_values", "input_ids"],
}
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
