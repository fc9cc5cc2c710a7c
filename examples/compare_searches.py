"""How close the approximate searches come to the exact oracle on a model that is not too deep for it.

python examples/compare_searches.py --run runs/quick --domain code --context reference --big-layers 4 6
"""

import argparse
from pathlib import Path
from time import perf_counter

import torch
from loading import TEXT, load
from torch import Tensor

from duollm import RouteSpace, search_oracle
from duollm.data.packed import PackedData
from duollm.oracle.search import SEARCHES, Beam, Local

METHODS = {name: make() for name, make in SEARCHES.items()} | {f"beam {width}": Beam(width) for width in (32, 128, 256)}
NAMES = [*METHODS, "local from beam"]  # a beam, whose picks are then bettered by two steps of local search


def main() -> None:
    """Compare and print a Markdown table.

    Recall is the share of tokens whose route is as good as the best, to 1e-4 nats; excess is the mean loss above the
    best. In context committed, searches commit to different routes, so one may beat the exact one later on.
    """
    options = parse_options()
    torch.set_num_threads(options.threads)
    model, tokenizer = load(options.run and options.run / "model")
    ids = tokenizer.encode(TEXT)[:24]
    input_ids = windows_of(options.run, options.domain, options.windows) if options.run else torch.tensor([ids])
    given = (model, input_ids, RouteSpace(model.config.num_hidden_layers), options.context, options.big_layers)
    exact = search_oracle(*given)
    print("| context | search | big layers | recall | excess, nats | seconds |\n|---|---|---|---|---|---|")
    for name in options.searches:
        start = perf_counter()
        method = METHODS.get(name) or Local(search_oracle(*given, method="beam").route_ids, steps=2)
        found = search_oracle(*given, method=method)
        seconds = perf_counter() - start
        for big, excess_BT in zip(found.big_layers, found.nll - exact.nll, strict=True):
            excess = excess_BT[~excess_BT.isnan()]
            numbers = f"{(excess <= 1e-4).float().mean():.2f} | {excess.mean():.4f} | {seconds:.1f}"
            print(f"| {options.context} | {name} | {big} | {numbers} |")


def windows_of(run: Path, domain: str, windows: int) -> Tensor:
    """The first windows of so many documents of a run's test split, [windows, T]."""
    data = PackedData.open(run / "data")
    return torch.as_tensor(data.windows("test", domain, windows, windows_per_document=1, seed=0).token_ids)


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="a run folder; default: a tiny random model on a short text")
    parser.add_argument("--domain", default="code", help="which of the run's domains to read")
    parser.add_argument("--windows", type=int, default=4, help="of how many documents to read a window")
    parser.add_argument("--context", default="reference", choices=("shared", "reference", "committed"))
    parser.add_argument("--big-layers", type=int, nargs="+", default=[1])
    parser.add_argument("--searches", nargs="+", choices=NAMES, default=NAMES, metavar="NAME")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args()


if __name__ == "__main__":
    main()
