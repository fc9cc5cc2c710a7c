"""The whole study, stage by stage: what each stage does, depends on and leaves behind."""

import hashlib
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from duollm import __version__
from duollm.analysis.analyse import analyse
from duollm.ceiling.evaluation import evaluate_ceiling, validation_windows
from duollm.ceiling.predictor import train_ceiling
from duollm.checks import check_recipe, completed, given_config
from duollm.config import DataConfig, Recipe
from duollm.convert.dense import convert, open_dense
from duollm.convert.saving import CARD, load_model, silence_transformers
from duollm.data.packed import PackedData, Windows
from duollm.data.packing import prepare_data, source_fingerprint
from duollm.errors import UserError
from duollm.files import write_json, write_text
from duollm.machine import autocast, peak_memory_bytes, provenance, return_freed_memory
from duollm.measure.comparison import compare_patterns, compare_routers, compared_windows
from duollm.models.configuration_duo import DuoConfig
from duollm.models.modeling_duo import DuoForCausalLM
from duollm.oracle.labels import LABELS, label_windows, routes_to_label, save_labels
from duollm.oracle.noise import LabelSource
from duollm.oracle.plan import SearchPlan
from duollm.oracle.run import OracleRun
from duollm.oracle.store import OracleStore
from duollm.recipe_files import to_yaml
from duollm.report.model_card import add_results
from duollm.report.page import write_report
from duollm.report.summary import print_frontier, print_routers, print_summary
from duollm.routers.registry import router_class, settings_of, trained_routers
from duollm.routers.static import Prior, patterns_of, static_priors
from duollm.routers.train import router_name, train_router, trainings
from duollm.routes.space import RouteSpace, parse_branches
from duollm.stages import Stage, run_stages
from duollm.terminal import counted, say, working
from duollm.training.loop import Context
from duollm.training.pretrain import pretrain
from duollm.training.world import World, join_world


def run_study(recipe: Recipe, run: Path, command: list[str], until: str = "report") -> None:
    """Bring the run folder up to date, up to and including the stage `until`.

    Args:
        run: the run folder (docs/formats.md); finished stages in it are not repeated.
        command: the command line, for the provenance.

    Raises:
        UserError: bad input, named in one line.
    """
    silence_transformers()
    config = given_config(recipe)
    recipe = completed(recipe, config or recipe.model)
    check_recipe(recipe, config or recipe.model, runs=True)
    world = join_world()
    study = Study(recipe, run, world, (config or recipe.model).num_hidden_layers)
    if world.first:
        write_text(run / "config.yaml", to_yaml(recipe))
        write_json(run / "provenance.json", provenance(command, recipe.seed))
    announce = _announce if world.first else lambda line: None

    def after_stage(name: str, missing: list[str]) -> None:
        study.show_so_far(until, name, missing)
        return_freed_memory()

    run_stages(study.stages(), run, until, announce, world.first, world.wait, after_stage)
    if until == "report" and world.first:
        print_summary(run, [stage.name for stage in study.stages()])
    made = run / "report.html" if until == "report" else run
    announce(f"{until} is up to date: {made} (at most {peak_memory_bytes() / 2**30:.1f} GiB of memory used)")


def _announce(line: str) -> None:
    if not (sys.stdout.isatty() and line.endswith(": starts")):  # a terminal has the stage's own line
        print(line, flush=True)


