"""PEFT's defaults for the duo: those for Llama, whose parts have the same names. Loaded with PEFT, never without."""

from peft.utils import constants

for _name, _of_models in vars(constants).items():
    if _name.endswith("_MODULES_MAPPING") and "llama" in _of_models:
        _of_models.setdefault("duo", _of_models["llama"])
