"""The recipe: every setting of a study, typed, read from YAML and overridden from the command line."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, ValidationError, field_validator, model_validator

from duollm import strict_yaml
from duollm.errors import UserError, did_you_mean
from duollm.files import write_text

LARGEST_SEED = 2**32 - 1
LARGEST_CODEBOOK = 32  # routes
_LARGEST_NUMBER = 10**15


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, and no value is turned into another kind of value."""

    model_config = ConfigDict(
        strict=True, extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _as_people_write(cls, value: Any, info: Any) -> Any:
        """YAML and JSON have no tuples; 5e5 is a whole number too; a yes is a true where nothing else is allowed."""
        kind = cls.model_fields[info.field_name].annotation
        if get_origin(kind) is tuple and isinstance(value, list):
            return tuple(value)
        if int in (kind, *get_args(kind)) and isinstance(value, float) and value.is_integer():
            return int(value)
        if kind is bool and isinstance(value, str):
            return strict_yaml.SPELLINGS.get(value.lower(), value)
        return value

    @field_validator("*")
    @classmethod
    def _neither_empty_nor_endless(cls, value: Any) -> Any:
        for each in value if isinstance(value, list | tuple) else [value]:
            if isinstance(each, str) and not each.strip():
                raise ValueError("an empty text was given; give a value, or leave the key out")
            if isinstance(each, int | float) and abs(each) > _LARGEST_NUMBER:
                raise ValueError(f"must be at most {_LARGEST_NUMBER:.0e}, got {each:g}")
        return value


def _refuse_repeats(key: str, values: Sequence[Any]) -> None:
    for position, value in enumerate(values):
        if value in values[:position]:
            raise ValueError(f"{key} holds {value!r} twice")


class ModelConfig(Section):
    """The duo model. The vocabulary size comes from the tokenizer unless it is given here."""

    path: str | None = None
    """A trained duo folder to study in place of training one."""
    dense: str | None = None
    """A dense checkpoint, folder or hub id, to convert; of the sizes below only small_intermediate_size counts then."""
    vocab_size: int | None = Field(default=None, ge=2)
    """Size of the vocabulary; default: the tokenizer's."""
    hidden_size: int = Field(default=128, ge=1)
    """Width of the residual stream."""
    num_hidden_layers: int = Field(default=12, ge=1, le=10_000)
    """Number of layers L."""
    num_attention_heads: int = Field(default=2, ge=1)
    """Number of query heads."""
    num_key_value_heads: int = Field(default=2, ge=1)
    """Number of key/value heads; a divisor of num_attention_heads."""
    intermediate_size: int = Field(default=512, ge=1)
    """Inner width of the big FFN."""
    small_intermediate_size: int = Field(default=32, ge=1)
    """Inner width of the small FFN."""
    skip_scope: Literal["ffn", "layer"] = "ffn"
    """What skip bypasses: the FFN, or attention too."""
    tie_word_embeddings: bool = True
    """Share the input embedding with the output head."""
    max_position_embeddings: int = Field(default=2048, ge=1)
    """Longest sequence."""
    rope_theta: float = Field(default=10000.0, gt=0)
    """Base of the rotary embedding."""

    @model_validator(mode="after")
    def _sizes_divide(self) -> "ModelConfig":
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must divide hidden_size ({self.hidden_size})"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads ({self.num_key_value_heads}) must divide "
                f"num_attention_heads ({self.num_attention_heads})"
            )
        return self


class ConvertConfig(Section):
    """Stage 0, only with model.dense: the big FFNs are the checkpoint's, the small ones are set from them."""

    small_init: Literal["random", "slice", "distilled"] = "distilled"
    """Random, the big FFN's most used neurons, or those trained to imitate the big FFN (docs/checkpoints.md)."""
    sample_tokens: int = Field(default=32_768, ge=2)
    """Tokens of training text on which slice and distilled look at the big FFNs."""
    steps: int = Field(default=300, ge=1)
    """Steps of the distillation, per layer."""


