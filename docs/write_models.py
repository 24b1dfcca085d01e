"""Writes docs/models.md from the table of model families.

    python docs/write_models.py            writes the page
    python docs/write_models.py --check    exit status 1 where the page is not what the table gives

What sets a family apart is read off its configuration: that of the small model with which it is compared with
transformers (`tests/data/decoders`), field by field against Llama's. How its weights stand in files is read off its
name map.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from trustcore.models import DecoderConfig
from trustcore.models.families import FAMILIES, Family

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "models.md"
CASES = ROOT / "tests" / "data" / "decoders"
_HEAD = """# Model families

This page is made by `python docs/write_models.py` from the table `trustcore.models.families.FAMILIES`; a test holds it
up to date. Every family is one `Decoder` with switches. The logits of each are those of transformers on small random
models within 2e-4 in float32, padded on either side and token by token with a cache (`tests/models/test_families.py`);
those with a GGUF architecture are compared with llama.cpp too (`tests/models/test_gguf_families.py`).

`trustcore.load` reads the files of all of them; `trustcore.save` writes them back, with a config.json that is made of
the configuration where the model came from another kind of file (`tests/oracles/record_configs.py`).

| `model_type` | Models | What sets it apart from Llama | In Hugging Face's files | GGUF |
| --- | --- | --- | --- | --- |
"""
_GATED = {"silu": "SwiGLU", "gelu": "GeGLU", "gelu_tanh": "GeGLU (tanh)", "relu": "ReGLU"}
_PLAIN = {"gelu": "GELU", "gelu_tanh": "GELU (tanh)", "relu": "ReLU", "relu2": "squared ReLU", "silu": "SiLU"}


def page() -> str:
    """Returns the page."""
    return _HEAD + "".join(_row(family) for family in FAMILIES.values())


def _row(family: Family) -> str:
    names = {"gemma3_text": "gemma3"}
    with np.load(CASES / f"{names.get(family.name, family.name)}.npz") as case:
        config = DecoderConfig.from_hugging_face(json.loads(str(case["config"])))
    kinds = sorted({rule.kind for rule in family.names_for(config).rules(config)} - {"plain", "kernel"})
    cells = (
        f"`{family.name}`",
        family.models,
        "; ".join(_traits(config)) or "-",
        ", ".join(kinds) or "one tensor each",
        f"`{family.gguf.name}`" if family.gguf else "-",
    )
    return f"| {' | '.join(cells)} |\n"


def _traits(config: DecoderConfig) -> Iterator[str]:
    """What a configuration has that Llama's has not, in the order in which a layer computes."""
    c = config
    if c.embedding_scale != 1:
        yield "embeddings scaled"
    if c.embedding_norm:
        yield "norm behind the embedding"
    if c.learned_positions:
        yield "learned positions"
    if c.norm == "layer":
        yield f"layer norms with{'' if c.norm_bias else 'out'} biases"
    if c.norm_place != "before":
        yield "norms behind the products" if c.norm_place == "after" else "norms before and behind the products"
    if c.parallel:
        yield f"attention and feed-forward in parallel{', one norm for both' if c.shared_norm else ''}"
    if c.latent is not None:
        yield "latent attention"
    if c.qkv_bias:
        yield f"biases of queries, keys, values{' and output' if c.out_bias else ''}"
    if c.qk_norm is not None:
        how = {
            "head": "head by head",
            "whole": "over all heads",
            "each": "with a gain for each head",
            "turned": "after they have turned",
        }[c.qk_norm]
        yield f"queries and keys normalized {how}"
    if c.alibi is not None:
        yield "ALiBi"
    if c.rope is not None and c.latent is None and c.rope.size < c.head_dim:
        yield "a part of each head turns"
    if c.rope is not None and c.rope.interleaved:
        yield "interleaved rotary pairs"
    if c.positioned is not None:
        yield "layers without positions"
    if c.temperature is not None:
        yield "queries there grow with the position"
    if c.chunk is not None:
        yield f"attention within chunks{'' if c.chunked is None else ' in some layers'}"
    if c.window is not None:
        yield f"sliding window{'' if c.windowed is None else ' in some layers'}"
    if c.window_rope is not None:
        yield "their own rotary base there"
    if c.score_cap is not None or c.logit_cap is not None:
        yield "soft caps"
    if c.sinks:
        yield "attention sinks"
    if c.attention_scale is not None:
        yield "scale of scores"
    if not c.gated:
        yield f"feed-forward without a gate, {_PLAIN[c.activation]}"
    elif c.activation != "silu":
        yield _GATED[c.activation]
    if c.experts is not None:
        yield f"experts ({c.experts.scoring} router{', one shared' if c.experts.shared else ''})"
    if c.residual_scale != 1:
        yield "residuals scaled"
    if c.logit_scale != 1:
        yield "logits scaled"


def main() -> int:
    """Writes or checks the page; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 where the page is not it")
    if not parser.parse_args().check:
        PAGE.write_text(page(), encoding="utf-8")
        return 0
    if PAGE.is_file() and PAGE.read_text(encoding="utf-8") == page():
        return 0
    print(f"{PAGE.relative_to(ROOT)} is not what the table gives; run python docs/write_models.py", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
