import numpy as np
import pytest

from interval_coverage import DOCUMENTS, EFFECTS, SIZES, STUDENT, WAYS, coverage, main, studentised


@pytest.mark.parametrize("effect", EFFECTS)
def test_effects_have_mean_0_and_variance_1(effect):
    drawn = EFFECTS[effect](np.random.default_rng(0), (200, 2000))
    assert drawn.mean() == pytest.approx(0, abs=0.02)
    assert drawn.var() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize(
    ("effect", "documents", "least"), [*(("normal", documents, 0.94) for documents in DOCUMENTS), ("skewed", 96, 0.92)]
)
def test_duollm_covers_more_than_whole_resamples(effect, documents, least):
    """Documents are of unequal size. Whatever their number, skewed effects cost some coverage."""
    for found in coverage("whole files", effect, documents, trials=300).values():
        assert tuple(found) == WAYS
        (plain, short), (ours, long) = found["percentile"], found["duollm"]
        assert plain < 0.94
        assert least < ours < 0.985
        assert short < long


def test_bootstrap_t_of_equal_documents_is_that_of_their_mean():
    """With one document size the standard error is that of a mean, and the interval is about Student's."""
    gain_DT, of_DT = np.random.default_rng(0).normal(size=(24, 50)), np.ones((24, 50))
    whole_XD = np.random.default_rng(1).multinomial(24, np.full(24, 1 / 24), 4000)
    low_T, high_T = studentised(whole_XD, whole_XD @ gain_DT / 24, gain_DT, of_DT)
    error_T = gain_DT.std(0, ddof=1) / np.sqrt(24)
    assert np.median((high_T - low_T) / error_T / 2) == pytest.approx(STUDENT[24], rel=0.05)


def test_a_table_for_each_quantity(capsys, monkeypatch):
    monkeypatch.setattr("interval_coverage.DOCUMENTS", (24,))
    monkeypatch.setattr("sys.argv", ["interval_coverage.py", "--trials", "3"])
    main()
    printed = capsys.readouterr().out
    assert printed.count("coverage in %") == 2
    assert sum(line.startswith("| w") for line in printed.splitlines()) == 2 * len(SIZES) * len(EFFECTS)
