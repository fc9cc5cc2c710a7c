from pathlib import Path
from types import SimpleNamespace

import pytest

from duollm.analysis.claims.models import SHARES
from duollm.analysis.claims.runs import (
    Run,
    columns_of,
    differences,
    equal_share,
    notes_on,
    studies_of,
)
from duollm.config import Recipe
from duollm.errors import UserError
from duollm.recipe_files import to_yaml
from hand_made_claims import claim, low
from synthetic_scores import write_scores, write_task

SIZES = {"intermediate_size": 512, "small_intermediate_size": 32}


def recipe(seed=0, **sections):
    given = {"model": SIZES, **sections}
    return Recipe.model_validate({"seed": seed, **given})


MAIN, SKIP = {}, {"oracle": {"branches": ["skip", "big"]}, "router": {"branches": ["skip", "big"]}}
OPT = {"model": SIZES | {"architecture": "opt"}}
FROZEN = {"model": SIZES | {"dense": "big/model"}, "pretrain": {"freeze": "big"}}


def dense(width):
    return {"model": SIZES | {"intermediate_size": width}, "pretrain": {"branch_shares": (0.0, 0.0, 1.0)}}


def study(name, sections, *claims, seed=0):
    results = SimpleNamespace(claims=list(claims), data={"prose": None})
    beside = Run(Path(), recipe(**sections), None).role.startswith(("dense", "frozen"))
    return Run(Path(name), recipe(seed, **sections), None if beside else results)


def test_parts_are_read_from_recipes():
    parts = {
        name: Run(Path(), recipe(**each), None).role for name, each in {"main": MAIN, "skip": SKIP, "opt": OPT}.items()
    }
    assert len(set(parts.values())) == 3
    assert Run(Path(), recipe(**dense(272)), None).role == "dense of width 272"
    assert Run(Path(), recipe(**FROZEN), None).role == "frozen"


def test_a_column_holds_one_run_of_each_part_and_seed():
    runs = [study("main", MAIN), study("skip", SKIP), study("other", MAIN, seed=1), study("again", MAIN)]
    assert [[run.folder.name for run in column.runs.values()] for column in columns_of(runs)[0]] == [
        ["main", "skip"],
        ["other"],
        ["again"],
    ]


def test_runs_that_only_stand_beside_others_make_no_column():
    alone = study("dense", dense(512))
    assert columns_of([alone]) == ([], [alone])


def test_claims_about_the_papers_model_are_not_taken_from_another():
    main = study("main", MAIN, claim("C6", low("slope")), claim("C16", low("slope", None)))
    opt = study("opt", OPT, claim("C6", low("slope", 1.0)), claim("C16", low("slope")))
    [column], _ = columns_of([opt, main])
    verdicts = {each.id: each.verdict for each in column.claims()}
    assert (verdicts["C6"], verdicts["C16"]) == ("reproduced", "reproduced")
    [alone], _ = columns_of([opt])
    assert {each.id: each.verdict for each in alone.claims()}["C6"] == "not reproduced"


def test_c14_and_c15_come_from_scores_of_runs_beside(tmp_path):
    write_scores(tmp_path / "main", {f"random:{share:g}": 3 - share for share in SHARES})
    widths = {share: round(32 + share * 480) for share in (0.0, 0.75, 1.0)}
    for share, width in widths.items():
        write_scores(tmp_path / f"dense{width}", {"all-big": 2.95 - share if share else 2.5})
    write_scores(tmp_path / "frozen", {"random:0.5": 2.6})
    runs = [study(tmp_path / f"dense{width}", dense(width)) for width in widths.values()]
    runs += [study(tmp_path / "frozen", FROZEN), study(tmp_path / "main", MAIN, claim("C1", low("x")))]
    claims = {each.id: each for each in columns_of(runs)[0][0].claims()}
    assert (claims["C14"].verdict, claims["C15"].verdict) == ("reproduced", "reproduced")
    assert claims["C15"].estimate.value == pytest.approx(0.1, abs=1e-6)


def test_c14_is_decided_by_tasks_in_a_row_of_its_own(tmp_path):
    write_task(tmp_path / "main", {f"random:{share:g}": 0.3 + 0.3 * share for share in SHARES})
    for share in (0.0, 0.75, 1.0):
        write_task(tmp_path / f"dense{share}", {"all-big": 0.3 + 0.3 * share + (0.2 if share == 0 else 0.0)})
    runs = [study(tmp_path / f"dense{share}", dense(round(32 + share * 480))) for share in (0.0, 0.75, 1.0)]
    [column], _ = columns_of([study(tmp_path / "main", MAIN, claim("C1", low("x"))), *runs])
    found = {(each.id, each.domain): each.verdict for each in column.claims()}
    assert found["C14", "prose"] == "not measured"
    assert found["C14", "tasks"] == "reproduced"


