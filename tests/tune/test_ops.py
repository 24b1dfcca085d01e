"""The ops that declare: tuned values reach them, and change nothing but the time."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import pytest

import kernels_pallas
from kernels_pallas import Target, row_tunables, rows
from kernels_pallas.attention import ATTENTION, attention, tpu, triton, xla
from kernels_pallas.attention.oracle import attention_oracle
from kernels_pallas.attention.tunable import _call
from kernels_pallas.cross_entropy import cross_entropy
from kernels_pallas.decode import decode_attention
from kernels_pallas.glu import glu
from kernels_pallas.grouped_matmul import grouped_matmul
from kernels_pallas.norm import rms_norm
from kernels_pallas.tuning import Tunable
from trustcore import tune
from trustcore.ops.linear import linear
from trustcore.quant import QuantizedArray
from trustcore.tune import registry
from trustcore.tune.device import Device
from trustcore.tune.measure import tolerance

GPU, TPU = Device("cuda", "9.0", 132), Device("tpu", "TPU v5e", 1)
CALLS = {
    "attention_forward": "B=2,T=40,S=72,N=4,K=2,H=16,more=query_segments bias sinks",
    "attention_backward": "B=1,T=136,N=2,H=16,window=24,more=slopes",
    "cross_entropy_forward": "R=24,D=16,V=700",
    "cross_entropy_one_pass": "R=24,D=16,V=700,transposed=true",
    "cross_entropy_backward": "R=24,D=16,V=700",
    "norm_forward": "R=20,D=96,operands=x residual weight,results=y scale total",
    "norm_backward": "R=20,D=96",
    "activation_forward": "R=20,D=96",
    "activation_backward": "R=20,D=96,operands=bias of_y x,results=bias x",
    "packed_product": "R=3,K=128,N=640,format=int4:g32",
    "decode_attention_forward": "B=2,T=2,S=192,N=4,K=2,H=16,cache=uint8,page=32,window=90,chunk=70,more=sinks slopes",
    "grouped_matmul_rows": "R=96,E=3,K=24,N=40,transposed=true",
    "grouped_matmul_sums": "R=96,E=3,K=24,N=40",
    "selective_scan_forward": "B=2,T=21,I=40,S=5,chunk=8,keep=true",
    "selective_scan_backward": "B=1,T=21,I=24,S=5,chunk=8",
}  # fmt: skip
PINS = {
    "attention_forward": {"implementation": "xla", "block_q": 64, "block_k": 128},
    "attention_backward": {"implementation": "xla", "block_q": 64, "block_k": 128},
    "cross_entropy_forward": {"implementation": "xla", "chunk": 256},
    "cross_entropy_one_pass": {"implementation": "xla", "chunk": 256},
    "cross_entropy_backward": {"implementation": "xla", "chunk": 512},
    "packed_product": {"implementation": "stream", "unroll": 2},
    "decode_attention_forward": {"implementation": "xla", "split": 64},
    "grouped_matmul_rows": {"implementation": "xla", "piece": 8},
    "grouped_matmul_sums": {"implementation": "xla", "piece": 8},
    "selective_scan_forward": {"implementation": "xla", "unroll": 2},
    "selective_scan_backward": {"implementation": "xla", "unroll": 4},
}


def near(ours, theirs, reduction=256):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        far = jnp.max(jnp.abs(a.astype(jnp.float32) - b.astype(jnp.float32))) / (jnp.max(jnp.abs(b)) + 1e-9)
        assert far <= tolerance(a.dtype, reduction), far


def test_every_op_has_a_case_here():
    ops = [n for family in registry.FAMILIES for n in (t.op for t in registry.members(family))]
    assert sorted(CALLS) == sorted(ops)  # forms of models, which are registered: tests/models/test_layer_form.py


@pytest.mark.parametrize("op", CALLS)
def test_a_declaration_says_what_its_op_computes(op):
    """Its program under chosen values gives what its oracle does, and the facts it asks with are its own."""
    tunable: Tunable = tune.declared(op)
    facts = tune.best(op, CALLS[op]).facts
    operands = tunable.operands(facts)
    prepared = tunable.prepare(facts, operands)
    with tune.pinned(op, PINS.get(op, {})):
        result = jax.jit(tunable.run(facts))(*prepared)
    near(
        tunable.checked(facts, result),
        jax.jit(lambda given: tunable.oracle(facts, given))(operands),
        tunable.reduction(facts),
    )
    asked = tune.calls_of(tunable.run(facts), *prepared)
    assert (op, facts) in [(name, dict(known)) for name, known in asked]


@pytest.mark.parametrize("op", [op for op in PINS if op != "packed_product"])
def test_chosen_values_reach_the_program(op):
    tunable, facts = tune.declared(op), tune.best(op, CALLS[op]).facts
    prepared = tunable.prepare(facts, tunable.operands(facts))

    def lowered(values):
        with tune.pinned(op, values):
            return jax.jit(tunable.run(facts)).lower(*prepared).as_text()

    assert lowered(PINS[op]) != lowered({}) == lowered({"implementation": "xla"})


def test_a_tuned_attention_gives_the_same_result(own_tables):
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, (1, 200, 2, 16)) for key in keys)
    grid = {**tune.declared("attention_forward").grids, "xla": {"block_q": (64,), "block_k": (128,)}}
    tunable = tune.Tunable(**{**vars(tune.declared("attention_forward")), "grids": grid})
    result = tune.search(tunable, q, k, v, seconds=0.05)
    function = jax.jit(attention)
    with tune.using("cached"):
        tuned = function(q, k, v)
    near(tuned, jax.jit(attention_oracle)(q, k, v))
    assert [dict(t.values) for t in result.trials][-1] == {"implementation": "xla", "block_q": 64, "block_k": 128}
    assert all(t.error is not None and t.error < 1e-5 for t in result.trials if t.same_as is None)


@pytest.mark.parametrize(
    "values", [{"implementation": "stream", "unroll": 8}, {"implementation": "tiles", "tile": 1024}]
)
@pytest.mark.parametrize("transposed", [False, True])
def test_a_tuned_product_gives_the_same_result(values, transposed):
    w = QuantizedArray.quantize(jax.random.normal(jax.random.key(0), (128, 1600)), "int4:g32", search=False)
    w = w.T if transposed else w
    x = jax.random.normal(jax.random.key(1), (3, w.shape[0]))
    expected = linear(x, w, implementation="dequantize")
    with tune.pinned("packed_product", values):
        text = jax.jit(linear).lower(x, w).as_text()
        near(jax.jit(linear)(x, w), expected)
        gradient = jax.jit(jax.grad(lambda x: linear(x, w).sum()))(x)
    near(gradient, jnp.broadcast_to(w.dequantize().sum(1), x.shape), 1600)
    if not (transposed and values["implementation"] == "stream"):  # which it refuses: the defaults are taken
        assert text != jax.jit(linear).lower(x, w).as_text()


def test_tuned_blocks_of_a_gpu_and_a_tpu_are_computed_right():
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, (1, 40, 1, 16)) for key in keys)
    expected = jax.jit(attention_oracle)(q, k, v)
    gpu = {"implementation": "triton", "queries": 16, "keys": 32, "warps": 4, "stages": 1}
    with tune.pinned("attention_forward", gpu):
        near(attention(q, k, v, implementation="triton", interpret=True), expected)
    x = jax.random.normal(keys[0], (40, 96))
    small = {"implementation": "triton", "rows": 4, "columns": 128, "warps": 4}
    with tune.pinned("norm_forward", small):
        near(rms_norm(x, implementation="triton", interpret=True), rms_norm(x))
    with tune.pinned("activation_forward", {"implementation": "mosaic_tpu", "rows": 16, "columns": 512}):
        near(glu(x, x, implementation="mosaic_tpu", interpret=True), glu(x, x))


KERNELS = {
    "decode_attention_forward": {
        "triton": {"slots": 32, "splits": 2, "warps": 4, "stages": 1}, "mosaic_tpu": {"slots": 128},
    },
    "grouped_matmul_rows": {
        "triton": {"rows": 16, "deep": 32, "wide": 32, "warps": 4, "stages": 2},
        "mosaic_tpu": {"rows": 64, "deep": 256, "wide": 128},
    },
    "grouped_matmul_sums": {
        "triton": {"rows": 16, "deep": 32, "wide": 32, "warps": 4, "stages": 2},
        "mosaic_tpu": {"rows": 64, "deep": 256, "wide": 128},
    },
}  # fmt: skip
_PLAIN = {
    "decode_attention_forward": "B=2,T=1,S=300,N=4,K=2,H=16,window=180",
    "grouped_matmul_rows": "R=96,E=3,K=24,N=40",
}


@pytest.mark.parametrize("op", KERNELS)
@pytest.mark.parametrize("name", ["triton", "mosaic_tpu"])
def test_tuned_kernels_over_caches_and_groups_are_computed_right(op, name):
    tunable, facts = tune.declared(op), tune.best(op, _PLAIN.get(op, CALLS[op])).facts
    operands = tunable.operands(facts)
    with tune.pinned(op, {"implementation": name, **KERNELS[op][name]}):
        if op == "decode_attention_forward":
            result = decode_attention(**operands[0], window=180, implementation=name, interpret=True)
        elif op == "grouped_matmul_rows":
            result = grouped_matmul(*operands, implementation=name, interpret=True)
        else:
            x, cotangent, sizes = operands
            product = functools.partial(grouped_matmul, x, sizes=sizes, implementation=name, interpret=True)
            (result,) = jax.vjp(product, jnp.zeros((3, 24, 40)))[1](cotangent)
    near(tunable.checked(facts, result), tunable.oracle(facts, operands), tunable.reduction(facts))


@pytest.mark.parametrize("op", [*KERNELS, "selective_scan_forward", "selective_scan_backward"])
@pytest.mark.parametrize("device", [GPU, TPU], ids=["gpu", "tpu"])
def test_candidates_of_caches_and_groups(op, device):
    """Every one that is tried comes to blocks of its own, and those of the chip's kernels are among them."""
    large = {"decode_attention_forward": "B=8,T=1,S=8192,N=32,K=8,H=128,dtype=bfloat16"}
    large |= dict.fromkeys(("selective_scan_forward", "selective_scan_backward"), "B=4,T=2048,I=2048,S=16")
    shape = large.get(op, "R=8192,E=8,K=2048,N=4096,dtype=bfloat16")
    tunable, facts = tune.declared(op), tune.best(op, shape, device=device).facts
    listed = tune.candidates(tunable, device, facts)
    name = "triton" if device is GPU else "mosaic_tpu"
    assert len([v for v in listed.tried if v["implementation"] == name]) > 2
    made = [tunable.resolved(device.target, facts, v) for v in listed.tried]
    assert len(set(made)) == len(made)


