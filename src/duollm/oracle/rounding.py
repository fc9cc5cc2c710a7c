"""How far rounding moves an oracle: a minimum over losses that are rounded lies too low.

Shape letters: T tokens, K budgets.
"""

from collections.abc import Sequence
from copy import deepcopy

import torch
from torch import Tensor

from duollm.models.modeling_duo import DuoForCausalLM
from duollm.oracle.budgets import Budget
from duollm.oracle.search import search_oracle
from duollm.oracle.trial import Method
from duollm.routes.space import RouteSpace


def rounding_bias(
    model: DuoForCausalLM, token_ids_T: Tensor, space: RouteSpace, budgets: Sequence[Budget], method: str | Method
) -> Tensor | None:
    """Return how much higher the best losses are in float32, mean over the tokens, nats [K]; None for such a model.

    The sample is searched in context shared, once as the model is and once by a copy of it in float32.
    """
    if model.dtype == torch.float32:
        return None
    exact = deepcopy(model).float()
    rounded_KT, exact_KT = (
        search_oracle(each, token_ids_T[None], space, budgets=budgets, method=method).nll[:, 0]
        for each in (model, exact)
    )
    return (exact_KT - rounded_KT).nanmean(-1)


def describe_bias(model: DuoForCausalLM, bias_K: Tensor, budgets: Sequence[Budget], tokens: int) -> str:
    """Say the bias in one line."""
    dtype = str(model.dtype).removeprefix("torch.")
    largest = int(bias_K.abs().argmax())
    return (
        f"The model is in {dtype}. On {tokens} tokens its oracle lies {bias_K.mean():+.4f} nats below that of the same "
        f"weights in float32, mean over budgets; at most {bias_K[largest]:+.4f} ({budgets[largest].name})"
    )