WIDE = {"model": SIZES | {"hidden_size": 256}}
LAYERS = {"model": SIZES | {"skip_scope": "layer"}, **SKIP, "pretrain": {"branch_shares": (0.5, 0.0, 0.5)}}


class TestStudiesOfSeveralSizes:
    def test_a_run_stands_beside_the_study_that_it_resembles(self):
        wide_dense = {"model": WIDE["model"] | {"intermediate_size": 32}, "pretrain": dense(32)["pretrain"]}
        runs = [study("wide", WIDE), study("main", MAIN), study("skip", SKIP), study("dense", wide_dense)]
        columns, without_place = columns_of(runs)
        assert [[run.folder.name for run in column.runs.values()] for column in columns] == [
            ["wide", "dense"],
            ["main", "skip"],
        ]
        assert not without_place

    def test_seeds_of_one_size_are_one_study(self):
        runs = [study("wide", WIDE), study("main", MAIN), study("other", MAIN, seed=1), study("wide-1", WIDE, seed=1)]
        studies = studies_of(columns_of(runs)[0])
        assert [[column.main.folder.name for column in each] for each in studies] == [
            ["wide", "wide-1"],
            ["main", "other"],
        ]

    def test_settings_that_differ_are_named(self):
        longer = {"oracle": {"documents": 9}, "pretrain": {"log_every": 3}}
        other_data = {"data": {"sequence_length": 64}, **OPT}
        runs = [study("main", MAIN), study("seed", longer, seed=1), study("opt", other_data), study("wide", WIDE)]
        left = study("dense", dense(512), seed=7)
        columns, without_place = columns_of([*runs, left])
        assert list(notes_on(studies_of(columns), without_place)) == [
            "wide is a study of its own, for model.hidden_size is 256, not 128 as in main",
            "opt: data.sequence_length is 64, not 128 as in main",
            "seed: oracle.documents is 9, not 24 as in main",
            "dense is left out: no study of seed 7 lacks a run that is dense of width 512",
        ]

    @pytest.mark.parametrize("part", [SKIP, LAYERS, OPT, FROZEN, dense(32)])
    def test_what_a_part_needs_is_no_difference(self, part):
        assert differences(study("part", part), study("main", MAIN)) == []

    @pytest.mark.parametrize(("first", "found"), [(1_000_000, []), (1_200_000, ["pretrain.tokens"])])
    def test_big_and_frozen_together_have_the_tokens_of_the_study(self, tmp_path, first, found):
        (tmp_path / "big" / "model").mkdir(parents=True)
        (tmp_path / "big" / "config.yaml").write_text(to_yaml(recipe(pretrain={"tokens": first})))
        settings = {"freeze": "big", "tokens": 500_000}
        frozen = {"model": SIZES | {"dense": str(tmp_path / "big" / "model")}, "pretrain": settings}
        assert differences(study("frozen", frozen), study("main", MAIN)) == found

    def test_a_model_that_is_the_studys_need_not_say_how_it_was_made(self, tmp_path):
        main = study(tmp_path / "main", WIDE)
        given = {"model": {"path": str(tmp_path / "main" / "model")}, "data": {"tokenizer": "somewhere"}, **SKIP}
        assert differences(study("skip", given), main) == []
        assert differences(study("skip", given), study(tmp_path / "other", WIDE)) == ["model.path"]

    def test_runs_that_skip_whole_layers_are_told_beside_those_that_skip_ffns(self):
        ffn, layer = claim("C9", low("order")), claim("C9", low("order", 1.0))
        [column], _ = columns_of([study("main", MAIN), study("layers", LAYERS, layer), study("skip", SKIP, ffn)])
        [whole] = [each for each in column.claims() if each.id == "C9"]
        assert whole.verdict == "reproduced"
        assert [(one.context, one.verdict) for one in whole.readings] == [("layers", "not reproduced")]
        [alone], _ = columns_of([study("main", MAIN), study("layers", LAYERS, layer)])
        assert next(each for each in alone.claims() if each.id == "C9").verdict == "not reproduced"


def test_a_dense_model_must_take_the_flops_of_a_share():
    main = study("main", MAIN)
    assert [equal_share(study("dense", dense(width)), main) for width in (32, 152, 270, 392, 512)] == list(SHARES)
    with pytest.raises(UserError, match="200 wide; those of equal FLOPs with main are 32, 152, 272, 392, 512 wide"):
        equal_share(study("dense", dense(200)), main)


def test_a_folder_without_a_recipe_is_no_run(tmp_path):
    with pytest.raises(UserError, match="no run folder"):
        Run.read(tmp_path)
