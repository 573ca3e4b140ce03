"""Work in parts: shards on several machines and interruptions give what one process gives; what is wrong is told."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import pytest
import yaml

from netllm_pl import parts, side_by_side
from netllm_pl.cli import main
from netllm_pl.collect import collect
from netllm_pl.errors import UserError
from netllm_pl.experience import read_pool
from netllm_pl.parts import Parts, Shard
from netllm_pl.paths import PARTIAL, atomic, atomic_folder, locked, scratch
from netllm_pl.toy import CandidateData

pytestmark = pytest.mark.usefixtures("own_cache")
ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("pieces", [1, 5, 12])
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_shards_share_out_all_pieces_as_evenly_as_can_be(pieces: int, count: int) -> None:
    shares = [Shard(number, count).of(pieces) for number in range(1, count + 1)]
    assert [piece for share in shares for piece in share] == list(range(pieces))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("text", ["", "2", "0/3", "4/3", "1/0", "-1/2", "1/2/3", "a/b", "1.0/2", "1/"])
def test_what_is_no_shard_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"give i/n with i from 1 to n"):
        Shard.parse(text)
    assert Shard.parse("2/4") == Shard(2, 4) and Shard.parse(None) is None


# Collections ----------------------------------------------------------------------------------------------------------


def steps(folder: Path) -> pd.DataFrame:
    pool = read_pool(folder)
    frame = pd.concat([pd.read_parquet(file) for file in sorted(folder.glob("part-*.parquet"))], ignore_index=True)
    return frame.merge(pool.episodes, on="episode")


class Data(CandidateData):
    """Candidates, with a policy whose episodes depend on each other, and a second one."""

    class Tired(CandidateData.baselines["best"]):  # type: ignore[misc]  # a class
        sequential, episodes = True, 0

        def reset(self, n: int) -> None:
            self.episodes += 1

        def act(self, observations: Any) -> Any:
            return super().act(observations) if self.episodes % 3 else np.zeros((1, 2), np.int64)

    baselines: ClassVar[dict[str, Callable[[], Any]]] = {**CandidateData.baselines, "tired": Tired}


OPTIONS: dict[str, Any] = {"explore": 0.4, "seed": 5, "parallel": 6, "values": "true"}


def test_shards_of_a_collection_make_the_pool_of_one_process(tmp_path: Path) -> None:
    """With exploration, which draws from the numbers of the round."""
    data, whole, out = Data(), tmp_path / "whole", tmp_path / "pool"
    collect(data, {"best": 1.0}, 40, whole, **OPTIONS)
    for number in (3, 1, 2):
        collect(data, {"best": 1.0}, 40, out, **OPTIONS, shard=Shard(number, 3))
        assert not out.exists()
    collect(data, {"best": 1.0}, 40, out, **OPTIONS, merge=True)
    one, two = steps(whole), steps(out)
    assert len(one) > 200 and one.to_json() == two.to_json()
    manifests = [json.loads((folder / "manifest.json").read_text()) for folder in (whole, out)]
    for name in ("made_by", "columns", "policies", "return", "steps"):
        assert manifests[0][name] == manifests[1][name]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "pool", "whole"]


def test_missing_or_strange_parts_of_a_collection_are_told(tmp_path: Path) -> None:
    data, out = Data(), tmp_path / "pool"
    with pytest.raises(UserError, match=r"pool\.parts lacks 7 of 7 pieces .*\(1 to 7\); play them with --shard"):
        collect(data, {"best": 1.0}, 40, out, **OPTIONS, merge=True)
    collect(data, {"best": 1.0}, 40, out, **OPTIONS, shard=Shard(2, 3))
    with pytest.raises(UserError, match=r"lacks 5 of 7 pieces of this collection \(1 to 2, 5 to 7\)"):
        collect(data, {"best": 1.0}, 40, out, **OPTIONS, merge=True)
    with pytest.raises(
        UserError, match=r"pool\.parts holds parts of another collection, with other settings \(explore\)"
    ):
        collect(data, {"best": 1.0}, 40, out, **OPTIONS | {"explore": 0.1}, shard=Shard(1, 3))
    with pytest.raises(UserError, match=r"shard is 8/8, but 40 episodes are 7 round\(s\) of 6; .*smaller --parallel"):
        collect(data, {"best": 1.0}, 40, out, **OPTIONS, shard=Shard(8, 8))
    with pytest.raises(UserError, match="policy 'tired' plays one episode after the other"):
        collect(data, {"tired": 1.0}, 40, tmp_path / "other", **OPTIONS, shard=Shard(1, 2))
    (shard,) = (tmp_path / "pool.parts").iterdir()
    file = shard / "pool" / "part-00000.parquet"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match=r"part-00000\.parquet differs from what was collected"):
        collect(data, {"best": 1.0}, 40, out, **OPTIONS)
    assert not out.exists()


@pytest.mark.parametrize("policy", ["best", "tired"])
def test_an_interrupted_collection_goes_on(
    policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One whose episodes depend on each other begins again: its state is not kept."""
    data, out = Data(), tmp_path / "pool"
    monkeypatch.setattr(parts, "SAVE_S", 0.0)
    shares = {policy: 1.0}
    collect(data, shares, 30, tmp_path / "whole", **OPTIONS)
    played = stop_in(monkeypatch, "reset", after=3 if policy == "best" else 17)
    with pytest.raises(KeyboardInterrupt):
        collect(Data(), shares, 30, out, **OPTIONS)
    kept = [folder for folder in (tmp_path / "pool.parts").iterdir()]
    assert kept and not out.exists()
    played.clear()
    capsys.readouterr()
    collect(Data(), shares, 30, out, **OPTIONS)
    assert len(played) == (2 if policy == "best" else 30)
    assert ("going on: 18 of 30 episodes are in" in capsys.readouterr().out) == (policy == "best")
    assert steps(tmp_path / "whole").to_json() == steps(out).to_json()


