import json
import re

import pytest

from duollm.config import DataConfig
from duollm.data.corpora import find_corpus
from duollm.data.packing import distinct, split_documents
from make_tasks import CHOICES, ITEMS, TASKS_FOLDER, WORDS, as_json_lines, main, make_items


def items_of(domain):
    return [json.loads(line) for line in (TASKS_FOLDER / f"{domain}.jsonl").open(encoding="utf-8")]


def test_the_shipped_prose_is_what_the_generator_makes():
    assert as_json_lines(make_items("prose")) == (TASKS_FOLDER / "prose.jsonl").read_text(encoding="utf-8")


def test_prose_is_held_out_and_its_answers_are_true():
    shares = DataConfig()
    documents = distinct(find_corpus("prose").documents())
    test = split_documents("prose", documents, shares.validation_share, shares.test_share, 0)["test"]
    texts = {document.name: document.text for document in test}
    for item in items_of("prose"):
        assert item["context"] + item["choices"][item["answer"]] in texts[item["document"]]
        assert all(choice in texts[item["document"]] for choice in item["choices"])


@pytest.mark.parametrize("domain", WORDS)
def test_items_are_well_formed(domain):
    items = items_of(domain)
    context, continuation = WORDS[domain]
    assert len(items) == ITEMS
    for item in items:
        assert len(item["context"].split()) == context
        assert {len(choice.split()) for choice in item["choices"]} == {continuation}
        assert len(set(item["choices"])) == CHOICES
        assert all(re.match(r"\s", choice) for choice in item["choices"])
    answers = [item["answer"] for item in items]
    assert all(0.15 < answers.count(answer) / ITEMS < 0.35 for answer in range(CHOICES))


def test_the_shipped_items_are_small():
    assert sum((TASKS_FOLDER / f"{domain}.jsonl").stat().st_size for domain in WORDS) < 300_000


def test_the_command_writes_both_files(tmp_path, capsys):
    assert main([str(tmp_path)]) == 0
    assert (tmp_path / "prose.jsonl").read_bytes() == (TASKS_FOLDER / "prose.jsonl").read_bytes()
    assert len((tmp_path / "code.jsonl").read_text(encoding="utf-8").split("\n")) == ITEMS + 1
    assert capsys.readouterr().out.count("150 items") == 2
