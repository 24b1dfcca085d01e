"""From a tree of arrays through training to packed weights: what is selected, what moves, what is packed."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.models.small import CONFIG, random_decoder, some_tokens
from trustcore.errors import ImplementationError, QuantizationError
from trustcore.ops.linear import linear, linear_many
from trustcore.quant import QuantizedArray
from trustcore.quant.activations import ActivationQuantized
from trustcore.quant.training import (
    FakeQuantized,
    QuantizedInputs,
    Scheme,
    calibrate,
    convert,
    fake_quantize,
    kinds,
    prepare,
)
from trustcore.quant.training.scheme import FORMATS

K, N = 256, 200
GRAINS = ("tensor", "channel", "g32", "g128", "128x128")


def tree(seed=0):
    a, b = np.random.default_rng(seed).standard_normal((2, K, N)).astype(np.float32)
    return {"up": {"kernel": jnp.asarray(a), "bias": jnp.ones(N)}, "norm": jnp.ones(K), "table": jnp.asarray(b.T)}


def moved(weight, seed=1):
    """The weight after a pretended step: every leaf has moved."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x * jnp.asarray(rng.uniform(0.8, 1.25, x.shape), x.dtype), weight)


def packings():
    for name in FORMATS:
        for grain in GRAINS:
            quick = grain == "g32" or (name, grain) in (
                ("int4", "tensor"),
                ("int8", "channel"),
                ("fp8_e4m3", "128x128"),
            )
            yield pytest.param(f"{name}:{grain}", marks=() if quick else pytest.mark.slow)
            if name.startswith("int") and name != "int1":
                yield pytest.param(f"{name}:{grain}:asym", marks=() if quick else pytest.mark.slow)


@pytest.mark.parametrize("text", list(packings()))
def test_packed_weights_decode_to_what_was_trained_bit_for_bit(text):
    averaged = text.startswith(("int1", "ternary"))  # whose range is a mean: its sum has another order under jit
    for method, transposed in (("lsq", False), ("ste" if averaged else "minmax", True)):
        array = tree()["up"]["kernel"]
        logical = array.T if transposed else array
        weight = moved(FakeQuantized.of(logical, Scheme.parse(text), method=method, transposed=transposed))
        packed = weight.packed()
        assert isinstance(packed, QuantizedArray) and packed.shape == weight.shape
        trained = jax.jit(lambda w: w.dequantize())(weight)
        np.testing.assert_array_equal(packed.dequantize(), trained)
    bits = packed.spec.bits  # type: ignore[union-attr]
    assert sum(packed.fields[plane.name].nbytes for plane in packed.spec.planes) == K * N * bits // 8  # type: ignore


