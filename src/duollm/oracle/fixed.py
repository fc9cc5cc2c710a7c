"""Exact losses of fixed patterns, one route for all tokens: all small, all big, and static.

Static is the best pattern of its budget on one half of the documents, run on the other half.

Shape letters: W windows, T tokens, L layers, D documents, R routes, V vocabulary.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from duollm.data.packed import Windows
from duollm.models.branch import Branch
from duollm.models.modeling_duo import DuoForCausalLM
from duollm.oracle.halves import best_on_other_half, first_half
from duollm.routing.space import RouteSpace

_BATCH = 16


@torch.inference_mode()
def fixed_columns(
    model: DuoForCausalLM,
    windows: Windows,
    nll_sum_DR: NDArray[np.float64],
    space: RouteSpace,
    big_layers: list[int],
    seed: int,
) -> dict[str, Any]:
    """Run the patterns and return their columns, a row per predicted token, in nats.

    `nll_small`, `nll_big` and `nll_static_k<k>` are losses on the label; `expected_static_k<k>` is the
    loss to expect when the label is drawn from the all-big prediction (the control for selection noise).

    Args:
        nll_sum_DR: sums over the tokens on which patterns are compared; documents in order of first occurrence.
    """
    names = list(dict.fromkeys(windows.documents))
    document_W = np.array([names.index(document) for document in windows.documents])
    in_first_D = first_half(len(names), seed)
    columns: dict[str, list[Tensor]] = {}
    routes_WL = {}
    for big in big_layers:
        ids_R = space.ids_with(big)
        route_D = ids_R[best_on_other_half(nll_sum_DR[:, ids_R], in_first_D)]
        routes_WL[big] = torch.from_numpy(space.decode(route_D[document_W])).to(model.device)
    for part in np.array_split(np.arange(len(document_W)), -(-len(document_W) // _BATCH)):
        token_ids_BT = torch.from_numpy(windows.token_ids[part]).to(model.device)
        small_BL, big_BL = (torch.full((len(part), space.num_layers), int(b)) for b in (Branch.SMALL, Branch.BIG))
        reference_BTV = _log_probabilities(model, token_ids_BT, big_BL)
        of_part = {
            "nll_small": _nll(_log_probabilities(model, token_ids_BT, small_BL), token_ids_BT),
            "nll_big": _nll(reference_BTV, token_ids_BT),
        }
        for big in big_layers:
            log_p_BTV = _log_probabilities(model, token_ids_BT, routes_WL[big][part])
            of_part[f"nll_static_k{big}"] = _nll(log_p_BTV, token_ids_BT)
            of_part[f"expected_static_k{big}"] = -(reference_BTV.exp() * log_p_BTV).sum(-1)
        for name, values_BT in of_part.items():
            columns.setdefault(name, []).append(values_BT.flatten())
    return {name: torch.cat(parts).cpu().numpy() for name, parts in columns.items()}


def _nll(log_p_BTV: Tensor, token_ids_BT: Tensor) -> Tensor:
    return -log_p_BTV.gather(-1, token_ids_BT[:, 1:, None])[..., 0]


def _log_probabilities(model: DuoForCausalLM, token_ids_BT: Tensor, routes_BL: Tensor) -> Tensor:
    """Log-probabilities [B, T - 1, V] of the next token, each sequence on one route."""
    inputs_BT = token_ids_BT[:, :-1]
    routes_BTL = routes_BL.to(model.device)[:, None].expand(-1, inputs_BT.shape[1], -1)
    return model(input_ids=inputs_BT, routes=routes_BTL, use_cache=False).logits.float().log_softmax(-1)
