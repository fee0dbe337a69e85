"""Faults planted in copies of the kernels' source, for test_mutants.py: file, text as it is, text with the fault.

The text must stand in the file exactly once. A mutant whose text is gone fails its test by name: change it along with
the kernel. Missing barriers are no mutants: the interpreter runs one program after the other (tests/gpu has repeats).
"""

from __future__ import annotations

from tests.kernels.mutant import Mutant
from tests.kernels.mutants_teacher import OF_THE_TEACHER

ROW, TABLE, LAUNCH = "row_[!t]*.py", "divergences_triton.py", "one_pass.py"
TWO_PASSES, TWO_LAUNCH = "triton_kernels.py", "rows_triton.py"

ONE_LAUNCH = [
    # Columns
    Mutant(
        "the rest's mask is one column short",
        ROW,
        "raw = tl.load(x + offsets, mask=offsets < V, other=FILL",
        "raw = tl.load(x + offsets, mask=offsets < V - 1, other=FILL",
    ),
    Mutant(
        "the rest's mask is one column wide",
        ROW,
        "raw = tl.load(x + offsets, mask=offsets < V, other=FILL",
        "raw = tl.load(x + offsets, mask=offsets < V + 1, other=FILL",
    ),
    Mutant(
        "the gradient's mask is one column wide",
        ROW,
        "tl.store(x + offsets, g, mask=offsets < V,",
        "tl.store(x + offsets, g, mask=offsets < V + 1,",
    ),
    Mutant(
        "the gradient's mask is one column short",
        ROW,
        "tl.store(x + offsets, g, mask=offsets < V,",
        "tl.store(x + offsets, g, mask=offsets < V - 1,",
    ),
    Mutant(
        "the gradient of the last part of a row is dropped",
        ROW,
        "_write_block(x, whole + offsets, V, row, scale, cap, True,",
        "_write_block(x, whole + offsets, whole, row, scale, cap, True,",
    ),
    Mutant(
        "the last part of a row is not summed",
        ROW,
        '_load(x, whole + offsets, V, scale, cap, True, CAP, FILL, "evict_last")',
        '_load(x, whole + offsets, whole, scale, cap, True, CAP, FILL, "evict_last")',
    ),
    Mutant(
        "special columns are one to the right",
        ROW,
        "raw = tl.load(x + at, mask=inside",
        "raw = tl.load(x + at + 1, mask=inside",
    ),
    Mutant(
        "the gradient of the entries goes one to the left",
        ROW,
        "tl.store(x + ids, grad * upstream",
        "tl.store(x + ids - 1, grad * upstream",
    ),
    Mutant(
        "an id at V counts as one below",
        ROW,
        "kept = entry & (ids >= 0) & (ids < V)",
        "kept = entry & (ids >= 0) & (ids <= V)",
        seen_by="ids beyond the vocabulary",
    ),
    Mutant(
        "an id below 0 counts",
        ROW,
        "kept = entry & (ids >= 0) & (ids < V)",
        "kept = entry & (ids < V)",
        seen_by="ids beyond the vocabulary",
    ),
    Mutant(
        "an id beyond V is passed over in silence",
        ROW,
        "bad = (code >= 65536) | (label >= V)",
        "bad = label >= V",
        seen_by="ids beyond the vocabulary",
    ),
    Mutant(
        "a label beyond V is passed over in silence",
        ROW,
        "bad = (code >= 65536) | (label >= V)",
        "bad = code >= 65536",
        seen_by="ids beyond the vocabulary",
    ),
    # Rows
    Mutant(
        "a row's offset has 32 bits",
        ROW,
        "row = tl.program_id(0).to(tl.int64)",
        "row = tl.program_id(0)",
        seen_by="rows far apart",
    ),
    Mutant(
        "a row reads the targets of the next",
        ROW,
        "start = tl.load(offset_ptr + token) if",
        "start = tl.load(offset_ptr + token + 1) if",
    ),
    Mutant(
        "a row reads the label of the slab's row",
        ROW,
        "tl.load(label_ptr + token)",
        "tl.load(label_ptr + row)",
        seen_by="chunks from hidden states",
    ),
    Mutant(
        "a row reads the tail of its neighbour",
        ROW,
        "tl.load(tail_ptr + token)",
        "tl.load(tail_ptr + (token ^ 1))",
        seen_by="a list of rows",
    ),
    Mutant(
        "a row reads the KD weight of its neighbour",
        ROW,
        "tl.load(kd_weight_ptr + token)",
        "tl.load(kd_weight_ptr + (token ^ 1))",
        seen_by="a list of rows",
    ),
    Mutant(
        "a row reads the weight of the slab's row",
        ROW,
        "weight = tl.load(weight_ptr + token)",
        "weight = tl.load(weight_ptr + row)",
        seen_by="chunks from hidden states",
    ),
    Mutant(
        "the first token of a chunk is forgotten",
        ROW,
        "token = first + row if",
        "token = row if",
        seen_by="chunks from hidden states",
    ),
    Mutant(
        "the source is read at the slab's row",
        ROW,
        "source_ptr + token * stride_source",
        "source_ptr + row * stride_source",
        seen_by="plain",
    ),
    Mutant(
        "a row of no weight is read", ROW, "    if weight == 0.0:", "    if weight < 0.0:", seen_by="rows of no weight"
    ),
    Mutant(
        "a row of no weight keeps what was in it",
        ROW,
        "            clear_row(x, V, R, C)",
        "            pass",
        seen_by="rows of no weight",
    ),
    # A stale slab
    Mutant(
        "entries stay in the stream",
        ROW,
        "tl.store(x + ids, FILL, mask=kept)",
        "tl.store(x + ids, FILL, mask=kept & (ids < 0))",
    ),
    Mutant(
        "a label that is no entry stays in the stream",
        ROW,
        "tl.store(x + label, FILL, mask=own)",
        "tl.store(x + label, FILL, mask=own & (label < 0))",
    ),
    Mutant(
        "a label that is no entry is not put back",
        ROW,
        "slope_of(label_z, scale, cap, CAP), mask=own)",
        "slope_of(label_z, scale, cap, CAP), mask=own & (label < 0))",
    ),
    Mutant("a label among the entries counts twice", ROW, "own = has_label & (code % 65536 == 0)", "own = has_label"),
    # Sums
    Mutant(
        "the sums do not shrink with a new maximum", ROW, "s = s * shrink + _over_thread(e)", "s = s + _over_thread(e)"
    ),
    Mutant(
        "the sum at T does not shrink", ROW, "s_t = s_t * tl.exp2(gap * inv_t) +", "s_t = s_t +", seen_by="temperature"
    ),
    Mutant(
        "the moment is not shifted with a new maximum",
        ROW,
        "moment = (moment + gap * s) * shrink +",
        "moment = moment * shrink +",
    ),
    Mutant(
        "the moment is not shifted between threads",
        ROW,
        "    moment = (moment + gap * s) * share\n",
        "    moment = moment * share\n",
    ),
    Mutant(
        "the moment of the rest is not shifted to the row",
        ROW,
        "(rest_moment + near * rest_sum) * tl.exp2(near)",
        "rest_moment * tl.exp2(near)",
    ),
    Mutant("the entropy leaves the own label out", ROW, " + label_e * label_u", ""),
    Mutant(
        "the largest logit leaves the own label out",
        ROW,
        "best = tl.where(own, tl.maximum(best, label_z), best)",
        "best = best + 0.0",
    ),
    Mutant(
        "the scale is missing in the stream",
        ROW,
        "c = _LOG2E if CAP else scale * _LOG2E",
        "c = _LOG2E",
        seen_by="scale",
    ),
    # Terms
    Mutant(
        "KD without T^2", ROW, "coefficient * student_t * kd, 0.0)", "coefficient * kd, 0.0)", seen_by="temperature"
    ),
    Mutant(
        "the gradient of KD without T",
        ROW,
        "coefficient = amount * (alpha * student_t)",
        "coefficient = amount * alpha",
        seen_by="temperature",
    ),
    Mutant(
        "the label's gradient without its weight",
        ROW,
        "gamma * label_q - weight * ce_weight",
        "gamma * label_q - ce_weight",
    ),
    Mutant(
        "the label's gradient without the factor of CE",
        ROW,
        "- tl.where(hit, weight * ce_weight, 0.0)",
        "- tl.where(hit, weight, 0.0)",
    ),
    Mutant(
        "CE of a token without a target lacks the weight of KD",
        ROW,
        "has_kd = has_target & (kd_weight != 0.0)",
        "has_kd = kd_weight != 0.0",
        seen_by="KD off",
    ),
    Mutant(
        "CE of a token whose KD weighs nothing lacks the weight of KD",
        ROW,
        "has_kd = has_target & (kd_weight != 0.0)",
        "has_kd = has_target",
        seen_by="KD off",
    ),
    Mutant(
        "the weight of KD comes on top of CE where KD is on",
        ROW,
        "tl.where(has_kd, ce_weight, ce_weight + off_weight)",
        "tl.where(has_kd, ce_weight + off_weight, ce_weight)",
        seen_by="KD off",
    ),
    Mutant(
        "no softmax at 1 where CE counts only for tokens whose KD is off",
        LAUNCH,
        '"PLAIN": settings.plain_gradient',
        '"PLAIN": settings.label_weight + settings.z_loss != 0.0',
        seen_by="KD off at 2, nothing beside KD",
    ),
    Mutant("z-loss without its factor 2", ROW, "weight * 2.0 * z_loss * lse", "weight * z_loss * lse"),
    Mutant("CE without a label", ROW, "gamma = label_weight * ce_weight", "gamma = weight * ce_weight"),
    Mutant(
        "the rest's gradient with the wrong sign",
        ROW,
        "rest = a_rest * student_mass - a_kept * exp(rest_q)",
        "rest = a_kept * exp(rest_q) - a_rest * student_mass",
    ),
    Mutant(
        "the rest's gradient goes to all of it",
        ROW,
        "rest * tl.exp2(rest_u - outside), student_mass",
        "rest, student_mass",
    ),
    Mutant(
        "the own label takes no share of the rest's gradient",
        ROW,
        "label_grad = rest * tl.exp2(label_u - outside)",
        "label_grad = rest * 0.0",
    ),
    Mutant("the own label is missing in the rest", ROW, "outside = _log2_add(rest_u, label_u)", "outside = rest_u"),
    Mutant(
        "the teacher's tail is not normalised",
        ROW,
        "not_below_none(tail - norm)",
        "not_below_none(tail)",
    ),
    Mutant(
        "the teacher's entries are not normalised", ROW, "not_below_none(entries - norm)", "not_below_none(entries)"
    ),
    Mutant(
        "tempered entries share all mass",
        ROW,
        "norm = total - _log1mexp(tail)",
        "norm = total",
        seen_by="temperature",
    ),
    Mutant(
        "the chain through the support is missing",
        ROW,
        "a = a - exp(bucket_q) * a_kept",
        "a = a + 0.0",
        seen_by="support at 2.0",
    ),
    Mutant(
        "label mode forgets the label's entry",
        ROW,
        "log_p = tl.where(hit, top + log(exp(log_p - top) + exp(rest_p - top)), log_p)",
        "log_p = log_p + 0.0",
        seen_by="label at 1.0",
    ),
    Mutant(
        "the cap's slope is missing",
        ROW,
        "g = g * slope_of(z, scale, cap, True)",
        "g = g * scale",
        seen_by="cap and scale",
    ),
    Mutant(
        "the cap's slope is missing at the entries",
        ROW,
        "grad * upstream * slope_of(z, scale, cap, CAP)",
        "grad * upstream * scale",
        seen_by="cap and scale",
    ),
    Mutant(
        "what comes from above is missing at the own label",
        ROW,
        "label_grad * upstream *",
        "label_grad *",
    ),
    Mutant(
        "the second softmax is missing",
        ROW,
        "g += weight_1 * tl.exp2(z * c - log_1)",
        "g += 0.0",
        seen_by="temperature",
    ),
    # Figures
    Mutant(
        "a figure is another",
        ROW,
        "tl.where(has_target, weight * kept_mass, 0.0)",
        "tl.where(has_target, weight * student_mass, 0.0)",
    ),
    Mutant(
        "the entropy without its weight",
        ROW,
        "tl.store(out + 10 * stride_out, weight * entropy)",
        "tl.store(out + 10 * stride_out, entropy)",
    ),
    Mutant("a tie with the largest logit does not agree", ROW, "(first_z >= best)", "(first_z > best)", seen_by="ties"),
    Mutant("the largest logit is never right", ROW, "(label_z >= best)", "(label_z > best)", seen_by="ties"),
    # Divergences
    Mutant(
        "skew with its parts exchanged",
        TABLE,
        "_log_of_sum(log_p + log(1.0 - option), log_q + log(option))",
        "_log_of_sum(log_p + log(option), log_q + log(1.0 - option))",
        seen_by="skew_reverse",
    ),
    Mutant(
        "total variation without its half",
        TABLE,
        "return 0.5 * tl.abs(p - q), sign * q",
        "return tl.abs(p - q), sign * q",
        seen_by="total_variation",
    ),
    Mutant(
        "the gradient of the squares of probabilities is not by the logarithm",
        TABLE,
        "difference * difference, 2 * difference * q",
        "difference * difference, 2 * difference",
        seen_by="mse_probs",
    ),
    Mutant(
        "reverse KL without a floor",
        TABLE,
        "tl.maximum(log_p, option)",
        "log_p",
        seen_by="reverse_kl of next to nothing",
    ),
    # The launch
    Mutant("KD weights for weights", LAUNCH, '"weight_ptr": tokens.weights', '"weight_ptr": tokens.kd_weights'),
    Mutant(
        "labels are taken for contiguous",
        LAUNCH,
        "tokens.labels.contiguous()",
        "tokens.labels",
        seen_by="columns with strides",
    ),
    Mutant(
        "the targets are taken for contiguous",
        LAUNCH,
        "name: value.contiguous() for",
        "name: value for",
        seen_by="columns with strides",
    ),
    Mutant(
        "the teacher's temperature is the student's",
        LAUNCH,
        '"teacher_t": max(settings.temperature, ',
        '"teacher_t": max(settings.student_temperature, ',
        seen_by="teacher's temperature",
    ),
    Mutant("rows are taken for contiguous", LAUNCH, "stride_x=slab.stride(0),", "stride_x=slab.shape[1],"),
]

