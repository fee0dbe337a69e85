"""The teacher's selection as a Triton kernel (launched from teacher_triton.py, after teacher_kernels.tile_kernel).

The order of ids (value down, id up) is that of 32-bit keys: the bits of a float32, mapped to an unsigned integer so
that larger values have larger keys, -0.0 and 0.0 one key, and NaN the largest. The k-th largest key is found bit by bit
from the top (a radix descent: up to 32 counts over registers, no sort, nothing is moved), and equal keys at that bound
are taken from the lowest id up by a running count. That finds the k tiles with the largest maxima. The least of these
is a value that at least k ids reach, and as a rule few more: those, the survivors, are put in order by counting for
each how many stand before it. Where more reach it than there is room for (many ties), the candidates are searched as
the tiles were. All steps are exact and their order is fixed: the result is the same at every run.

The mass outside the k ids is a sum of what was not taken, never `1 - kept`, which loses all digits of a small rest.
"""

import triton
import triton.language as tl

from potstill.kernels.teacher_kernels import _logits, _order_key, _value_of

_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)
_FILL = tl.constexpr(-1e30)
_RULED_OUT = tl.constexpr(-5e29)


@triton.jit
def _above(bound):
    """The uint32 below a bound, so that `key >= bound` is `key > below`, where keys of 0 are no keys."""
    return bound - (bound > 0).to(tl.uint32)


@triton.jit
def _ties_at(bound, reached, count, LOW: tl.constexpr):
    """(upper, ties) for a bound that `reached` >= count keys reach: the largest are those above `upper`, and where not
    all that reach the bound are taken, ties are those from the bound up to it."""
    return tl.where(reached == count, _above(bound), bound | ((1 << LOW) - 1)), reached != count


@triton.jit
def _take(keys, upper, bound, above_before, ties_before, room):
    """(taken bool, place int32, above, ties) of keys uint32 [C], C <= 32768: those above `upper`, and of those from
    bound > 0 to upper the first `room`; place: 0, 1, .. in the order of the lanes. above_before and ties_before: how
    many there were of both kinds in the pieces before this one; the last two results: after it."""
    above = keys > upper
    tie = (keys >= bound) & (keys > 0) & (above == 0)
    # Both running counts in one scan: the low 16 bits count those above, the high ones the ties.
    running = tl.cumsum(above.to(tl.int32) + (tie.to(tl.int32) << 16), 0)
    ties = ties_before + (running >> 16)
    taken = above | (tie & (ties <= room))
    place = above_before + (running & 0xFFFF) + tl.minimum(ties, room) - 1
    return taken, place, above_before + tl.sum(above.to(tl.int32), 0), ties_before + tl.sum(tie.to(tl.int32), 0)


@triton.jit
def _best_tiles(keys, count, LOW: tl.constexpr):
    """(taken bool, place int32) of the `count` largest of keys uint32 [C], equal ones from the front."""
    bound = tl.full((), 0, tl.uint32)
    bit = tl.full((), 0x80000000, tl.uint32)
    reached = tl.sum((keys > 0).to(tl.int32), 0)
    step = 0
    # The largest bound that `count` keys reach, bit by bit from the top; done early if exactly they reach it.
    while (step < 32 - LOW) & (reached > count):
        larger = bound | bit
        number = tl.sum((keys >= larger).to(tl.int32), 0)
        bound = tl.where(number >= count, larger, bound)
        reached = tl.where(number >= count, number, reached)
        bit = bit >> 1
        step += 1
    upper, has_ties = _ties_at(bound, reached, count, LOW)
    room = tl.where(has_ties, count - tl.sum((keys > upper).to(tl.int32), 0), 0)
    taken, place, _above_all, _ties_all = _take(keys, upper, bound, 0, 0, room)
    return taken, place


