"""Compiles the kernels of gradients_triton.py for sm_90, without a GPU, and prints what they cost as JSON.

Like aot_worker.py, whose tools it takes.
"""

from __future__ import annotations

import json
import re
from typing import Any

import triton
from triton.compiler import ASTSource

from potstill.kernels import gradients_triton
from tests.kernels.aot_worker import TARGETS, nvidia_usage

WEIGHT_TYPES = {
    "slab_ptr": "*bf16",
    "hidden_ptr": "*bf16",
    "total_ptr": "*fp32",
    "factor_ptr": "*fp32",
    "out_ptr": "*bf16",
    **dict.fromkeys(("B", "V", "D", "stride_slab", "stride_hidden"), "i32"),
}


def cases() -> dict[str, tuple[Any, dict[str, str], dict[str, Any], dict[str, int]]]:
    """Kernel, types, constants and options of each, as they are launched at a large shape."""
    out = {}
    tile = dict(gradients_triton.WEIGHT_TILE)
    options = {name: tile.pop(name) for name in ("num_warps", "num_stages")}
    for adds in (False, True):
        constants = {**tile, "ADDS": adds}
        out[f"weight adds={adds}"] = (gradients_triton.weight_gradient_kernel, WEIGHT_TYPES, constants, options)
    numbers = {"factor_ptr": "*fp32", "count": "i32", "num_blocks": "i32"}
    for dtype in ("fp32", "bf16"):
        for kind in ("fp32", "bf16"):
            types = {"x_ptr": f"*{dtype}", "out_ptr": f"*{kind}", **numbers}
            constants = {"INPLACE": dtype == kind, "BLOCK": gradients_triton.SCALE_BLOCK}
            out[f"scale {dtype} {kind}"] = (gradients_triton.scale_kernel, types, constants, {"num_warps": 8})
    return out


def measure(kernel: Any, types: dict[str, str], constants: dict[str, Any], options: dict[str, int]) -> dict[str, Any]:
    signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    aligned = [n for n, kind in signature.items() if kind.startswith("*") or n in ("V", "D", "count") or "stride" in n]
    attributes = {(kernel.arg_names.index(n),): [["tt.divisibility", 16]] for n in aligned}
    values = {(kernel.arg_names.index(n),): value for n, value in constants.items()}
    source = ASTSource(kernel, signature, constexprs=values, attrs=attributes)
    compiled = triton.compile(source, target=TARGETS["sm_90"], options=options)
    registers, spilled = nvidia_usage(compiled, "sm_90a")
    text = compiled.asm["ptx"]
    return {
        "registers": registers,
        "spilled": spilled,
        "shared": compiled.metadata.shared,
        "wide_loads": len(re.findall(r"ld\.global[.\w:]*\.(?:v4\.b32|v2\.b64)|cp\.async\.cg", text)),
        "tensor_cores": "wgmma.mma_async" in text,
        "async_copies": "cp.async.cg" in text,
    }


if __name__ == "__main__":
    print(json.dumps({name: measure(*case) for name, case in cases().items()}))