TWO = [
    Mutant(
        "two passes: the rest's mask is one column short",
        TWO_PASSES,
        "raw = tl.load(x + offsets, mask=offsets < V, other=FILL)",
        "raw = tl.load(x + offsets, mask=offsets < V - 1, other=FILL)",
        seen_by="two passes",
    ),
    Mutant(
        "two passes: the sums do not shrink",
        TWO_PASSES,
        "s = s * shrink + tl.sum(e, 0)",
        "s = s + tl.sum(e, 0)",
        seen_by="two passes",
    ),
    Mutant(
        "two passes: the moment keeps its scale",
        TWO_PASSES,
        "mean = mean * scale",
        "mean = mean + 0.0",
        seen_by="two passes",
    ),
    Mutant(
        "two passes: the gradient's last part is dropped",
        TWO_PASSES,
        "tl.store(x + whole + offsets, g, mask=whole + offsets < V)",
        "tl.store(x + whole + offsets, g, mask=whole + offsets < whole)",
        seen_by="two passes",
    ),
    Mutant(
        "two passes: the cap's slope is missing",
        TWO_PASSES,
        "g = g * _cap_slope(z, scale, cap)",
        "g = g * scale",
        seen_by="two passes",
    ),
    Mutant(
        "two passes: entries stay in the stream",
        TWO_PASSES,
        "tl.store(x + ids, FILL, mask=used)",
        "tl.store(x + ids, FILL, mask=used & (ids < 0))",
        seen_by="two passes",
    ),
    Mutant(
        "two passes: slope without scale",
        TWO_LAUNCH,
        "slope = scale if cap is None else 1.0",
        "slope = 1.0",
        seen_by="two passes",
    ),
]

MUTANTS = [*ONE_LAUNCH, *TWO, *OF_THE_TEACHER]
