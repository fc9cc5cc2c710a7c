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
