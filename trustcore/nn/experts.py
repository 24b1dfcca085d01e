"""Mixture of experts: a router sends each token through k of E feed-forward layers, and through one that all share.

    y = sum over the chosen e of share[e] * expert_e(x)   +   gate(x) * shared(x)

Tokens are sorted by expert and multiplied in one ragged product a matrix; no expert has a capacity, so no token is
dropped and rows of a batch do not influence each other. Shazeer et al., arXiv 1701.06538.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from trustcore.dtypes import accumulation_dtype
from trustcore.errors import ModelError
from trustcore.nn.linear import Linear
from trustcore.nn.mlp import MLP
from trustcore.nn.parameter import parameter
from trustcore.ops.activate import clipped_swiglu, gated
from trustcore.ops.experts import Scoring, by_expert, grouped_linear, route
from trustcore.ops.router_losses import attach_loss, balance, router_z_loss

_MOST = 1 << 16  # bounds what a number in a file can ask for


@dataclasses.dataclass(frozen=True)
class ExpertsConfig:
    """How a layer of experts is made.

    Attributes:
        count: E.
        active: k, experts a token goes to.
        hidden: F of one expert.
        scoring, normalize, scale, groups, active_groups, group_score: see `trustcore.ops.experts.route`.
        selection_bias: whether there is a bias that counts for the choice of experts alone.
        router_bias: whether the router has one.
        bias: whether the experts' products have one.
        scale_inputs: whether shares multiply what experts read, in place of their outputs (Llama 4).
        shared: F of the expert that every token goes through; 0: there is none.
        shared_gate: whether the shared expert's output is multiplied by a sigmoid of the token's own.
        clip: limit and alpha of `clipped_swiglu`, in place of the activation; None: the activation.
        balance_loss, z_loss: what multiplies this layer's `trustcore.ops.router_losses.balance` and `router_z_loss` of
            all rows of a call; their gradients are added to those of whatever is differentiated (`attach_loss`). 0 for
            inference, and where the losses are to be computed by hand (with a mask, say).
    """

    count: int
    active: int
    hidden: int
    scoring: Scoring = "softmax"
    normalize: bool = False
    scale: float = 1.0
    groups: int = 1
    active_groups: int = 1
    group_score: Literal["max", "top2"] = "max"
    selection_bias: bool = False
    router_bias: bool = False
    bias: bool = False
    scale_inputs: bool = False
    shared: int = 0
    shared_gate: bool = False
    clip: tuple[float, float] | None = None
    balance_loss: float = 0.0
    z_loss: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.active <= self.count:
            raise ModelError(f"experts: {self.active} of {self.count} are active; at least one, and no more than all.")
        if self.count > _MOST:
            raise ModelError(f"experts: {self.count} of them; more than {_MOST} are not believed.")
        if self.hidden <= 0 or self.shared < 0:
            raise ModelError(f"experts: hidden sizes {self.hidden} and {self.shared} (shared) must be positive.")
        if self.groups <= 0 or self.count % self.groups or not 0 < self.active_groups <= self.groups:
            raise ModelError(
                f"experts: {self.active_groups} of {self.groups} groups of {self.count} experts; groups must divide "
                "the experts, and at least one must be active."
            )
        if self.active_groups < self.groups and self.active > self.count // self.groups * self.active_groups:
            raise ModelError(f"experts: {self.active} active ones do not fit {self.active_groups} groups.")
        if self.group_score == "top2" and self.count // self.groups < 2 and self.active_groups < self.groups:
            raise ModelError("experts: groups are scored by their best two, and have one each.")


class ExpertLinear(nnx.Module):
    """E linear layers of one shape: `kernel [E, K, N]`, `bias [E, N]`; a kernel may be packed."""

    def __init__(
        self,
        count: int,
        in_features: int,
        out_features: int,
        *,
        bias: bool = False,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs | None = None,
    ):
        initializer = jax.nn.initializers.lecun_normal(batch_axis=0)
        self.kernel = parameter(initializer, (count, in_features, out_features), dtype, rngs)
        self.bias = parameter(jax.nn.initializers.zeros, (count, out_features), dtype, rngs) if bias else None

    def __call__(
        self, x: Float[Array, "R K"], experts: Int[Array, " R"], sizes: Int[Array, " E"]
    ) -> Float[Array, "R N"]:
        """Returns the product of each row with its expert's kernel; rows are sorted by expert."""
        y = grouped_linear(x, self.kernel.get_value(), sizes)
        return y if self.bias is None else y + jnp.take(self.bias.get_value().astype(y.dtype), experts, axis=0)


