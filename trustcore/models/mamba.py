"""Language models of Mamba and Mamba-2 layers: no attention, a state of fixed size in place of a cache.

    h = words[tokens];  h += mamba(norm(h))  for each block;  logits = output(norm(h))

Gu and Dao, arXiv 2312.00752; Dao and Gu, arXiv 2405.21060.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from trustcore.errors import ModelError
from trustcore.models.model import Model, run, sample_tokens
from trustcore.models.name_map import kernel, linear, plain, window
from trustcore.models.names import Names, under
from trustcore.models.registry import Family
from trustcore.models.values import Values
from trustcore.models.writing import Reads, behind_last
from trustcore.nn.embedding import Embedding
from trustcore.nn.linear import Linear
from trustcore.nn.mamba import Mamba, Mamba2, MambaState
from trustcore.nn.norm import RMSNorm
from trustcore.nn.stack import Stack, run_blocks
from trustcore.ops.activate import activation

States = tuple[MambaState, ...]

MOST = 1 << 20  # tokens of a row: positions have no end


@dataclasses.dataclass(frozen=True)
class MambaConfig:
    """Shape of a Mamba.

    Attributes:
        vocab_size: V.
        features: D.
        layers: L.
        inner: channels inside a layer.
        state_size: S.
        window: taps of the convolution.
        rank: Mamba: of the step sizes' product.
        heads, groups: Mamba-2: N and G.
        limits: Mamba-2: least and largest step size.
        bias: whether a layer's outer products have one.
        conv_bias: whether the convolution has one.
        tied: whether the output layer is the embedding table.
        activation: behind the convolution.
        norm_eps: epsilon of the norms.
        family: "mamba" or "mamba2".
    """

    vocab_size: int
    features: int
    layers: int
    inner: int
    state_size: int
    window: int = 4
    rank: int = 1
    heads: int = 1
    groups: int = 1
    limits: tuple[float, float] = (0.0, math.inf)
    bias: bool = False
    conv_bias: bool = True
    tied: bool = True
    activation: str = "silu"
    norm_eps: float = 1e-5
    family: str = "mamba"

    def __post_init__(self) -> None:
        if self.inner % self.heads or self.heads % self.groups:
            raise ModelError(
                f"config: {self.inner} channels, {self.heads} heads and {self.groups} groups; each must divide the one "
                "before it."
            )
        activation(self.activation)

    @classmethod
    def from_hugging_face(cls, config: Mapping[str, Any], names: Collection[str] = ()) -> MambaConfig:
        """Returns the configuration that a config.json describes; `names` of tensors tell what is there.

        Raises:
            ModelError: a value is missing, impossible, or asks for what is not supported.
        """
        values = Values(config, "config.json")
        family = values.text("model_type", "mamba")
        second = family == "mamba2"
        features = values.integer("hidden_size", 4096 if second else 768)
        expand = values.integer("expand", 2)
        inner = features * expand if second else values.integer("intermediate_size", features * expand)
        rank = values.get("time_step_rank")
        rank = math.ceil(features / 16) if rank in (None, "auto") else values.integer("time_step_rank")
        heads = values.integer("num_heads", 128) if second else 1
        if second and heads * values.integer("head_dim", 64) != inner:
            raise ModelError(
                f"config.json: {heads} heads of {values.integer('head_dim', 64)} channels do not make {inner}, "
                f"hidden_size {features} times expand {expand}."
            )
        limits = values.get("time_step_limit") or [0.0, math.inf]
        good = isinstance(limits, list) and len(limits) == 2
        limits = [math.inf if n == {"__float__": "Infinity"} else n for n in limits] if good else limits
        if not good or not all(isinstance(n, int | float) for n in limits) or not 0 <= limits[0] <= limits[1]:
            raise ModelError(f"config.json: time_step_limit is {limits!r}; expected two rising numbers from 0 on.")
        has_output = any(name.endswith("lm_head.weight") for name in names)
        return cls(
            vocab_size=values.integer("vocab_size", 32768 if second else 50280),
            features=features,
            layers=values.integer("num_hidden_layers", 64 if second else 32),
            inner=inner,
            state_size=values.integer("state_size", 128 if second else 16),
            window=values.integer("conv_kernel", 4),
            rank=rank,
            heads=heads,
            groups=values.integer("n_groups", 8) if second else 1,
            limits=(float(limits[0]), float(limits[1])),
            bias=values.flag("use_bias", False),
            conv_bias=values.flag("use_conv_bias", True),
            tied=values.flag("tie_word_embeddings", not second) or not has_output,
            activation=values.text("hidden_act", "silu"),
            norm_eps=values.number("layer_norm_epsilon", 1e-5),
            family=family,
        )


class Block(nnx.Module):
    """One layer, behind a norm and added to the stream."""

    def __init__(self, config: MambaConfig, *, dtype: Any = jnp.float32, rngs: nnx.Rngs | None = None):
        options = {
            "state_size": config.state_size,
            "window": config.window,
            "bias": config.bias,
            "conv_bias": config.conv_bias,
            "activation": config.activation,
            "dtype": dtype,
            "rngs": rngs,
        }
        self.norm = RMSNorm(config.features, eps=config.norm_eps, dtype=dtype, rngs=rngs)
        if config.family == "mamba2":
            size, eps = config.inner // config.heads, config.norm_eps
            more = {"groups": config.groups, "limits": config.limits, "norm_eps": eps}
            self.mixer = Mamba2(config.features, config.heads, size, **more, **options)
        else:
            self.mixer = Mamba(config.features, config.inner, rank=config.rank, **options)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        state: MambaState | None,
        mask: jax.Array | None,
        lengths: jax.Array | None = None,
    ) -> tuple[Float[Array, "B T D"], MambaState]:
        """Returns the stream and the layer's state after these tokens."""
        y, state = self.mixer(self.norm(x), state, mask, lengths)
        return x + y, state


