"""Every claim on simulated documents: a planted effect is found, and a planted null is hardly ever taken for one.

A study has 40 documents of unequal length, whose means scatter. Each case moves one quantity of one claim: 1 is where
the claim holds, 0 the border of what the claim allows, -1 as far beyond it.
"""

import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from duollm.analysis.claims import decide_claims
from duollm.analysis.claims.evidence import gather_evidence
from duollm.analysis.claims.models import model_claims, task_claim
from duollm.analysis.claims.runs import united
from duollm.analysis.difficulty import HARD, LINE_STARTS, MUCH, NOTHING
from duollm.models.branch import Branch
from duollm.records.bootstrap import Bootstrap, sum_by_document
from duollm.records.keys import (
    ALL_BIG,
    AVERAGE,
    BEST_PATTERNS,
    DRAWN_STATIC,
    NET_ORACLE,
    ORACLE,
    STATIC,
    Key,
    on_drawn,
    ramp_oracle,
)
from duollm.records.records import BIG, NLL, Draws, Records
from duollm.records.use import HALVES, SKIPPED_AGAIN, TAKEN, moments

LAYERS, DOCUMENTS, SAMPLES = 6, 40, 200
BUDGETS = 2, 3, 4
DEPTH_L, HALVES_H1 = np.linspace(-0.1, 0.1, LAYERS), 0.05 * np.array([[1], [-1]])
POWER, LEVEL = 0.8, 0.05
PAGE = Path(__file__).parents[3] / "docs" / "claims.md"


class Study:
    """One simulated study.

    Calling it with the name of a quantity says where that quantity lies: 1 unless it is the one that is moved.
    """

    def __init__(self, seed, moved=None, to=1.0):
        self.moved, self.to, self.random = moved, to, np.random.default_rng(seed)
        self.tokens_D = self.random.integers(40, 160, DOCUMENTS)
        self.level_D = 3 + 0.3 * self.random.standard_normal(DOCUMENTS)

    def __call__(self, quantity):
        return self.to if quantity == self.moved else 1.0

    def among(self, *budgets):
        """The budget whose quantity is moved, if its name ends in one; else all."""
        return [k for k in budgets if self.moved and self.moved.endswith(f" at {k}")] or budgets

    def scattered(self, mean, spread):
        return np.asarray(mean) + spread * self.random.standard_normal((DOCUMENTS, *np.shape(mean)))

    def losses(self, mean_of):
        """Losses of policies without a router, by (name, k)."""
        return {
            (NLL, Key(policy, k, context="shared" if policy.startswith(ORACLE) else None)): self.loss(mean)
            for (policy, k), mean in mean_of.items()
        }

    def loss(self, mean, spread=0.04):
        return (self.level_D + self.scattered(mean, spread)) * self.tokens_D

    def router(self, kind, k, nll_D):
        key = Key(f"{kind}_k{k}", k, kind, AVERAGE)
        return {(NLL, key): nll_D, (BIG, key): k * self.tokens_D.astype(float)}

    def layers(self, share_L, k):
        """Tokens by branch, whose shares of big scatter over documents."""
        big_DL = self.scattered(share_L, 0.05) * self.tokens_D[:, None]
        taken_DLC = np.stack([0 * big_DL, self.tokens_D[:, None] - big_DL, big_DL], axis=-1)
        return {(TAKEN, Key(ORACLE, k, context="shared")): taken_DLC}

    def use(self, k, share_DHL, branch=Branch.BIG, again=0.0):
        """How a router takes a branch in both halves of windows, and in the second repeats what it skipped before."""
        other = Branch.SMALL if branch == Branch.BIG else Branch.BIG
        half_DHL = np.broadcast_to(self.tokens_D[:, None, None] / 2, share_DHL.shape)
        halves_DHLC = np.zeros((*share_DHL.shape, 3))
        halves_DHLC[..., branch], halves_DHLC[..., other] = share_DHL * half_DHL, (1 - share_DHL) * half_DHL
        first_DWL = self.scattered(np.full((3, LAYERS), 0.5), 0.1)
        second_DWL = again * first_DWL + self.scattered(np.zeros((3, LAYERS)), 0.1)
        key = Key(f"linear_k{k}", k, "linear", AVERAGE)
        sums = self.router("linear", k, self.loss(0.0))
        return sums | {(HALVES, key): halves_DHLC, (SKIPPED_AGAIN, key): moments(first_DWL, second_DWL).sum(1)}

    def mean(self, value, spread=0.05):
        totals_D = self.scattered(value, spread) * self.tokens_D
        return Bootstrap([self.tokens_D], SAMPLES, 1).ratio(totals_D, self.tokens_D)

    def decide(self, sums, branches=(Branch.SMALL, Branch.BIG), like_opt=False, readings=False):
        records = Records("code", "shared", LAYERS, (DOCUMENTS,), self.tokens_D, sums)
        draws = Draws(records, SAMPLES, 1)
        return decide_claims(gather_evidence(draws, draws, branches, like_opt), draws if readings else None)


