"""Exact losses of fixed patterns, one route for all tokens: all small, all big, and static.

Static is the best pattern of its budget on one half of the documents, run on the other half.

Shape letters: W windows, T tokens, N = T - 1 predictions of a window, L layers, D documents,
R patterns, V vocabulary, B sequences, S labels of a token, M counted tokens, D also hidden.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from duollm.data.packed import Windows
from duollm.models.branch import Branch
from duollm.models.modeling_duo import DuoForCausalLM
from duollm.models.policy import FixedRoutes
from duollm.oracle.head import log_normaliser
from duollm.oracle.noise import OWN_PREDICTION, LabelSource
from duollm.records.patterns import best_on_other_half, first_half
from duollm.routes.sampling import draw_route_ids
from duollm.routes.space import RouteSpace

_BATCH = 16
_LOGITS = 2**23
"""The largest number of logits at a time; about six tensors of as many are alive."""
_SHOWN_PREDICTIONS = 5


def draw_patterns(space: RouteSpace, big_layers: Sequence[int], number: int, seed: int) -> NDArray[np.int64]:
    """Draw up to `number` patterns per budget (fewer if draws coincide), and add all small and all big
    where they are in the space.

    Returns: route ids [R], ascending.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = [draw_route_ids(space, big, (number,), generator).numpy() for big in big_layers]
    uniform = [space.uniform(branch) for branch in (space.lowest, Branch.BIG)]
    return np.unique(np.concatenate([*drawn, [route for route in uniform if route is not None]])).astype(np.int64)


@torch.inference_mode()
def pattern_losses(
    model: DuoForCausalLM, token_ids_BT: Tensor, counted_BN: Tensor, label_SMD: Tensor, routes_RL: Tensor
) -> Tensor:
    """Run whole sequences on each pattern; return the losses [S, M, R] of the counted tokens, float32, nats.

    Args:
        label_SMD: the head's embeddings of the labels.
    """
    losses_SMR = label_SMD.new_empty(*label_SMD.shape[:2], len(routes_RL), dtype=torch.float32)
    for index, route_L in enumerate(routes_RL):
        policy = FixedRoutes(route_L)
        states_BND = model.model(input_ids=token_ids_BT[:, :-1], policy=policy, use_cache=False).last_hidden_state
        states_MD = states_BND[counted_BN]
        losses_SMR[..., index] = log_normaliser(model, states_MD) - (label_SMD * states_MD).sum(-1)
    return losses_SMR


@torch.inference_mode()
def fixed_columns(
    model: DuoForCausalLM,
    windows: Windows,
    nll_sum_DR: NDArray[np.float64],
    pattern_R: NDArray[np.int64],
    space: RouteSpace,
    big_layers: list[int],
    seed: int,
    labels: LabelSource = OWN_PREDICTION,
) -> dict[str, Any]:
    """Run all small, all big and static, and return their columns, one row per predicted token, in nats.

    Where small is not among the branches, all small stands for all layers skipped.

    `nll_small`, `nll_big` and `nll_static_k<k>` are losses on the label. `expected_static_k<k>` is the expected loss
    when the label is drawn from `labels` (the control for selection noise). `route_static_k<k>` are route ids. `rank`
    (1: the likeliest), `top5_id` and `top5_probability` (five a row) say what all big predicted.

    Args:
        nll_sum_DR: sums over the tokens on which patterns are compared, documents in order of first occurrence.
        pattern_R: the ids of those patterns, at least one for every budget.
    """
    names = list(dict.fromkeys(windows.documents))
    document_W = np.array([names.index(document) for document in windows.documents])
    in_first_D = first_half(len(names), seed)
    columns: dict[str, list[Tensor]] = {}
    route_W, routes_WL = {}, {}
    big_R = space.count_big(pattern_R)
    for big in big_layers:
        route_D = pattern_R[big_R == big][best_on_other_half(nll_sum_DR[:, big_R == big], in_first_D)]
        route_W[big] = torch.from_numpy(route_D[document_W])
        routes_WL[big] = space.decode(route_W[big]).to(model.device)
    batch = max(1, min(_BATCH, _LOGITS // (windows.token_ids.shape[1] * model.config.vocab_size)))
    for part in np.array_split(np.arange(len(document_W)), -(-len(document_W) // batch)):
        token_ids_BT = torch.from_numpy(windows.token_ids[part]).to(model.device)
        small_BL, big_BL = (torch.full((len(part), space.num_layers), int(b)) for b in (space.lowest, Branch.BIG))
        reference_BTV = _log_probabilities(model, token_ids_BT, big_BL)
        drawn_from_BTV = labels.prediction(token_ids_BT[:, :-1], reference_BTV)
        of_part = {
            "nll_small": _nll(_log_probabilities(model, token_ids_BT, small_BL), token_ids_BT),
            "nll_big": _nll(reference_BTV, token_ids_BT),
            **_predictions(reference_BTV, token_ids_BT),
        }
        for big in big_layers:
            log_p_BTV = _log_probabilities(model, token_ids_BT, routes_WL[big][part])
            of_part[f"nll_static_k{big}"] = _nll(log_p_BTV, token_ids_BT)
            of_part[f"route_static_k{big}"] = route_W[big][part, None].expand(log_p_BTV.shape[:2])
            of_part[f"expected_static_k{big}"] = -(drawn_from_BTV * log_p_BTV).sum(-1)
        for name, values_BT in of_part.items():
            columns.setdefault(name, []).append(values_BT.flatten())
    return {name: torch.cat(parts).cpu().numpy() for name, parts in columns.items()}


def _predictions(log_p_BTV: Tensor, token_ids_BT: Tensor) -> dict[str, Tensor]:
    above_BTV = log_p_BTV > log_p_BTV.gather(-1, token_ids_BT[:, 1:, None])
    top = log_p_BTV.topk(min(_SHOWN_PREDICTIONS, log_p_BTV.shape[-1]))
    return {
        "rank": above_BTV.sum(-1, dtype=torch.int32) + 1,
        "top5_id": top.indices.int(),
        "top5_probability": top.values.exp(),
    }


def _nll(log_p_BTV: Tensor, token_ids_BT: Tensor) -> Tensor:
    return -log_p_BTV.gather(-1, token_ids_BT[:, 1:, None])[..., 0]


def _log_probabilities(model: DuoForCausalLM, token_ids_BT: Tensor, routes_BL: Tensor) -> Tensor:
    """Log-probabilities [B, T - 1, V] of the next token, each sequence on one route."""
    inputs_BT = token_ids_BT[:, :-1]
    routes_BTL = routes_BL.to(model.device)[:, None].expand(-1, inputs_BT.shape[1], -1)
    return model(input_ids=inputs_BT, routes=routes_BTL, use_cache=False).logits.float().log_softmax(-1)