@triton.jit
def _excluded_mass(x, lse, V, head, scale, cap, SCALED: tl.constexpr, CAP: tl.constexpr, BX: tl.constexpr):
    """Share of the head's columns V .. head - 1 in its softmax; lse: of the columns before them."""
    m = tl.full((), _FILL, tl.float32)
    s = tl.full((), 0.0, tl.float32)
    for start in range(V, head, BX):
        columns = start + tl.arange(0, BX)
        z = _logits(x, columns, columns < head, scale, cap, SCALED, CAP, True)
        new = tl.maximum(m, tl.max(z, 0))
        e = tl.where(columns < head, tl.exp2((z - new) * _LOG2E), 0.0)
        s = s * tl.exp2((m - new) * _LOG2E) + tl.sum(e, 0)
        m = new
    log_sum = tl.where(s == 0.0, -float("inf"), m + tl.log2(tl.where(s == 0.0, 1.0, s)) * _LN2)
    difference = tl.where(m == float("inf"), m, log_sum) - lse
    return 1.0 / (1.0 + tl.exp2(-difference * _LOG2E))


@triton.jit
def _store_label(logprob_out, rank_out, x, label, above, lse, V, scale, cap,
                 SCALED: tl.constexpr, CAP: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """Log-probability and rank of the label: 0.0 and 255 without one, NaN and 255 for an id that is not below V."""
    valid = (label >= 0) & (label < V)
    column = tl.where(valid, label, 0).to(tl.int32)
    logit = _logits(x, column, column >= 0, scale, cap, SCALED, CAP, False)
    near = (column // WIDTH) * WIDTH + tl.arange(0, WIDTH)
    z = _logits(x, near, near < V, scale, cap, SCALED, CAP, True)
    ties = tl.sum(((z == logit) & (near < column)).to(tl.int32), 0)
    logprob = tl.where(logit <= _RULED_OUT, -float("inf"), logit - lse)
    tl.store(logprob_out, tl.where(valid, logprob, tl.where(label < 0, 0.0, float("nan"))))
    tl.store(rank_out, tl.where(valid, above + ties, 255))


@triton.jit
def _ids_and_keys(
    x,
    scratch,
    lanes,  # int32 [L]: which survivors
    inside,  # bool [L]
    V,
    num_taken,
    scale,
    cap,
    WIDTH: tl.constexpr,
    SCALED: tl.constexpr,
    CAP: tl.constexpr,
):
    """(ids int32 [L], keys uint32 [L]) of some survivors; keys of 0 where there is none."""
    candidate = tl.load(scratch + num_taken + lanes, mask=inside, other=0)
    tile = tl.load(scratch + candidate // WIDTH, mask=inside, other=0)
    ids = tile * WIDTH + candidate % WIDTH
    # Padding beyond V is among the candidates, and can be a survivor where few ids have any mass.
    z = _logits(x, ids, inside & (ids < V), scale, cap, SCALED, CAP, True)
    return ids, tl.where(inside, _order_key(z), 0)


@triton.jit
def _piece(
    x,
    scratch,  # pointer to the row's taken tiles
    start,
    V,
    num_taken,
    scale,
    cap,
    PT: tl.constexpr,
    WIDTH: tl.constexpr,
    SCALED: tl.constexpr,
    CAP: tl.constexpr,
):
    """Keys uint32 [PT * WIDTH] of the taken tiles start .. start + PT - 1; 0 where there is no tile."""
    slot = start + tl.arange(0, PT)
    live = (slot < num_taken)[:, None]
    tile = tl.load(scratch + slot, mask=slot < num_taken, other=0)
    column = tile[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    z = _logits(x, column, live & (column < V), scale, cap, SCALED, CAP, True)
    return tl.reshape(tl.where(live, _order_key(z), 0), (PT * WIDTH,))


@triton.jit
def _number_above(x, scratch, upper, V, num_taken, scale, cap, PT: tl.constexpr, WIDTH: tl.constexpr,
                  SCALED: tl.constexpr, CAP: tl.constexpr):  # fmt: skip
    """How many candidates have a key above `upper`."""
    number = 0
    for start in range(0, num_taken, PT):
        keys = _piece(x, scratch, start, V, num_taken, scale, cap, PT, WIDTH, SCALED, CAP)
        number += tl.sum((keys > upper).to(tl.int32), 0)
    return number


@triton.jit
def _mass(z, included, inv_ptr, NT: tl.constexpr, BF: tl.constexpr):
    """Sums of exp(z / T) over the included ones of z [C], for T = 1 and the further temperatures: float32 [BF]."""
    lane = tl.arange(0, BF)
    sums = tl.zeros((BF,), tl.float32)
    for number in tl.static_range(NT + 1):
        e = tl.exp2(z * (tl.load(inv_ptr + number) * _LOG2E))
        sums = tl.where(lane == number, tl.sum(tl.where(included, e, 0.0), 0), sums)
    return sums


@triton.jit
def _sweep(
    x,
    scratch,  # pointer to the row's taken tiles; behind them int32 [BL] for the survivors
    inv_ptr,
    upper,  # as in _take
    bound,
    room,
    top,
    V,
    num_taken,
    scale,
    cap,
    NT: tl.constexpr,
    PT: tl.constexpr,
    BF: tl.constexpr,
    BL: tl.constexpr,
    WIDTH: tl.constexpr,
    SCALED: tl.constexpr,
    CAP: tl.constexpr,
):
    """The taken candidates' places among all go to memory, the first BL of them, in ascending order of ids. Returns
    (mass of the others by temperature, float32 [BF]; how many are taken)."""
    rests = tl.zeros((BF,), tl.float32)
    above = 0
    ties = 0
    for start in range(0, num_taken, PT):
        keys = _piece(x, scratch, start, V, num_taken, scale, cap, PT, WIDTH, SCALED, CAP)
        taken, place, above, ties = _take(keys, upper, bound, above, ties, room)
        rests += _mass(_value_of(keys) - top, (keys > 0) & (taken == 0), inv_ptr, NT, BF)
        candidate = start * WIDTH + tl.arange(0, PT * WIDTH)
        tl.store(scratch + num_taken + place, candidate, mask=taken & (place < BL))
    return rests, above + tl.minimum(ties, room)


@triton.jit
def _survivors(
    x, scratch, inv_ptr, least, top, V, num_taken, k, scale, cap,
    NT: tl.constexpr, PT: tl.constexpr, BF: tl.constexpr, BL: tl.constexpr, WIDTH: tl.constexpr,
    SCALED: tl.constexpr, CAP: tl.constexpr, LOW: tl.constexpr,
):  # fmt: skip
    """_sweep with a bound that leaves k .. BL candidates: `least`, a key that k reach, if it is one (0: none known)."""
    upper = _above(least)
    rests, number = _sweep(
        x, scratch, inv_ptr, upper, least, 0, top, V, num_taken, scale, cap, NT, PT, BF, BL, WIDTH, SCALED, CAP
    )
    if number > BL:
        # Many ties, or a small vocabulary: the largest bound that k reach, as in _best_tiles.
        bound = least ^ least
        bit = bound | 0x80000000
        reached = number
        step = 0
        while (step < 32 - LOW) & (reached > k):
            larger = bound | bit
            found = _number_above(x, scratch, larger - 1, V, num_taken, scale, cap, PT, WIDTH, SCALED, CAP)
            bound = tl.where(found >= k, larger, bound)
            reached = tl.where(found >= k, found, reached)
            bit = bit >> 1
            step += 1
        upper, has_ties = _ties_at(bound, reached, k, LOW)
        found = _number_above(x, scratch, upper, V, num_taken, scale, cap, PT, WIDTH, SCALED, CAP)
        room = tl.where(has_ties, k - found, 0)
        tl.debug_barrier()  # the first list must be all written before the second
        rests, number = _sweep(
            x, scratch, inv_ptr, upper, bound, room, top, V, num_taken, scale, cap, NT, PT, BF, BL, WIDTH, SCALED, CAP
        )
    return rests, number


@triton.jit
def _row_of_tiles(
    stats,
    scratch,
    inv_ptr,
    stat_stride,
    num_tiles,
    num_taken,
    k,
    NT: tl.constexpr,
    BN: tl.constexpr,
    BF: tl.constexpr,
    LOW: tl.constexpr,
):
    """The tiles that are looked at again, to memory in ascending order: those with the largest maxima; of equal maxima
    the lower tile, which holds the lower ids. Returns (row maximum; a key that k ids reach, or 0; sums of
    exp((z - top) / T) of all tiles and of those not taken, float32 [BF] each; sum of (z - top) exp(z - top))."""
    tile = tl.arange(0, BN)
    inside = tile < num_tiles
    maxima = tl.load(stats + tile, mask=inside, other=_FILL)
    keys = tl.where(inside, _order_key(maxima), 0)
    taken, place = _best_tiles(keys, num_taken, LOW)
    tl.store(scratch + place, tile, mask=taken)
    top = tl.max(tl.where(maxima == maxima, maxima, float("inf")), 0)
    # As many ids as tiles are taken reach the least of their maxima: no bound where those are fewer than k.
    least = tl.min(tl.where(taken, keys, 0xFFFFFFFF).to(tl.uint32), 0)
    least = tl.where(num_taken < k, least ^ least, least)
    # From each tile's own maximum to the row's, once for each temperature.
    gap = maxima - top
    lane = tl.arange(0, BF)
    totals = tl.full((BF,), 1.0, tl.float32)
    rests = tl.zeros((BF,), tl.float32)
    for number in tl.static_range(NT + 1):
        sums = tl.load(stats + (2 + number) * stat_stride + tile, mask=inside, other=0.0)
        sums = sums * tl.exp2(gap * (tl.load(inv_ptr + number) * _LOG2E))
        totals = tl.where(lane == number, tl.sum(sums, 0), totals)
        rests = tl.where(lane == number, tl.sum(tl.where(taken, 0.0, sums), 0), rests)
    sums = tl.load(stats + 2 * stat_stride + tile, mask=inside, other=0.0)
    moment = tl.load(stats + stat_stride + tile, mask=inside, other=0.0) + gap * sums
    return top, least, totals, rests, tl.sum(moment * tl.exp2(gap * _LOG2E), 0)


@triton.jit
def _in_order(x, scratch, survivors, V, num_taken, scale, cap, BL: tl.constexpr, JB: tl.constexpr,
              WIDTH: tl.constexpr, SCALED: tl.constexpr, CAP: tl.constexpr):  # fmt: skip
    """(ids, z, how many stand before it in the order (value down, id up)) of each survivor, [BL] each;
    -1 of them where there is none."""
    i = tl.arange(0, BL)
    ids, key = _ids_and_keys(x, scratch, i, i < survivors, V, num_taken, scale, cap, WIDTH, SCALED, CAP)
    place = tl.zeros((BL,), tl.int32)
    for start in range(0, survivors, JB):
        j = start + tl.arange(0, JB)
        _other_ids, other = _ids_and_keys(x, scratch, j, j < survivors, V, num_taken, scale, cap, WIDTH, SCALED, CAP)
        before = (other[None, :] > key[:, None]) | ((other[None, :] == key[:, None]) & (j[None, :] < i[:, None]))
        place += tl.sum(before.to(tl.int32), 1)
    return ids, _value_of(key), tl.where(i < survivors, place, -1)


@triton.jit
def _store_sums(out, figure_stride, inv_ptr, top, totals, rests, moment, NT: tl.constexpr, BF: tl.constexpr):
    """lse, entropy and log_tail, and those of the further temperatures, to memory; returns lse."""
    lane = tl.arange(0, BF)
    empty = top <= _RULED_OUT
    log_totals = tl.log2(totals) * _LN2
    inverse = tl.load(inv_ptr + lane, mask=lane <= NT, other=1.0)
    lse_at = tl.where(empty, -float("inf"), top * inverse + log_totals)
    lse = tl.sum(tl.where(lane == 0, lse_at, 0.0), 0)
    total = tl.sum(tl.where(lane == 0, totals, 0.0), 0)
    tails = tl.where(rests == 0.0, -float("inf"), tl.log2(tl.where(rests == 0.0, 1.0, rests)) * _LN2 - log_totals)
    # Rounding must not make the entropy of a certain teacher negative; NaN passes.
    entropy = tl.log2(total) * _LN2 - moment / total
    entropy = tl.where(empty, float("nan"), tl.where(entropy < 0.0, 0.0, entropy))
    tl.store(out, lse)
    tl.store(out + figure_stride, entropy)
    tl.store(out + 4 * figure_stride + lane * 0, tails, mask=lane == 0)
    further = (lane > 0) & (lane <= NT)
    tl.store(out + (4 + lane) * figure_stride, lse_at, mask=further)
    tl.store(out + (4 + NT + lane) * figure_stride, tails, mask=further)
    return lse


@triton.jit
def select_kernel(
    x_ptr,  # [B, head] raw logits, as tile_kernel read them
    label_ptr,  # int64 [B], < 0: none
    inv_ptr,  # float32 [1 + NT]
    stats_ptr,  # float32 [B, 3 + NT, stat_stride] of tile_kernel
    above_ptr,  # int32 [B, parts] of tile_kernel
    scratch_ptr,  # int32 [B, t + BL]
    id_ptr,  # int32 [B, k] out
    logprob_ptr,  # float32 [B, k] out
    figure_ptr,  # float32 [5 + 2 NT, B] out, in the order of teacher_pass.FIGURES, then lse_at and log_tail_at
    rank_ptr,  # int32 [B] out
    stride_x,
    stat_stride,
    figure_stride,  # floats from one figure to the next
    V,  # ids
    head,  # columns of x, >= V
    num_tiles,  # n
    num_taken,  # t = min(k, n)
    k,
    parts,
    scale,
    cap,
    NT: tl.constexpr,
    BN: tl.constexpr,
    BF: tl.constexpr,
    BP: tl.constexpr,  # n, 1 + NT and parts, rounded up to powers of 2
    PT: tl.constexpr,  # taken tiles that are looked at at a time, a power of 2
    BL: tl.constexpr,  # survivors at most: > k, a power of 2
    JB: tl.constexpr,  # survivors that are compared with all others at a time
    BX: tl.constexpr,  # columns beyond V per step
    WIDTH: tl.constexpr,
    SCALED: tl.constexpr,
    CAP: tl.constexpr,
    LOW: tl.constexpr,  # low bits of a float32 that are 0 in every logit of this dtype
):
    """Every figure of one token. Twin of topk's way over padded chunks (teacher_rows.py)."""
    row = tl.program_id(0).to(tl.int64)
    x = x_ptr + row * stride_x
    stats = stats_ptr + row * stat_stride * (3 + NT)
    scratch = scratch_ptr + row * (num_taken + BL)
    top, least, totals, rests, moment = _row_of_tiles(
        stats, scratch, inv_ptr, stat_stride, num_tiles, num_taken, k, NT, BN, BF, LOW
    )
    tl.debug_barrier()  # other threads wrote the list of tiles
    left, survivors = _survivors(
        x, scratch, inv_ptr, least, top, V, num_taken, k, scale, cap, NT, PT, BF, BL, WIDTH, SCALED, CAP, LOW
    )
    tl.debug_barrier()  # other threads wrote the survivors
    ids, z, place = _in_order(x, scratch, survivors, V, num_taken, scale, cap, BL, JB, WIDTH, SCALED, CAP)
    rests += left + _mass(z - top, place >= k, inv_ptr, NT, BF)
    out = figure_ptr + row
    lse = _store_sums(out, figure_stride, inv_ptr, top, totals, rests, moment, NT, BF)
    kept = (place >= 0) & (place < k)
    tl.store(id_ptr + row * k + place, ids, mask=kept)
    tl.store(logprob_ptr + row * k + place, tl.where(z <= _RULED_OUT, -float("inf"), z - lse), mask=kept)
    part = tl.arange(0, BP)
    above = tl.sum(tl.load(above_ptr + row * parts + part, mask=part < parts, other=0), 0)
    label = tl.load(label_ptr + row)
    _store_label(out + 2 * figure_stride, rank_ptr + row, x, label, above, lse, V, scale, cap, SCALED, CAP, WIDTH)
    tl.store(out + 3 * figure_stride, _excluded_mass(x, lse, V, head, scale, cap, SCALED, CAP, BX))