def best_of_100(study):
    sums = study.losses({(ORACLE, 2): -0.1 * study("oracle"), (BEST_PATTERNS, 2): 0.0})
    way_D = study.scattered(0.025 * (study("too bad") - study("too good")), 0.01) * study.tokens_D
    return sums | study.router("linear", 2, sums[NLL, Key(BEST_PATTERNS, 2)] - way_D)


def valley(study):
    mean_k = [0.1 * study("falls"), 0.1 * study("early"), 0.05, 0.0, 0.05, 0.1 * study("late"), 0.1 * study("rises")]
    return study.losses({(ORACLE, k): mean for k, mean in enumerate(mean_k)})


def one_layer(study):
    return study.losses({(ORACLE, 1): -0.05 * study("oracle"), (ALL_BIG, LAYERS): 0.0})


def steady(study):
    """Each step falls by 0.05, but for the one to k = 3."""
    sums = {}
    for k in (1, 2, 3, 4):
        step = {who: 0.05 * (1 - study(f"step of {who}")) if k > 2 else 0.0 for who in ("pattern", "router")}
        pattern = study.loss(-0.05 * k * study("pattern") + step["pattern"])
        router = study.loss(-0.05 * k * study("router") + step["router"])
        sums |= {(NLL, Key(STATIC, k)): pattern} | study.router("linear", k, router)
    return sums


def sliding(study):
    slides = {ramp_oracle(3, 1): 0.05 * study("down"), ramp_oracle(1, 3): 0.05 * study("up")}
    return study.losses({(ORACLE, 2): 0.0} | {(ramp, 2): mean for ramp, mean in slides.items()})


def depth(study):
    later = study.layers(1 / 3 + DEPTH_L * study("later"), 2)
    even = study.layers(0.5 + (0.1 - 0.08 * study("even")) * np.array([0, 1, 0, 0, 0, 0]), 3)
    return later | even | study.layers(2 / 3 - DEPTH_L * study("earlier"), 4)


def big_or_skip(study):
    """Three layers tie for the most used, three for the least: the extremes of noisy shares lie further apart."""
    uneven_L = (0.1 + 0.05 * study("uneven")) * np.array([1, -1, 1, -1, 1, -1])
    exit_L = 0.075 * (1 - study("no exit")) * np.array([1, 1, 1, -1, -1, -1])
    return study.layers(0.5 + uneven_L + exit_L, 3)


def linear(study):
    sums = {}
    for k in study.among(*BUDGETS):
        share_HL = 0.5 + study(f"later at {k}") * DEPTH_L + study(f"early at {k}") * HALVES_H1
        sums |= study.use(k, study.scattered(share_HL, 0.03))
    return sums


def skipping(study):
    sums = {}
    for k in study.among(*BUDGETS):
        share_HL = 0.5 + DEPTH_L * study(f"skips later at {k}") - HALVES_H1
        again = 0.3 * study(f"again at {k}")
        sums |= study.use(k, study.scattered(share_HL, 0.03), Branch.SKIP, again)
    return sums


