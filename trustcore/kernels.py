"""Which implementation of a kernel op runs for a call, and why no other does.

>>> import jax, trustcore as tc
>>> x = jax.ShapeDtypeStruct((1, 4096, 8, 128), "bfloat16")
>>> print(tc.kernels.explain("attention", x, x, x, platform="cuda", architecture="7.5"))
attention (query bfloat16[1,4096,8,128], key bfloat16[1,4096,8,128], value bfloat16[1,4096,8,128]) on cuda 7.5
  mosaic_gpu: it needs compute capability 8.0 to 8.9, 9.0 or 10.0 to 10.3 and the chip has 7.5.
  triton: it needs compute capability 8.0 and the chip has 7.5.
  mosaic_tpu: it runs on tpu, not on cuda.
  cudnn: it needs compute capability 8.0 and the chip has 7.5.
  xla: taken
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from kernels_pallas import (
    Explanation,
    attention,
    cross_entropy,
    decode,
    glu,
    grouped_matmul,
    norm,
    packed,
    rope,
    selective_scan,
    softmax,
)
from trustcore.errors import ImplementationError

OPS: Mapping[str, Callable[..., Explanation]] = MappingProxyType(
    {
        "attention": attention.explain,
        "cross_entropy": cross_entropy.explain,
        "decode_attention": decode.explain,
        "glu": glu.explain,
        "grouped_matmul": grouped_matmul.explain,
        "norm": norm.explain,
        "packed_matmul": packed.explain,
        "rope": rope.explain,
        "selective_scan": selective_scan.explain,
        "softmax": softmax.explain,
    }
)


def explain(
    op: str, *shapes: Any, platform: str | None = None, architecture: str | None = None, **options: Any
) -> Explanation:
    """Returns for each implementation of an op whether a call takes it, and why not; `str` of it is a table.

    Args:
        op: a key of `OPS`.
        shapes: the op's operands, arrays or `jax.ShapeDtypeStruct`.
        platform: "cpu", "cuda", "rocm", "tpu" or another; None: where arrays are computed by default.
        architecture: of the chip: a compute capability ("9.0"), "gfx942", "TPU v5e"; None: that of the first device.
        options: what the op takes by name.

    Raises:
        ImplementationError: there is no such op.
        ValueError: the shapes do not fit each other.
    """
    if op not in OPS:
        raise ImplementationError(f"kernels.explain: no op is called {op!r}; choose of {', '.join(OPS)}.")
    return OPS[op](*shapes, platform=platform, architecture=architecture, **options)
