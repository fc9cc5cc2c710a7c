"""What `--model` names, loaded: the model, its tokenizer, the run it comes from, and the policies to try."""

from argparse import Namespace
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import yaml
from torch import nn
from transformers.utils import logging

from duollm.config import DataConfig
from duollm.data.tokenizer import load_tokenizer
from duollm.errors import UserError
from duollm.evaluate.loading import load_model
from duollm.evaluate.sweep import sweep_policies
from duollm.models.modeling_duo import DuoForCausalLM

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Saved:
    """A saved duo.

    Attributes:
        folder: of the model.
        run: the run folder it belongs to, if that was given.
        seed, data: how that run divided its text; else the defaults of a recipe.
    """

    folder: Path
    run: Path | None = None
    seed: int = 0
    data: DataConfig = field(default_factory=DataConfig)

    @classmethod
    def at(cls, given: Path) -> "Saved":
        """Find the model in a folder that is either a saved duo or a run.

        Raises:
            UserError: it is neither, or the run's recipe cannot be read.
        """
        if (given / "config.json").is_file():
            return cls(given)
        if (given / "config.yaml").is_file():
            return cls._of_run(given)
        raise UserError(
            f"{given}: neither a saved duo (no config.json) nor a run folder (no config.yaml); "
            "make one with `duollm convert` or `duollm pretrain`"
        )

    @classmethod
    def _of_run(cls, run: Path) -> "Saved":
        """Read only what is needed of its recipe: a run of another version may have other keys."""
        path = run / "config.yaml"
        try:
            recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
            folder = Path(recipe["model"].get("path") or run / "model")
            return cls(folder, run, int(recipe["seed"]), DataConfig.model_validate(recipe["data"]))
        except (OSError, ValueError, TypeError, AttributeError, KeyError, yaml.YAMLError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"{path}: not the recipe of a run ({reason}); give the model's own folder") from None

    @cached_property
    def model(self) -> DuoForCausalLM:
        """The model in evaluation mode, on the GPU if there is one."""
        logging.disable_progress_bar()
        model = load_model(self.folder)
        nn.Module.to(model, "cuda" if torch.cuda.is_available() else "cpu")
        return model

    @cached_property
    def tokenizer(self) -> "PreTrainedTokenizerFast":
        """The tokenizer saved with the model, or with the run's data."""
        if self.run and not (self.folder / "tokenizer.json").is_file():
            return load_tokenizer(self.run / "data" / "tokenizer")
        return load_tokenizer(self.folder)


def policies_of(options: Namespace, model: DuoForCausalLM) -> list[str]:
    """Name the policies that the options ask for; all big if none."""
    if not options.sweep:
        return options.policy or ["all-big"]
    try:
        shares = [float(share) for share in options.shares.split(",")]
    except ValueError:
        raise UserError(f"--shares {options.shares}: give numbers with commas between, such as 0,0.5,1") from None
    return sweep_policies(options.sweep, shares, model.config.num_hidden_layers)
