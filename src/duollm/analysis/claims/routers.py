"""C10, C13, C16 to C19: what routers do over depth and over the window, and two claims of others about routers.

Shape letters: X draws of the bootstrap.
"""

from collections.abc import Callable, Sequence

from duollm.analysis.claims.evidence import PAPER_ROUTER, Evidence
from duollm.analysis.claims.oracle import fitted_change
from duollm.analysis.verdicts import DIFFERENCE, FITTED_CHANGE, SHARE, Claim, Condition, condition, decide
from duollm.models.branch import Branch
from duollm.records.bootstrap import Floats, nats, percent, with_interval

EQUAL_AREA = -0.005
"""C19: nats per token by which the area of the nearest-neighbour router may fall behind that of the best other."""
FIGURE_7 = (0.3, 0.5)
"""C13: shares of the layers that are big in figure 7."""


def router_claims(evidence: Evidence) -> list[Claim]:
    """Decide C10, C13, and C16 to C19."""
    c10 = "The router makes later layers big, uses big more for early tokens, and with skip skips late layers"
    c16 = f"In a model with LayerNorm and learned positions, too: {c10[0].lower()}{c10[1:]}"
    none = Evidence(evidence.domain, evidence.num_layers, router_branches=evidence.router_branches)
    opt = evidence if evidence.like_opt else none
    return [
        _depth_and_time("C10", c10, evidence),
        _c13(evidence),
        _depth_and_time("C16", c16, opt),
        _c17(evidence),
        _c18(evidence),
        _c19(evidence),
    ]


def _skips(evidence: Evidence) -> bool:
    return Branch.SKIP in evidence.router_branches


def _named(evidence: Evidence) -> str:
    """What the router may choose: conditions of runs with other branches are other conditions."""
    return f"router of {', '.join(branch.name.lower() for branch in evidence.router_branches)}"


def _depth_and_time(name: str, statement: str, evidence: Evidence) -> Claim:
    """C10 and C16. A run whose router may not skip measures two conditions at each focus budget, others the third."""
    line, halves = "last - first layer on a fitted line", "share of big, first - second half of the window"
    conditions: list[Condition] = []
    if _skips(evidence):
        for k in [k for k in evidence.focus if k in evidence.use]:
            change_X = fitted_change(evidence.use[k].share_XLC[:, :, Branch.SKIP])
            conditions.append(
                condition(
                    f"share of skip, {line}, {_named(evidence)} at k = {k}", change_X, above=0, possible=FITTED_CHANGE
                )
            )
        missing = [*(() if conditions else [f"share of skip, {line}"]), f"share of big, {line}", halves]
    else:
        for k in evidence.focus:
            use = evidence.use.get(k)
            change_X = fitted_change(use.share_XLC[:, :, Branch.BIG]) if use else None
            conditions.append(condition(f"share of big, {line}, at k = {k}", change_X, above=0, possible=FITTED_CHANGE))
            conditions.append(
                condition(f"{halves}, at k = {k}", use.early_X if use else None, above=0, possible=DIFFERENCE)
            )
        missing = [f"share of skip, {line}"]
    conditions += [condition(quantity, None, above=0) for quantity in missing]
    return decide(name, evidence.domain, statement, _finding(evidence, conditions), *conditions)


def _c13(evidence: Evidence) -> Claim:
    used = {k: evidence.use[k] for k in (round(share * evidence.num_layers) for share in FIGURE_7) if k in evidence.use}
    stem = "share of documents whose first half uses big more"
    conditions = [
        condition(f"{stem}, {_named(evidence)} at k = {k}", use.documents_X, above=0.5, possible=SHARE)
        for k, use in used.items()
    ]
    finding = _finding(evidence, conditions, percent)
    if not (used and not _skips(evidence)):
        conditions.append(condition(f"{stem}, router of small, big", None, above=0.5))
    if not (used and _skips(evidence)):
        conditions.append(condition(f"{stem}, router of skip", None, above=0.5))
    statement = "In single sequences the router uses big less toward the end"
    return decide("C13", evidence.domain, statement, finding, *conditions)


def _c17(evidence: Evidence) -> Claim:
    uses = evidence.use if _skips(evidence) else {}
    stem = "correlation of a layer's share of skip in the first and the second half of the window"
    conditions = [
        condition(f"{stem}, {_named(evidence)} at k = {k}", use.again_X, above=0, possible=DIFFERENCE)
        for k, use in uses.items()
        if 0 < k < evidence.num_layers
    ]
    beside = "after each layer's mean is taken out"
    within = [
        condition(f"{beside}, at k = {k}", use.again_within_X, above=0, possible=DIFFERENCE) for k, use in uses.items()
    ]
    finding = _finding(evidence, [*conditions, *within])
    statement = "Layers that are skipped early in a sequence tend to be skipped later too"
    conditions = conditions or [condition(stem, None, above=0)]
    return decide("C17", evidence.domain, statement, finding, *conditions)


def _finding(evidence: Evidence, conditions: Sequence[Condition], form: Callable[[float], str] = nats) -> str:
    """Say what was measured, all budgets of a quantity together."""
    found: dict[str, list[str]] = {}
    for one in conditions:
        if one.estimate:
            quantity, _, k = one.quantity.rpartition(" at k = ")
            found.setdefault(quantity.rstrip(","), []).append(f"{with_interval(one.estimate, form)} at k = {k}")
    told = (f"{quantity}: {', '.join(budgets)}" for quantity, budgets in found.items())
    kind = "the paper's kind"
    if evidence.router != PAPER_ROUTER:
        kind = f"as there is no {PAPER_ROUTER} one, {kind}"
    fitted = [abs(one.estimate.value) for one in conditions if one.estimate and "fitted line" in one.quantity]
    steep = " A fitted line can change by more than 1, though a share cannot." if max(fitted, default=0) > 1 else ""
    return f"Router {evidence.router} ({kind}): {'; '.join(told)}.{steep}"


def _c18(evidence: Evidence) -> Claim:
    harm = condition(
        "area of gains-off-policy - area of gains", _difference(evidence, "gains-off-policy", "gains"), below=0
    )
    statement = (
        "Labels of the kind 'all other layers run big' (a stand-in for those of arXiv 2604.17228) are off-policy and "
        "harm a router"
    )
    finding = f"Over all budgets the off-policy router gains {with_interval(harm.estimate)} nats more than the other."
    return decide("C18", evidence.domain, statement, finding, harm)


def _c19(evidence: Evidence) -> Claim:
    others = {kind: area_X for kind, area_X in evidence.area_X.items() if kind != "knn"}
    best = max(others, key=lambda kind: float(others[kind][0]), default="")
    behind = condition(
        "area of knn - area of the best other router", _difference(evidence, "knn", best), above=EQUAL_AREA
    )
    statement = "A k-nearest-neighbour router is as good as trained ones"
    finding = (
        f"Over all budgets it gains {with_interval(behind.estimate)} nats more than {best}, the best other router."
    )
    return decide("C19", evidence.domain, statement, finding, behind)


def _difference(evidence: Evidence, kind: str, other: str) -> Floats | None:
    first, second = evidence.area_X.get(kind), evidence.area_X.get(other)
    return None if first is None or second is None else first - second
