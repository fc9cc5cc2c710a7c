import shutil

import pytest
import torch
import yaml

from duollm.config import DataConfig
from duollm.errors import UserError
from duollm.routers.registry import make_router, save_router
from duollm.saved.model import Saved
from tiny import tiny_model
from tiny_saved import save_tiny


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    save_tiny(folder)
    return folder / "model"


@pytest.fixture
def run(model_folder, tmp_path):
    """A run folder whose tokenizer is with its data only."""
    shutil.copytree(model_folder, tmp_path / "model")
    (tmp_path / "data" / "tokenizer").mkdir(parents=True)
    for file in (tmp_path / "model").glob("tokenizer*"):
        file.rename(tmp_path / "data" / "tokenizer" / file.name)
    recipe = {"seed": 3, "model": {"path": None}, "data": DataConfig(test_share=0.3).model_dump()}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(recipe))
    return tmp_path


def test_a_saved_model_has_the_defaults_of_a_recipe(model_folder):
    saved = Saved.at(model_folder)
    assert (saved.folder, saved.run, saved.seed, saved.data) == (model_folder, None, 0, DataConfig())
    assert saved.model.config.vocab_size == 300
    assert len(saved.tokenizer) == 300


def test_a_run_brings_its_seed_split_and_tokenizer(run):
    saved = Saved.at(run)
    assert (saved.folder, saved.seed, saved.data.test_share) == (run / "model", 3, 0.3)
    assert len(saved.tokenizer) == 300


def test_a_run_knows_its_routers_by_name(run, monkeypatch):
    saved = Saved.at(run)
    router = make_router("linear", saved.model.config, ["small", "big"])
    for name, model in (("linear_k0", None), ("joint_k0", tiny_model(seed=1, vocab_size=300))):
        facts = {"kind": "linear", "branches": ["small", "big"], "big_layers": 0}
        save_router(router, run / "routers" / name, facts, model)
    for name in ("linear_k0", "router:linear_k0", f"router:{run / 'routers' / 'linear_k0'}"):
        routed = saved.routed(name)
        assert (routed.name, type(routed.policy)) == (name, type(router))
        assert routed.model is saved.model
    monkeypatch.chdir(run)
    for name in ("joint_k0", "router:routers/joint_k0"):
        together = saved.routed(name).model.cpu()
        assert torch.equal(together.lm_head.weight, tiny_model(seed=1, vocab_size=300).lm_head.weight)
    with pytest.raises(UserError, match="unknown policy 'linear_k1'"):
        saved.routed("linear_k1")


@pytest.mark.parametrize("text", ["[", "- 1", "sed: 0", "data: {domains: 3}"])
def test_a_run_without_a_readable_recipe_is_refused(run, text):
    (run / "config.yaml").write_text(text)
    with pytest.raises(UserError, match=r"config.yaml: .+; mend that recipe, or give the folder of the model itself"):
        Saved.at(run)


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(UserError, match="neither a saved duo"):
        Saved.at(tmp_path)


@pytest.mark.parametrize(
    ("kind", "names"),
    [("spread", ["spread:0", "spread:1", "spread:3"]), ("random", ["random:0", "random:0.25", "random:1"])],
)
def test_a_sweep_names_policies_by_whole_layers_unless_they_are_random(model_folder, kind, names):
    assert Saved.at(model_folder).swept(kind, [0, 0.25, 1]) == names


def test_an_unknown_sweep_is_explained(model_folder):
    with pytest.raises(UserError, match="sweep spred: did you mean 'spread'"):
        Saved.at(model_folder).swept("spred", [0])
