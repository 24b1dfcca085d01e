"""The names that a decoder's weights have in checkpoints: one table, to be read in either direction.

`{}` stands for the layer. A path that ends in `kernel` is a matrix that files hold transposed, `[out, in]`.
"""

from __future__ import annotations

from typing import NamedTuple


class Name(NamedTuple):
    """One weight: its path in the module, in GGUF files, in Hugging Face's files."""

    path: str
    gguf: str
    hugging_face: str


DECODER: tuple[Name, ...] = (
    Name("embedding.table", "token_embd.weight", "model.embed_tokens.weight"),
    Name("norm.weight", "output_norm.weight", "model.norm.weight"),
    Name("output.kernel", "output.weight", "lm_head.weight"),
)

_LAYER: tuple[Name, ...] = (
    Name("attention_norm.weight", "attn_norm.weight", "input_layernorm.weight"),
    Name("attention.query.kernel", "attn_q.weight", "self_attn.q_proj.weight"),
    Name("attention.query.bias", "attn_q.bias", "self_attn.q_proj.bias"),
    Name("attention.key.kernel", "attn_k.weight", "self_attn.k_proj.weight"),
    Name("attention.key.bias", "attn_k.bias", "self_attn.k_proj.bias"),
    Name("attention.value.kernel", "attn_v.weight", "self_attn.v_proj.weight"),
    Name("attention.value.bias", "attn_v.bias", "self_attn.v_proj.bias"),
    Name("attention.out.kernel", "attn_output.weight", "self_attn.o_proj.weight"),
    Name("attention.out.bias", "attn_output.bias", "self_attn.o_proj.bias"),
    Name("mlp_norm.weight", "ffn_norm.weight", "post_attention_layernorm.weight"),
    Name("mlp.gate.kernel", "ffn_gate.weight", "mlp.gate_proj.weight"),
    Name("mlp.gate.bias", "ffn_gate.bias", "mlp.gate_proj.bias"),
    Name("mlp.up.kernel", "ffn_up.weight", "mlp.up_proj.weight"),
    Name("mlp.up.bias", "ffn_up.bias", "mlp.up_proj.bias"),
    Name("mlp.down.kernel", "ffn_down.weight", "mlp.down_proj.weight"),
    Name("mlp.down.bias", "ffn_down.bias", "mlp.down_proj.bias"),
)

DECODER_LAYER: tuple[Name, ...] = tuple(
    Name(f"blocks.{{}}.{n.path}", f"blk.{{}}.{n.gguf}", f"model.layers.{{}}.{n.hugging_face}") for n in _LAYER
)

# In files, but not weights: tables that are computed from the configuration, or read with it.
NOT_WEIGHTS: tuple[str, ...] = ("rope_freqs.weight", ".rotary_emb.inv_freq", ".attn_rot_embd.weight")


def decoder_names(layers: int) -> tuple[Name, ...]:
    """Returns the names of all weights of a decoder of that many layers."""
    numbered = (Name(*(part.format(i) for part in name)) for i in range(layers) for name in DECODER_LAYER)
    return (*DECODER, *numbered)
