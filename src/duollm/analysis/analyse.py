"""Analyses a run: bootstraps its records once and makes every list of results.json from the draws."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from duollm.analysis.claims import decide_claims
from duollm.analysis.claims.evidence import gather_evidence
from duollm.analysis.comparison import (
    best_of_pattern_rows,
    best_of_route_rows,
    comparison_rows,
    gap_rows,
    nll_rows,
    spend_rows,
)
from duollm.analysis.difficulty import class_rows, difficulty_rows, helped_rows, with_difficulty
from duollm.analysis.families import family_rows
from duollm.analysis.gains import ceiling_rows, decomposition_rows, noise_rows, tries_rows, unit_rows
from duollm.analysis.layers import agreement_rows, layer_use_rows, position_edges
from duollm.analysis.results import Results, Size, write_results
from duollm.errors import UserError
from duollm.records.best_of import BestOf, pool_best_of, read_best_of
from duollm.records.facts import describe_model, list_domains, read_json, read_timing
from duollm.records.patterns import PatternSums, read_compared_patterns, read_patterns
from duollm.records.records import Draws, Records, pool, records_of_compared_text, records_of_oracle_text
from duollm.records.tokens import Tokens, read_tokens


@dataclass(frozen=True)
class _Domain:
    """Everything that was measured on one domain.

    Attributes:
        compared: records of policies that see no label, on the text of the comparison.
        best_of: the best of N random routes, by budget.
        predictors: descriptions of the ceiling's predictors, from its file.
    """

    tokens: Tokens
    patterns: PatternSums
    records: Records
    compared: Records
    best_of: dict[int, BestOf]
    predictors: list[dict[str, Any]]

    @property
    def size(self) -> Size:
        """How much text was used. Without evaluation, a run has no other text than the oracle's."""
        size = Size(len(self.tokens.documents), len(self.tokens.document_T), int(self.patterns.counted_D.sum()))
        if self.compared is self.records:
            return size
        compared_D = self.compared.tokens_D
        return Size(size.documents, size.tokens, size.pattern_tokens, len(compared_D), int(compared_D.sum()))


def analyse(run: Path, bootstrap_samples: int = 2000, seed: int = 0) -> Results:
    """Analyse a run folder, write its results.json and return what was written.

    Args:
        run: the run folder; see docs/formats.md.
        bootstrap_samples: number of resamples of documents behind every interval.
        seed: random seed of the resamples, and of the halves on which static is chosen and scored.

    Raises:
        UserError: a file is missing, foreign, or does not fit the others.
    """
    domains = [_read_domain(run, name, seed) for name in list_domains(run)]
    _check_one_space(domains)
    first, timing = domains[0], read_timing(run)
    edges = position_edges(np.concatenate([one.tokens.position_T for one in domains]))
    records, compared, best_of = _with_pooled(domains)
    draws = [Draws(one, bootstrap_samples, seed) for one in records]
    more = [Draws(one, bootstrap_samples, seed) for one in compared]
    single = list(zip(domains, draws, strict=False))  # without the pooled one
    model = describe_model(run, first.tokens)
    branches, like_opt = first.tokens.space.branches, model.get("architecture") == "opt"
    results = Results(
        provenance=read_json(run / "provenance.json"),
        model=model,
        data={one.tokens.domain: one.size for one in domains},
        context=first.tokens.context,
        bootstrap={"samples": bootstrap_samples, "seed": seed, "level": 0.95},
        nll=[row for each in draws for row in nll_rows(each)],
        gap_closed=[row for each in draws for row in gap_rows(each)],
        comparison=[row for pair in zip(draws, more, strict=True) for row in comparison_rows(*pair, timing)],
        families=[row for each in more for row in family_rows(each, bootstrap_samples, seed)],
        spend=[row for each in more for row in spend_rows(each)],
        agreement=[row for each in draws for row in agreement_rows(each)],
        timing=timing.facts if timing else None,
        selection_noise=[row for each in draws for row in noise_rows(each)],
        units=[row for each in draws for row in unit_rows(each)],
        tries=[row for pair in zip(draws, best_of, strict=True) for row in tries_rows(*pair)],
        ceiling=[row for each in more for row in ceiling_rows(each, first.predictors)],
        decomposition=[row for each in draws for row in decomposition_rows(each)],
        best_of_patterns=[
            row for one, each in single for row in best_of_pattern_rows(one.tokens, one.patterns, each.bootstrap, seed)
        ],
        best_of_routes=[
            row
            for one, each in single
            for row in best_of_route_rows(one.tokens, one.best_of, one.patterns, each.bootstrap)
        ],
        layer_use=[row for one, each in single for row in layer_use_rows(each, one.tokens, edges)],
        difficulty=[row for one, each in single for row in difficulty_rows(one.tokens, each.bootstrap)],
        difficulty_by_class=[row for one, each in single for row in class_rows(one.tokens, each.bootstrap)],
        helped_most=[row for one, _ in single for row in helped_rows(one.tokens, seed)],
        claims=[
            claim
            for each, other in zip(draws, more, strict=True)
            for claim in decide_claims(gather_evidence(each, other, branches, like_opt), each)
        ],
    )
    write_results(run, results)
    return results


def _read_domain(run: Path, name: str, seed: int) -> _Domain:
    tokens, files = read_tokens(run, name)
    patterns, more_patterns = read_patterns(run, tokens), read_compared_patterns(run, name)
    records = compared = with_difficulty(records_of_oracle_text(tokens, patterns, seed), tokens)
    if more_patterns:
        compared = records_of_compared_text(tokens, files, more_patterns, seed)
    predictors = [facts for one in files for facts in one.file.facts.get("policies", [])]
    return _Domain(tokens, patterns, records, compared, read_best_of(run, tokens), predictors)


def _with_pooled(domains: Sequence[_Domain]) -> tuple[list[Records], list[Records], list[dict[int, BestOf]]]:
    """Return what the domains hold; if there are several, that of all of them together comes last."""
    records, compared = [one.records for one in domains], [one.compared for one in domains]
    best_of = [one.best_of for one in domains]
    if len(domains) > 1:
        return [*records, pool(records)], [*compared, pool(compared)], [*best_of, pool_best_of(best_of)]
    return records, compared, best_of


def _check_one_space(domains: Sequence[_Domain]) -> None:
    first = domains[0].tokens
    for tokens in (domain.tokens for domain in domains[1:]):
        if tokens.space != first.space or tokens.context != first.context:
            raise UserError(
                f"{tokens.file.path}: its model or context is not that of {first.file.path}; "
                f"delete the folder {first.file.path.parent} and run `duollm oracle` again"
            )