def in_most_documents(study, branch):
    """The difference between the halves has one sign in 80, 50 or 20 % of the documents."""
    sums = {}
    for k in study.among(2, 3):
        more_D = study.scattered(0.042 * study(f"{branch.name.lower()} at {k}"), 0.05)[:, None, None] * np.sign(
            HALVES_H1
        )
        sums |= study.use(k, 0.5 + (1 if branch == Branch.BIG else -1) * more_D + np.zeros(LAYERS), branch)
    return sums


def two_runs(number, plain, skip):
    """Decide a claim on a run whose router may not skip and on one whose router may, or on that which is moved."""

    def decided(study):
        runs = [run for run in (plain, skip) if study.moved is None or ("skip" in study.moved) == (run is skip)]
        return united([study.decide(run(study), like_opt=True)[number - 1] for run in runs])

    return decided


def difficulty(study):
    key, high_D = Key(ORACLE, 2, context="shared"), study.tokens_D // 4
    helped = [study.random.binomial(high_D, 0.05 + 0.04 * study(name)) for name in ("nothing", "much")]
    at_start_D2 = study.tokens_D[:, None] * np.array([0.9, 0.1])
    nll_D2 = study.scattered([3.0, 3.0 + 0.3 * study("loss")], 0.1)
    gain_D2 = nll_D2 * study.scattered([0.2, 0.2 - 0.05 * study("gain")], 0.05)
    starts_D23 = np.stack([at_start_D2, nll_D2 * at_start_D2, gain_D2 * at_start_D2], axis=-1)
    return {(HARD, key): np.stack([high_D, *helped], axis=1), (LINE_STARTS, key): starts_D23}


def other_models(study):
    over = {0.0: 0.1 * study("small"), 0.75: 0.1 - 0.05 * study("75 %"), 1.0: 0.1 - 0.05 * study("all")}
    over_X, frozen_X = {share: study.mean(mean) for share, mean in over.items()}, study.mean(0.05 * study("frozen"))
    return model_claims("code", over_X, frozen_X)


def tasks(study):
    behind = {0.0: 0.05 * study("small"), 0.75: 0.05 * (1 - study("75 %")), 1.0: 0.05 * (1 - study("all"))}
    return task_claim({share: study.mean(mean) for share, mean in behind.items()})


def areas(study):
    gain_of = {"gains": 0.05, "gains-off-policy": 0.05 - 0.05 * study("off-policy"), "linear": 0.0}
    gain_of["knn"] = 0.045 + 0.05 * study("knn")
    sums = {}
    for k in BUDGETS:
        sums[NLL, Key(STATIC, k)] = study.loss(0.0)
        for kind, gain in gain_of.items():
            sums |= study.router(kind, k, study.loss(-gain))
    return sums


def one_run(number, sums, **how):
    """Decide a claim on one run."""
    return lambda study: study.decide(sums(study), **how)[number - 1]


