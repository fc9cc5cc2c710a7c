"""Exact oracle search: the public functions, and how each context is searched.

Shape letters: B sequences, T tokens given, N = B * (T - 1) predicted tokens, Q cells, K budgets,
S labels or pairs of labels, R routes, L layers, D hidden.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers.cache_utils import DynamicCache

from duollm.models.configuration_duo import DuoConfig
from duollm.models.modeling_duo import DuoForCausalLM
from duollm.oracle.batch import Batch
from duollm.oracle.budgets import Budget, Cells, Exactly, OnAverage, allowed_cells, parse_budgets
from duollm.oracle.contexts import CachedContext
from duollm.oracle.frontier import cell_of, read_frontier
from duollm.oracle.head import HeadBound, log_normaliser
from duollm.oracle.noise import DrawnLabels, Resampling
from duollm.oracle.reduce import Contest, Judge, LeafTable
from duollm.oracle.result import OracleResult, join_positions, stack_budgets
from duollm.oracle.tree import Attend, Block, Tree
from duollm.routes.sampling import draw_route_ids
from duollm.routes.space import RouteSpace

CONTEXTS = ("shared", "reference", "committed")


@torch.inference_mode()
def search_oracle(
    model: DuoForCausalLM,
    input_ids: Tensor,
    space: RouteSpace,
    context: str = "shared",
    big_layers: Sequence[int] | None = None,
    *,
    budgets: Sequence[Budget] | None = None,
    attention_mask: Tensor | None = None,
    reference: Tensor | None = None,
    rounds: int = 1,
    random_routes: int = 0,
    resampling: Resampling | None = None,
    generator: torch.Generator | None = None,
    table: LeafTable | None = None,
    memory_bytes: int = 2**30,
    prune: bool = True,
) -> OracleResult:
    """Find, for every predicted token, the route of lowest nll under each budget, over all routes.

    Args:
        input_ids: token ids [B, T]; position t predicts token t + 1.
        context: which routes the earlier tokens take: "shared", "reference" or "committed"
            (docs/oracle.md). In a committed search each budget is its own left-to-right run.
        big_layers: budgets, exactly k big layers; default: every k from 0 to L.
        budgets: instead of big_layers, any budgets of `duollm.oracle.budgets`.
        attention_mask: 1 for tokens, 0 for padding, [B, T].
        reference: routes [L] or [B, T, L] of the earlier tokens in context "reference"; default all big.
        rounds: in context "reference": how often to search, each time with the last picks as reference.
        random_routes: also the best of so many random routes per token and budget (not committed).
        resampling: also pick with drawn labels, to measure selection noise.
        generator: source of the random draws, on the model's device; default: seeded with 0.
        table: filled with the losses of its tokens under every route; they run the full head every
            time (not committed).
        memory_bytes: budget for the search's tensors, the model not counted.
        prune: spare leaves that provably cannot win the full head; the result is the same.

    Raises:
        ValueError: illegal ids, context, space or budget, or options that exclude each other; the
            message says what is allowed.
    """
    check_search(model, input_ids, space, context)
    wanted = parse_budgets(big_layers, budgets, space)
    if context == "committed" and (random_routes or table or any(isinstance(each, OnAverage) for each in wanted)):
        raise ValueError("context 'committed' has no random routes, no table and no budget on average")
    if context != "reference" and (reference is not None or rounds != 1):
        raise ValueError(f"reference and rounds go with context 'reference', got context {context!r}")
    search = _Search(Batch(model, input_ids, attention_mask), space, wanted, memory_bytes, table)
    search.prepare(generator or torch.Generator(model.device).manual_seed(0), resampling, random_routes, prune)
    if context == "committed":
        return search.committed()
    if context == "reference":
        return search.reference(reference, rounds)
    return search.read(search.judge_all(search.batch.shared_context()))


@torch.inference_mode()
def loss_table(
    model: DuoForCausalLM,
    input_ids: Tensor,
    space: RouteSpace,
    context: str = "shared",
    reference: Tensor | None = None,
    *,
    attention_mask: Tensor | None = None,
    memory_bytes: int = 2**30,
) -> Tensor:
    """Return the nll (nats) of every predicted token under every route, float32 [B, T - 1, R].

    The table itself takes 4 * B * (T - 1) * R bytes; `search_oracle` streams instead. Context is
    "shared" or "reference" (in "committed" losses depend on what was picked before).

    Raises:
        ValueError: as `search_oracle`.
    """
    label_ND = model.lm_head.weight[input_ids[:, 1:].flatten()]
    tables_SBTR = loss_tables(
        model,
        input_ids,
        space,
        label_ND[None],
        context,
        reference,
        attention_mask=attention_mask,
        memory_bytes=memory_bytes,
    )
    return tables_SBTR[0]


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
    memory_bytes: int = 2**30,
) -> Tensor:
    """As `loss_table`, for several labels of each token, or distributions of labels: float32 [S, B, T - 1, R].

    Args:
        wanted_SND: S times for each of the N = B * (T - 1) predictions the head's embedding of the label, or
            the mean of those embeddings under a distribution; then the loss is its cross-entropy.

    Raises:
        ValueError: as `search_oracle`.
    """
    check_search(model, input_ids, space, context)
    if context == "committed":
        raise ValueError("a loss table needs context 'shared' or 'reference'; use search_oracle for 'committed'")
    batch = Batch(model, input_ids, attention_mask)
    attend = batch.shared_context() if context == "shared" else batch.reference_context(reference)
    search = _Search(batch, space, parse_budgets(None, None, space), memory_bytes, None)
    tables_SNR = torch.empty(*wanted_SND.shape[:2], space.size, device=input_ids.device)
    for leaves in search.leaves(batch.hidden_BTD.flatten(0, 1), attend, search.wanted_cells()):
        final_PND = model.model.norm(leaves.hidden_PND)
        log_z_PN = log_normaliser(model, final_PND.flatten(0, 1)).view(final_PND.shape[:2])
        losses_SPN = log_z_PN - torch.einsum("pnd,snd->spn", final_PND, wanted_SND)
        tables_SNR[:, :, leaves.ids_P] = losses_SPN.transpose(1, 2)
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
    """The nll [B, T - 1] of one forward pass in which every token takes its picked route.

    In context "committed" it equals the search's own losses; elsewhere the picks come from different
    passes, and the difference is what they promise too much.
    """
    routes_BTL = Batch(model, input_ids, attention_mask).as_routes(space, route_ids_BT)
    logits_BTV = model(input_ids=input_ids, attention_mask=attention_mask, routes=routes_BTL, use_cache=False).logits
    nll_N = cross_entropy(logits_BTV[:, :-1].flatten(0, 1).float(), input_ids[:, 1:].flatten(), reduction="none")
    return nll_N.view(route_ids_BT.shape).masked_fill(route_ids_BT < 0, torch.nan)


@dataclass
class _Search:
    """A batch, what is wanted of it, and what was drawn for it."""

    batch: Batch
    space: RouteSpace
    budgets: list[Budget]
    memory_bytes: int
    table: LeafTable | None
    bound: HeadBound | None = None
    labels: DrawnLabels | None = None
    drawn_QNS: Tensor | None = None

    @property
    def model(self) -> DuoForCausalLM:
        """The model that is searched."""
        return self.batch.model

    @cached_property
    def cells(self) -> Cells:
        """Costs are in FFN FLOPs, which go as the inner widths."""
        config = self.model.config
        return Cells(self.space, config.small_intermediate_size, config.intermediate_size)

    def prepare(
        self, generator: torch.Generator, resampling: Resampling | None, random_routes: int, prune: bool
    ) -> None:
        """Build the bound and draw the labels and routes that all contexts need."""
        if prune:
            self.bound = HeadBound.around(self.model, self.batch.states())
        if resampling is not None:
            self.labels = resampling.draw(self.model, self.batch.ids_BT, self.space, generator)
        if random_routes:
            shape = (len(self.batch.labels_N), random_routes)
            bigs = {budget.big for budget in self.budgets if isinstance(budget, Exactly)}
            drawn = {big: draw_route_ids(self.space, big, shape, generator) for big in sorted(bigs)}
            nothing = torch.full(shape, -1, device=generator.device)
            self.drawn_QNS = torch.stack([drawn.get(big, nothing) for _, big in self.cells.spent])

    def wanted_cells(self, budgets: list[Budget] | None = None) -> Tensor:
        """Cells that some budget allows somewhere, bool [Q]."""
        positions = range(self.batch.ids_BT.shape[1])
        allowed = [allowed_cells(budget, self.cells, positions).any(-1) for budget in budgets or self.budgets]
        return torch.stack(allowed).any(0)

    def leaves(self, hidden_ND: Tensor, attend: Attend, wanted_Q: Tensor) -> Iterator[Block]:
        """Walk the tree down to the wanted cells."""
        spent_Q2 = torch.tensor(self.cells.spent, device=hidden_ND.device)
        max_rows = max_rows_for(self.model.config, self.space, self.memory_bytes)
        yield from Tree(self.model.model, self.space, spent_Q2[wanted_Q], max_rows).leaves(hidden_ND, attend)

    def judge_all(self, attend: Attend, budgets: list[Budget] | None = None) -> Judge:
        """Search all tokens at once in a context."""
        judge = Judge(self.model, self._contests(None), self.bound, self.table)
        self._run(judge, self.batch.hidden_BTD.flatten(0, 1), attend, self.wanted_cells(budgets))
        return judge

    def reference(self, reference: Tensor | None, rounds: int) -> OracleResult:
        """Search in the reference context, then feed the picks of each budget back as its reference."""
        result = self.read(self.judge_all(self.batch.reference_context(reference)))
        changed = []
        for _ in range(rounds - 1):
            following = stack_budgets([self._again(result, k) for k in range(len(self.budgets))])
            changed.append((result.route_ids != following.route_ids).float().mean((1, 2)))
            result = following
        return replace(result, changed=torch.stack(changed)) if changed else result

    def _again(self, result: OracleResult, k: int) -> OracleResult:
        """Search under budget k with its own picks as reference."""
        routes_BTL = self.batch.as_routes(self.space, result.route_ids[k])
        only = [self.budgets[k]]
        return self.read(self.judge_all(self.batch.reference_context(routes_BTL), only), only)

    def committed(self) -> OracleResult:
        """Search left to right, each budget for itself; every pick is executed before the next token."""
        return stack_budgets([self._committed(budget) for budget in self.budgets])

    def _committed(self, budget: Budget) -> OracleResult:
        batch, length = self.batch, self.batch.ids_BT.shape[1]

        def search_at(position: int, attend: Attend) -> OracleResult:
            rows_B = torch.arange(len(batch.ids_BT), device=batch.ids_BT.device) * length + position
            judge = Judge(self.model, self._contests(rows_B), self.bound and self.bound.rows(rows_B))
            wanted_Q = allowed_cells(budget, self.cells, range(position, position + 1))[:, 0]
            self._run(judge, batch.hidden_BTD[:, position], attend, wanted_Q)
            return self.read(judge, [budget], position)

        return left_to_right(batch, self.space, search_at)

    def _contests(self, rows: Tensor | None) -> list[Contest]:
        """The search for the labels, then for the drawn labels, then among the drawn routes."""
        weight_VD, cells = self.model.lm_head.weight, len(self.cells.spent)

        def embedded(labels_N: Tensor) -> Tensor:
            return weight_VD[labels_N if rows is None else labels_N[rows]]

        true_ND = embedded(self.batch.labels_N)
        contests = [Contest.open(true_ND, cells)]
        if self.labels is not None:
            for first_N, second_N in zip(self.labels.first_SN, self.labels.second_SN, strict=True):
                contests.append(Contest.open(embedded(first_N), cells, scored_ND=embedded(second_N)))
        if self.drawn_QNS is not None:
            contests.append(Contest.open(true_ND, cells, drawn_QNS=self.drawn_QNS))
        return contests

    def _run(self, judge: Judge, hidden_ND: Tensor, attend: Attend, wanted_Q: Tensor) -> None:
        """Show every wanted leaf to the judge."""
        for leaves in self.leaves(hidden_ND, attend, wanted_Q):
            final_PND = self.model.model.norm(leaves.hidden_PND)
            ids_P1, cell_P1 = leaves.ids_P[:, None], cell_of(self.cells, *leaves.spent_P2.T)[:, None]
            shape_PN = final_PND.shape[:2]
            judge.update(ids_P1.expand(shape_PN), cell_P1.expand(shape_PN), final_PND)

    def read(self, judge: Judge, budgets: list[Budget] | None = None, position: int | None = None) -> OracleResult:
        """Read every budget off the judge's frontiers; of all positions, or of a single one."""
        padding_BT = self.batch.padding_BT if position is None else self.batch.padding_BT[:, position, None]
        budgets = budgets or self.budgets

        def best(contest: Contest, payload_QN: Tensor | None) -> Tensor:
            wanted_QN = contest.nll_QN if payload_QN is None else payload_QN
            return read_frontier(budgets, self.cells, contest.nll_QN, wanted_QN, padding_BT, position or 0)

        true, *others = judge.contests
        resampled = [contest for contest in others if contest.score_QN is not None]
        random = [contest for contest in others if contest.drawn_QNS is not None]
        return OracleResult(
            budgets=budgets,
            nll=best(true, true.nll_QN),
            route_ids=best(true, true.ids_QN),
            random_nll=best(random[0], random[0].nll_QN) if random else None,
            resampled_nll=self._corrected([best(each, each.nll_QN) for each in resampled], 0, position),
            resampled_score=self._corrected([best(each, each.score_QN) for each in resampled], 1, position),
            evaluated_share=judge.evaluated / judge.seen,
        )

    def _corrected(self, losses_S: list[Tensor], draw: int, position: int | None) -> Tensor | None:
        """Losses of drawn labels, S times [K, B, T], less how surprising the labels happened to be."""
        if self.labels is None:
            return None
        excess_SBT = self.labels.excess_2SN[draw].view(-1, *self.batch.padding_BT.shape)
        return torch.stack(losses_S) - (excess_SBT if position is None else excess_SBT[..., position, None])[:, None]


