"""The oracle stage on tiny data: what it leaves behind, in how many processes, killed or not."""

import copy
import json
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch

from duollm import RouteSpace, loss_table
from duollm.config import OracleConfig
from duollm.errors import UserError
from duollm.oracle.plan import SearchPlan
from duollm.oracle.reductions import BestSoFar
from duollm.oracle.run import REDUCTIONS, OracleRun
from duollm.oracle.store import KINDS, OracleStore
from duollm.records.files import ResultFile
from duollm.records.patterns import first_half
from naive_oracle import forward_nll
from tiny import tiny_model

SEED = 3
DOCUMENTS = 9  # two shards
SETTINGS = {
    "documents": DOCUMENTS,
    "contexts": ["reference", "shared", "committed"],
    "committed_big_layers": [1, 2],
    "more_budgets": ["at-most 2", "flops 0.6", "average 1.5", "ramp 3 1"],
    "random_routes": 4,
    "resampled_labels": 2,
    "counted_share": 0.5,
}


@pytest.fixture(scope="session")
def model(packed):
    return tiny_model(vocab_size=packed.vocab_size)


@pytest.fixture(scope="session")
def stage(packed, model):
    """Make a run of the stage in a folder, silent unless told otherwise."""

    def make(folder, model=model, data=packed, **settings):
        own = {key: settings.pop(key) for key in ("rank", "ranks", "report") if key in settings}
        config = OracleConfig(**(SETTINGS | settings))
        facts = SearchPlan(config, model.config.num_hidden_layers, data.sequence_length).facts
        silent = {"report": lambda *progress: None}
        return OracleRun(model, data, config, SEED, OracleStore(folder, facts), **(silent | own))

    return make


@pytest.fixture(scope="session")
def finished(stage, tmp_path_factory):
    """The folder of a finished search; read only."""
    folder = tmp_path_factory.mktemp("finished") / "oracle"
    stage(folder).run()
    return folder


def read(folder, domain="owls", kind="tokens"):
    return pd.read_parquet(folder / f"{domain}{KINDS[kind]}.parquet")


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def stop_after(monkeypatch):
    """Make the run stop when it has written so many shards; return the numbers of those it writes."""

    def install(shards):
        written, write = [], OracleStore.write_shard

        def write_and_stop(self, domain, number, columns):
            write(self, domain, number, columns)
            written.append(number)
            if len(written) == shards:
                raise KeyboardInterrupt

        monkeypatch.setattr(OracleStore, "write_shard", write_and_stop)
        return written

    return install