def stop_in(monkeypatch: pytest.MonkeyPatch, method: str, after: int) -> list[int]:
    """Let Ctrl-C come at a call of a method of the environment, once; return a list that grows with every call."""
    from netllm_pl.toy import Candidates

    original, calls, left = getattr(Candidates, method), [0], [True]
    calls.clear()

    def counted(self: Any, *arguments: Any) -> Any:
        calls.append(1)
        if left and len(calls) > after:
            left.clear()
            raise KeyboardInterrupt
        return original(self, *arguments)

    monkeypatch.setattr(Candidates, method, counted)
    return calls


def test_those_that_wait_for_one_collection_have_it_one_after_another(tmp_path: Path) -> None:
    """Whoever has finished removes the folder, which others hold locks of, and the next one makes it again."""
    inside, most, done = 0, 0, 0

    def write() -> None:
        nonlocal inside, most, done
        pool = Parts(tmp_path / "pool.parts", {}, "collection", "")
        with pool.claimed(wait=True):
            inside += 1
            most = max(most, inside)
            time.sleep(0.01)
            inside, done = inside - 1, done + 1
            pool.forget()  # from here on it is the next one's turn

    for _ in range(5):
        workers = [threading.Thread(target=write) for _ in range(6)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert (most, done) == (1, 30)


def test_two_processes_do_not_write_one_pool(tmp_path: Path) -> None:
    work = Parts(tmp_path / "pool.parts", {}, "collection", "")
    hold = "import sys; from netllm_pl.paths import locked; from pathlib import Path\nwith locked(Path(sys.argv[1])):"
    hold += " print('held', flush=True); sys.stdin.read()"
    (tmp_path / "pool.parts").mkdir()
    command = [sys.executable, "-c", hold, str(tmp_path / "pool.parts")]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match=r"pool\.parts is in use by another process"), work.claimed():
            pass
        process.kill()
    with work.claimed():  # whatever became of the other
        pass
    assert not (tmp_path / "pool.parts").exists()


# Evaluations ----------------------------------------------------------------------------------------------------------


def evaluation(tmp_path: Path, task: str) -> list[str]:
    """Words of a small evaluation."""
    data: dict[str, Any] = {
        "ViewportPredictionData": {
            "synthetic": {"videos": 3, "users": 6, "seconds": 32, "picture_height": 8, "picture_width": 16},
            "eval_batch_size": 3,
        },
        "AdaptiveBitrateData": {
            "synthetic": {"traces": 7, "duration_s": 60}, "rules": {"chunks": 8}, "eval_batch_size": 2
        },
        "JobSchedulingData": {
            "synthetic": {"queries": 4, "sizes": ["2g", "5g"]}, "rules": {"jobs": 3, "executors": 6},
            "test_seeds": [1, 2, 3, 4], "eval_batch_size": 1,
        },
    }  # fmt: skip
    file = tmp_path / f"{task}.yaml"
    file.write_text(yaml.safe_dump({"data": {"class_path": task, "init_args": data[task]}}))
    policies = {
        "ViewportPredictionData": "static,ridge",
        "AdaptiveBitrateData": "bba,robust_mpc_published,rate",
        "JobSchedulingData": "fair,random",
    }
    return ["evaluate", "--config", str(file), "--policies", policies[task]]


