"""results.json: every number of the report, with intervals."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from duollm.analysis.agreement import Agreement, agreement_rows, measure_agreement, pool_agreement
from duollm.analysis.ceiling import (
    CeilingScore,
    ceiling_rows,
    on_compared_text,
    pool_ceiling,
    read_ceiling,
    shown_scores,
)
from duollm.analysis.claims import decide_claims, gather_evidence
from duollm.analysis.comparison import comparison_rows, spend_rows
from duollm.analysis.decomposition import decomposition_rows
from duollm.analysis.layer_use import LayerUse, count_layer_use, pool_layer_use, position_edges
from duollm.analysis.policies import EXECUTED, ORACLE, Scores, pool, score_compared, score_policies
from duollm.analysis.rows import (
    PolicyLayerUse,
    Row,
    best_of_rows,
    difficulty_rows,
    gap_rows,
    layer_use_rows,
    nll_rows,
)
from duollm.analysis.selection_noise import SelectionNoise, measure_noise, noise_rows, pool_noise
from duollm.analysis.statistics import Bootstrap, Integers
from duollm.analysis.tables import (
    OracleTable,
    PatternTable,
    RouterTable,
    list_domains,
    read_compared_patterns,
    read_oracle,
    read_patterns,
    read_routers,
)
from duollm.analysis.timing import read_timing
from duollm.errors import UserError
from duollm.files import write_json
from duollm.routes.space import RouteSpace


@dataclass(frozen=True)
class _Domain:
    """The tables of one domain."""

    oracle: OracleTable
    patterns: PatternTable
    routers: list[RouterTable]
    ceiling: list[CeilingScore]
    compared: tuple[list[str], PatternTable] | None


@dataclass(frozen=True)
class _Sample:
    """A set of documents that claims are decided on: a domain, or all domains pooled."""

    scores: Scores
    uses: list[PolicyLayerUse]
    noise: list[SelectionNoise]
    agreement: list[Agreement]
    bootstrap: Bootstrap
    compared: Scores
    """What runs without the label, on the text of the comparison; in runs of older versions as `scores`."""
    ceiling: list[CeilingScore]
    """On the text of `compared`."""
    compared_bootstrap: Bootstrap


def analyse(run: Path, bootstrap_samples: int = 2000, seed: int = 0) -> dict[str, Any]:
    """Analyse a run folder, write its results.json and return what was written.

    Args:
        run: the run folder; see docs/formats.md.
        bootstrap_samples: resamples of documents behind every interval.
        seed: seed of the resamples and of the halves that static is chosen and scored on.

    Raises:
        UserError: a file is missing, foreign, or does not fit the others.
    """
    domains = [_read_domain(run, name) for name in list_domains(run)]
    _check_one_space(domains)
    edges = position_edges(np.concatenate([domain.oracle.position_T for domain in domains]))
    samples = [_sample(domain, edges, bootstrap_samples, seed) for domain in domains]
    pooled = [_pool(samples, bootstrap_samples, seed)] if len(samples) > 1 else []
    pairs, timing, everything = list(zip(domains, samples, strict=True)), read_timing(run), samples + pooled
    results = {
        "provenance": _read_json(run / "provenance.json"),
        "model": _describe_model(run, domains[0].oracle),
        "data": {domain.oracle.domain: _size(domain) for domain in domains},
        "context": domains[0].oracle.context,
        "bootstrap": {"samples": bootstrap_samples, "seed": seed, "level": 0.95},
        "nll": _list(nll_rows(one.scores, one.bootstrap) for one in everything),
        "gap_closed": _list(gap_rows(one.scores, one.bootstrap) for one in everything),
        "comparison": _list(
            comparison_rows(one.scores, one.bootstrap, one.compared, one.compared_bootstrap, timing)
            for one in everything
        ),
        "spend": _list(spend_rows(one.compared, one.compared_bootstrap) for one in everything),
        "agreement": _list(agreement_rows(one.scores.domain, one.agreement, one.bootstrap) for one in everything),
        "timing": timing and timing.facts,
        "selection_noise": _list(noise_rows(one.scores, one.noise, one.bootstrap) for one in everything),
        "ceiling": _list(ceiling_rows(one.compared, one.ceiling, one.compared_bootstrap) for one in everything),
        "decomposition": _list(decomposition_rows(one.scores, one.noise, one.bootstrap) for one in everything),
        "best_of_patterns": _list(
            best_of_rows(domain.oracle, domain.patterns, one.bootstrap, seed) for domain, one in pairs
        ),
        "layer_use": _list(layer_use_rows(one.scores.domain, one.uses, edges, one.bootstrap) for one in samples),
        "difficulty": _list(difficulty_rows(domain.oracle, one.bootstrap) for domain, one in pairs),
        "claims": _list(_claim_rows(one) for one in everything),
    }
    write_json(run / "results.json", results)
    return results


def read_results(run: Path) -> dict[str, Any]:
    """Read a run's results.json.

    Raises:
        UserError: there is none, or it is damaged.
    """
    results: dict[str, Any] = _read_json(run / "results.json")
    return results


def main_context_rows(results: dict[str, Any]) -> list[Row]:
    """Return the rows of `nll` without the oracle in other contexts than the run's main one."""
    return [
        row for row in results["nll"] if row["policy"] not in (ORACLE, EXECUTED) or row["context"] == results["context"]
    ]


def headline_domain(results: dict[str, Any]) -> str:
    """Return the domain that speaks for the run: all pooled, or the only one."""
    domains = list(results["data"])
    return "pooled" if len(domains) > 1 else str(domains[0])


