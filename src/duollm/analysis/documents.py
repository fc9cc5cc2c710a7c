"""Mean losses of several policies on the same tokens, with intervals over documents.

Shape letters: T tokens, P policies, D documents, X draws of the bootstrap.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from duollm.analysis.statistics import Bootstrap, Floats, sum_by_document

BOOTSTRAP_SAMPLES = 2000


def mean_draws(documents: Sequence[str] | NDArray[np.str_], nll_TP: Floats, seed: int = 0) -> Floats:
    """Mean nll of the data and of every resample of the documents, [X, P], nats.

    Resamples are the same for all policies, so differences between columns are paired. With a single
    document all resamples are NaN: nothing is known of how documents differ.

    Args:
        documents: the document of each token, [T].
    """
    names, document_T = np.unique(np.asarray(documents), return_inverse=True)
    totals_DP = sum_by_document(nll_TP, document_T, len(names))
    tokens_D = np.bincount(document_T)
    means_XP = Bootstrap([len(names)], BOOTSTRAP_SAMPLES, seed).ratio(totals_DP, tokens_D)
    if len(names) == 1:
        means_XP[1:] = np.nan
    return means_XP