class DataConfig(Section):
    """Text in, packed tokens out."""

    domains: list[str] = Field(default=["prose", "code"], min_length=1)
    """`prose`, `code`, a file or folder of text, JSON lines, Parquet or Arrow, or a Hugging Face data set id."""
    tokenizer: str | None = None
    """An existing tokenizer (folder or hub id); default: that of model.dense, or train a byte-level BPE."""
    vocab_size: int = Field(default=4096, ge=257)
    """Size of the vocabulary to train."""
    sequence_length: int = Field(default=128, ge=2)
    """Tokens T per training sequence and per evaluated window."""
    validation_share: float = Field(default=0.05, gt=0, lt=1)
    """Share of each domain's documents held out for calibration."""
    test_share: float = Field(default=0.15, gt=0, lt=1)
    """Share of each domain's documents held out for results."""

    @model_validator(mode="after")
    def _domains_and_shares(self) -> "DataConfig":
        _refuse_repeats("domains", self.domains)
        if self.validation_share + self.test_share >= 1:
            raise ValueError(
                f"validation_share ({self.validation_share}) and test_share ({self.test_share}) "
                "leave nothing to train on; their sum must be below 1"
            )
        return self


class PretrainConfig(Section):
    """Stage 1: random routing (paper, section 3)."""

    tokens: int = Field(default=1_500_000, ge=0)
    """Training tokens in all; 0, for a converted model: none."""
    batch_size: int = Field(default=16, ge=1)
    """Sequences per optimiser step (over all ranks and accumulation steps)."""
    accumulate: int = Field(default=1, ge=1)
    """Forward/backward passes per optimiser step; a divisor of batch_size."""
    branch_shares: tuple[float, float, float] = (0.0, 0.5, 0.5)
    """Shares of tokens at every layer that take (skip, small, big); sum 1."""
    learning_rate: float = Field(default=6e-3, gt=0)
    """Peak learning rate of AdamW."""
    warmup_share: float = Field(default=0.05, ge=0, lt=1)
    """Share of the steps in which the learning rate rises linearly."""
    final_learning_rate_share: float = Field(default=0.1, ge=0, le=1)
    """Learning rate at the end, as a share of the peak (cosine decay)."""
    weight_decay: float = Field(default=0.1, ge=0)
    """AdamW weight decay, on matrices only."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW betas."""
    gradient_clip: float = Field(default=1.0, gt=0)
    """Largest norm of the gradient."""
    freeze: Literal["nothing", "big"] = "nothing"
    """big: only the small FFNs are trained, for a converted dense model."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """bf16: autocast; auto: bf16 where a short measurement finds it faster."""
    compile: strict_yaml.AutoOrBool = "auto"
    """torch.compile the model (needs a C++ compiler, does without if it fails); auto: if the run is long enough."""
    checkpoint_every: int = Field(default=200, ge=1)
    """Optimiser steps between checkpoints."""
    log_every: int = Field(default=10, ge=1)
    """Optimiser steps between lines of metrics.jsonl."""

    @model_validator(mode="after")
    def _shares_and_steps(self) -> "PretrainConfig":
        if min(self.branch_shares) < 0 or abs(sum(self.branch_shares) - 1) > 1e-6:
            raise ValueError(f"branch_shares (skip, small, big) must be >= 0 and sum to 1, got {self.branch_shares}")
        if self.batch_size % self.accumulate:
            raise ValueError(f"accumulate ({self.accumulate}) must divide batch_size ({self.batch_size})")
        return self


class OracleConfig(Section):
    """Stage 2: exhaustive search over routes (paper, section 4)."""

    documents: int = Field(default=24, ge=2)
    """Test documents per domain (fewer if the domain has fewer)."""
    windows_per_document: int = Field(default=1, ge=1)
    """Windows of sequence_length tokens taken from each document, from its start."""
    contexts: list[Literal["shared", "reference", "committed"]] = Field(default=["shared"], min_length=1)
    """Which routes the earlier tokens take (docs/oracle.md); the first one is the report's."""
    search: Literal["exact", "beam", "local", "sampled"] = "exact"
    """All routes, or for deep networks some of them (docs/oracle.md, "Deep networks")."""
    branches: list[Literal["skip", "small", "big"]] = Field(default=["small", "big"], min_length=2)
    """What a token may choose from at every layer."""
    big_layers: list[int] | None = Field(default=None, min_length=1)
    """Budgets k: exactly k big layers; default: every k from 0 to L, or L/3, L/2 and 2L/3 if search is not exact."""
    committed_big_layers: list[int] | None = Field(default=None, min_length=1)
    """Budgets of context committed, where each is a run of its own; default: big_layers."""
    more_budgets: list[str] = []
    """Further budgets: `at-most 4`, `flops 0.5`, `average 4` (per window), `ramp 6 2` (over the window)."""
    random_routes: int = Field(default=100, ge=1)
    """N of the best-of-N controls."""
    resampled_labels: int = Field(default=1, ge=0)
    """S, pairs of drawn labels per position that measure selection noise; 0: none."""
    counted_share: float = Field(default=1.0, gt=0, le=1)
    """Share of the positions on which static is chosen: each costs the full head for every route (docs/oracle.md)."""
    memory_gib: float = Field(default=1.0, gt=0)
    """Memory budget of the search, GiB."""

    @model_validator(mode="after")
    def _budgets_that_can_be_searched(self) -> "OracleConfig":
        refused = [budget for budget in self.more_budgets if not budget.startswith("at-most ")]
        if refused and self.search != "exact":
            raise ValueError(
                f"more_budgets holds {refused[0]!r}; search {self.search!r} knows only `at-most 4`, "
                "leave it out or set search to exact"
            )
        return self


