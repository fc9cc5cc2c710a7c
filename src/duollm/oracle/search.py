"""Oracle search: the public functions, and the one driver of all methods in all contexts.

A *method* (exact, beam, local, sampled) decides which routes tokens try. A *context* decides what they attend to
meanwhile. *Reductions* keep what is wanted of the losses.

Shape letters: B sequences, T tokens given, N = B * (T - 1) predicted tokens, P prefixes, Q cells, K budgets,
S labels, R routes, L layers, D hidden.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from duollm.config import ModelConfig
from duollm.flops import ffn_parameters
from duollm.measure.executor import policy_losses
from duollm.models.attention import DuoAttention
from duollm.models.configuration_duo import DuoConfig
from duollm.models.ffn import is_plain, is_watched
from duollm.models.modeling_duo import DuoForCausalLM
from duollm.oracle.beam import Beam
from duollm.oracle.budgets import Budget, Cells, Exactly, Frontier, OnAverage, parse_budgets
from duollm.oracle.contexts import CONTEXTS, Attend, Batch
from duollm.oracle.head import LARGE, HeadBound, log_normaliser
from duollm.oracle.local import Local, Sampled
from duollm.oracle.reductions import BestSoFar, Reduction
from duollm.oracle.tree import Prefixes, Rows, Tree, decoder_layers, follow
from duollm.oracle.trial import Method, Trial
from duollm.routes.space import RouteSpace

_LEAVES = 4  # blocks that are entered together, at least


class Exact(Method):
    """Tries every route within the budgets, by walking their tree."""

    every_route = True

    def __call__(self, trial: Trial, budgets: Sequence[Budget], generator: torch.Generator) -> None:
        """Enter every leaf of the tree."""
        wanted_Q = trial.cells.wanted(budgets, trial.positions)
        for leaves in _walk(trial.batch, trial.cells, wanted_Q, trial.rows, trial.hidden_ND, trial.attend):
            trial.enter(leaves.ids_PG, leaves.spent_PG2, leaves.hidden_PND)


SEARCHES: dict[str, Callable[[], Method]] = {"exact": Exact, "beam": Beam, "local": Local, "sampled": Sampled}
"""The methods by name, with their default settings."""


@dataclass(frozen=True)
class OracleResult:
    """The best route found for every predicted token under every budget.

    Positions whose token or label is padding hold nan (losses) and -1 (route ids).

    Attributes:
        budgets: the K budgets.
        columns: what the reductions kept, by name, each [K, B, T - 1].
        evaluated_share: share of leaves that ran the full head, over all routes within the budgets.
    """

    budgets: list[Budget]
    columns: dict[str, Tensor]
    evaluated_share: float

    @property
    def nll(self) -> Tensor:
        """The loss of the best route, float32 [K, B, T - 1], nats."""
        return self.columns["nll"]

    @property
    def route_ids(self) -> Tensor:
        """The best route, int64 [K, B, T - 1]."""
        return self.columns["route"]

    @property
    def big_layers(self) -> list[int]:
        """The budgets as numbers of big layers, if all are "exactly k"."""
        return [budget.big for budget in self.budgets if isinstance(budget, Exactly)]


def join(results: list[OracleResult], axis: int) -> OracleResult:
    """Join results along budgets (0), sequences (1) or positions (2) into one."""
    budgets = [budget for result in results for budget in result.budgets] if axis == 0 else results[0].budgets
    columns = {name: torch.cat([result.columns[name] for result in results], axis) for name in results[0].columns}
    return OracleResult(budgets, columns, sum(result.evaluated_share for result in results) / len(results))


@torch.inference_mode()
def search_oracle(
    model: DuoForCausalLM,
    input_ids: Tensor,
    space: RouteSpace,
    context: str = "shared",
    big_layers: Sequence[int] | None = None,
    *,
    method: str | Method = "exact",
    budgets: Sequence[Budget] | None = None,
    attention_mask: Tensor | None = None,
    reference: Tensor | None = None,
    reductions: Sequence[Reduction] = (),
    generator: torch.Generator | None = None,
    memory_bytes: int | None = None,
    prune: bool = True,
) -> OracleResult:
    """Find, for every predicted token, the route of lowest nll under each budget.

    Args:
        input_ids: token ids [B, T]; position t predicts token t + 1.
        context: which routes the earlier tokens take: "shared", "reference" or "committed"
            (docs/oracle.md). In a committed search each budget is a left-to-right run of its own.
        big_layers: budgets, exactly k big layers; default: every k from 0 to L.
        method: which routes are tried. "exact" tries all of them. "beam", "local", "sampled", or one with settings such
            as `Beam(width=128)`, try some of them.
        budgets: any budgets of `duollm.oracle.budgets`, in place of big_layers.
        attention_mask: 1 for tokens, 0 for padding, [B, T].
        reference: routes [L] or [B, T, L] of the earlier tokens in context "reference"; default all big.
        reductions: what to keep of the losses beside the best route (`duollm.oracle.reductions`).
        generator: source of random numbers, on the model's device; default: seeded with 0.
        memory_bytes: memory for the tensors of the search, without the model. Default: 1 GiB; on a GPU a quarter of
            what is free.
        prune: do not run the full head on leaves that provably cannot matter. The result is the same.

    Raises:
        ValueError: ids, context, space, method or budget are illegal, or options exclude each other. The message
            says what is allowed.
    """
    check_search(model, input_ids, space, context)
    wanted, method = parse_budgets(big_layers, budgets, space), _method_of(method)
    _check_options(method, context, wanted, reference, reductions)
    batch = Batch(model, input_ids, attention_mask)
    cells = Cells(space, *ffn_parameters(model.config)[1:])
    method.begin(wanted, cells, batch.padding_BT.shape)
    bound = HeadBound.around(model, batch.states()) if prune else None
    generator = generator or torch.Generator(model.device).manual_seed(0)
    rows = rows_of_blocks(model, space, memory_bytes)
    search = _Search(batch, cells, method, [BestSoFar(), *reductions], bound, generator, rows)
    for each in search.reductions:
        each.begin(batch, cells, wanted, generator)
    if context == "committed":
        return join([search.left_to_right(budget) for budget in wanted], axis=0)
    if context == "reference":
        return search.at(search.positions, wanted, batch.reference_context(reference))
    return search.at(search.positions, wanted, batch.shared_context(), together=len(search.positions))


@dataclass(frozen=True)
class _Search:
    """What is the same at every position of a search."""

    batch: Batch
    cells: Cells
    method: Method
    reductions: Sequence[Reduction]
    bound: HeadBound | None
    generator: torch.Generator
    rows: Rows

    @property
    def positions(self) -> range:
        return range(self.batch.ids_BT.shape[1])

    def at(self, positions: range, budgets: list[Budget], attend: Attend, together: int = 1) -> OracleResult:
        """Search the tokens at some positions; `together` tokens in a row try the same routes."""
        here = slice(positions.start, positions.stop)
        padding_BT = self.batch.padding_BT
        rows_N = torch.arange(padding_BT.numel(), device=padding_BT.device).view_as(padding_BT)[:, here].flatten()
        for each in self.reductions:
            each.start(rows_N)
        bound = self.bound and self.bound.rows(rows_N)
        trial = Trial(self.batch, self.cells, rows_N, positions, attend, together, self.rows, bound, self.reductions)
        self.method(trial, budgets, self.generator)
        frontier = Frontier(budgets, self.cells, padding_BT[:, here], positions.start)
        columns: dict[str, Tensor] = {}
        for each in self.reductions:
            kept = each.columns(frontier)
            if twice := sorted(kept.keys() & columns.keys()):
                raise ValueError(f"two reductions keep a column {twice[0]!r}; search twice, or rename one")
            columns |= kept
        wanted = self.cells.wanted(budgets, positions).tolist()
        routes = sum(count for count, is_wanted in zip(self.cells.routes, wanted, strict=True) if is_wanted)
        return OracleResult(budgets, columns, min(1.0, trial.evaluated / (routes * len(rows_N))))

    def left_to_right(self, budget: Budget) -> OracleResult:
        """Search position by position; every pick is executed before the next."""
        filled, steps = self.batch.empty_context(), []
        for position in self.positions:
            attend = self.batch.step_context(filled, position)
            steps.append(self.at(range(position, position + 1), [budget], attend))
            picked_1BL = self.cells.space.decode(steps[-1].route_ids[0, :, 0].clamp(min=0).cpu())[None]
            here_1BD = self.batch.hidden_BTD[None, :, position]
            for _ in follow(self.batch.model.model, here_1BD, picked_1BL, replace(attend, keeps=True), True):
                pass
        return join(steps, axis=2)


def _method_of(given: str | Method) -> Method:
    if isinstance(given, Method):
        return given
    if given not in SEARCHES:
        raise ValueError(f"method must be one of {', '.join(SEARCHES)} or one made with settings, got {given!r}")
    return SEARCHES[given]()


def _check_options(
    method: Method, context: str, budgets: list[Budget], reference: Tensor | None, reductions: Sequence[Reduction]
) -> None:
    """Refuse options that exclude each other."""
    if context != "reference" and reference is not None:
        raise ValueError(f"reference goes with context 'reference', got context {context!r}")
    if context == "committed" and any(isinstance(each, OnAverage) for each in budgets):
        raise ValueError("context 'committed' has no budget on average: every token spends its own")
    for each in reductions:
        name = type(each).__name__
        if each.every_route and not method.every_route:
            raise ValueError(f"{name} needs a method that tries every route: use 'exact'")
        if context == "committed" and not each.left_to_right:
            raise ValueError(f"{name} does not go with context 'committed'; use 'shared' or 'reference'")


@torch.inference_mode()
def loss_table(
    model: DuoForCausalLM,
    input_ids: Tensor,
    space: RouteSpace,
    context: str = "shared",
    reference: Tensor | None = None,
    *,
    attention_mask: Tensor | None = None,
    memory_bytes: int | None = None,
) -> Tensor:
    """Return the nll (nats) of every predicted token under every route, float32 [B, T - 1, R].

    The table takes 4 * B * (T - 1) * R bytes; `search_oracle` needs no table. The context is "shared" or "reference"
    (in "committed" the losses depend on the earlier picks).

    Raises:
        ValueError: as `search_oracle`.
    """
    label_ND = model.lm_head.weight[input_ids[:, 1:].flatten()]
    settings: dict[str, Any] = {"attention_mask": attention_mask, "memory_bytes": memory_bytes}
    return loss_tables(model, input_ids, space, label_ND[None], context, reference, **settings)[0]


@torch.inference_mode()
def loss_tables(
    model: DuoForCausalLM,
    input_ids: Tensor,
    space: RouteSpace,
    wanted_SND: Tensor,
    context: str = "shared",
    reference: Tensor | None = None,
    *,
    attention_mask: Tensor | None = None,
    memory_bytes: int | None = None,
) -> Tensor:
    """Return loss tables for several labels of each token, or distributions of labels: float32 [S, B, T - 1, R].

    Args:
        wanted_SND: S labels for each of the N = B * (T - 1) predictions, as their embeddings in the head. The mean of
            the embeddings under a distribution gives the cross-entropy with that distribution.

    Raises:
        ValueError: as `search_oracle`.
    """
    check_search(model, input_ids, space, context)
    if context == "committed":
        raise ValueError("a loss table needs context 'shared' or 'reference'; use search_oracle for 'committed'")
    batch = Batch(model, input_ids, attention_mask)
    attend = batch.shared_context() if context == "shared" else batch.reference_context(reference)
    cells = Cells(space, *ffn_parameters(model.config)[1:])
    every_Q = torch.ones(len(cells.spent), dtype=torch.bool)
    rows = rows_of_blocks(model, space, memory_bytes)
    tables_SNR = torch.empty(*wanted_SND.shape[:2], space.size, dtype=torch.float32, device=input_ids.device)
    for leaves in _walk(batch, cells, every_Q, rows, batch.hidden_BTD.flatten(0, 1), attend):
        final_PND = model.model.norm(leaves.hidden_PND)
        log_z_PN = log_normaliser(model, final_PND.flatten(0, 1)).view(final_PND.shape[:2])
        losses_SPN = log_z_PN - torch.einsum("pnd,snd->spn", final_PND, wanted_SND)
        route_P = leaves.ids_PG[:, 0].to(tables_SNR.device, non_blocking=True)
        tables_SNR[:, :, route_P] = losses_SPN.transpose(1, 2)
    tables_SBTR = tables_SNR.view(-1, *batch.padding_BT.shape, space.size)
    return tables_SBTR.masked_fill(batch.padding_BT[..., None], torch.nan)


@torch.inference_mode()
def executed_nll(
    model: DuoForCausalLM,
    input_ids: Tensor,
    space: RouteSpace,
    route_ids_BT: Tensor,
    attention_mask: Tensor | None = None,
) -> Tensor:
    """Return the nll [B, T - 1] of one forward pass in which every token takes its picked route.

    In context "committed" this equals the losses of the search. In the other contexts the picks come from different
    passes, and the difference tells how much the search promises too much.
    """
    routes_BTL = Batch(model, input_ids, attention_mask).as_routes(space, route_ids_BT)
    nll_BT, _ = policy_losses(model, input_ids, routes=routes_BTL, attention_mask=attention_mask)
    return nll_BT.masked_fill(route_ids_BT < 0, torch.nan)


def _walk(
    batch: Batch, cells: Cells, wanted_Q: Tensor, rows: Rows, hidden_ND: Tensor, attend: Attend
) -> Iterator[Prefixes]:
    """The leaves of all routes in the wanted cells."""
    wanted_Q2 = torch.tensor(cells.spent)[wanted_Q]
    yield from Tree(batch.model.model, cells.space, wanted_Q2, rows).leaves(hidden_ND, attend)


def rows_of_blocks(model: DuoForCausalLM, space: RouteSpace, memory_bytes: int | None) -> Rows:
    """How many hidden vectors a block may hold within the memory budget, and where more do not pay.

    Beyond 2,048 a CPU's products slow down, because what passes between them leaves its caches. A GPU takes its time
    over more than 131,072. Beside a large vocabulary more leaves at a time pay: the best of them spare the others the
    head (docs/LOG.md).
    """
    memory_bytes = default_bytes(model.device) if memory_bytes is None else memory_bytes
    most = 2**17 if model.device.type == "cuda" else 2**11
    walked = max(1, min(memory_bytes // row_bytes(model.config, space), most))
    more = 2**16 if model.config.vocab_size >= LARGE else 0
    left = memory_bytes - walked * _walked_bytes(model.config, space)
    return Rows(walked, max(_LEAVES * walked, min(left // _leaf_bytes(model.config), more)))


def default_bytes(device: torch.device) -> int:
    """Return the memory that a search may take if nobody says: 1 GiB; on a GPU a quarter of what is free."""
    if device.type != "cuda":
        return 2**30
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by torch, for whoever asks next
    return (torch.cuda.mem_get_info(device)[0] + kept) // 4


def row_bytes(sizes: DuoConfig | ModelConfig, space: RouteSpace) -> int:
    """Return the memory that the exact search takes for each hidden vector of a block."""
    return _walked_bytes(sizes, space) + _LEAVES * _leaf_bytes(sizes)


def _walked_bytes(sizes: DuoConfig | ModelConfig, space: RouteSpace) -> int:
    """The memory for a hidden vector on the way: blocks wait at every depth, and one is at work."""
    waiting = len(space.group_layers) * (space.base + 1) * sizes.hidden_size
    return 4 * (waiting + 8 * sizes.hidden_size + 3 * sizes.intermediate_size)


def _leaf_bytes(sizes: DuoConfig | ModelConfig) -> int:
    """The memory for a leaf: joined, normalised, taken to the head; the bound's scores and what is kept."""
    return 4 * (5 * sizes.hidden_size + 128)