def test_tuned_blocks_are_cut_to_the_call():
    facts = tune.best("attention_forward", B=1, T=40, N=2, H=16, device=GPU).facts
    made, gpu, chip = _call(facts), Target("cuda", "9.0"), Target("tpu", "TPU v5e")
    with tune.pinned(
        "attention_forward", {"implementation": "triton", "queries": 256, "keys": 16, "warps": 8, "stages": 3}
    ):
        assert triton.tuned_blocks(gpu, made, "forward") == triton.Blocks(64, 16, 8, 3)
        assert tpu.tuned_blocks(chip, made, "forward") is None  # values of another implementation
    with tune.pinned("attention_backward", {"implementation": "mosaic_tpu", "queries": 128, "keys": 128}):
        assert tpu.tuned_blocks(chip, made, "backward") == tpu.Blocks(40, 40)
    assert triton.tuned_blocks(gpu, made, "forward") is None
    assert xla.plan_of(made.ops, "cpu", {"block_q": 16, "block_k": 1024}).block_k == 40


def test_tuned_blocks_of_mosaic_gpu_reach_its_kernels():
    facts = tune.best("attention_forward", B=1, T=300, N=2, H=64, dtype="bfloat16", device=GPU).facts
    listed = tune.candidates(tune.declared("attention_forward"), GPU, facts, most=200)
    ours = [v for v in (*listed.tried, *(c.values for c in listed.cut)) if v["implementation"] == "mosaic_gpu"]
    assert {v.get("length") for v in ours} == {None, 64, 128, 192, 256}
    assert {"implementation": "mosaic_gpu", "length": 128, "stages": 3} not in listed.tried  # the defaults
    wide = tune.best("attention_forward", B=1, T=4096, N=2, H=256, dtype="bfloat16", device=GPU).facts
    cut = tune.candidates(tune.declared("attention_forward"), GPU, wide).cut
    assert any(c.values.get("length") == 128 and "bytes of shared memory" in c.reason for c in cut)
    q = jax.ShapeDtypeStruct((1, 300, 2, 64), jnp.bfloat16)

    def text(values):
        with kernels_pallas.abstract_device("NVIDIA H200", "gpu"), tune.pinned("attention_forward", values):
            run = jax.jit(lambda q: attention(q, q, q, implementation="mosaic_gpu"))
            return run.trace(q).lower(lowering_platforms=("cuda",)).as_text()

    values = {"implementation": "mosaic_gpu", "length": 64, "stages": 2}
    assert text(values) != text({}) and text({**values, "length": 128, "stages": 3}) == text({})


