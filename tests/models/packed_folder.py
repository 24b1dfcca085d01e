"""Folders of small models whose matrices another package could have packed, and the float model they stand for."""

import dataclasses
import json
import re

import numpy as np
from safetensors.numpy import load_file, save_file

from tests.models.small import CONFIG, random_decoder, write_as_hugging_face

SMALL = dataclasses.replace(CONFIG, hidden=128)
LINEAR = re.compile(r"_proj\.weight$|^lm_head\.weight$")


def write_float(folder, config=SMALL, seed=0):
    """Writes a float32 model; returns {name: array}."""
    folder.mkdir(exist_ok=True)
    write_as_hugging_face(folder, random_decoder(config, seed))
    return load_file(folder / "model.safetensors")


def write_packed(folder, packer, quantization, *, config=SMALL, seed=0, where=LINEAR, **changes):
    """Writes the model with its matrices packed by `packer`, and beside it, in `folder / "float"`, as floats.

    `changes` replace tensors by name (dots as `__`), None dropping one.
    """
    weights = write_float(folder, config, seed)
    tensors, held = {}, {}
    for name, array in weights.items():
        if where.search(name):
            parts, held[name] = packer(array)
            module = name.removesuffix(".weight")
            joined = {f"{module}{part if part.startswith('_') else '.' + part}": value for part, value in parts.items()}
            tensors.update(joined)
        else:
            tensors[name] = held[name] = array
    changed = {name.replace("__", "."): value for name, value in changes.items()}
    tensors = {name: value for name, value in (tensors | changed).items() if value is not None}
    save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, folder / "model.safetensors")
    described = json.loads((folder / "config.json").read_text())
    if quantization is not None:
        described["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(described))
    (folder / "float").mkdir(exist_ok=True)
    plain = {name: np.ascontiguousarray(value, dtype=np.float32) for name, value in held.items()}
    save_file(plain, folder / "float" / "model.safetensors")
    described.pop("quantization_config", None)
    (folder / "float" / "config.json").write_text(json.dumps(described))
    return tensors


def write_tokenizer(folder, size=SMALL.vocab_size):
    """Writes a tokenizer.json whose tokens are words."""
    import tokenizers

    words = {f"w{i}": i for i in range(size)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = tokenizers.decoders.WordPiece()
    tokenizer.save(str(folder / "tokenizer.json"))
