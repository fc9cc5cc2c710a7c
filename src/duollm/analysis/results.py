"""results.json as typed rows. docs/formats.md describes the fields.

Shape letters: L layers, P bins of positions, N sizes of a draw.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from duollm.analysis.verdicts import Claim
from duollm.errors import UserError, did_you_mean
from duollm.files import write_json
from duollm.records.bootstrap import Estimate
from duollm.records.facts import read_json
from duollm.records.keys import EXECUTED, ORACLE, Key, variant
from duollm.routes.space import focus_budgets

FAMILY_LEVEL = 0.05
"""Of `FamilyRow.gain_p` and `FamilyRow.best_p`."""


@dataclass(frozen=True)
class PolicyRow:
    """A policy at a budget in a domain, or in all domains pooled."""

    domain: str
    policy: str
    kind: str | None
    spend: str | None
    big_layers: int

    @property
    def variant(self) -> str:
        """The policy without its budget: its name, or a kind of router and its way of spending."""
        return variant(self.policy, self.kind, self.spend)


def fields_of(domain: str, key: Key) -> dict[str, Any]:
    """Return the fields of a `PolicyRow`."""
    return {"domain": domain} | {name: getattr(key, name) for name in ("policy", "kind", "spend", "big_layers")}


@dataclass(frozen=True)
class LossRow(PolicyRow):
    """The mean loss of a policy."""

    context: str | None
    mean_big_layers: float
    nll: Estimate
    perplexity: float
    over_all_big: Estimate
    documents: int
    tokens: int


@dataclass(frozen=True)
class GapRow(PolicyRow):
    """The share of the gap from static to oracle that a router closes."""

    mean_big_layers: float
    closed: Estimate
    closed_at_spent: Estimate | None


@dataclass(frozen=True)
class ComparisonRow(PolicyRow):
    """A policy beside all others of its budget."""

    context: str | None
    nll: Estimate
    compared_nll: float | None
    gain_over_static: Estimate | None
    gain_at_spent: Estimate | None
    of_oracle: Estimate | None
    of_ceiling: Estimate | None
    gain_tokens: int
    closed: Estimate | None
    closed_at_spent: Estimate | None
    big_share: float
    within_budget: bool | None
    flops_per_token: float | None
    relative_flops: float | None
    router_flops_share: float | None
    seconds_per_token: float | None
    relative_time: float | None
    relative_time_quartiles: list[float] | None
    router_time_share: float | None

    @property
    def fair_gain(self) -> Estimate | None:
        """The gain over static at what was spent, or at k if that is not known."""
        return self.gain_at_spent or self.gain_over_static


@dataclass(frozen=True)
class FamilyRow:
    """A router over all budgets, judged in the family of all routers (docs/claims.md).

    Attributes:
        router: the kind, with its way of spending if that is exact.
        gain, gain_p: the gain over static at what was spent, by budget; its p-value, adjusted for the whole family.
        area, area_p: the mean of the gains by the trapezoid rule, with its own p-value; None if a budget is missing.
        best_p: the router is in the 95 % model confidence set of the best area if this is above 0.05.
    """

    domain: str
    router: str
    big_layers: list[int]
    gain: list[Estimate]
    gain_p: list[float]
    area: Estimate | None
    area_p: float | None
    best_p: float | None

    @property
    def beats_static(self) -> list[int]:
        """The budgets at which the router beats static; naming any by chance has a probability of at most 5 %."""
        return [k for k, p in zip(self.big_layers, self.gain_p, strict=True) if p <= FAMILY_LEVEL]

    @property
    def may_be_best(self) -> bool:
        """Whether the router cannot be told from the best."""
        return self.best_p is not None and self.best_p > FAMILY_LEVEL


@dataclass(frozen=True)
class SpendRow:
    """The loss of a kind of router when it spends exactly k on every token, against k on average."""

    domain: str
    kind: str
    big_layers: int
    average_mean_big_layers: float
    exact_minus_average: Estimate


@dataclass(frozen=True)
class AgreementRow(PolicyRow):
    """How often a router takes the oracle's branch."""

    share: float
    share_if_independent: float
    over_independent: Estimate
    share_by_layer: list[Estimate]
    share_if_independent_by_layer: list[float]


