"""Analyses a run: bootstraps its records once and makes every list of results.json from the draws."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

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

Row = TypeVar("Row")


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
    tokens, patterns = [one.tokens for one in domains], [one.patterns for one in domains]
    bootstraps = [each.bootstrap for each in draws]
    model = describe_model(run, first.tokens)
    gather = partial(gather_evidence, branches=first.tokens.space.branches, like_opt=model.get("architecture") == "opt")
    results = Results(
        provenance=read_json(run / "provenance.json"),
        model=model,
        data={one.tokens.domain: one.size for one in domains},
        context=first.tokens.context,
        bootstrap={"samples": bootstrap_samples, "seed": seed, "level": 0.95},
        nll=_each(nll_rows, draws),
        gap_closed=_each(gap_rows, draws),
        comparison=_each(partial(comparison_rows, timing=timing), draws, more),
        families=_each(partial(family_rows, samples=bootstrap_samples, seed=seed), more),
        spend=_each(spend_rows, more),
        agreement=_each(agreement_rows, draws),
        timing=timing.facts if timing else None,
        selection_noise=_each(noise_rows, draws),
        units=_each(unit_rows, draws),
        tries=_each(tries_rows, draws, best_of),
        ceiling=_each(partial(ceiling_rows, predictors=first.predictors), more),
        decomposition=_each(decomposition_rows, draws),
        best_of_patterns=_each(partial(best_of_pattern_rows, seed=seed), tokens, patterns, bootstraps),
        best_of_routes=_each(best_of_route_rows, tokens, best_of, patterns, bootstraps),
        layer_use=_each(partial(layer_use_rows, edges=edges), draws, tokens),
        difficulty=_each(difficulty_rows, tokens, bootstraps),
        difficulty_by_class=_each(class_rows, tokens, bootstraps),
        helped_most=_each(partial(helped_rows, seed=seed), tokens),
        claims=_each(lambda each, other: decide_claims(gather(each, other), each), draws, more),
    )
    write_results(run, results)
    return results


def _each(rows: Callable[..., Iterable[Row]], *of_domains: Sequence[Any]) -> list[Row]:
    """Return the rows of every domain, and of all pooled where nothing is given for single domains only."""
    return [row for given in zip(*of_domains, strict=False) for row in rows(*given)]


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