class TestTokens:
    def test_rows_are_the_predicted_tokens_in_order(self, finished, packed):
        windows = packed.windows("test", "owls", DOCUMENTS, 1, SEED)
        table = read(finished)
        assert table["token_id"].tolist() == windows.token_ids[:, 1:].flatten().tolist()
        assert table["document"].tolist() == np.repeat(windows.documents, 7).tolist()
        assert table["position"].tolist() == [*range(1, 8)] * len(windows.window)
        assert table["text"].tolist() == [packed.tokenizer.decode([token]) for token in table["token_id"]]
        begins = [packed.tokenizer.decode([token]) for token in windows.token_ids[:, 0]]
        assert table["before"].tolist() == [text for begin in begins for text in (begin, *[""] * 6)]

    def test_columns_are_those_of_the_documentation(self, finished):
        kinds = {"document": "str", "window": "int32", "position": "int32", "token_id": "int32"}
        kinds |= {"text": "str", "before": "str", "rank": "int32", "counted": "bool"}
        kinds |= dict.fromkeys(["top5_id", "top5_text", "top5_probability"], "object")
        kinds |= {f"route_static_k{k}": "int64" for k in range(4)}
        floats = ["nll_small", "nll_big"]
        floats += [f"{name}_k{k}" for name in ("nll_random4", "nll_static", "expected_static") for k in range(4)]
        limits = {"shared": ["atmost2", "flops0.6", "average1.5", "ramp3to1"], "committed": ["atmost2", "flops0.6"]}
        limits = {**limits, "reference": limits["shared"], "committed": [*limits["committed"], "ramp3to1"]}
        for context, further in limits.items():
            for budget in [*(f"k{k}" for k in ([1, 2] if context == "committed" else range(4))), *further]:
                kinds[f"route_{context}_{budget}"] = "int64"
                floats += [f"nll_{context}_{budget}", f"executed_{context}_{budget}"]
                if context != "committed":
                    kinds[f"resampled_route_{context}_{budget}"] = "int64"
                    floats += [f"resampled_{what}_{context}_{budget}" for what in ("nll", "score")]
        expected = kinds | dict.fromkeys(floats, "float32")
        found = {
            name: "str" if name in ("document", "text", "before") else str(kind)
            for name, kind in read(finished).dtypes.items()
        }
        assert found == expected

    def test_predictions_are_written_out(self, finished, packed):
        table = read(finished)
        for ids, texts in zip(table["top5_id"], table["top5_text"], strict=True):
            assert list(texts) == [packed.tokenizer.decode([token]) for token in ids]
        first = table[table["rank"] == 1]
        assert first["token_id"].tolist() == [ids[0] for ids in first["top5_id"]]
        assert np.exp(-first["nll_big"]).to_numpy() == pytest.approx(
            [p[0] for p in first["top5_probability"]], abs=1e-4
        )

    def test_no_number_is_missing(self, finished):
        table = read(finished)
        assert np.isfinite(table.select_dtypes("float32")).all(axis=None)
        assert (table.filter(regex="^route_") >= 0).all(axis=None)

    def test_the_oracle_is_the_best_of_all_routes(self, finished, packed, model):
        table, space = read(finished), RouteSpace(3)
        token_ids = torch.from_numpy(packed.windows("test", "owls", DOCUMENTS, 1, SEED).token_ids)
        for context in ("shared", "reference"):
            nll_TR = loss_table(model, token_ids, space, context).flatten(0, 1)
            for k in range(4):
                best_T = nll_TR[:, space.ids_with(k)].min(1).values
                np.testing.assert_allclose(table[f"nll_{context}_k{k}"], best_T, atol=1e-4)

    def test_committed_picks_do_what_they_promise(self, finished):
        table = read(finished)
        for name in ("k1", "k2", "atmost2", "flops0.6", "ramp3to1"):
            np.testing.assert_allclose(
                table[f"executed_committed_{name}"], table[f"nll_committed_{name}"], atol=1e-4, rtol=0
            )

    def test_the_average_is_kept_in_every_window(self, finished):
        table = read(finished)
        for context in ("shared", "reference"):
            spent = pd.Series(RouteSpace(3).count_big(table[f"route_{context}_average1.5"].to_numpy()))
            assert (spent.groupby(table["document"]).mean() <= 1.5).all()

    def test_static_is_chosen_on_the_other_half_and_run_on_all_tokens(self, finished, packed, model):
        table, routes, space = read(finished), read(finished, kind="routes"), RouteSpace(3)
        windows = packed.windows("test", "owls", DOCUMENTS, 1, SEED)
        names = list(dict.fromkeys(windows.documents))
        first = dict(zip(names, first_half(len(names), SEED), strict=True))
        for k in (1, 2):
            allowed = routes[routes["route"].isin(space.ids_with(k))]
            for document, ids_T in zip(windows.documents, torch.from_numpy(windows.token_ids), strict=True):
                others = allowed[allowed["document"].map(first) != first[document]]
                best = int(others.groupby("route")["nll_sum"].sum().idxmin())
                expected = forward_nll(model, ids_T[None], space.decode(torch.tensor(best)))[0]
                found = table.loc[table["document"] == document, f"nll_static_k{k}"]
                np.testing.assert_allclose(found, expected, atol=1e-4)


