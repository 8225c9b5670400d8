# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""What ranks hand each other after attention: rows of their heads, stored where the rank of each token reads them."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["tokens", "share"])
def send_tokens_kernel(
    x_ptr, out_ptr, offsets_ptr, x_batch, x_row, out_batch, out_row, tokens, share,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Run on a grid of (G·L, B) programs: a row of WIDTH columns each, a multiple of 8, as are strides and offsets.

    Of each of G segments of L `tokens`, every rank has a `share` in turn. Row t of its share of segment g becomes row
    g·share + t there, `offsets` of the rank further than out_ptr.
    """
    row = tl.program_id(0)
    batch = tl.program_id(1).to(tl.int64)
    segment, token = row // tokens, row % tokens
    columns = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + batch * x_batch + row.to(tl.int64) * x_row + columns, mask=columns < WIDTH)
    place = batch * out_batch + (segment * share + token % share).to(tl.int64) * out_row + columns
    place += tl.load(offsets_ptr + token // share)
    tl.store(out_ptr + tl.max_contiguous(tl.multiple_of(place, 8), 8), x, mask=columns < WIDTH)
