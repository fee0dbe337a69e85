"""The teacher's kernels for the compiler, as teacher_triton.py launches them; read by aot_worker.py.

It needs triton alone, no torch: so the constants of the launcher are written out here, and test_teacher_triton.py
compares them with those.
"""

from __future__ import annotations

from typing import Any

from potstill.kernels import teacher_kernels, teacher_select

POINTERS = {
    "label_ptr": "*i64",
    "inv_ptr": "*fp32",
    "stats_ptr": "*fp32",
    "above_ptr": "*i32",
    "scratch_ptr": "*i32",
    "id_ptr": "*i32",
    "logprob_ptr": "*fp32",
    "figure_ptr": "*fp32",
    "rank_ptr": "*i32",
}
NUMBERS = (
    *("stride_x", "stat_stride", "figure_stride", "V", "head", "num_tiles", "num_taken", "k", "parts"),
    "tiles_per_part",
)
TYPES = {**POINTERS, **dict.fromkeys(NUMBERS, "i32"), "scale": "fp32", "cap": "fp32"}
# What the JIT finds to be whole sixteens for the heads that models have.
ALIGNED = ("stride_x", "stat_stride", "V", "head")
BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
SILENT_BITS = {"bf16": 16, "fp16": 13, "fp32": 0}


def tile_case(dtype: str, *, temperatures: int = 0, cap: bool = False) -> dict[str, Any]:
    constants = {"NT": temperatures, "TPP": 32, "WIDTH": 64, "VEC": 16 // BYTES[dtype], "SCALED": cap, "CAP": cap}
    kernel = teacher_kernels.tile_kernel
    types = {**TYPES, "x_ptr": f"*{dtype}"}
    return {
        "kernel": kernel, "types": types, "constants": constants, "warps": 4, "elements": 2048, "aligned": ALIGNED,
    }  # fmt: skip


def power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


def select_shape(vocab_size: int, k: int, temperatures: int, parts: int) -> dict[str, int]:
    """As teacher_triton.select_shape."""
    tiles = -(-vocab_size // 64)
    most, taken, survivors = power_of_two(tiles), power_of_two(min(k, tiles)), power_of_two(2 * k)
    return {
        "BN": most,
        "PT": min(32, taken),
        "BF": max(2, power_of_two(1 + temperatures)),
        "BP": power_of_two(parts),
        "BL": survivors,
        "JB": max(1, min(survivors, 4096 // survivors)),
        "BX": 256,
        "num_warps": min(16, max(4, max(most, min(32, taken) * 64) // 512)),
    }


def select_case(dtype: str, *, vocab_size: int, k: int, temperatures: int = 0, cap: bool = False) -> dict[str, Any]:
    parts = -(-vocab_size // (64 * 32 * 16))
    shape = select_shape(vocab_size, k, temperatures, parts)
    warps = shape.pop("num_warps")
    constants = {
        **shape, "NT": temperatures, "WIDTH": 64, "SCALED": cap, "CAP": cap, "LOW": 0 if cap else SILENT_BITS[dtype],
    }  # fmt: skip
    return {
        "kernel": teacher_select.select_kernel,
        "types": {**TYPES, "x_ptr": f"*{dtype}"},
        "constants": constants,
        "warps": warps,
        "elements": shape["PT"] * 64,
        "aligned": ALIGNED,
    }


def cases() -> dict[str, dict[str, Any]]:
    out = {f"tiles-{dtype}": tile_case(dtype) for dtype in BYTES}
    out["tiles-bf16-2"] = tile_case("bf16", temperatures=2)
    out["tiles-fp32-2"] = tile_case("fp32", temperatures=2)
    out["tiles-fp32-cap"] = tile_case("fp32", cap=True)
    for dtype in BYTES:
        out[f"select-{dtype}-64"] = select_case(dtype, vocab_size=128256, k=64)
    out["select-bf16-1"] = select_case("bf16", vocab_size=128256, k=1)
    out["select-bf16-255-2"] = select_case("bf16", vocab_size=262144, k=255, temperatures=2)
    out["select-fp32-255-cap"] = select_case("fp32", vocab_size=262144, k=255, cap=True)
    return out


def check_budget(table: dict[str, Any]) -> None:
    """Asserts on what aot_worker printed for some of `cases`.

    A thread of the tile kernel has 64 registers (eight blocks of 128 threads on an SM), none spilled, and wide loads.
    The one of the selection looks at a few tiles only and waits for its reductions most of the time: 128 registers, and
    the few that ptxas spills to fit another block on an SM.
    """
    for case, targets in table["cases"].items():
        for target, cost in targets.items():
            where = f"{case} on {target} (triton {table['triton']}): {cost}"
            streams = case.startswith("tiles")
            assert cost["registers"] <= (64 if streams else 168), where
            assert cost["spilled"] <= (0 if streams else 64), where
            assert cost["wide_loads"] > 0 or not streams, where
            for count in cost.get("per_element", []) if streams else []:
                assert count <= (36 if "cap" in case else 32 if "-2" in case else 22), where
