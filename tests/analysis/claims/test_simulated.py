"""Every claim on simulated documents: a planted effect is found, and a planted null is hardly ever taken for one."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from duollm.analysis.claims.evidence import Evidence, gather_evidence
from duollm.analysis.claims.models import model_claims
from duollm.analysis.claims.oracle import oracle_claims
from duollm.analysis.claims.routers import router_claims
from duollm.analysis.difficulty import HARD, LINE_STARTS
from duollm.analysis.verdicts import decide
from duollm.models.branch import Branch
from duollm.records.bootstrap import Bootstrap
from duollm.records.keys import ALL_BIG, AVERAGE, BEST_PATTERNS, ORACLE, STATIC, Key, ramp_oracle
from duollm.records.records import BIG, NLL, Draws, Records
from duollm.records.use import HALVES, SKIPPED_AGAIN, TAKEN, moments

LAYERS, DOCUMENTS = 6, 40
SKIP_BIG = (Branch.SKIP, Branch.BIG)
DECIDED = {f"C{number}" for number in range(1, 20)}


class Simulation:
    """Documents of unequal length, whose means scatter.

    With `effect` 1 all claims hold; with 0 each lies on the border of one of its conditions, and with -1 beyond it.
    """

    def __init__(self, effect, seed):
        self.effect, self.random = effect, np.random.default_rng(seed)
        self.tokens_D = self.random.integers(40, 160, DOCUMENTS)
        self.level_D = 3 + 0.3 * self.random.standard_normal(DOCUMENTS)

    def scattered(self, mean, spread):
        return np.asarray(mean) + spread * self.random.standard_normal((DOCUMENTS, *np.shape(mean)))

    def nll(self):
        edge = -0.05 * self.effect  # what should be negative
        oracle = {0: 0.0, 1: -0.1, 2: -0.15, 3: edge, 4: 0.05, 5: 0.1, 6: 0.15}
        means = {(ORACLE, k): value for k, value in oracle.items()}
        means |= {(ALL_BIG, 6): oracle[1] - edge, (BEST_PATTERNS, 2): oracle[2] + 0.1}
        means |= {(ramp_oracle(3, 1), 2): oracle[2] - edge, (ramp_oracle(1, 3), 2): oracle[2] + 0.1}
        means |= {(STATIC, k): k / 6 * edge for k in range(7)}
        sums = {}
        for (policy, k), mean in means.items():
            context = "shared" if policy.startswith(ORACLE) else None
            sums[NLL, Key(policy, k, context=context)] = (self.level_D + self.scattered(mean, 0.04)) * self.tokens_D
        way_D = (0.25 - 0.2 * self.effect) * 0.1 + self.scattered(0.0, 0.02)
        for k in (2, 3, 4):
            key = Key(f"linear_k{k}", k, "linear", AVERAGE)
            sums[NLL, key] = sums[NLL, Key(BEST_PATTERNS, 2)] - (way_D + 0.01 * (k - 2)) * self.tokens_D
            sums[BIG, key] = 2.0 * self.tokens_D
        return sums

    def layers(self, mean_L):
        """Tokens by branch, whose shares of big scatter over documents."""
        big_DL = self.scattered(mean_L, 0.05) * self.tokens_D[:, None]
        return np.stack([0 * big_DL, self.tokens_D[:, None] - big_DL, big_DL], axis=-1)

    def oracle_layers(self):
        slope_L, edge = np.linspace(-0.1, 0.1, LAYERS) * self.effect, 0.1 - 0.08 * self.effect
        departing_L = 0.5 + edge * np.array([0, 1, 0, 0, 0, 0])
        shares = {2: 1 / 3 + slope_L, 3: departing_L, 4: 2 / 3 - slope_L}
        return {(TAKEN, Key(ORACLE, k, context="shared")): self.layers(share_L) for k, share_L in shares.items()}

    def router(self, branch):
        """A router that takes a branch in late layers, and big in early tokens; at k = 3 as planted.

        On the border only the router without skip is on it, and only with big in early tokens.
        """
        early, other = (1, Branch.SMALL) if branch == Branch.BIG else (-1, Branch.BIG)
        sums = {}
        for k in (2, 3, 4):
            planted = self.effect if k == 3 else 1
            strength = planted if branch == Branch.BIG or self.effect else 1
            slope_L = np.linspace(-0.1, 0.1, LAYERS) * (strength if branch == Branch.SKIP else 1)
            taken_DHL = self.scattered(0.5 + slope_L + 0.05 * early * strength * np.array([[1], [-1]]), 0.03)
            taken_DHL *= self.tokens_D[:, None, None] / 2
            halves_DHLB = np.zeros((DOCUMENTS, 2, LAYERS, 3))
            halves_DHLB[..., branch] = taken_DHL
            halves_DHLB[..., other] = self.tokens_D[:, None, None] / 2 - taken_DHL
            first_DWL = self.scattered(np.full((3, LAYERS), 0.5), 0.1)
            second_DWL = 0.3 * planted * first_DWL + self.scattered(np.zeros((3, LAYERS)), 0.1)
            key = Key(f"linear_k{k}", k, "linear", AVERAGE)
            sums |= {(HALVES, key): halves_DHLB, (SKIPPED_AGAIN, key): moments(first_DWL, second_DWL).sum(1)}
        return sums

    def tokens(self):
        high_D = self.tokens_D // 4
        unhelped_D = self.random.binomial(high_D, 0.05 + 0.04 * self.effect)
        much_D = self.random.binomial(high_D, 0.3)
        at_start_D2 = np.stack([0.9 * self.tokens_D, 0.1 * self.tokens_D], axis=1)
        nll_D2 = self.scattered([3.0, 3.5], 0.1)
        gain_D2 = nll_D2 * self.scattered([0.2, 0.2 - 0.05 * self.effect], 0.05)
        starts_D23 = np.stack([at_start_D2, nll_D2 * at_start_D2, gain_D2 * at_start_D2], axis=-1)
        key = Key(ORACLE, 2, context="shared")
        return {(HARD, key): np.stack([high_D, unhelped_D, much_D], axis=1), (LINE_STARTS, key): starts_D23}

    def mean(self, value, spread=0.05):
        totals_D = self.scattered(value, spread) * self.tokens_D
        return Bootstrap([self.tokens_D], 200, 1).ratio(totals_D, self.tokens_D)

    def evidence(self, sums):
        records = Records("code", "shared", LAYERS, (DOCUMENTS,), self.tokens_D, sums)
        draws = Draws(records, 200, 1)
        return gather_evidence(draws, draws, (Branch.SMALL, Branch.BIG))

    def claims(self):
        sums = self.nll() | self.oracle_layers() | self.tokens() | self.router(Branch.BIG)
        plain = self.evidence(sums)
        area_X = {"gains": 0.05 + 0.05 * self.effect, "gains-off-policy": 0.05, "linear": 0.0}
        area_X["knn"] = max(area_X.values()) - 0.005 + 0.05 * self.effect
        area_X = {kind: self.mean(area) for kind, area in area_X.items()}
        yield from [
            *oracle_claims(plain),
            *router_claims(replace(plain, area_X=area_X, like_opt=True)),
        ]
        skipping = self.evidence(self.nll() | self.router(Branch.SKIP))
        yield from router_claims(skipping)
        spread = 0.2 + 0.1 * self.effect
        share_L = 0.5 + np.array([0, 0.5, 0, 0, -0.5, 0]) * spread
        share_XL = np.stack([self.mean(share) for share in share_L], axis=1)
        yield from oracle_claims(Evidence("code", LAYERS, SKIP_BIG, oracle_share_XL={3: share_XL}))
        over_dense = {0.0: self.mean(0.2), 0.75: self.mean(0.1 - 0.05 * self.effect), 1.0: self.mean(0.0)}
        yield from model_claims("code", over_dense, self.mean(0.05 * self.effect))

    def verdicts(self):
        """The verdict on all conditions of a claim that were measured, on runs with skip and without."""
        found = {}
        for claim in self.claims():
            found.setdefault(claim.id, []).extend(one for one in claim.conditions if one.estimate)
        return {name: decide(name, "", "", "", *conditions).verdict for name, conditions in found.items() if conditions}


def rates(effect, verdict, repetitions):
    """How often each claim has a verdict."""
    found = Counter()
    for seed in range(repetitions):
        found.update(name for name, each in Simulation(effect, seed).verdicts().items() if each == verdict)
    return {name: found[name] / repetitions for name in DECIDED}


def test_every_claim_is_simulated():
    assert set(Simulation(1, 0).verdicts()) == DECIDED


@pytest.mark.parametrize(("effect", "verdict"), [(1, "reproduced"), (-1, "not reproduced")])
def test_a_planted_effect_is_found_with_a_power_of_80_percent(effect, verdict):
    missed = {name: rate for name, rate in rates(effect, verdict, 40).items() if rate < 0.8}
    assert not missed


def test_a_planted_null_is_taken_for_an_effect_in_at_most_5_percent():
    """Up to two standard errors of the simulation itself."""
    repetitions = 200
    most = 0.05 + 2 * np.sqrt(0.05 * 0.95 / repetitions)
    assert not {name: rate for name, rate in rates(0, "reproduced", repetitions).items() if rate > most}
