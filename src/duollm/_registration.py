"""Makes `AutoModelForCausalLM.from_pretrained` know the duo model after `import duollm`.

Importing transformers takes seconds, which `duollm --help` must not pay. So the classes are
registered at once if transformers' auto classes are loaded already, and else at the moment they are.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

_AUTO = "transformers.models.auto.modeling_auto"
_MODEL = "duollm.models.modeling_duo"


def register_when_transformers_is_used() -> None:
    """Register the duo classes now, or when transformers' auto classes get loaded."""
    if _AUTO in sys.modules:
        _load_model()
    else:
        sys.meta_path.insert(0, _AutoClassesFinder())


def _load_model() -> None:
    """Import the model's file, which registers itself (it may be what is being imported right now)."""
    if _MODEL not in sys.modules:
        import_module(_MODEL)


class _AutoClassesFinder(MetaPathFinder):
    """Waits for the import of transformers' auto classes, then steps aside."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _AUTO:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisteringLoader(spec.loader)
        return spec


class _RegisteringLoader(Loader):
    """Loads a module the usual way and then registers the duo classes."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        _load_model()