class MambaModel(Model):
    """A language model of Mamba layers.

    Args:
        config: its shape.
        dtype: of activations, and of the parameters that `rngs` draws.
        rngs: None leaves the parameters abstract, for a loader to fill.
    """

    stacks = ("blocks",)
    reads: Reads = "prompt"
    chooses_cache = False

    def __init__(self, config: MambaConfig, *, dtype: Any = jnp.float32, rngs: nnx.Rngs | None = None):
        super().__init__(config, dtype)
        made = {"dtype": dtype, "rngs": rngs}
        self.words = Embedding(config.vocab_size, config.features, **made)
        self.blocks: nnx.List[Any] | Stack = nnx.List([Block(config, **made) for _ in range(config.layers)])
        self.norm = RMSNorm(config.features, eps=config.norm_eps, **made)
        self.output = None if config.tied else Linear(config.features, config.vocab_size, **made)

    def __call__(
        self, tokens: Int[Array, "B T"], states: States | None = None, mask: Any = None
    ) -> tuple[Float[Array, "B T V"], States]:
        """Returns float32 logits behind each token, and the layers' states after the last one.

        Args:
            tokens: T tokens of B rows; one of them for a step.
            states: what an earlier call returned; None: nothing was seen.
            mask: `[B, T]`, zero or False where a token is padding, on the left; None: all count.

        Differentiable in the float weights. States are of one size, however long the row.
        """
        counts = None if mask is None else jnp.asarray(mask).astype(bool).astype(self.dtype)[..., None]
        x, after = self._stream(tokens, states, counts)
        return self._logits(x), after

    def _stream(
        self, tokens: jax.Array, states: States | None, counts: jax.Array | None, lengths: jax.Array | None = None
    ) -> tuple[jax.Array, States]:
        x = self.words(tokens).astype(self.dtype)
        x, after = run_blocks(self.blocks, lambda block, x, state: run(block, x, state, counts, lengths), x, states)
        return self.norm(x), after

    def _logits(self, x: jax.Array) -> jax.Array:
        logits = self.words.unembed(x) if self.output is None else self.output(x)
        return logits.astype(jnp.float32)

    @property
    def limits(self) -> tuple[int, int]:
        """See `Writer`; a state has room for any number of tokens."""
        return MOST, MOST

    def encoder_input(self, prompts: Any) -> None:
        """There is no encoder."""

    def begin(self, source: Any, mask: Any, *, batch: int, slots: int, dtype: Any) -> States:
        """See `Writer`; states of one size, whatever there is to be room for."""
        token = jnp.zeros((batch, 1), jnp.int32)
        shapes = jax.eval_shape(lambda: self._stream(token, None, None)[1])
        return jax.tree.map(lambda state: jnp.zeros(state.shape, state.dtype), shapes)

    def step(
        self, tokens: Int[Array, "B T"], lengths: Int[Array, " B"], kept: States
    ) -> tuple[Float[Array, "B V"], States]:
        """See `Writer`."""
        x, after = self._stream(tokens, kept, None, lengths)
        return self._logits(behind_last(x, lengths))[:, 0], after

    def example(self) -> tuple[Any, ...]:
        """See `Model.example`."""
        return (sample_tokens(self.config.vocab_size),)


_MIXER = (
    *linear("mixer.input", "mixer.in_proj"),
    window("mixer.conv", "mixer.conv1d.weight"),
    plain("mixer.conv_bias", "mixer.conv1d.bias"),
    plain("mixer.decay", "mixer.A_log"),
    plain("mixer.skip", "mixer.D"),
    *linear("mixer.out", "mixer.out_proj"),
)
_OWN = {
    "mamba": (kernel("mixer.select.kernel", "mixer.x_proj.weight"), *linear("mixer.steps", "mixer.dt_proj")),
    "mamba2": (plain("mixer.steps", "mixer.dt_bias"), plain("mixer.norm", "mixer.norm.weight")),
}


def names(config: MambaConfig) -> Names:
    """Returns the names of the weights in checkpoints."""
    return Names(
        (
            plain("words.table", "embeddings.weight", others=("embedding.weight",)),
            plain("norm.weight", "norm_f.weight"),
        ),
        under("blocks.{}.", "layers.{}.", (plain("norm.weight", "norm.weight"), *_MIXER, *_OWN[config.family])),
        (kernel("output.kernel", "lm_head.weight"),),
        prefix="backbone.",
        prefixes=("",),
    )


FAMILY = Family(MambaConfig.from_hugging_face, MambaModel, names)
