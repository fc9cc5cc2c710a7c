"""C11 and C12: which tokens gain from more compute (paper, figures 5 and 6)."""

from duollm.analysis.claims.evidence import SMALL_BIG, Evidence
from duollm.analysis.difficulty import MUCH, NOTHING
from duollm.analysis.verdicts import Claim, condition, decide
from duollm.records.bootstrap import percent, with_interval

SOME = 0.05
"""C11: "some" tokens are more than this share."""


def token_claims(evidence: Evidence) -> list[Claim]:
    """Decide C11 and C12, which are about routes of small and big."""
    plain = evidence if evidence.branches == SMALL_BIG else Evidence(evidence.domain, evidence.num_layers)
    return [_c11(plain), _c12(plain)]


def _c11(evidence: Evidence) -> Claim:
    k, (nothing_X, much_X) = evidence.focus[0], evidence.hard_X or (None, None)
    of = f"share of high-loss tokens, at k = {k}, to which"
    nothing = condition(f"{of} neither all big nor the oracle saves {NOTHING:g} nats", nothing_X, above=SOME)
    much = condition(f"{of} the oracle saves {MUCH:g} nat or more", much_X, above=SOME)
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
