"""Claims of several runs: each takes what it measures from the run that can measure it, and from every seed.

A column of the table is a seed: one run for each part that it can play. The parts are read from the runs' recipes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import sqrt
from pathlib import Path

import numpy as np

from duollm.analysis.claims import about
from duollm.analysis.claims.models import SHARES, model_claims, paired_draws, scored_domains
from duollm.analysis.results import Results, read_results
from duollm.analysis.verdicts import Claim, Condition, Reading, Verdict, decide, judge
from duollm.config import Recipe, recipe_of
from duollm.errors import UserError
from duollm.records.bootstrap import Estimate, Floats

_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""97.5 % points of Student's t with 1, 2, ... degrees of freedom."""
_SAME_WIDTH = 0.02


@dataclass(frozen=True)
class Run:
    """A run folder with its recipe, and its results unless it only stands beside others (dense, frozen)."""

    folder: Path
    recipe: Recipe
    results: Results | None

    @classmethod
    def read(cls, folder: Path) -> "Run":
        """Read a run folder.

        Raises:
            UserError: it is none, or its results are missing or of another version.
        """
        recipe = recipe_of(folder)
        beside = role_of(recipe).startswith(("dense", "frozen"))
        return cls(folder, recipe, None if beside else read_results(folder))


def role_of(recipe: Recipe) -> str:
    """Return which part a run plays, by its recipe."""
    if recipe.pretrain.branch_shares == (0.0, 0.0, 1.0):
        return f"dense of width {recipe.model.intermediate_size}"
    if recipe.pretrain.freeze == "big":
        return "frozen"
    searched = "-".join(dict.fromkeys([*recipe.oracle.branches, *recipe.router.branches]))
    return f"{recipe.model.architecture} {searched}"


@dataclass
class Column:
    """One seed: a run for each part."""

    seed: int
    runs: dict[str, Run] = field(default_factory=dict)

    @property
    def main(self) -> Run | None:
        """The run that others stand beside: the first whose oracle may not skip, else the first with results."""
        studies = [run for run in self.runs.values() if run.results]
        plain = [run for run in studies if "skip" not in run.recipe.oracle.branches and not _like_opt(run)]
        return next(iter(plain or studies), None)

    def claims(self) -> Iterator[Claim]:
        """Yield every claim in every domain, its conditions taken from all runs of this seed."""
        found: dict[tuple[str, str], list[Claim]] = {}
        studies = [run for run in self.runs.values() if run.results]
        for run in studies:
            assert run.results
            others = [other for other in studies if not _like_opt(other)]
            for claim in run.results.claims:
                if claim.id != "C16" and _like_opt(run) and others:
                    continue  # the claims about the paper's own model come from another run
                found.setdefault((claim.id, claim.domain), []).append(claim)
        for claim in self._of_models():
            found[claim.id, claim.domain] = [claim]
        for claims in found.values():
            yield united(claims)

    def _of_models(self) -> Iterator[Claim]:
        main = self.main
        if main is None or not main.results:
            return
        domains, seed = scored_domains(main.folder), main.recipe.seed
        for domain in dict.fromkeys(claim.domain for claim in main.results.claims):
            mine = domains if domain == "pooled" else [name for name in domains if name == domain]
            over_X, frozen_X = {}, None
            for role, run in self.runs.items():
                if role == "frozen":
                    pair_X2 = paired_draws(mine, [(run.folder, "random:0.5"), (main.folder, "random:0.5")], seed)
                    frozen_X = _difference(pair_X2)
                elif role.startswith("dense"):
                    share = equal_share(run, main)
                    pair_X2 = paired_draws(mine, [(main.folder, f"random:{share:g}"), (run.folder, "all-big")], seed)
                    difference_X = _difference(pair_X2)
                    if difference_X is not None:
                        over_X[share] = difference_X
            for claim in model_claims(domain, over_X, frozen_X):
                yield about(claim)


def _like_opt(run: Run) -> bool:
    return run.recipe.model.architecture == "opt"


def _difference(pair_X2: Floats | None) -> Floats | None:
    return None if pair_X2 is None else pair_X2[:, 0] - pair_X2[:, 1]


