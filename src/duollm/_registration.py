"""Makes `AutoConfig` and `AutoModelForCausalLM` know the duo model after `import duollm`.

Three plain lines would do it, but cost every `import duollm`, and so `duollm --help`, 2.2 s of processor time:
transformers' `AutoConfig` loads torch. So the duo's files, which register themselves, are imported at once if the auto
classes are loaded already. Otherwise they are imported together with the auto classes; or, if these are being loaded
for a part that the duo needs itself, when the auto classes are first asked for.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

_MODELS = "transformers.models.auto.modeling_auto"
_FILE_FOR = {
    "transformers.models.auto.configuration_auto": "duollm.models.configuration_duo",
    _MODELS: "duollm.models.modeling_duo",
}


def register_when_transformers_is_used() -> None:
    """Register the duo classes now, or when transformers' auto classes get loaded."""
    for auto in _FILE_FOR:
        if auto in sys.modules:
            _load_file_for(auto)
        else:
            sys.meta_path.insert(0, _AutoClassesFinder(auto))


def _load_file_for(auto: str) -> None:
    """Import the duo's file that belongs to `auto` (it may be what is being imported right now)."""
    if _FILE_FOR[auto] not in sys.modules:
        import_module(_FILE_FOR[auto])


class _AutoClassesFinder(MetaPathFinder):
    """Waits for the import of one of transformers' auto modules, steps aside, and then registers the duo's class."""

    def __init__(self, auto: str) -> None:
        self.auto = auto

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.auto:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                if not _can_load_file_for(self.auto):
                    module.__class__ = _WaitingModule

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


class _WaitingModule(ModuleType):
    """An auto module whose duo's file could not be loaded yet: tries again when one of its classes is asked for."""

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("Auto"):
            object.__setattr__(self, "__class__", ModuleType)  # the duo's file asks for the class too
            if not _can_load_file_for(self.__name__):
                object.__setattr__(self, "__class__", _WaitingModule)
        return ModuleType.__getattribute__(self, name)  # super() would look for the class that it was


def _can_load_file_for(auto: str) -> bool:
    """Load the duo's file, unless a part of transformers that its model builds on is being imported right now."""
    if auto == _MODELS:
        for name, module in list(sys.modules.items()):
            unfinished = getattr(module.__spec__, "_initializing", False) if name.startswith("transformers.") else False
            if unfinished and not auto.startswith(name):
                return False
    _load_file_for(auto)
    return True