def check_search(model: DuoForCausalLM, input_ids: Tensor, space: RouteSpace, context: str) -> None:
    """Raise a ValueError that says what is allowed, if the search cannot be done."""
    if not (hasattr(model, "lm_head") and hasattr(getattr(model, "model", None), "layers")):
        raise ValueError(
            f"a search takes a DuoForCausalLM, got {type(model).__name__}; give the model inside: of PEFT's "
            "get_base_model(), of DataParallel and DDP the attribute module"
        )
    config = model.config
    _check_untouched(model)
    if context not in CONTEXTS:
        raise ValueError(f"context must be one of {', '.join(CONTEXTS)}, got {context!r}")
    if space.num_layers != config.num_hidden_layers:
        raise ValueError(
            f"the route space has {space.num_layers} layers, the model {config.num_hidden_layers}; make them equal"
        )
    if not isinstance(input_ids, Tensor) or input_ids.is_floating_point():
        raise ValueError(f"input_ids must be a tensor of integers, got {getattr(input_ids, 'dtype', type(input_ids))}")
    if input_ids.ndim != 2 or input_ids.shape[1] < 2 or not len(input_ids):
        raise ValueError(f"input_ids must be [B, T] with B >= 1 and T >= 2, got shape {list(input_ids.shape)}")
    least, most = torch.stack(input_ids.aminmax()).tolist()
    if least < 0 or most >= config.vocab_size:
        raise ValueError(f"token ids must be in 0 .. {config.vocab_size - 1}, got {least} .. {most}")
    if any(_draws(part) for part in model.modules()):  # an adapter's part may be in training mode alone
        raise ValueError("a search needs a model without dropout; call model.eval() first")
    if not getattr(config, "is_causal", True):
        raise ValueError("a search needs causal attention: config.is_causal must be True, got False")
    longest = _longest(config, context)
    if longest is not None and input_ids.shape[1] - 1 > longest:
        raise ValueError(
            f"sequences may have at most {longest + 1} tokens with this model's positions in context {context!r}, "
            f"got {input_ids.shape[1]}"
        )


