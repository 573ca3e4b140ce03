"""What people see: bars on a terminal, plain lines elsewhere, next to nothing with --quiet; and where runs go."""

import io
import re
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from netllm_pl import progress as showing
from netllm_pl import run_folder
from netllm_pl.cli import main
from netllm_pl.progress import Lines, attach, in_words, progress, status
from netllm_pl.run_folder import make_folder, task_name

ROOT = Path(__file__).parent.parent
GRU = ROOT / "configs" / "baselines" / "viewport_prediction_gru.yaml"
CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f]")
"""Control characters, all but the end of a line."""


def small(*more: str) -> list[str]:
    """A small learned baseline on little data, two steps."""
    smoke = ROOT / "configs" / "overlays" / "smoke.yaml"
    data = "--data.init_args.synthetic={videos: 4, users: 4, seconds: 30}"
    return ["--config", str(GRU), "--config", str(smoke), data, *more]


class Terminal(io.StringIO):
    """A stream that says that it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminal]:
    """Standard error as a terminal."""
    for name in ("NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    screen = Terminal()
    monkeypatch.setattr(showing, "sys", SimpleNamespace(stderr=screen))  # pytest sets that of all modules anew
    yield screen
    attach(None)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write a line at every chance."""
    monkeypatch.setattr(showing, "FIRST", 0.0)
    monkeypatch.setattr(showing, "INTERVAL", 0.0)


# One work -------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("impatient")
def test_without_a_terminal_there_are_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("episodes", 4) as advance:
        advance(1)
        advance(3)
    lines = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"episodes: 1 of 4 \(25 %\), \d+ s left", lines[0])
    assert lines[1] == "episodes: 4 of 4 (100 %), 0 s left"
    assert re.fullmatch(r"episodes: done in \d+ s", lines[2])
    assert len(lines) == 3


def test_what_is_fast_has_no_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with status("running"), progress("episodes", 4) as advance:
        advance(4)
    assert capsys.readouterr() == ("", "")


def test_lines_are_seldom(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now = [100.0]
    monkeypatch.setattr(showing.time, "monotonic", lambda: now[0])
    with progress("windows", 500) as advance:
        for _ in range(250):
            now[0] += 0.125
            advance(1)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "windows: 8 of 500 (2 %), 62 s left",
        "windows: 88 of 500 (18 %), 52 s left",
        "windows: 168 of 500 (34 %), 42 s left",
        "windows: 248 of 500 (50 %), 32 s left",
        "windows: done in 31 s",
    ]


