"""The best route of every token of a text, and how much compute can help it.

python examples/oracle_on_text.py --model runs/quick/model --big-layers 4 --context committed
"""

import argparse
from pathlib import Path

import torch
from loading import TEXT, load
from torch import Tensor

from duollm import Branch, DuoForCausalLM, RouteSpace, search_oracle
from duollm.measure.executor import policy_losses

LETTER = {Branch.SKIP: "-", Branch.SMALL: "s", Branch.BIG: "B"}


def main() -> None:
    """Search and print a row per token."""
    options = parse_options()
    model, tokenizer = load(options.model)
    input_ids = torch.tensor([tokenizer.encode(options.text)[: options.tokens]])
    space = RouteSpace(model.config.num_hidden_layers)
    found = search_oracle(model, input_ids, space, context=options.context, big_layers=[options.big_layers])
    nll_T, routes_TL = found.nll[0, 0], space.decode(found.route_ids[0, 0])
    small_T, big_T = (same_branch_nll(model, input_ids, branch) for branch in (Branch.SMALL, Branch.BIG))
    difficulty_T = small_T - nll_T
    print(f"{'token':>14}  all small  all big  oracle  difficulty  route (layer 0 first)")
    for t, token_id in enumerate(input_ids[0, 1:].tolist()):
        route = "".join(LETTER[Branch(branch)] for branch in routes_TL[t].tolist())
        print(
            f"{tokenizer.decode([token_id])!r:>14}  {small_T[t]:9.3f}  {big_T[t]:7.3f}  {nll_T[t]:6.3f}  "
            f"{difficulty_T[t]:10.3f}  {route}"
        )
    print(
        f"mean over {len(nll_T)} tokens, context {options.context}, exactly {options.big_layers} big layers: "
        f"all small {small_T.mean():.3f}, all big {big_T.mean():.3f}, oracle {nll_T.mean():.3f} nats"
    )


def same_branch_nll(model: DuoForCausalLM, input_ids: Tensor, branch: Branch) -> Tensor:
    """Return the nll [T - 1] with every layer of every token on one branch."""
    nll_BT, _ = policy_losses(model, input_ids, routes=torch.full((model.config.num_hidden_layers,), int(branch)))
    return nll_BT[0]


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a saved duo with its tokenizer; default: a tiny random one")
    parser.add_argument("--text", default=TEXT)
    parser.add_argument("--tokens", type=int, default=64, help="read at most so many tokens of the text")
    parser.add_argument("--big-layers", type=int, default=1, help="exactly so many big layers per token")
    parser.add_argument("--context", default="shared", choices=("shared", "reference", "committed"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
