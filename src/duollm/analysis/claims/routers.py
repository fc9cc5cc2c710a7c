"""C10, C13, C16 to C19: what routers do over depth and over the window, and two claims of others about routers.

Shape letters: X draws of the bootstrap.
"""

from collections.abc import Callable, Sequence

from duollm.analysis.claims.evidence import PAPER_ROUTER, Evidence
from duollm.analysis.claims.oracle import fitted_change
from duollm.analysis.verdicts import Claim, Condition, condition, decide
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
    conditions: list[Condition] = []
    focus = evidence.focus
    skips = _skips(evidence)
    for k in focus if not skips else [k for k in focus if k in evidence.use]:
        use = evidence.use.get(k)
        if skips:
            skip_XL = None if use is None else use.share_XLC[:, :, Branch.SKIP]
            quantity = f"share of skip, last - first layer on a fitted line, {_named(evidence)} at k = {k}"
            conditions.append(condition(quantity, fitted_change(skip_XL), above=0))
        else:
            big_XL = None if use is None else use.share_XLC[:, :, Branch.BIG]
            conditions.append(
                condition(
                    f"share of big, last - first layer on a fitted line, at k = {k}", fitted_change(big_XL), above=0
                )
            )
            early_X = None if use is None else use.early_X
            conditions.append(
                condition(f"share of big, first - second half of the window, at k = {k}", early_X, above=0)
            )
    if not any(one.quantity.startswith("share of skip") for one in conditions):
        conditions.append(condition("share of skip, last - first layer on a fitted line", None, above=0))
    if skips:
        conditions += [condition("share of big, last - first layer on a fitted line", None, above=0)]
        conditions += [condition("share of big, first - second half of the window", None, above=0)]
    return decide(name, evidence.domain, statement, _finding(evidence, conditions), *conditions)


def _c13(evidence: Evidence) -> Claim:
    used = {k: evidence.use[k] for k in (round(share * evidence.num_layers) for share in FIGURE_7) if k in evidence.use}
    stem = "share of documents whose first half uses big more"
    conditions = [
        condition(f"{stem}, {_named(evidence)} at k = {k}", use.documents_X, above=0.5) for k, use in used.items()
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
        condition(f"{stem}, {_named(evidence)} at k = {k}", use.again_X, above=0)
        for k, use in uses.items()
        if 0 < k < evidence.num_layers
    ]
    beside = "after each layer's mean is taken out"
    within = [condition(f"{beside}, at k = {k}", use.again_within_X, above=0) for k, use in uses.items()]
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
    statement = "Labels of the kind 'all other layers run big' are off-policy and harm a router"
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