class EvaluateConfig(Section):
    """The text on which policies are compared, beside the oracle's: policies are cheap, so there can be more of it."""

    documents: int = Field(default=48, ge=2)
    """Test documents per domain, as many of each as the smallest has; never fewer than `oracle.documents`."""
    windows_per_document: int = Field(default=3, ge=1)
    """At most so many full windows of each, from its start; never fewer than `oracle.windows_per_document`."""


class RouterConfig(Section):
    """Stage 3: routers on a frozen backbone (paper, section 5; docs/routers.md)."""

    kinds: list[str] = Field(default=["linear", "sequential"], min_length=1)
    """Which routers; docs/routers.md lists them, docs/adding-a-router.md adds one."""
    big_layers: list[int] = Field(default=[2, 4, 6, 8, 10], min_length=1)
    """Budgets k; a router is trained, or at least calibrated, for each."""
    branches: list[Literal["skip", "small", "big"]] = Field(default=["small", "big"], min_length=2)
    """What a router may choose from at every layer."""
    spend: list[Literal["average", "exact"]] = Field(default=["average", "exact"], min_length=1)
    """k big layers per token on average, or exactly k on every token; several: each is evaluated."""
    tokens: int = Field(default=100_000, ge=1)
    """Training tokens per router."""
    every_budget_tokens: int | None = Field(default=None, ge=1)
    """The same for the kinds of which one training serves every budget; default: four times as many."""
    batch_size: int = Field(default=8, ge=1)
    """Sequences per optimiser step."""
    learning_rate: float = Field(default=1e-2, gt=0)
    """Peak learning rate."""
    budget_weight: float = Field(default=10.0, ge=0)
    """alpha: weight of the budget loss."""
    temperatures: tuple[PositiveFloat, PositiveFloat] = (1.0, 0.1)
    """Softmax temperature tau at the start and at the end (geometric annealing)."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """As for pretrain."""
    train_backbone: bool = False
    """Also train the model, not only the router."""
    label_tokens: int = Field(default=1024, ge=2)
    """Training tokens that the oracle labels with the losses of routes, for the kinds that need it."""
    label_routes: int | None = Field(default=None, ge=2)
    """Random routes per budget to label with; default: all routes if there are at most 16,384, else 32."""
    text_weight: float = Field(default=0.0, ge=0, le=1)
    """How much of a label is the loss of the text's own next token; the rest is expected under a mean prediction."""
    label_temperature: float = Field(default=0.1, gt=0)
    """distilled: nats by which a route must be better to be e times as likely in the oracle's soft choice."""
    distilled_share: float = Field(default=0.5, ge=0, le=1)
    """distilled: share of the steps that imitate the oracle, before the fine-tuning."""
    codebook_routes: int = Field(default=16, ge=2, le=LARGEST_CODEBOOK)
    """codebook: how many routes it may hold."""
    decide_at: int = Field(default=3, ge=0)
    """codebook: the layer whose states choose the route, 0 first; the layers before are the same for all tokens."""

    @property
    def tokens_for_all(self) -> int:
        """Training tokens of a kind of which one training serves every budget: as many as several for one each."""
        return self.every_budget_tokens or 4 * self.tokens

    @model_validator(mode="after")
    def _branches_and_names(self) -> "RouterConfig":
        _refuse_repeats("kinds", self.kinds)
        _refuse_repeats("spend", self.spend)
        order = ["skip", "small", "big"]
        if "big" not in self.branches or self.branches != [each for each in order if each in self.branches]:
            raise ValueError(f"branches must hold big, once each, in the order {order}; got {self.branches}")
        return self


