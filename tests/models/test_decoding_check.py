import pytest
import torch

from duollm import DuoForCausalLM
from duollm.models.decoding_check import check_cached_decoding
from tiny import random_ids, tiny_model


class ForgetfulForCausalLM(DuoForCausalLM):
    """What a release of transformers that renames the cache makes of a model: every step starts an empty one."""

    def forward(self, *args, cache=None, past_key_values=None, **kwargs):
        return super().forward(*args, **kwargs)


def test_the_installed_version_decodes_with_a_cache_as_without():
    model = tiny_model()
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    check_cached_decoding(model)
    assert torch.equal(torch.rand(2), expected)  # the random state is left alone


def test_a_version_that_does_not_is_refused_in_one_line():
    model, ids = ForgetfulForCausalLM(tiny_model().config), random_ids()
    with pytest.raises(RuntimeError, match=r"^with transformers \S+ generating with a cache differs .*pip install.*$"):
        model.generate(ids, max_new_tokens=2, pad_token_id=0)
    assert model.generate(ids, max_new_tokens=2, pad_token_id=0, use_cache=False).shape == (len(ids), ids.shape[1] + 2)
