"""The predictable ceiling on the text of the comparison: predicted gains become routes, and these are executed.

Around static, what groups are worth is measured, and only the differences of tokens are predicted.

Layers, or groups of layers, are taken in the order of their gains, up to a price or an exact number.

Shape letters: W windows, B windows per forward, T tokens, L layers, J groups of layers, C branches to choose from.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from duollm.ceiling.predictor import GainPredictor, all_big_states, exact_choice, margins, price_for, priced_choice
from duollm.data.packed import PackedData, Windows
from duollm.files import replacing
from duollm.measure.executor import policy_losses, token_columns
from duollm.models.modeling_duo import DuoForCausalLM
from duollm.records.files import write_result
from duollm.records.keys import SHUFFLED
from duollm.routers.static import SCALES, Prior, chosen_scale
from duollm.routes.space import RouteSpace, focus_budgets
from duollm.terminal import show

_VALIDATION_WINDOWS = 64
"""Few, for every policy is executed on them."""
_BATCH = 16
Margins = dict[tuple[str, int], tuple[Tensor, Tensor]]
"""By predictor and big layers: the margin of big and the other branch, [W, T, J] each."""


@dataclass(frozen=True)
class AroundStatic:
    """Margins of big as static's prior plus scale x (predicted - mean predicted).

    Attributes:
        space: the routes, of two branches.
        priors: static by budget.
        mean_J: by predictor, the mean of its margins on validation text.
        scales: by predictor and budget.
    """

    space: RouteSpace
    priors: Mapping[int, Prior]
    mean_J: dict[str, Tensor]
    scales: dict[tuple[str, int], float]

    @classmethod
    @torch.inference_mode()
    def chosen(
        cls,
        model: DuoForCausalLM,
        predictors: nn.ModuleDict,
        space: RouteSpace,
        priors: Mapping[int, Prior],
        validation_WT: Tensor,
        chooses_in: Callable[[], AbstractContextManager[Any]],
    ) -> "AroundStatic":
        """Choose for every predictor and budget the scale that surely gains most on validation text.

        The control takes the scale of the deepest predictor. Chosen by its own loss it would choose static.

        Args:
            chooses_in: the precision in which the losses are compared.
        """

        def losses_of(routes: Tensor) -> Tensor:
            with chooses_in():
                return policy_losses(model, validation_WT, routes=routes)[0]

        parts: dict[str, list[Tensor]] = {name: [] for name in predictors}
        for batch_BT in validation_WT.split(_BATCH):
            states_BTF = all_big_states(model, batch_BT)
            for name, predictor in predictors.items():
                parts[name].append(cast(GainPredictor, predictor).from_states(states_BTF))
        gains = {name: torch.cat(each) for name, each in parts.items()}
        means = {name: _beats(gains_WTJC).mean((0, 1)) for name, gains_WTJC in gains.items()}
        scales: dict[tuple[str, int], float] = {}
        for k, prior in priors.items():
            static_WT = losses_of(prior.route_L)
            for name in (each for each in predictors if each != SHUFFLED):
                losses = {0.0: static_WT}
                for scale in SCALES[:-1]:
                    tried = cls(space, priors, means, {(name, k): scale})
                    margin_WTJ, otherwise_WTJ = tried.margins(name, k, gains[name])
                    price = price_for(margin_WTJ, k, space)
                    routes_WTL = space.spread(priced_choice(margin_WTJ, otherwise_WTJ, price))
                    losses[scale] = losses_of(routes_WTL)
                scales[name, k] = scales[SHUFFLED, k] = chosen_scale(losses)
        return cls(space, priors, means, scales)

    def margins(self, name: str, big_layers: int, gains: Tensor) -> tuple[Tensor, Tensor]:
        """Return the margin of big and the other branch, [., J] each, from a predictor's gains [., J, C]."""
        prior = self.priors[big_layers]
        margin = prior.worth_J + self.scales[name, big_layers] * (_beats(gains) - self.mean_J[name])
        return margin, torch.full_like(margin, int(self.space.branches[0]), dtype=torch.int64)


def _beats(gains: Tensor) -> Tensor:
    return gains[..., 1] - gains[..., 0]


@dataclass(frozen=True)
class CeilingPolicy:
    """One way from predicted gains to routes.

    Attributes:
        predictor: name of the predictor.
        depth: the last layer whose states the predictor sees.
        spend: "average" (big where the gain exceeds `price`) or "exact" (the `big_layers` with the largest gains).
        price: price of big in the predictor's units; None with exact spending.
        validation_nll: nats per token; None for the control and where there is one depth.
        chosen: whether no other depth had a lower `validation_nll` at this budget, spent this way.
        scale: by how much the predicted difference of a token from the mean counts beside static's prior; None: gains
            are used as they are predicted.
    """

    predictor: str
    depth: int
    spend: str
    big_layers: int
    price: float | None
    validation_nll: float | None = None
    chosen: bool = False
    scale: float | None = None

    @property
    def column(self) -> str:
        """The ending of the names of its columns."""
        return f"{self.spend}_{self.predictor}_k{self.big_layers}"

    def routes(self, found: Margins, space: RouteSpace) -> Tensor:
        """Return the routes of all tokens, [W, T, L]."""
        margin, otherwise = found[self.predictor, self.big_layers]
        if self.price is None:
            return space.spread(exact_choice(margin, otherwise, self.big_layers, space))
        return space.spread(priced_choice(margin, otherwise, self.price))


