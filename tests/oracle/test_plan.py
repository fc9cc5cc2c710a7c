import pytest

from duollm.config import OracleConfig
from duollm.errors import UserError
from duollm.oracle.plan import check_memory, check_settings
from tiny import tiny_model

CONFIG = tiny_model().config


@pytest.mark.parametrize("available", [2**20, 2**40])
def test_a_search_that_does_not_fit_the_machine_is_refused(monkeypatch, available):
    monkeypatch.setattr("duollm.oracle.plan.device_memory_bytes", lambda: available)
    if available == 2**40:
        check_memory(OracleConfig(), CONFIG, 8)
    else:
        with pytest.raises(UserError, match=r"^memory_gib: the search would take 1 GiB .* this machine has 0.000977"):
            check_memory(OracleConfig(), CONFIG, 8)


def test_memory_that_nobody_limits_grows_to_what_one_route_takes(monkeypatch):
    monkeypatch.setattr("duollm.oracle.plan.row_bytes", lambda sizes, space: 2**30)
    monkeypatch.setattr("duollm.oracle.plan.device_memory_bytes", lambda: 6 * 2**30)
    check_settings(OracleConfig(), CONFIG, 8)
    with pytest.raises(UserError, match=r"^memory_gib: the search would take 7 GiB .* 7 for hidden states"):
        check_memory(OracleConfig(), CONFIG, 8)