def results(folder: Path) -> dict[str, str]:
    """All files of an evaluation as text."""
    tables = {file.name: pd.read_parquet(file).to_csv() for file in folder.glob("*.parquet")}
    return tables | {file.name: file.read_text() for file in folder.glob("*.csv")}


@pytest.mark.parametrize("task", ["ViewportPredictionData", "AdaptiveBitrateData", "JobSchedulingData"])
def test_shards_of_an_evaluation_make_the_table_of_one_process(
    task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A policy that carries its state over runs in the first shard."""
    words = evaluation(tmp_path, task)
    more = [] if task == "ViewportPredictionData" else ["--steps"]
    main([*words, *more, "--out", str(tmp_path / "whole")])
    table = capsys.readouterr().out
    for number in (2, 1):
        main([*words, *more, "--out", str(tmp_path / "out"), "--shard", f"{number}/2"])
        assert f"wrote shard {number} of 2 in {tmp_path / 'out' / 'parts'}" in capsys.readouterr().out
    main([*words, *more, "--out", str(tmp_path / "out"), "--merge"])
    assert capsys.readouterr().out == table.replace(str(tmp_path / "whole"), str(tmp_path / "out"))
    whole = results(tmp_path / "whole")
    assert whole == results(tmp_path / "out") and len(whole) >= 3
    assert not (tmp_path / "out" / "parts").exists()


def test_devices_run_all_shards_of_a_collection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def one_after_the_other(command: str, words: list[str], count: int) -> None:
        for number in range(count):
            main([command, *words, "--shard", f"{number + 1}/{count}"])

    monkeypatch.setattr(side_by_side, "run_shards", one_after_the_other)
    words = ["collect", *evaluation(tmp_path, "AdaptiveBitrateData")[1:3], "--policy", "bba,rate", "--explore", "0.5"]
    words += ["--episodes", "8", "--parallel", "3"]
    main([*words, "--out", str(tmp_path / "one")])
    main([*words, "--out", str(tmp_path / "two"), "--devices=2"])
    assert steps(tmp_path / "one").to_json() == steps(tmp_path / "two").to_json()
    assert not list(tmp_path.glob("*.parts"))


def test_devices_run_all_shards_of_an_evaluation(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """With a batch for each of them."""
    words = evaluation(tmp_path, "AdaptiveBitrateData")
    large = ["--data.eval_batch_size", "9"]
    main([*words, "--data.eval_batch_size", "4", "--out", str(tmp_path / "whole")])
    main([*words, *large, "--out", str(tmp_path / "out"), "--devices", "2"])
    told = capfd.readouterr().out
    assert "data.eval_batch_size is 4: a batch for each of 2 processes" in told
    assert all(f"wrote shard {number} of 2 in {tmp_path / 'out' / 'parts'} (" in told for number in (1, 2))
    assert results(tmp_path / "whole") == results(tmp_path / "out")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--devices", "0"], "devices is 0; it must be at least 1"),
        (["--devices", "2", "--shard", "1/2"], "leave --shard and --merge out"),
        (["--devices", "2", "--merge"], "leave --shard and --merge out"),
        (["--devices", "9"], "is evaluated in 4 batches or fewer"),
    ],
)
def test_devices_that_make_no_sense_are_refused(
    more: list[str], message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*evaluation(tmp_path, "JobSchedulingData"), "--out", str(tmp_path / "out"), *more])
    error = capfd.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("error:") == 1, error


def test_a_failed_process_stops_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    python = tmp_path / "python"
    python.write_text(
        '#!/bin/sh\ncase "$*" in *"--shard 3/3 --quiet") echo lost >&2; kill -9 $$;; esac\nexec sleep 60\n'
    )
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr(side_by_side, "GRACE_S", 1.0)
    began = time.monotonic()
    with pytest.raises(SystemExit) as stop:
        side_by_side.run_shards("evaluate", ["--config", "x.yaml"], 3)
    assert stop.value.code == 128 + 9 and time.monotonic() - began < 20
    assert capfd.readouterr().err == "lost\nprocess 3 of 3 failed; the same command goes on\n"


def test_each_process_has_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    own = [side_by_side._environment(number, 3)["CUDA_VISIBLE_DEVICES"] for number in range(3)]
    assert own == ["4", "6", "4"]
    assert side_by_side.without_devices(["a", "--devices", "2", "--b=1", "--devices=3"]) == ["a", "--b=1"]


def test_missing_or_strange_parts_of_an_evaluation_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*evaluation(tmp_path, "JobSchedulingData"), "--out", str(tmp_path / "out")]
    main([*words, "--shard", "2/2"])
    for more, message in (
        (["--merge"], r"parts lacks 4 of 8 pieces of this evaluation (1 to 2, 5 to 6)"),
        (["--merge", "--shard", "1/2"], "not both"),
        (["--shard", "3/2"], "shard is '3/2'; give i/n"),
        (
            ["--shard", "5/5"],
            "is evaluated in 4 batches or fewer; take fewer shards, or a smaller data.eval_batch_size",
        ),
        (["--shard", "1/2", "--data.seed", "1"], "holds parts of another evaluation, with other settings (data)"),
    ):
        with pytest.raises(SystemExit) as stop:
            main([*words, *more])
        error = capsys.readouterr().err
        assert stop.value.code == 2 and message in error.splitlines()[-1], error
    main(words)  # the rest
    assert (tmp_path / "out" / "summary.csv").is_file() and not (tmp_path / "out" / "parts").exists()


def test_a_task_that_says_nothing_of_batches_is_evaluated_as_a_whole(tmp_path: Path) -> None:
    file = tmp_path / "toy.yaml"
    file.write_text(yaml.safe_dump({"data": {"class_path": "CandidateData"}}))
    words = ["evaluate", "--config", str(file), "--policies", "best", "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit):
        main([*words, "--shard", "1/2"])
    main([*words, "--shard", "1/1"])
    main([*words, "--merge"])
    assert len(pd.read_parquet(tmp_path / "out" / "episodes.parquet")) == 64


def test_an_interrupted_evaluation_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tasks.job_scheduling.simulator import Simulator

    words = evaluation(tmp_path, "JobSchedulingData")
    main([*words, "--out", str(tmp_path / "whole")])
    monkeypatch.setattr(parts, "SAVE_S", 0.0)
    original, calls = Simulator.reset, []

    def reset(self: Simulator, seeds: Any) -> Any:
        calls.append(list(seeds))
        if len(calls) == 7:
            raise KeyboardInterrupt
        return original(self, seeds)

    monkeypatch.setattr(Simulator, "reset", reset)
    with pytest.raises(SystemExit):
        main([*words, "--out", str(tmp_path / "out")])
    main([*words, "--out", str(tmp_path / "out")])
    assert calls == [[1], [2], [3], [4], [1], [2], [3], [3], [4]]
    assert results(tmp_path / "whole") == results(tmp_path / "out")


# Files ----------------------------------------------------------------------------------------------------------------


def test_what_a_killed_process_left_is_cleared_away_and_no_glob_finds_it(tmp_path: Path) -> None:
    code = "import os, sys; from pathlib import Path; from netllm_pl.paths import atomic\n"
    code += "with atomic(Path(sys.argv[1])) as file: file.write_text('half'); os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "table.csv")], cwd=ROOT, check=False)
    (left,) = tmp_path.iterdir()
    assert left.name.endswith(PARTIAL) and (left / "table.csv").read_text() == "half"
    assert not list(tmp_path.glob("*.csv"))
    with scratch(tmp_path / "live") as live, atomic(tmp_path / "other.csv") as file:
        file.touch()
        assert live.is_dir() and not left.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["other.csv"]


def test_without_locks_nothing_is_cleared_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    def refuse(*_: object) -> None:
        raise OSError("no locks")

    monkeypatch.setattr(fcntl, "flock", refuse)
    left = tmp_path / f".x.csv.12345678{PARTIAL}"
    left.mkdir()
    with atomic(tmp_path / "y.csv") as file:
        file.touch()
    with atomic_folder(tmp_path / "z") as folder:
        (folder / "a").touch()
    with locked(tmp_path) as owned:
        assert owned is None
    assert sorted(path.name for path in tmp_path.iterdir()) == [left.name, "y.csv", "z"]
