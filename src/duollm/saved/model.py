"""A saved model: loaded with its tokenizer, the run that it comes from, and its policies by name."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from os.path import isfile
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import nn

from duollm.config import DataConfig
from duollm.convert.saving import load_model, silence_transformers
from duollm.data.tokenizer import check_vocabulary, load_tokenizer, vocabulary_size
from duollm.errors import UserError, did_you_mean
from duollm.models.modeling_duo import DuoForCausalLM
from duollm.models.policy import Policy
from duollm.recipe_files import load_recipe
from duollm.routers.policies import parse_policy

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


SWEEPS = ("spread", "random", "first", "last")
"""Kinds of policies that can be swept over the share of big."""


class Routed(NamedTuple):
    """A model, the policy that routes it, and how the user named that policy."""

    name: str
    model: DuoForCausalLM
    policy: Policy


@dataclass(frozen=True)
class Saved:
    """A saved duo.

    Attributes:
        folder: the folder of the model.
        run: the run folder that the model belongs to, if a run was given.
        seed, data: how that run divided its text; without a run, the defaults of a recipe.
        dtype: dtype of the weights; "auto": as they are saved.
    """

    folder: Path
    run: Path | None = None
    seed: int = 0
    data: DataConfig = field(default_factory=DataConfig)
    dtype: torch.dtype | Literal["auto"] = torch.float32

    @property
    def given(self) -> Path:
        """The folder that was named: the run, or the model."""
        return self.run or self.folder

    @classmethod
    def at(cls, given: Path, dtype: torch.dtype | Literal["auto"] = torch.float32) -> "Saved":
        """Find the model in a folder that is either a saved duo or a run.

        Raises:
            UserError: it is neither, or the run's recipe cannot be read.
        """
        if (given / "config.json").is_file():
            return cls(given, dtype=dtype)
        if (given / "config.yaml").is_file():
            try:
                recipe = load_recipe(given / "config.yaml")
            except UserError as error:
                raise UserError(f"{error}; mend that recipe, or give the folder of the model itself") from None
            return cls(Path(recipe.model.path or given / "model"), given, recipe.seed, recipe.data, dtype)
        raise UserError(
            f"{given}: neither a saved duo (no config.json) nor a run folder (no config.yaml); "
            "make one with `duollm convert` or `duollm pretrain`"
        )

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
        check_vocabulary(str(self.folder), self.model.config.vocab_size, vocabulary_size(tokenizer))
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

    def swept(self, kind: str, shares: Sequence[float]) -> list[str]:
        """Name the policies of one kind at given shares of big, to whole layers unless `kind` is random.

        Raises:
            UserError: unknown kind.
        """
        if kind not in SWEEPS:
            raise UserError(f"sweep {kind}: {did_you_mean(kind, SWEEPS)}")
        layers = self.model.config.num_hidden_layers
        return [f"{kind}:{f'{share:g}' if kind == 'random' else round(share * layers)}" for share in shares]
