"""C1 to C9, C11 and C12: the oracle's loss over budgets, the layers that it makes big, and the tokens that it helps.

Shape letters: X draws of the bootstrap, L layers.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from duollm.analysis.claims.evidence import SMALL_BIG, Evidence
from duollm.analysis.difficulty import MUCH, NOTHING
from duollm.analysis.verdicts import DIFFERENCE, FITTED_CHANGE, SHARE, Claim, Condition, Verdict, condition, decide
from duollm.models.branch import Branch
from duollm.records.bootstrap import Floats, interval, percent, whole, with_interval
from duollm.records.keys import ALL_BIG, BEST_PATTERNS, ORACLE, STATIC, ramp_oracle
from duollm.records.records import nll_at

NEAR = 0.25
"""C1: the router is near the best of 100 if it bridges less than this share of the way to the oracle."""
EVEN = 0.1
"""C7: big is nearly even over layers if no layer's share departs more than this from the mean."""
UNEVEN, EARLY_EXIT = 0.2, 0.25
"""C9: the most used layer is big more often than the least used one by more than `UNEVEN`, and the first half of the
layers more often than the second by less than `EARLY_EXIT`."""
SOME = 0.05
"""C11: "some" tokens are more than this share."""


def oracle_claims(evidence: Evidence) -> list[Claim]:
    """Decide C1 to C9, C11 and C12. All but C9 are about routes of small and big."""
    plain = evidence if evidence.branches == SMALL_BIG else Evidence(evidence.domain, evidence.num_layers)
    low, _, high = evidence.focus
    c6 = _slope_claim(plain, "C6", low, "later", above=0)
    c8 = _slope_claim(plain, "C8", high, "earlier", below=0)
    first = [claim(plain) for claim in (_c1, _c2, _c3, _c4, _c5)]
    return [*first, c6, _c7(plain), c8, _c9(evidence), _c11(plain), _c12(plain)]


def _c1(evidence: Evidence) -> Claim:
    """Near means: |router - best of 100| < 0.25 x (best of 100 - oracle), at a third of the layers."""
    k = evidence.focus[0]
    difference_X = evidence.difference((ORACLE, k), (BEST_PATTERNS, k))
    below = condition(f"nll: oracle - best of 100 patterns, at k = {k}", difference_X, below=0)
    bridged_X, where = _bridged_by_router(evidence, k)
    quantity = "share of the way from best of 100 patterns to oracle that the router goes"
    way = condition(quantity, bridged_X, above=-NEAR, below=NEAR)
    return decide(
        "C1",
        evidence.domain,
        "At one budget the oracle is far below the best of 100 random patterns; "
        "the learned router sits near the best of 100, far from the oracle",
        f"At k = {k} the oracle lies {with_interval(below.drop)} nats below the best of 100 patterns; "
        f"share of that way which the router goes at {where}: {with_interval(way.estimate, percent)}.",
        below,
        way,
    )


def _bridged_by_router(evidence: Evidence, k: int) -> tuple[Floats | None, str]:
    """Return which share of the way from best of 100 to oracle the router goes [X], and at which budget.

    At the budget it spends, or at the nominal k if the budgets beside that were not searched.
    """
    router_X, spent_X = evidence.nll(evidence.router, k), evidence.router_spent_X.get(k)
    best_X, oracle_X, where = evidence.nll(BEST_PATTERNS, k), evidence.nll(ORACLE, k), f"k = {k}"
    if spent_X is not None:
        at_spent = [nll_at(evidence.nll, policy, spent_X, evidence.possible) for policy in (BEST_PATTERNS, ORACLE)]
        if at_spent[0] is not None and at_spent[1] is not None:
            best_X, oracle_X = at_spent
            where = f"the {spent_X[0]:.2f} big layers it spends"
    if router_X is None or best_X is None or oracle_X is None:
        return None, where
    return np.asarray((best_X - router_X) / (best_X - oracle_X)), where