ROUTER_USE = "C10", "C16"
CLAIMS = {
    "C1": one_run(1, best_of_100),
    "C2": one_run(2, valley),
    "C3": one_run(3, one_layer),
    "C4": one_run(4, steady),
    "C5": one_run(5, sliding),
    "C6": one_run(6, depth),
    "C7": one_run(7, depth),
    "C8": one_run(8, depth),
    "C9": one_run(9, big_or_skip, branches=(Branch.SKIP, Branch.BIG)),
    "C10": two_runs(10, linear, skipping),
    "C11": one_run(11, difficulty),
    "C12": one_run(12, difficulty),
    "C13": two_runs(13, partial(in_most_documents, branch=Branch.BIG), partial(in_most_documents, branch=Branch.SKIP)),
    "C14": lambda study: other_models(study)[0],
    "C14 by tasks": tasks,
    "C15": lambda study: other_models(study)[1],
    "C16": two_runs(16, linear, skipping),
    "C17": one_run(17, skipping),
    "C18": one_run(18, areas),
    "C19": one_run(19, areas),
}
LINE, HALF = "last - first layer on a fitted line", "share of big, first - second half of the window"
DOCUMENTS_OF = "share of documents whose first half uses big more, router of"
AGAIN = "correlation of a layer's share of skip in the first and the second half of the window, router of skip, big"
CASES = [
    ("C1", "oracle", "nll: oracle - best of 100", 0.1),
    ("C1", "too good", "share of the way", 0.25),
    ("C1", "too bad", "share of the way", 0.25),
    ("C2", "falls", "nll: oracle at k = 3 - at k = 0", 0.1),
    ("C2", "rises", "nll: oracle at k = 6 - at k = 3", 0.1),
    ("C2", "early", "number of big layers", 0.1),
    ("C2", "late", "number of big layers", 0.1),
    ("C3", "oracle", "nll", 0.05),
    ("C4", "pattern", "nll: best fixed pattern at k", 0.15),
    ("C4", "router", "nll: router at k", 0.15),
    ("C5", "down", "nll: oracle at k = 2 for every token - at k from 3", 0.05),
    ("C5", "up", "nll: oracle at k = 2 for every token - at k from 1", 0.05),
    ("C6", "later", "share of big", 0.2),
    ("C7", "even", "largest departure", 0.08),
    ("C8", "earlier", "share of big", 0.2),
    ("C9", "uneven", "share of big, most used", 0.1),
    ("C9", "no exit", "share of big, first", 0.15),
    *((claim, f"later at {k}", f"share of big, {LINE}, at k = {k}", 0.2) for claim in ROUTER_USE for k in BUDGETS),
    *((claim, f"early at {k}", f"{HALF}, at k = {k}", 0.1) for claim in ROUTER_USE for k in BUDGETS),
    *(
        (claim, f"skips later at {k}", f"share of skip, {LINE}, router of skip, big at k = {k}", 0.2)
        for claim in ROUTER_USE
        for k in BUDGETS
    ),
    ("C11", "nothing", "share of high-loss tokens, at k = 2, to which neither", 0.04),
    ("C11", "much", "share of high-loss tokens, at k = 2, to which the oracle", 0.04),
    ("C12", "loss", "nll under all small", 0.3),
    ("C12", "gain", "share of it", 0.05),
    *(("C13", f"big at {k}", f"{DOCUMENTS_OF} small, big at k = {k}", 0.3) for k in (2, 3)),
    *(("C13", f"skip at {k}", f"{DOCUMENTS_OF} skip, big at k = {k}", 0.3) for k in (2, 3)),
    ("C14", "75 %", "nll: duo - dense of equal FLOPs, at big share 0.75", 0.05),
    ("C14", "all", "nll: duo - dense of equal FLOPs, at big share 1", 0.05),
    ("C14", "small", "nll: duo - dense of equal FLOPs, at big share 0", 0.1),
    ("C14 by tasks", "75 %", "accuracy: dense of equal FLOPs - duo, at big share 0.75", 0.05),
    ("C14 by tasks", "all", "accuracy: dense of equal FLOPs - duo, at big share 1", 0.05),
    ("C14 by tasks", "small", "accuracy: dense of equal FLOPs - duo, at big share 0", 0.05),
    ("C15", "frozen", "nll", 0.05),
    *(("C17", f"again at {k}", f"{AGAIN} at k = {k}", 0.3) for k in BUDGETS),
    ("C18", "off-policy", "area", 0.05),
    ("C19", "knn", "area", 0.05),
]
"""A claim, the quantity of it that is moved, how the condition that speaks of it begins, and how far 1 and -1 lie from
the border."""
STEPS = [
    ("C4", "step of pattern", "nll: best fixed pattern, the step", 0.05),
    ("C4", "step of router", "nll: router, the step", 0.05),
]
"""The same for conditions that hold unless they fail for sure."""
PLANTED = [*CASES, *STEPS]


def about(decided, begins):
    """The condition that speaks of a quantity."""
    return min(
        (one for one in decided.conditions if one.quantity.startswith(begins)), key=lambda one: len(one.quantity)
    )


