r"""What the kernels of gated slot attention do with gates: factors of products, sums over rows.

Products with e^{G_i-G_j} are products of operands scaled by factors Fq_i and Fk_j. Cut the block
into groups of 2^n rows, b the first row of the one that i is in:

    i, j in one group:  Fq_i = e^{E_i}   Fk_j = e^{-E_j}   2 E_i = sum_{b<t<=i} g - sum_{t>i} g  (1)

the sums over rows t of the group. `slots` finds the largest n with which no slot decays by more
than LIMIT in any group from its first to its last row. 7, one group, is the usual case and needs
one pair of factors, E = G - Ge/2. Smaller groups meet by binary halving: for h = 2^n, .., 64 the
rows i of the upper half of each 2h rows meet the rows j of its lower half through the first row u
of the upper one,

    Fq_i = e^{sum of g over [u, i]}     Fk_j = e^{sum of g over (j, u)}                          (2)

sums of numbers <= 0, never a difference, so that any gate in [-inf, 0] keeps its precision: with
n = 0 no factor exceeds 1. That is 8 - n pairs of factors, their exponents products of g with
matrices of `selections` (triton_gsa.py). The cases n = 7 and n < 7 are two launches of one source
(STRONG), each of which leaves the other's blocks alone.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (the parameters of a kernel have no Python types)

import triton
import triton.language as tl

FLOOR = tl.constexpr(-1e4)  # stands for -inf where gates are multiplied by 0; e^FLOOR is 0


@triton.jit
def sums(selected, g, dtype: tl.constexpr):
    """The 0/1 matrix `selected` times g, to 2^-17 of each term (dtype bf16) or in fp32.

    A product, not a scan: a scan across warps costs some 8 shared loads an element.
    """
    if dtype == tl.bfloat16:
        M, hi = selected.to(tl.bfloat16), g.to(tl.bfloat16)
        out = tl.dot(M, hi)
        out = tl.dot(M, (g - hi.to(tl.float32)).to(tl.bfloat16), out)
    else:
        out = tl.dot(selected, g, input_precision="tf32x3")
    return out


@triton.jit
def strength(s, g, at, live, GIVEN: tl.constexpr):
    """The write strengths: s, or 1 - e^g if they are not GIVEN. 0 where not live."""
    if GIVEN:
        w = tl.load(s + at, mask=live, other=0.0).to(tl.float32)
    else:
        w = 1.0 - tl.exp(tl.load(g + at, mask=live, other=0.0).to(tl.float32))
    return w


@triton.jit
def gates(g, live):
    """The log gates at g, 0 where not live, finite and in fp32."""
    return tl.maximum(tl.load(g, mask=live, other=0.0).to(tl.float32), FLOOR)


@triton.jit
def selected_sums(table, which, g, PLAIN: tl.constexpr, dtype: tl.constexpr):
    """Matrix `which` of `selections` times g, exact where PLAIN says that g is one bf16 number.

    From memory: made in registers, the matrices take more of them and of the time than their
    products do. FLOOR, rounded to bf16, is still a gate of 0.
    """
    i, j = tl.arange(0, 128)[:, None], tl.arange(0, 128)[None, :]
    selected = tl.load(table + which * (128 * 128) + i * 128 + j)
    return tl.dot(selected, g.to(tl.bfloat16)) if PLAIN else sums(selected, g, dtype)


@triton.jit
def sums_before(x, table, dtype: tl.constexpr):
    """Of each row, the sum of x over the rows before it.

    For bf16 operands a product, to 2^-17 of each term: a scan across warps takes some 8 shared
    loads an element. In fp32 the scan, which errs less.
    """
    product: tl.constexpr = dtype == tl.bfloat16
    return selected_sums(table, 14, x, False, dtype) if product else tl.cumsum(x, 0) - x


@triton.jit
def sums_after(g, step, rows, table, PLAIN: tl.constexpr, dtype: tl.constexpr):
    """Of each row, Ge - G as a sum of its own: no difference, which would cancel.

    g points to the gates (128, M) of the block, step elements from row to row, rows of them live.
    """
    i = tl.arange(0, 128)
    if dtype == tl.bfloat16:
        out = selected_sums(table, 15, gates(g, (i < rows)[:, None]), PLAIN, dtype)
    else:
        out = tl.cumsum(gates(g + step, (i + 1 < rows)[:, None]), 0, reverse=True)
    return out


@triton.jit
def factors(
    t, size, G, end, table, STRONG: tl.constexpr, PLAIN: tl.constexpr, dtype: tl.constexpr
):  # fmt: skip
    """Fq, Fk (128, M) and near (128, 128): e^{G_i-G_j} = Fq_i Fk_j for the near pairs i >= j.

    G are the running sums and end is Ge (1, M); if STRONG, G are the gates, and each pair i >= j is
    near for one t: t = size - 1 is (1) with n = size, t = size .. 6 is (2) with h = 2^t. Pairs
    that are near for an earlier t are so again, with factors of 0.
    """
    i = tl.arange(0, 128)
    if STRONG:
        own = t < size
        start = (i >> (t + 1)) << (t + 1)  # of 2^(t + 1) rows: a group, or two halves that meet
        near = start[:, None] == start[None, :]
        E = selected_sums(table, tl.where(own, size, 7 + t), G, PLAIN, dtype)
        upper = (i - start >= (1 << tl.maximum(t, 0)))[:, None]
        Fq = tl.where(own | upper, tl.exp(E), 0.0)
        Fk = tl.where(own, -E, E)
        Fk = tl.where(own | (upper == 0), tl.exp(Fk), 0.0)
    else:
        E = G - 0.5 * end
        Fq, Fk = tl.exp(E), tl.exp(-E)
        near = i[:, None] >= i[None, :]
    return Fq, Fk, near


@triton.jit
def add_mix(
    Z, A, w, G, end, size, table, STRONG: tl.constexpr, PLAIN: tl.constexpr, PREC: tl.constexpr
):  # fmt: skip
    """Z_i plus sum_j A_ij w_j e^{G_i-G_j}, A with zeros above the diagonal."""
    dtype = A.dtype
    if STRONG:
        for t in range(size - 1, 7):
            Fq, Fk, near = factors(t, size, G, end, table, True, PLAIN, dtype)
            X = tl.where(near, A, 0.0).to(dtype)
            Z += Fq * tl.dot(X, (w * Fk).to(dtype), input_precision=PREC)
    else:
        Fq, Fk, near = factors(0, 0, G, end, table, False, PLAIN, dtype)
        Z += Fq * tl.dot(A, (w * Fk).to(dtype), input_precision=PREC)
    return Z


@triton.jit
def add_scores(
    A, P, w, G, end, size, table, STRONG: tl.constexpr, PLAIN: tl.constexpr, PREC: tl.constexpr
):  # fmt: skip
    """A plus, for i >= j, sum_c P_ic w_jc e^{G_ic-G_jc}; the upper triangle is not meant."""
    dtype = P.dtype
    if STRONG:
        for t in range(size - 1, 7):
            Fq, Fk, near = factors(t, size, G, end, table, True, PLAIN, dtype)
            X, Y = (P * Fq).to(dtype), (w * Fk).to(dtype)
            A += tl.where(near, tl.dot(X, tl.trans(Y), input_precision=PREC), 0.0)
    else:
        Fq, Fk, near = factors(0, 0, G, end, table, False, PLAIN, dtype)
        X, Y = (P * Fq).to(dtype), (w * Fk).to(dtype)
        A = tl.dot(X, tl.trans(Y), A, input_precision=PREC)
    return A


@triton.jit
def slot_tile(
    s, g, sums_, ge, start, step, rows, n,
    M: tl.constexpr, MB: tl.constexpr, GIVEN: tl.constexpr, STRONG: tl.constexpr,
):  # fmt: skip
    """w, G as `factors` takes it, and Ge, of slots n .. n + MB.

    s and g have their first row at start and the next one a step further; sums_ is (128, M).
    """
    i = tl.arange(0, 128)[:, None]
    c = n + tl.arange(0, MB)[None, :]
    at = start + i * step + c
    w = strength(s, g, at, i < rows, GIVEN)
    G = gates(g + at, i < rows) if STRONG else tl.load(sums_ + i * M + c)
    return w, G, tl.load(ge + c)


@triton.jit
def slot_scores(
    x, s, g, sums_, ge, start, step, rows, size, table,
    dtype: tl.constexpr, M: tl.constexpr, MB: tl.constexpr, GIVEN: tl.constexpr,
    STRONG: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """`add_scores` over all slots, MB at a time, of x (128, M) in memory."""
    PLAIN: tl.constexpr = g.dtype.element_ty == tl.bfloat16 and dtype == tl.bfloat16
    at = tl.arange(0, 128)[:, None] * M + tl.arange(0, MB)[None, :]
    A = tl.zeros((128, 128), tl.float32)
    if MB == M:
        w, G, end = slot_tile(s, g, sums_, ge, start, step, rows, 0, M, MB, GIVEN, STRONG)
        A = add_scores(A, tl.load(x + at).to(dtype), w, G, end, size, table, STRONG, PLAIN, PREC)
    else:
        for n in tl.range(0, M, MB, num_stages=1):
            w, G, end = slot_tile(s, g, sums_, ge, start, step, rows, n, M, MB, GIVEN, STRONG)
            P = tl.load(x + at + n).to(dtype)
            A = add_scores(A, P, w, G, end, size, table, STRONG, PLAIN, PREC)
    return A
