"""Tiny models whose branches differ visibly, and small inputs, for the tests of model, routing and training."""

import torch
from torch import Tensor

from duollm.models.configuration_duo import DuoConfig
from duollm.models.modeling_duo import DuoForCausalLM

SIZES = {
    "vocab_size": 31,
    "hidden_size": 16,
    "intermediate_size": 24,
    "small_intermediate_size": 6,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
}


def tiny_config(**sizes: object) -> DuoConfig:
    """The tiny model's configuration, some sizes replaced."""
    return DuoConfig(**{**SIZES, **sizes})


def tiny_model(seed: int = 0, attention: str = "eager", **sizes: object) -> DuoForCausalLM:
    """A random duo in evaluation mode; weights are large so that branches and layers matter."""
    torch.manual_seed(seed)
    model = DuoForCausalLM(tiny_config(**sizes))
    model.set_attn_implementation(attention)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model.eval()


def random_ids(batch: int = 2, tokens: int = 9, seed: int = 1, vocabulary: int = SIZES["vocab_size"]) -> Tensor:
    """Token ids [batch, tokens]."""
    return torch.randint(vocabulary, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def random_routes(batch: int = 2, tokens: int = 9, layers: int = 3, seed: int = 2, lowest: int = 0) -> Tensor:
    """Routes [batch, tokens, layers] that use every branch from `lowest` up."""
    return torch.randint(lowest, 3, (batch, tokens, layers), generator=torch.Generator().manual_seed(seed))
