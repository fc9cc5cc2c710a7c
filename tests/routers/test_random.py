import pytest
import torch

from duollm.models.branch import Branch
from duollm.routers.random import RandomRouter


@pytest.mark.parametrize("share", [0.2, 0.7])
def test_random_takes_its_share(make_random, share):
    router = make_random(kind=RandomRouter)
    positions = torch.arange(20_000)[None]
    margin_BT, _, _ = router.margin(1, torch.zeros(1, 20_000, 16), router.begin(positions))
    router.price.fill_(margin_BT.quantile(1 - share))
    choice_BT, _ = router(2, torch.zeros(1, 20_000, 16), router.begin(positions))
    assert (choice_BT == Branch.BIG).float().mean().item() == pytest.approx(share, abs=0.02)