def _read_domain(run: Path, name: str) -> _Domain:
    oracle = read_oracle(run, name)
    return _Domain(
        oracle,
        read_patterns(run, oracle),
        read_routers(run, oracle),
        read_ceiling(run, oracle),
        read_compared_patterns(run, name),
    )


def _check_one_space(domains: Sequence[_Domain]) -> None:
    first = domains[0].oracle
    for oracle in (domain.oracle for domain in domains[1:]):
        if oracle.space != first.space or oracle.context != first.context:
            raise UserError(
                f"{oracle.path}: its model or context is not that of {first.path}; "
                f"delete the folder {first.path.parent} and run `duollm oracle` again"
            )


def _sample(domain: _Domain, edges: Integers, bootstrap_samples: int, seed: int) -> _Sample:
    scores = score_policies(domain.oracle, domain.patterns, domain.routers, seed)
    scores = replace(scores, rows=scores.rows + shown_scores(domain.ceiling))
    compared, ceiling = scores, domain.ceiling
    if domain.compared is not None:
        documents, patterns = domain.compared
        of_router = {router.name: router.compared for router in domain.routers}
        ran = [(score, of_router[score.policy]) for score in scores.rows if score.kind]
        ran += [(one.score, one.compared) for one in domain.ceiling if one.chosen or one.shuffled]
        compared = score_compared(scores, documents, patterns, domain.oracle.space, ran, seed)
        ceiling = on_compared_text(domain.ceiling)
    noise = measure_noise(domain.oracle, scores)
    agreement = measure_agreement(domain.oracle, domain.routers)
    bootstrap = Bootstrap(scores.strata, bootstrap_samples, seed)
    of_compared = Bootstrap(compared.strata, bootstrap_samples, seed)
    return _Sample(scores, _layer_uses(domain, edges), noise, agreement, bootstrap, compared, ceiling, of_compared)


def _layer_uses(domain: _Domain, edges: Integers) -> list[PolicyLayerUse]:
    oracle = domain.oracle

    def count(space: RouteSpace, route_T: Integers) -> LayerUse:
        return count_layer_use(space, route_T, oracle.document_T, oracle.position_T, edges)

    uses = [
        PolicyLayerUse(ORACLE, k, None, None, count(oracle.space, route_T))
        for k, route_T in oracle.route_oracle_T.items()
    ]
    uses += [
        PolicyLayerUse(one.name, one.big_layers, one.kind, one.spend, count(one.space, one.route_T))
        for one in domain.routers
    ]
    return uses


def _pool(samples: Sequence[_Sample], bootstrap_samples: int, seed: int) -> _Sample:
    scores = pool([one.scores for one in samples])
    uses = []
    for first in samples[0].uses:
        same = [
            use.use
            for one in samples
            for use in one.uses
            if (use.policy, use.big_layers) == (first.policy, first.big_layers)
        ]
        if len(same) == len(samples):
            uses.append(replace(first, use=pool_layer_use(same)))
    noise = pool_noise([one.noise for one in samples])
    agreement = pool_agreement([one.agreement for one in samples])
    ceiling = pool_ceiling([one.ceiling for one in samples])
    compared = pool([one.compared for one in samples])
    bootstrap, of_compared = (Bootstrap(each.strata, bootstrap_samples, seed) for each in (scores, compared))
    return _Sample(scores, uses, noise, agreement, bootstrap, compared, ceiling, of_compared)


def _claim_rows(sample: _Sample) -> list[Row]:
    share_XL = {one.big_layers: one.use.by_layer(sample.bootstrap) for one in sample.uses if one.policy == ORACLE}
    evidence = gather_evidence(sample.scores, sample.bootstrap, share_XL)
    return [claim.as_dict() for claim in decide_claims(evidence)]


def _describe_model(run: Path, oracle: OracleTable) -> dict[str, Any]:
    """Return the model's sizes; what the run folder does not know (a model kept elsewhere) is left out."""
    branches = [branch.name.lower() for branch in oracle.space.branches]
    description: dict[str, Any] = {"num_layers": oracle.space.num_layers, "branches": branches}
    config = run / "model" / "config.json"
    if config.exists():
        known = ("hidden_size", "intermediate_size", "small_intermediate_size", "num_attention_heads", "vocab_size")
        description |= {key: value for key, value in _read_json(config).items() if key in known}
    training_tokens = _training_tokens(run / "config.yaml")
    if training_tokens:
        description["training_tokens"] = training_tokens
    weights = sorted((run / "model").glob("*.safetensors"))
    if weights:
        description["parameters"] = sum(_count_parameters(file) for file in weights)
    return description


def _training_tokens(recipe: Path) -> int | None:
    """Return for how many tokens the recipe had the model trained; None if it took one or is not there."""
    if not recipe.exists():
        return None
    settings = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    return None if settings["model"]["path"] else int(settings["pretrain"]["tokens"])


def _count_parameters(file: Path) -> int:
    """Count from the header of a safetensors file: its length in 8 bytes, then JSON with the shapes."""
    with file.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    return sum(prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")


def _size(domain: _Domain) -> dict[str, int]:
    return {
        "documents": len(domain.oracle.documents),
        "tokens": len(domain.oracle.document_T),
        "pattern_tokens": int(domain.patterns.counted_D.sum()),
        **_compared_size(domain),
    }


def _compared_size(domain: _Domain) -> dict[str, int]:
    if domain.compared is None:
        return {}
    documents, patterns = domain.compared
    return {"compared_documents": len(documents), "compared_tokens": int(patterns.counted_D.sum())}


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; is {path.parent} a run folder of duollm?") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON ({error}); give a run folder of duollm") from None


def _list(rows: Iterable[Iterable[Row]]) -> list[Row]:
    return list(chain.from_iterable(rows))