@dataclass(frozen=True)
class NoiseRow:
    """The gain of a search on drawn labels."""

    domain: str
    context: str
    big_layers: int
    gain: Estimate
    gain_drawn: Estimate
    second_draw: Estimate
    gain_beyond_drawn: Estimate


@dataclass(frozen=True)
class UnitRow(NoiseRow):
    """The same of a search that chose one route for `unit` neighbouring tokens."""

    unit: int


@dataclass(frozen=True)
class TriesRow:
    """The gains over static at a budget, had only some random routes been tried.

    Attributes:
        tried: the numbers of routes; the last is all.
        gain, gain_drawn, second_draw, gain_beyond_drawn: as in `NoiseRow`, by number of routes.
        gain_expected: what a search by the expected loss of drawn labels gains in it: there is no luck in that.
        labels: numbers of drawn labels of a token, by whose mean loss its route was chosen among all routes.
        gain_by_labels, second_by_labels: what that gains on these labels, and on as many others.
    """

    domain: str
    big_layers: int
    tried: list[int]
    gain: list[Estimate]
    gain_drawn: list[Estimate]
    second_draw: list[Estimate]
    gain_beyond_drawn: list[Estimate]
    gain_expected: list[Estimate]
    labels: list[int]
    gain_by_labels: list[Estimate]
    second_by_labels: list[Estimate]


@dataclass(frozen=True)
class CeilingRow:
    """The gain of one predictor over static, at the big layers it spent."""

    domain: str
    depth: int
    shuffled: bool
    chosen: bool
    spend: str
    big_layers: int
    mean_big_layers: float
    gain: Estimate


@dataclass(frozen=True)
class DecompositionRow:
    """The parts of the oracle's gain over static: `total` = `predictable` + `noise` + `rest`."""

    domain: str
    context: str
    big_layers: int
    total: Estimate
    predictable: Estimate
    noise: Estimate
    rest: Estimate
    shuffled: Estimate


@dataclass(frozen=True)
class BestOfRow:
    """The best of N random patterns, or routes per token, as a function of N."""

    domain: str
    big_layers: int
    patterns: int
    drawn: list[int]
    nll: list[Estimate]
    over_all_big: list[Estimate]


@dataclass(frozen=True)
class LayerUseRow(PolicyRow):
    """How often each layer is big, over depth, and over depth and position."""

    share_by_layer: list[Estimate]
    position_edges: list[int]
    share_by_layer_and_position: list[list[Estimate]]


@dataclass(frozen=True)
class DifficultyRow:
    """The relation of loss and difficulty."""

    domain: str
    big_layers: int
    median_gain: float
    hard_without_gain: Estimate


@dataclass(frozen=True)
class ClassRow:
    """Loss and gains of a class of tokens at a budget, over all small, with what is left without selection noise.

    Attributes:
        kind: what kind of classes it belongs to: `all`, `form` or `python`.
        gain, gain_all_big, gain_predicted: what the oracle, all big and the ceiling save, nats.
        gain_drawn: what the same search saves at the same tokens on drawn labels.
        high_loss: share of the class with a high loss.
        unhelped, unhelped_drawn: of these, the share that neither all big nor the oracle helps; on drawn labels.
    """

    domain: str
    big_layers: int
    kind: str
    name: str
    tokens: int
    nll_small: Estimate | None
    gain: Estimate | None
    gain_all_big: Estimate | None
    gain_predicted: Estimate | None
    gain_drawn: Estimate | None
    high_loss: Estimate | None
    unhelped: Estimate | None
    unhelped_drawn: Estimate | None


