"""A policy written by hand: big only on the first tokens of a line, against controls that spend as much.

python examples/custom_policy.py --model runs/quick/model --file src/duollm/flops.py
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from loading import TEXT, load
from torch import Tensor

from duollm import Branch
from duollm.measure.executor import policy_losses


class BigWhere:
    """Big in every layer for the marked tokens [B, T], small for all others."""

    def __init__(self, marked_BT: Tensor) -> None:
        self.choice_BT = torch.where(marked_BT, int(Branch.BIG), int(Branch.SMALL))

    def __call__(self, layer_idx: int, states_BTD: Tensor, memory: Any) -> tuple[Tensor, Any]:
        """Return the same choice at every layer."""
        return self.choice_BT, None


def first_of_line(ends_line_BT: Tensor, first: int) -> Tensor:
    """Mark the tokens whose prediction is one of the `first` tokens of a line.

    Position t predicts token t + 1, so marks begin on the token that ends the line before.
    """
    marked_BT = ends_line_BT.clone()
    for later in range(1, first):
        marked_BT[:, later:] |= ends_line_BT[:, :-later]
    return marked_BT


def evenly_spread(big: int, layers: int) -> Tensor:
    """Return a route [L] with `big` big layers spread over the depth."""
    places = torch.arange(layers)
    is_big = (places + 1) * big // layers > places * big // layers
    return torch.where(is_big, int(Branch.BIG), int(Branch.SMALL))


def main() -> None:
    """Print share of big and loss of the policy and of its controls."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a saved duo with its tokenizer; default: a tiny random one")
    parser.add_argument("--file", type=Path, help="the text; default: a few lines of Python")
    parser.add_argument("--first", type=int, default=3, help="so many tokens of each line are predicted with big")
    options = parser.parse_args()
    model, tokenizer = load(options.model)
    ids = tokenizer.encode(options.file.read_text(encoding="utf-8") if options.file else TEXT)
    ids_BT = torch.tensor([ids[:1024]])
    ends_line_BT = torch.tensor([["\n" in tokenizer.decode([token_id]) for token_id in ids_BT[0].tolist()]])
    marked_BT = first_of_line(ends_line_BT, options.first)
    layers, predicting = model.config.num_hidden_layers, ids_BT.shape[1] - 1  # the last token predicts nothing here
    shuffled_BT = marked_BT[:, torch.randperm(predicting, generator=torch.Generator().manual_seed(0))]
    shuffled_BT = torch.cat([shuffled_BT, marked_BT[:, predicting:]], dim=1)
    below = min(int(marked_BT[:, :predicting].float().mean() * layers), layers - 1)
    runs: dict[str, dict[str, Any]] = {
        f"first {options.first} of a line": {"policy": BigWhere(marked_BT)},
        "as many tokens, at random": {"policy": BigWhere(shuffled_BT)},
        f"fixed pattern, {below} big": {"routes": evenly_spread(below, layers)},
        f"fixed pattern, {below + 1} big": {"routes": evenly_spread(below + 1, layers)},
    }
    for name, how in runs.items():
        nll_BT, routes_BTL = policy_losses(model, ids_BT, **how)
        share = (routes_BTL == Branch.BIG).float().mean()
        print(f"{name:26}  {share:6.1%} big  {nll_BT.mean():.4f} nats per token")


if __name__ == "__main__":
    main()
