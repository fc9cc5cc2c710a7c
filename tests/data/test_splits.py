from itertools import chain

import pytest

from duollm.data.documents import Document
from duollm.data.splits import SPLITS, distinct, split_documents
from duollm.errors import UserError


def documents(count, domain="d"):
    return [Document(domain, f"{number}.txt", f"text {number}") for number in range(count)]


@pytest.mark.parametrize(("count", "sizes"), [(6, (2, 2, 2)), (10, (6, 2, 2)), (100, (80, 5, 15))])
def test_every_document_is_in_exactly_one_split_of_the_size_asked_for(count, sizes):
    given = documents(count)
    splits = split_documents("d", given, 0.05, 0.15, seed=0)
    assert tuple(len(splits[split]) for split in SPLITS) == sizes
    assert sorted(chain(*splits.values()), key=given.index) == given


def test_the_split_depends_on_the_seed_and_the_domain_alone():
    def split(seed, domain="d"):
        return split_documents(domain, documents(50), 0.1, 0.1, seed)

    assert split(1) == split(1)
    assert split(1) != split(2)
    assert split(1) != split(1, "other")


def test_too_few_documents_say_what_a_document_is():
    with pytest.raises(UserError, match=r"domain 'd' has 5 different documents; at least 6 are needed.*a JSON line"):
        split_documents("d", documents(5), 0.05, 0.15, seed=0)


def test_shares_that_leave_nothing_to_train_on_are_refused():
    with pytest.raises(UserError, match=r"validation_share \(0\.5\) and test_share \(0\.5\) leave fewer"):
        split_documents("d", documents(20), 0.5, 0.5, seed=0)


def test_of_equal_texts_the_first_is_kept():
    given = [Document("a", "1", "x"), Document("a", "2", "y"), Document("b", "1", "x"), Document("a", "3", "y")]
    assert distinct(given) == given[:2]
