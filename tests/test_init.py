import pytest

import duollm
from duollm.models.modeling_duo import DuoForCausalLM
from duollm.routes.space import RouteSpace


@pytest.mark.parametrize("name", duollm.__all__)
def test_every_public_name_loads(name):
    assert getattr(duollm, name).__name__ == name


def test_public_names_are_the_objects_of_their_modules():
    assert duollm.DuoForCausalLM is DuoForCausalLM
    assert duollm.RouteSpace is RouteSpace


def test_an_unknown_name_is_an_ordinary_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Router'; it offers Branch"):
        duollm.Router  # noqa: B018
