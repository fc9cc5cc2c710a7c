"""How close the approximate searches come to the exact oracle on a model that is not too deep for it.

python examples/compare_searches.py --run runs/quick --domain code --context reference --big-layers 4 6
"""

import argparse
from functools import partial
from pathlib import Path

import torch
from loading import TEXT, load
from torch import Tensor

from duollm import RouteSpace
from duollm.data.packed import PackedData
from duollm.oracle.searches import SEARCHES, beam_search, compare_with_exact, local_search


def local_from_beam(*given, **options):
    """A beam, whose picks are then bettered by two steps of local search."""
    return local_search(*given, **options, start=beam_search(*given, **options).route_ids, steps=2)


CHOICES = (
    SEARCHES
    | {f"beam {width}": partial(beam_search, width=width) for width in (32, 128, 256)}
    | {"local from beam": local_from_beam}
)


def main() -> None:
    """Compare and print a Markdown table."""
    options = parse_options()
    torch.set_num_threads(options.threads)
    model, tokenizer = load(options.run and options.run / "model")
    if options.run:
        input_ids = windows_of(options.run, options.domain, options.windows)
    else:
        input_ids = torch.tensor([tokenizer.encode(TEXT)[:24]])
    space = RouteSpace(model.config.num_hidden_layers)
    searches = {name: CHOICES[name] for name in options.searches}
    print("| context | search | big layers | recall | excess, nats | seconds |\n|---|---|---|---|---|---|")
    for row in compare_with_exact(model, input_ids, space, options.context, options.big_layers, searches):
        numbers = f"{row.big} | {row.recall:.2f} | {row.excess:.4f} | {row.seconds:.1f}"
        print(f"| {options.context} | {row.name} | {numbers} |")


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
    parser.add_argument("--searches", nargs="+", choices=CHOICES, default=list(CHOICES), metavar="NAME")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args()


if __name__ == "__main__":
    main()
