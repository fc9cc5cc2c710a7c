"""A whole study of a tiny model on tiny texts, and what is done again after a change, a kill or damage."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from duollm import cli
from duollm.analysis.analyse import analyse
from duollm.config import Recipe
from duollm.data.packed import PackedData
from duollm.errors import UserError
from duollm.files import write_text
from duollm.records.patterns import first_half
from duollm.report.page import write_report
from duollm.routers.registry import load_router
from duollm.routes.space import RouteSpace
from duollm.study import load_model, run_study
from reading_pages import data_of
from tiny import SIZES, tiny_model
from tiny_corpus import write_corpus

STAGES = ["data", "pretrain", "oracle", "ceiling", "linear_k1", "linear_k2", "train-router", "evaluate", "report"]

pytestmark = pytest.mark.usefixtures("quick_machine")


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    return [str(write_corpus(folder / name, documents=30, seed=seed)) for seed, name in enumerate(["owls", "cats"])]


@pytest.fixture(scope="module")
def values(corpora):
    """The recipe, as YAML would give it."""
    sizes = {"hidden_size", "num_hidden_layers", "intermediate_size", "small_intermediate_size"}
    return {
        "name": "tiny",
        "model": {key: SIZES[key] for key in sizes},
        "data": {"domains": corpora, "vocab_size": 300, "sequence_length": 16, "test_share": 0.3},
        "pretrain": {"tokens": 2000, "batch_size": 8, "precision": "fp32"},
        "oracle": {"documents": 6, "random_routes": 3},
        "router": {"kinds": ["linear"], "big_layers": [1, 2], "tokens": 1000, "batch_size": 8, "precision": "fp32"},
        "ceiling": {"tokens": 500, "width": 4, "precision": "fp32"},
        "report": {"bootstrap_samples": 100, "shown_documents": 1},
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory, values):
    """A finished run; read only."""
    run = tmp_path_factory.mktemp("study") / "run"
    run_study(Recipe.model_validate(values), run, ["duollm", "study"])
    return run


@pytest.fixture
def run(finished, tmp_path):
    """A copy of it that a test may change."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def again(values, capsys, monkeypatch):
    """Run with changed values, without drawing figures, and return the stages that were not skipped."""

    def write_empty_report(run, shown_documents, missing=(), figures=True):
        if figures:
            (run / "figures").mkdir(exist_ok=True)
        write_text(run / "report.html", f"missing: {', '.join(missing)}")

    monkeypatch.setattr("duollm.study.write_report", write_empty_report)

    def run_again(run, until="report", **changes):
        changed = {key: values.get(key, {}) | change for key, change in changes.items()}
        capsys.readouterr()
        run_study(Recipe.model_validate(values | changed), run, ["duollm", "study"], until)
        shown = capsys.readouterr().out
        return [stage for stage in STAGES if f"\n{stage}: done in" in shown]

    return run_again


def test_the_models_card_tells_its_training_and_its_losses(finished):
    card = (finished / "model" / "README.md").read_text(encoding="utf-8")
    assert "Trained from scratch on 2,000 tokens" in card
    assert "| router (linear) |" in card


def test_a_study_leaves_what_the_formats_page_lists(finished):
    made = {str(path.relative_to(finished)) for path in finished.rglob("*") if path.is_file()}
    expected = {"config.yaml", "provenance.json", "metrics.jsonl", "results.json", "report.html"}
    expected |= {f"stages/{stage}.json" for stage in STAGES}
    expected |= {f"oracle/{domain}{kind}.parquet" for domain in ("owls", "cats") for kind in ("", ".routes")}
    expected |= {f"evaluate/linear_k{k}/{domain}.parquet" for domain in ("owls", "cats") for k in (1, 2)}
    expected |= {"evaluate/timing.json"}
    expected |= {f"routers/linear_k{k}/router.{kind}" for kind in ("json", "safetensors") for k in (1, 2)}
    expected |= {"model/config.json", "model/model.safetensors", "model/tokenizer.json"}
    assert expected <= made
    assert not [name for name in made if "resume" in name or "partial" in name or "started" in name]
    assert "<html" in (finished / "report.html").read_text(encoding="utf-8")