class ExpertMLP(nnx.Module):
    """E gated layers of one shape: `MLP` with an axis of experts; `config` says how they are made."""

    def __init__(
        self,
        features: int,
        config: ExpertsConfig,
        *,
        activation: str = "silu",
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs | None = None,
    ):
        made = {"bias": config.bias, "dtype": dtype, "rngs": rngs}
        self.gate = ExpertLinear(config.count, features, config.hidden, **made)
        self.up = ExpertLinear(config.count, features, config.hidden, **made)
        self.down = ExpertLinear(config.count, config.hidden, features, **made)
        self.activation, self.clip = activation, config.clip

    def __call__(
        self, x: Float[Array, "R D"], experts: Int[Array, " R"], sizes: Int[Array, " E"]
    ) -> Float[Array, "R D"]:
        """Returns each row's output of its expert; rows are sorted by expert."""
        gate, up = self.gate(x, experts, sizes), self.up(x, experts, sizes)
        if self.clip is None:
            hidden = gated(gate, up, self.activation)
        else:
            hidden = clipped_swiglu(gate, up, limit=self.clip[0], alpha=self.clip[1])
        return self.down(hidden, experts, sizes)


class Experts(nnx.Module):
    """A layer of gated feed-forward experts behind a router.

    Args:
        features: D.
        config: everything else about the layer.
        activation: of the experts, a name in `trustcore.ops.activate.ACTIVATIONS`.
        dtype: of the parameters.
        rngs: None leaves them abstract.

    Attributes:
        placement: None; or how the experts lie on a mesh, see `trustcore.nn.expert_parallel`.
    """

    def __init__(
        self,
        features: int,
        config: ExpertsConfig,
        *,
        activation: str = "silu",
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs | None = None,
    ):
        made = {"dtype": dtype, "rngs": rngs}
        c = config
        self.config = config
        self.placement: Any = None
        self.router = Linear(features, c.count, bias=c.router_bias, **made)
        zeros = jax.nn.initializers.zeros
        self.selection_bias = parameter(zeros, (c.count,), jnp.float32, rngs) if c.selection_bias else None
        self.experts = ExpertMLP(features, config, activation=activation, **made)
        shared = {"activation": activation, "gated": True, "bias": False, **made}
        self.shared = MLP(features, c.shared, **shared) if c.shared else None
        self.shared_gate = Linear(features, 1, **made) if c.shared_gate else None

    def __call__(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
        """Returns the layer's output, in the dtype of x."""
        c = self.config
        rows = x.reshape(-1, x.shape[-1])
        logits = self.router(rows)
        chosen, shares = route(
            logits,
            active=c.active,
            scoring=c.scoring,
            normalize=c.normalize,
            scale=c.scale,
            selection_bias=None if self.selection_bias is None else self.selection_bias.get_value(),
            groups=c.groups,
            active_groups=c.active_groups,
            group_score=c.group_score,
        )
        if self.placement is None:
            y = self._mixture(rows, chosen, shares)
        else:
            y = self.placement.mixture(self.experts, rows, chosen, shares, c.scale_inputs)
        if c.balance_loss or c.z_loss:
            y = attach_loss(y, self._losses(logits, chosen))
        if self.shared is not None:
            shared = self.shared(rows)
            if self.shared_gate is not None:
                shared = shared * jax.nn.sigmoid(self.shared_gate(rows))
            y = y + shared
        return y.reshape(x.shape)

    def _mixture(self, rows: jax.Array, chosen: jax.Array, shares: jax.Array) -> jax.Array:
        order, sizes = by_expert(chosen, self.config.count)
        given = rows_of_choices(rows, shares, order, self.config.scale_inputs)
        out = self.experts(given, jnp.take(chosen.reshape(-1), order), sizes)
        return sum_of_choices(out, shares, order, self.config.scale_inputs)

    def _losses(self, logits: jax.Array, chosen: jax.Array) -> jax.Array:
        wide = logits.astype(accumulation_dtype(logits.dtype))
        if self.config.scoring == "sigmoid":
            scores = jax.nn.sigmoid(wide)
            scores = scores / jnp.sum(scores, axis=-1, keepdims=True)  # DeepSeek-V3, arXiv 2412.19437, eq. 19
        else:
            scores = jax.nn.softmax(wide, axis=-1)
        return self.config.balance_loss * balance(scores, chosen) + self.config.z_loss * router_z_loss(wide)


def rows_of_choices(
    rows: Float[Array, "R D"], shares: Float[Array, "R k"], order: Int[Array, " Rk"], scale_inputs: bool
) -> Float[Array, "Rk D"]:
    """Returns what experts read: the row of each choice in turn; choices are sorted by expert, see `by_expert`."""
    given = jnp.take(rows, order // shares.shape[1], axis=0)
    return given * jnp.take(shares.reshape(-1), order)[:, None].astype(given.dtype) if scale_inputs else given


def sum_of_choices(
    out: Float[Array, "Rk D"], shares: Float[Array, "R k"], order: Int[Array, " Rk"], scale_inputs: bool
) -> Float[Array, "R D"]:
    """Returns of each row the sum of its choices' outputs, by their shares unless those have scaled the inputs."""
    out = jnp.take(out, jnp.argsort(order), axis=0).reshape(*shares.shape, -1)  # [R, k, D]
    return jnp.sum(out if scale_inputs else out * shares[..., None].astype(out.dtype), axis=1)
