"""The code in the documentation runs and does what the text around it says."""

import re
from pathlib import Path

import pytest
import torch

from duollm import Branch, RouteSpace, cli, loss_table, search_oracle
from duollm.config import Recipe
from duollm.convert.saving import load_model
from duollm.data.tokenizer import load_tokenizer
from duollm.oracle.budgets import AtMost, Exactly
from duollm.routers.calibration import calibrate
from duollm.routers.policies import parse_policy
from duollm.routers.registry import ROUTERS, load_router, save_router
from duollm.study import run_study
from tiny import SIZES
from tiny_corpus import write_corpus
from tiny_saved import save_tiny
from tiny_training import router_training

DOCS = Path(__file__).parents[1] / "docs"
PAGES = [DOCS.parent / "README.md", *sorted(DOCS.glob("*.md"))]
WORD = r"'[^']*'|\"[^\"]*\"|[^\s`|;'\"]+"
COMMAND = re.compile(rf"(?:\./run|\bduollm|-m duollm\.cli) +([a-z][a-z-]*)((?: +(?:{WORD}))*)")
LINK = re.compile(r"\]\(([^)#]+)(?:#[^)]*)?\)")


def blocks(page):
    return re.findall(r"^```python\n(.*?)^```$", (DOCS / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def run_page(page):
    """What the blocks of a page define, run one after the other."""
    names = {}
    for block in blocks(page):
        exec(compile(block, f"docs/{page}", "exec"), names)
    return names


@pytest.fixture
def described(monkeypatch):
    """What the blocks of docs/adding-a-router.md define."""
    monkeypatch.setattr("duollm.routers.registry.ROUTERS", dict(ROUTERS))
    return run_page("adding-a-router.md")


def test_the_hand_written_policy_decides_by_token(described):
    assert described["nll_BT"].shape == (2, 15)
    assert described["routes_BTL"].shape == (2, 15, 4)
    assert 0 < described["share_of_big"] < 1


def test_the_page_on_checkpoints_goes_in_and_out():
    names = run_page("checkpoints.md")
    assert names["difference"] < 1e-4
    assert names["again"].config.intermediate_size == 96
    assert names["small"].config.intermediate_size == 8


def test_the_router_fits_the_promised_40_lines():
    [block] = [block for block in blocks("adding-a-router.md") if "class BottleneckRouter" in block]
    assert len(block.splitlines()) <= 40


def test_the_router_trains_calibrates_and_survives_saving(described, tmp_path):
    model, router = described["model"], described["router"]
    model.requires_grad_(False)
    before = {name: value.clone() for name, value in router.named_parameters()}
    loss_fn = router.loss_fn(router_training(model, budget=0.5, steps=20))
    optimizer = torch.optim.Adam(router.parameters(), 0.05)
    generator = torch.Generator().manual_seed(0)
    for step in range(20):
        loss, _ = loss_fn(torch.randint(64, (4, 16), generator=generator), step, 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all((value != before[name]).any() for name, value in router.named_parameters())
    validation_BT = torch.randint(64, (16, 16), generator=generator)
    assert calibrate(model, router, [validation_BT], budget=0.25) == pytest.approx(0.25, abs=0.05)
    save_router(router, tmp_path / "router", {"kind": "bottleneck", "branches": ["small", "big"]})
    loaded, _ = load_router(tmp_path / "router", model.config)
    routes = [model(validation_BT, policy=policy).routes for policy in (router, loaded)]
    assert torch.equal(*routes)
    assert (routes[0] == Branch.BIG).float().mean() == pytest.approx(0.25, abs=0.05)


@pytest.mark.parametrize("prune", [True, False])
@pytest.mark.parametrize("context", ["shared", "reference"])
def test_the_reduction_keeps_the_second_lowest_loss(monkeypatch, context, prune):
    entries = []
    monkeypatch.setattr("duollm.oracle.run.REDUCTIONS", entries)
    names = run_page("adding-a-reduction.md")
    assert (names["margin"] > 0).all()
    model, input_ids, space = names["model"], names["input_ids"], RouteSpace(4)
    assert isinstance(entries[0](None, None), names["SecondBest"])
    table_BTR, big_R = loss_table(model, input_ids, space, context), space.count_big(torch.arange(space.size))
    budgets = [Exactly(1), Exactly(2), AtMost(2), Exactly(0)]
    kept = [names["SecondBest"]()]
    found = search_oracle(model, input_ids, space, context, budgets=budgets, reductions=kept, prune=prune)
    for budget, second_BT in zip(budgets[:-1], found.columns["second"], strict=False):
        within_R = big_R <= 2 if isinstance(budget, AtMost) else big_R == budget.big
        naive_BT = table_BTR[..., within_R].sort(-1).values[..., 1]
        torch.testing.assert_close(second_BT, naive_BT, atol=1e-4, rtol=0)
    assert found.columns["second"][-1].isposinf().all()


def test_a_router_with_its_own_training_goes_through_a_study(described, tmp_path, no_measuring):
    """Its file and its name are all that it takes: trained, calibrated, evaluated; and again only if it must be."""
    texts = write_corpus(tmp_path / "owls", documents=30)
    router = {"kinds": ["mean-gain"], "big_layers": [1, 2], "tokens": 500, "batch_size": 8, "precision": "fp32"}
    recipe = {
        "model": {key: SIZES[key] for key in ("hidden_size", "num_hidden_layers", "intermediate_size")},
        "data": {"domains": [str(texts)], "vocab_size": 300, "sequence_length": 16, "test_share": 0.3},
        "pretrain": {"tokens": 1000, "batch_size": 8, "precision": "fp32"},
        "oracle": {"documents": 3, "random_routes": 2, "big_layers": [1]},
        "router": router,
        "ceiling": {"enabled": False},
    }
    run = tmp_path / "run"
    run_study(Recipe.model_validate(recipe), run, ["duollm", "study"], until="evaluate")
    model = load_model(run / "model")
    one, two = (load_router(run / "routers" / f"mean-gain_k{k}", model.config)[0] for k in (1, 2))
    assert torch.equal(one.gain_LC, two.gain_LC)
    assert one.gain_LC.abs().sum(1).min() > 0
    assert one.price > two.price
    routes_BTL = model(torch.ones(1, 4).long(), policy=two).routes
    assert len(routes_BTL.flatten(0, 1).unique(dim=0)) == 1
    trained = (run / "stages" / "mean-gain.json").read_text()
    recipe["router"] = router | {"budget_weight": 1.0}  # which it does not read
    run_study(Recipe.model_validate(recipe), run, ["duollm", "study"], until="evaluate")
    assert (run / "stages" / "mean-gain.json").read_text() == trained


def test_evaluation_from_python(tmp_path):
    pytest.importorskip("lm_eval", reason="needs the extra `eval`")
    pytest.importorskip("accelerate", reason="needs the extra `eval`")
    model, _ = save_tiny(tmp_path)
    names = {"model": model, "tokenizer": load_tokenizer(tmp_path / "model"), "token_ids_WT": torch.ones(2, 9).long()}
    for block in blocks("evaluation.md"):
        block = block.replace("spread:6", "spread:2").replace("limit=50", "limit=1")  # a model of three layers
        exec(compile(block, "docs/evaluation.md", "exec"), names)
    assert names["routes_WTL"].shape == (2, 8, 3)
    assert "acc,none" in names["results"]["results"]["duollm_prose_continuation"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_between_files_lead_somewhere(page):
    targets = [target for target in LINK.findall(page.read_text(encoding="utf-8")) if "://" not in target]
    assert not [target for target in targets if not (page.parent / target).exists()]


def commands(page):
    """Find the verbs and words of commands in code: fenced, indented or between backquotes, comments left out."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    code = [block for language, block in fenced if not language]
    code += re.findall(r"`[^`\n]+`", text) + re.findall(r"^ {4}.*$", text, re.MULTILINE)
    lines = (line.partition("# ")[0] for block in code for line in block.splitlines())
    return {
        match.groups()
        for line in lines
        for match in COMMAND.finditer(line)
        if match[1] not in ("tests", "python", "reference")
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_verbs_and_flags_of_named_commands_exist(page, capsys):
    for verb, words in commands(page):
        assert verb in cli.VERBS
        assert cli.main([verb, "--help"]) == 0
        shown = set(re.findall(r"--[a-z][\w.-]*", capsys.readouterr().out))
        given = [word.partition("=")[0] for word in re.findall(rf"(?<= )(?:{WORD})", words)]
        assert not {word for word in given if word.startswith("--")} - shown


def test_the_pages_name_commands():
    assert sum(len(commands(page)) for page in PAGES) > 40


SECTIONS = re.split(r"^## ", (DOCS / "huggingface.md").read_text(encoding="utf-8"), flags=re.MULTILINE)


def python_of(section):
    return "\n".join(re.findall(r"^```python\n(.*?)^```$", section, re.MULTILINE | re.DOTALL))


@pytest.fixture(scope="module")
def with_hugging_face(tmp_path_factory):
    """What the first block of docs/huggingface.md defines, and settings that its other sections share."""
    folder = tmp_path_factory.mktemp("huggingface")
    save_tiny(folder)
    names = {"folder": str(folder / "model"), "greedy": {"max_new_tokens": 8, "do_sample": False}}
    exec(python_of(SECTIONS[0]), names)
    names["parse_policy"] = parse_policy
    return names


def sections():
    for section in SECTIONS[1:]:
        title = section.partition("\n")[0]
        if python_of(section):
            yield pytest.param(section, id=title)


@pytest.mark.parametrize("section", sections())
def test_hugging_face_snippets_run(with_hugging_face, section):
    code = python_of(section)
    needs = {"peft": "peft", "accelerate": "accelerate", "torchao": "torchao", "duollm.measure.harness": "lm_eval"}
    for imported, package in needs.items():
        if f"from {imported}" in code:
            pytest.importorskip(package, reason="needs the extras `compat` and `eval`")
    names = dict(with_hugging_face)
    exec(compile(code, "docs/huggingface.md", "exec"), names)
    for same in ({"plain", "looked_up", "static"}, {"assisted"}):
        results = [names[name] for name in same if name in names]
        expected = names["model"].generate(
            **names["inputs"], routes=names["routes"] if "plain" in names else None, **names["greedy"]
        )
        assert all(result.equal(expected) for result in results)
    expected = names["model"](**names["inputs"], routes=names["routes"]).logits
    for name in ("from_disk", "whole", "mixed", "exported"):
        torch.testing.assert_close(names.get(name, expected), expected, atol=1e-4, rtol=0)
    assert (names.get("in_int8", expected) - expected).std() < 0.1 * expected.std()
