"""Compiles the Triton kernels ahead of time, without a GPU, and prints what they cost as JSON.

Run in a process of its own without TRITON_INTERPRET: an interpreted process cannot compile. It needs
triton alone (no torch), so another release is tried with

    PYTHONPATH=<folder with that triton>:src python tests/kernels/aot_worker.py [case ...]
"""

from __future__ import annotations

import json
import pathlib
import re
import subprocess
import sys
import tempfile

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from potstill.kernels import triton_kernels
from tests.kernels import aot_rows, aot_teacher

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
ROW_ARGUMENTS = {
    "id_ptr": "*i64",
    "used_ptr": "*u8",
    "stride_x": "i32",
    "num_rows": "i32",
    "V": "i32",
    "F": "i32",
    "scale": "fp32",
    "cap": "fp32",
    "inv_t": "fp32",
}


def row_case(kernel, dtype: str, *, two: bool, cap: bool) -> dict:
    """As rows_triton.block_shape launches it for a large vocabulary and k = 64."""
    types = dict(ROW_ARGUMENTS, x_ptr=f"*{dtype}")
    types.update(dict.fromkeys(("fix_ptr", "out_ptr", "value_ptr", "row_ptr"), "*fp32"))
    block = 4096 if cap or (two and dtype == "fp32") else 8192
    fill = -65504.0 if dtype == "fp16" else -(2.0**100)
    constants = {"BV": block, "BF": 128, "TWO": two, "CAP": cap, "FILL": fill}
    return {"kernel": kernel, "types": types, "constants": constants, "warps": 8, "elements": block}


def cases() -> dict[str, dict]:
    out = aot_rows.cases()
    for name, kernel in (("stats", triton_kernels.stats_kernel), ("grad", triton_kernels.dense_grad_kernel)):
        for dtype in ("bf16", "fp32", "fp16"):
            for two in (False, True):
                for cap in (False, True):
                    key = f"{name}-{dtype}" + ("-two" if two else "") + ("-cap" if cap else "")
                    out[key] = row_case(kernel, dtype, two=two, cap=cap)
    return out | aot_teacher.cases()


def build(case: dict, target: GPUTarget):
    kernel = case["kernel"]
    signature = {n: "constexpr" if n in case["constants"] else case["types"][n] for n in kernel.arg_names}
    # What the JIT would infer: aligned pointers, a stride and a vocabulary in whole sixteens.
    aligned = [
        n for n, kind in signature.items() if kind.startswith("*") or n in case.get("aligned", ("stride_x", "V"))
    ]
    attributes = {(kernel.arg_names.index(n),): [["tt.divisibility", 16]] for n in aligned}
    constants = {(kernel.arg_names.index(n),): value for n, value in case["constants"].items()}
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": case["warps"], "num_stages": 2, "enable_fp_fusion": True}
    return triton.compile(source, target=target, options=options), case["warps"] * target.warp_size


def nvidia_usage(compiled, arch: str) -> tuple[int, int]:
    """(registers, bytes spilled) as ptxas reports them."""
    tool = get_ptxas(int(re.search(r"\d+", arch)[0]))
    with tempfile.TemporaryDirectory() as folder:
        ptx = pathlib.Path(folder, "kernel.ptx")
        ptx.write_text(compiled.asm["ptx"])
        command = [getattr(tool, "path", tool), "-v", f"-arch={arch}", str(ptx), "-o", str(ptx) + ".cubin"]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    log = done.stdout + done.stderr
    return int(re.search(r"Used (\d+) registers", log)[1]), int(re.search(r"(\d+) bytes spill stores", log)[1])


def amd_usage(compiled) -> tuple[int, int]:
    text = compiled.asm["amdgcn"]
    found = [int(re.search(p, text)[1]) for p in (r"\.vgpr_count:\s+(\d+)", r"\.vgpr_spill_count:\s+(\d+)")]
    return found[0], found[1]


def loop_instructions(compiled) -> list[int]:
    """Machine instructions in the body of each innermost loop of the cubin, in program order."""
    tool = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "kernel.cubin")
        path.write_bytes(compiled.asm["cubin"])
        text = subprocess.run(
            [str(tool), "-c", str(path)], capture_output=True, text=True, check=True, timeout=120
        ).stdout
    position, labels, back = 0, {}, []
    for line in text.splitlines():
        if match := re.match(r"\s*(\.L_x_\d+):", line):
            labels[match[1]] = position
        elif re.match(r"\s+/\*[0-9a-f]{4,}\*/", line):
            position += 1
            if (jump := re.search(r"BRA.*?`\((\.L_x_\d+)\)", line)) and jump[1] in labels:
                back.append((labels[jump[1]], position))
    loops = [(a, b) for a, b in back if b - a > 8]
    inner = [x for x in loops if not any(y != x and x[0] <= y[0] and y[1] <= x[1] for y in loops)]
    return [b - a for a, b in inner]


def measure(case: dict, name: str) -> dict:
    target = TARGETS[name]
    case = {**case, **case.get(name, {})}
    compiled, threads = build(case, target)
    per_thread = case["elements"] / threads
    if target.backend == "hip":
        registers, spilled = amd_usage(compiled)
        wide = len(re.findall(r"global_load_dwordx4|buffer_load_dwordx4", compiled.asm["amdgcn"]))
        return {"registers": registers, "spilled": spilled, "wide_loads": wide}
    registers, spilled = nvidia_usage(compiled, name + ("a" if name == "sm_90" else ""))
    # ld.global.v4.b32, or in newer releases ld.global.v2.b64: 16 bytes per thread either way.
    wide = len(re.findall(r"ld\.global[.\w:]*\.(?:v4\.b32|v2\.b64)", compiled.asm["ptx"]))
    loops = [round(count / per_thread, 2) for count in loop_instructions(compiled)]
    return {"registers": registers, "spilled": spilled, "wide_loads": wide, "per_element": loops}


def main(names: list[str]) -> None:
    every = cases()
    table = {case: {target: measure(every[case], target) for target in TARGETS} for case in (names or list(every))}
    print(json.dumps({"triton": triton.__version__, "cases": table}))


if __name__ == "__main__":
    main(sys.argv[1:])
