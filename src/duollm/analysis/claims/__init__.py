"""The claims of the paper and two of others, decided on one domain of a run (definitions: docs/claims.md)."""

from dataclasses import replace

from duollm.analysis.claims.evidence import Evidence, readings
from duollm.analysis.claims.models import model_claims
from duollm.analysis.claims.oracle import oracle_claims
from duollm.analysis.claims.routers import router_claims
from duollm.analysis.verdicts import Claim, Reading, decide
from duollm.records.records import Draws

ABOUT = {
    "C1": ("figure 4a", "an oracle over small and big, and a router, at a third of the layers"),
    "C2": ("figure 4b: lowest at 6 of 12", "an oracle over small and big at all budgets"),
    "C3": ("figure 4b", "an oracle over small and big with 1 big layer"),
    "C4": ("figure 4b", "patterns and a router of small and big at two budgets"),
    "C5": ("figure 4c: 4 against 6 to 2 and 2 to 6", "an oracle with the two ramps in oracle.more_budgets"),
    "C6": ("figure 2a", "an oracle over small and big at a third of the layers"),
    "C7": ("figure 2b", "an oracle over small and big at half of the layers"),
    "C8": ("figure 2c", "an oracle over small and big at two thirds of the layers"),
    "C9": ("figure 2d", "a run whose oracle.branches are skip and big"),
    "C10": ("figure 3", "a router at a third, half and two thirds of the layers"),
    "C11": ("figure 5", "an oracle over small and big at a third of the layers"),
    "C12": ("figure 6", "an oracle over small and big on Python"),
    "C13": ("figure 7: 30/70, 50/50, 50/30/20", "a router at 0.3 or 0.5 of the layers"),
    "C14": ("figure 8a, b", "dense runs of equal FLOPs given beside this one, all scored"),
    "C15": ("figure 8c", "a run with pretrain.freeze: big given beside this one, both scored"),
    "C16": ("figure 9", "a run with model.architecture: opt"),
    "C17": ("conclusion, no number", "a router that may skip, on windows with two halves"),
    "C18": ("arXiv 2604.17228", "routers gains and gains-off-policy"),
    "C19": ("arXiv 2505.12601", "router knn and another one"),
}
"""Where each claim is made, with the paper's own value where it gives one; and what measures it."""


def decide_claims(evidence: Evidence, draws: Draws | None = None) -> list[Claim]:
    """Decide all claims on the main context and the labels of the text.

    Args:
        draws: gives claims about the oracle their readings in every context, on drawn labels, and net of noise.
    """
    claims = [*oracle_claims(evidence), *router_claims(evidence), *model_claims(evidence.domain)]
    found: dict[str, list[Reading]] = {}
    for context, labels, known in readings(evidence, draws) if draws else ():
        for claim in oracle_claims(known):
            conditions = [one for one in claim.conditions if one.estimate]
            if conditions and claim.id != "C4":  # which is about patterns and routers
                one = decide(claim.id, claim.domain, "", "", *conditions)
                found.setdefault(claim.id, []).append(Reading(context, labels, one.verdict, one.quantity, one.estimate))
    return [about(replace(claim, readings=found.get(claim.id, []))) for claim in sorted(claims, key=number)]


def number(claim: Claim) -> int:
    """Return the number in a claim's id."""
    return int(claim.id[1:])


def about(claim: Claim) -> Claim:
    """Add where a claim is made, and what would measure it if nothing was measured."""
    source, takes = ABOUT[claim.id]
    finding = f"Not measured: it takes {takes}." if claim.verdict == "not measured" else claim.finding
    return replace(claim, source=source, finding=finding)