def _c2(evidence: Evidence) -> Claim:
    """Falls to the middle, rises from it, and the lowest budget lies in the middle third (half a layer of grace)."""
    layers, budgets, lowest_X = evidence.num_layers, evidence.budgets(ORACLE), None
    middle = evidence.focus[1]
    if {0, middle, layers} <= set(budgets):
        nll_XK = np.stack([evidence.nll_X[ORACLE, k] for k in budgets], axis=1)
        lowest_X = np.array(budgets, dtype=np.float64)[nll_XK.argmin(1)]
    fall_X, rise_X = (evidence.difference((ORACLE, k), (ORACLE, j)) for j, k in ((0, middle), (middle, layers)))
    fall = condition(f"nll: oracle at k = {middle} - at k = 0", fall_X, below=0)
    rise = condition(f"nll: oracle at k = {layers} - at k = {middle}", rise_X, above=0)
    quantity = "number of big layers at which the oracle's nll is lowest"
    lowest = condition(quantity, lowest_X, above=layers / 3 - 0.5, below=2 * layers / 3 + 0.5, possible=(0, layers))
    allowed = f"the claim allows {lowest.above:.3g} to {lowest.below:.3g}"
    return decide(
        "C2",
        evidence.domain,
        f"The oracle's loss falls until half of the layers are big (k = {middle}) and rises again to k = {layers}",
        f"From k = 0 to {middle} it falls by {with_interval(fall.drop)} nats, from {middle} to {layers} it rises by "
        f"{with_interval(rise.estimate)}; it is lowest at k = {with_interval(lowest.estimate, whole)} ({allowed}).",
        fall,
        rise,
        lowest,
    )


def _c3(evidence: Evidence) -> Claim:
    layers = evidence.num_layers
    below = condition("nll: oracle at k = 1 - all big", evidence.difference((ORACLE, 1), (ALL_BIG, layers)), below=0)
    statement = f"The oracle with exactly 1 big layer beats big in all {layers} layers"
    finding = f"With 1 big layer the oracle lies {with_interval(below.drop)} nats below all big."
    return decide("C3", evidence.domain, statement, finding, below)


def _c4(evidence: Evidence) -> Claim:
    """Steady: from least to most big layers the loss drops, and no single step rises beyond its interval."""
    conditions: list[Condition] = []
    findings = []
    for name, policy in (("best fixed pattern", STATIC), ("router", evidence.router or "")):
        budgets = evidence.budgets(policy)
        if len(budgets) < 2:
            conditions.append(condition(f"nll: {name} at most - at fewest big layers", None, below=0))
            findings.append(f"{name}: not measured at two budgets")
            continue
        first, last = budgets[0], budgets[-1]
        fall_X = evidence.difference((policy, last), (policy, first))
        fall = condition(f"nll: {name} at k = {last} - at k = {first}", fall_X, below=0)
        step, where = _no_step_rises(evidence, name, policy, budgets)
        conditions += [fall, step]
        steadily = f", but it rises from {where}" if step.verdict == "not reproduced" else ""
        findings.append(f"{name}: falls by {with_interval(fall.drop)} nats from k = {first} to {last}{steadily}")
    finding = "; ".join(findings)
    statement = "The best fixed pattern and the learned router improve steadily with more big layers"
    return decide("C4", evidence.domain, statement, f"{finding[0].upper()}{finding[1:]}.", *conditions)


def _no_step_rises(evidence: Evidence, name: str, policy: str, budgets: Sequence[int]) -> tuple[Condition, str]:
    """Judge the step that rises most surely, and say where; its interval is widened for the number of steps."""
    steps = list(pairwise(budgets))
    level = 1 - 0.05 / len(steps)  # Bonferroni
    rises = [(interval(evidence.nll_X[policy, k] - evidence.nll_X[policy, j], level), j, k) for j, k in steps]
    rise, j, k = max(rises, key=lambda each: each[0].low)
    verdict: Verdict = "not reproduced" if rise.low > 0 else "reproduced"
    rule = f"interval (corrected for {len(steps)} steps) not above 0"
    return Condition(f"nll: {name}, the step that rises most surely", rule, rise, verdict), f"k = {j} to {k}"


def _c5(evidence: Evidence) -> Claim:
    """The paper slides between 6 and 2 of 12 layers, whose mean is 4; scaled to the depth."""
    k = evidence.focus[0]
    reach = max(1, round(evidence.num_layers / 6))
    most, least = k + reach, k - reach
    conditions = [
        condition(
            f"nll: oracle at k = {k} for every token - at k from {first} to {last} over the window",
            evidence.difference((ORACLE, k), (ramp_oracle(first, last), k)),
            below=0,
        )
        for first, last in ((most, least), (least, most))
    ]
    falling, rising = (with_interval(one.estimate) for one in conditions)
    return decide(
        "C5",
        evidence.domain,
        f"A constant {k} big layers per token beats sliding from {most} to {least} or from {least} to {most} "
        "over the sequence",
        f"The oracle at constant k = {k} minus sliding, nats: from {most} to {least} {falling}, "
        f"from {least} to {most} {rising}.",
        *conditions,
    )


