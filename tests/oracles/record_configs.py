"""Records that transformers reads the config.json that trustcore writes, as `tests/data/written_configs.json`.

The oracles are no test dependencies; they have a virtual environment of their own. In trustcore's, then in that one:

    PYTHONPATH=. python tests/oracles/record_configs.py --write configs.json
    pip install torch transformers==5.23.0
    python tests/oracles/record_configs.py --read configs.json --out tests/data/written_configs.json
    python tests/oracles/record_configs.py --read configs.json --out tests/data/written_configs.json --check

The first step writes the config.json that trustcore makes of each decoder in `tests/data/decoders` from its own
configuration alone. The second loads the weights of that decoder with it, and keeps it with the largest difference to
the logits that the library gave with the config.json of its own. The test holds trustcore to what was kept.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

DATA = Path(__file__).parents[1] / "data"
TOLERANCE = 1e-5


def main() -> None:
    """Writes what trustcore says, or what the library makes of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="file of the configurations that trustcore writes")
    parser.add_argument("--read", type=Path, help="that file")
    parser.add_argument("--out", type=Path, help="file of what the library says of them")
    parser.add_argument("--check", action="store_true", help="compare with the file that is there")
    args = parser.parse_args()
    if args.write is not None:
        from trustcore.models import DecoderConfig
        from trustcore.models.hugging_face import hugging_face_config

        written = {}
        for path in sorted((DATA / "decoders").glob("*.npz")):
            with np.load(path) as case:
                written[path.stem] = hugging_face_config(
                    DecoderConfig.from_hugging_face(json.loads(str(case["config"])))
                )
        args.write.write_text(json.dumps(written, indent=1) + "\n")
        return
    import transformers

    configs = json.loads(args.read.read_text())
    found = {name: {"config": config, "difference": difference(name, config)} for name, config in configs.items()}
    wrong = {name: entry["difference"] for name, entry in found.items() if entry["difference"] > TOLERANCE}
    if wrong:
        raise SystemExit(f"logits differ: {wrong}")
    if args.check:
        kept = json.loads(args.out.read_text())["configs"]
        other = [name for name in {**kept, **found} if kept.get(name, {}).get("config") != configs.get(name)]
        if other:
            raise SystemExit(f"trustcore writes another config.json than was kept: {', '.join(other)}")
    else:
        about = f"config.json of trustcore, read by transformers {transformers.__version__}; {Path(__file__).name}"
        args.out.write_text(json.dumps({"about": about, "configs": found}, indent=1) + "\n")
    print(f"{len(found)} configurations, differences up to {max(entry['difference'] for entry in found.values())}")


def difference(name: str, config: dict[str, Any]) -> float:
    """Returns the largest difference of logits between a model with that config.json and the recorded one."""
    import torch
    import transformers
    from safetensors.numpy import save_file

    with np.load(DATA / "decoders" / f"{name}.npz") as case, tempfile.TemporaryDirectory() as folder:
        weights = {key.removeprefix("weights/"): case[key] for key in case.files if key.startswith("weights/")}
        save_file(weights, Path(folder) / "model.safetensors", metadata={"format": "pt"})
        (Path(folder) / "config.json").write_text(json.dumps(config))
        options = {"attn_implementation": "sdpa" if config.get("alibi") else "eager", "dtype": torch.float32}
        model, told = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
        if any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")):
            raise SystemExit(f"{name}: {told}")
        with torch.no_grad():
            logits = model.eval()(input_ids=torch.tensor(case["tokens"]), use_cache=False).logits.numpy()
        return float(np.abs(logits - case["plain"]).max())


if __name__ == "__main__":
    main()
