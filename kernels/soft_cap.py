"""From raw logits to the z that every loss works on: z = cap * tanh(scale * raw / cap), and the slope dz / draw.

The one place of these formulas in torch; their twins in Triton are `_capped` and `_cap_slope` (triton_kernels.py).
Models that cap: Gemma 2 (arXiv 2408.00118); that scale: Cohere, Granite, Falcon-H1.
"""

from torch import Tensor


def scale_and_cap_(raw: Tensor, *, logit_scale: float, soft_cap: float | None) -> Tensor:
    """z in place of the raw logits (any shape and floating dtype), which are lost; returns the same tensor.

    In place because a slab of logits is the largest tensor there is. The scale comes first: the cap bounds what the
    softmax sees, not what the head gives.
    """
    if logit_scale != 1.0:
        raw.mul_(logit_scale)
    if soft_cap is not None:
        raw.div_(soft_cap).tanh_().mul_(soft_cap)
    return raw


def cap_slope(z: Tensor, *, logit_scale: float, soft_cap: float | None) -> Tensor | float:
    """dz / draw at z (shape of z; a float without a cap): scale * (1 - tanh^2), with tanh = z / cap.

    From z itself, so that the raw logits need not be kept.
    """
    if soft_cap is None:
        return logit_scale
    return logit_scale * (1 - (z / soft_cap).square())