class TestPatterns:
    def test_every_document_has_every_route_on_the_same_number_of_tokens(self, finished):
        routes = read(finished, kind="routes")
        assert routes["route"].tolist() == [*range(8)] * DOCUMENTS
        assert set(routes["tokens"]) == {4}

    def test_sums_are_of_whole_losses_of_that_document(self, finished, packed, model):
        windows = packed.windows("test", "owls", DOCUMENTS, 1, SEED)
        nll_WNR = loss_table(model, torch.from_numpy(windows.token_ids), RouteSpace(3)).numpy()
        sums_GR = read(finished, kind="routes")["nll_sum"].to_numpy().reshape(DOCUMENTS, 8)
        for nll_NR, sum_R in zip(nll_WNR, sums_GR, strict=True):
            lowest_R, highest_R = np.sort(nll_NR, axis=0)[:4].sum(0), np.sort(nll_NR, axis=0)[-4:].sum(0)
            assert ((lowest_R - 1e-3 <= sum_R) & (sum_R <= highest_R + 1e-3)).all()

    def test_one_draw_is_the_mean_pattern_and_more_draws_are_better(self, finished):
        routes, best_of = read(finished, kind="routes"), read(finished, kind="best_of")
        of_budget = routes[routes["route"].isin(RouteSpace(3).ids_with(2))]
        mean_D = of_budget.groupby("document")["nll_sum"].mean()
        one_D = best_of.query("big_layers == 2 and drawn == 1").set_index("document")["nll_sum"]
        np.testing.assert_allclose(one_D.sort_index(), mean_D.sort_index(), rtol=1e-5)
        for _, of_one in best_of.groupby(["document", "big_layers"]):
            assert of_one["nll_sum"].is_monotonic_decreasing
        assert best_of.query("big_layers == 2")["drawn"].unique().tolist() == [1, 2, 3]

    def test_all_routes_tried_on_drawn_labels_are_the_search_itself(self, finished):
        table, best_of = read(finished), read(finished, kind="best_of")
        counted = table[table["counted"]].groupby("document")
        for k in (1, 2):
            every = best_of.query(f"big_layers == {k} and drawn == 3").set_index("document").sort_index()
            for name, column in (("nll", "nll"), ("drawn1", "resampled_nll"), ("second1", "resampled_score")):
                sums_D = counted[f"{column}_shared_k{k}"].sum().sort_index()
                np.testing.assert_allclose(every[f"{name}_sum"], sums_D, rtol=1e-4)


def test_nothing_is_left_in_shards_and_the_manifest_is_the_files_metadata(finished):
    assert list((finished / "shards").iterdir()) == []
    manifest = json.loads((finished / "manifest.json").read_text())
    assert manifest["search"] == "exact"
    for kind in KINDS:
        assert read(finished, "cats", kind).shape[0] > 0


def test_two_processes_leave_the_files_of_one(finished, stage, tmp_path):
    for rank in (1, 0):  # the first process completes, when the other is done
        stage(tmp_path / "oracle", rank=rank, ranks=2).run()
    assert files_of(tmp_path / "oracle") == files_of(finished)


@pytest.mark.parametrize("shards", [1, 3])
def test_a_killed_search_continues_and_repeats_no_shard(finished, stage, tmp_path, stop_after, shards):
    folder = tmp_path / "oracle"
    stop_after(shards)
    with pytest.raises(KeyboardInterrupt):
        stage(folder).run()
    written, said = stop_after(99), []
    stage(folder, report=lambda *progress: said.append(progress)).run()
    assert len(written) == 4 - shards
    assert said[-1][1] == said[-1][2], "all tokens of the last domain"
    assert files_of(folder) == files_of(finished)


def test_every_window_is_a_step_of_the_progress(stage, tmp_path):
    said = []
    stage(tmp_path / "oracle", report=lambda *progress: said.append(progress)).run()
    done = [done for name, done, _ in said if name == "oracle owls"]
    assert done == sorted(done)
    assert len(set(done)) > DOCUMENTS, "windows, not shards"


