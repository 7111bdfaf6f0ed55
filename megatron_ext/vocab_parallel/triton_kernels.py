"""The row kernels in Triton. Nothing but kernels is here, so that tests can load the file for the interpreter.

A program works on one tile of one row (sums) or one slab of one row (gradients): no program waits for another, nothing
is added atomically, and a tile's sum has one order, so results are the same bits in any company and any layout.
Column arguments: `V` real and `WIDTH` all local columns. `TILES` holds for each tile its begin and the end of what may
be read, both divided by ALIGN, and its end: multiplied again they tell the compiler that 16-byte loads are aligned,
and what was read behind the end becomes -inf.
"""

# mypy: ignore-errors
# ruff: noqa: SIM102  (a constant condition decides whether the inner one is compiled at all)

import triton
import triton.language as tl


@triton.jit
def _place(TILES, num_tiles, ALIGN: tl.constexpr):
    """Row and tile of this program; the tile's columns, and up to where they may be read."""
    program = tl.program_id(0).to(tl.int64)
    row, tile = program // num_tiles, program % num_tiles
    begin, readable, end = tl.load(TILES + 3 * tile), tl.load(TILES + 3 * tile + 1), tl.load(TILES + 3 * tile + 2)
    return row, tile, begin * ALIGN, readable * ALIGN, end


@triton.jit
def _scaled(LOGITS, columns, readable, end, scale):
    """float32 logits over the temperature, -inf from `end` on."""
    z = tl.load(LOGITS + columns, mask=columns < readable, other=float("-inf")).to(tl.float32) * scale
    return tl.where(columns < end, z, float("-inf"))