class CeilingConfig(Section):
    """The predictable ceiling: how far an offline predictor gets without labels (docs/concepts.md)."""

    enabled: bool = True
    """Whether it is measured, for the budgets of router.big_layers."""
    tokens: int = Field(default=300_000, ge=1)
    """Training tokens of the predictors, all of which are trained at once."""
    depths: list[int] | None = Field(default=None, min_length=1)
    """Last layers whose states a predictor sees, 0 first; default: the first, each quarter of the way, the last."""
    width: int = Field(default=256, ge=1)
    """Inner width of a predictor."""
    batch_size: int = Field(default=4, ge=1)
    """Sequences per optimiser step."""
    learning_rate: float = Field(default=5e-3, gt=0)
    """Peak learning rate."""
    weight_decay: float = Field(default=0.1, ge=0)
    """AdamW weight decay, on matrices only."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """As for pretrain."""

    def depths_in(self, num_layers: int) -> list[int]:
        """Return the depths, ascending.

        Raises:
            UserError: there is no such layer.
        """
        spread = {quarter * num_layers // 4 for quarter in range(4)} | {num_layers - 1}
        depths = sorted(spread if self.depths is None else set(self.depths))
        if not 0 <= depths[0] <= depths[-1] < num_layers:
            raise UserError(f"ceiling.depths holds {self.depths}; the model has layers 0 .. {num_layers - 1}")
        return depths


class ReportConfig(Section):
    """Statistics and figures."""

    bootstrap_samples: int = Field(default=2000, ge=100)
    """Resamples of documents behind every interval."""
    shown_documents: int = Field(default=2, ge=1)
    """Documents per domain shown as coloured text."""


class Recipe(Section):
    """A whole study."""

    name: str = "quick"
    """Name of the study; the run folder defaults to runs/<name>."""
    seed: int = Field(default=0, ge=0, le=LARGEST_SEED)
    """Seed of everything random."""
    model: ModelConfig = ModelConfig()
    convert: ConvertConfig = ConvertConfig()
    data: DataConfig = DataConfig()
    pretrain: PretrainConfig = PretrainConfig()
    oracle: OracleConfig = OracleConfig()
    router: RouterConfig = RouterConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    ceiling: CeilingConfig = CeilingConfig()
    report: ReportConfig = ReportConfig()

    @property
    def compared_text(self) -> EvaluateConfig:
        """`evaluate`, with at least the oracle's text."""
        ours, oracles = self.evaluate, self.oracle
        return EvaluateConfig(
            documents=max(ours.documents, oracles.documents),
            windows_per_document=max(ours.windows_per_document, oracles.windows_per_document),
        )

    @model_validator(mode="after")
    def _model_is_made_in_one_way(self) -> "Recipe":
        if self.model.path and self.model.dense:
            raise ValueError("model.path is a trained duo and model.dense a checkpoint to convert; give one of them")
        if not self.model.dense and self.pretrain.freeze != "nothing":
            raise ValueError("pretrain.freeze needs model.dense: a model from scratch must train all of itself")
        if not self.model.dense and not self.model.path and self.pretrain.tokens == 0:
            raise ValueError("pretrain.tokens 0 needs model.dense: a model from scratch must be trained")
        return self

    @model_validator(mode="after")
    def _budgets_and_sequences_fit(self) -> "Recipe":
        if self.model.path or self.model.dense:
            return self  # the sizes are the given model's, which is looked at later
        layers = self.model.num_hidden_layers
        self.ceiling.depths_in(layers)
        for key, budgets in (
            ("oracle.big_layers", self.oracle.big_layers),
            ("oracle.committed_big_layers", self.oracle.committed_big_layers),
            ("router.big_layers", self.router.big_layers),
        ):
            _refuse_repeats(key, budgets or [])
            for budget in budgets or []:
                if not 0 <= budget <= layers:
                    raise ValueError(f"{key} holds {budget}; a model of {layers} layers allows 0 .. {layers}")
        if self.data.sequence_length > self.model.max_position_embeddings:
            raise ValueError(
                f"data.sequence_length ({self.data.sequence_length}) must not exceed "
                f"model.max_position_embeddings ({self.model.max_position_embeddings})"
            )
        return self


