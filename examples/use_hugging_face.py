"""A duo in the ways of transformers: save, load by AutoModelForCausalLM, generate under routes.

python examples/use_hugging_face.py --folder duo --model runs/quick/model
"""

import argparse
from pathlib import Path
from tempfile import mkdtemp

import torch
from loading import load
from transformers import AutoModelForCausalLM

from duollm import Branch, RouteSpace


def main() -> None:
    """Save and load a model, then generate with all small, all big and a mixed route."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a saved duo with its tokenizer; default: a tiny random one")
    parser.add_argument("--folder", type=Path, help="where to save; default: a temporary folder")
    parser.add_argument("--prompt", default="The state of the Union is")
    parser.add_argument("--new-tokens", type=int, default=20)
    options = parser.parse_args()
    model, tokenizer = load(options.model)
    folder = options.folder or Path(mkdtemp(prefix="duo-"))
    model.save_pretrained(folder)

    loaded = AutoModelForCausalLM.from_pretrained(folder).eval()  # known because duollm is imported
    input_ids = torch.tensor([tokenizer.encode(options.prompt)])
    assert torch.equal(loaded(input_ids).logits, model(input_ids).logits)
    print(f"saved to {folder} and loaded: a {type(loaded).__name__} with the same logits")

    layers = loaded.config.num_hidden_layers
    half_big = RouteSpace(layers).decode(torch.tensor(2 ** (layers // 2) - 1))  # the later half of the layers
    routes = {
        "all small": torch.full((layers,), int(Branch.SMALL)),
        "late layers big": half_big,
        "all big (default)": None,
    }
    for name, route in routes.items():
        generated = loaded.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            routes=route,
            max_new_tokens=options.new_tokens,
            do_sample=False,
        )
        print(f"{name:18} {tokenizer.decode(generated[0].tolist())!r}")


if __name__ == "__main__":
    main()
