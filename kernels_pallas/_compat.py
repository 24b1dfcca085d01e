"""Every difference between the jax releases that the kernels support (0.10.2 to 0.12), in one place.

Pallas-Triton    importing it warns from 0.11 on, where it is deprecated
compiler         `pallas_call` without parameters means Mosaic-GPU for cuda in 0.10.2 and Triton later: kernels here
                 always name theirs
shard_map        a primitive's outputs must say over which axes of the mesh they vary
races            the TPU's interpreter tells of them (0.10, 0.11) or raises (0.12)
devices          an abstract device stands in for one that is not here
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.core
from jax._src.config import _check_vma
from jax.extend import core
from jax.interpreters import mlir
from jax.sharding import AbstractMesh, AxisType

JAX_VERSION: tuple[int, ...] = tuple(int(part) for part in jax.__version__.split(".")[:3] if part.isdigit())


def triton() -> Any:
    """Returns the module of Pallas-Triton, without the warning that it is to go."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from jax.experimental.pallas import triton as module
    return module


def mosaic_gpu() -> Any:
    """Returns the module of Pallas-Mosaic-GPU, which wants absl on jax 0.10."""
    from jax.experimental.pallas import mosaic_gpu as module

    return module


def _assembler() -> Any:
    """Returns the module in which Mosaic-GPU asks for which GPU it assembles."""
    if JAX_VERSION >= (0, 11):
        from jax.experimental.mosaic.gpu import utils as module
    else:
        from jax.experimental.mosaic.gpu import core as module
    return module


def mosaic_gpu_assembles_for() -> tuple[int, int]:
    """Returns the compute capability for which Mosaic-GPU assembles: the host's GPU, 9.0 where there is none."""
    return _assembler()._infer_arch()


@contextlib.contextmanager
def mosaic_gpu_for(capability: tuple[int, int], shared: int | None = None) -> Iterator[dict[str, int]]:
    """Inside, Mosaic-GPU assembles for that compute capability, whatever the host has; in this process, all threads.

    jax asks the host's device alone: an abstract one has no capability there, and counts as 9.0. A kernel that takes
    more than `shared` bytes of shared memory is an error. Yields the bytes that each kernel takes, by its name.
    """
    from jax.experimental.mosaic.gpu import core as launcher

    module = _assembler()
    kept = module._infer_arch, launcher._launch, launcher._SMEM_SIZE_BOUND
    taken: dict[str, int] = {}

    def launch(*args: Any, **options: Any) -> Any:  # token, grid, cluster, block, shared memory, semantics, module, ...
        taken[args[6].operation.attributes["sym_name"].value] = launcher._smem_tree_size(args[4])
        return kept[1](*args, **options)

    module._infer_arch, launcher._launch, launcher._SMEM_SIZE_BOUND = lambda: capability, launch, shared
    try:
        yield taken
    finally:
        module._infer_arch, launcher._launch, launcher._SMEM_SIZE_BOUND = kept


def transposed(ref: Any) -> Any:
    """Returns a matrix in shared memory as its transpose, for Mosaic-GPU's products."""
    return ref.transpose((1, 0)) if JAX_VERSION >= (0, 11) else mosaic_gpu().transpose_ref(ref, (1, 0))


def left_operand(x: jax.Array) -> jax.Array:
    """Returns a matrix in registers of Mosaic-GPU's WGMMA layout as the left operand of its `mma`.

    Both layouts give a thread the same numbers in the same order; jax knows no cast between them.
    """
    from jax.experimental.mosaic import gpu

    plgpu = mosaic_gpu()
    layout = plgpu.Layout.MMA_LHS(x.dtype)
    result = plgpu.ShapeDtypeStruct(x.shape, x.dtype, layout=layout)

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA,), return_type=result)
    def cast(_: Any, given: Any) -> Any:
        made = layout.to_mgpu()
        registers = given.registers.reshape(made.registers_shape(given.shape))
        return gpu.FragmentedArray(_registers=registers, _layout=made, _is_signed=given.is_signed)

    return cast(x)


def load_numbers(ref: Any, layout: Any) -> jax.Array:
    """Returns what a buffer of shared memory holds, in registers of that layout of Mosaic-GPU."""
    load = mosaic_gpu().load
    return load(ref, layout=layout) if JAX_VERSION >= (0, 11) else load(ref, (), layout=layout)


def race_detector(cores: int = 2) -> Any:
    """Returns what stands in `pallas_call(interpret=...)` for a TPU's cores, memories and copies, and looks for races.

    Steps of a grid that may run in parallel are spread over `cores`. What it found: `races_found`.
    """
    from jax.experimental.pallas import tpu as pltpu

    return pltpu.InterpretParams(detect_races=True, num_cores_or_threads=cores)


def races_found(run: Any) -> tuple[Any, bool]:
    """Returns the results of `run()`, kernels under `race_detector`, and whether one of them had a race.

    Up to 0.11 the detector keeps what it found of the last kernel; from 0.12 on it raises, and the result is None.
    """
    import jax._src.pallas.mosaic.interpret.interpret_pallas_call as interpreter

    try:
        results = jax.block_until_ready(run())
    except Exception as error:
        if "race detected" not in str(error).lower():
            raise
        return None, True
    return results, interpreter.races is not None and interpreter.races.races_found