def equal_share(dense: Run, duo: Run) -> float:
    """Return the share of big at which the duo takes the FLOPs of a dense model.

    Raises:
        UserError: it is none of those that the paper compares.
    """
    width, sizes = dense.recipe.model.intermediate_size, duo.recipe.model
    equal = {share: share * sizes.intermediate_size + (1 - share) * sizes.small_intermediate_size for share in SHARES}
    nearest = min(equal, key=lambda share: abs(equal[share] - width))
    if abs(equal[nearest] - width) > _SAME_WIDTH * sizes.intermediate_size:
        widths = ", ".join(f"{each:g}" for each in equal.values())
        raise UserError(
            f"{dense.folder}: a dense model whose FFNs are {width} wide; those of equal FLOPs with {duo.folder} are "
            f"{widths} wide"
        )
    return nearest


def columns_of(runs: Sequence[Run]) -> list[Column]:
    """Put runs of one seed together. A second run of the same part and seed opens a column of its own."""
    columns: list[Column] = []
    for run in runs:
        role = role_of(run.recipe)
        column = next((one for one in columns if one.seed == run.recipe.seed and role not in one.runs), None)
        if column is None:
            column = Column(run.recipe.seed)
            columns.append(column)
        column.runs[role] = run
    return [column for column in columns if column.main]


def united(claims: Sequence[Claim]) -> Claim:
    """Put the conditions of runs together that measure different parts of a claim.

    A condition that no run measured stays, unless it stands for those that another run measured: its quantity is then
    the beginning of theirs.
    """
    if len(claims) == 1:
        return claims[0]
    measured = {one.quantity: one for claim in claims for one in claim.conditions if one.estimate}
    missing = {one.quantity: one for claim in claims for one in claim.conditions if not one.estimate}
    missing = {name: one for name, one in missing.items() if not any(each.startswith(name) for each in measured)}
    told = [claim for claim in claims if claim.verdict != "not measured"] or list(claims[:1])
    finding = " ".join(dict.fromkeys(claim.finding for claim in told))
    first = told[0]
    whole = decide(first.id, first.domain, first.statement, finding, *measured.values(), *missing.values())
    return replace(whole, source=first.source, readings=first.readings)


def over_seeds(claims: Sequence[Claim]) -> Claim:
    """Decide a claim over seeds: the estimates are means, with an interval over documents and seeds.

    Verdicts that differ where both are measured make it unstable.
    """
    measured = [claim for claim in claims if claim.verdict != "not measured"]
    if len(measured) < 2:
        return (measured or list(claims))[0]
    seeds = [{one.quantity: one for one in claim.conditions} for claim in measured]
    conditions = [_mean([seed[name] for seed in seeds if name in seed]) for name in seeds[0]]
    first = measured[0]
    whole = decide(first.id, first.domain, first.statement, first.finding, *conditions)
    readings = [_reading(claim_readings) for claim_readings in _by_reading(measured)]
    verdict = _agreed([claim.verdict for claim in measured])
    return replace(whole, source=first.source, readings=readings, verdict=verdict)


def _agreed(verdicts: Sequence[Verdict]) -> Verdict:
    return verdicts[0] if len(set(verdicts)) == 1 else "unstable"


def _by_reading(claims: Sequence[Claim]) -> Iterator[list[Reading]]:
    for reading in claims[0].readings:
        same = [one for claim in claims for one in claim.readings]
        yield [one for one in same if (one.context, one.labels) == (reading.context, reading.labels)]


def _reading(seeds: Sequence[Reading]) -> Reading:
    first = seeds[0]
    same = [one.estimate for one in seeds if one.quantity == first.quantity and one.estimate]
    return replace(first, verdict=_agreed([one.verdict for one in seeds]), estimate=mean_over_seeds(same))


def _mean(seeds: Sequence[Condition]) -> Condition:
    estimates = [one.estimate for one in seeds if one.estimate]
    if len(estimates) < 2:
        return next((one for one in seeds if one.estimate), seeds[0])
    whole = replace(seeds[0], estimate=mean_over_seeds(estimates))
    if whole.above is None and whole.below is None:
        return replace(whole, verdict=_agreed([one.verdict for one in seeds]))
    return judge(whole)


def mean_over_seeds(estimates: Sequence[Estimate]) -> Estimate:
    """Return the mean over seeds, with the wider of two intervals: over documents, and Student's over seeds.

    Over documents it is as wide as those of the seeds in the mean: seeds are studied on much the same documents.
    """
    values = np.array([one.value for one in estimates])
    mean = float(values.mean())
    if len(estimates) == 1:
        return estimates[0]
    over_documents = float(np.mean([one.high - one.low for one in estimates])) / 2
    over_seeds = _STUDENT[min(len(values) - 1, len(_STUDENT)) - 1] * float(values.std(ddof=1)) / sqrt(len(values))
    half = max(over_documents, over_seeds)
    return Estimate(mean, mean - half, mean + half)
