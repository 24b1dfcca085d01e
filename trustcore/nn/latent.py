"""Multi-head latent attention: keys and values of all heads come from one short vector a token.

    c = norm(x W_c) [R],  r = turn(x W_r) [P]            what a cache holds of a token, R + P numbers for all heads
    k_n = [c U_n, r],  v_n = c V_n,  q_n = [q_n', turn(q_n'')]
    score = scale * (q_n' . c U_n + q_n'' . r)           = scale * (q_n' U_n^T . c + q_n'' . r)

Without a cache keys and values are made for each head; with one the products are taken in the other order (the right
side), so that attention reads the latents as one key head that all query heads share, and makes nothing of a token but
what is stored. DeepSeek-V2, arXiv 2405.04434, section 2.1.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from trustcore.errors import ModelError
from trustcore.nn.attention import Turn
from trustcore.nn.linear import Linear, project
from trustcore.nn.norm import RMSNorm
from trustcore.ops.attention import LayerCache, attention, cached_attention
from trustcore.ops.rope import RopeConfig, rotate
from trustcore.ops.weight import Weight


@dataclasses.dataclass(frozen=True)
class LatentConfig:
    """Sizes of latent attention; the size P of the turned part is that of its rope.

    Attributes:
        rank: R, of the latent vector of keys and values.
        plain_dim: channels of a head's key that positions do not turn.
        value_dim: channels of a head's value.
        query_rank: of the latent vector of queries; None: queries are made directly.
    """

    rank: int
    plain_dim: int
    value_dim: int
    query_rank: int | None = None

    def __post_init__(self) -> None:
        sizes = (self.rank, self.plain_dim, self.value_dim, 1 if self.query_rank is None else self.query_rank)
        if min(sizes) <= 0:
            raise ModelError(f"latent attention: sizes must be positive, got {self}.")


class LatentAttention(nnx.Module):
    """Causal multi-head latent attention.

    Args:
        features: D.
        heads: N.
        config: sizes.
        rope: how positions turn the shared part of the keys and its counterpart in the queries.
        bias: whether the products down to the latents, and the output product, have one.
        scale: of the scores; None: `(plain_dim + P) ** -0.5`.
        norm_eps: of the norms of the latents.
        dtype: of the parameters.
        rngs: None leaves them abstract.
    """

    def __init__(
        self,
        features: int,
        heads: int,
        config: LatentConfig,
        *,
        rope: RopeConfig,
        bias: bool = False,
        scale: float | None = None,
        norm_eps: float = 1e-6,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs | None = None,
    ):
        made = {"dtype": dtype, "rngs": rngs}
        c, query_dim = config, config.plain_dim + rope.size
        if c.query_rank is None:
            self.query = Linear(features, heads * query_dim, **made)
            self.query_down = self.query_norm = self.query_up = None
        else:
            self.query = None
            self.query_down = Linear(features, c.query_rank, bias=bias, **made)
            self.query_norm = RMSNorm(c.query_rank, eps=norm_eps, **made)
            self.query_up = Linear(c.query_rank, heads * query_dim, **made)
        self.latent = Linear(features, c.rank, bias=bias, **made)
        self.latent_norm = RMSNorm(c.rank, eps=norm_eps, **made)
        self.turned = Linear(features, rope.size, bias=bias, **made)
        self.key_up = Linear(c.rank, heads * c.plain_dim, **made)
        self.value_up = Linear(c.rank, heads * c.value_dim, **made)
        self.out = Linear(heads * c.value_dim, features, bias=bias, **made)
        self.config, self.heads, self.rope = config, heads, rope
        self.scale = query_dim**-0.5 if scale is None else scale

    def __call__(
        self,
        x: Float[Array, "B T D"],
        turn: Turn | None,
        positions: Int[Array, "B T"],
        cache: LayerCache | None = None,
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        """Returns the layer's output and the extended cache; arguments as of `Attention`.

        The cache has one head: keys of `rank + P` channels, values of `rank`.
        """
        assert turn is not None
        query, latent, turned = self._projected(x)
        query = query.reshape(*x.shape[:2], self.heads, -1)
        plain, rotated = jnp.split(query, [self.config.plain_dim], axis=-1)
        rotated = rotate(rotated, turn, self.rope)
        latent = self.latent_norm(latent)
        turned = rotate(turned[:, :, None], turn, self.rope)  # [B, T, 1, P]
        if cache is None:
            key, value = (y.reshape(*x.shape[:2], self.heads, -1) for y in project(latent, self.key_up, self.value_up))
            turned = jnp.broadcast_to(turned, rotated.shape)
            y = attention(
                jnp.concatenate([plain, rotated], -1),
                jnp.concatenate([key, turned], -1),
                value,
                query_positions=positions,
                key_positions=positions,
                scale=self.scale,
            )
        else:
            key_up, value_up = (self._by_head(layer, x.dtype) for layer in (self.key_up, self.value_up))
            query = jnp.concatenate([jnp.einsum("btnh,rnh->btnr", plain, key_up), rotated], -1)
            latent = latent[:, :, None]  # [B, T, 1, R]
            key = jnp.concatenate([latent, turned], -1)
            y, cache = cached_attention(query, key, latent, cache, positions[:, 0], scale=self.scale)
            y = jnp.einsum("btnr,rnh->btnh", y, value_up)
        return self.out(y.reshape(*y.shape[:2], -1)), cache

    def _projected(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        if self.query is not None:
            query, latent, turned = project(x, self.query, self.latent, self.turned)
            return query, latent, turned
        assert self.query_down is not None and self.query_norm is not None and self.query_up is not None
        down, latent, turned = project(x, self.query_down, self.latent, self.turned)
        return self.query_up(self.query_norm(down)), latent, turned

    def _by_head(self, layer: Linear, dtype: Any) -> jax.Array:
        """The kernel as [R, N, H]; a packed one is decoded, as products head by head need it."""
        kernel = layer.kernel.get_value()
        kernel = kernel.dequantize() if isinstance(kernel, Weight) else kernel
        return kernel.astype(dtype).reshape(kernel.shape[0], self.heads, -1)