def test_the_stored_recipe_is_complete_and_gives_the_same_study(finished, run, capsys):
    stored = yaml.safe_load((finished / "config.yaml").read_text())
    assert set(stored) == set(Recipe.model_fields)
    run_study(Recipe.model_validate(stored), run, ["duollm", "study"])
    *lines, last = capsys.readouterr().out.splitlines()
    assert lines[: len(STAGES)] == [f"{stage}: unchanged" for stage in STAGES]
    assert f"duollm compare {run}" in "".join(lines[len(STAGES) :])
    assert last.startswith(f"report is up to date: {run / 'report.html'} (at most ")


def test_results_hold_every_policy(finished):
    results = json.loads((finished / "results.json").read_text())
    policies = {row["policy"] for row in results["nll"]}
    assert {"all-small", "all-big", "oracle", "static", "linear_k1", "linear_k2"} <= policies
    assert all(np.isfinite(row["nll"]["value"]) for row in results["nll"])


@pytest.mark.parametrize("domain", ["owls", "cats"])
def test_routers_are_scored_on_the_oracles_tokens(finished, domain):
    key = ["document", "window", "position", "token_id"]
    oracle = pq.read_table(finished / "oracle" / f"{domain}.parquet", columns=key).to_pandas()
    assert len(oracle) == 6 * 15
    for k in (1, 2):
        scored = pq.read_table(finished / "evaluate" / f"linear_k{k}" / f"{domain}.parquet", columns=key).to_pandas()
        assert len(scored.merge(oracle)) == len(oracle) < len(scored)


def test_gains_are_measured_on_more_text_than_the_oracles(finished):
    results = json.loads((finished / "results.json").read_text())
    tokens = {domain: size["compared_tokens"] for domain, size in results["data"].items()}
    assert tokens["owls"] > results["data"]["owls"]["tokens"]
    [router] = [row for row in results["comparison"] if (row["policy"], row["domain"]) == ("linear_k1", "owls")]
    assert router["gain_tokens"] == tokens["owls"]
    table = pq.read_table(finished / "evaluate" / "linear_k1" / "owls.parquet").to_pandas()
    patterns = pq.read_table(finished / "evaluate" / "owls.routes.parquet").to_pandas()
    assert set(patterns["document"]) == set(table["document"])
    space = RouteSpace(3)
    one_big = patterns[space.count_big(patterns["route"].to_numpy()) == 1]
    halves = first_half(table["document"].nunique(), seed=0)
    names, saved = sorted(table["document"].unique()), 0.0
    for half in (True, False):
        scored = [name for name, first in zip(names, halves, strict=True) if first == half]
        sums = one_big[~one_big["document"].isin(scored)].groupby("route")["nll_sum"].sum()
        mine = one_big[(one_big["route"] == sums.idxmin()) & one_big["document"].isin(scored)]
        saved += mine["nll_sum"].sum() - table[table["document"].isin(scored)]["nll"].sum()
    assert router["gain_over_static"]["value"] == pytest.approx(saved / len(table), abs=1e-5)


def test_the_stored_losses_of_a_router_are_those_of_its_model(finished):
    data, model = PackedData.open(finished / "data"), load_model(finished / "model")
    router, _ = load_router(finished / "routers" / "linear_k1", model.config)
    table = pq.read_table(finished / "evaluate" / "linear_k1" / "owls.parquet").to_pydict()
    windows = data.windows("test", "owls", 48, 3, seed=0)
    ids_WT = torch.from_numpy(windows.token_ids)
    output = model(ids_WT, policy=router)
    nll_WT = -output.logits[:, :-1].log_softmax(-1).gather(-1, ids_WT[:, 1:, None])[..., 0]
    np.testing.assert_allclose(table["nll"], nll_WT.flatten().tolist(), atol=1e-4)
    assert table["route"] == RouteSpace(3).encode(output.routes[:, :-1]).flatten().tolist()
    assert table["document"] == np.repeat(windows.documents, 15).tolist()


def test_a_second_run_does_nothing(run, again):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*.parquet")}
    assert again(run) == []
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*.parquet")}