def test_patterns_are_those_of_the_budgets_that_are_searched(stage, tmp_path):
    stage(tmp_path / "oracle", big_layers=[1], contexts=["shared"], committed_big_layers=None, more_budgets=[]).run()
    routes = read(tmp_path / "oracle", kind="routes")
    assert set(RouteSpace(3).count_big(routes["route"].to_numpy())) == {0, 1, 3}
    assert routes["nll_sum"].notna().all()


def test_a_finished_search_is_not_repeated(finished, stage, stop_after):
    before = files_of(finished)
    stop_after(1)
    stage(finished).run()
    assert files_of(finished) == before


def test_another_search_is_refused_in_one_line(finished, stage):
    with pytest.raises(UserError, match=r"^[^\n]*random_routes 4, this search has 5[^\n]*$"):
        stage(finished, random_routes=5).run()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"more_budgets": ["at-most 4"]}, "a budget of 4 big layers is impossible here; allowed: 0 .. 3"),
        ({"more_budgets": ["ramp 9 1"]}, "a budget of 9 big layers"),
        ({"more_budgets": ["flops 0.1"]}, "no route costs at most 0.1"),
        ({"more_budgets": ["at-most 1", "at-most 01"]}, "one or more different ones"),
        ({"groups": [[0, 2]], "fixed": {"big": [1]}, "big_layers": [2]}, "impossible here; allowed: 1, 3"),
    ],
    ids=str,
)
def test_impossible_budgets_are_refused_before_anything_is_searched(stage, tmp_path, settings, message):
    with pytest.raises(UserError, match=rf"^big_layers or more_budgets: [^\n]*{message}[^\n]*$"):
        stage(tmp_path / "oracle", **settings).run()
    assert not (tmp_path / "oracle").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"branches": ["skip", "small"]}, "branches: some layer that is not fixed must be able to take big"),
        ({"groups": [[0], [1]]}, "groups or fixed: layer 2 is in no group and not fixed"),
        ({"groups": [[0, 1], [1, 2]]}, "groups or fixed: layer 1 is named more than once"),
        ({"fixed": {"big": [0], "skip": [3]}}, "groups or fixed: groups and fixed name layer 3"),
        ({"memory_gib": 1e-6}, "memory_gib: one route of a window of 8 tokens takes"),
    ],
    ids=str,
)
def test_spaces_that_do_not_work_are_refused_before_anything_is_searched(stage, tmp_path, settings, message):
    with pytest.raises(UserError, match=rf"^{message}[^\n]*$"):
        stage(tmp_path / "oracle", **settings).run()
    assert not (tmp_path / "oracle").exists()


@pytest.mark.parametrize("scope", ["ffn", "layer"])
def test_groups_of_layers_in_all_contexts(stage, owls, tmp_path, scope):
    settings = {
        "branches": ["skip", "big"],
        "groups": [[0, 1], [3, 4]],
        "fixed": {"big": [2]},
        "documents": 2,
        "committed_big_layers": [3],
        "more_budgets": ["at-most 3"],
        "counted_share": 1,
    }
    five = tiny_model(vocab_size=owls.vocab_size, num_hidden_layers=5, skip_scope=scope)
    stage(tmp_path / "oracle", five, owls, **settings).run()
    table, routes = read(tmp_path / "oracle"), read(tmp_path / "oracle", kind="routes")
    space = RouteSpace(5, (0, 2), [[0, 1], [3, 4]], {2: 2})
    assert ResultFile.open(tmp_path / "oracle" / "owls.parquet", "", tmp_path).space() == space
    assert json.loads((tmp_path / "oracle" / "manifest.json").read_text())["big_layers"] == [1, 3, 5]
    np.testing.assert_allclose(table["executed_committed_k3"], table["nll_committed_k3"], atol=1e-4)
    windows = owls.windows("test", "owls", 2, 1, SEED)
    token_ids_WT = torch.from_numpy(windows.token_ids)
    nll_RT = torch.stack([forward_nll(five, token_ids_WT, space.decode(torch.tensor(r))).flatten() for r in range(4)])
    np.testing.assert_allclose(table["nll_shared_k3"], nll_RT[[1, 2]].min(0).values, atol=1e-4)
    np.testing.assert_allclose(table["nll_shared_atmost3"], nll_RT[:3].min(0).values, atol=1e-4)
    np.testing.assert_allclose(table["nll_shared_k1"], nll_RT[0], atol=1e-4)
    np.testing.assert_allclose(table["nll_big"], nll_RT[3], atol=1e-4)
    np.testing.assert_allclose(routes["nll_sum"].to_numpy().reshape(2, 4), nll_RT.T.reshape(2, 7, 4).sum(1), rtol=1e-5)
    assert np.isfinite(table.filter(regex="^resampled|^nll_random|^nll_static")).all(axis=None)


