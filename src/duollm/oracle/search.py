"""Oracle search: the public functions, and the one driver of all methods in all contexts.

A *method* (exact, beam, local, sampled) decides which routes tokens try. A *context* decides what they attend to
meanwhile. *Reductions* keep what is wanted of the losses.

Shape letters: B sequences, T tokens given, N = B * (T - 1) predicted tokens, P prefixes, Q cells, K budgets,
S labels, R routes, L layers, D hidden.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from duollm.measure.executor import policy_losses
from duollm.models.branch import Branch
from duollm.models.modeling_duo import DuoForCausalLM
from duollm.oracle.approximate import Beam, Local, Sampled
from duollm.oracle.budgets import Budget, Cells, Exactly, Frontier, parse_budgets
from duollm.oracle.checks import check_options, check_search
from duollm.oracle.contexts import Attend, Batch
from duollm.oracle.head import HeadBound, log_normaliser
from duollm.oracle.reductions import BestSoFar, Reduction
from duollm.oracle.tree import Rows, Tree, follow, rows_of_blocks
from duollm.oracle.trial import Method, Trial
from duollm.routes.space import RouteSpace


class Exact(Method):
    """Tries every route within the budgets, by walking their tree."""

    every_route = True

    def __call__(self, trial: Trial, budgets: Sequence[Budget], generator: torch.Generator) -> None:
        """Enter every leaf of the tree."""
        wanted_Q = trial.cells.wanted(budgets, trial.positions)
        tree = Tree(trial.model.model, trial.cells, wanted_Q, trial.rows)
        for leaves in tree.leaves(trial.hidden_ND, trial.attend):
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
    check_options(method, context, wanted, reference, reductions)
    batch = Batch(model, input_ids, attention_mask)
    cells = Cells.of_model(space, model.config)
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
    cells = Cells.of_model(space, model.config)
    every_Q = torch.ones(len(cells.spent), dtype=torch.bool)
    tree = Tree(model.model, cells, every_Q, rows_of_blocks(model, space, memory_bytes))
    tables_SNR = torch.empty(*wanted_SND.shape[:2], space.size, dtype=torch.float32, device=input_ids.device)
    for leaves in tree.leaves(batch.hidden_BTD.flatten(0, 1), attend):
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
    routes_BTL = torch.full((*input_ids.shape, space.num_layers), int(Branch.BIG), device=input_ids.device)
    routes_BTL[:, :-1] = space.decode(route_ids_BT.clamp(min=0))  # the last token predicts nothing
    nll_BT, _ = policy_losses(model, input_ids, routes=routes_BTL, attention_mask=attention_mask)
    return nll_BT.masked_fill(route_ids_BT < 0, torch.nan)