SHIPPED_RECIPES = (Path(__file__).parent / "recipes", Path(__file__).parents[2] / "recipes")
"""Where the shipped recipes are: in an installed wheel, and in a checkout."""


def find_recipe(given: str) -> Path:
    """Return the recipe at path `given`, else the shipped one of that name ("quick", "recipes/quick.yaml").

    Raises:
        UserError: there is neither.
    """
    path = Path(given)
    if path.is_file():
        return path
    shipped = {path.stem: path for folder in SHIPPED_RECIPES for path in folder.glob("*.yaml")}
    if path.stem in shipped and path.parent in (Path(), Path("recipes")):
        return shipped[path.stem]
    raise UserError(f"{given}: no such recipe; give a path or a shipped one: {did_you_mean(path.stem, shipped)}")


def load_recipe(path: Path | None, overrides: Mapping[str, str] | None = None) -> Recipe:
    """Read a YAML recipe and apply overrides such as {"pretrain.tokens": "5e5"}.

    Raises:
        UserError: missing or unreadable file, unknown key, illegal value; the message names the
            key, what was given and what is allowed.
    """
    values: dict[str, Any] = _read_yaml(path) if path else {}
    overrides = overrides or {}
    for key, text in overrides.items():
        _set(values, key.split("."), _parse_override(key, text))
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        key, message = explain(error)
        overridden = [name for name in overrides if f"{key}.".startswith(f"{name}.")]
        place = f"--{overridden[0]}" if overridden else ": ".join(filter(None, (str(path or ""), key)))
        raise UserError(f"{place}: {message}" if place else message) from None


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Write the resolved recipe, every key present, as YAML."""
    write_text(path, to_yaml(recipe))


def to_yaml(recipe: Recipe) -> str:
    """Return the resolved recipe, every key present, as YAML."""
    return strict_yaml.dump(recipe.model_dump(mode="json"))


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = strict_yaml.load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such recipe; the shipped ones are in recipes/") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a readable YAML file: it is not UTF-8; save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    if values is not None and not isinstance(values, dict):
        raise UserError(f"{path}: a recipe is a mapping of sections, got {type(values).__name__}")
    return {key: value for key, value in (values or {}).items() if value is not None}


def _parse_override(key: str, text: str) -> Any:
    """Text stays as it is written, unless it is quoted; other values are YAML."""
    if not text.strip():
        raise UserError(f"--{key}: an empty value was given (an unset shell variable?); give a value, or leave it out")
    if _takes_text(key) and text[0] not in "'\"" and text not in ("null", "Null", "NULL", "~"):
        return text
    try:
        return strict_yaml.load_argument(text)
    except UserError as error:
        fault = f"--{key}: {strict_yaml.shown(text)} is not a YAML value: {error}"
        raise UserError(f"{fault}; quote it, or write lists as [2,4]") from None


def _takes_text(key: str) -> bool:
    section, _, name = key.rpartition(".")
    owner: Any = Recipe.model_fields[section].annotation if section in Recipe.model_fields else Recipe
    field = getattr(owner, "model_fields", {}).get(name)
    return field is not None and field.annotation in (str, str | None)


def _set(values: dict[str, Any], keys: Sequence[str], value: Any) -> None:
    for key in keys[:-1]:
        nested = values.setdefault(key, {})
        if not isinstance(nested, dict):
            raise UserError(f"--{'.'.join(keys)}: {key} is not a section")
        values = nested
    values[keys[-1]] = value


def explain(error: ValidationError) -> tuple[str, str]:
    """Return the key and one line for the first problem of a ValidationError."""
    first = error.errors()[0]
    path = [str(part) for part in first["loc"]]
    key = ".".join(path)
    if first["type"] == "extra_forbidden":
        section: Any = Recipe
        for part in path[:-1]:
            section = section.model_fields[part].annotation
        return key, f"unknown key; {did_you_mean(path[-1], section.model_fields)}"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return key, message
    problem, given = first["type"], first["input"]
    return key, f"{message}, got {strict_yaml.shown(given)}{strict_yaml.how_to_write(problem, given)}"
