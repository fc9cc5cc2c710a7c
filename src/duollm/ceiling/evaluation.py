"""The predictable ceiling on the text of the comparison: predicted gains become routes, and these are executed.

Shape letters: W windows, T tokens, L layers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from duollm.ceiling.predictor import GainPredictor
from duollm.ceiling.routes import CeilingPolicy, choose, predicted_margins, price_for
from duollm.data.packed import PackedData, Windows
from duollm.files import replacing
from duollm.measure.executor import policy_losses, token_columns
from duollm.models.branch import Branch
from duollm.models.modeling_duo import DuoForCausalLM
from duollm.progress import show
from duollm.records.files import write_result
from duollm.records.keys import SHUFFLED
from duollm.routes.space import RouteSpace, focus_budgets

_VALIDATION_WINDOWS = 64
"""Few, for every policy is executed on them."""


def evaluate_ceiling(
    model: DuoForCausalLM,
    predictors: nn.ModuleDict,
    big_layers: Sequence[int],
    branches: Sequence[Branch],
    validation_WT: Tensor,
    texts: Mapping[str, Windows],
    run: Path,
) -> None:
    """Write `run/ceiling/` (docs/formats.md): the losses of predicted routes on the text of the comparison.

    The chosen depths and the control are executed at every budget. The other depths are executed only at the budget
    nearest to a third of the layers, which is the one that the report shows by depth.

    Args:
        validation_WT: windows on which prices are found and the depth is chosen.
        texts: of the comparison, by domain.
    """
    space = RouteSpace(model.config.num_hidden_layers, tuple(branches))
    scored = choose(_on_validation(model, predictors, big_layers, space, validation_WT.to(model.device)))
    by_depth = min(sorted(big_layers), key=lambda k: abs(k - focus_budgets(space.num_layers)[0]))
    policies = [each for each in scored if each.chosen or each.predictor == SHUFFLED or each.big_layers == by_depth]
    facts = {
        "num_layers": space.num_layers,
        "branches": [branch.name.lower() for branch in space.branches],
        "policies": [asdict(policy) | {"column": policy.column} for policy in policies],
    }
    with replacing(run / "ceiling") as folder:
        folder.mkdir()
        save_file(predictors.state_dict(), folder / "predictors.safetensors")
        for domain, windows in texts.items():
            token_ids_WT = torch.from_numpy(windows.token_ids).to(model.device)
            found, columns = predicted_margins(model, predictors, big_layers, space, token_ids_WT), windows.columns()
            for number, policy in enumerate(policies):
                show(f"ceiling on {domain}", number, len(policies), unit="policies")
                measured = policy_losses(model, token_ids_WT, routes=policy.routes(found))
                columns |= token_columns(*measured, space, f"_{policy.column}")
            write_result(folder / f"{domain}.parquet", columns, facts)


def validation_windows(data: PackedData, windows_per_document: int, seed: int) -> Tensor:
    """Return the windows on which prices are found and the depth is chosen, [W, T]."""
    return torch.from_numpy(data.balanced_sample("validation", _VALIDATION_WINDOWS, windows_per_document, seed))


def _on_validation(
    model: DuoForCausalLM,
    predictors: nn.ModuleDict,
    big_layers: Sequence[int],
    space: RouteSpace,
    token_ids_WT: Tensor,
) -> list[CeilingPolicy]:
    """Price every policy, and score those that a depth is chosen from."""
    found = predicted_margins(model, predictors, big_layers, space, token_ids_WT)
    policies: list[CeilingPolicy] = []
    for (name, k), (margin_WTL, _) in found.items():
        show("ceiling on validation text", len(policies), 2 * len(found), unit="policies")
        for spend, price in (("average", price_for(margin_WTL, k)), ("exact", None)):
            policy = CeilingPolicy(name, cast(GainPredictor, predictors[name]).depth, spend, k, price)
            if name != SHUFFLED:
                nll_WT, _ = policy_losses(model, token_ids_WT, routes=policy.routes(found))
                policy = replace(policy, validation_nll=nll_WT.mean().item())
            policies.append(policy)
    return policies