def test_a_tree_of_dicts_is_prepared_trained_and_converted():
    made = prepare(tree(), "int4:g64")
    assert isinstance(made["up"]["kernel"], FakeQuantized) and isinstance(made["table"], FakeQuantized)
    assert made["table"].transposed and made["table"].shape == (N, K) and made["norm"] is not None
    x, ids = jnp.asarray(np.random.default_rng(2).standard_normal((5, K)), jnp.float32), jnp.asarray([3, 0, 135, 900])

    def outputs(tree):
        rows = tree["table"].take(ids)
        return linear(x, tree["up"]["kernel"], tree["up"]["bias"]), rows, linear(rows, tree["table"].T)

    gradients = jax.grad(lambda t: sum(jnp.sum(y**2) for y in outputs(t)))(made)
    for path in (("up", "kernel"), ("table",)):
        leaf = gradients
        for key in path:
            leaf = leaf[key]
        assert all(jnp.any(leaf.leaves[name] != 0) for name in ("values", "scale"))
    optimizer = optax.adamw(1e-2)
    with jax.numpy_dtype_promotion("standard"):  # optax relies on it
        updates, _ = optimizer.update(gradients, optimizer.init(made), made)
    trained = optax.apply_updates(made, updates)
    packed = convert(trained)
    assert packed["table"].transposed and packed["up"]["bias"] is trained["up"]["bias"]
    assert packed["up"]["kernel"].description == "int4:g64"
    for ours, theirs in zip(jax.jit(outputs)(packed), outputs(trained), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_lsq_divides_the_gradient_of_a_scale():
    """Section 2.2: by sqrt(N Q_P), N the weights that share it. The offset of LSQ+ with it."""
    array, x = tree()["up"]["kernel"], jnp.ones((1, K))
    for text, shared, high in (("int4:g64", 64, 7), ("int4:tensor:asym", K * N, 15)):
        weight = FakeQuantized.of(array, Scheme.parse(text))
        found = jax.grad(lambda w: jnp.sum((x @ w) ** 2))(weight)

        def loss(scale, offset, weight=weight):
            return jnp.sum((x @ fake_quantize(weight.values, scale, offset, format=weight.scheme)) ** 2)

        offset = weight.leaves.get("offset")
        expected = jax.grad(loss, (0, 1) if offset is not None else 0)(weight.leaves["scale"], offset)
        factor = (shared * high) ** -0.5
        scale = expected[0] if offset is not None else expected
        np.testing.assert_allclose(found.leaves["scale"], scale * factor, rtol=1e-4, atol=1e-4)
        if offset is not None:
            np.testing.assert_allclose(found.leaves["offset"], expected[1] * factor, rtol=1e-4, atol=1e-4)


def test_a_scale_that_trains_to_nothing_stays_positive():
    weight = FakeQuantized.of(tree()["up"]["kernel"], Scheme.parse("int4"))
    gone = weight.replace(scale=-weight.leaves["scale"])
    assert jnp.isfinite(gone.dequantize()).all() and (gone.packed().fields["scale"] > 0).all()
    gradient = jax.grad(lambda w: jnp.sum((jnp.ones((1, K)) @ w) ** 2))(gone)
    assert jnp.isfinite(gradient.leaves["scale"]).all()


@pytest.mark.parametrize("method", ("ste", "minmax"))
def test_scales_that_are_not_trained_have_no_gradient(method):
    weight = FakeQuantized.of(tree()["up"]["kernel"], Scheme.parse("int4:g32:asym"), method=method)
    gradient = jax.grad(lambda w: jnp.sum(w.dequantize() ** 2))(weight)
    assert all((leaf == 0).all() for name, leaf in gradient.leaves.items() if name != "values")
    assert jnp.any(gradient.values != 0)
    words = kinds({"w": weight, "b": jnp.ones(3), "n": jnp.ones(3, jnp.int32)})
    assert words["b"] == "weight" and words["n"] == "fixed" and words["w"].leaves["values"] == "weight"
    assert words["w"].leaves.get("scale", "fixed") == "fixed"


def test_scales_need_no_weight_decay():
    made = prepare(tree(), "int4", activations="int8:token")
    words = kinds(made)
    optimizer = optax.multi_transform(
        {"weight": optax.adamw(0.1, weight_decay=0.5), "scale": optax.adam(0.0), "fixed": optax.set_to_zero()}, words
    )
    gradients = jax.tree.map(jnp.ones_like, made)
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = optimizer.update(gradients, optimizer.init(made), made)
    assert jnp.any(updates["table"].values != 0) and (updates["table"].leaves["scale"] == 0).all()


@pytest.mark.parametrize("method", ("lsq", "pact"))
def test_activations_are_calibrated_trained_and_converted(method):
    model = random_decoder(dataclasses.replace(CONFIG, layers=1))
    made = prepare(model, "int4:g32", method="ste", activations="int8", activation_method=method)
    tokens = some_tokens()
    assert jnp.isnan(jax.jit(lambda m: m(tokens))(made)).all()  # not calibrated: loudly wrong
    with pytest.raises(QuantizationError, match=r"convert: no scale for the inputs of blocks\.0.*call calibrate"):
        convert(made)
    made = calibrate(made, jax.jit(lambda m, t: m(t)), tokens)
    scale = made.blocks[0].mlp.up.kernel.get_value().leaves["input_scale"]
    assert scale > 0 and scale != made.blocks[0].mlp.down.kernel.get_value().leaves["input_scale"]
    exact, near = jax.jit(lambda m: m(tokens))(model), jax.jit(lambda m: m(tokens))(made)
    assert 0 < jnp.sqrt(jnp.mean((exact - near) ** 2)) < 0.5 * jnp.std(exact)
    assert made.embedding.table.get_value().inputs is None  # looked up alone
    gradient = jax.jit(jax.grad(lambda m: jnp.mean(m(tokens) ** 2)))(made)
    assert jnp.isfinite(gradient.blocks[0].mlp.up.kernel.get_value().leaves["input_scale"])
    packed = convert(made)
    assert isinstance(packed.blocks[0].mlp.up.kernel.get_value(), QuantizedInputs)
    np.testing.assert_allclose(jax.jit(lambda m: m(tokens))(packed), near, atol=2e-2)


@pytest.mark.parametrize("inputs", ("int8", "int8:token", "fp8_e4m3:token"))
def test_codes_are_multiplied_by_codes_where_the_weight_allows(inputs):
    x = jnp.asarray(np.random.default_rng(4).standard_normal((8, K)), jnp.float32)
    format = inputs.split(":")[0]
    made = prepare({"w": tree()["up"]["kernel"]}, format, method="minmax", activations=inputs)
    if inputs == "int8":
        made = calibrate(made, lambda t: linear(x, t["w"]))
    packed = convert(made)
    assert isinstance(packed["w"], ActivationQuantized) and packed["w"].inputs == format
    np.testing.assert_allclose(linear(x, packed["w"]), linear(x, made["w"]), rtol=1e-4, atol=2e-3)


def test_a_model_under_scan_and_vmap():
    """Stacked layers: leaves have a leading axis, and slicing needs no special case."""
    stack = jnp.asarray(np.random.default_rng(0).standard_normal((3, K, K)) / 16, jnp.float32)
    made = prepare({"kernel": stack}, "int4:g32", where=lambda path, a: a.ndim == 3)["kernel"]
    x = jnp.ones((4, K))
    carried = jax.lax.scan(lambda x, w: (linear(x, w), None), x, made)[0]
    step = x
    for i in range(3):
        step = step @ made.dequantize()[i]
    np.testing.assert_allclose(carried, step, rtol=1e-4, atol=1e-5)
    assert jax.vmap(linear, (None, 0))(x, made).shape == (3, 4, K)
    packed = convert({"kernel": made})["kernel"]
    np.testing.assert_array_equal(packed.dequantize(), made.dequantize())
    np.testing.assert_allclose(
        jax.lax.scan(lambda x, w: (linear(x, w), None), x, packed)[0], step, rtol=1e-4, atol=1e-5
    )


def test_formats_by_pattern_and_products_in_one_call():
    made = prepare(tree(), {"up.*": "int8", "*": None}, method="minmax")
    assert isinstance(made["up"]["kernel"], FakeQuantized) and not isinstance(made["table"], FakeQuantized)
    x = jnp.ones((2, K), jnp.bfloat16)
    both = linear_many(x, [made["up"]["kernel"], tree()["up"]["kernel"]])
    assert both[0].dtype == jnp.bfloat16
    np.testing.assert_allclose(both[0].astype(jnp.float32), both[1].astype(jnp.float32), rtol=0.02, atol=0.5)


@pytest.mark.parametrize(
    ("call", "message"),
    (
        (lambda: prepare(tree(), "int4", method="best"), "method is 'best'; choose from lsq, ste, minmax"),
        (lambda: prepare(tree(), "q4_0"), "format 'q4_0' cannot be trained"),
        (lambda: prepare(tree(), "int8:token"), "'token' is no option"),
        (lambda: prepare(tree(), "int4:g48"), "table: K=256 is not a multiple of int4:g48's group of 48; up.kernel"),
        (lambda: prepare({"kernel": jnp.ones((12, 4))}, "int3:channel"), "kernel: K=12 is not a multiple of 8"),
        (lambda: prepare({"b": jnp.ones(4)}, "int4"), "of 1 leaves, `where` and `format` select none"),
        (lambda: prepare({"b": jnp.ones(4)}, "int4", where=lambda *_: True), "b: it is no float matrix"),
        (lambda: prepare({"w": jax.ShapeDtypeStruct((4, 4), jnp.float32)}, "int8"), "w: it is abstract"),
        (lambda: convert(tree()), "no weight of this tree was prepared"),
        (lambda: calibrate(prepare(tree(), "int4"), lambda t: t["norm"]), "no weight has an input scale"),
        (
            lambda: calibrate(prepare(tree(), "int4", activations="int8"), lambda t: t["norm"]),
            "no finite input reached up.kernel",
        ),
    ),
)
def test_errors(call, message):
    with pytest.raises(QuantizationError, match=message):
        call()


def test_products_refuse_what_they_cannot_do():
    weight = prepare(tree(), "int4")["up"]["kernel"]
    with pytest.raises(ImplementationError, match="'native' was asked for, but the weight is being trained"):
        linear(jnp.ones((1, K)), weight, implementation="native")
    with pytest.raises(ImplementationError, match=r"\[1, 7\] does not fit FakeQuantized\(int4\[256, 200\], lsq\)"):
        linear(jnp.ones((1, 7)), weight)


def test_a_decoder_is_trained_as_it_stands():
    """An nnx module: the loss falls, and the packed module computes what the trained one did."""
    model = random_decoder(dataclasses.replace(CONFIG, layers=1))
    made, tokens = prepare(model, "int4:g32"), some_tokens(4, 16)
    optimizer = optax.adam(3e-3)

    @jax.jit
    def step(model, state):
        def loss(model):
            logits = model(tokens[:, :-1])
            return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

        value, gradients = jax.value_and_grad(loss)(model)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(gradients, state, model)
        return value, optax.apply_updates(model, updates), state

    state, losses = optimizer.init(made), []
    for _ in range(12):
        value, made, state = step(made, state)
        losses.append(float(value))
    assert losses[-1] < 0.8 * losses[0]
    packed = convert(made)
    np.testing.assert_allclose(jax.jit(lambda m: m(tokens))(packed), made(tokens), rtol=1e-3, atol=2e-3)
    assert isinstance(packed.embedding.table.get_value(), QuantizedArray)