def test_three_branches_in_all_contexts(stage, owls, tmp_path):
    settings = {"branches": ["skip", "small", "big"], "documents": 2, "committed_big_layers": [1], "more_budgets": []}
    three = tiny_model(vocab_size=owls.vocab_size)
    stage(tmp_path / "oracle", three, owls, **settings).run()
    table, routes = read(tmp_path / "oracle"), read(tmp_path / "oracle", kind="routes")
    assert len(routes) == 2 * 27
    space = RouteSpace(3, (0, 1, 2))
    assert (space.count_big(table["route_shared_k1"].to_numpy()) == 1).all()
    np.testing.assert_allclose(table["executed_committed_k1"], table["nll_committed_k1"], atol=1e-4)
    # All small is one of the routes without big layers, which may skip too.
    assert (table["nll_shared_k0"] <= table["nll_small"] + 1e-4).all()


class Twice(BestSoFar):
    """The best loss, twice: a column of its own."""

    def columns(self, frontier):
        return {"twice": 2 * frontier.read(self.nll_QN, self.nll_QN)}


@pytest.mark.parametrize("search", ["exact", "beam"])
def test_a_reduction_that_is_listed_has_columns_in_the_store(stage, owls, tmp_path, monkeypatch, search):
    monkeypatch.setattr("duollm.oracle.run.REDUCTIONS", [*REDUCTIONS, lambda config, labels: Twice()])
    stage(tmp_path / "oracle", data=owls, documents=2, committed_big_layers=[1], more_budgets=[], search=search).run()
    table = read(tmp_path / "oracle")
    for context in ("shared", "reference"):
        np.testing.assert_allclose(table[f"twice_{context}_k1"], 2 * table[f"nll_{context}_k1"])
    assert not any(name.startswith("twice_committed") for name in table)


