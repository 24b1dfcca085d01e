"""Records what PEFT computes with random LoRA and DoRA adapters beside small models of `tests/data`.

The oracles are no test dependencies. In a virtual environment of its own (CPU):

    pip install torch transformers==5.23.0 peft==0.21.2
    python tests/oracles/record_adapters.py --data tests/data            writes tests/data/adapters.npz
    python tests/oracles/record_adapters.py --data tests/data --check    compares instead

For each case NAME/MODEL: the tensors of adapter_model.safetensors (`NAME/weights/TENSOR`), adapter_config.json
(`NAME/config`), and what the model computes of the tokens that its own file has (`NAME/logits`), float32: logits, of an
encoder hidden states.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers
from safetensors.numpy import load_file, save_file

# Name -> (model in tests/data/decoders, or in another folder beside it; arguments of LoraConfig).
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": (
        "qwen2",
        {
            "target_modules": ["q_proj", "v_proj", "down_proj"],
            "rank_pattern": {"layers.0.self_attn.q_proj": 2},
            "alpha_pattern": {"layers.1.mlp.down_proj": 3},
        },
    ),
    "dora": ("qwen2", {"target_modules": ["q_proj", "k_proj", "o_proj", "up_proj"], "use_dora": True}),
    "fused": ("phi3", {"target_modules": ["qkv_proj", "gate_up_proj"], "use_dora": True}),
    "grouped": ("gpt_neox", {"target_modules": ["query_key_value", "dense_4h_to_h"], "use_rslora": True}),
    "encoder": ("families/bert", {"target_modules": ["query", "dense"]}),
    "inputs_first": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
}


def record(data: Path, name: str) -> dict[str, Any]:
    base, options = CASES[name]
    encoder = base.startswith("families/")
    stored = data / f"{base}.npz" if encoder else data / "decoders" / f"{base}.npz"
    mark, tokens_name, task = (
        ("w:", "i:input_ids", "FEATURE_EXTRACTION") if encoder else ("weights/", "tokens", "CAUSAL_LM")
    )
    kind = transformers.AutoModel if encoder else transformers.AutoModelForCausalLM
    with np.load(stored) as file, tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        weights = {k.removeprefix(mark): file[k] for k in file.files if k.startswith(mark)}
        save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
        (path / "config.json").write_text(str(file["config"]))
        model = kind.from_pretrained(path, dtype=torch.float32).eval()
        tokens = torch.tensor(file[tokens_name]).long()
        torch.manual_seed(0)
        config = peft.LoraConfig(r=3, lora_alpha=5, init_lora_weights=False, task_type=task, **options)
        model = peft.get_peft_model(model, config).eval()
        with torch.no_grad():
            for key, value in model.named_parameters():
                if "lora" in key:
                    value.add_(0.2 * torch.rand_like(value))
            logits = model(input_ids=tokens)[0].numpy()
        model.save_pretrained(path / "adapter")
        tensors = load_file(path / "adapter" / "adapter_model.safetensors")
        found: dict[str, Any] = {f"{name}/weights/{key}": value for key, value in tensors.items()}
        found[f"{name}/config"] = np.array(as_recorded((path / "adapter" / "adapter_config.json").read_text(), base))
        found[f"{name}/logits"] = logits.astype(np.float32)
        found[f"{name}/base"] = np.array(base)
        return found


def as_recorded(config: str, base: str) -> str:
    """The same configuration each time: sets in order, and no folder of this machine."""
    entries = json.loads(config)
    entries["base_model_name_or_path"] = base
    return json.dumps({k: sorted(v) if k == "target_modules" else v for k, v in entries.items()}, indent=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, help="folder of the file; that of the data where none is given")
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    path = (args.out or args.data) / "adapters.npz"
    found = {key: value for name in CASES for key, value in record(args.data, name).items()}
    if not args.check:
        np.savez_compressed(path, **found)
        print(f"{path}: {len(found)} arrays, {path.stat().st_size / 1000:.0f} kB")
        return
    with np.load(path) as before:
        assert set(before.files) == set(found), set(before.files) ^ set(found)
        for key, value in found.items():
            if value.dtype.kind == "f":
                np.testing.assert_allclose(value, before[key], atol=1e-4, err_msg=key)
    print(f"{path}: as recorded")


if __name__ == "__main__":
    main()