def rate(verdict, trials, claim, moved=None, to=1.0, begins=""):
    """How often a claim, or one of its conditions, has a verdict."""
    found = 0
    for seed in range(trials):
        decided = CLAIMS[claim](Study(seed, moved, to))
        found += (about(decided, begins) if begins else decided).verdict == verdict
    return found / trials


def under_noise(sums):
    """A claim's sums below an oracle that has gains, and layers that it prefers, by selection noise alone.

    It gains 0.3 nats, prefers early layers, and removes more of the loss elsewhere than at line starts.
    """

    def searched(study):
        found, noisy = sums(study), {}
        for (quantity, key), sums_D in found.items():
            drawn = key._replace(policy=on_drawn(key.policy))
            if quantity == NLL and key.policy.startswith(ORACLE):
                noisy[NLL, key] = sums_D - 0.3 * study.tokens_D
                noisy[NLL, drawn] = study.loss(-0.3, 0.02)
                noisy[NLL, Key(DRAWN_STATIC, key.big_layers)] = study.level_D * study.tokens_D
            elif quantity == TAKEN:
                drawn_DLC = study.layers(key.big_layers / LAYERS - 1.5 * DEPTH_L, key.big_layers)[TAKEN, key]
                even_DL = key.big_layers / LAYERS * study.tokens_D[:, None]
                noisy[TAKEN, drawn] = drawn_DLC
                noisy[TAKEN, key] = sums_D + drawn_DLC
                noisy[TAKEN, key][..., Branch.BIG] -= even_DL
            elif quantity == LINE_STARTS:
                noisy[LINE_STARTS, key], noisy[LINE_STARTS, key._replace(policy=NET_ORACLE)] = sums_D.copy(), sums_D
                noisy[LINE_STARTS, key][..., 2] += study.scattered([0.6, 0.3], 0.05) * sums_D[..., 0]
                sums_D[..., 2] += study.scattered([0, 0], 0.05) * sums_D[..., 0]
        return found | noisy

    return searched


def by_token(study, scatter=0.0):
    """C11's sums, of tokens whose gains by selection noise scatter by so many nats, on the text and on drawn labels."""
    high_D, sums = study.tokens_D // 4, {}
    tokens = int(high_D.sum())
    at_random_T = study.random.random(tokens)
    shares = [0.05 + 0.04 * study(name) for name in ("nothing", "much")]
    gain_T = np.select([at_random_T < shares[0], at_random_T > 1 - shares[1]], [0.0, 2.0], 0.5)
    text_T, drawn_T = (0.3 + scatter * study.random.standard_normal((2, tokens))) + [gain_T, 0 * gain_T]
    document_T = np.repeat(np.arange(DOCUMENTS), high_D)
    for policy, saved_T in ((ORACLE, text_T), (NET_ORACLE, text_T - drawn_T)):
        helped_T2 = np.stack([saved_T < NOTHING, saved_T >= MUCH], axis=1).astype(float)
        key = Key(policy, 2, context="shared")
        sums[HARD, key] = np.column_stack([high_D, sum_by_document(helped_T2, document_T, DOCUMENTS)])
    return sums


ORACLES = {
    **{"C1": best_of_100, "C2": valley, "C3": one_layer, "C5": sliding, "C6": depth, "C7": depth, "C8": depth},
    **{"C9": big_or_skip, "C11": by_token, "C12": difficulty},
}


def net(claim, sums, moved=None, to=1.0, trials=200):
    """How often a claim about the oracle is reproduced: on the text, and net of selection noise."""
    found, branches = np.zeros(2), (Branch.SKIP if claim == "C9" else Branch.SMALL, Branch.BIG)
    for seed in range(trials):
        number, study = int(claim[1:]), Study(seed, moved, to)
        decided = study.decide(under_noise(sums)(study), branches, readings=True)[number - 1]
        found += [one.verdict == "reproduced" for one in decided.readings if one.labels != "drawn"]
    return found / trials


def test_every_condition_of_every_claim_is_moved():
    assert {name.split()[0] for name in CLAIMS} == {f"C{number}" for number in range(1, 20)}
    for claim, decide in CLAIMS.items():
        decided = decide(Study(0))
        moved = {about(decided, begins).quantity for name, _, begins, _ in PLANTED if name == claim}
        assert moved == {one.quantity for one in decided.conditions}


