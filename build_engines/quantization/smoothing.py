"""Smoothing: an input's outlier channels are divided by a factor, and the weights' rows multiplied by it."""

from __future__ import annotations

import torch

STRENGTHS = (0.25, 0.5, 0.75)
"""Strengths that are tried, beside none."""

WORTHWHILE = 0.02
"""Share of the error that smoothing must take away to be worth a multiplication in the graph.

With e4m3 it seldom does: four bits of exponent keep the relative precision of channels that are a few thousand times
smaller than the largest.
"""


def smoothing_multiplier(input_peaks: torch.Tensor, weight_peaks: torch.Tensor, strength: float) -> torch.Tensor:
    """Return what inputs are multiplied by, channel by channel, before they are quantised.

    Args:
        input_peaks: [in] fp32, the largest magnitude seen of each input channel.
        weight_peaks: [in] fp32, the largest magnitude of each channel's weights, over all layers that take the input.
        strength: 0 moves nothing of the input's range into the weights, 1 all of it.

    Returns:
        [in] fp32 powers of two, so that the product is unchanged to the last bit wherever nothing underflows; 1 for a
        channel without inputs or weights.

    Source: Xiao et al., SmoothQuant (arXiv 2211.10438), equation 4: s_j = max|X_j|^α / max|W_j|^(1−α). We return
    1 / s_j, rounded to a power of two.
    """
    exponents = (1 - strength) * weight_peaks.log2() - strength * input_peaks.log2()
    known = (input_peaks > 0) & (weight_peaks > 0)
    # Only the ratios matter: the middle channel keeps its size.
    middle = exponents[known].median() if bool(known.any()) else exponents.new_zeros(())
    return torch.where(known, torch.exp2((exponents - middle).round().clamp(-30, 30)), 1.0)
