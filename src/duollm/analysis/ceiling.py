"""The predictable ceiling: what prediction without labels gains over static.

Gains are at equal spending: against static at the big layers that were spent, between its two neighbouring k.

Shape letters: T tokens, D documents, X draws of the bootstrap.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from duollm.analysis.equal_budget import nll_at
from duollm.analysis.parquet import ResultFile
from duollm.analysis.policies import CEILING, EXACT, STATIC, Score, Scores
from duollm.analysis.statistics import Bootstrap, Integers, interval
from duollm.analysis.tables import DocumentSums, OracleTable, document_sums, oracle_rows

SHUFFLED = "shuffled"


@dataclass(frozen=True)
class CeilingScore:
    """One predictor at one budget.

    Attributes:
        depth: the last layer whose states the predictor sees.
        shuffled: whether it was fitted to the gains of other tokens, as a control.
        chosen: whether this depth was the best on validation text.
    """

    depth: int
    shuffled: bool
    chosen: bool
    spend: str
    score: Score
    compared: DocumentSums


def ceiling_policy(spend: str, shuffled: bool = False) -> str:
    """Return the policy name of the ceiling, or of its control, with its way of spending."""
    return "-".join([CEILING, *([SHUFFLED] if shuffled else []), *([EXACT] if spend == EXACT else [])])


def read_ceiling(run: Path, oracle: OracleTable) -> list[CeilingScore]:
    """Read ceiling/<domain>.parquet; empty if the ceiling was not measured.

    Raises:
        UserError: the file is foreign or covers other tokens than the oracle's.
    """
    path = run / "ceiling" / f"{oracle.domain}.parquet"
    if not path.exists():
        return []
    file = ResultFile.open(path, "duollm study", path.parent)
    rows_T = oracle_rows(file, oracle)
    return [_read_policy(file, oracle, rows_T, facts) for facts in file.fact("policies")]


def _read_policy(file: ResultFile, oracle: OracleTable, rows_T: Integers, facts: dict[str, Any]) -> CeilingScore:
    shuffled, spend = facts["predictor"] == SHUFFLED, facts["spend"]
    nll_N = file.floats(f"nll_{facts['column']}")
    big_N = file.space().count_big(file.route_ids(f"route_{facts['column']}")).astype(np.float64)
    nll_D, big_D = oracle.by_document(nll_N[rows_T]), oracle.by_document(big_N[rows_T])
    score = Score(ceiling_policy(spend, shuffled), facts["big_layers"], nll_D, big_D)
    return CeilingScore(facts["depth"], shuffled, facts["chosen"], spend, score, document_sums(file, nll_N, big_N))


def shown_scores(ceiling: Sequence[CeilingScore]) -> list[Score]:
    """Return what stands beside other policies: the chosen depth of every budget, and the control."""
    return [one.score for one in ceiling if one.chosen or one.shuffled]


def on_compared_text(ceiling: Sequence[CeilingScore]) -> list[CeilingScore]:
    """Return the same predictors with their scores on the text of the comparison."""
    return [
        replace(one, score=replace(one.score, nll_D=one.compared.nll_D, big_D=one.compared.spent_D)) for one in ceiling
    ]


def pool_ceiling(domains: Sequence[Sequence[CeilingScore]]) -> list[CeilingScore]:
    """Put the documents of all domains side by side, for what every domain has."""
    tables = [{(one.depth, one.score.policy, one.score.big_layers): one for one in domain} for domain in domains]
    return [
        replace(
            first,
            score=replace(
                first.score,
                nll_D=np.concatenate([table[key].score.nll_D for table in tables]),
                big_D=np.concatenate([table[key].score.big_D for table in tables]),
            ),
        )
        for key, first in tables[0].items()
        if all(key in table for table in tables)
    ]


def ceiling_rows(scores: Scores, ceiling: Sequence[CeilingScore], bootstrap: Bootstrap) -> Iterator[dict[str, Any]]:
    """Yield what every predictor gains over static; fields are described in docs/formats.md."""
    static_X = {
        (row.policy, row.big_layers): bootstrap.ratio(row.nll_D, scores.tokens_D)
        for row in scores.rows
        if row.policy == STATIC
    }
    for one in ceiling:
        spent_X = bootstrap.ratio(one.score.big_D, scores.tokens_D)
        at_spent_X = nll_at(static_X, STATIC, spent_X)
        if at_spent_X is None:
            continue
        gain = interval(at_spent_X - bootstrap.ratio(one.score.nll_D, scores.tokens_D))
        yield {
            "domain": scores.domain,
            "depth": one.depth,
            "shuffled": one.shuffled,
            "chosen": one.chosen,
            "spend": one.spend,
            "big_layers": one.score.big_layers,
            "mean_big_layers": float(spent_X[0]),
            "gain": gain.value,
            "low": gain.low,
            "high": gain.high,
        }
