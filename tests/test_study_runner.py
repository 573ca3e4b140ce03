"""The runner of studies: side by side, alone where that is asked for, and stopped by a signal."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import yaml

from netllm_pl.cli import main
from netllm_pl.study.plan import Plan, read
from netllm_pl.study.runner import Runner

FAKE = """
import sys, time, pathlib
words = sys.argv[1:]
place = pathlib.Path(words[words.index("--run_dir" if words[0] == "fit" else "--out") + 1])
place.mkdir(parents=True, exist_ok=True)
notes = pathlib.Path("notes")
with notes.open("a") as file:
    file.write(f"begin {place.name}\\n")
if "--fail" in words:
    sys.exit("error: it cannot be")
time.sleep(float(words[words.index("--sleep") + 1]) if "--sleep" in words else 0.3)
with notes.open("a") as file:
    file.write(f"end {place.name}\\n")
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder from which `python -m netllm_pl` is a program that sleeps and takes notes."""
    (tmp_path / "netllm_pl").mkdir()
    (tmp_path / "netllm_pl" / "__init__.py").touch()
    (tmp_path / "netllm_pl" / "__main__.py").write_text(FAKE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def runner_of(folder: Path, runs: dict[str, str], parallel: int) -> Runner:
    file = folder / "some.yaml"
    file.write_text(yaml.safe_dump({"title": "Some", "runs": runs}))
    return Runner(Plan(read(file), folder / "home").jobs, folder / "home", parallel)


def test_commands_run_side_by_side_behind_what_they_need(fake: Path) -> None:
    runs = {"a": "collect", "b": "collect", "c": "collect --pool {a},{b}", "d": "fit --fail", "e": "fit --from {d}"}
    runner = runner_of(fake, runs, 2)
    failed = runner.run()
    notes = (fake / "notes").read_text().splitlines()
    assert set(notes[:2]) == {"begin a", "begin b"} and notes.index("begin c") > max(
        map(notes.index, ("end a", "end b"))
    )
    assert failed[0].startswith("d: error: it cannot be (") and failed[1:] == ["e needs d"] and "begin e" not in notes
    del runner.jobs["d"], runner.jobs["e"]
    assert runner.run() == [] and (fake / "notes").read_text().splitlines() == notes
    record = runner.record("c")
    assert record is not None and record.seconds >= 0.3


def test_what_is_measured_runs_alone(fake: Path) -> None:
    runs = {"a": "benchmark", "b": "collect", "c": "collect", "d": "benchmark", "e": "fit"}
    assert runner_of(fake, runs, 3).run() == []
    notes = (fake / "notes").read_text().splitlines()
    for place in (k for k, note in enumerate(notes) if note == "begin benchmark.json"):
        assert notes[place + 1] == "end benchmark.json"
        begun, ended = (sum(note.startswith(word) for note in notes[:place]) for word in ("begin", "end"))
        assert begun == ended


def test_sigterm_stops_all_commands(fake: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = fake / "some.yaml"
    file.write_text(yaml.safe_dump({"title": "Some", "runs": {"a": "collect --sleep 60", "b": "fit --sleep 60"}}))
    notes = fake / "notes"

    def kill() -> None:
        while not notes.exists() or len(notes.read_text().splitlines()) < 2:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    watcher = threading.Thread(target=kill)
    watcher.start()
    with pytest.raises(SystemExit) as stop:
        main(["study", "some.yaml", "--run_dir", "home", "--out", "out", "--jobs", "2"])
    watcher.join()
    assert stop.value.code == 128 + signal.SIGTERM and "the same command goes on from here" in capsys.readouterr().err
    assert "end" not in notes.read_text()
    assert [json.loads((fake / "home" / "jobs" / f"{name}.json").read_text())["code"] for name in "ab"] == [None, None]
