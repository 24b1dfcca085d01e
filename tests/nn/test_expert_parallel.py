"""Experts spread over devices: outputs and gradients of one device, on four and eight virtual CPUs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from trustcore.errors import ModelError
from trustcore.nn import Experts, ExpertsConfig, Linear, expert_parallel
from trustcore.nn.expert_parallel import mixture_of_some

SOURCE = """
    import jax, jax.numpy as jnp, numpy as np
    from flax import nnx
    from jax.sharding import AxisType
    from trustcore.nn import Experts, ExpertsConfig, expert_parallel

    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    assert len(jax.devices()) == 8
    layer = Experts(8, ExpertsConfig(8, 2, 6, shared=5, bias=True, normalize=True, balance_loss=0.1), rngs=nnx.Rngs(0))
    layer.experts.gate.bias.set_value(jax.random.normal(jax.random.key(3), (8, 6)))
    x = jax.random.normal(jax.random.key(1), (4, 3, 8))

    def total(layer, x):
        return jnp.sum(jnp.sin(layer(x)))

    quick = {"xla_backend_optimization_level": 0}
    run = jax.jit(lambda layer, x: (layer(x), jax.grad(total, (0, 1))(layer, x)), compiler_options=quick)
    one = jax.jit(lambda layer, x: layer(x), compiler_options=quick)
    expected, gradients = run(layer, x)
    cases = (
        ((8,), ("experts",), (), AxisType.Auto),
        ((2, 4), ("data", "experts"), ("data",), AxisType.Auto),
        ((2, 4), ("data", "experts"), ("data",), AxisType.Explicit),
    )
    for shape, names, rows, kind in cases:
        mesh = jax.make_mesh(shape, names, axis_types=(kind,) * len(shape))
        spread = expert_parallel(layer, mesh, rows=rows)
        kernel = spread.experts.up.kernel.get_value()
        assert kernel.sharding.shard_shape(kernel.shape)[0] == 8 // shape[-1] and layer.placement is None
        if kind == AxisType.Explicit:
            np.testing.assert_allclose(one(spread, x), expected, atol=1e-5)
            continue
        program = run.lower(spread, x).compile()
        found, more = program(spread, x)
        np.testing.assert_allclose(found, expected, atol=1e-5)
        for a, b in zip(jax.tree.leaves(more), jax.tree.leaves(gradients), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)
        if not rows:  # outputs are summed over the devices; no device gathers the experts of others
            assert "all-reduce" in program.as_text() and "all-gather" not in program.as_text()
    np.testing.assert_allclose(one(spread, x[:1, :1]), one(layer, x[:1, :1]), atol=1e-5)  # one row is not split

    print("spread")
"""


MODELS = """
    import jax, jax.numpy as jnp, numpy as np
    from jax.sharding import AxisType
    from trustcore.models import random_model, scan_layers
    from trustcore.nn import expert_parallel
    import trustcore

    one = jax.jit(lambda layer, x: layer(x), compiler_options={"xla_backend_optimization_level": 0})
    sizes = {"vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
             "intermediate_size": 32, "num_local_experts": 4, "num_experts_per_tok": 2}
    model = random_model({"model_type": "mixtral", **sizes})
    mesh = jax.make_mesh((2, 4), ("data", "experts"), axis_types=(AxisType.Auto,) * 2)
    tokens = jnp.asarray([[1, 2, 3, 4], [5, 6, 7, 8]])
    packed = jax.tree.map(lambda leaf: leaf, model)
    for block in packed.blocks:
        for part in (block.mlp.experts.gate, block.mlp.experts.up, block.mlp.experts.down):
            part.kernel.set_value(trustcore.QuantizedArray.quantize(part.kernel.get_value(), "q8_0"))
    for each in (model, packed):
        spread = expert_parallel(each, mesh, rows=("data",))
        for form in (spread, scan_layers(spread)):
            np.testing.assert_allclose(one(form, tokens), one(each, tokens), atol=2e-5)
    print("spread")
"""


def test_spread_experts_compute_what_one_device_does(fresh_python):
    assert fresh_python(SOURCE, devices=8).endswith("spread\n")


@pytest.mark.slow
def test_models_with_spread_experts_float_and_packed_listed_and_scanned(fresh_python):
    assert fresh_python(MODELS, devices=8).endswith("spread\n")


@pytest.mark.parametrize("scale_inputs", [False, True])
def test_some_experts_add_up_to_all(scale_inputs):
    layer = Experts(8, ExpertsConfig(6, 3, 5, bias=True), rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    rows = jnp.asarray(rng.standard_normal((7, 8)), jnp.float32)
    chosen = jnp.asarray(np.stack([rng.permutation(6)[:3] for _ in range(7)]))
    shares = jnp.asarray(rng.random((7, 3)), jnp.float32)
    parts = []
    for first in (0, 2, 4):
        own = jax.tree.map(lambda leaf, first=first: leaf[first : first + 2], layer.experts)
        parts.append(mixture_of_some(own, rows, chosen - first, shares, 2, scale_inputs))
    whole = mixture_of_some(layer.experts, rows, chosen, shares, 6, scale_inputs)
    np.testing.assert_allclose(sum(parts), whole, atol=1e-5)
    assert all(np.any(part) for part in parts)


def test_what_cannot_be_spread():
    mesh = jax.make_mesh((1,), ("experts",))
    layer = Experts(8, ExpertsConfig(6, 2, 5), rngs=nnx.Rngs(0))
    with pytest.raises(ModelError, match="the mesh has no axis 'model'; it has experts"):
        expert_parallel(layer, mesh, axis="model")
    with pytest.raises(ModelError, match="rows and experts are both to be split over 'experts'"):
        expert_parallel(layer, mesh, rows=("experts",))
    with pytest.raises(ModelError, match="a Linear without experts has nothing to spread"):
        expert_parallel(Linear(2, 2, rngs=nnx.Rngs(0)), mesh)
    abstract = jax.sharding.AbstractMesh((4,), ("experts",))
    with pytest.raises(ModelError, match="6 experts do not divide over 4 devices"):
        expert_parallel(layer, abstract)