def evaluate_ceiling(
    model: DuoForCausalLM,
    predictors: nn.ModuleDict,
    big_layers: Sequence[int],
    space: RouteSpace,
    validation_WT: Tensor,
    texts: Mapping[str, Windows],
    run: Path,
    priors: Mapping[int, Prior] | None = None,
    chooses_in: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> None:
    """Write `run/ceiling/` (docs/formats.md): the losses of predicted routes on the text of the comparison.

    The chosen depths and the control are executed at every budget. The other depths are executed only at the budget
    nearest to a third of the layers, which is the one that the report shows by depth.

    Args:
        validation_WT: windows on which prices are found and the depth is chosen.
        texts: of the comparison, by domain.
        priors: static of every budget, from which the routes start; None: from the predicted gains alone.
        chooses_in: the precision in which scales beside static are compared. Default: the model's own.
    """
    scored, validation_WT = list[CeilingPolicy](), validation_WT.to(model.device)
    around = (
        None if priors is None else AroundStatic.chosen(model, predictors, space, priors, validation_WT, chooses_in)
    )
    margins_of = partial(predicted_margins, model, predictors, big_layers, space, around=around)
    found = margins_of(validation_WT)
    for (name, k), (margin_WTJ, _) in found.items():
        show("ceiling on validation text", len(scored), 2 * len(found), unit="policies")
        for spend, price in (("average", price_for(margin_WTJ, k, space)), ("exact", None)):
            policy = CeilingPolicy(name, cast(GainPredictor, predictors[name]).depth, spend, k, price)
            if around is not None:
                policy = replace(policy, scale=around.scales[name, k])
            if name != SHUFFLED and len(predictors) > 2:  # a single depth needs no choice
                nll_WT, _ = policy_losses(model, validation_WT, routes=policy.routes(found, space))
                policy = replace(policy, validation_nll=nll_WT.mean().item())
            scored.append(policy)
    scored = choose(scored)
    by_depth = focus_budgets(space.num_layers, big_layers)[0]
    policies = [each for each in scored if each.chosen or each.predictor == SHUFFLED or each.big_layers == by_depth]
    facts = space.facts | {
        "policies": [asdict(policy) | {"column": policy.column} for policy in policies],
    }
    with replacing(run / "ceiling") as folder:
        folder.mkdir()
        save_file(predictors.state_dict(), folder / "predictors.safetensors")
        for domain, windows in texts.items():
            token_ids_WT = torch.from_numpy(windows.token_ids).to(model.device)
            found, columns = margins_of(token_ids_WT), windows.columns()
            for number, policy in enumerate(policies):
                show(f"ceiling on {domain}", number, len(policies), unit="policies")
                measured = policy_losses(model, token_ids_WT, routes=policy.routes(found, space))
                columns |= token_columns(*measured, space, f"_{policy.column}")
            write_result(folder / f"{domain}.parquet", columns, facts)


def validation_windows(data: PackedData, windows_per_document: int, seed: int) -> Tensor:
    """Return the windows on which prices are found and the depth is chosen, [W, T]."""
    return torch.from_numpy(data.balanced_sample("validation", _VALIDATION_WINDOWS, windows_per_document, seed))


def choose(policies: Sequence[CeilingPolicy]) -> list[CeilingPolicy]:
    """Mark the depth with the lowest loss on validation text, for every budget and way of spending it."""
    nll = {policy: policy.validation_nll or 0.0 for policy in policies if policy.predictor != SHUFFLED}
    lowest: dict[tuple[str, int], float] = {}
    for policy, loss in nll.items():
        key = policy.spend, policy.big_layers
        lowest[key] = min(lowest.get(key, float("inf")), loss)
    return [
        replace(policy, chosen=policy in nll and nll[policy] == lowest[policy.spend, policy.big_layers])
        for policy in policies
    ]


@torch.inference_mode()
def predicted_margins(
    model: DuoForCausalLM,
    predictors: nn.ModuleDict,
    big_layers: Sequence[int],
    space: RouteSpace,
    token_ids_WT: Tensor,
    around: AroundStatic | None = None,
) -> Margins:
    """Predict by how much big beats the other branches, for every budget; beside static if `around` is given."""
    parts: dict[tuple[str, int], list[tuple[Tensor, Tensor]]] = {}
    vary = sum(space.group_sizes)
    for batch_BT in token_ids_WT.split(_BATCH):
        states_BTF = all_big_states(model, batch_BT)
        nowhere_BTJ = torch.zeros(*batch_BT.shape, len(space.leaders), device=batch_BT.device)
        for name, predictor in cast(dict[str, GainPredictor], predictors).items():
            from_states_BTJC = predictor.from_states(states_BTF)
            for k in big_layers:
                if around is not None:
                    parts.setdefault((name, k), []).append(around.margins(name, k, from_states_BTJC))
                    continue
                share_BT = torch.full(batch_BT.shape, (k - space.spent_by_fixed[1]) / vary, device=batch_BT.device)
                gains_BTJC = from_states_BTJC + predictor.from_told(share_BT, nowhere_BTJ)
                found = margins(gains_BTJC, predictor.interactions(), space.branches)
                parts.setdefault((name, k), []).append(found)
    return {key: (torch.cat([m for m, _ in each]), torch.cat([o for _, o in each])) for key, each in parts.items()}
