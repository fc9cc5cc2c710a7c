"""The paper's claims, each turned into quantities with a rule (claim ids: see docs/formats.md).

Shape letters: X draws of the bootstrap, L layers.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from duollm.analysis.verdicts import Claim, Condition, condition, decide
from duollm.models.branch import Branch
from duollm.records.bootstrap import Floats, interval
from duollm.records.keys import ALL_BIG, BEST_PATTERNS, EXACT, ORACLE, STATIC, ramp_oracle
from duollm.records.numbers import percent, whole, with_interval
from duollm.records.records import BRANCHES, Draws, nll_at
from duollm.routes.space import focus_budgets

NEAR = 0.25
"""C1: the router is near the best of 100 if it bridges less than this share of the way to the oracle."""
EVEN = 0.1
"""C7: big is nearly even over layers if no layer's share departs more than this from the mean."""
PAPER_ROUTER = "linear"


@dataclass(frozen=True)
class Evidence:
    """The draws by which the claims are decided: row 0 is the data, then come the resamples."""

    domain: str
    num_layers: int
    nll_X: dict[tuple[str, int], Floats]
    """Mean nll by (policy, big layers k); routers by their kind, as they spend k on average."""
    oracle_share_XL: dict[int, Floats]
    """The oracle's share of big per layer, by k."""
    router: str | None
    """The kind of router the claims speak of."""
    router_spent_X: dict[int, Floats]
    """The mean number of big layers it spends, by the k it was trained for."""

    def budgets(self, policy: str | None) -> list[int]:
        """Return the numbers of big layers at which `policy` was measured, ascending."""
        return sorted(k for name, k in self.nll_X if name == policy)

    def nll(self, policy: str | None, k: int) -> Floats | None:
        """Return the draws of a policy's mean nll; None if it was not measured at k."""
        return self.nll_X.get((policy, k)) if policy else None

    def difference(self, policy: tuple[str | None, int], other: tuple[str | None, int]) -> Floats | None:
        """Return the paired draws of nll(policy) - nll(other); None if one was not measured."""
        first, second = self.nll(*policy), self.nll(*other)
        return None if first is None or second is None else first - second


def studied_router(kinds: Iterable[str | None]) -> str | None:
    """Return the kind of router that the claims are about: the paper's linear one, else the first by name."""
    trained = {kind for kind in kinds if kind}
    return PAPER_ROUTER if PAPER_ROUTER in trained else min(trained, default=None)


def gather_evidence(draws: Draws) -> Evidence:
    """Collect the draws that the claims need."""
    records = draws.records
    main = [key for key in records.policies if key.context in (None, records.context) and key.spend != EXACT]
    router = studied_router(key.kind for key in main)
    studied = [key for key in main if router and key.kind == router and not records.skips]
    oracles = [key for quantity, key in records.sums if quantity == BRANCHES and key.policy == ORACLE]
    return Evidence(
        records.domain,
        records.num_layers,
        {(key.kind or key.policy, key.big_layers): draws[key] for key in main},
        {key.big_layers: draws.mean(BRANCHES, key)[:, :, Branch.BIG] for key in oracles},
        router,
        {key.big_layers: draws.spent(key) for key in studied},
    )


def decide_claims(evidence: Evidence) -> list[Claim]:
    """Decide C1 - C8 of the paper on one domain."""
    low, _, high = focus_budgets(evidence.num_layers)
    c6 = _slope_claim(evidence, "C6", low, "later", above=0)
    c8 = _slope_claim(evidence, "C8", high, "earlier", below=0)
    return [*(claim(evidence) for claim in (_c1, _c2, _c3, _c4, _c5)), c6, _c7(evidence), c8]


def _c1(evidence: Evidence) -> Claim:
    """Near means: |router - best of 100| < 0.25 x (best of 100 - oracle), at a third of the layers."""
    k = focus_budgets(evidence.num_layers)[0]
    difference_X = evidence.difference((ORACLE, k), (BEST_PATTERNS, k))
    below = condition(f"nll: oracle - best of 100 patterns, at k = {k}", difference_X, below=0)
    bridged_X, where = _bridged_by_router(evidence, k)
    quantity = f"share of the way from best of 100 patterns to oracle that the router goes, at {where}"
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
        at_spent = [nll_at(evidence.nll, policy, spent_X) for policy in (BEST_PATTERNS, ORACLE)]
        if at_spent[0] is not None and at_spent[1] is not None:
            best_X, oracle_X = at_spent
            where = f"the {spent_X[0]:.2f} big layers it spends"
    if router_X is None or best_X is None or oracle_X is None:
        return None, where
    return np.asarray((best_X - router_X) / (best_X - oracle_X)), where


