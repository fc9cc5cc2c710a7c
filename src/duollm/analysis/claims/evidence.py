"""The draws of the bootstrap by which claims are decided.

Shape letters: X draws of the bootstrap (row 0 is the data), L layers, C branches.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from duollm.analysis.difficulty import HARD, LINE_STARTS
from duollm.analysis.families import areas
from duollm.analysis.layers import RouterUse, router_use
from duollm.analysis.verdicts import Labels
from duollm.models.branch import Branch
from duollm.records.bootstrap import Floats
from duollm.records.keys import (
    ALL_BIG,
    AVERAGE,
    BEST_PATTERNS,
    DRAWN_ORACLE,
    DRAWN_STATIC,
    EXACT,
    NET_ORACLE,
    ORACLE,
    STATIC,
    Key,
    on_drawn,
)
from duollm.records.patterns import first_half
from duollm.records.records import NLL, Draws
from duollm.records.use import HALVES, TAKEN
from duollm.routes.space import focus_budgets

PAPER_ROUTER = "linear"
SMALL_BIG = (Branch.SMALL, Branch.BIG)


@dataclass(frozen=True)
class Evidence:
    """What was measured on one domain; what was not is missing.

    Attributes:
        branches: those that the oracle may take.
        nll_X: mean nll by (policy, big layers k); routers by their kind, as they spend k on average.
        oracle_share_XL: the oracle's share of big per layer, by k.
        oracle_spread_X: at the middle budget, share of big of the most used layer minus that of the least used one.
            They are chosen on the other half of the documents, for the extremes of noisy shares lie too far apart.
        hard_X: of the tokens with a high loss, the share that nothing helps, and the share that the oracle helps much.
        line_starts_X: nll under all small, and share of it that the oracle removes, at line starts minus elsewhere.
        router: the kind of router that the claims speak of.
        router_branches: those that it takes.
        router_spent_X: the mean number of big layers it spends, by the k it was trained for.
        use: how it uses its branches, by k.
        like_opt: whether the model has LayerNorm and learned positions.
        area_X: gain over static, averaged over the budgets, by kind of router.
        possible: the numbers of big layers that routes may have; empty if all are possible.
    """

    domain: str
    num_layers: int
    branches: tuple[Branch, ...] = SMALL_BIG
    nll_X: dict[tuple[str, int], Floats] = field(default_factory=dict)
    oracle_share_XL: dict[int, Floats] = field(default_factory=dict)
    oracle_spread_X: Floats | None = None
    hard_X: tuple[Floats, Floats] | None = None
    line_starts_X: tuple[Floats, Floats] | None = None
    router: str | None = None
    router_branches: tuple[Branch, ...] = SMALL_BIG
    router_spent_X: dict[int, Floats] = field(default_factory=dict)
    use: dict[int, RouterUse] = field(default_factory=dict)
    like_opt: bool = False
    area_X: dict[str, Floats] = field(default_factory=dict)
    possible: tuple[int, ...] = ()

    @property
    def focus(self) -> tuple[int, int, int]:
        """The low, middle and high budget."""
        return focus_budgets(self.num_layers, self.possible)

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


def gather_evidence(
    draws: Draws,
    compared: Draws,
    branches: tuple[Branch, ...],
    like_opt: bool = False,
) -> Evidence:
    """Collect the draws that the claims need, for the main context and the labels of the text.

    Args:
        draws: of the records of the oracle's text.
        compared: of the records of the text of the comparison, for how routers use their branches and what they gain.
        branches: those that the oracle may take.
        like_opt: whether the model has LayerNorm and learned positions.
    """
    records = draws.records
    main = [key for key in records.policies if key.context in (None, records.context) and key.spend != EXACT]
    kinds = {key.kind for key in main if key.kind}
    router = studied_router(kinds)
    use = {
        key.big_layers: router_use(compared, key)
        for quantity, key in compared.records.sums
        if quantity == HALVES and key.kind == router and key.spend == AVERAGE
    }
    evidence = Evidence(
        records.domain,
        records.num_layers,
        branches,
        nll_X={(key.kind or key.policy, key.big_layers): draws[key] for key in main},
        router=router,
        router_branches=tuple(
            branch for branch in Branch if any(one.share_XLC[0, :, branch].any() for one in use.values())
        ),
        router_spent_X={key.big_layers: draws.spent(key) for key in main if router and key.kind == router},
        use=use,
        like_opt=like_opt,
        possible=records.possible,
        area_X={kind: area_X for kind, area_X in areas(compared).items() if kind in kinds},
    )
    return _with_searches(evidence, draws, records.context, "text")


def contexts(draws: Draws) -> list[str]:
    """Return the contexts in which the oracle was searched, the main one first."""
    found = (key.context for key in draws.records.policies if key.policy == ORACLE and key.context)
    return list(dict.fromkeys([draws.records.context, *found]))


def readings(evidence: Evidence, draws: Draws) -> Iterator[tuple[str, Labels, Evidence]]:
    """Yield the evidence of every context and kind of labels, without what no search of them has measured.

    On drawn labels, the losses of y' are compared with the expected losses of static and of all big; there is neither a
    router nor another policy. Net of selection noise, the oracle's loss is raised by what the same search gains on
    drawn labels over static.
    """
    plain = replace(evidence, use={}, area_X={})
    others = {name: nll_X for name, nll_X in evidence.nll_X.items() if not _is_search(name[0])}
    static = {key.big_layers: draws[key] for quantity, key in draws.records.sums if key.policy == DRAWN_STATIC}
    ends = {(ALL_BIG, k): nll_X for k, nll_X in static.items() if k == evidence.num_layers}
    on_static = {(name, k): nll_X for k, nll_X in static.items() for name in (STATIC, BEST_PATTERNS)} | ends
    for context in contexts(draws):
        keys = [key for quantity, key in draws.records.sums if quantity == NLL and key.context == context]
        searched = {(key.policy, key.big_layers): draws[key] for key in keys if _is_search(key.policy)}
        drawn = {
            (policy, k): draws[key]
            for policy, k in searched
            if k in static and (key := Key(on_drawn(policy), k, context=context)) in draws
        }
        net = {(policy, k): searched[policy, k] + static[k] - drawn_X for (policy, k), drawn_X in drawn.items()}
        unseen = replace(plain, nll_X=on_static | drawn, router=None, router_spent_X={})
        yield context, "text", _with_searches(replace(plain, nll_X=others | searched), draws, context, "text")
        yield context, "drawn", _with_searches(unseen, draws, context, "drawn")
        yield context, "net", _with_searches(replace(plain, nll_X=others | net), draws, context, "net")


def _is_search(policy: str) -> bool:
    """Whether it is the oracle, or one whose budget slides over the window."""
    return policy == ORACLE or policy.startswith(f"{ORACLE}-")


SEARCHED: dict[Labels, str] = {"text": ORACLE, "drawn": DRAWN_ORACLE, "net": NET_ORACLE}


def _with_searches(evidence: Evidence, draws: Draws, context: str, labels: Labels) -> Evidence:
    """Add what is measured token by token of the searches: the layers of their picks, and whom they help."""
    k = evidence.focus[0]
    searched, sums = Key(SEARCHED[labels], k, context=context), draws.records.sums
    ratio = draws.bootstrap.ratio
    hard_X = line_starts_X = None
    if (HARD, searched) in sums:
        high_D, nothing_D, much_D = sums[HARD, searched].T
        hard_X = ratio(nothing_D, high_D), ratio(much_D, high_D)
    if (LINE_STARTS, searched) in sums:
        tokens_DE, nll_DE, gain_DE = np.moveaxis(sums[LINE_STARTS, searched], -1, 0)
        elsewhere_start = ratio(nll_DE, tokens_DE), ratio(gain_DE, nll_DE)
        line_starts_X = elsewhere_start[0] @ [-1.0, 1.0], elsewhere_start[1] @ [-1.0, 1.0]
    tokens_D, middle = draws.records.tokens_D, evidence.focus[1]
    big_of = _big(draws, ORACLE, context)
    if labels != "text":
        drawn_of = _big(draws, DRAWN_ORACLE, context)
        even_of = {k: k / evidence.num_layers * tokens_D[:, None] for k in drawn_of}
        net_of = {k: big_of[k] - drawn_of[k] + even_of[k] for k in drawn_of if k in big_of}
        big_of = drawn_of if labels == "drawn" else net_of
    return replace(
        evidence,
        oracle_share_XL={k: ratio(big_DL, tokens_D) for k, big_DL in big_of.items()},
        oracle_spread_X=_spread(draws, big_of[middle]) if middle in big_of else None,
        hard_X=hard_X,
        line_starts_X=line_starts_X,
    )


def _big(draws: Draws, policy: str, context: str) -> dict[int, Floats]:
    """The tokens of each document that a search makes big in each layer [D, L], by k."""
    return {
        key.big_layers: sums_DLC[:, :, Branch.BIG]
        for (quantity, key), sums_DLC in draws.records.sums.items()
        if quantity == TAKEN and (key.policy, key.context) == (policy, context)
    }


def _spread(draws: Draws, big_DL: Floats) -> Floats:
    """The share of big of the most used layer minus that of the least used one [X], chosen on the other half.

    Each resample chooses anew: where layers tie, intervals for layers that the data chose are too short.
    """
    weights_XD, first_D = draws.bootstrap.weights_XD, first_half(len(big_DL), seed=0)
    first_XL, second_XL = (weights_XD[:, half_D] @ big_DL[half_D] for half_D in (first_D, ~first_D))
    draw_X = np.arange(len(weights_XD))
    gaps = [
        scored_XL[draw_X, chosen_XL.argmax(1)] - scored_XL[draw_X, chosen_XL.argmin(1)]
        for scored_XL, chosen_XL in ((first_XL, second_XL), (second_XL, first_XL))
    ]
    return np.asarray((gaps[0] + gaps[1]) / (weights_XD @ draws.records.tokens_D))
