"""The recipe: every setting of a study, typed, read from YAML and overridden from the command line."""

import os
from collections.abc import Sequence
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, field_validator, model_validator

from duollm.errors import UserError

LARGEST_SEED = 2**32 - 1
LARGEST_CODEBOOK = 32  # routes
SmallInit = Literal["random", "slice", "distilled", "linear", "mean"]
_LARGEST_NUMBER = 10**15
_SPELLINGS = {"yes": True, "on": True, "no": False, "off": False}
_OPT = {"norm": "layer", "positions": "learned", "gated_ffn": False, "hidden_act": "relu"}
_OPT |= {"attention_bias": True, "mlp_bias": True}


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, and no value is turned into another kind of value."""

    model_config = ConfigDict(
        strict=True, extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _as_people_write(cls, value: Any, info: Any) -> Any:
        """Accept what YAML has no type for: a list for a tuple, 5e5 for a whole number, yes for true."""
        kind = cls.model_fields[info.field_name].annotation
        if get_origin(kind) is tuple and isinstance(value, list):
            return tuple(value)
        if int in (kind, *get_args(kind)) and isinstance(value, float) and value.is_integer():
            return int(value)
        if kind is bool and isinstance(value, str):
            return _SPELLINGS.get(value.lower(), value)
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


def _home_folder(path: str | None) -> str | None:
    """Replace a leading ~, which a shell leaves alone in a file and behind --key=."""
    return path and os.path.expanduser(path)


class ModelConfig(Section):
    """The duo model. The vocabulary size comes from the tokenizer unless it is given here."""

    path: str | None = None
    """Folder of a trained duo. The study uses it instead of training one."""
    dense: str | None = None
    """Folder or hub id of a dense model to convert. Its sizes replace those below, except small_intermediate_size."""
    architecture: Literal["llama", "opt"] = "llama"
    """llama: RMSNorm, rotary positions, SwiGLU. opt: LayerNorm, learned positions, ReLU, biases (paper, appendix A)."""
    vocab_size: int | None = Field(default=None, ge=2)
    """Number of rows of the embedding. Default: the size of the tokenizer's vocabulary."""
    hidden_size: int = Field(default=128, ge=1)
    """Width of the residual stream."""
    num_hidden_layers: int = Field(default=12, ge=1, le=10_000)
    """Number of layers L."""
    num_attention_heads: int = Field(default=2, ge=1)
    """Number of query heads."""
    num_key_value_heads: int = Field(default=2, ge=1)
    """Number of key/value heads. Must divide num_attention_heads."""
    intermediate_size: int = Field(default=512, ge=1)
    """Inner width of the big FFN."""
    small_intermediate_size: int = Field(default=32, ge=1)
    """Inner width of the small FFN."""
    skip_scope: Literal["ffn", "layer"] = "ffn"
    """What a token bypasses when it skips a layer: only the FFN, or the whole layer with its attention."""
    tie_word_embeddings: bool = True
    """Whether the output head uses the weights of the input embedding."""
    max_position_embeddings: int = Field(default=2048, ge=1)
    """Longest sequence that the model accepts, in tokens."""
    rope_theta: float = Field(default=10000.0, gt=0)
    """Base of the rotary embedding."""

    _expand = field_validator("path", "dense")(_home_folder)

    @model_validator(mode="after")
    def _sizes_divide(self) -> "ModelConfig":
        for part, whole in (("num_attention_heads", "hidden_size"), ("num_key_value_heads", "num_attention_heads")):
            if getattr(self, whole) % getattr(self, part):
                raise ValueError(f"{part} ({getattr(self, part)}) must divide {whole} ({getattr(self, whole)})")
        return self

    def duo_fields(self) -> dict[str, Any]:
        """Return the fields of the duo's configuration."""
        return self.model_dump(exclude={"path", "dense", "architecture"}) | (_OPT if self.architecture == "opt" else {})


class ConvertConfig(Section):
    """Stage 0, only with model.dense: its FFNs become the big ones, and the small ones are derived from them."""

    small_init: SmallInit = "distilled"
    """Small FFNs: random, or made of the big ones: by neurons, imitation, a low-rank map, the mean (checkpoints.md)."""
    sample_tokens: int = Field(default=32_768, ge=2)
    """Tokens of training text that slice and distilled run through the big FFNs."""
    steps: int = Field(default=300, ge=1)
    """Distillation steps per layer."""


