"""What `--model` names, loaded: the model, its tokenizer, the run it comes from, and the policies to try."""

from argparse import Namespace
from dataclasses import dataclass, field, replace
from functools import cached_property
from os.path import isfile
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from duollm import strict_yaml
from duollm.config import DataConfig
from duollm.convert.saving import load_model, silence_transformers
from duollm.data.tokenizer import check_vocabulary, load_tokenizer, vocabulary_size
from duollm.errors import UserError, in_a_line
from duollm.measure.scoring import Routed, sweep_policies
from duollm.models.modeling_duo import DuoForCausalLM
from duollm.routers.policies import parse_policy

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Saved:
    """A saved duo.

    Attributes:
        folder: of the model.
        run: the run folder it belongs to, if that was given.
        seed, data: how that run divided its text; else the defaults of a recipe.
        dtype: of the weights; "auto": as saved.
    """

    folder: Path
    run: Path | None = None
    seed: int = 0
    data: DataConfig = field(default_factory=DataConfig)
    dtype: torch.dtype | Literal["auto"] = torch.float32

    @classmethod
    def at(cls, given: Path, dtype: torch.dtype | Literal["auto"] = torch.float32) -> "Saved":
        """Find the model in a folder that is either a saved duo or a run.

        Raises:
            UserError: it is neither, or the run's recipe cannot be read.
        """
        if (given / "config.json").is_file():
            return cls(given, dtype=dtype)
        if (given / "config.yaml").is_file():
            return replace(cls._of_run(given), dtype=dtype)
        raise UserError(
            f"{given}: neither a saved duo (no config.json) nor a run folder (no config.yaml); "
            "make one with `duollm convert` or `duollm pretrain`"
        )

    @classmethod
    def _of_run(cls, run: Path) -> "Saved":
        """Read only what is needed of its recipe: a run of another version may have other keys."""
        path = run / "config.yaml"
        try:
            recipe = strict_yaml.load(path.read_text(encoding="utf-8"))
            folder = Path(recipe["model"].get("path") or run / "model")
            return cls(folder, run, int(recipe["seed"]), DataConfig.model_validate(recipe["data"]))
        except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
            raise UserError(
                f"{path}: not the recipe of a run ({in_a_line(error)}); give the model's own folder"
            ) from None

    @cached_property
    def model(self) -> DuoForCausalLM:
        """The model in evaluation mode, on the GPU if there is one."""
        silence_transformers()
        model = load_model(self.folder, self.dtype)
        nn.Module.to(model, "cuda" if torch.cuda.is_available() else "cpu")
        return model

    @cached_property
    def tokenizer(self) -> "PreTrainedTokenizerFast":
        """The tokenizer saved with the model, or with the run's data.

        Raises:
            UserError: it cannot be loaded, or has tokens that the model does not know.
        """
        folder = self.folder
        if self.run and not (folder / "tokenizer.json").is_file():
            folder = self.run / "data" / "tokenizer"
        tokenizer = load_tokenizer(folder)
        check_vocabulary(f"--model {self.folder}", self.model.config.vocab_size, vocabulary_size(tokenizer))
        return tokenizer

    def routed(self, name: str) -> Routed:
        """Make a policy by name (see `parse_policy`); a run's routers go by their names in it.

        A router that was trained together with its model comes with that model.

        Raises:
            UserError: unknown policy, or one that the model does not allow.
        """
        given = Path(name.removeprefix("router:"))
        folders = [given] if self.run is None else [given, self.run / "routers" / given]
        router = next((folder for folder in folders if isfile(folder / "router.json")), None)
        if router is None:
            return Routed(name, self.model, parse_policy(name, self.model))
        together = router / "model"
        model = replace(self, folder=together).model if together.is_dir() else self.model
        return Routed(name, model, parse_policy(f"router:{router}", model))


def policies_of(options: Namespace, model: DuoForCausalLM) -> list[str]:
    """Name the policies that the options ask for; all big if none."""
    if not options.sweep:
        return options.policy or ["all-big"]
    try:
        shares = [float(share) for share in options.shares.split(",")]
    except ValueError:
        raise UserError(f"--shares {options.shares}: give numbers with commas between, such as 0,0.5,1") from None
    return sweep_policies(options.sweep, shares, model.config.num_hidden_layers)
