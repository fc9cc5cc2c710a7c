"""The oracle stage: search the test windows of every domain, shard by shard, on all processes.

Shape letters: W windows, T tokens, N = T - 1 predictions of a window, M counted ones, G documents,
R patterns, K budgets.
"""

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from duollm.config import OracleConfig
from duollm.data.packed import PackedData, Windows
from duollm.models.modeling_duo import DuoForCausalLM
from duollm.oracle.budgets import Budget, Cells, Exactly
from duollm.oracle.fixed import draw_patterns, fixed_columns, pattern_losses
from duollm.oracle.noise import OWN_PREDICTION, DrawnLabels, DrawnTries, LabelSource, Units, best_of_columns
from duollm.oracle.plan import SHARD_WINDOWS, SearchPlan, check_settings
from duollm.oracle.reductions import LeafTable, RandomRoutes, Reduction
from duollm.oracle.search import SEARCHES, OracleResult, executed_nll, join, search_oracle
from duollm.oracle.store import Columns, OracleStore
from duollm.oracle.trial import Method
from duollm.records.patterns import pattern_columns
from duollm.routes.sampling import derived_seed
from duollm.routes.space import RouteSpace
from duollm.terminal import show

REDUCTIONS: list[Callable[[OracleConfig, LabelSource], Reduction | None]] = [
    lambda config, labels: DrawnLabels(config.resampled_labels, labels) if config.resampled_labels else None,
    lambda config, labels: RandomRoutes(config.random_routes),
    lambda config, labels: Units(config.units, labels) if config.units else None,
]
"""What the oracle keeps beside the best routes, in contexts shared and reference (docs/adding-a-reduction.md)."""


