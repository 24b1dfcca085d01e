"""The modes: off costs nothing and changes nothing, cached reads, first use tunes outside of traces alone."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from kernels_pallas import tuning
from trustcore import tune
from trustcore.errors import TuningError
from trustcore.tune import searching

SMALL = {"R": 64, "D": 64}


def operands():
    return jnp.ones((64, 64)), jnp.eye(64)


@pytest.fixture
def product(toy):
    return toy().run({})


@pytest.fixture
def searches(monkeypatch):
    """Calls of `search` by the mode "first_use", which are made."""
    made, real = [], searching.search

    def counted(tunable, facts, **options):
        made.append((tunable.op, facts))
        return real(tunable, facts, seconds=0.05, most=1)

    monkeypatch.setattr(searching, "search", counted)
    return made


def turns(function, *args):
    """How often the toy's program goes round: 0 where its fast form was taken."""
    return str(jax.make_jaxpr(function)(*args)).count("scan") + str(jax.make_jaxpr(function)(*args)).count("while")


def test_the_mode_at_the_start_is_off(product):
    assert tune.current_mode() == "off" and tuning.CHOOSER.value is None
    assert tuning.values("toy", None, lambda: 1 / 0) == {}  # nobody is asked, nothing is computed


def test_a_mode_is_read_while_tracing_and_traces_anew(own_tables, product):
    tune.search("toy", SMALL, seconds=0.05)
    traces = []

    @jax.jit
    def function(x, w):
        traces.append(tune.current_mode())
        return product(x, w)

    x, w = operands()
    plain = function(x, w)
    with tune.using("cached"):
        fast = function(x, w)
        function(x, w)
        assert turns(product, x, w) == 0
    function(x, w)
    assert traces == ["off", "cached"]  # once each
    assert turns(product, x, w) > 0
    assert jnp.allclose(plain, fast, atol=1e-4)


def test_a_mode_for_the_whole_process(own_tables, product):
    tune.search("toy", SMALL, seconds=0.05)
    x, w = operands()
    tune.set_mode("cached")
    try:
        assert tune.current_mode() == "cached" and turns(product, x, w) == 0
        with tune.using("off"):
            assert turns(product, x, w) > 0
    finally:
        tune.set_mode("off")
    assert turns(product, x, w) > 0


def test_single_ops_have_modes_of_their_own(own_tables, product, searches):
    tune.search("toy", SMALL, seconds=0.05)
    x, w = operands()
    with tune.using("cached", toy="off"):
        assert turns(product, x, w) > 0 and tune.current_mode("toy") == "off" != tune.current_mode()
    with tune.using("off", toy="cached"):
        assert turns(product, x, w) == 0
    with tune.using("off", attention="first_use", attention_backward="cached"):
        modes = [tune.current_mode(op) for op in ("attention_forward", "attention_backward", "norm_forward")]
        assert modes == ["first_use", "cached", "off"] and turns(product, x, w) > 0
    with tune.using("off", toy="off"):
        assert tuning.CHOOSER.value is None  # as if nothing was asked for
    searches.clear()
    with tune.using("first_use", attention="off"):
        from kernels_pallas.attention import attention

        attention(*[jnp.ones((1, 40, 2, 8))] * 3)
    assert searches == []
    tune.set_mode("off", toy="cached")
    try:
        assert turns(product, x, w) == 0
    finally:
        tune.set_mode("off")


def test_switches_name_what_is_known(toy):
    with pytest.raises(TuningError, match="'beads' is no op that can be tuned, and no family; choose of attention, "):
        tune.using("cached", beads="off")
    with pytest.raises(TuningError, match="mode 'on' is not known"):
        tune.using("cached", attention="on")


def test_a_mode_entered_after_a_search_reads_what_it_found(own_tables, product):
    x, w = operands()
    function = jax.jit(product)
    with tune.using("cached"):
        first = function.lower(x, w).as_text()
    tune.search("toy", SMALL, seconds=0.05)
    with tune.using("cached"):
        assert function.lower(x, w).as_text() != first


