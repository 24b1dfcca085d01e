"""Rules of name maps: what each kind does, both directions, packed matrices too."""

import json

import numpy as np
import pytest

from tests.models.random_weights import random_weight
from tests.models.test_families import recorded
from trustcore.errors import ModelError
from trustcore.models import DecoderConfig
from trustcore.models.families import FAMILIES
from trustcore.models.name_map import expand, fused, kernel, numbered, plain, shifted, stacked, window
from trustcore.models.names import Names, described_by, under
from trustcore.models.packed_outputs import outputs_in, places

QKV = ["query.kernel", "key.kernel", "value.kernel"]


def numbers(*shape):
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


# Rule, shapes of its parameters, shape of each tensor.
CASES = {
    "plain": (plain("norm.weight", "norm"), [(4,)], (4,)),
    "plain, in first": (plain("up.kernel", "up"), [(3, 4)], (3, 4)),
    "kernel": (kernel("up.kernel", "up"), [(3, 4)], (4, 3)),
    "window": (window("up.kernel", "up"), [(5, 7, 3, 4)], (4, 3, 5, 7)),
    "one window": (window("conv", "conv"), [(5, 1, 4)], (4, 1, 5)),
    "scalar": (plain("scale", "scale"), [()], ()),
    "shifted": (shifted("norm.weight", "norm"), [(4,)], (4,)),
    "fused": (fused(QKV, "qkv"), [(3, 8), (3, 4), (3, 4)], (16, 3)),
    "fused, by head": (fused(QKV, "qkv", groups=2), [(3, 8), (3, 4), (3, 4)], (16, 3)),
    "fused, in first": (fused(QKV[:2], "qk", groups=4, rows_first=False), [(2, 3, 4), (2, 3, 4)], (2, 3, 8)),
    "fused biases": (fused(["query.bias", "key.bias"], "b", groups=2), [(4,), (2,)], (6,)),
    "stacked": (stacked("up.kernel", "up.{e}", 5), [(5, 3, 4)], (4, 3)),
    "stacked vectors": (stacked("norm.weight", "norm.{e}", 2), [(2, 4)], (4,)),
}


@pytest.mark.parametrize("name", CASES)
def test_both_directions(name):
    rule, shapes, stored = CASES[name]
    assert rule.shape(shapes) == stored
    parameters = [numbers(*shape) + 1000 * i for i, shape in enumerate(shapes)]
    tensors = rule.join(parameters)
    assert [tensor.shape for tensor in tensors] == [stored] * len(rule.names)
    for found, parameter in zip(rule.split(tensors, shapes), parameters, strict=True):
        np.testing.assert_array_equal(found, parameter)


def test_what_the_kinds_do():
    up = numbers(3, 4)
    np.testing.assert_array_equal(kernel("up.kernel", "up").join([up])[0], up.T)
    np.testing.assert_array_equal(shifted("norm.weight", "n").split([np.float32([0.5])], [(1,)])[0], [1.5])
    query, key = np.float32([[0, 1, 2, 3]]), np.float32([[10, 11]])
    for groups, expected in ((1, [0, 1, 2, 3, 10, 11]), (2, [0, 1, 10, 2, 3, 11])):
        assert fused(QKV[:2], "qk", groups=groups).join([query, key])[0].reshape(-1).tolist() == expected
    gate, up = np.float32([[0, 1]]), np.float32([[10, 11]])
    assert fused(QKV[:2], "gu", groups=2).join([gate, up])[0].reshape(-1).tolist() == [0, 10, 1, 11]
    assert [rule.kind for rule, *_ in CASES.values()] == [
        *(
            "plain",
            "plain",
            "kernel",
            "window",
            "window",
            "plain",
            "shifted",
            "fused",
            "fused",
            "fused",
            "fused",
            "stacked",
            "stacked",
        )
    ]


@pytest.mark.parametrize(("kind", "groups"), [("q4_0", 2), ("int4:g64", 2), ("q6_k", 1), ("fp8_e4m3:128x128", 1)])
def test_packed_matrices_are_split_and_joined_as_they_are(kind, groups):
    widths = [256, 128, 128] if "128x128" in kind else [64, 32, 32]
    rule = fused(QKV, "qkv", groups=groups)
    whole = random_weight(kind, 256, sum(widths))
    parts = rule.split_packed([whole], [(256, width) for width in widths])
    expected = rule.split([np.asarray(whole.dequantize()).T], [(256, width) for width in widths])
    for part, array in zip(parts, expected, strict=True):
        assert part.format == whole.format
        np.testing.assert_array_equal(part.dequantize(), array)
    again = rule.join_packed(parts)[0]
    np.testing.assert_array_equal(again.dequantize(), whole.dequantize())


