"""Token difficulty: the loss that compute can remove, against the loss itself (paper, figure 5).

Shape letters: T tokens, D documents, X draws of the bootstrap.
"""

import numpy as np

from duollm.analysis.statistics import Bootstrap, Floats, Integers, sum_by_document

HIGH_LOSS_QUANTILE = 0.75


def difficulty(nll_small_T: Floats, nll_oracle_T: Floats) -> Floats:
    """Return nll(all small) - nll(oracle at a budget) per token [T], nats."""
    return nll_small_T - nll_oracle_T


def hard_without_gain(nll_small_T: Floats, gain_T: Floats, document_T: Integers, bootstrap: Bootstrap) -> Floats:
    """Return the share of high-loss tokens that gain less than the median token, draws [X].

    High loss: the top quarter of nll under all small. If difficulty were the loss itself the share
    would be 0, if the two had nothing to do with each other 0.5. Both thresholds are those of
    the data and stay fixed over the resamples.
    """
    high_T = nll_small_T >= np.quantile(nll_small_T, HIGH_LOSS_QUANTILE)
    wasted_T = high_T & (gain_T < np.median(gain_T))
    counts_DQ = sum_by_document(
        np.stack([wasted_T, high_T], axis=1).astype(np.float64), document_T, int(document_T.max()) + 1
    )
    return bootstrap.ratio(counts_DQ[:, 0], counts_DQ[:, 1])