def _check_untouched(model: DuoForCausalLM) -> None:
    """The search reads the head's matrix, and runs the parts of a layer itself: what is put around them has no say."""
    if not is_plain(model.lm_head) or model.lm_head.bias is not None:
        kinds = f"{type(model.lm_head).__name__} with {type(getattr(model.lm_head, 'weight', None)).__name__}"
        raise ValueError(
            "a search reads the head's matrix: lm_head must be an nn.Linear without bias or hooks, its weights in "
            f"memory and not quantised, got {kinds}; merge adapters, do not offload, leave lm_head out of quantisation"
        )
    walked: dict[str, tuple[nn.Module, str]] = {"model": (model.model, "DuoModel")}
    for index, layer in enumerate(decoder_layers(model.model)):
        name = f"model.layers.{index}"
        walked[name] = (layer, "DuoDecoderLayer")
        walked |= {f"{name}.self_attn": (layer.self_attn, "DuoAttention"), f"{name}.mlp": (layer.mlp, "DuoMLP")}
    for name, (part, kind) in walked.items():
        # By name: a model may run the code that was saved with it. A subclass may have a forward of its own.
        if is_watched(part) or type(part).forward.__qualname__ != f"{kind}.forward":
            raise ValueError(
                f"a search runs the parts of a layer itself, so the hook or the forward that was put on {name} would "
                f"have no effect; remove it, or put it on a norm, a projection or an FFN"
            )


def _draws(part: nn.Module) -> bool:
    """Whether a dropout, torch's or the attention's, is at work."""
    dropout = part.p if isinstance(part, nn.Dropout) else 0.0
    if isinstance(part, DuoAttention):
        dropout = part.config.attention_dropout
    return part.training and dropout > 0


def _longest(config: DuoConfig, context: str) -> int | None:
    """The largest number of predicting tokens that the positions allow; None: any."""
    rope = config.rope_parameters or {}
    if config.positions == "learned":
        return config.max_position_embeddings
    if context == "committed" and rope.get("rope_type") in ("dynamic", "longrope"):
        # Beyond it these rotations depend on how much has been read: executing a pick would change earlier losses.
        return int(rope.get("original_max_position_embeddings", config.max_position_embeddings))
    return None
