"""Compiles grouped products, softmax, norms with codes, the selective scan and rotary positions for an absent TPU.

    python tests/kernels_pallas/compile_rows_for_tpu.py v5e:2x2

As `compile_for_tpu.py` does. The first operand of rotary positions is donated: they are turned where they lie.
"""

from __future__ import annotations

import json
import os
import sys

os.environ.update(
    JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", TPU_WORKER_HOSTNAMES="localhost", TPU_ACCELERATOR_TYPE="v5litepod-4"
)

import jax
from chip_cases import row_cases
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec


def main(topology: str) -> None:
    """Compiles the cases for one topology, on its first device."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = jax.sharding.Mesh(devices[:1], ("d",))
    where = NamedSharding(mesh, PartitionSpec())
    for name, (function, types, kernels) in row_cases(None).items():
        arrays = [jax.ShapeDtypeStruct(*t, sharding=where) for t in types]
        found = {"topology": topology, "case": name, "ok": True}
        try:
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                donated = 0 if name.startswith("rope") else ()
                traced = jax.jit(function, donate_argnums=donated).trace(*arrays)
                compiled = traced.lower(lowering_platforms=("tpu",)).compile()
            found["temporary"] = compiled.memory_analysis().temp_size_in_bytes
            found["kernels"] = compiled.as_text().count('custom_call_target="tpu_custom_call"')
            found["ok"] = found["kernels"] == kernels
        except Exception as error:
            found.update(ok=False, error=str(error)[:800])
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
