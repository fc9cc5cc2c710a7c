"""Splits the oracle's gain over static into a predictable part, selection noise and the rest.

The oracle picks the best of thousands of routes with the label in hand. The same search with a label y', drawn from the
model's own all-big prediction, measures selection noise: what a peek buys if the label is chance. A second draw y''
measures what the routes picked with y' are worth for another label.

Shape letters: X draws of the bootstrap.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from duollm.analysis.results import CeilingRow, DecompositionRow, NoiseRow, TriesRow, UnitRow
from duollm.records import keys
from duollm.records.best_of import BestOf
from duollm.records.bootstrap import Estimate, interval, intervals
from duollm.records.keys import Key
from duollm.records.records import NLL, Draws


def _drawn(draws: Draws) -> Iterator[Key]:
    """Yield the searches for a drawn label that can be compared with static.

    With no or all layers big there is one route only, so nothing is picked and the budget is left out.
    """
    searched = [key for quantity, key in draws.records.sums if quantity == NLL and key.policy == keys.DRAWN_ORACLE]
    for key in searched:
        if draws.records.offers_routes(key.big_layers) and Key(keys.DRAWN_STATIC, key.big_layers) in draws:
            yield key


def noise_rows(draws: Draws) -> Iterator[NoiseRow]:
    """Yield the gains over static with true and drawn labels, for every context and budget with drawn labels."""
    for drawn in _drawn(draws):
        yield NoiseRow(draws.records.domain, str(drawn.context), drawn.big_layers, **_peeks(draws, drawn, 1))


def unit_rows(draws: Draws) -> Iterator[UnitRow]:
    """Yield the same of searches that chose one route for several neighbouring tokens, and of one token's search."""
    measured = {key.policy for quantity, key in draws.records.sums if quantity == NLL}
    units = sorted({keys.numbers_in(policy)[0] for policy in measured if policy.startswith("unit")})
    for drawn in _drawn(draws) if units else ():
        for unit in (1, *units):
            if drawn._replace(policy=keys.of_unit(drawn.policy, unit)) in draws:
                gains = _peeks(draws, drawn, unit)
                yield UnitRow(draws.records.domain, str(drawn.context), drawn.big_layers, **gains, unit=unit)


def tries_rows(draws: Draws, by_budget: Mapping[int, BestOf]) -> Iterator[TriesRow]:
    """Yield the gains over static by the number of routes that were tried, for every budget that offers routes."""
    for k, best in by_budget.items():
        if not (best.labels and draws.records.offers_routes(k)):
            continue
        gains = {name: draws.bootstrap.ratio(gain_DN, best.counted_D) for name, gain_DN in best.gains.items()}
        yield TriesRow(
            draws.records.domain,
            k,
            best.drawn,
            gain=intervals(gains["nll"]),
            gain_drawn=intervals(gains["drawn1"]),
            second_draw=intervals(gains["second1"]),
            gain_beyond_drawn=intervals(gains["nll"] - gains["drawn1"]),
            gain_expected=intervals(gains["expected"]),
            labels=best.labels,
            gain_by_labels=[interval(gains[f"drawn{labels}"][:, -1]) for labels in best.labels],
            second_by_labels=[interval(gains[f"second{labels}"][:, -1]) for labels in best.labels],
        )


def _peeks(draws: Draws, drawn: Key, unit: int) -> dict[str, Estimate]:
    """What a peek at the labels of `unit` neighbouring tokens gains over static: on the text, and on drawn labels."""
    oracle_X, drawn_X, second_X = (
        draws[drawn._replace(policy=keys.of_unit(policy, unit))]
        for policy in (keys.ORACLE, keys.DRAWN_ORACLE, keys.DRAWN_SECOND)
    )
    static_X, expected_X = (draws[Key(policy, drawn.big_layers)] for policy in (keys.STATIC, keys.DRAWN_STATIC))
    return {
        "gain": interval(static_X - oracle_X),
        "gain_drawn": interval(expected_X - drawn_X),
        "second_draw": interval(expected_X - second_X),
        "gain_beyond_drawn": interval(static_X - oracle_X - expected_X + drawn_X),
    }


def decomposition_rows(draws: Draws) -> Iterator[DecompositionRow]:
    """Yield the parts of the oracle's gain, for every context and budget where all parts were measured.

    All policies involved spend exactly k big layers on every token.
    """
    for drawn in _drawn(draws):
        k, context = drawn.big_layers, drawn.context
        ceiling, control = (Key(keys.ceiling_policy(keys.EXACT, shuffled), k) for shuffled in (False, True))
        if ceiling not in draws or control not in draws:
            continue
        static_X = draws[Key(keys.STATIC, k)]
        total_X = static_X - draws[Key(keys.ORACLE, k, context=context)]
        predictable_X, noise_X = static_X - draws[ceiling], draws[Key(keys.DRAWN_STATIC, k)] - draws[drawn]
        yield DecompositionRow(
            draws.records.domain,
            str(context),
            k,
            total=interval(total_X),
            predictable=interval(predictable_X),
            noise=interval(noise_X),
            rest=interval(total_X - predictable_X - noise_X),
            shuffled=interval(static_X - draws[control]),
        )


def ceiling_rows(compared: Draws, predictors: Sequence[dict[str, Any]]) -> Iterator[CeilingRow]:
    """Yield the gain of every predictor over static, at the big layers it spent, on the text of the comparison."""
    for facts in predictors:
        key = Key(keys.predictor_policy(facts["predictor"], facts["spend"]), facts["big_layers"])
        at_spent_X = compared.nll_at(keys.STATIC, compared.spent(key))
        if at_spent_X is not None:
            yield CeilingRow(
                compared.records.domain,
                facts["depth"],
                facts["predictor"] == keys.SHUFFLED,
                facts["chosen"],
                facts["spend"],
                facts["big_layers"],
                float(compared.spent(key)[0]),
                interval(at_spent_X - compared[key]),
            )