class DataConfig(Section):
    """The text, its tokenizer, and its split into training, validation and test documents."""

    domains: list[str] = Field(default=["prose", "code"], min_length=1)
    """Sources of text: `prose`, `code`, files or folders (text, JSON lines, Parquet, Arrow), Hugging Face data sets."""
    tokenizer: str | None = None
    """Folder or hub id of a tokenizer. Default: the tokenizer of model.dense, else a newly trained byte-level BPE."""
    vocab_size: int = Field(default=4096, ge=257, le=10**7)
    """Size of the vocabulary, if a tokenizer is trained."""
    sequence_length: int = Field(default=128, ge=2)
    """Tokens T in a training sequence and in an evaluated window."""
    validation_share: float = Field(default=0.05, gt=0, lt=1)
    """Share of each domain's documents held out for calibration."""
    test_share: float = Field(default=0.15, gt=0, lt=1)
    """Share of each domain's documents held out for results."""

    _expand = field_validator("tokenizer")(_home_folder)

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
    """Stage 1: train the duo, each token taking a random branch at each layer (paper, section 3)."""

    tokens: int = Field(default=1_500_000, ge=0)
    """Training tokens. 0 is allowed for a converted model and leaves training out."""
    batch_size: int = Field(default=16, ge=1, le=10**6)
    """Sequences per optimiser step, over all processes and accumulation steps."""
    accumulate: int = Field(default=1, ge=1)
    """Forward and backward passes per optimiser step. Must divide batch_size."""
    branch_shares: tuple[float, float, float] = (0.0, 0.5, 0.5)
    """Shares of tokens that take skip, small and big at each layer. Their sum must be 1."""
    learning_rate: float = Field(default=6e-3, gt=0)
    """Peak learning rate of AdamW."""
    warmup_share: float = Field(default=0.05, ge=0, lt=1)
    """Share of the steps during which the learning rate rises linearly to its peak."""
    final_learning_rate_share: float = Field(default=0.1, ge=0, le=1)
    """Learning rate at the end of the cosine decay, as a share of the peak."""
    weight_decay: float = Field(default=0.1, ge=0)
    """AdamW weight decay. It applies to matrices only."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW betas."""
    gradient_clip: float = Field(default=1.0, gt=0)
    """Largest gradient norm. Larger gradients are scaled down to it."""
    freeze: Literal["nothing", "big", "all-but-norms"] = "nothing"
    """Of a converted dense model, big trains only the small FFNs, all-but-norms only the norms; nothing trains all."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """fp32, bf16 (by autocast), or auto, which takes bf16 if a short measurement finds it faster."""
    compile: bool | Literal["auto"] = "auto"
    """Whether to use torch.compile, which needs a C++ compiler. auto uses it if the training is long enough to gain."""
    checkpoint_every: int = Field(default=200, ge=1)
    """Optimiser steps between checkpoints."""
    log_every: int = Field(default=10, ge=1)
    """Optimiser steps between lines of metrics.jsonl."""

    @field_validator("compile", mode="before")
    @classmethod
    def _auto_or_bool(cls, value: Any) -> Any:
        value = _SPELLINGS.get(str(value).lower(), value)
        if not isinstance(value, bool) and value != "auto":
            raise ValueError(f"must be auto, true or false, got {value}")
        return value

    @model_validator(mode="after")
    def _shares_and_steps(self) -> "PretrainConfig":
        if min(self.branch_shares) < 0 or abs(sum(self.branch_shares) - 1) > 1e-6:
            raise ValueError(f"branch_shares (skip, small, big) must be >= 0 and sum to 1, got {self.branch_shares}")
        if self.batch_size % self.accumulate:
            raise ValueError(f"accumulate ({self.accumulate}) must divide batch_size ({self.batch_size})")
        if not 0 <= min(self.betas) <= max(self.betas) < 1:
            raise ValueError(f"betas must be at least 0 and below 1, got {self.betas}")
        return self


class OracleConfig(Section):
    """Stage 2: the oracle, a search for the best route of each token (paper, section 4)."""

    documents: int = Field(default=24, ge=2)
    """Test documents per domain, or all of them if the domain has fewer."""
    windows_per_document: int = Field(default=1, ge=1)
    """Windows of sequence_length tokens to take from the start of each document."""
    contexts: list[Literal["shared", "reference", "committed"]] = Field(default=["shared"], min_length=1)
    """Which routes the earlier tokens take (docs/oracle.md). The report uses the first context of the list."""
    search: Literal["exact", "beam", "local", "sampled"] = "exact"
    """exact tries all routes; the others try some of them, for deep networks (docs/oracle.md, "Deep networks")."""
    branches: list[Literal["skip", "small", "big"]] = Field(default=["small", "big"], min_length=2)
    """Branches that a token may take at each layer."""
    groups: int | list[list[int]] | Literal["auto"] | None = None
    """Layers that take the same branch: a number of equal groups, the layers of each, or auto, which makes up to 12
    groups so that the exact search has at most 4,096 routes. Default: every layer varies by itself."""
    fixed: dict[Literal["skip", "small", "big"], list[int]] = {}
    """Layers that always take the same branch, such as {big: [0, 11]}. They belong to no group."""
    big_layers: list[int] | None = Field(default=None, min_length=1)
    """Budgets k, in big layers per token. Default: all that are possible, or about L/3, L/2 and 2L/3 if not exact."""
    committed_big_layers: list[int] | None = Field(default=None, min_length=1)
    """Budgets of context committed, which needs one search for each. Default: big_layers."""
    more_budgets: list[str] = []
    """Other budgets: `at-most 4`, `flops 0.5`, `average 4` (per window), `ramp 6 2` (over the window)."""
    random_routes: int = Field(default=100, ge=1)
    """Number N of random routes in the controls "best of N routes" and "best of N patterns"."""
    resampled_labels: int = Field(default=1, ge=0)
    """Pairs of drawn labels per position that measure selection noise. 0 leaves the measurement out."""
    labels_from: str | None = None
    """Folder or hub id of a model with the same tokenizer that labels are drawn from. Default: all big of this one."""
    labels_temperature: float = Field(default=1.0, gt=0)
    """Temperature of the prediction from which labels are drawn."""
    counted_share: float = Field(default=1.0, gt=0, le=1)
    """Share of the positions on which static is chosen. Each costs the full head for every route (docs/oracle.md)."""
    units: list[Annotated[int, Field(ge=2)]] = []
    """Numbers of neighbouring tokens that share a route, such as [8, 64] (docs/oracle.md). Runs every leaf's head."""
    memory_gib: float | None = Field(default=None, gt=0)
    """Memory that the hidden states of a search may take, in GiB. Default: 1; on a GPU a quarter of what is free."""

    _expand = field_validator("labels_from")(_home_folder)

    @property
    def memory_bytes(self) -> int | None:
        """What `memory_gib` says."""
        return None if self.memory_gib is None else int(self.memory_gib * 2**30)

    @model_validator(mode="after")
    def _budgets_that_can_be_searched(self) -> "OracleConfig":
        for key in ("contexts", "branches", "more_budgets", "units", "big_layers", "committed_big_layers"):
            _refuse_repeats(key, getattr(self, key) or [])
        refused = [budget for budget in self.more_budgets if not budget.startswith("at-most ")]
        if refused and self.search != "exact":
            known = f"search {self.search!r} knows only `at-most 4`, leave it out or set search to exact"
            raise ValueError(f"more_budgets holds {refused[0]!r}; {known}")
        return self


