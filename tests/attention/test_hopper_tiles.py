"""The Gluon kernel for Hopper GPUs compiles with the Triton that is installed, without a GPU. `test_tiles` runs it on one."""

from __future__ import annotations

import re
import subprocess
from importlib import import_module, util
from pathlib import Path

import pytest
from support.interpreter import INTERPRETING

pytestmark = [
    pytest.mark.skipif(INTERPRETING, reason="is compiled, not interpreted"),
    pytest.mark.skipif(util.find_spec("triton") is None, reason="needs Triton"),
]


A_FEW_SCALARS = 64
"""Bytes. What Triton 3.9 spills where three groups of warps share the registers."""


@pytest.mark.parametrize(
    ("dim", "group", "page", "dtype"), [(64, 4, 16, "bf16"), (64, 3, 16, "bf16"), (128, 4, 16, "fp16"), (128, 1, 64, "bf16")]
)
def test_the_kernel_compiles_and_keeps_its_rows_in_registers(dim, group, page, dtype, tmp_path):
    triton, compiler = import_module("triton"), import_module("triton.backends.compiler")
    kernel = import_module("tokabatch.attention.triton_hopper_tiles")
    tiling = kernel.Tiling.of(dim, group)
    box = f"tensordesc<{dtype}[{page},64],{kernel.box_layout()!r}>"
    constants = {"PAGE": page, **kernel.constants(tiling, group, dim)}
    types = {
        "q_ptr": f"*{dtype}", "k_box": box, "v_box": box, "state_ptr": f"*{dtype}", "lse_ptr": "*fp32", "table_ptr": "*i32",
        "list_ptr": "*i32", "plane_rows": "i32", "table_stride": "i32", "scale": "fp32", "num_kv_heads": "i32",
    }  # fmt: skip
    source = import_module("triton.experimental.gluon._runtime").GluonASTSource(
        kernel._attend, {**types, **dict.fromkeys(constants, "constexpr")}, constants
    )
    made = triton.compile(source, target=compiler.GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    # A compiler that waits for each product by itself would show more of them.
    assert made.asm["ptx"].count("wgmma.wait_group") == 4 * tiling.warp_groups
    binary = tmp_path / "kernel.cubin"
    binary.write_bytes(made.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    usage = subprocess.run([tool, "-res-usage", binary], capture_output=True, text=True, check=True).stdout
    found = re.search(r" STACK:(\d+) ", usage)
    assert found and int(found[1]) <= A_FEW_SCALARS, usage