@dataclass(frozen=True)
class HelpedRow:
    """A token that the oracle helps much; its gains are those on other documents than it was chosen on."""

    domain: str
    big_layers: int
    text: str
    tokens: int
    gain: float
    gain_all_big: float | None = None
    gain_predicted: float | None = None
    gain_drawn: float | None = None


@dataclass(frozen=True)
class Size:
    """How much text of a domain the oracle searched, patterns were run on, and policies were compared on."""

    documents: int
    tokens: int
    pattern_tokens: int
    compared_documents: int | None = None
    compared_tokens: int | None = None


@dataclass(frozen=True)
class Results:
    """Every number of a report."""

    provenance: dict[str, Any]
    model: dict[str, Any]
    data: dict[str, Size]
    context: str
    bootstrap: dict[str, Any]
    nll: list[LossRow]
    gap_closed: list[GapRow]
    comparison: list[ComparisonRow]
    families: list[FamilyRow]
    spend: list[SpendRow]
    agreement: list[AgreementRow]
    timing: dict[str, Any] | None
    selection_noise: list[NoiseRow]
    units: list[UnitRow]
    tries: list[TriesRow]
    ceiling: list[CeilingRow]
    decomposition: list[DecompositionRow]
    best_of_patterns: list[BestOfRow]
    best_of_routes: list[BestOfRow]
    layer_use: list[LayerUseRow]
    difficulty: list[DifficultyRow]
    difficulty_by_class: list[ClassRow]
    helped_most: list[HelpedRow]
    claims: list[Claim]

    @property
    def num_layers(self) -> int:
        """L."""
        return int(self.model["num_layers"])

    @property
    def focus_budgets(self) -> tuple[int, int, int]:
        """The low, middle and high budget, of those that the searched routes can have."""
        return focus_budgets(self.num_layers, self.model.get("possible_big_layers", ()))

    def shown_budget(self, rows: "Iterable[PolicyRow | NoiseRow | CeilingRow]") -> int:
        """Return the budget of what shows only one: that of the rows nearest to a third of the layers."""
        return focus_budgets(self.num_layers, [row.big_layers for row in rows])[0]

    @property
    def searched_budget(self) -> int:
        """`shown_budget` of the oracle."""
        return self.shown_budget(row for row in self.main_nll if (row.policy, row.domain) == (ORACLE, self.headline))

    @property
    def domains(self) -> list[str]:
        """The domains in the recipe's order."""
        return list(self.data)

    @property
    def headline(self) -> str:
        """The domain of the report's main numbers: all pooled, or the only one."""
        return "pooled" if len(self.data) > 1 else self.domains[0]

    def domain_of(self, run: Path, asked: str | None) -> str:
        """Return the domain that is asked for, by default the headline.

        Raises:
            UserError: the run, which is named in the message, has no such domain.
        """
        known = {*self.domains, self.headline}
        if asked is not None and asked not in known:
            raise UserError(f"domain {asked}: not in {run}; {did_you_mean(asked, known)}")
        return asked or self.headline

    @property
    def cheapest(self) -> str:
        """What to call the policy that takes the cheapest branch at every layer."""
        return "all small" if "small" in self.model["branches"] else "all skipped"

    @property
    def main_nll(self) -> list[LossRow]:
        """`nll` without the oracle in other contexts than the main one."""
        return [row for row in self.nll if row.policy not in (ORACLE, EXECUTED) or row.context == self.context]


def write_results(run: Path, results: Results) -> None:
    """Write results.json."""
    write_json(run / "results.json", asdict(results))


def read_results(run: Path) -> Results:
    """Read a run's results.json.

    Raises:
        UserError: the file is missing, damaged, or written by another version of duollm.
    """
    path = run / "results.json"
    try:
        results = TypeAdapter(Results).validate_python(read_json(path))
        if not (results.data and isinstance(results.model.get("num_layers"), int)):
            raise UserError(f"{path}: names no data, or no model; run `duollm report` on the run again")
        return results
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(
            f"{path}: not the results of this version of duollm ({where}: {first['msg']}); "
            "run `duollm report` on the run again"
        ) from None