class TestDeep:
    @pytest.fixture
    def deep(self, owls):
        return tiny_model(vocab_size=owls.vocab_size, num_hidden_layers=20)

    @pytest.fixture
    def deep_stage(self, stage, deep, owls):
        few = {"documents": 2, "more_budgets": [], "random_routes": 6, "committed_big_layers": [7]}
        return partial(stage, model=deep, data=owls, **few)

    @pytest.mark.parametrize("search", ["beam", "local", "sampled"])
    def test_approximate_searches_leave_a_whole_store(self, deep_stage, deep, owls, tmp_path, search):
        run = deep_stage(tmp_path / "oracle", search=search, contexts=["shared"])
        run.run()
        table, space = read(tmp_path / "oracle"), RouteSpace(20)
        manifest = json.loads((tmp_path / "oracle" / "manifest.json").read_text())
        assert (manifest["search"], manifest["big_layers"]) == (search, [0, 7, 10, 13, 20])
        np.testing.assert_allclose(table["nll_shared_k0"], table["nll_small"], atol=1e-4)
        np.testing.assert_allclose(table["nll_shared_k20"], table["nll_big"], atol=1e-4)
        for k in (7, 10, 13):
            assert (space.count_big(table[f"route_shared_k{k}"].to_numpy()) == k).all()
        token_ids = torch.from_numpy(owls.windows("test", "owls", 2, 1, SEED).token_ids)
        row = table.iloc[9]  # the third token of the second window
        alone = forward_nll(deep, token_ids[1:], space.decode(torch.tensor(row["route_shared_k10"])))[0, 2]
        assert row["nll_shared_k10"] == pytest.approx(alone.item(), abs=1e-4)

    def test_committed_picks_of_a_beam_do_what_they_promise(self, deep_stage, tmp_path):
        deep_stage(tmp_path / "oracle", search="beam", contexts=["committed"]).run()
        table = read(tmp_path / "oracle")
        assert not any("shared" in name for name in table)
        np.testing.assert_allclose(table["executed_committed_k7"], table["nll_committed_k7"], atol=1e-4)

    def test_patterns_are_drawn_alike_for_all_documents_and_run_exactly(self, deep_stage, deep, owls, tmp_path):
        deep_stage(tmp_path / "oracle", search="sampled", contexts=["shared"], counted_share=1).run()
        routes, space = read(tmp_path / "oracle", kind="routes"), RouteSpace(20)
        windows = owls.windows("test", "owls", 2, 1, SEED)
        by_document = {document: rows.set_index("route")["nll_sum"] for document, rows in routes.groupby("document")}
        first, second = (by_document[document].index for document in windows.documents)
        assert first.tolist() == second.tolist()
        assert np.bincount(space.count_big(first.to_numpy())).tolist() == [
            1,
            *[0] * 6,
            6,
            0,
            0,
            6,
            0,
            0,
            6,
            *[0] * 6,
            1,
        ]
        for document, ids_T in zip(windows.documents, torch.from_numpy(windows.token_ids), strict=True):
            for route in first[[0, 5, -1]]:
                expected = forward_nll(deep, ids_T[None], space.decode(torch.tensor(route))).sum()
                assert by_document[document][route] == pytest.approx(expected.item(), rel=1e-5)

    def test_all_routes_of_a_very_deep_network_are_refused(self, stage, owls, tmp_path):
        model = tiny_model(vocab_size=owls.vocab_size, num_hidden_layers=23)
        with pytest.raises(
            UserError, match=r"exact would try 2\^23 routes per token; set it to beam, local or sampled"
        ):
            stage(tmp_path / "oracle", model=model, more_budgets=[]).run()
        assert not (tmp_path / "oracle").exists()


def test_the_exact_search_of_many_routes_compares_drawn_patterns(stage, tmp_path, monkeypatch):
    monkeypatch.setattr("duollm.oracle.plan._LARGEST_TABLE", 4)
    stage(tmp_path / "oracle", documents=2, contexts=["shared"], more_budgets=[], random_routes=1).run()
    routes, table = read(tmp_path / "oracle", kind="routes"), read(tmp_path / "oracle")
    assert RouteSpace(3).count_big(routes["route"].to_numpy()).tolist() == [0, 1, 2, 3] * 2
    assert {"nll_random1_k1", "resampled_nll_shared_k1", "nll_static_k1"} <= set(table)


def test_routes_of_no_searched_budget_are_not_in_the_table(stage, tmp_path):
    stage(tmp_path, big_layers=[1], committed_big_layers=None, more_budgets=[], contexts=["shared"]).run()
    routes = read(tmp_path, kind="routes")
    assert set(routes["route"]) == {0, 1, 2, 4, 7}
    assert np.isfinite(routes["nll_sum"]).all()


def test_a_model_in_low_precision_says_how_far_that_moves_its_oracle(stage, model, tmp_path, capsys):
    half = copy.deepcopy(model).to(torch.bfloat16)
    stage(tmp_path / "half", model=half, contexts=["shared"], documents=2, resampled_labels=0).run()
    said = capsys.readouterr().out
    assert "bfloat16" in said
    stage(tmp_path / "full", contexts=["shared"], documents=2, resampled_labels=0).run()
    assert "float32" not in capsys.readouterr().out
