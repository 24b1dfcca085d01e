"""Records what transformers computes for single layers: multimodal rotary positions, losses of routers.

The oracles are no test dependencies. In a virtual environment of its own (CPU):

    pip install torch transformers==5.23.0
    python tests/oracles/record_layers.py --out tests/data/layers.npz
    python tests/oracles/record_layers.py --out tests/data/layers.npz --check      compares instead of writing
"""

from __future__ import annotations

import argparse
import types
from pathlib import Path

import numpy as np
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from transformers.models.qwen2_vl import modeling_qwen2_vl as qwen2
from transformers.models.qwen3_vl import modeling_qwen3_vl as qwen3
from transformers.models.switch_transformers.modeling_switch_transformers import router_z_loss_func

HEAD, SECTIONS, THETA = 24, (4, 4, 4), 100.0
# A row of text, an image of 2 x 3 tokens, text, a video of 3 times 4 x 2 tokens, text; patches are merged 2 x 2.
GRIDS = {1: (1, 4, 6), 2: (3, 8, 4)}
TYPES = [0] * 3 + [1] * 6 + [0] * 2 + [2] * 24 + [0] * 2


def rotary() -> dict[str, np.ndarray]:
    kinds = torch.tensor([TYPES])
    holder = types.SimpleNamespace(
        config=types.SimpleNamespace(vision_config=types.SimpleNamespace(spatial_merge_size=2)),
    )
    holder.get_vision_position_ids = types.MethodType(qwen2.Qwen2VLModel.get_vision_position_ids, holder)
    grids = {kind: torch.tensor([grid]) for kind, grid in GRIDS.items()}
    positions, _ = qwen2.Qwen2VLModel.get_rope_index(holder, kinds, kinds, grids[1], grids[2])
    found = {"positions": positions.numpy()}
    query = torch.randn(1, 2, len(TYPES), HEAD)
    found["query"] = query.numpy()
    for name, module, rotary in (
        ("sections", qwen2, qwen2.Qwen2VLRotaryEmbedding),
        ("interleaved", qwen3, qwen3.Qwen3VLTextRotaryEmbedding),
    ):
        config = types.SimpleNamespace(
            max_position_embeddings=128,
            head_dim=HEAD,
            rope_parameters={"rope_type": "default", "rope_theta": THETA, "mrope_section": list(SECTIONS)},
        )
        cos, sin = rotary(config)(query, positions)
        found[name] = module.apply_rotary_pos_emb(query, query, cos, sin)[0].numpy()
    return found


def losses() -> dict[str, np.ndarray]:
    logits = [torch.randn(14, 6, requires_grad=True) for _ in range(3)]
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    found = {"logits": np.stack([layer.detach().numpy() for layer in logits]), "mask": mask.numpy()}
    for name, given in (("balance", None), ("masked", mask)):
        loss = load_balancing_loss_func(tuple(logits), 6, 2, given)
        gradients = torch.autograd.grad(loss, logits)
        found[name] = loss.detach().numpy()
        found[f"{name}_gradient"] = np.stack([g.numpy() for g in gradients])
    found["z"] = router_z_loss_func(logits[0][None]).detach().numpy()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    found = {f"rope/{k}": v for k, v in rotary().items()} | {f"router/{k}": v for k, v in losses().items()}
    if args.check:
        with np.load(args.out) as before:
            assert set(before.files) == set(found)
            for key, value in found.items():
                np.testing.assert_allclose(value, before[key], atol=1e-5, err_msg=key)
        print(f"{args.out}: as recorded")
        return
    np.savez_compressed(args.out, **found)
    print(f"{args.out}: {args.out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