@pytest.mark.parametrize("claim", CLAIMS)
def test_a_planted_effect_is_found_with_a_power_of_80_percent(claim):
    assert rate("reproduced", 50, claim) >= POWER


@pytest.mark.parametrize(("claim", "quantity", "begins", "size"), PLANTED)
def test_the_opposite_is_found_with_a_power_of_80_percent(claim, quantity, begins, size):
    assert rate("not reproduced", 50, claim, quantity, -1, begins) >= POWER


@pytest.mark.parametrize(("claim", "quantity", "begins", "size"), CASES)
def test_a_planted_null_is_taken_for_an_effect_in_at_most_5_percent(claim, quantity, begins, size):
    assert rate("reproduced", 400, claim, quantity, 0, begins) <= LEVEL


@pytest.mark.parametrize(("claim", "quantity", "begins", "size"), STEPS)
def test_where_all_steps_are_flat_one_is_taken_for_a_rise_in_at_most_5_percent(
    claim, quantity, begins, size, monkeypatch
):
    """So C4 is reproduced there: it asks of a step only that it does not rise for sure."""
    monkeypatch.setattr(f"{__name__}.SAMPLES", 1000)  # for Bonferroni's percentiles, which lie far out
    assert rate("reproduced", 400, claim, quantity.removeprefix("step of "), 0, begins) >= 1 - LEVEL


# Without the place of C2's lowest loss: what is planted there is nats.
IN_ITS_UNIT = [case for case in PLANTED if not case[2].startswith("number")]


@pytest.mark.parametrize(("claim", "quantity", "begins", "size"), IN_ITS_UNIT)
def test_the_planted_effects_are_as_large_as_the_cases_say(claim, quantity, begins, size):
    at = {to: [about(CLAIMS[claim](Study(seed, quantity, to)), begins) for seed in range(20)] for to in (1, -1)}
    held, failed = (np.mean([one.estimate.value for one in found]) for found in at.values())
    assert abs(held - failed) / 2 == pytest.approx(size, rel=0.15)


@pytest.mark.parametrize("claim", CLAIMS)
def test_the_page_states_the_planted_effects(claim):
    [stated] = re.findall(rf"^\| {claim} \| ([^|]*) \| \d", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    sizes = dict.fromkeys(size for name, _, _, size in PLANTED if name == claim)
    assert [float(number) for number in re.findall(r"\d+\.\d+", stated)] == list(sizes)


NOISY = [
    *(case[:2] for case in CASES if case[0] in ("C9", "C11", "C12")),
    *(("C1", "oracle"), ("C2", "falls"), ("C3", "oracle"), ("C5", "down"), ("C6", "later"), ("C7", "even")),
    ("C8", "earlier"),
]


@pytest.mark.parametrize("claim", ORACLES)
def test_net_of_selection_noise_a_planted_effect_is_found(claim):
    assert net(claim, ORACLES[claim], trials=50)[1] >= POWER


@pytest.mark.parametrize(("claim", "quantity"), NOISY)
def test_net_of_selection_noise_only_what_is_planted_beside_it_is_found(claim, quantity):
    assert net(claim, ORACLES[claim], quantity, 0)[1] <= LEVEL


@pytest.mark.parametrize(("claim", "quantity"), [("C1", "oracle"), ("C12", "gain")])
def test_on_the_text_selection_noise_alone_is_taken_for_a_good_oracle(claim, quantity):
    assert net(claim, ORACLES[claim], quantity, 0, trials=50)[0] >= POWER


@pytest.mark.parametrize("quantity", ["nothing", "much"])
def test_c11_net_of_noise_that_scatters_over_tokens_counts_tokens_by_chance(quantity):
    """It counts tokens beyond a threshold, and the difference of two noisy gains lies beyond it more often."""
    assert net("C11", partial(by_token, scatter=0.5), quantity, -1, trials=50)[1] >= POWER
