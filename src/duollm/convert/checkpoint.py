"""`duollm convert`: a dense checkpoint in, a duo folder out, without a study."""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from duollm.config import ConvertConfig, DataConfig
from duollm.convert.dense import convert, open_dense
from duollm.convert.saving import silence_transformers
from duollm.data.packing import prepare_data
from duollm.data.tokenizer import check_vocabulary, load_tokenizer, vocabulary_size
from duollm.flops import count_parameters
from duollm.machine import peak_memory_bytes


def convert_checkpoint(
    dense: str,
    out: Path,
    config: ConvertConfig,
    text: DataConfig,
    small_intermediate_size: int | None = None,
    skip_scope: str = "ffn",
    dtype: torch.dtype | None = None,
    seed: int = 0,
) -> None:
    """Write the folder `out`: a duo whose big FFNs are those of a dense checkpoint.

    Args:
        dense: a folder or hub id.
        text: what the small FFNs are fitted to, tokenized as the model wants it.
        small_intermediate_size, skip_scope, dtype: as of `open_dense`.

    Raises:
        UserError: bad input, named in one line.
    """
    silence_transformers()
    model = open_dense(dense, small_intermediate_size, skip_scope, seed, dtype)
    check_vocabulary(dense, model.config.vocab_size, vocabulary_size(load_tokenizer(dense)))
    if config.small_init == "random":
        convert(model, dense, config, None, seed, out)
    else:
        # The training split alone: a study of the same domains and seed then has unseen test text.
        with TemporaryDirectory(prefix="duollm-") as folder:
            data = prepare_data(text, seed, Path(folder, "data"), print, only=["train"])
            convert(model, dense, config, data, seed, out, print)
    parts = count_parameters(model.config)
    total, big, small = (f"{number / 1e6:,.1f} M" for number in (parts.total, parts.big, parts.small))
    memory = f"{peak_memory_bytes() / 2**30:.1f} GiB"
    print(f"{out}: {total} parameters, {big} in big FFNs, {small} in small ones (at most {memory} of memory used)")