def _c7(evidence: Evidence) -> Claim:
    k, layers = evidence.focus[1], evidence.num_layers
    share_XL = evidence.oracle_share_XL.get(k)
    departure_X = None if share_XL is None else np.abs(share_XL - k / layers).max(1)
    quantity = f"largest departure of a layer's share of big from k / L, at k = {k}"
    departure = condition(quantity, departure_X, below=EVEN, possible=SHARE)
    statement = f"At k = {k} of {layers} the oracle's big layers are spread nearly evenly"
    finding = (
        f"The layer that departs most from an even share of big does so by {with_interval(departure.estimate)} "
        f"(nearly even: below {EVEN:g})."
    )
    return decide("C7", evidence.domain, statement, finding, departure)


def _slope_claim(evidence: Evidence, name: str, k: int, preferred: str, **allowed: float) -> Claim:
    share_XL, layers = evidence.oracle_share_XL.get(k), evidence.num_layers
    quantity = f"share of big, last layer - first layer on a fitted line, at k = {k}"
    slope = condition(quantity, fitted_change(share_XL), **allowed, possible=FITTED_CHANGE)
    statement = f"At k = {k} of {layers} the oracle makes {preferred} layers big more often"
    finding = f"From the first layer to the last a fitted share of big changes by {with_interval(slope.estimate)}."
    return decide(name, evidence.domain, statement, finding, slope)


def fitted_change(share_XL: Floats | None) -> Floats | None:
    """Return by how much the least-squares line of a share over depth changes from the first layer to the last."""
    if share_XL is None or share_XL.shape[1] < 2:
        return None
    depth_L = np.linspace(-0.5, 0.5, share_XL.shape[1])
    return np.asarray(share_XL @ depth_L / (depth_L @ depth_L))


def _c9(evidence: Evidence) -> Claim:
    k = evidence.focus[1]
    share_XL, spread_X, early_X = evidence.oracle_share_XL.get(k), None, None
    if share_XL is not None and evidence.branches == (Branch.SKIP, Branch.BIG):
        half = evidence.num_layers // 2
        spread_X, early_X = evidence.oracle_spread_X, share_XL[:, :half].mean(1) - share_XL[:, -half:].mean(1)
    spread = condition(
        f"share of big, most used - least used layer, at k = {k}", spread_X, above=UNEVEN, possible=DIFFERENCE
    )
    early = condition(
        f"share of big, first - second half of the layers, at k = {k}", early_X, below=EARLY_EXIT, possible=DIFFERENCE
    )
    return decide(
        "C9",
        evidence.domain,
        f"With big or skip at k = {k}, some layers are mostly skipped and others kept, not as in an early exit",
        f"The most used layer is big more often than the least used one by {with_interval(spread.estimate)}, the first "
        f"half of the layers more often than the second by {with_interval(early.estimate)} (an early exit: 1).",
        spread,
        early,
    )


def _c11(evidence: Evidence) -> Claim:
    k, (nothing_X, much_X) = evidence.focus[0], evidence.hard_X or (None, None)
    of = f"share of high-loss tokens, at k = {k}, to which"
    nothing = condition(
        f"{of} neither all big nor the oracle saves {NOTHING:g} nats", nothing_X, above=SOME, possible=SHARE
    )
    much = condition(f"{of} the oracle saves {MUCH:g} nat or more", much_X, above=SOME, possible=SHARE)
    return decide(
        "C11",
        evidence.domain,
        "Difficulty is relative: some high-loss tokens gain nothing from more compute, others gain much",
        f"Of the tokens with a high loss, nothing helps {with_interval(nothing.estimate, percent)}, and the oracle at "
        f"k = {k} saves {MUCH:g} nat or more on {with_interval(much.estimate, percent)}.",
        nothing,
        much,
    )


def _c12(evidence: Evidence) -> Claim:
    k, (loss_X, removed_X) = evidence.focus[0], evidence.line_starts_X or (None, None)
    loss = condition("nll under all small, first tokens of a line - others", loss_X, above=0)
    quantity = f"share of it that the oracle at k = {k} removes, first tokens of a line - others"
    removed = condition(quantity, removed_X, below=0)
    return decide(
        "C12",
        evidence.domain,
        "In Python, first tokens of a line have a high loss but gain little",
        f"Under all small the loss of first tokens minus that of others is {with_interval(loss.estimate)} nats; the "
        f"share of it that the oracle removes, minus that of others, is {with_interval(removed.estimate, percent)}.",
        loss,
        removed,
    )
