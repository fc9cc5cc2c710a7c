import dataclasses
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Lock

import pytest

from duollm.stages import Stage, run_stages


class Study:
    """Toy stages a -> b -> d and a -> c; each writes its settings and what it read, and logs that it ran."""

    AFTER = {"a": (), "b": ("a",), "c": ("a",), "d": ("b",)}  # noqa: RUF012

    def __init__(self, folder):
        self.folder = folder
        self.settings = {"a": 1, "b": 1, "c": 1, "d": 1}
        self.versions = {}
        self.ran = []
        self.announced = []
        self.dies_in = None

    def stage(self, name):
        def work():
            self.ran.append(name)
            parts = self.folder / f"{name}.parts"
            parts.mkdir(exist_ok=True)
            begun = len(list(parts.iterdir()))
            (parts / str(begun)).touch()
            if self.dies_in == name:
                raise KeyboardInterrupt
            read = [(self.folder / f"{before}.txt").read_text() for before in self.AFTER[name]]
            (self.folder / f"{name}.txt").write_text(f"{name}{self.settings[name]}({''.join(read)})")

        return Stage(
            name,
            work,
            settings=self.settings[name],
            after=self.AFTER[name],
            outputs=(f"{name}.txt",),
            scratch=(f"{name}.parts",),
            version=self.versions.get(name, 1),
        )

    def run(self, until=None):
        """Run and return the stages that did work, as one word."""
        self.ran.clear()
        self.announced.clear()
        run_stages([self.stage(name) for name in self.AFTER], self.folder, until, self.announced.append)
        return "".join(self.ran)

    def result(self, name):
        return (self.folder / f"{name}.txt").read_text()

    def attempts(self, name):
        return len(list((self.folder / f"{name}.parts").iterdir()))


@pytest.fixture
def study(tmp_path):
    return Study(tmp_path)


def test_a_second_run_does_nothing(study):
    assert study.run() == "abcd"
    assert study.run() == ""
    assert study.announced == [f"{name}: unchanged" for name in "abcd"]


@pytest.mark.parametrize(("changed", "rerun"), [("a", "abcd"), ("b", "bd"), ("c", "c"), ("d", "d")])
def test_a_changed_setting_reruns_what_it_touches(study, changed, rerun):
    study.run()
    study.settings[changed] = 2
    assert study.run() == rerun
    assert f"{changed}2" in study.result(rerun[-1])
    assert study.run() == ""


def test_a_raised_version_reruns_like_a_changed_setting(study):
    study.run()
    study.versions["b"] = 2
    assert study.run() == "bd"


def test_until_runs_only_what_the_stage_builds_on(study):
    assert study.run(until="b") == "ab"
    assert study.run(until="c") == "c"
    assert study.run() == "d"


def test_a_killed_stage_continues_on_its_partial_outputs(study):
    study.dies_in = "b"
    with pytest.raises(KeyboardInterrupt):
        study.run()
    study.dies_in = None
    assert study.run() == "bcd"
    assert "b: continues" in study.announced
    assert study.attempts("b") == 2


def test_a_killed_stage_starts_clean_under_other_settings(study):
    study.dies_in = "b"
    with pytest.raises(KeyboardInterrupt):
        study.run()
    study.dies_in = None
    study.settings["b"] = 2
    study.run()
    assert "b: starts again: its settings, its code or what it reads have changed" in study.announced
    assert study.attempts("b") == 1


def test_a_killed_stage_starts_clean_if_what_it_builds_on_was_made_anew(study):
    study.dies_in = "b"
    with pytest.raises(KeyboardInterrupt):
        study.run()
    study.dies_in = None
    (study.folder / "a.txt").unlink()
    assert study.run() == "abcd"
    assert study.attempts("b") == 1


def test_changing_back_after_a_kill_does_not_trust_the_old_outputs(study):
    study.run()
    study.settings["b"] = 2
    study.dies_in = "b"
    with pytest.raises(KeyboardInterrupt):
        study.run()
    study.dies_in = None
    study.settings["b"] = 1
    assert study.run() == "bd"
    assert study.result("d") == "d1(b1(a1()))"


def test_a_removed_output_is_made_again_with_all_that_builds_on_it(study):
    study.run()
    (study.folder / "b.txt").unlink()
    assert study.run() == "bd"
    assert study.attempts("b") == 1


def test_markers_tell_fingerprint_and_time(study):
    study.run()
    markers = {path.name for path in (study.folder / "stages").iterdir()}
    assert markers == {"a.json", "b.json", "c.json", "d.json"}
    marker = json.loads((study.folder / "stages" / "b.json").read_text())
    assert set(marker) == {"fingerprint", "seconds", "finished_at"}
    assert marker["seconds"] >= 0


def test_a_broken_marker_counts_as_absent(study):
    study.run()
    (study.folder / "stages" / "d.json").write_text("[")
    assert study.run() == "d"


def test_scratch_need_not_outlive_the_stage(study):
    study.run()
    shutil.rmtree(study.folder / "b.parts")
    assert study.run() == ""


def test_a_stage_that_does_not_make_its_outputs_is_not_finished(tmp_path):
    idle = Stage("idle", lambda: None, settings=1, outputs=("absent.txt",))
    with pytest.raises(RuntimeError, match=r"absent\.txt"):
        run_stages([idle], tmp_path, announce=lambda line: None)
    assert not (tmp_path / "stages" / "idle.json").exists()


def test_stages_must_come_in_order(tmp_path):
    stages = [Stage("b", lambda: None, 1, after=("a",)), Stage("a", lambda: None, 1)]
    with pytest.raises(ValueError, match="b builds on a"):
        run_stages(stages, tmp_path)


def test_an_unknown_stage_is_refused(study):
    with pytest.raises(ValueError, match="no stage 'e'"):
        study.run(until="e")


def test_processes_agree_and_only_the_first_writes(study):
    barrier = Barrier(3, timeout=30)
    stages = [study.stage(name) for name in study.AFTER]
    announced = []
    lock = Lock()

    def run(rank):
        with_lock = [dataclasses.replace(stage, run=lambda work=stage.run: locked(work)) for stage in stages]
        announce = announced.append if rank == 0 else lambda line: None
        run_stages(with_lock, study.folder, None, announce, rank == 0, barrier.wait)

    def locked(work):
        with lock:
            work()

    for expected in ("aaabbbcccddd", ""):
        study.ran.clear()
        with ThreadPoolExecutor(3) as pool:
            list(pool.map(run, range(3)))
        assert "".join(study.ran) == expected
    assert announced.count("a: starts") == announced.count("a: unchanged") == 1