def _c2(evidence: Evidence) -> Claim:
    """Falls to the middle, rises from it, and the lowest budget lies in the middle third (half a layer of grace)."""
    layers, budgets, lowest_X = evidence.num_layers, evidence.budgets(ORACLE), None
    middle = focus_budgets(layers)[1]
    if {0, middle, layers} <= set(budgets):
        nll_XK = np.stack([evidence.nll_X[ORACLE, k] for k in budgets], axis=1)
        lowest_X = np.array(budgets, dtype=np.float64)[nll_XK.argmin(1)]
    fall_X, rise_X = (evidence.difference((ORACLE, k), (ORACLE, j)) for j, k in ((0, middle), (middle, layers)))
    fall = condition(f"nll: oracle at k = {middle} - at k = 0", fall_X, below=0)
    rise = condition(f"nll: oracle at k = {layers} - at k = {middle}", rise_X, above=0)
    quantity = "number of big layers at which the oracle's nll is lowest"
    lowest = condition(quantity, lowest_X, above=layers / 3 - 0.5, below=2 * layers / 3 + 0.5)
    return decide(
        "C2",
        evidence.domain,
        f"The oracle's loss falls until half of the layers are big (k = {middle}) and rises again to k = {layers}",
        f"From k = 0 to {middle} it falls by {with_interval(fall.drop)} nats, from {middle} to {layers} it rises by "
        f"{with_interval(rise.estimate)}; it is lowest at k = {with_interval(lowest.estimate, whole)}.",
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
        step = _no_step_rises(evidence, name, policy, budgets)
        conditions += [fall, step]
        steadily = ", but not steadily" if step.verdict == "not reproduced" else ""
        findings.append(f"{name}: falls by {with_interval(fall.drop)} nats from k = {first} to {last}{steadily}")
    finding = "; ".join(findings)
    statement = "The best fixed pattern and the learned router improve steadily with more big layers"
    return decide("C4", evidence.domain, statement, f"{finding[0].upper()}{finding[1:]}.", *conditions)


def _no_step_rises(evidence: Evidence, name: str, policy: str, budgets: Sequence[int]) -> Condition:
    """Judge the step that rises most surely; its interval is widened for the number of steps (Bonferroni)."""
    steps = list(pairwise(budgets))
    level = 1 - 0.05 / len(steps)
    rises = [(interval(evidence.nll_X[policy, k] - evidence.nll_X[policy, j], level), j, k) for j, k in steps]
    rise, j, k = max(rises, key=lambda each: each[0].low)
    return Condition(
        f"nll: {name}, the step that rises most surely (k = {j} to {k})",
        f"interval (corrected for {len(steps)} steps) not above 0",
        rise,
        "not reproduced" if rise.low > 0 else "reproduced",
    )


def _c5(evidence: Evidence) -> Claim:
    """The paper slides between 6 and 2 of 12 layers, whose mean is 4; scaled to the depth."""
    k = focus_budgets(evidence.num_layers)[0]
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
    k, layers = focus_budgets(evidence.num_layers)[1], evidence.num_layers
    share_XL = evidence.oracle_share_XL.get(k)
    departure_X = None if share_XL is None else np.abs(share_XL - k / layers).max(1)
    quantity = f"largest departure of a layer's share of big from k / L, at k = {k}"
    departure = condition(quantity, departure_X, below=EVEN)
    statement = f"At k = {k} of {layers} the oracle's big layers are spread nearly evenly"
    finding = (
        f"The layer that departs most from an even share of big does so by {with_interval(departure.estimate)} "
        f"(nearly even: below {EVEN:g})."
    )
    return decide("C7", evidence.domain, statement, finding, departure)


def _slope_claim(evidence: Evidence, name: str, k: int, preferred: str, **allowed: float) -> Claim:
    """Judge the least-squares slope of the share of big over depth (0 first layer, 1 last)."""
    slope_X, share_XL, layers = None, evidence.oracle_share_XL.get(k), evidence.num_layers
    if share_XL is not None and layers > 1:
        depth_L = np.linspace(-0.5, 0.5, layers)
        slope_X = np.asarray(share_XL @ depth_L / (depth_L @ depth_L))
    slope = condition(f"share of big, last layer - first layer on a fitted line, at k = {k}", slope_X, **allowed)
    statement = f"At k = {k} of {layers} the oracle makes {preferred} layers big more often"
    finding = f"From the first layer to the last a fitted share of big changes by {with_interval(slope.estimate)}."
    return decide(name, evidence.domain, statement, finding, slope)