def test_packed_experts_are_stacked():
    rule = stacked("up.kernel", "up.{e}", 3)
    pieces = [random_weight("q4_1", 64, 32, seed=e) for e in range(3)]
    (whole,) = rule.split_packed(pieces, [(3, 64, 32)])
    assert whole.shape == (3, 64, 32)
    for piece, found in zip(pieces, rule.join_packed([whole]), strict=True):
        np.testing.assert_array_equal(found.dequantize(), piece.dequantize())
    with pytest.raises(ModelError, match="are packed in different ways"):
        rule.split_packed([*pieces[:2], random_weight("q8_0", 64, 32)], [(3, 64, 32)])


def test_what_cannot_be_taken_apart_is_refused():
    tiled = random_weight("fp8_e4m3:128x128", 256, 256)
    with pytest.raises(ModelError, match="outputs that share their scale and are to be put apart"):
        outputs_in(tiled, np.arange(256).reshape(2, -1).T.reshape(-1))
    with pytest.raises(ModelError, match=r"which differ in format"):
        fused(QKV[:2], "qk").join_packed([random_weight("q4_0", 64, 32), random_weight("q8_0", 64, 32)])
    with pytest.raises(ModelError, match="fall into no 3 groups"):
        places([4, 2], 3)
    with pytest.raises(ModelError, match="are no one tensor"):
        fused(QKV[:2], "qk").shape([(3, 4), (4, 4)])


def test_layers_and_fields_are_filled_in():
    class Config:
        kv_heads, expert_count = 2, 3

    layer = [fused(["b.{}.q.bias", "b.{}.k.bias"], "{}.qk", groups="kv_heads"), stacked("b.{}.up.kernel", "{}.up.{e}")]
    rules = expand(numbered(2, layer), Config)
    assert [rule.paths[0] for rule in rules] == ["b.0.q.bias", "b.0.up.kernel", "b.1.q.bias", "b.1.up.kernel"]
    assert rules[0].groups == 2 and rules[3].names == ("1.up.0", "1.up.1", "1.up.2")


@pytest.mark.parametrize("name", FAMILIES)
def test_no_two_rules_of_a_family_speak_of_one_parameter(name):
    case = {"gemma3_text": "gemma3"}.get(name, name)
    config = DecoderConfig.from_hugging_face(json.loads(str(recorded(case)["config"])))
    family = FAMILIES[name]
    for names in (family.names_for(config), *([family.gguf.names] if family.gguf else [])):
        paths = [path for rule in names.rules(config) for path in rule.paths]
        assert len(paths) == len(set(paths))


class OneLayer:
    layers = 1


def test_names_are_found_as_a_file_has_them():
    """Another prefix, an older spelling, a second name, and what stands outside of the prefix."""
    names = Names(
        (plain("words.table", "shared.weight", others=("embed.weight",)), plain("norm.weight", "norm.weight")),
        under("blocks.{}.", "h.{}.", [kernel("up.kernel", "up.weight")]),
        (kernel("output.kernel", "lm_head.weight"),),
        prefix="model.",
        prefixes=("", "other."),
        ignored=("*.ids", "cls.*"),
        spellings=((".gamma", ".weight"),),
    )

    def found(*given):
        rules, prefix = names.in_file(OneLayer, given)
        return [rule.stored for rule in rules], prefix

    usual = ["model.shared.weight", "model.norm.weight", "model.h.0.up.weight", "lm_head.weight"]
    assert [rule.stored for rule in names.rules(OneLayer)] == usual == found()[0]
    assert found("shared.weight", "h.0.up.weight", "norm.gamma") == (
        ["shared.weight", "norm.gamma", "h.0.up.weight", "lm_head.weight"],
        "",
    )
    assert found("other.embed.weight", "other.h.0.up.qweight", "lm_head.weight.codes", "model.norm.weight") == (
        ["other.embed.weight", "other.norm.weight", "other.h.0.up.weight", "lm_head.weight"],
        "other.",
    )
    assert names.ignores("other.cls.x", "other.") and names.ignores("cls.x") and names.ignores("a.ids")
    assert not names.ignores("other.cls.x") and not names.ignores("model.up.weight")
    assert [rule.stored for rule in names.rules(OneLayer, "x.")][2:] == ["x.h.0.up.weight", "lm_head.weight"]
    assert described_by(["a.b.codes"]) == {"a.b.codes", "a.b", "a.b.weight"}