class Study:
    """The stages of a recipe in a run folder.

    Args:
        num_layers: of the model; default: the number that the recipe gives.
    """

    def __init__(self, recipe: Recipe, run: Path, world: World, num_layers: int | None = None) -> None:
        self.recipe, self.run, self.world = recipe, run, world
        self.num_layers = num_layers or recipe.model.num_hidden_layers
        self._priors_of: dict[tuple[str, ...], Mapping[int, Prior]] = {}

    @property
    def _plan(self) -> SearchPlan:
        return SearchPlan(self.recipe.oracle, self.num_layers, self.recipe.data.sequence_length)

    def _space(self, branches: Sequence[str]) -> RouteSpace:
        """The routes of these branches, in the oracle's groups of layers and with its fixed layers."""
        searched = self._plan.space
        return RouteSpace(searched.num_layers, parse_branches(branches), searched.group_layers, searched.fixed)

    @property
    def _groups(self) -> dict[str, Any]:
        """What the stages that route depend on, if layers do not vary by themselves."""
        space = self._plan.space
        return {} if space.by_layer else {key: space.facts[key] for key in ("groups", "fixed")}

    def stages(self) -> list[Stage]:
        """All stages in the order of the study."""
        recipe = self.recipe
        sampled = recipe.oracle.model_dump(exclude={"memory_gib", "labels_from", "labels_temperature"})
        return [
            Stage(
                "data",
                self._prepare_data,
                {"sources": source_fingerprint(self._data_config, recipe.seed)},
                outputs=("data",),
            ),
            *self._model_stages(),
            Stage(
                "oracle",
                self._search,
                {**sampled, **self._labels, "seed": recipe.seed},
                after=("data", "pretrain"),
                outputs=("oracle",),
            ),
            self._ceiling_stage(),
            *self._label_stages(),
            *self._router_stages(),
            Stage(
                "train-router",
                lambda: None,
                {"routers": self._router_names()},
                after=tuple(name for name, _, _ in trainings(recipe.router)),
            ),
            Stage(
                "evaluate",
                self._evaluate,
                {**recipe.compared_text.model_dump(), "spend": recipe.router.spend, "seed": recipe.seed},
                after=("data", "pretrain", "oracle", "train-router"),
                outputs=("evaluate",),
                version=4,
            ),
            Stage(
                "report",
                self._report,
                recipe.report.model_dump() | {"seed": recipe.seed},
                after=("oracle", "evaluate", "ceiling"),
                outputs=("results.json", "figures", "report.html"),
                kept=("report.html",),
            ),
        ]

    def show_so_far(self, until: str, ended: str, missing: list[str]) -> None:
        """Print what a stage found, and write the page from what is measured so far, once the oracle has been.

        The last stage writes the page in full.

        Args:
            until: the stage that the study runs up to.
            ended: the stage that has just ended.
            missing: the stages that are not up to date.
        """
        for name, kind, budgets in trainings(self.recipe.router):
            if name == ended and self.world.first:
                print_routers(self.run, [router_name(kind, big) for big in budgets], name)
        silent = {"train-router", "report"} | (set() if self.recipe.ceiling.enabled else {"ceiling"})
        to_come = [name for name in missing if name not in silent]
        is_next = until == "report" and not to_come
        adds = ended in {"oracle", "ceiling", "evaluate"} - silent and "oracle" not in missing
        if self.world.first and adds and not is_next:
            with working("report"):
                results = analyse(self.run, self.recipe.report.bootstrap_samples, self.recipe.seed)
                write_report(self.run, self.recipe.report.shown_documents, to_come, figures=False)
            print_frontier(results)

    def _model_stages(self) -> list[Stage]:
        """Train a duo, convert and train one, or take the one that the recipe names."""
        recipe = self.recipe
        if recipe.model.path is not None:
            weights = _fingerprint_weights(Path(recipe.model.path), "model.path")
            return [Stage("pretrain", self._check_given_model, {"weights": weights}, after=("data",))]
        settings = recipe.pretrain.model_dump(exclude={"log_every", "checkpoint_every"}) | {"seed": recipe.seed}
        if recipe.model.dense is None:
            settings["model"] = recipe.model.model_dump(exclude={"dense"})
        train = Stage(
            "pretrain",
            self._pretrain,
            settings,
            after=("data",) if recipe.model.dense is None else ("data", "convert"),
            outputs=("model",),
            scratch=("resume/pretrain.pt",),
        )
        return [train] if recipe.model.dense is None else [self._convert_stage(recipe.model.dense), train]

    def _convert_stage(self, dense: str) -> Stage:
        """Make a duo of a dense checkpoint."""
        recipe, local = self.recipe, Path(dense).is_dir()
        settings = {
            "dense": _fingerprint_weights(Path(dense), "model.dense") if local else dense,
            **recipe.model.model_dump(include={"small_intermediate_size", "skip_scope"}),
            **recipe.convert.model_dump(),
            "seed": recipe.seed,
        }
        return Stage("convert", self._convert, settings, after=("data",), outputs=("converted",))

    def _ceiling_stage(self) -> Stage:
        """Measure what can be predicted, or remove what an earlier recipe measured."""
        recipe, after, checkpoint = self.recipe, ("data", "pretrain"), "resume/ceiling.pt"
        if not recipe.ceiling.enabled:
            return Stage("ceiling", lambda: None, None, after=after, scratch=("ceiling", checkpoint))
        settings = recipe.ceiling.model_dump() | recipe.compared_text.model_dump()
        settings["branches"] = recipe.oracle.branches
        settings |= {"big_layers": recipe.router.big_layers, "seed": recipe.seed, **self._groups}
        if recipe.router.around_static:  # static is chosen in the routers' precision
            settings |= {"around_static": True, "static_precision": recipe.router.precision}
        return Stage("ceiling", self._measure_ceiling, settings, after, ("ceiling",), (checkpoint,), version=3)

    def _label_stages(self) -> list[Stage]:
        """Label training tokens, if some kind of router is taught by the oracle."""
        recipe = self.recipe
        if not any(router_class(kind).needs_labels for kind in recipe.router.kinds):
            return []
        settings = recipe.router.model_dump(include={"branches", "label_tokens", "label_routes"})
        settings |= {"seed": recipe.seed, **self._groups}
        if self._pool_of_labels() is not None or recipe.model.path or recipe.model.dense:
            settings["big_layers"] = recipe.router.big_layers  # a pool is drawn for these budgets
        return [Stage("labels", self._label, settings, after=("data", "pretrain"), outputs=(LABELS.as_posix(),))]

    def _pool_of_labels(self) -> torch.Tensor | None:
        """The routes to label with; None: all."""
        router = self.recipe.router
        return routes_to_label(self._space(router.branches), router.big_layers, router.label_routes, self.recipe.seed)

    def _router_stages(self) -> list[Stage]:
        """One stage per training: a further kind or budget does not repeat the others."""
        recipe = self.recipe
        text = {"seed": recipe.seed, "windows_per_document": recipe.compared_text.windows_per_document}
        return [
            Stage(
                name,
                partial(self._train_router, kind, budgets),
                settings_of(kind, recipe.router) | text | {"kind": kind, "big_layers": budgets} | self._groups,
                after=("data", "pretrain", *(["labels"] if router_class(kind).needs_labels else [])),
                outputs=tuple(f"routers/{router_name(kind, big)}" for big in budgets),
                scratch=(f"resume/{name}.pt",),
                version=4,
            )
            for name, kind, budgets in trainings(recipe.router)
        ]

    def _router_names(self) -> list[str]:
        return [router_name(kind, big) for kind in self.recipe.router.kinds for big in self.recipe.router.big_layers]

    def _prepare_data(self) -> None:
        if self.world.first:
            prepare_data(self._data_config, self.recipe.seed, self.run / "data", progress=say)

    @property
    def _data_config(self) -> DataConfig:
        """The recipe's; text for a dense checkpoint has its tokenizer unless another is named."""
        given, dense = self.recipe.data, self.recipe.model.dense
        return given.model_copy(update={"tokenizer": dense}) if dense and given.tokenizer is None else given

    def _convert(self) -> None:
        recipe, dense = self.recipe, self.recipe.model.dense
        assert dense is not None
        if self.world.first:
            sizes = recipe.model
            model = open_dense(dense, sizes.small_intermediate_size, sizes.skip_scope, recipe.seed, torch.float32)
            self._check_vocabulary(model.config, "model.dense", dense)
            nn.Module.to(model, self.world.device)
            convert(model, dense, recipe.convert, self._data, recipe.seed, self.run / "converted", progress=say)

    def _pretrain(self) -> None:
        recipe = self.recipe
        converted = self.run / "converted" if recipe.model.dense else None
        pretrain(self._context, recipe.model, recipe.pretrain, converted)

    def _check_given_model(self) -> None:
        self._check_vocabulary(self._load_model().config, "model.path", str(self._model_folder))

    def _check_vocabulary(self, config: DuoConfig, key: str, given: str) -> None:
        """Refuse a model whose vocabulary does not fit the data before hours are spent on it."""
        if config.vocab_size < self._data.vocab_size:
            raise UserError(
                f"{key}: {given} knows {config.vocab_size} tokens, the data has {self._data.vocab_size}; "
                "set data.tokenizer to the model's own"
            )

    def _search(self) -> None:
        recipe, model, data = self.recipe, self._load_model(), self._data
        fingerprints = {
            "model_fingerprint": _fingerprint_weights(self._model_folder, "model"),
            "data_fingerprint": data.fingerprint,
            "version": __version__,
            **self._labels,
        }
        store = OracleStore(self.run / "oracle", fingerprints | self._plan.facts)
        world = self.world
        OracleRun(
            model, data, recipe.oracle, recipe.seed, store, world.rank, world.size, self._open_labels(), world.wait
        ).run()

    @property
    def _labels(self) -> dict[str, Any]:
        """What labels are drawn from, as far as it is not the searched model's own prediction."""
        oracle = self.recipe.oracle
        labels = oracle.model_dump(include={"labels_from", "labels_temperature"}, exclude_defaults=True)
        if oracle.labels_from and Path(oracle.labels_from).is_dir():
            labels["labels_from"] = _fingerprint_weights(Path(oracle.labels_from), "oracle.labels_from")
        return labels

    def _open_labels(self) -> LabelSource:
        oracle, model = self.recipe.oracle, None
        if oracle.labels_from:
            try:
                model = open_dense(oracle.labels_from, 1, "ffn", self.recipe.seed, torch.float32)
            except UserError as error:
                raise UserError(f"oracle.labels_from: {error}") from None
            nn.Module.to(model, self.world.device)
        return LabelSource(model, oracle.labels_temperature)

    def _label(self) -> None:
        if self.world.first:
            recipe, model, data = self.recipe, self._load_model(), self._data
            number = -(-recipe.router.label_tokens // (data.sequence_length - 1))
            labels = label_windows(
                model,
                torch.from_numpy(data.train_batch(0, number, recipe.seed + 2)),
                self._space(recipe.router.branches),
                self._pool_of_labels(),
                recipe.seed,
                memory_bytes=recipe.oracle.memory_bytes,
                report=say,
            )
            save_labels(labels, self.run / LABELS)

    def _train_router(self, kind: str, big_layers: list[int]) -> None:
        router, windows, model = self.recipe.router, self.recipe.compared_text.windows_per_document, self._load_model()
        priors = self._priors(model, router.branches) if router_class(kind).predicts_gains else None
        space = self._space(router.branches)
        train_router(self._context, model, router, kind, big_layers, windows, space, priors)

    @property
    def _priced_on(self) -> torch.Tensor:
        """Validation text on which the ceiling is priced and static is searched, [W, T]."""
        return validation_windows(self._data, self.recipe.compared_text.windows_per_document, self.recipe.seed)

    def _priors(self, model: DuoForCausalLM, branches: Sequence[str]) -> Mapping[int, Prior] | None:
        """Static of every budget, if the ceiling and routers start from it; searched once for all of them."""
        if not self.recipe.router.around_static:
            return None
        if (key := tuple(branches)) not in self._priors_of:
            say("searching the best pattern of every budget on validation text")
            text, budgets = self._priced_on.to(model.device), self.recipe.router.big_layers
            with autocast(model.device, self.recipe.router.precision):
                self._priors_of[key] = static_priors(model, self._space(branches), text, budgets)
        return self._priors_of[key]

    def _measure_ceiling(self) -> None:
        recipe, model, space = self.recipe, self._load_model(), self._space(self.recipe.oracle.branches)
        big_layers, priors = recipe.router.big_layers, self._priors(model, recipe.oracle.branches)
        patterns = patterns_of(priors, space) if priors else None
        predictors = train_ceiling(self._context, model, recipe.ceiling, space, patterns)
        if self.world.first:
            texts, priced_on = self._compared_texts(), self._priced_on
            chooses_in = partial(autocast, model.device, recipe.ceiling.precision)
            evaluate_ceiling(model, predictors, big_layers, space, priced_on, texts, self.run, priors, chooses_in)
            (self.run / "resume" / "ceiling.pt").unlink(missing_ok=True)

    def _evaluate(self) -> None:
        if self.world.first:
            model, texts = self._load_model(), self._compared_texts()
            names, spend = self._router_names(), self.recipe.router.spend
            routers = counted(trained_routers(self.run, names, spend, model), "routers", len(names) * len(spend))
            compare_routers(model, routers, texts, self._plan.space.lowest, self.run)
            compare_patterns(model, texts, self.run)

    def _report(self) -> None:
        if self.world.first:
            results = analyse(self.run, self.recipe.report.bootstrap_samples, self.recipe.seed)
            write_report(self.run, self.recipe.report.shown_documents)
            card = self.run / "model" / CARD
            if self.recipe.model.path is None and card.exists():
                add_results(card, results)

    @property
    def _context(self) -> Context:
        return Context(self.run, self._data, self.recipe.seed, self.world)

    @property
    def _data(self) -> PackedData:
        return PackedData.open(self.run / "data")

    def _compared_texts(self) -> dict[str, Windows]:
        """As many documents of every domain, for a router may spend more on one than on another."""
        text, oracle, data = self.recipe.compared_text, self.recipe.oracle, self._data
        documents = max(oracle.documents, data.documents_of_each("test", text.documents))
        return compared_windows(data, text.model_copy(update={"documents": documents}), self.recipe.seed)

    @property
    def _model_folder(self) -> Path:
        return Path(self.recipe.model.path) if self.recipe.model.path else self.run / "model"

    def _load_model(self) -> DuoForCausalLM:
        model = load_model(self._model_folder)
        nn.Module.to(model, self.world.device)  # transformers wraps its own so that mypy does not see a method
        return model


def _fingerprint_weights(folder: Path, key: str) -> str:
    """Hash of the configuration and all weight files of a model folder."""
    files = sorted([*folder.glob("config.json"), *folder.glob("*.safetensors")])
    if len(files) < 2:
        raise UserError(f"{key}: {folder} holds no config.json with *.safetensors; give the folder of a saved model")
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()[:16]
