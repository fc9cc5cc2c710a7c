import pytest
import torch

from duollm.errors import UserError
from duollm.models.branch import Branch
from duollm.routers.policies import POLICIES, RandomShare, parse_policy
from duollm.routers.registry import save_router
from duollm.routes.sampling import uniform_hash
from tiny import random_ids, tiny_model

BIG, SMALL, SKIP = Branch.BIG, Branch.SMALL, Branch.SKIP


@pytest.fixture(scope="module")
def model():
    return tiny_model(num_hidden_layers=6)


@pytest.mark.parametrize(
    ("text", "route"),
    [
        ("all-big", "222222"),
        ("all-small", "111111"),
        ("all-skip", "000000"),
        ("first:2", "221111"),
        ("last:2", "111122"),
        ("spread:2", "121121"),
        ("spread:3", "121212"),
        ("spread:1", "111211"),
        ("spread:0", "111111"),
        ("spread:6", "222222"),
        ("random:0", "111111"),
        ("random:1", "222222"),
        ("routes:012210", "012210"),
    ],
)
def test_a_name_gives_its_routes(model, text, route):
    taken_BTL = model(random_ids(), policy=parse_policy(text, model)).routes
    assert (taken_BTL == torch.tensor([int(digit) for digit in route])).all()


@pytest.mark.parametrize("share", [0.1, 0.25, 0.9])
def test_random_meets_its_share_in_every_layer_and_at_every_position(share):
    drawn_LT = torch.stack([uniform_hash(3, torch.arange(4000), layer) for layer in range(200)]) < share
    assert drawn_LT.double().mean() == pytest.approx(share, abs=0.003)
    assert (drawn_LT.double().mean(1) - share).abs().max() < 0.04
    assert (drawn_LT.double().mean(0) - share).abs().max() < 0.16


def test_random_draws_of_layers_positions_and_seeds_are_unrelated():
    first = uniform_hash(0, torch.arange(20_000), 0)
    others = [
        uniform_hash(0, torch.arange(20_000), 1),
        uniform_hash(1, torch.arange(20_000), 0),
        uniform_hash(0, torch.arange(1, 20_001), 0),
        uniform_hash(-1, torch.arange(20_000), 0),
    ]
    for other in others:
        assert abs(torch.corrcoef(torch.stack([first, other]))[0, 1]) < 0.03


def test_random_decides_by_position_alone(model):
    policy = parse_policy("random:0.5:7", model)
    ids_BT = random_ids(batch=3, tokens=9)
    whole_BTL = model(ids_BT, policy=policy).routes
    assert len(whole_BTL.unique()) == 2
    cache, steps = None, []
    for position in range(9):
        output = model(ids_BT[:, position : position + 1], past_key_values=cache, use_cache=True, policy=policy)
        cache = output.past_key_values
        steps.append(output.routes)
    assert torch.equal(torch.cat(steps, 1), whole_BTL)
    assert torch.equal(model(ids_BT[:1], policy=policy).routes, whole_BTL[:1])
    assert not torch.equal(model(ids_BT, policy=RandomShare(0.5, seed=8)).routes, whole_BTL)


def test_left_padding_does_not_shift_random_choices(model):
    policy, ids_BT = RandomShare(0.5), random_ids(batch=1, tokens=5)
    padded_BT = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids_BT], 1)
    mask_BT = (torch.arange(8) >= 3)[None].long()
    positions_BT = (mask_BT.cumsum(1) - 1).clamp(min=0)
    padded = model(padded_BT, attention_mask=mask_BT, position_ids=positions_BT, policy=policy)
    plain = model(ids_BT, policy=policy)
    assert torch.equal(padded.routes[:, 3:], plain.routes)
    torch.testing.assert_close(padded.logits[:, 3:], plain.logits)


@pytest.mark.parametrize("form", ["router:{}", "{}"], ids=["named", "bare"])
def test_a_router_folder(model, make_random, tmp_path, form):
    router = make_random(num_hidden_layers=6)
    save_router(router, tmp_path / "mine", {"kind": "linear", "branches": ["small", "big"]})
    policy = parse_policy(form.format(tmp_path / "mine"), model)
    ids_BT = random_ids()
    assert torch.equal(model(ids_BT, policy=policy).routes, model(ids_BT, policy=router).routes)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("all-bif", "did you mean 'all-big'"),
        ("all-big:3", "takes no argument"),
        ("random", "such as random:0.25"),
        ("random:1.5", "in 0 .. 1"),
        ("random:nan", "in 0 .. 1"),
        ("random:0.5:x", "perhaps a seed"),
        ("spread:7", "0 .. 6"),
        ("first:x", "0 .. 6"),
        ("last:", "0 .. 6"),
        ("routes:0123", "6 digits"),
        ("routes:000003", "0 skip, 1 small, 2 big"),
        ("router:nowhere", "not a router folder"),
        ("router:", "policy router: names no router; give the folder of one"),
    ],
)
def test_mistakes_are_explained(model, text, complaint):
    with pytest.raises(UserError, match=complaint):
        parse_policy(text, model)


def test_forms_begin_with_their_names():
    assert all(form.split(":")[0] == name for name, (form, _) in POLICIES.items())
