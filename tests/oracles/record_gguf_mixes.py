"""Records which format llama.cpp gives each tensor of small models, as `tests/data/gguf_mixes.json`.

The oracle is not a test dependency. In a virtual environment of its own, from the root of the checkout:

    pip install llama-cpp-python==0.3.36 gguf==0.19.0
    PYTHONPATH=. python tests/oracles/record_gguf_mixes.py --out tests/data

The models have random weights: only names, shapes and the counts of layers and heads decide. `shapes` says how they
are made: layers, features D, query heads, key heads, whether the table of tokens is also the output layer.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import tempfile
from pathlib import Path

import gguf
import llama_cpp
import numpy as np

FILE_TYPES = {
    "f16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q5_1": 9, "q2_k": 10, "q3_k_s": 11, "q3_k_m": 12,
    "q3_k_l": 13, "q4_k_s": 14, "q4_k_m": 15, "q5_k_s": 16, "q5_k_m": 17, "q6_k": 18, "iq3_xs": 22, "iq3_xxs": 23,
    "iq4_nl": 25, "iq3_s": 26, "iq3_m": 27, "iq4_xs": 30, "bf16": 32, "tq1_0": 36, "tq2_0": 37,
    "q2_k_s": 21, "iq2_xxs": 19, "iq2_xs": 20, "iq2_s": 28, "iq2_m": 29, "iq1_s": 24, "iq1_m": 31,
}  # fmt: skip
IMPORTANT = (
    "q2_k_s",
    "iq2_xxs",
    "iq2_xs",
    "iq2_s",
    "iq2_m",
    "iq1_s",
    "iq1_m",
    "iq3_xxs",
    "iq3_xs",
)  # want an importance
MODELS = {
    "tied": {"layers": 17, "features": 256, "heads": 64, "kv_heads": 32, "hidden": 256, "tied": True},
    "shared": {"layers": 9, "features": 256, "heads": 32, "kv_heads": 8, "hidden": 256, "tied": False},
    "narrow": {"layers": 9, "features": 96, "heads": 3, "kv_heads": 3, "hidden": 256, "tied": False},
}
VOCABULARY = 32


def write(path: Path, model: dict) -> list[str]:
    """Writes a model of random weights as f16, and returns the names of its matrices."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    d, heads, keys = model["features"], model["heads"], model["kv_heads"]
    writer.add_block_count(model["layers"])
    writer.add_context_length(128)
    writer.add_embedding_length(d)
    writer.add_feed_forward_length(model["hidden"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(keys)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(d // heads)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"t{i}" for i in range(VOCABULARY)])
    writer.add_token_scores([0.0] * VOCABULARY)
    writer.add_token_types([1] * VOCABULARY)
    shapes = {"token_embd.weight": (VOCABULARY, d), "output_norm.weight": (d,)}
    if not model["tied"]:
        shapes["output.weight"] = (VOCABULARY, d)
    for i in range(model["layers"]):
        shapes |= {
            f"blk.{i}.attn_norm.weight": (d,),
            f"blk.{i}.ffn_norm.weight": (d,),
            f"blk.{i}.attn_q.weight": (d, d),
            f"blk.{i}.attn_k.weight": (d // heads * keys, d),
            f"blk.{i}.attn_v.weight": (d // heads * keys, d),
            f"blk.{i}.attn_output.weight": (d, d),
            f"blk.{i}.ffn_gate.weight": (model["hidden"], d),
            f"blk.{i}.ffn_up.weight": (model["hidden"], d),
            f"blk.{i}.ffn_down.weight": (d, model["hidden"]),
        }
    for name, shape in shapes.items():
        dtype = np.float16 if len(shape) > 1 else np.float32
        writer.add_tensor(name, rng.standard_normal(shape).astype(dtype))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return {name: shape for name, shape in shapes.items() if len(shape) > 1}


def quantize(source: Path, out: Path, file_type: int, weighted: dict[str, int]) -> None:
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype, options.nthread = file_type, 1
    kept = []
    if weighted:
        entries = (llama_cpp.llama_cpp.llama_model_imatrix_data * (len(weighted) + 1))()
        for entry, (name, size) in zip(entries, weighted.items(), strict=False):
            values = (ctypes.c_float * size)(*([1.0] * size))
            kept.append(values)
            entry.name, entry.data, entry.size = name.encode(), values, size
        options.imatrix = ctypes.cast(entries, type(options.imatrix))
    if llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(out), ctypes.byref(options)):
        raise SystemExit(f"llama.cpp could not write {out}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    record: dict = {"about": {"llama-cpp-python": llama_cpp.__version__}, "models": MODELS, "formats": {}}
    with tempfile.TemporaryDirectory() as folder:
        for model, shape in MODELS.items():
            source = Path(folder) / f"{model}.gguf"
            matrices = write(source, shape)
            for name, number in FILE_TYPES.items():
                if name.startswith(("iq1", "iq2", "iq3_x")) and model == "tied":
                    continue  # slow to write, and the rules are those of the other models
                out = Path(folder) / "out.gguf"
                weighted = {n: s[-1] for n, s in matrices.items()} if name in IMPORTANT else {}
                quantize(source, out, number, weighted)
                types = {t.name: t.tensor_type.name.lower() for t in gguf.GGUFReader(out).tensors if len(t.shape) > 1}
                entry = {"importance": bool(weighted), "types": {}}
                for tensor, kind in sorted(types.items()):
                    entry["types"].setdefault(kind, []).append(tensor.removesuffix(".weight"))
                record["formats"][f"{model} {name}"] = entry
    path = parser.parse_args().out / "gguf_mixes.json"
    path.write_text(json.dumps(record, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