@triton.jit
def token_stats(
    LOGITS, TARGETS, LIVE, STATS, TILES, stride, start, num_tiles, slots, scale,
    HAS_LIVE: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, tile, begin, readable, end = _place(TILES, num_tiles, ALIGN)
    if HAS_LIVE:
        if tl.load(LIVE + row) == 0:
            return
    LOGITS += row * stride
    m = float("-inf")
    total = 0.0
    moment = 0.0
    for first in range(begin, end, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        z = _scaled(LOGITS, columns, readable, end, scale)
        larger = tl.maximum(m, tl.max(z, 0))
        reference = tl.where(larger > float("-inf"), larger, 0.0)
        # Sums taken against the old maximum move to the new one: e shrinks by `rescale`, z - m by the difference.
        difference = tl.where(m > float("-inf"), m - reference, 0.0)
        rescale = tl.exp(difference)
        x = z - reference
        e = tl.exp(x)
        moment = rescale * (moment + difference * total) + tl.sum(tl.where(e > 0, e * x, 0.0), 0)
        total = rescale * total + tl.sum(e, 0)
        m = larger
    target = tl.load(TARGETS + row) - start
    is_here = (target >= begin) & (target < end)
    z_y = tl.load(LOGITS + target, mask=is_here, other=float("-inf")).to(tl.float32) * scale
    STATS += (row * slots + tile) * 4
    tl.store(STATS, m)
    tl.store(STATS + 1, total)
    tl.store(STATS + 2, moment)
    tl.store(STATS + 3, z_y)


@triton.jit
def token_grad(
    LOGITS, TARGETS, LIVE, ROWS, FOR_LOGPROBS, FOR_ENTROPY, OUT, stride, out_stride, start, V, WIDTH, slabs, scale,
    HAS_LIVE: tl.constexpr, HAS_ENTROPY: tl.constexpr, BLOCK: tl.constexpr, SLAB: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    row, first = program // slabs, (program % slabs) * (BLOCK * SLAB)
    LOGITS += row * stride
    OUT += row * out_stride
    is_live = True
    if HAS_LIVE:
        is_live = tl.load(LIVE + row) != 0
    if not is_live:
        for k in tl.static_range(SLAB):
            columns = first + k * BLOCK + tl.arange(0, BLOCK)
            tl.store(OUT + columns, tl.zeros((BLOCK,), tl.float32).to(OUT.dtype.element_ty), mask=columns < WIDTH)
        return
    m, log_l = tl.load(ROWS + 4 * row), tl.load(ROWS + 4 * row + 1)
    g = tl.load(FOR_LOGPROBS + row) * scale
    target = tl.load(TARGETS + row) - start
    for k in tl.static_range(SLAB):
        columns = first + k * BLOCK + tl.arange(0, BLOCK)
        z = _scaled(LOGITS, columns, WIDTH, V, scale)
        log_p = (z - m) - log_l
        p = tl.exp(log_p)
        if HAS_ENTROPY:
            h, entropy = tl.load(FOR_ENTROPY + row) * scale, tl.load(ROWS + 4 * row + 3)
            d = -tl.where(p > 0, p * (g + h * (log_p + entropy)), p)  # a NaN in p stays
        else:
            d = -p * g
        d = tl.where((columns == target) & (columns < V), d + g, d)
        tl.store(OUT + columns, d.to(OUT.dtype.element_ty), mask=columns < WIDTH)


@triton.jit
def kl_stats(
    STUDENT, TEACHER, LIVE, STATS, TILES, stride, num_tiles, slots, scale,
    HAS_LIVE: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, tile, begin, readable, end = _place(TILES, num_tiles, ALIGN)
    if HAS_LIVE:
        if tl.load(LIVE + row) == 0:
            return
    STUDENT += row * stride
    TEACHER += row * stride
    m_s = float("-inf")
    m_t = float("-inf")
    l_s = 0.0
    u_s = 0.0
    l_t = 0.0
    w = 0.0
    top = 0.0
    for first in range(begin, end, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        s = _scaled(STUDENT, columns, readable, end, scale)
        t = _scaled(TEACHER, columns, readable, end, scale)
        larger_s, larger_t = tl.maximum(m_s, tl.max(s, 0)), tl.maximum(m_t, tl.max(t, 0))
        ref_s = tl.where(larger_s > float("-inf"), larger_s, 0.0)
        ref_t = tl.where(larger_t > float("-inf"), larger_t, 0.0)
        less_s = tl.where(m_s > float("-inf"), m_s - ref_s, 0.0)
        less_t = tl.where(m_t > float("-inf"), m_t - ref_t, 0.0)
        rescale_s, rescale_t = tl.exp(less_s), tl.exp(less_t)
        x, y = s - ref_s, t - ref_t
        q, p = tl.exp(x), tl.exp(y)
        u_s = rescale_s * (u_s + less_s * l_s) + tl.sum(tl.where(q > 0, q * x, 0.0), 0)
        l_s = rescale_s * l_s + tl.sum(q, 0)
        f = tl.where(p == 0, 0.0, p * (y - x))  # P = 0 contributes nothing, whatever its logarithm
        moved = less_t - less_s  # d against the new maxima is d against the old ones plus this
        w = rescale_t * (w + l_t * moved) + tl.sum(f, 0)
        top = tl.maximum(rescale_t * (top + tl.maximum(moved, 0.0)), tl.max(f, 0))
        l_t = rescale_t * l_t + tl.sum(p, 0)
        m_s, m_t = larger_s, larger_t
    STATS += (row * slots + tile) * 7
    tl.store(STATS, m_s)
    tl.store(STATS + 1, l_s)
    tl.store(STATS + 2, u_s)
    tl.store(STATS + 3, m_t)
    tl.store(STATS + 4, l_t)
    tl.store(STATS + 5, w)
    tl.store(STATS + 6, top)


@triton.jit
def kl_scan(
    STUDENT, TEACHER, SUSPECT, ROWS, SUMS, TILES, stride, num_tiles, slots, scale, clip,
    ALIGN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, tile, begin, readable, end = _place(TILES, num_tiles, ALIGN)
    if tl.load(SUSPECT + row) == 0:
        return
    STUDENT += row * stride
    TEACHER += row * stride
    m_s, log_s = tl.load(ROWS + 7 * row), tl.load(ROWS + 7 * row + 1)
    m_t, log_t = tl.load(ROWS + 7 * row + 2), tl.load(ROWS + 7 * row + 3)
    total = 0.0
    mass = 0.0
    for first in range(begin, end, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        s = _scaled(STUDENT, columns, readable, end, scale)
        t = _scaled(TEACHER, columns, readable, end, scale)
        log_p = (t - m_t) - log_t
        p = tl.exp(log_p)
        f = tl.where(p == 0, 0.0, p * (log_p - ((s - m_s) - log_s)))
        total += tl.sum(tl.where(f > clip, clip, f), 0)
        mass += tl.sum(tl.where(f > clip, p, 0.0), 0)
    SUMS += (row * slots + tile) * 2
    tl.store(SUMS, total)
    tl.store(SUMS + 1, mass)


@triton.jit
def kl_grad(
    STUDENT, TEACHER, LIVE, ROWS, CLIPPED_MASS, FOR_LOSS, OUT, stride, out_stride, V, WIDTH, slabs, scale, clip,
    HAS_LIVE: tl.constexpr, BLOCK: tl.constexpr, SLAB: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    row, first = program // slabs, (program % slabs) * (BLOCK * SLAB)
    STUDENT += row * stride
    TEACHER += row * stride
    OUT += row * out_stride
    is_live = True
    if HAS_LIVE:
        is_live = tl.load(LIVE + row) != 0
    if not is_live:
        for k in tl.static_range(SLAB):
            columns = first + k * BLOCK + tl.arange(0, BLOCK)
            tl.store(OUT + columns, tl.zeros((BLOCK,), tl.float32).to(OUT.dtype.element_ty), mask=columns < WIDTH)
        return
    m_s, log_s = tl.load(ROWS + 7 * row), tl.load(ROWS + 7 * row + 1)
    m_t, log_t = tl.load(ROWS + 7 * row + 2), tl.load(ROWS + 7 * row + 3)
    weight, clipped_mass = tl.load(FOR_LOSS + row) * scale, tl.load(CLIPPED_MASS + row)
    for k in tl.static_range(SLAB):
        columns = first + k * BLOCK + tl.arange(0, BLOCK)
        s = _scaled(STUDENT, columns, WIDTH, V, scale)
        t = _scaled(TEACHER, columns, WIDTH, V, scale)
        log_q, log_p = (s - m_s) - log_s, (t - m_t) - log_t
        q, p = tl.exp(log_q), tl.exp(log_p)
        if clipped_mass > 0:
            f = tl.where(p == 0, 0.0, p * (log_p - log_q))
            p = tl.where(f > clip, 0.0, p)
        d = q * (weight * (1.0 - clipped_mass)) - p * weight
        tl.store(OUT + columns, d.to(OUT.dtype.element_ty), mask=columns < WIDTH)
