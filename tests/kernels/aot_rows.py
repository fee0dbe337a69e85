"""The variants of row_kernel.py that aot_worker.py compiles, as one_pass.launch_shape launches them for large rows."""

from __future__ import annotations

from potstill.kernels.divergences_triton import TWINS
from potstill.kernels.row_kernel import row_kernel

TYPES = {
    **dict.fromkeys(("token_ptr", "offset_ptr", "label_ptr"), "*i64"),
    "id_ptr": "*i32",
    **dict.fromkeys(("value_ptr", "tail_ptr", "weight_ptr", "kd_weight_ptr", "factor_ptr"), "*fp32"),
    **dict.fromkeys(("upstream_ptr", "out_ptr"), "*fp32"),
    **dict.fromkeys(("stride_x", "stride_source", "stride_out", "first", "V"), "i32"),
    **dict.fromkeys(("scale", "cap", "student_t", "teacher_t", "num_draws", "option"), "fp32"),
}
WARP_SIZES = {"sm_80": 32, "sm_90": 32, "gfx942": 64}
THREADS = 1024
LOADS, BACKWARDS = 1, False  # those of one_pass.LaunchShape, which needs torch; test_one_pass.py compares them


def case(
    dtype: str,
    *,
    divergence: str = "forward_kl",
    kind: str = "logprobs",
    mode: str = "tail",
    two: bool = False,
    cap: bool = False,
    lanes: int = 64,
    gradient: bool = True,
    given: tuple[str, ...] = (),
) -> dict:
    """One variant; given: optional tensors that there are. What differs by target stands under the target's name."""
    columns = 4 if dtype == "fp32" else 8
    constants = {
        "BK": lanes, "R": THREADS, "C": columns, "BACKWARDS": BACKWARDS, "KIND": kind, "MODE": mode,
        "DIVERGENCE": TWINS[divergence], "TEMPERED": two, "TWO": two, "PLAIN": True, "CAP": cap,
        "FILL": -65504.0 if dtype == "fp16" else -(2.0**100), "GRADIENT": gradient,
    }  # fmt: skip
    absent = {"source_ptr", "token_ptr"} - set(given)
    absent |= {"offset_ptr", "id_ptr", "value_ptr"} if kind == "none" else set()
    absent |= {"tail_ptr"} if kind != "logprobs" or mode in ("renorm", "support") else set()
    constants.update(dict.fromkeys(absent))
    out = {"kernel": row_kernel, "types": dict(TYPES, x_ptr=f"*{dtype}", source_ptr=f"*{dtype}")}
    for target, warp_size in WARP_SIZES.items():
        out[target] = {
            "constants": {**constants, "U": LOADS},
            "warps": THREADS // warp_size,
            "elements": LOADS * columns * THREADS,
        }
    return out


def cases() -> dict[str, dict]:
    out = {}
    for dtype in ("bf16", "fp32", "fp16"):
        for two in (False, True):
            for cap in (False, True):
                out[f"row-{dtype}" + ("-two" if two else "") + ("-cap" if cap else "")] = case(dtype, two=two, cap=cap)
    out["row-bf16-source"] = case("bf16", given=("source_ptr", "token_ptr"))
    out["row-bf16-labels"] = case("bf16", kind="none", lanes=16)
    out["row-bf16-figures"] = case("bf16", gradient=False)
    out["row-bf16-lanes"] = case("bf16", lanes=1024)
    out["row-bf16-draws"] = case("bf16", divergence="sampled", kind="log_weights", mode="renorm")
    for number, divergence in enumerate(name for name in TWINS if name != "sampled"):
        options = {"two": True, "mode": "support"} if number % 2 else {"mode": "label"}
        out[f"row-bf16-{divergence}"] = case("bf16", divergence=divergence, **options)
    return out