def test_the_tuned_implementation_is_taken_where_it_is_able():
    facts = tune.best("attention_forward", B=1, T=256, N=2, H=64, dtype="bfloat16").facts
    call, chip = _call(facts), Target("cuda", "9.0")
    assert ATTENTION.tuned(chip, call, "forward") is None
    with tune.pinned("attention_forward", {"implementation": "xla"}):
        assert ATTENTION.tuned(chip, call, "forward") == "xla"
    with tune.pinned("attention_forward", {"implementation": "mosaic_tpu"}):
        assert ATTENTION.tuned(chip, call, "forward") is None


def test_a_tuned_implementation_is_lowered():
    """For a GPU that is not here: its default is a kernel, and the tuned choice plain XLA."""
    q = jax.ShapeDtypeStruct((1, 256, 2, 64), jnp.bfloat16)

    def text():
        with kernels_pallas.abstract_device("NVIDIA H100 80GB HBM3", "gpu"):
            return jax.jit(lambda q: attention(q, q, q)).trace(q).lower(lowering_platforms=("cuda",)).as_text()

    assert "triton" in text()
    with tune.pinned("attention_forward", {"implementation": "xla"}):
        assert "triton" not in text()


@pytest.mark.parametrize("device", [GPU, TPU], ids=["gpu", "tpu"])
def test_what_does_not_fit_a_chip_is_cut_before_anything_runs(device):
    facts = tune.best("attention_forward", B=1, T=8192, N=16, H=256, dtype="bfloat16", device=device).facts
    listed = tune.candidates(tune.declared("attention_forward"), device, facts)
    cut = [c for c in listed.cut if "bytes of" in c.reason]
    kernels = {"triton", "mosaic_gpu"} if device is GPU else {"mosaic_tpu"}
    assert {c.values["implementation"] for c in cut} == kernels
    biggest = {"triton": {"queries": 256, "keys": 128}, "mosaic_tpu": {"queries": 1024, "keys": 2048}}
    for name, values in biggest.items():
        if any(v["implementation"] == name for v in listed.tried):
            assert not any(values.items() <= v.items() for v in listed.tried)
    refused = {c.values["implementation"] for c in listed.cut if set(c.values) == {"implementation"}}
    assert ("mosaic_tpu" if device is GPU else "triton") in refused
    able = {v["implementation"] for v in listed.tried}  # each with its defaults, and 12 more in all
    assert 2 <= len(able) <= len(listed.tried) <= len(able) + 12
    norms = tune.candidates(
        tune.declared("norm_forward"), GPU, tune.best("norm_forward", R=4096, D=16384, device=GPU).facts
    )
    assert any("numbers of each operand a thread" in c.reason for c in norms.cut)


def test_rows_have_one_refusal():
    known = tune.best("norm_forward", R=8, D=rows.WIDEST * 2).facts
    assert "are longer than" in row_tunables.refusal(GPU.target, "triton", known)
    assert row_tunables.refusal(GPU.target, "xla", known) == ""


def test_cross_entropy_takes_the_callers_chunk_first():
    x, table, labels = jnp.ones((4, 8)), jnp.ones((8, 1000)), jnp.zeros(4, jnp.int32)
    jaxprs = []
    for chunk in (None, 512):
        with tune.pinned("cross_entropy_forward", {"implementation": "xla", "chunk": 256}):
            jaxprs.append(jax.jit(lambda x, c=chunk: cross_entropy(x, table, labels, chunk=c)).lower(x).as_text())
    assert "x256x" in jaxprs[0] and "x256x" not in jaxprs[1] and "x512x" in jaxprs[1]