@dataclass(frozen=True)
class OracleRun:
    """A search of test windows that writes to a store.

    Attributes:
        rank, ranks: this process searches every `ranks`-th shard, starting at `rank`. The results do not depend on the
            number of processes.
        labels: the prediction from which labels are drawn.
        wait: returns when all processes have called it.
        report: is called with the name of a search, the tokens that it has done, and all of its tokens.
    """

    model: DuoForCausalLM
    data: PackedData
    config: OracleConfig
    seed: int
    store: OracleStore
    rank: int = 0
    ranks: int = 1
    labels: LabelSource = OWN_PREDICTION
    wait: Callable[[], None] = lambda: None
    report: Callable[[str, int, int], None] = show

    def run(self) -> None:
        """Search all domains. Finished shards and domains are not searched again.

        Raises:
            UserError: the store holds other results, there are too many routes to try all, or a budget is impossible.
        """
        check_settings(self.config, self.model.config, self.data.sequence_length)
        if self.rank == 0:
            self.store.claim()
            self._say_bias()
        self.wait()
        for domain in self.data.domains:
            if not self.store.path(domain).exists():
                self._search(domain)
            self.wait()

    def _say_bias(self) -> None:
        """If the model is in low precision, say how far that moves the oracle of one window."""
        budgets = [each for each in self.plan.budgets("shared") if isinstance(each, Exactly)]
        window = self.data.windows("test", self.data.domains[0], 1, 1, self.seed)
        token_ids_T = torch.from_numpy(window.token_ids[0]).to(self.model.device)
        bias_K = rounding_bias(self.model, token_ids_T, self.plan.space, budgets, self.config.search)
        if bias_K is not None:
            print(describe_bias(self.model, bias_K, budgets, len(token_ids_T) - 1), flush=True)

    def _search(self, domain: str) -> None:
        windows = self.data.windows("test", domain, self.config.documents, self.config.windows_per_document, self.seed)
        shards = list(_shards(windows))
        mine = range(self.rank, len(shards), self.ranks)
        missing = [number for number in mine if not self.store.has_shard(domain, number)]
        sizes = [shard.token_ids[:, 1:].size for shard in shards]
        total, parts = sum(sizes[number] for number in missing), 0.0

        def searched(tokens: int) -> None:
            nonlocal parts
            parts += tokens / len(self.plan.contexts)
            if self.rank == 0:
                self.report(f"oracle {domain}", round(parts), total)

        searched(0)
        for number in missing:
            found = self._shard(shards[number], derived_seed(self.seed, number), searched)
            self.store.write_shard(domain, number, found)
        self.wait()
        if self.rank == 0:
            self._complete(domain, windows, len(shards))

    def _complete(self, domain: str, windows: Windows, shards: int) -> None:
        """Run the fixed patterns, whose choice needs all documents, and write the domain's files."""
        tables, total = self.store.read_shards(domain, shards), windows.token_ids[:, 1:].size
        sums_GR = tables["routes"]["nll_sum"].to_numpy().reshape(-1, len(self.pattern_R))
        big_layers = self.plan.big_layers("shared")
        fixed = fixed_columns(
            self.model, windows, sums_GR, self.pattern_R, self.plan.space, big_layers, self.seed, self.labels
        )
        fixed["top5_text"] = self.data.tokenizer.batch_decode(fixed["top5_id"][:, None].tolist())
        for name, column in fixed.items():
            if name.startswith("top5"):
                column = pa.FixedSizeListArray.from_arrays(column, len(column) // total)
            tables["tokens"] = tables["tokens"].append_column(name, [column])
        self.store.complete(domain, shards, tables)

    @cached_property
    def plan(self) -> SearchPlan:
        """What is searched for."""
        return SearchPlan(self.config, self.model.config.num_hidden_layers, self.data.sequence_length)

    @cached_property
    def pattern_R(self) -> NDArray[np.int64]:
        """Ids of the fixed patterns to compare, ascending: all routes that are searched, or those drawn per budget."""
        plan = self.plan
        if not plan.tables_all:
            return draw_patterns(plan.space, plan.big_layers("shared"), self.config.random_routes, self.seed)
        cells = Cells.of_model(plan.space, self.model.config)
        wanted_Q = cells.wanted(plan.budgets("shared"), range(plan.sequence_length - 1))
        return wanted_Q[cells.of_routes(torch.arange(plan.space.size))].nonzero()[:, 0].numpy()

    def _shard(self, windows: Windows, seed: int, searched: Callable[[int], None]) -> dict[str, Columns]:
        """Search a shard in every context; return the columns of each of its files.

        `searched` is told the tokens of every search that ends: of one window, or in context committed of all.
        """
        generator = torch.Generator(self.model.device).manual_seed(seed)
        counted_WN = self._counted(windows, generator)
        tables = [LeafTable(counted_N, self.plan.space.size) for counted_N in counted_WN if self.plan.tables_all]
        tokens: Columns = {**windows.columns(), "counted": counted_WN.flatten().cpu().numpy()}
        drawn_of: dict[str, list[DrawnTries]] = {}
        tokens["text"] = self.data.tokenizer.batch_decode(tokens["token_id"][:, None].tolist())
        begins = self.data.tokenizer.batch_decode(windows.token_ids[:, :1].tolist())
        tokens["before"] = [text for begin in begins for text in (begin, *[""] * (windows.token_ids.shape[1] - 2))]
        for context in self.plan.contexts:
            found = self._search_context(context, windows, generator, tables, drawn_of, searched)
            tokens |= self._token_columns(context, windows, found)
        nll_WMR = [table.nll_MR[:, self.pattern_R] for table in tables] or self._run_patterns(windows, counted_WN)
        nll_of = _by_document(windows.documents, nll_WMR)
        sums_DR = np.stack([nll_MR.sum(0, dtype=np.float64) for nll_MR in nll_of.values()])
        tokens_D = np.array([len(nll_MR) for nll_MR in nll_of.values()])
        routes = pattern_columns(list(nll_of), self.pattern_R, sums_DR, tokens_D)
        big_R = self.plan.space.count_big(self.pattern_R)
        best_of = best_of_columns(nll_of, big_R, self.plan.big_layers("shared"), drawn_of)
        return {"tokens": tokens, "routes": routes, "best_of": best_of}

    def _counted(self, windows: Windows, generator: torch.Generator) -> Tensor:
        """The positions on which patterns are compared, the same number in every window, bool [W, N]."""
        shape = windows.token_ids[:, 1:].shape
        rank_WN = torch.rand(shape, generator=generator, device=generator.device).argsort(-1).argsort(-1)
        return rank_WN < max(1, round(self.config.counted_share * shape[1]))

    def _run_patterns(self, windows: Windows, counted_WN: Tensor) -> Sequence[Tensor]:
        """Return the losses [M, R] of each window's counted tokens on the drawn patterns."""
        token_ids_WT = torch.from_numpy(windows.token_ids).to(self.model.device)
        label_MD = self.model.lm_head.weight[token_ids_WT[:, 1:][counted_WN]]
        routes_RL = torch.from_numpy(self.plan.space.decode(self.pattern_R)).to(self.model.device)
        nll_MR = pattern_losses(self.model, token_ids_WT, counted_WN, label_MD[None], routes_RL)[0]
        return nll_MR.chunk(len(counted_WN))

    def _search_context(
        self,
        context: str,
        windows: Windows,
        generator: torch.Generator,
        tables: list[LeafTable],
        drawn_of: dict[str, list[DrawnTries]],
        searched: Callable[[int], None],
    ) -> OracleResult:
        """Window by window, so that blocks hold many routes; committed all at once, for it holds few."""
        token_ids_WT = torch.from_numpy(windows.token_ids).to(self.model.device)
        search = partial(
            search_oracle,
            self.model,
            space=self.plan.space,
            context=context,
            method=self.config.search,
            budgets=self.plan.budgets(context),
            memory_bytes=self.config.memory_bytes,
            generator=generator,
        )
        if context == "committed":
            together = search(token_ids_WT)
            searched(token_ids_WT[:, 1:].numel())
            return together
        tries_all = SEARCHES[self.config.search]().every_route
        made = [make(self.config, self.labels) for make in REDUCTIONS]
        reductions = [each for each in made if each is not None and (tries_all or not each.every_route)]
        results = []
        for window, token_ids_T in enumerate(token_ids_WT):
            kept = list(reductions)
            if context == "shared" and tables:
                table = tables[window]
                tries = [DrawnTries(table.counted_N, each) for each in reductions if isinstance(each, DrawnLabels)]
                kept += [table, *tries]
                drawn_of.setdefault(windows.documents[window], []).extend(tries)
            results.append(search(token_ids_T[None], reductions=kept))
            searched(len(token_ids_T) - 1)
        return join(results, axis=1)

    def _token_columns(self, context: str, windows: Windows, found: OracleResult) -> Columns:
        token_ids_WT = torch.from_numpy(windows.token_ids).to(self.model.device)
        columns: dict[str, Tensor] = {}
        kept = dict(found.columns)
        random_nll = kept.pop("random_nll", None)
        for k, budget in enumerate(found.budgets):
            name = f"{context}_{budget.name}"
            columns |= {f"{kind}_{name}": values[k] for kind, values in kept.items()}
            columns[f"executed_{name}"] = executed_nll(self.model, token_ids_WT, self.plan.space, found.route_ids[k])
            if random_nll is not None and context == "shared" and isinstance(budget, Exactly):
                columns[f"nll_random{self.config.random_routes}_{budget.name}"] = random_nll[k]
        return {name: values.flatten().cpu().numpy() for name, values in columns.items()}


def _shards(windows: Windows) -> Iterator[Windows]:
    """Cut the windows into shards of whole documents, about `SHARD_WINDOWS` windows each."""
    start, total = 0, len(windows.window)
    for end in range(1, total + 1):
        document_ends = end == total or windows.documents[end] != windows.documents[end - 1]
        if document_ends and (end - start >= SHARD_WINDOWS or end == total):
            yield windows.part(slice(start, end))
            start = end


def _by_document(documents: list[str], nll_WMR: Sequence[Tensor]) -> dict[str, NDArray[np.float32]]:
    """The losses [M, R] of each document's windows, joined."""
    nll_of: dict[str, list[NDArray[np.float32]]] = {}
    for document, nll_MR in zip(documents, nll_WMR, strict=True):
        nll_of.setdefault(document, []).append(nll_MR.cpu().numpy())
    return {document: np.concatenate(parts) for document, parts in nll_of.items()}


def rounding_bias(
    model: DuoForCausalLM, token_ids_T: Tensor, space: RouteSpace, budgets: Sequence[Budget], method: str | Method
) -> Tensor | None:
    """Return how much higher the best losses are in float32, mean over the tokens, nats [K].

    The sample is searched in context shared, once as it is and once in float32 with products of full precision. None if
    that is the same.
    """
    is_exact = model.dtype == torch.float32
    if is_exact and torch.get_float32_matmul_precision() == "highest":
        return None
    rounded_K1T = search_oracle(model, token_ids_T[None], space, budgets=budgets, method=method).nll
    exact = model if is_exact else deepcopy(model).float()
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        exact_K1T = search_oracle(exact, token_ids_T[None], space, budgets=budgets, method=method).nll
    finally:
        torch.set_float32_matmul_precision(precision)
    return (exact_K1T - rounded_K1T)[:, 0].nanmean(-1)


def describe_bias(model: DuoForCausalLM, bias_K: Tensor, budgets: Sequence[Budget], tokens: int) -> str:
    """Say the bias in one line."""
    kind, precision = str(model.dtype).removeprefix("torch."), torch.get_float32_matmul_precision()
    if precision != "highest":
        kind += f", its products in precision {precision!r}"
    largest = int(bias_K.abs().argmax())
    return (
        f"The model is in {kind}. On {tokens} tokens its oracle lies {bias_K.mean():+.4f} nats below that of the "
        f"same weights in float32, mean over budgets; at most {bias_K[largest]:+.4f} ({budgets[largest].name})"
    )