class EvaluateConfig(Section):
    """Text on which static, routers and the ceiling are compared. It can be longer than the oracle's."""

    documents: int = Field(default=48, ge=2)
    """Test documents per domain, at most as many as the smallest domain has. Never fewer than oracle.documents."""
    windows_per_document: int = Field(default=3, ge=1)
    """Full windows to take from the start of each document, at most. Never fewer than oracle.windows_per_document."""


class RouterConfig(Section):
    """Stage 3: train routers on the frozen model (paper, section 5; docs/routers.md)."""

    kinds: list[str] = Field(default=["linear", "sequential"], min_length=1)
    """Kinds of router to train. docs/routers.md lists them; docs/adding-a-router.md shows how to add one."""
    big_layers: list[int] = Field(default=[2, 4, 6, 8, 10], min_length=1)
    """Budgets k, in big layers per token. Each router is trained, or at least calibrated, for each budget."""
    shares: list[Annotated[float, Field(gt=0, lt=1)]] | None = Field(default=None, min_length=1)
    """Budgets as shares of the layers, in place of big_layers: the nearest that the oracle's groups allow."""
    branches: list[Literal["skip", "small", "big"]] = Field(default=["small", "big"], min_length=2)
    """Branches that a router may choose at each layer."""
    spend: list[Literal["average", "exact"]] = Field(default=["average", "exact"], min_length=1)
    """How routers spend a budget: k big layers per token on average, or exactly k on each. Both may be listed."""
    tokens: int = Field(default=100_000, ge=1)
    """Training tokens of a router that is trained for one budget."""
    every_budget_tokens: int | None = Field(default=None, ge=1)
    """Training tokens of a router that is trained once for all budgets. Default: 4 x tokens."""
    batch_size: int = Field(default=8, ge=1, le=10**6)
    """Sequences per optimiser step."""
    learning_rate: float = Field(default=1e-2, gt=0)
    """Peak learning rate."""
    budget_weight: float = Field(default=10.0, ge=0)
    """Weight of the budget loss in the training loss; alpha in the paper."""
    temperatures: tuple[PositiveFloat, PositiveFloat] = (1.0, 0.1)
    """Softmax temperature tau at the start and at the end of training. It changes geometrically in between."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """As pretrain.precision."""
    train_backbone: bool = False
    """Whether to train the model together with the router."""
    around_static: bool = False
    """Whether the kinds that predict gains, and the ceiling, start from static, for a model not trained to skip."""
    label_tokens: int = Field(default=1024, ge=2)
    """Training tokens whose losses under many routes are computed as labels, for kinds that learn from labels."""
    label_routes: int | None = Field(default=None, ge=2)
    """Random routes per budget to compute labels for. Default: all routes if there are at most 16,384, else 32."""
    text_weight: float = Field(default=0.0, ge=0, le=1)
    """Weight in a label of the loss of the true next token; the rest is the expected loss under a mean prediction."""
    label_temperature: float = Field(default=0.1, gt=0)
    """distilled: a route that is better by this many nats is e times as likely in the target to imitate."""
    distilled_share: float = Field(default=0.5, ge=0, le=1)
    """distilled: share of the steps that imitate the oracle. The others minimise the loss of the language model."""
    codebook_routes: int = Field(default=16, ge=2, le=LARGEST_CODEBOOK)
    """codebook, knn, window: largest number of routes to choose from."""
    decide_at: int = Field(default=3, ge=0)
    """codebook, knn, window: layer whose states choose the route, from 0. All tokens share the layers before it."""
    neighbours: int = Field(default=64, ge=1)
    """knn: number of labelled tokens with the most similar states, whose losses are averaged."""
    prompt_tokens: int = Field(default=32, ge=1)
    """window: number of first tokens that choose the pattern of the rest; they run static."""

    @property
    def tokens_for_all(self) -> int:
        """Training tokens of a router that is trained once for all budgets."""
        return self.every_budget_tokens or 4 * self.tokens

    @model_validator(mode="after")
    def _branches_and_names(self) -> "RouterConfig":
        for key in ("kinds", "spend", "big_layers"):
            _refuse_repeats(key, getattr(self, key))
        order = ["skip", "small", "big"]
        if "big" not in self.branches or self.branches != [each for each in order if each in self.branches]:
            raise ValueError(f"branches must hold big, once each, in the order {order}; got {self.branches}")
        return self


class CeilingConfig(Section):
    """The predictable ceiling: how much an offline predictor gains without labels (docs/concepts.md)."""

    enabled: bool = True
    """Whether to measure the ceiling, at the budgets of router.big_layers."""
    tokens: int = Field(default=300_000, ge=1)
    """Training tokens of the predictors, which are all trained in one pass."""
    depths: list[int] | None = Field(default=None, min_length=1)
    """Last layer that each predictor sees, from 0. Default: the first layer, those at each quarter, and the last."""
    width: int = Field(default=256, ge=1)
    """Inner width of each predictor."""
    batch_size: int = Field(default=4, ge=1, le=10**6)
    """Sequences per optimiser step."""
    learning_rate: float = Field(default=5e-3, gt=0)
    """Peak learning rate."""
    weight_decay: float = Field(default=0.1, ge=0)
    """AdamW weight decay. It applies to matrices only."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """As pretrain.precision."""

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
    """The last stage: intervals, figures and the page."""

    bootstrap_samples: int = Field(default=2000, ge=100)
    """Bootstrap resamples of documents behind each interval."""
    shown_documents: int = Field(default=1000, ge=1)
    """Documents per domain, at most, whose text the report shows."""


class Recipe(Section):
    """Settings of a whole study."""

    name: str = "quick"
    """Name of the study. The run folder is runs/<name> unless another is given."""
    seed: int = Field(default=0, ge=0, le=LARGEST_SEED)
    """Random seed of the whole study."""
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
        """The section `evaluate`, raised to at least the text of the oracle."""
        names = EvaluateConfig.model_fields
        return EvaluateConfig(**{name: max(getattr(self.evaluate, name), getattr(self.oracle, name)) for name in names})

    @model_validator(mode="after")
    def _model_is_made_in_one_way(self) -> "Recipe":
        if self.model.path and self.model.dense:
            raise ValueError("model.path is a trained duo and model.dense a checkpoint to convert; give one of them")
        if not self.model.dense and self.pretrain.freeze != "nothing":
            raise ValueError("pretrain.freeze needs model.dense: a model from scratch must train all of itself")
        if not self.model.dense and not self.model.path and self.pretrain.tokens == 0:
            raise ValueError("pretrain.tokens 0 needs model.dense: a model from scratch must be trained")
        return self