@pytest.mark.parametrize(
    ("changes", "redone"),
    [
        ({"router": {"learning_rate": 0.02}}, ["linear_k1", "linear_k2", "train-router", "evaluate", "report"]),
        ({"router": {"big_layers": [1, 2, 3]}}, ["ceiling", "train-router", "evaluate", "report"]),
        ({"oracle": {"random_routes": 4}}, ["oracle", "evaluate", "report"]),
        ({"oracle": {"memory_gib": 0.5}}, []),
        ({"ceiling": {"tokens": 600}}, ["ceiling", "report"]),
        ({"report": {"bootstrap_samples": 200}}, ["report"]),
        ({"pretrain": {"log_every": 3, "checkpoint_every": 7}}, []),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_a_changed_setting_redoes_what_it_touches(run, again, changes, redone):
    assert again(run, **changes) == redone
    assert again(run, **changes) == []


def test_the_ceiling_is_scored_on_the_oracles_tokens_and_goes_when_it_is_switched_off(run, again):
    results = json.loads((run / "results.json").read_text())
    measured = {(row["depth"], row["big_layers"]) for row in results["ceiling"]}
    assert {(depth, 1) for depth in range(3)} < measured
    assert {k for _, k in measured} == {1, 2}
    assert {row["domain"] for row in results["decomposition"]} == {"owls", "cats", "pooled"}
    assert again(run, ceiling={"enabled": False}) == ["ceiling", "report"]
    assert not (run / "ceiling").exists()
    assert json.loads((run / "results.json").read_text())["decomposition"] == []


def test_routers_taught_by_the_oracle_share_labels(run, again):
    router = {"kinds": ["codebook", "distilled"], "big_layers": [1], "label_tokens": 40}
    again(run, until="train-router", router=router)
    labels = run / "labels" / "losses.safetensors"
    assert load_file(labels)["losses"].shape == (2, 3, 15, 8), "windows of 15 predictions, all routes of three layers"
    made = labels.stat().st_mtime_ns
    router |= {"label_temperature": 0.5, "decide_at": 0, "big_layers": [1, 2]}
    again(run, until="train-router", router=router)
    assert labels.stat().st_mtime_ns == made
    assert (run / "routers" / "codebook_k2" / "router.json").exists()
    again(run, until="train-router", router=router | {"label_tokens": 20})
    assert len(load_file(labels)["token_ids"]) == 2
    again(run, until="train-router", router=router | {"label_routes": 2, "label_tokens": 18})
    assert load_file(labels)["losses"].shape[-1] < 8


def test_until_stops_early_and_a_killed_study_continues(tmp_path, again, monkeypatch):
    def die(*arguments, **settings):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("duollm.study.OracleRun", die)
        with pytest.raises(KeyboardInterrupt):
            again(tmp_path / "run")
    weights = (tmp_path / "run" / "model" / "model.safetensors").stat().st_mtime_ns
    page = tmp_path / "run" / "report.html"
    assert not page.exists()
    assert again(tmp_path / "run", until="oracle") == ["oracle"]
    assert page.read_text() == "missing: ceiling, linear_k1, linear_k2, evaluate"
    assert again(tmp_path / "run", until="evaluate") == STAGES[4:-1]
    assert page.read_text() == "missing: ceiling"
    assert again(tmp_path / "run") == ["ceiling", "report"]
    assert page.read_text() == "missing: "
    assert (tmp_path / "run" / "model" / "model.safetensors").stat().st_mtime_ns == weights


def test_the_page_grows_and_ends_as_if_written_once(run, finished, values):
    """After a change to the oracle nothing of the former study is on the page, and the last page is the usual one."""
    changed = Recipe.model_validate(values | {"oracle": values["oracle"] | {"random_routes": 4}})
    run_study(changed, run, ["duollm", "study"], "oracle")
    html = (run / "report.html").read_text(encoding="utf-8")
    assert data_of(html)["runs"][0]["missing"] == ["evaluate"]
    assert not (run / "evaluate").exists()
    assert not (run / "figures").exists()
    run_study(Recipe.model_validate(values), run, ["duollm", "study"], "oracle")
    for name in ("evaluate", "ceiling"):
        shutil.rmtree(run / name, ignore_errors=True)
        shutil.copytree(finished / name, run / name)
    shutil.copy(finished / "provenance.json", run / "provenance.json")
    analyse(run, 100)
    write_report(run, 1)
    assert (run / "report.html").read_bytes() == (finished / "report.html").read_bytes()


def test_a_killed_pretraining_continues_to_the_same_weights(tmp_path, finished, again, monkeypatch):
    train_batch = PackedData.train_batch

    def dying_batch(data, step, *arguments, **settings):
        if step == 9:
            raise KeyboardInterrupt
        return train_batch(data, step, *arguments, **settings)

    pretrain = {"checkpoint_every": 4}
    with monkeypatch.context() as patch:
        patch.setattr(PackedData, "train_batch", dying_batch)
        with pytest.raises(KeyboardInterrupt):
            again(tmp_path / "run", until="pretrain", pretrain=pretrain)
    assert (tmp_path / "run" / "resume" / "pretrain.pt").exists()
    assert again(tmp_path / "run", until="pretrain", pretrain=pretrain) == ["pretrain"]
    expected, got = (load_model(each / "model").state_dict() for each in (finished, tmp_path / "run"))
    assert all(torch.equal(value, expected[name]) for name, value in got.items())


class TestGivenModel:
    @pytest.fixture
    def given(self, finished, tmp_path):
        return Path(shutil.copytree(finished / "model", tmp_path / "given"))

    def test_it_is_studied_in_place_of_a_trained_one(self, finished, tmp_path, again, given):
        run = tmp_path / "run"
        assert again(run, until="oracle", model={"path": str(given)}) == ["data", "pretrain", "oracle"]
        assert not (run / "model").exists()
        theirs, ours = (pq.read_table(each / "oracle" / "owls.parquet") for each in (finished, run))
        assert ours.to_pydict() == theirs.to_pydict()

    def test_other_weights_are_noticed(self, tmp_path, again, given):
        run, model = tmp_path / "run", {"path": str(given)}
        again(run, until="pretrain", model=model)
        tiny_model(vocab_size=300).save_pretrained(given)
        assert again(run, until="pretrain", model=model) == ["pretrain"]

    def test_a_vocabulary_that_does_not_hold_the_data_is_refused(self, tmp_path, again, given):
        tiny_model(vocab_size=31).save_pretrained(given)
        with pytest.raises(UserError, match=r"knows 31 tokens, the data has \d+; set data\.tokenizer"):
            again(tmp_path / "run", until="pretrain", model={"path": str(given)})

    def test_a_budget_beyond_its_layers_is_refused(self, tmp_path, again, given):
        tiny_model(vocab_size=300, num_hidden_layers=1).save_pretrained(given)
        with pytest.raises(UserError, match=r"router\.big_layers holds 2; .* has 1 layers"):
            again(tmp_path / "run", until="pretrain", model={"path": str(given)})

    def test_a_folder_without_a_model_is_refused(self, tmp_path, again):
        (tmp_path / "empty").mkdir()
        with pytest.raises(UserError, match=r"model\.path: .*empty holds no config\.json"):
            again(tmp_path / "run", model={"path": str(tmp_path / "empty")})


class TestDamage:
    @pytest.fixture
    def refusal(self, run, values, capfd, tmp_path):
        """Run the command on the damaged run and return the one line that it prints."""

        def refuse(*options):
            recipe = tmp_path / "tiny.yaml"
            write_text(recipe, yaml.safe_dump(values))
            capfd.readouterr()
            assert cli.main(["study", str(recipe), "--out", str(run), *options]) == 2
            error = capfd.readouterr().err
            assert error.startswith("duollm: error: ")
            assert error.count("\n") == 1
            return error

        return refuse

    def test_truncated_weights(self, run, refusal):
        weights = run / "model" / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
        assert "not a readable duo model" in refusal("--oracle.random_routes", "4")

    def test_missing_weights_are_made_anew_only_with_the_folder(self, run, refusal):
        (run / "model" / "model.safetensors").unlink()
        assert str(run / "model") in refusal("--oracle.random_routes", "4")

    def test_a_damaged_router(self, run, refusal):
        (run / "routers" / "linear_k1" / "router.safetensors").write_bytes(b"damaged")
        assert "linear_k1: not a router folder" in refusal("--router.spend", "[exact]")


class TestLoadModel:
    def test_a_missing_weight_is_not_filled_in_at_random(self, tmp_path):
        tiny_model().save_pretrained(tmp_path)
        weights = load_file(tmp_path / "model.safetensors")
        del weights["model.norm.weight"]
        save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(UserError, match=r"lacks the weight model\.norm\.weight"):
            load_model(tmp_path)

    def test_a_model_of_another_family_is_refused(self, tmp_path):
        sizes = {key: value for key, value in SIZES.items() if key != "small_intermediate_size"}
        LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(tmp_path)
        with pytest.raises(UserError, match="not a readable duo model"):
            load_model(tmp_path)


def test_no_progress_bar_of_transformers_reaches_the_terminal(tmp_path, values, capfd):
    run_study(Recipe.model_validate(values), tmp_path / "run", ["duollm", "study"], until="linear_k1")
    shown = capfd.readouterr()
    assert "it/s" not in shown.err
    assert "Loading weights" not in shown.out + shown.err
    assert "model shards" not in shown.out + shown.err
