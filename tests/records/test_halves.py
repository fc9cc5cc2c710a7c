import numpy as np
import pytest

from duollm.errors import UserError
from duollm.records.halves import best_on_other_half, first_half


@pytest.mark.parametrize("documents", [2, 3, 10, 11])
def test_half_of_the_documents_rounded_down(documents):
    assert first_half(documents, seed=0).sum() == documents // 2


def test_the_split_depends_on_the_seed_alone():
    assert first_half(20, 1).tolist() == first_half(20, 1).tolist()
    assert first_half(20, 1).tolist() != first_half(20, 2).tolist()


@pytest.mark.parametrize("documents", [0, 1])
def test_one_document_has_no_halves(documents):
    with pytest.raises(UserError, match=rf"^[^\n]*at least 2 documents per domain, got {documents}$"):
        first_half(documents, 0)


def test_a_document_never_takes_part_in_the_choice_it_is_scored_by():
    random = np.random.default_rng(0)
    nll_DR, in_first_D = random.random((9, 5)), first_half(9, 0)
    chosen_D = best_on_other_half(nll_DR, in_first_D)
    for document in range(9):
        others = [other for other in range(9) if in_first_D[other] != in_first_D[document]]
        assert chosen_D[document] == nll_DR[others].sum(0).argmin()
        changed_DR = nll_DR.copy()
        changed_DR[document] = random.random(5) * 100
        assert best_on_other_half(changed_DR, in_first_D)[document] == chosen_D[document]


def test_ties_go_to_the_first_route():
    assert best_on_other_half(np.ones((4, 3)), first_half(4, 0)).tolist() == [0, 0, 0, 0]