def test_a_search_within_a_mode_means_the_plain_defaults(own_tables):
    facts = tune.best("cross_entropy_forward", R=8, D=8, V=4000).facts
    plain = tune.candidates(tune.declared("cross_entropy_forward"), tune.this_device(), facts)
    with tune.pinned("cross_entropy_forward", {"implementation": "xla", "chunk": 256}):
        assert tune.candidates(tune.declared("cross_entropy_forward"), tune.this_device(), facts) == plain


def test_an_unknown_mode_is_refused():
    with pytest.raises(TuningError, match="mode 'on' is not known; choose of off, cached, first_use"):
        tune.using("on")


def test_first_use_tunes_an_eager_call_once(own_tables, searches):
    from kernels_pallas.attention import attention

    q = jnp.ones((1, 40, 2, 8))
    with tune.using("first_use"):
        first = attention(q, q, q)
        attention(q, q, q)
    assert [op for op, _ in searches] == ["attention_forward"]
    assert tune.best("attention_forward", q, q, q).source == "cache"
    assert jnp.allclose(first, q, atol=1e-5)  # the mean of ones


def test_first_use_tunes_an_eager_product(own_tables, searches):
    from trustcore.ops.linear import linear
    from trustcore.quant import QuantizedArray

    w = QuantizedArray.quantize(jax.random.normal(jax.random.key(0), (64, 64)), "int8:g32", search=False)
    x = jnp.ones((2, 64))
    with tune.using("first_use"):
        linear(x, w)
        jax.jit(linear)(jnp.ones((9, 64)), w)  # a trace: it reads
    assert [(op, facts["R"]) for op, facts in searches] == [("packed_product", 2)]


@pytest.mark.parametrize("how", ["jit", "grad", "inside"])
def test_first_use_never_tunes_inside_of_a_trace(own_tables, searches, how):
    from kernels_pallas.attention import attention

    q = jnp.ones((1, 24, 2, 8))

    def inside(x):
        with jax.ensure_compile_time_eval():
            attention(q, q, q)
        return x

    with tune.using("first_use"):
        if how == "jit":
            jax.jit(lambda q: attention(q, q, q))(q)
        elif how == "grad":
            jax.jit(jax.grad(lambda q: attention(q, q, q).sum()))(q)
        else:
            jax.jit(inside)(q)
    assert searches == []


def test_first_use_survives_a_call_that_cannot_be_tuned(own_tables, monkeypatch):
    from kernels_pallas.attention import attention

    def refused(*_, **__):
        raise TuningError("there is no time.")

    monkeypatch.setattr(searching, "search", refused)
    q = jnp.ones((1, 28, 2, 8))
    with tune.using("first_use"), pytest.warns(UserWarning, match="takes its defaults: there is no time"):
        attention(q, q, q)
    with tune.using("first_use"):
        attention(q, q, q)  # neither tried nor told again


def test_cached_never_searches(own_tables, searches, product):
    with tune.using("cached"):
        product(*operands())
    assert searches == []


def test_calls_of_a_program_are_found_without_running_it(toy):
    toy()
    from kernels_pallas.attention import attention
    from kernels_pallas.cross_entropy import cross_entropy

    x = jax.ShapeDtypeStruct((2, 48, 4, 16), jnp.float32)
    table, labels = jax.ShapeDtypeStruct((64, 100), jnp.float32), jax.ShapeDtypeStruct((96,), jnp.int32)

    def loss(q, table, labels):
        h = attention(q, q, q, window=32).reshape(96, 64)
        h = h + attention(q, q, q, window=32).reshape(96, 64)
        return cross_entropy(h, table, labels).sum()

    found = tune.calls_of(jax.grad(loss, (0, 1)), x, table, labels)
    assert sorted({op for op, _ in found}) == [
        "attention_backward", "attention_forward", "cross_entropy_backward", "cross_entropy_forward",
    ]  # fmt: skip
    facts = dict(found)["attention_backward"]
    assert (facts["T"], facts["window"], facts["causal"], facts["H"]) == (48, 32, True, 16)
    assert len(found) == 4  # each once
    assert dict(found)["attention_forward"] == tune.best("attention_forward", facts).facts
    named = tune.calls_of(lambda q: attention(q, q, q, implementation="xla"), x)
    assert named == []
