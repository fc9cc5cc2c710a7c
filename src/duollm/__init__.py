"""duollm: study adaptive computation in language models.

The names below are loaded when they are first used, so that `duollm --help` needs no torch.
"""

from importlib import import_module
from typing import Any

from duollm import _registration

__version__ = "0.1.0"

_HOME = {
    "Branch": "duollm.models.branch",
    "DuoConfig": "duollm.models.configuration_duo",
    "DuoForCausalLM": "duollm.models.modeling_duo",
    "RouteSpace": "duollm.routes.space",
    "loss_table": "duollm.oracle.search",
    "search_oracle": "duollm.oracle.search",
}
__all__ = list(_HOME)

_registration.register_when_transformers_is_used()


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'duollm' has no attribute {name!r}; it offers {', '.join(_HOME)}")
    return getattr(import_module(_HOME[name]), name)