def test_a_resumed_work_is_timed_from_where_it_began(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr(showing.time, "monotonic", lambda: now[0])
    lines = Lines("step", 100, done=50)
    now[0] = 10.0
    lines.advance(10)
    assert capsys.readouterr().err == "step: 60 of 100 (60 %), 40 s left\n"


@pytest.mark.usefixtures("impatient")
def test_work_of_unknown_length_says_how_much_and_how_long(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("MB of archive", float("inf")) as advance:
        advance(2.5)
    assert re.match(r"MB of archive: 2\.5, \d+ s so far\n", capsys.readouterr().err)


@pytest.mark.parametrize(("seconds", "words"), [(0.2, "0 s"), (99, "99 s"), (600, "10 min"), (7200, "2.0 h")])
def test_durations_are_short(seconds: float, words: str) -> None:
    assert in_words(seconds) == words


def test_on_a_terminal_there_is_one_bar_a_work_and_nothing_is_left(terminal: Terminal) -> None:
    with status("running bba"), progress("episodes", 4) as advance:
        advance(2)
        assert showing._State.bars is not None
        texts = [(task.description, task.completed) for task in showing._State.bars.tasks if task.visible]
        assert texts == [("running bba", 0), ("episodes", 2)]
    shown = terminal.getvalue()
    assert "\x1b[" in shown and "running bba" in shown and "episodes" in shown
    assert showing._State.bars is None


def test_after_an_error_the_next_work_has_a_bar_of_its_own(terminal: Terminal) -> None:
    with pytest.raises(ValueError), progress("first", 4):
        raise ValueError
    with progress("second", 4):
        assert showing._State.bars is not None
        assert [task.description for task in showing._State.bars.tasks] == ["second"]


def test_lightning_keeps_its_bars_when_work_is_done_inside(terminal: Terminal) -> None:
    """It finds its bars by their place, so a bar that is over must not be taken out."""
    from lightning.pytorch.callbacks.progress.rich_progress import CustomProgress

    bars = CustomProgress()
    attach(bars, float("inf"))
    own = bars.add_task("Epoch", total=3)
    with progress("episodes", 4) as advance, status("unknown"):
        advance(4)
    later = bars.add_task("Validation", total=3)
    assert [bars.tasks[place].description for place in (own, later)] == ["Epoch", "Validation"]
    assert [task.description for task in bars.tasks if task.visible] == ["Epoch", "Validation"]


@pytest.mark.parametrize(("epochs", "text"), [(-1, "Epoch 3   "), (8, "Epoch 3/7 ")])
def test_epochs_are_counted_to_their_number_if_there_is_one(epochs: int, text: str) -> None:
    from callbacks.progress import Bars

    bars = Bars()
    bars._trainer = SimpleNamespace(max_epochs=epochs)
    assert bars._get_train_description(3) == text


# Commands -------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("own_cache", "impatient")
def test_a_run_without_a_terminal_writes_plain_lines_and_its_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """And goes to a folder named by task and time."""
    monkeypatch.chdir(tmp_path)
    main(["fit", *small()])
    out, err = capfd.readouterr()
    assert not CONTROL.search(out + err), out + err
    (folder,) = Path("runs").iterdir()
    assert re.fullmatch(r"viewport_prediction-\d{8}-\d{6}", folder.name)
    assert {"config.yaml", "metrics.csv", "last.ckpt", "best.ckpt", "summary.csv"} <= {f.name for f in folder.iterdir()}
    assert re.search(r"^training, step: 1 of 2 \(50 %\), \d+ s left, train/loss [\d.]+$", err, re.M), err
    assert re.search(r"^validation at step 2: val/loss [\d.]+, val/mae_deg ", err, re.M), err
    assert re.search(r"^windows: \d+ of \d+ \(100 %\)", err, re.M), err
    assert "static" in out and "95 % interval" in out and f"run folder: {folder}" in out

    main(["test", *small("--ckpt_path", str(folder / "best.ckpt"), "--run_dir", str(folder))])
    out, err = capfd.readouterr()
    assert "testing, batch: 1 of 1 (100 %)" in err
    tested = re.search(rf"wrote summary\.csv, .* in ({folder}/test-\d+-\d+)", out)
    assert tested, "the table of fit is not written over"
    assert (Path(tested[1]) / "summary.csv").read_text() == (folder / "summary.csv").read_text()


@pytest.mark.usefixtures("own_cache")
def test_a_run_that_writes_no_checkpoint_has_a_table_too(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    main(["fit", *small("--run_dir", str(tmp_path / "run"), "--trainer.enable_checkpointing", "false")])
    assert not list((tmp_path / "run").glob("*.ckpt"))
    assert re.search(r"ViewportGRU is (better|worse) than static by", capfd.readouterr().out)


@pytest.mark.usefixtures("own_cache")
def test_quiet_commands_say_where_the_result_is_and_nothing_else(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def said(*words: str) -> str:
        main([*words, "--quiet"])
        out, err = capfd.readouterr()
        assert err == ""
        return str(out)

    run, best, out = str(tmp_path / "run"), str(tmp_path / "run" / "best.ckpt"), str(tmp_path / "out")
    table = "wrote summary.csv, paired.csv, episodes.parquet in "
    assert said("fit", *small("--run_dir", run)) == f"{table}{run}\n"
    checkpoint = ["--ckpt_path", best, "--run_dir", out]
    assert said("test", *small(*checkpoint)) == f"{table}{out}\n"
    assert said("predict", *small(*checkpoint)).startswith(f"wrote {out}/predictions.")
    config = ["--config", f"{run}/config.yaml"]
    assert said("evaluate", *config, "--policies", f"static,{best}", "--out", f"{out}/e") == f"{table}{out}/e\n"
    assert said("benchmark", *config, "--quick", "--out", f"{out}/b.json") == f"wrote {out}/b.json\n"
    assert said("validate", *small(*checkpoint)).count("val/mae_deg") == 1, "the metrics are the result"
    bitrate = ["--config", str(ROOT / "configs" / "adaptive_bitrate.yaml"), "--data.rules.chunks", "5"]
    pool = f"{tmp_path}/pool"
    recorded = said("collect", *bitrate, "--policy", "bba", "--episodes", "3", "--out", pool)
    assert re.fullmatch(rf"wrote 3 episodes, \d+ steps in {pool}\n", recorded)


def test_a_quiet_command_still_tells_of_mistakes(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fit", "--config", "nowhere.yaml", "--quiet"])
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("error: config file nowhere.yaml does not exist")
    with pytest.raises(SystemExit):
        main(["fit", "--config", "nowhere.yaml"])
    assert not showing.is_quiet()


# Folders of runs ------------------------------------------------------------------------------------------------------


class _Clock(datetime):
    """Noon, for ever."""

    @classmethod
    def now(cls, tz: Any = None) -> "_Clock":
        return cls(2026, 11, 24, 12, 15)


def test_two_runs_of_the_same_second_have_two_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder, "datetime", _Clock)
    names = [make_folder(tmp_path / "runs", "job_scheduling").name for _ in range(3)]
    stem = "job_scheduling-20261124-121500"
    assert names == [stem, f"{stem}-2", f"{stem}-3"]


def test_processes_of_a_run_share_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_folder.os, "environ", {})
    first = run_folder.folder_of_run(Path)
    assert run_folder.folder_of_run(Path) != first, "a run of its own"
    second = run_folder.folder_of_run(Path)
    run_folder.os.environ["LOCAL_RANK"] = "1"
    assert run_folder.folder_of_run(Path) == second


def test_a_task_is_called_by_its_folder_or_its_class() -> None:
    from netllm_pl.toy import CandidateTask
    from tasks.job_scheduling import Decima

    assert (task_name(Decima), task_name(CandidateTask)) == ("job_scheduling", "candidate_task")


def test_a_run_that_did_not_begin_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(["fit", *small("--trainer.accelerator", "abacus")])
    assert not list(tmp_path.rglob("viewport_prediction-*"))
