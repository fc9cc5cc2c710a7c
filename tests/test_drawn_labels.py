"""Labels drawn from another model: refused before work starts if it does not fit, and read off a study if it does."""

import json
import shutil

import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM

from duollm.checks import check_recipe
from duollm.config import Recipe
from duollm.convert.saving import load_model
from duollm.data.packed import PackedData
from duollm.errors import UserError
from duollm.routes.space import RouteSpace
from duollm.study import run_study
from tiny_dense import write_dense
from tiny_saved import save_tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`model`, a duo; `teacher`, a dense model of the same tokenizer; `foreign`, one of another tokenizer."""
    folder = tmp_path_factory.mktemp("labels")
    _, texts = save_tiny(folder)
    for name, vocabulary in (("teacher", 300), ("foreign", 290)):
        write_dense(folder / name, texts, vocabulary)
    shutil.copy(folder / "model" / "tokenizer.json", folder / "teacher")
    return folder


def recipe(folder, labels_from, length=16, tokenizer="model", **oracle):
    return Recipe.model_validate(
        {
            "model": {"path": str(folder / "model")},
            "data": {
                "domains": [str(folder / "owls")],
                "tokenizer": tokenizer and str(folder / tokenizer),
                "sequence_length": length,
                "test_share": 0.3,
            },
            "router": {"big_layers": [1]},
            "oracle": {"documents": 3, "labels_from": labels_from and str(folder / labels_from), **oracle},
        }
    )


def test_a_study_draws_labels_from_another_model(folder, tmp_path):
    run_study(recipe(folder, "teacher", labels_temperature=0.7), tmp_path, ["duollm"], "oracle")
    table = pd.read_parquet(tmp_path / "oracle" / "owls.parquet")
    space, data = RouteSpace(3), PackedData.open(tmp_path / "data")
    token_ids = torch.from_numpy(data.windows("test", "owls", 3, 1, 0).token_ids)[:, :-1]
    model = load_model(folder / "model")
    with torch.no_grad():
        teacher = AutoModelForCausalLM.from_pretrained(folder / "teacher")
        p_NV = (teacher(token_ids).logits / 0.7).softmax(-1).flatten(0, 1)
        log_q_RNV = torch.stack(
            [model(token_ids, routes=space.decode(r)).logits.log_softmax(-1).flatten(0, 1) for r in range(space.size)]
        )
    route_N = torch.tensor(table["route_static_k1"])
    expected_N = -(p_NV * log_q_RNV[route_N, torch.arange(len(route_N))]).sum(-1)
    torch.testing.assert_close(torch.from_numpy(table["expected_static_k1"].to_numpy()), expected_N, atol=1e-4, rtol=0)
    manifest = json.loads((tmp_path / "oracle" / "manifest.json").read_text())
    assert manifest["labels_temperature"] == 0.7
    assert len(manifest["labels_from"]) == 16  # the weights' fingerprint: another model in that folder is another study


def test_a_recipe_that_draws_from_its_own_model_says_nothing_of_labels(folder, tmp_path):
    run_study(recipe(folder, None), tmp_path, ["duollm"], "oracle")
    assert not [key for key in json.loads((tmp_path / "oracle" / "manifest.json").read_text()) if "labels_" in key]


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        (
            {"labels_from": "foreign"},
            r"foreign has another tokenizer \(290 tokens\) than .*model \(300\); give a model",
        ),
        ({"labels_from": "nowhere"}, "neither a folder with tokenizer.json nor a hub id"),
        ({"labels_from": "teacher", "tokenizer": None}, "must have the tokenizer of the data, and this study trains"),
        ({"labels_from": "teacher", "length": 65}, "teacher reads 64 tokens, data.sequence_length is 65; make windows"),
    ],
)
def test_a_model_that_does_not_fit_is_refused_in_one_line(folder, changes, complaint):
    with pytest.raises(UserError, match=rf"^oracle\.labels_from: .*{complaint}") as error:
        check_recipe(recipe(folder, **changes), load_model(folder / "model").config, runs=True)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("settings", [{"resampled_labels": 0}, {"search": "beam"}])
def test_labels_that_are_never_drawn_are_refused(folder, settings):
    with pytest.raises(UserError, match=r"^oracle\.labels_from and .* are about drawn labels, and there are none"):
        check_recipe(recipe(folder, "teacher", **settings), load_model(folder / "model").config)
