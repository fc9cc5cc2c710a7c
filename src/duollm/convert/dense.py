"""Stage 0: converts a dense checkpoint to a duo and derives its small FFNs from the big ones."""

from collections.abc import Callable
from math import isfinite
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from duollm.config import ConvertConfig, DataConfig
from duollm.convert.saving import History, is_duo, load_model, save_model, silence_transformers
from duollm.convert.small_ffn import initialise_small_ffns
from duollm.data.packed import PackedData
from duollm.data.packing import prepare_data
from duollm.data.tokenizer import check_vocabulary, load_tokenizer, vocabulary_size
from duollm.errors import UserError
from duollm.flops import count_parameters
from duollm.machine import peak_memory_bytes
from duollm.models.conversion import read_dense_config
from duollm.models.families import duo_config
from duollm.models.modeling_duo import DuoForCausalLM
from duollm.routes.sampling import derived_seed

_SMALL = {
    "random": "Small FFNs drawn at random",
    "slice": "Small FFNs cut out of the big ones: their most used neurons, the output matrix refitted,",
    "distilled": "Small FFNs cut out of the big ones and trained to imitate them, layer by layer,",
    "mean": "Small FFNs replaced by the mean outputs of the big ones,",
    "linear": "Small FFNs replaced by linear maps of low rank, fitted to the big ones in closed form,",
}


def open_dense(
    dense: str,
    small_intermediate_size: int | None,
    skip_scope: str,
    seed: int,
    dtype: torch.dtype | None = None,
) -> DuoForCausalLM:
    """Load a dense checkpoint as a duo with random small FFNs, in evaluation mode.

    Args:
        dense: a folder or hub id; of a duo, its big FFNs are taken.
        small_intermediate_size: inner width of the small FFNs; default: a sixteenth of the big ones'.
        dtype: of all weights; default: the checkpoint's.

    Raises:
        UserError: the checkpoint cannot be loaded, or its family is not supported.
    """
    torch.manual_seed(seed)
    try:
        duo = load_model(Path(dense)).to_dense() if is_duo(Path(dense)) else None
        if small_intermediate_size is None:
            config = duo_config(duo.config if duo else read_dense_config(dense), 1, skip_scope)
            small_intermediate_size = max(1, config.intermediate_size // 16)
        model = DuoForCausalLM.from_dense(
            duo or dense, small_intermediate_size=small_intermediate_size, skip_scope=skip_scope, dtype=dtype
        )
    except (ValueError, OSError) as error:
        raise UserError(f"{dense}: cannot be converted: {' '.join(str(error).split())}") from None
    if small_intermediate_size > model.config.intermediate_size:
        raise UserError(
            f"small_intermediate_size ({small_intermediate_size}) must not exceed the inner width of the FFNs of "
            f"{dense} ({model.config.intermediate_size})"
        )
    return model.eval()


def convert(
    model: DuoForCausalLM,
    dense: str,
    config: ConvertConfig,
    data: PackedData | None,
    seed: int,
    folder: Path,
    progress: Callable[[str], None] = lambda line: None,
) -> None:
    """Set the small FFNs of a newly opened duo; write `folder`, a Hugging Face folder with tokenizer and card.

    Args:
        model: what `open_dense(dense, ...)` returned.
        data: sample text in the tokens of the model; None only if the small FFNs stay random.

    Raises:
        UserError: too little text is asked for, or the rank of linear small FFNs exceeds the hidden size.
    """
    explained: list[float] = []
    if config.small_init != "random" and data is not None:
        windows = config.sample_tokens // data.sequence_length
        if windows < 2:
            raise UserError(
                f"sample_tokens ({config.sample_tokens}) must be at least two windows of {data.sequence_length} tokens"
            )
        sample_WT = torch.from_numpy(data.train_batch(0, windows, derived_seed(seed, windows)))
        explained = initialise_small_ffns(model, config.small_init, sample_WT, seed, config.steps, progress)
        if not all(map(isfinite, explained)):
            raise UserError(f"{dense}: its FFNs give NaN or infinity on this text; it cannot be converted")
    tokenizer = load_tokenizer(dense) if data is None else data.tokenizer
    save_model(model, tokenizer, folder, _history(dense, config, data, explained))


def _history(dense: str, config: ConvertConfig, data: PackedData | None, explained: list[float]) -> History:
    """Where the model comes from; of a folder on this machine only its name is told."""
    local = Path(dense)
    known = History.read(local) if local.is_dir() else History(base_model=dense)
    history = History(base_model=known.base_model, license=known.license)
    name = local.resolve().name if local.is_dir() else dense
    history = history.then(f"Converted from the dense checkpoint {name}, whose FFNs are the big ones")
    if data is None or not explained:
        return history.then(_SMALL[config.small_init])
    mean = f"explaining {sum(explained) / len(explained):.0%} of the variance of their outputs,"
    return history.then(f"{_SMALL[config.small_init]} {mean} on {config.sample_tokens:,} tokens", data)


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
        UserError: as `open_dense`, `prepare_data` and `convert`, or the tokenizer has tokens that the model lacks.
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
