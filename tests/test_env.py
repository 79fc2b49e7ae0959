from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cellc import env, log
from cellc.errors import UsageError

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("CELLC_")]:
        monkeypatch.delenv(name)


def test_nothing_set() -> None:
    env.check()
    assert env.logs() == {}
    assert env.dump() is None
    assert env.verify() is False


@pytest.mark.parametrize("name", ["CELLC_LOG", "CELLC_VERIFI", "CELLC_DUMP_DIR"])
def test_misspelt_name_lists_the_right_ones(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "1")
    with pytest.raises(UsageError) as error:
        env.check()
    assert name in str(error.value)
    assert all(known in str(error.value) for known in env.VARIABLES)


def test_logs_with_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CELLC_LOGS", "graph, +plan,plan")
    assert env.logs() == {"graph": 1, "plan": 2}


def test_unknown_log_lists_the_right_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CELLC_LOGS", "graph,plans")
    with pytest.raises(UsageError, match="plans.*graph, cells, plan, kernel, schedule"):
        env.check()


def test_verify_takes_0_and_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CELLC_VERIFY", "1")
    assert env.verify() is True
    monkeypatch.setenv("CELLC_VERIFY", "0")
    assert env.verify() is False
    monkeypatch.setenv("CELLC_VERIFY", "yes")
    with pytest.raises(UsageError, match="expected 0 or 1"):
        env.check()


def test_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert env.cache() == tmp_path / "cellc"
    monkeypatch.setenv("CELLC_CACHE", str(tmp_path / "mine"))
    assert env.cache() == tmp_path / "mine"


def test_dump_numbers_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    log.dump("nowhere", "nothing")
    monkeypatch.setenv("CELLC_DUMP", str(tmp_path / "new"))
    log.dump("graph", "a\nb")
    log.dump("cell lstm/cpp", "int x;", suffix=".cpp")
    names = sorted(path.name for path in (tmp_path / "new").iterdir())
    assert [name.partition("-")[2] for name in names] == ["graph.txt", "cell_lstm_cpp.cpp"]
    assert (tmp_path / "new" / names[0]).read_text() == "a\nb\n"


def test_log_is_silent_by_default(capsys: pytest.CaptureFixture[str]) -> None:
    log.info("plan", "a line")
    assert capsys.readouterr().err == ""


def test_log_goes_to_stderr() -> None:
    code = (
        "from cellc import log; log.info('plan', 'one\\ntwo'); log.more('plan', 'three');"
        "log.info('graph', 'four'); log.more('graph', 'five'); log.info('cells', 'six')"
    )
    environment = {**os.environ, "CELLC_LOGS": "+plan,graph"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        "[cellc plan] one",
        "[cellc plan] two",
        "[cellc plan] three",
        "[cellc graph] four",
    ]