def left_to_right(
    batch: Batch, space: RouteSpace, search_at: Callable[[int, CachedContext], OracleResult]
) -> OracleResult:
    """Search position by position under one budget; every pick is executed before the next."""
    cache = DynamicCache()  # unlike the model's own, it keeps what has left a sliding window
    steps = []
    for position in range(batch.ids_BT.shape[1]):
        steps.append(search_at(position, batch.step_context(cache, position)))
        batch.commit(cache, position, space.decode(steps[-1].route_ids[0, :, 0].clamp(min=0)))
    return join_positions(steps)


def max_rows_for(config: DuoConfig, space: RouteSpace, memory_bytes: int) -> int:
    """How many hidden vectors a block may hold within the memory budget, and where larger does not pay."""
    kept_per_level = (space.base + 1) * config.hidden_size
    working = 8 * config.hidden_size + 3 * config.intermediate_size
    row_bytes = 4 * (space.num_layers * kept_per_level + working)
    return max(1, min(memory_bytes // row_bytes, 4096))


def check_search(model: DuoForCausalLM, input_ids: Tensor, space: RouteSpace, context: str) -> None:
    """Raise a ValueError that says what is allowed unless the search can be done."""
    config = model.config
    if context not in CONTEXTS:
        raise ValueError(f"context must be one of {', '.join(CONTEXTS)}, got {context!r}")
    if space.num_layers != config.num_hidden_layers:
        raise ValueError(
            f"the route space has {space.num_layers} layers, the model {config.num_hidden_layers}; make them equal"
        )
    if input_ids.ndim != 2 or input_ids.shape[1] < 2:
        raise ValueError(f"input_ids must be [B, T] with T >= 2, got shape {list(input_ids.shape)}")
    if input_ids.min() < 0 or input_ids.max() >= config.vocab_size:
        raise ValueError(
            f"token ids must be in 0 .. {config.vocab_size - 1}, got {input_ids.min()} .. {input_ids.max()}"
        )
    longest = _longest(config, context)
    if longest is not None and input_ids.shape[1] - 1 > longest:
        raise ValueError(
            f"sequences may have at most {longest + 1} tokens with this model's positions in context {context!r}, "
            f"got {input_ids.shape[1]}"
        )


def _longest(config: DuoConfig, context: str) -> int | None:
    """The largest number of predicting tokens that the positions allow; None: any."""
    rope = config.rope_parameters or {}
    if config.positions == "learned":
        return config.max_position_embeddings
    if context == "committed" and rope.get("rope_type") in ("dynamic", "longrope"):
        # Beyond it these rotations depend on how much has been read: executing a pick would change earlier losses.
        return int(rope.get("original_max_position_embeddings", config.max_position_embeddings))
    return None
