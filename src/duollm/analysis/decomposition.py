"""What the oracle's gain over static is made of: what can be predicted here, selection noise, the rest.

Shape letters: D documents, Q quantities.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from duollm.analysis.ceiling import ceiling_policy
from duollm.analysis.policies import EXACT, STATIC, Scores
from duollm.analysis.selection_noise import QUANTITIES as NOISE_QUANTITIES
from duollm.analysis.selection_noise import SelectionNoise
from duollm.analysis.statistics import Bootstrap, intervals

QUANTITIES = ("total", "predictable", "noise", "rest", "shuffled")
"""`total` = `predictable` + `noise` + `rest`; `shuffled` is the control of `predictable`."""


def decomposition_rows(
    scores: Scores, noise: Sequence[SelectionNoise], bootstrap: Bootstrap
) -> Iterator[dict[str, Any]]:
    """Yield the parts of the oracle's gain in every context and at every budget where all were measured.

    All of them spend exactly k big layers on every token. Fields are described in docs/formats.md.
    """
    nll_D = {(row.policy, row.big_layers): row.nll_D for row in scores.rows if row.context is None}
    for one in noise:
        k = one.big_layers
        ceiling_D, control_D = (nll_D.get((ceiling_policy(EXACT, shuffled), k)) for shuffled in (False, True))
        if ceiling_D is None or control_D is None:
            continue
        total_D, drawn_D = (one.gains_DQ[:, NOISE_QUANTITIES.index(name)] for name in ("gain", "gain_drawn"))
        static_D = nll_D[STATIC, k]
        predictable_D = static_D - ceiling_D
        parts_DQ = np.column_stack(
            [total_D, predictable_D, drawn_D, total_D - predictable_D - drawn_D, static_D - control_D]
        )
        row: dict[str, Any] = {"domain": scores.domain, "context": one.context, "big_layers": k}
        for quantity, part in zip(QUANTITIES, intervals(bootstrap.ratio(parts_DQ, scores.tokens_D)), strict=True):
            row |= {quantity: part.value, f"{quantity}_low": part.low, f"{quantity}_high": part.high}
        yield row
