"""Records the tokens that transformers' `generate` writes, greedily, as `tests/data/generated.json`.

The oracle is no test dependency. In a virtual environment of its own (CPU):

    pip install torch transformers==5.23.0
    python tests/oracles/record_generation.py --out tests/data/generated.json
    python tests/oracles/record_generation.py --out tests/data/generated.json --check      compares instead of writing

The models are those of `tests/data/families`, whose weights and config.json are read from there, with the
generation_config.json that stands in `CASES`. Prompts are rows of the inputs there without padding, one at a time.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.numpy import save_file

DATA = Path(__file__).parents[1] / "data"
MADE = 16

# Case -> its generation_config.json; what is forbidden was likely otherwise.
CASES: dict[str, dict[str, Any]] = {
    "t5": {"decoder_start_token_id": 0, "eos_token_id": 1, "pad_token_id": 0},
    "t5-gated": {"decoder_start_token_id": 0, "eos_token_id": [1, 62], "pad_token_id": 0},
    "umt5": {"decoder_start_token_id": 0, "eos_token_id": 1, "pad_token_id": 0},
    "bart": {"decoder_start_token_id": 2, "eos_token_id": 3, "forced_bos_token_id": 7, "pad_token_id": 1},
    "mbart": {"decoder_start_token_id": 2, "eos_token_id": 3, "pad_token_id": 1},
    "marian": {"decoder_start_token_id": 2, "eos_token_id": 3, "pad_token_id": 1, "bad_words_ids": [[54], [33]]},
    "pegasus": {"decoder_start_token_id": 2, "eos_token_id": 3, "pad_token_id": 1},
    "whisper": {
        "decoder_start_token_id": 2, "eos_token_id": 3, "pad_token_id": 1, "suppress_tokens": [9, 41],
        "begin_suppress_tokens": [56, 20], "max_length": 12, "is_multilingual": False,
    },
    "mamba": {"eos_token_id": 2, "pad_token_id": 0},
    "mamba2": {"eos_token_id": 2, "pad_token_id": 0},
}  # fmt: skip
KINDS = {
    "whisper": "WhisperForConditionalGeneration",
    "mamba": "AutoModelForCausalLM",
    "mamba2": "AutoModelForCausalLM",
}


def main() -> None:
    """Writes the file, or compares it with what the library says now."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the file")
    parser.add_argument("--check", action="store_true", help="compare with the file that is there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = {name: {"generation_config": config, **written(name, config)} for name, config in CASES.items()}
    if args.check:
        kept = json.loads(args.out.read_text())["cases"]
        other = [name for name in found if kept.get(name) != found[name]]
        if other:
            raise SystemExit(f"other tokens than were kept: {', '.join(other)}")
    else:
        about = f"greedy tokens of transformers {transformers.__version__}; {Path(__file__).name}"
        args.out.write_text(json.dumps({"about": about, "cases": found}) + "\n")
    for name, case in found.items():
        print(name, case["tokens"])


def written(name: str, generation: dict[str, Any]) -> dict[str, Any]:
    """Returns the prompts of a case and what follows them; the tokens that its decoder begins with are left out."""
    with np.load(DATA / "families" / f"{name}.npz") as case, tempfile.TemporaryDirectory() as folder:
        weights = {key.removeprefix("w:"): case[key] for key in case.files if key.startswith("w:")}
        save_file(weights, Path(folder) / "model.safetensors", metadata={"format": "pt"})
        (Path(folder) / "config.json").write_text(str(case["config"]))
        (Path(folder) / "generation_config.json").write_text(json.dumps(generation))
        model = getattr(transformers, KINDS.get(name, "AutoModelForSeq2SeqLM")).from_pretrained(
            folder, attn_implementation="eager", dtype=torch.float32
        )
        options: dict[str, Any] = {"do_sample": False, "num_beams": 1}
        if name == "whisper":
            frames = torch.tensor(case["i:frames"])
            rows = model.generate(input_features=frames, max_new_tokens=10, **options).tolist()
            return {"tokens": [ended(row, generation) for row in rows]}
        prompts = [ids[mask != 0] for ids, mask in zip(case["i:input_ids"], case["i:attention_mask"], strict=True)]
    tokens = []
    for prompt in prompts:
        (row,) = model.generate(torch.tensor(prompt)[None], max_new_tokens=MADE, **options).tolist()
        begun = len(prompt) if "Causal" in KINDS.get(name, "") else 1 + ("forced_bos_token_id" in generation)
        tokens.append(ended(row[begun:], generation))
    return {"prompts": [prompt.tolist() for prompt in prompts], "tokens": tokens}


def ended(row: list[int], generation: dict[str, Any]) -> list[int]:
    """Returns a row up to the token that ends it."""
    ends = np.atleast_1d(generation["eos_token_id"]).tolist()
    at = next((place for place, token in enumerate(row) if token in ends), len(row))
    return row[: at + 1]


if __name__ == "__main__":
    main()
