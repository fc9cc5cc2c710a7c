import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from duollm.errors import UserError
from duollm.records.files import ResultFile, write_result

FACTS = {"num_layers": 2, "branches": ["small", "big"]}
MEND = r"; delete the folder .*evaluate and run `duollm evaluate` again"


@pytest.fixture
def opened(tmp_path):
    """Open a file of evaluate/linear_k1 with these columns and facts."""

    def open_file(columns, facts=FACTS):
        path = tmp_path / "evaluate" / "linear_k1" / "prose.parquet"
        write_result(path, columns, facts)
        if facts is None:
            pq.write_table(pa.table(columns), path)
        return ResultFile.open(path, "duollm evaluate", tmp_path / "evaluate")

    return open_file


def test_columns_come_as_arrays(opened):
    file = opened({"document": ["b", "b", "a"], "route": [0, 3, 1], "nll": [1.0, 2.0, 3.0]})
    assert file.documents()[0] == ["b", "a"]
    assert file.documents()[1].tolist() == [0, 0, 1]
    assert file.route_ids("route").tolist() == [0, 3, 1]
    assert file.floats("nll").tolist() == [1, 2, 3]
    assert file.space().size == 4
    assert (file.has("nll"), file.has("text")) == (True, False)


def test_what_is_missing_is_named_with_what_to_delete(opened):
    file = opened({"document": ["b"], "route": [4]})
    with pytest.raises(UserError, match="column 'nll' is missing" + MEND):
        file.floats("nll")
    with pytest.raises(UserError, match="its metadata lacks 'kind'" + MEND):
        file.fact("kind")
    with pytest.raises(UserError, match=r"route ids outside 0 \.\. 3"):
        file.route_ids("route")


@pytest.mark.parametrize(
    ("columns", "facts", "lack"),
    [({"nll": [1.0]}, None, "`duollm` metadata"), ({"nll": pa.array([], pa.float64())}, FACTS, "rows")],
    ids=["no metadata", "no rows"],
)
def test_what_is_no_result_is_refused(opened, columns, facts, lack):
    with pytest.raises(UserError, match=f"has no {lack}, so it is not a result" + MEND):
        opened(columns, facts)


def test_a_damaged_file_and_none_at_all_are_told_apart(tmp_path):
    with pytest.raises(UserError, match="no such file; run `duollm evaluate` first"):
        ResultFile.open(tmp_path / "prose.parquet", "duollm evaluate", tmp_path)
    (tmp_path / "prose.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"not a readable Parquet file .*; delete the folder"):
        ResultFile.open(tmp_path / "prose.parquet", "duollm evaluate", tmp_path)


@pytest.mark.parametrize("make", [dict, pa.table], ids=["columns", "table"])
def test_facts_are_written_with_the_columns_and_nothing_is_left_of_a_failure(tmp_path, make):
    path = tmp_path / "new" / "prose.parquet"
    write_result(path, make({"nll": [1.0, 2.0]}), FACTS)
    file = ResultFile.open(path, "duollm evaluate", tmp_path)
    assert (file.floats("nll").tolist(), file.facts) == ([1.0, 2.0], FACTS)
    with pytest.raises(TypeError):
        write_result(path, {"nll": [3.0]}, {"not JSON": object()})
    assert [each.name for each in path.parent.iterdir()] == ["prose.parquet"]
    assert ResultFile.open(path, "duollm evaluate", tmp_path).floats("nll").tolist() == [1.0, 2.0]
