"""`duollm convert`: a duo folder from a dense checkpoint, without a study."""

from argparse import Namespace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from pydantic import ValidationError

from duollm.config import ConvertConfig, DataConfig, explain
from duollm.convert.dense import convert, open_dense
from duollm.convert.saving import silence_transformers
from duollm.data.packing import prepare_data
from duollm.data.tokenizer import check_vocabulary, load_tokenizer, vocabulary_size
from duollm.errors import UserError
from duollm.files import check_folder
from duollm.flops import count_parameters
from duollm.machine import peak_memory_bytes
from duollm.models.modeling_duo import DuoForCausalLM

_TYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def convert_checkpoint(options: Namespace) -> None:
    """Write the folder `options.out`.

    Raises:
        UserError: bad input, named in one line.
    """
    silence_transformers()
    out, config, text = Path(options.out), *_settings(options)
    check_folder("--out", out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out} exists already; give a new folder")
    model = open_dense(
        options.dense, options.small_intermediate_size, options.skip_scope, options.seed, _TYPES[options.dtype]
    )
    check_vocabulary(options.dense, model.config.vocab_size, vocabulary_size(load_tokenizer(options.dense)))
    if config.small_init == "random":
        convert(model, options.dense, config, None, options.seed, out)
    else:
        # The training split alone: a study of the same domains and seed then has unseen test text.
        with TemporaryDirectory(prefix="duollm-") as folder:
            data = prepare_data(text, options.seed, Path(folder, "data"), print, only=["train"])
            convert(model, options.dense, config, data, options.seed, out, print)
    total, big, small = (f"{number / 1e6:,.1f} M" for number in _sizes(model))
    memory = f"{peak_memory_bytes() / 2**30:.1f} GiB"
    print(f"{out}: {total} parameters, {big} in big FFNs, {small} in small ones (at most {memory} of memory used)")


def _settings(options: Namespace) -> tuple[ConvertConfig, DataConfig]:
    """The options as sections of a recipe, which know what is allowed."""
    try:
        config = ConvertConfig(small_init=options.small_init, sample_tokens=options.sample_tokens, steps=options.steps)
        domains, length = options.domains.split(","), options.sequence_length
        return config, DataConfig(domains=domains, tokenizer=options.dense, sequence_length=length)
    except ValidationError as error:
        key, fault = explain(error)
        raise UserError(f"--{key.partition('.')[0].replace('_', '-') or 'domains'}: {fault}") from None


def _sizes(model: DuoForCausalLM) -> tuple[int, int, int]:
    parts = count_parameters(model.config)
    return parts.total, parts.big, parts.small
