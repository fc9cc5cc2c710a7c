"""Small FFNs that are linear maps of low rank, fitted to the big FFNs in closed form.

Shape letters: N sample tokens, D hidden, R rank.
"""

import torch
from torch import Tensor

from duollm.models.modeling_duo import DuoFFN, DuoForCausalLM
from duollm.ridge import ridge

_PART = 2048  # tokens at once in double precision
_RIDGE = 1e-3  # of the mean square of a centred input


def make_linear(model: DuoForCausalLM) -> None:
    """Replace the small FFNs by linear maps of rank `small_intermediate_size`, with a bias on the output.

    Raises:
        ValueError: the rank exceeds the width of the model.
    """
    config = model.config
    if config.small_intermediate_size > config.hidden_size:
        raise ValueError(
            f"small_intermediate_size ({config.small_intermediate_size}) is the rank of a linear map and must not "
            f"exceed hidden_size ({config.hidden_size})"
        )
    config.small_linear = True
    config.base_model_tp_plan = config._tp_plan()  # type: ignore[misc]
    for layer in model.model.layers:
        like = layer.mlp.big.down_proj.weight
        layer.mlp.small = DuoFFN(config, config.small_intermediate_size, linear=True).to(like.device, like.dtype)


@torch.no_grad()
def fit_linear(small: DuoFFN, states_ND: Tensor, outputs_ND: Tensor, weights_N: Tensor) -> None:
    """Set the map to the one of its rank that predicts the outputs best: a reduced-rank ridge regression.

    Of the full regression's predictions it keeps the R directions of the output in which they vary most (Izenman,
    1975). So with any rank it gives the mean output for the mean input.

    Args:
        weights_N: how much the squared error of each token counts.
    """
    total, rank = weights_N.sum().double(), small.up_proj.out_features
    states_D, outputs_D = ((weights_N @ each_ND).double() / total for each_ND in (states_ND, outputs_ND))
    product_DD = torch.zeros(len(states_D), len(states_D), dtype=torch.float64, device=states_D.device)
    aimed_DD = torch.zeros_like(product_DD)
    for part in torch.arange(len(weights_N), device=weights_N.device).split(_PART):
        centred_ND = states_ND[part].double() - states_D
        weighted_DN = (centred_ND * weights_N[part, None]).T
        product_DD += weighted_DN @ centred_ND
        aimed_DD += weighted_DN @ (outputs_ND[part].double() - outputs_D)
    full_DD = ridge(product_DD, aimed_DD, _RIDGE, held=len(product_DD))
    varied_DD = aimed_DD.T @ full_DD
    kept_DR = torch.linalg.eigh((varied_DD + varied_DD.T) / 2).eigenvectors[:, -rank:]  # ascending eigenvalues
    small.up_proj.weight.copy_((full_DD @ kept_DR).T)
    small.down_proj.weight.copy_(kept_DR)
    small.down_proj.bias.copy_(outputs_D - states_D @ full_DD @ kept_DR @ kept_DR.T)
