"""Claims of several runs: each takes what it measures from the run that can measure it, and from every seed.

A column of the table is a seed: one run for each part that it can play. The parts are read from the runs' recipes.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from duollm.analysis.claims import about
from duollm.analysis.claims.models import SHARES, model_claims, paired_draws, scored_domains, task_claim, task_draws
from duollm.analysis.results import Results, read_results
from duollm.analysis.verdicts import Claim, Reading, united
from duollm.config import Recipe
from duollm.errors import UserError
from duollm.recipe_files import recipe_of
from duollm.records.bootstrap import Floats

_SAME_WIDTH = 0.02


@dataclass(frozen=True)
class Run:
    """A run folder with its recipe, and its results unless it only stands beside others (dense, frozen)."""

    folder: Path
    recipe: Recipe
    results: Results | None

    @classmethod
    def read(cls, folder: Path) -> "Run":
        """Read a run folder.

        Raises:
            UserError: it is none, or its results are missing or of another version.
        """
        run = cls(folder, recipe_of(folder), None)
        return run if run.role.startswith(("dense", "frozen")) else replace(run, results=read_results(folder))

    @property
    def role(self) -> str:
        """Which part it plays, by its recipe."""
        recipe = self.recipe
        if recipe.pretrain.branch_shares == (0.0, 0.0, 1.0):
            return f"dense of width {recipe.model.intermediate_size}"
        if recipe.pretrain.freeze == "big":
            return "frozen"
        branches = "-".join(dict.fromkeys([*recipe.oracle.branches, *recipe.router.branches]))
        skipped = " of whole layers" if "skip" in branches and recipe.model.skip_scope == "layer" else ""
        return f"{recipe.model.architecture} {branches}{skipped}"


STUDY = "llama small-big"
"""The part that others stand beside."""


@dataclass
class Column:
    """One seed of a study: a run for each part. The first is the main one, beside which the others stand."""

    seed: int
    runs: dict[str, Run] = field(default_factory=dict)

    @property
    def main(self) -> Run:
        """The run that others stand beside."""
        return next(iter(self.runs.values()))

    def claims(self) -> Iterator[Claim]:
        """Yield every claim in every domain, its conditions taken from all runs of this seed."""
        found: dict[tuple[str, str], list[Claim]] = {}
        layers: dict[tuple[str, str], Claim] = {}
        studies = [run for run in self.runs.values() if run.results]
        paper = [run for run in studies if run.recipe.model.architecture != "opt"] or studies
        for run in studies:
            assert run.results
            for claim in run.results.claims:
                if run.role.endswith("whole layers") and run.role.removesuffix(" of whole layers") in self.runs:
                    layers[claim.id, claim.domain] = claim
                elif claim.id == "C16" or run in paper:  # claims about the paper's own model come from no other
                    found.setdefault((claim.id, claim.domain), []).append(claim)
        for claim in self._of_models():
            found[claim.id, claim.domain] = [claim]
        for place, claims in found.items():
            yield _with_layers(united(claims), layers.get(place))

    def _of_models(self) -> Iterator[Claim]:
        assert self.main.results
        for domain in dict.fromkeys(claim.domain for claim in self.main.results.claims):
            losses = self.losses_beside(domain)
            over_X = {share: duo_X - dense_X for (model, share), (dense_X, duo_X) in losses.items() if model == "dense"}
            frozen_X = next((frozen_X - duo_X for (m, _), (frozen_X, duo_X) in losses.items() if m == "frozen"), None)
            for claim in model_claims(domain, over_X, frozen_X):
                yield about(claim)
        behind_X = {share: dense_X - duo_X for (_, share), (dense_X, duo_X) in self.accuracies_beside().items()}
        if behind_X:
            yield about(task_claim(behind_X))

    def losses_beside(self, domain: str) -> dict[tuple[str, float], tuple[Floats, Floats]]:
        """Return the nll [X] of dense and frozen models, by share of big, each with that of the duo at this share."""
        known = scored_domains(self.main.folder)
        domains = known if domain == "pooled" else [name for name in known if name == domain]
        return self._beside(partial(paired_draws, domains, seed=self.seed))

    def accuracies_beside(self) -> dict[tuple[str, float], tuple[Floats, Floats]]:
        """Return the accuracy on tasks of dense models, as `losses_beside`."""
        return {
            key: pair for key, pair in self._beside(partial(task_draws, seed=self.seed)).items() if key[0] == "dense"
        }

    def _beside(
        self, draws_of: Callable[[Sequence[tuple[Path, str]]], Floats | None]
    ) -> dict[tuple[str, float], tuple[Floats, Floats]]:
        found = {}
        for role, run in self.runs.items():
            if not role.startswith(("dense", "frozen")):
                continue
            model, share, policy = "frozen", 0.5, "random:0.5"
            if role != "frozen":
                model, share, policy = "dense", equal_share(run, self.main), "all-big"
            pair_X2 = draws_of([(run.folder, policy), (self.main.folder, f"random:{share:g}")])
            if pair_X2 is not None:
                found[model, share] = pair_X2[:, 0], pair_X2[:, 1]
        return found


def _with_layers(claim: Claim, layers: Claim | None) -> Claim:
    """Put what runs that skip whole layers say beside a claim, whose own runs skip FFNs as the paper does."""
    if layers is None or layers.verdict == "not measured":
        return claim
    own = [Reading("", "text", layers.verdict, layers.quantity, layers.estimate)]
    readings = [replace(one, context=f"{one.context} layers".strip()) for one in layers.readings or own]
    return replace(claim, readings=[*claim.readings, *readings])


def equal_share(dense: Run, duo: Run) -> float:
    """Return the share of big at which the duo takes the FLOPs of a dense model.

    Raises:
        UserError: it is none of those that the paper compares.
    """
    width, sizes = dense.recipe.model.intermediate_size, duo.recipe.model
    equal = {share: share * sizes.intermediate_size + (1 - share) * sizes.small_intermediate_size for share in SHARES}
    nearest = min(equal, key=lambda share: abs(equal[share] - width))
    if abs(equal[nearest] - width) > max(1, _SAME_WIDTH * sizes.intermediate_size):
        widths = ", ".join(f"{each:g}" for each in equal.values())
        raise UserError(
            f"{dense.folder}: a dense model whose FFNs are {width} wide; those of equal FLOPs with {duo.folder} are "
            f"{widths} wide"
        )
    return nearest


def columns_of(runs: Sequence[Run]) -> tuple[list[Column], list[Run]]:
    """Put runs of one seed together, each beside the study that it resembles most.

    Studies of one seed open a column each. A run that finds no place beside a study opens one too, if it has results.

    Returns:
        the columns; and the runs that have no place in them.
    """
    studies = [run for run in runs if run.role == STUDY]
    columns, without_place = [Column(run.recipe.seed, {run.role: run}) for run in studies], []
    for run in (run for run in runs if run.role != STUDY):
        free = [column for column in columns if column.seed == run.recipe.seed and run.role not in column.runs]
        if free:
            nearest = min(free, key=lambda column: len(differences(run, column.main)))
            nearest.runs[run.role] = run
        elif run.results:
            columns.append(Column(run.recipe.seed, {run.role: run}))
        else:
            without_place.append(run)
    return columns, without_place


def notes_on(studies: Sequence[Sequence[Column]], without_place: Sequence[Run]) -> Iterator[str]:
    """Yield a sentence for every run that has no place, or differs more than it must from the one it stands beside."""
    first = studies[0][0].main
    for study in studies[1:]:
        yield f"{study[0].main.folder} is a study of its own, for {_told(study[0].main, first)}"
    for study in studies:
        for column in study:
            if found := differences(column.main, study[0].main, measured=True):
                yield f"{column.main.folder}: {_told(column.main, study[0].main, found)}"
            for run in column.runs.values():
                if found := differences(run, column.main):
                    yield f"{run.folder}: {_told(run, column.main, found)}"
    for run in without_place:
        yield f"{run.folder} is left out: no study of seed {run.recipe.seed} lacks a run that is {run.role}"


def _told(run: Run, other: Run, found: Sequence[str] = ()) -> str:
    """Name the settings in which two runs differ, with both values."""
    ours, others = (each.recipe.model_dump() for each in (run, other))
    shown = []
    for name in found or differences(run, other):
        section, _, key = name.partition(".")
        shown.append(f"{name} is {ours[section][key]}, not {others[section][key]}")
    return f"{', '.join(shown)} as in {other.folder}"


def studies_of(columns: Sequence[Column]) -> list[list[Column]]:
    """Put the seeds of one study together: columns whose models were made alike."""
    studies: list[list[Column]] = []
    for column in columns:
        alike = (each for each in studies if not differences(column.main, each[0].main))
        study = next(alike, None)
        if study is None:
            studies.append([column])
        else:
            study.append(column)
    return studies


_MADE_BY = ("model", "data", "pretrain", "convert")
_MEASURED_BY = ("oracle", "router", "evaluate")
_OF_NO_CONSEQUENCE = {"pretrain.checkpoint_every", "pretrain.log_every", "pretrain.compile", "oracle.memory_gib"}
_NEEDED = {
    "dense": {"pretrain.branch_shares", "model.intermediate_size"},
    "frozen": {"model.dense", "pretrain.freeze", "pretrain.tokens", "convert"},
    "opt": {"model.architecture"},
    "skip": {"model.skip_scope", "pretrain.branch_shares"},
}
"""Settings in which a run must differ from the study that it stands beside, by what its part is called."""


def _tokens_with_big(run: Run) -> int | None:
    """Return the tokens of a frozen run and of the run that trained its big FFNs, if that is still there."""
    if run.role != "frozen" or not Path(str(run.recipe.model.dense), "..", "config.yaml").is_file():
        return None
    return run.recipe.pretrain.tokens + recipe_of(Path(str(run.recipe.model.dense)).parent).pretrain.tokens


def differences(run: Run, other: Run, measured: bool = False) -> list[str]:
    """Return the settings in which two runs differ, but for the seed and what their parts need.

    Args:
        measured: whether to compare how they were measured, too, rather than only how their models were made.
    """
    needed = set(_OF_NO_CONSEQUENCE)
    for part, settings in _NEEDED.items():
        if (part in run.role) != (part in other.role):
            needed |= settings
    ours, others = (each.recipe.model_dump() for each in (run, other))
    sections = [*_MADE_BY, *(_MEASURED_BY if measured else ())]
    given, whose = run.recipe.model.path, other.folder / "model"
    if given and not other.recipe.model.path:  # it has that model, whatever its recipe says of how one is made
        if Path(given).resolve() != whose.resolve():
            return ["model.path"]
        sections, needed = [each for each in sections if each not in ("model", "pretrain")], needed | {"data.tokenizer"}
    elif given and run.recipe.seed != other.recipe.seed:  # each seed has a model of its own
        needed |= {"model.path", "data.tokenizer"}
    tokens = _tokens_with_big(run)
    found = ["pretrain.tokens"] if tokens not in (None, other.recipe.pretrain.tokens) else []
    return found + [
        f"{section}.{key}"
        for section in sections
        for key in ours[section]
        if ours[section][key] != others[section][key] and not {section, f"{section}.{key}"} & needed
    ]