def cudnn_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    scale: float,
    causal: bool,
    left: int | None,
    return_residual: bool = False,
) -> Any:
    """Returns cuDNN's attention, with its log-sum-exp in float32: `jax.nn.dot_product_attention` rounds that one."""
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

    return dot_product_attention(
        query,
        key,
        value,
        scale=scale,
        mask_type=MaskType.CAUSAL if causal else MaskType.NO_MASK,
        sliding_window_length=None if left is None else left + 1,
        return_residual=return_residual,
    )


# Pallas-Triton asks which chip it compiles for from this release on.
TRITON_NEEDS_A_CHIP: bool = JAX_VERSION >= (0, 11)


def varying(arrays: Sequence[Any]) -> frozenset[Any]:
    """Returns the axes of a `shard_map` over which any of the arrays varies; none outside of one."""
    kinds = (getattr(jax.typeof(x), "manual_axis_type", None) for x in arrays)
    return frozenset().union(*(kind.varying for kind in kinds if kind is not None))


def vary_alike(arrays: list[Any]) -> list[Any]:
    """Returns the arrays, each varying over every axis of a `shard_map` over which one of them does."""
    axes = varying(arrays)
    missing = ((x, tuple(axes - varying([x]))) for x in arrays)
    return [jax.lax.pcast(x, names, to="varying") if names else x for x, names in missing]


def shaped(shape: Sequence[Any], dtype: Any, avals: Sequence[Any]) -> Any:
    """Returns an abstract array that varies over the axes over which the operands do."""
    axes = frozenset().union(*(a.manual_axis_type.varying for a in avals))
    mesh = next((a.sharding.mesh for a in avals if a.manual_axis_type.varying), None)
    if mesh is None:
        return jax.core.ShapedArray(tuple(shape), dtype)
    kind = next(a.manual_axis_type for a in avals if a.manual_axis_type.varying)
    kind = kind.update(varying=axes)
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*[None] * len(shape)))
    return jax.core.ShapedArray(tuple(shape), dtype, sharding=sharding, manual_axis_type=kind)


def register_lowering(primitive: core.Primitive, function: Any, platform: str | None) -> None:
    """Lowers a primitive on a platform (None: those without a rule of their own) as `function(platform, *arrays)`."""

    def run(*arrays: Any, **params: Any) -> Any:
        return function(platform, *arrays, **params)

    rule = mlir.lower_fun(run, multiple_results=True)

    def lower(ctx: Any, *operands: Any, **params: Any) -> Any:
        # The function is traced for one device's part: it has loops, whose carries would have to vary alike.
        plain = [jax.core.ShapedArray(a.shape, a.dtype) for a in ctx.avals_in]
        # For the same reason `pallas_call` is not to ask how results vary, though a `shard_map` around it checks that.
        with warnings.catch_warnings(), _check_vma(False):
            warnings.filterwarnings("ignore", message="The Pallas Triton backend is deprecated")
            return rule(ctx.replace(avals_in=plain), *operands, **params)

    mlir.register_lowering(primitive, lower, platform=platform)


def device_kind(platform: str) -> str | None:
    """Returns which chip a program for the platform is meant for; None where nothing says so.

    cuda: the compute capability, "9.0"; rocm: "gfx942"; tpu: the device's kind. An abstract device counts first.
    """
    mesh = jax.sharding.get_abstract_mesh()
    abstract = None if mesh.empty else getattr(mesh, "abstract_device", None)
    if abstract is not None:
        kind = str(_CAPABILITIES.get(abstract.device_kind, abstract.device_kind))
        family = "rocm" if kind.startswith("gfx") else "cuda" if abstract.platform == "gpu" else abstract.platform
        return kind if family == platform else None
    if jax.default_backend() == {"cuda": "gpu", "rocm": "gpu"}.get(platform, platform) != "cpu":
        device = jax.devices()[0]
        return str(getattr(device, "compute_capability", device.device_kind))
    return None


# What the chips that jax knows by name can do.
_CAPABILITIES = {
    "NVIDIA A100-SXM4-40GB": "8.0",
    "NVIDIA A100-SXM4-80GB": "8.0",
    "NVIDIA A10": "8.6",
    "NVIDIA A10G": "8.6",
    "NVIDIA L4": "8.9",
    "NVIDIA H100 80GB HBM3": "9.0",
    "NVIDIA H200": "9.0",
    "NVIDIA B200": "10.0",
    "NVIDIA RTX PRO 6000": "12.0",
    "Tesla T4": "7.5",
}


@contextlib.contextmanager
def abstract_device(kind: str, platform: str) -> Iterator[None]:
    """Inside, programs are lowered for a chip that need not be here: `"NVIDIA H200", "gpu"` or `"gfx942", "gpu"`."""
    from jax.sharding import AbstractDevice

    device = AbstractDevice(device_kind=kind, num_cores=None, platform=platform)
    mesh = AbstractMesh((1,), ("d",), axis_types=(AxisType.Auto,), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        yield


def default_platform() -> str:
    """Returns the platform where arrays are computed by default, "cuda" or "rocm" for a GPU."""
    platform = jax.default_backend()
    if platform != "gpu":
        return platform
    return "rocm" if str(jax.devices()[0].compute_capability).startswith("gfx") else "cuda"
