"""Recipes against the files that llama.cpp wrote of small models, tensor by tensor."""

import json
from pathlib import Path

import pytest

from trustcore.convert.mixes import FALLBACKS, RECIPES, Facts, fallback, formats_of, is_packable
from trustcore.errors import QuantizationError
from trustcore.quant import FORMATS

RECORD = json.loads((Path(__file__).parents[1] / "data" / "gguf_mixes.json").read_text())


@pytest.mark.parametrize("case", list(RECORD["formats"]))
def test_every_tensor_gets_the_format_that_llama_cpp_gives_it(case):
    model, recipe = case.split()
    made, entry = RECORD["models"][model], RECORD["formats"][case]
    expected = {f"{name}.weight": kind for kind, names in entry["types"].items() for name in names}
    hidden = {name: made["hidden"] for name in expected if "ffn_down" in name}
    shapes = {name: (4, hidden.get(name, made["features"])) for name in expected}
    metadata = {
        "general.architecture": "llama",
        "llama.block_count": made["layers"],
        "llama.attention.head_count": made["heads"],
        "llama.attention.head_count_kv": made["kv_heads"],
    }
    facts = Facts.of(metadata, list(shapes), with_importance=entry["importance"])
    found = {name: fallback(format, shapes[name][-1]) for name, format in formats_of(recipe, shapes, facts).items()}
    assert found == expected


def test_the_record_covers_most_recipes():
    recorded = {case.split()[1] for case in RECORD["formats"]}
    assert set(RECIPES) - recorded == {"f32", "q1_0", "q3_k", "q4_k", "q5_k", "mxfp4", "nvfp4"}


def test_bare_formats_are_one_format_but_for_the_output_layer():
    shapes = {"token_embd.weight": (32, 256), "output.weight": (32, 256), "blk.0.ffn_down.weight": (256, 256)}
    for recipe in ("q3_k", "q4_k", "q5_k"):
        facts = Facts(layers=8)
        found = formats_of(recipe, shapes, facts)
        assert found == {"token_embd.weight": recipe, "output.weight": "q6_k", "blk.0.ffn_down.weight": recipe}
        assert set(formats_of(recipe, shapes, facts, pure=True).values()) == {recipe}
    tied = {name: shape for name, shape in shapes.items() if name != "output.weight"}
    assert formats_of("q4_k", tied, Facts(layers=8, tied=True))["token_embd.weight"] == "q6_k"


def test_what_is_not_packed():
    assert is_packable("blk.0.ffn_up.weight", (4, 8)) and is_packable("blk.0.ffn_up_exps.weight", (3, 4, 8))
    for name, shape in (
        ("blk.0.attn_norm.weight", (8, 8)),
        ("blk.0.ffn_gate_inp.weight", (8, 8)),
        ("blk.0.attn_q.bias", (8, 8)),
        ("blk.0.ffn_up.weight", (8,)),
        ("blk.0.ffn_up.weight", (1, 8)),
    ):
        assert not is_packable(name, shape)


def test_fallbacks_have_smaller_blocks():
    for format, other in FALLBACKS.items():
        assert FORMATS[format].block == 256 and FORMATS[other].block == 32
    assert (fallback("q4_0", 48), fallback("f32", 3), fallback("q4_k", 512)) == ("f16", "f32", "q4_k")


def test_an_unknown_recipe_is_refused():
    with pytest.raises(QuantizationError, match="format 'q4_k_xl' is not known; choose one of f32, f16, bf16"):
        formats_of("q4_k_xl", {}, Facts(layers=1))
