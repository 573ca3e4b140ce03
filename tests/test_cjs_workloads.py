"""Workloads: against the published logs, every kind of broken file, the published layout, `fetch tpch`."""

import dataclasses
import io
import os
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from netllm_pl.cli import main
from netllm_pl.errors import UserError
from netllm_pl.fetch import fetch
from netllm_pl.unpickle import read_npy
from tasks.job_scheduling import fetching
from tasks.job_scheduling.fetching import content_sha256
from tasks.job_scheduling.profiles import Profiles
from tasks.job_scheduling.profiles_parquet import read_parquet, write_parquet
from tasks.job_scheduling.published_npy import read_published
from tasks.job_scheduling.workloads import LEVELS, WAVES, Workload, read_workload

CONFIGS = Path(__file__).parents[1] / "configs"
GOLDEN = Path(__file__).parents[2] / "shared" / "golden" / "cjs"
PUBLISHED = {"fresh": "fresh_durations", "first": "first_wave", "rest": "rest_wave"}
Row = dict[str, Any]


def stage(query: int = 1, number: int = 0, size: str = "2g", **changes: Any) -> Row:
    row = {"size": size, "query": query, "stage": number, "children": [], "levels": [5, 10]}
    return row | {"first": [[30, 10, 20], [40]], "fresh": [[10], []], "rest": [[5, 7], []]} | changes


def job(**changes: Any) -> list[Row]:
    """Two stages in a row, the first with changes."""
    return [stage(number=0, **({"children": [1]} | changes)), stage(number=1)]


def written(rows: list[Row], folder: Path) -> Path:
    table = pa.Table.from_pylist(rows) if rows else pa.Table.from_pylist([stage()]).slice(0, 0)
    pq.write_table(table, folder / "jobs.parquet")
    return folder / "jobs.parquet"


def published(profiles: Profiles, folder: Path) -> Path:
    """Profiles in the published layout."""
    for k, (begin, end) in enumerate(zip(profiles.stage_start[:-1], profiles.stage_start[1:], strict=True)):
        adjacency = np.zeros((end - begin, end - begin))
        durations = {}
        for at in range(begin, end):
            adjacency[at - begin, profiles.children[profiles.child_start[at] : profiles.child_start[at + 1]]] = 1
            rows = range(profiles.level_start[at], profiles.level_start[at + 1])
            durations[int(at - begin)] = {
                PUBLISHED[wave]: {int(profiles.levels[row]): listed(profiles, row, column) for row in rows}
                for column, wave in enumerate(WAVES)
            }
        place = folder / str(profiles.sizes[k])
        place.mkdir(parents=True, exist_ok=True)
        np.save(place / f"adj_mat_{profiles.queries[k]}.npy", adjacency)
        np.save(place / f"task_duration_{profiles.queries[k]}.npy", durations)  # type: ignore[arg-type]
    return folder


def alike(table: Any) -> Row:
    """One stage in the published layout."""
    return {name: table for name in PUBLISHED.values()}


def listed(profiles: Profiles, row: int, column: int) -> list[int]:
    begin = profiles.list_start[row, column]
    return [int(value) for value in profiles.durations[begin : begin + profiles.list_size[row, column]]]


def same(one: Workload, other: Workload) -> None:
    """Equal but for where lists lie."""
    for field in dataclasses.fields(Workload):
        if field.name not in ("wave_start", "durations"):
            np.testing.assert_array_equal(getattr(one, field.name), getattr(other, field.name), err_msg=field.name)
    np.testing.assert_array_equal(drawn(one), drawn(other))


def drawn(workload: Workload) -> npt.NDArray[np.float64]:
    """Durations of all lists, one behind the other."""
    spans = zip(workload.wave_start.ravel(), workload.wave_size.ravel(), strict=True)
    return np.concatenate([workload.durations[begin : begin + size] for begin, size in spans])


def draws(workload: Workload, number: int, level: int, wave: str) -> list[float]:
    at = number, LEVELS.index(level), WAVES.index(wave)
    return workload.durations[workload.wave_start[at] :][: workload.wave_size[at]].tolist()  # type: ignore[no-any-return]


# Preparation ----------------------------------------------------------------------------------------------------------


def test_first_waves_lose_fresh_tasks_and_empty_ones_take_the_next_lower_level(tmp_path: Path) -> None:
    first = [[9, 3, 9, 4], [5, 6], [8]]
    fresh = [[9], [6, 5], [1]]
    rows = job(levels=[20, 10, 5], first=first, fresh=fresh, rest=[[2], [], []])
    workload = read_workload(written(rows, tmp_path))
    assert draws(workload, 0, 20, "first") == [3, 9, 4]  # the first 9 is removed, the order is kept
    assert draws(workload, 0, 10, "first") == [8] and draws(workload, 0, 5, "first") == [8]
    assert draws(workload, 0, 10, "fresh") == [6, 5] and draws(workload, 0, 5, "fresh") == [1]
    assert workload.num_tasks.tolist() == [5, 5]  # of the level stored first, before cleaning
    numbers = [9, 6, 5, 1, 3, 9, 4, 8, 8, 2]
    assert workload.rough_ms[0] == pytest.approx(np.mean(numbers), abs=1e-12)
    medians = workload.medians[0, LEVELS.index(20)]
    assert medians.tolist() == [9, 4, 2] and workload.medians[0, LEVELS.index(10), 0] == 5  # the lower of two
    assert np.isnan(workload.medians[0, 0, WAVES.index("rest")])


def test_a_level_that_is_missing_takes_the_largest(tmp_path: Path) -> None:
    workload = read_workload(written(job(levels=[2, 58], rest=[[], [4, 2]]), tmp_path))
    assert (workload.level_key[0] == 58).all() and not workload.level_present[0].any()
    assert workload.level_key[1].tolist() == [5, 10, 10, 10, 10, 10, 10, 10]
    assert workload.level_present[1].tolist() == [True, True] + [False] * 6
    assert draws(workload, 0, 100, "rest") == [4, 2]


def test_graphs_and_the_table_of_templates(tmp_path: Path) -> None:
    shape = {0: [3, 1], 1: [2], 2: [3], 3: []}
    rows = [
        stage(query, k, size, children=shape[k]) for size in ("10g", "2g") for query in (7, 3) for k in (2, 0, 3, 1)
    ]
    workload = read_workload(written(rows, tmp_path))
    assert workload.sizes.tolist() == ["2g", "2g", "10g", "10g"] and workload.queries.tolist() == [3, 7, 3, 7]
    assert workload.table.tolist() == [[0, 1], [2, 3]] and workload.template(1, 0) == 2
    assert workload.height.tolist() == [3, 2, 1, 0] * 4
    assert workload.children.tolist() == [1, 3, 2, 3] * 4 and workload.parents.tolist() == [0, 1, 0, 2] * 4
    assert workload.parent_start[:5].tolist() == [0, 0, 1, 2, 4]


@pytest.mark.parametrize("log", ["det_fair_seed1", "det_decima_argmax_seed1"])
def test_medians_and_tasks_are_those_of_the_published_logs(log: str, data_dir: Path) -> None:
    if not GOLDEN.is_dir():
        pytest.skip(f"no logs in {GOLDEN}")
    workload = read_workload(data_dir / "cjs" / "tpch.parquet")
    jobs, tape = (pd.read_parquet(GOLDEN / f"{log}_{kind}.parquet") for kind in ("jobs", "tape"))
    number = {key: k for k, key in enumerate(zip(workload.sizes.tolist(), workload.queries.tolist(), strict=True))}
    template = np.array([number[key] for key in zip(jobs["query_size"], jobs["query_num"], strict=True)])
    np.testing.assert_array_equal(np.diff(workload.stage_start)[template], jobs["num_stages"])
    tasks = np.add.reduceat(workload.num_tasks, workload.stage_start[:-1])
    np.testing.assert_array_equal(tasks[template], jobs["num_tasks"])
    at = workload.stage_start[template[tape["job_id"]]] + tape["stage_id"].to_numpy()
    column = (workload.level_key[at] == tape["level_key"].to_numpy()[:, None]).argmax(1)
    wave = tape["wave"].map({PUBLISHED[name]: k for k, name in enumerate(WAVES)}).astype(int)
    expected = workload.medians[at, column, wave] + 1000.0 * tape["warmup_added"]
    np.testing.assert_array_equal(expected, tape["duration_ms"])


# Broken files ---------------------------------------------------------------------------------------------------------

EMPTY: list[Any] = [[], []]
BROKEN: list[tuple[str, Callable[[], list[Row]]]] = [
    (r"job 2g/1, stage 0: .*remove the cycle", lambda: [stage(children=[1]), stage(number=1, children=[0])]),
    (r"job 2g/1, stage 0: .*remove the cycle", lambda: job(children=[0])),
    (r"job 2g/1, stage 0: child 2 does not exist; the job has 2 stages", lambda: job(children=[2])),
    (r"stage 0: child -1 does not exist", lambda: job(children=[-1])),
    (r"stage 0: child 1 is given twice", lambda: job(children=[1, 1])),
    (r"stage 0: no tasks; first and rest are empty at its first level, 5", lambda: job(first=[[], [1]], rest=EMPTY)),
    (r"stage 0: no duration for a new executor at level 5", lambda: job(first=[[], [1]], fresh=EMPTY)),
    (r"stage 0: levels are empty", lambda: job(levels=[], first=[], fresh=[], rest=[])),
    (r"stage 0: level 5 is given twice", lambda: job(levels=[5, 5])),
    (r"stage 0: level 0 is not a number of executors", lambda: job(levels=[0, 5])),
    (r"stage 0: rest at level 10 holds -3", lambda: job(rest=[[5], [7, -3]])),
    (r"stage 0: rest at level 5 holds 0", lambda: job(rest=[[0], []])),
    (r"stage 0: first at level 5 holds nan", lambda: job(first=[[float("nan")], [1.0]])),
    (r"stage 0: fresh at level 10 holds inf", lambda: job(fresh=[[1.0], [float("inf")]])),
    (r"stage 0: first has 1 lists for 2 levels", lambda: job(first=[[1, 2]])),
    (r"job 2g/1, stage 1: is given twice", lambda: [*job(), stage(number=1)]),
    (r"job 2g/1, stage 0: is given twice", lambda: [*job(), stage(number=0)]),
    (r"job 2g/1, stage 2: comes where stage 1 is expected", lambda: [stage(), stage(number=2)]),
    (r"job 2g/1, stage 1: comes where stage 0 is expected", lambda: [stage(number=1)]),
    (r"no job of size 5g and query 2", lambda: [stage(1, size="2g"), stage(2, size="2g"), stage(1, size="5g")]),
    (r"holds no jobs", list),
    (r"column 'query' is double; expected integers", lambda: [stage(query=1.5)]),  # type: ignore[arg-type]
    (r"column 'size' is int64; expected text", lambda: [stage(size=2)]),  # type: ignore[arg-type]
    (r"column 'first' is list<.*; expected lists of lists of numbers", lambda: [stage(first=[1, 2])]),
    (r"column 'children' is list<.*string>; expected lists of integers", lambda: job(children=["1"])),
    (r"column 'children' holds nulls", lambda: [stage(children=[1]), stage(number=1, children=None)]),
    (r"column 'rest' holds nulls", lambda: job(rest=[[1], None])),
]  # fmt: skip


@pytest.mark.parametrize(("message", "rows"), BROKEN, ids=[message[-40:] for message, _ in BROKEN])
def test_what_makes_no_jobs_is_named(message: str, rows: Callable[[], list[Row]], tmp_path: Path) -> None:
    path = written(rows(), tmp_path)
    with pytest.raises(UserError, match=message) as error:
        read_workload(path)
    assert str(error.value).startswith(str(path)) and len(str(error.value)) < 400


@pytest.mark.parametrize("command", ["fit", "evaluate", "collect"])
def test_the_command_line_prints_what_is_wrong_in_one_line(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whichever command reads the jobs, and nothing is written."""
    path = written([stage(children=[1]), stage(number=1, children=[0])], tmp_path)
    more = {
        "fit": ["--model.init_args.backbone", str(CONFIGS / "llm" / "tiny_random.yaml"), "--run_dir"],
        "evaluate": ["--policies", "fair", "--out"],
        "collect": ["--policy", "fair", "--episodes", "2", "--out"],
    }
    config = ["--config", str(CONFIGS / "job_scheduling.yaml"), "--data.init_args.workload", str(path)]
    with pytest.raises(SystemExit) as ended:
        main([command, *config, *more[command], str(tmp_path / "out")])
    assert ended.value.code == 2
    wrong = f"error: {path}, job 2g/1, stage 0: it waits for itself, or leads to stages that do; remove the cycle\n"
    assert capsys.readouterr().err.endswith(wrong)
    assert not [file for file in tmp_path.rglob("out/*") if file.suffix in (".ckpt", ".parquet", ".csv")]


def test_missing_columns_and_files_are_named(tmp_path: Path) -> None:
    path = written([{key: value for key, value in stage().items() if key not in ("levels", "rest")}], tmp_path)
    with pytest.raises(UserError, match="missing column levels, rest; found size, query"):
        read_workload(path)
    with pytest.raises(UserError, match="does not exist"):
        read_workload(tmp_path / "absent.parquet")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no <size>/adj_mat"):
        read_workload(tmp_path / "empty")


def test_any_bytes_give_a_workload_or_the_error(tmp_path: Path) -> None:
    """Files that are cut anywhere, or in which bytes are changed."""
    path = written([row for query in range(3) for row in ({**part, "query": query} for part in job())], tmp_path)
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    bodies = [b"", b"PAR1", rng.bytes(500), *(whole[:length] for length in rng.integers(0, len(whole), 40))]
    for _ in range(400):
        body = bytearray(whole)
        for place in rng.integers(0, len(whole), rng.integers(1, 4)):
            body[place] = rng.integers(256)
        bodies.append(bytes(body))
    refused = 0
    for broken in bodies:
        path.write_bytes(broken)
        try:
            assert len(read_workload(path)) > 0
        except UserError as error:
            refused += str(path) in str(error)
    assert refused > 200


# The published layout -------------------------------------------------------------------------------------------------


def test_the_published_layout_gives_the_same_workload(tmp_path: Path) -> None:
    rows = [{**row, "query": query, "size": size} for query in (1, 2) for size in ("2g", "10g") for row in job()]
    rows[0] |= {"levels": [10, 2, 5], "first": [[1, 2], [3], [4, 5]], "fresh": [[2], [], [9]], "rest": [[], [6, 7], []]}
    path = written(rows, tmp_path)
    folder = published(read_parquet(path), tmp_path / "tpch")
    np.save(folder / "2g" / "stage_id_to_node_idx_map_1.npy", {0: 0})  # type: ignore[arg-type]
    same(read_workload(folder), read_workload(path))
    write_parquet(read_published(folder), tmp_path / "new" / "again.parquet")
    same(read_workload(tmp_path / "new" / "again.parquet"), read_workload(path))


class Runs:
    """Runs a command where it is unpickled."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("executed",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({0: {"first_wave": Runs()}}, r"refused: it asks for (posix|nt)\.mkdir"),
        ({1: {}}, "expected the stages 0 to 0 of adj_mat_1.npy"),
        ({0: {"first_wave": {5: [1]}}}, "stage 0: expected fresh_durations, first_wave, rest_wave"),
        ({0: alike({"5": [1]})}, "stage 0: levels .*; expected numbers of executors"),
        ({0: alike({5: ["long"]})}, "stage 0, level 5: durations are"),
        ({0: alike({5: [[1], [2, 3]]})}, "stage 0, level 5: durations are"),
        ({0: {"first_wave": {5: [1]}, "fresh_durations": {10: [1]}, "rest_wave": {}}}, "has no level 10"),
        (np.ones(3), "expected the stages"),
    ],
)
def test_published_files_that_are_no_profiles_are_refused(
    content: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "tpch" / "2g"
    folder.mkdir(parents=True)
    np.save(folder / "adj_mat_1.npy", np.zeros((1, 1)))
    np.save(folder / "task_duration_1.npy", content)
    with pytest.raises(UserError, match=message) as error:
        read_workload(folder.parent)
    assert "task_duration_1.npy" in str(error.value)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("code", [b"Nr\x00\x00\x00\x01.", b"\x96\x00\x00\x00\x10\x00\x00\x00\x00."])
def test_a_broken_object_does_not_take_the_memory_that_it_names(code: bytes, tmp_path: Path) -> None:
    """The first puts None at place 16,777,216 of a table, the second makes a bytearray of 256 MB."""
    file = tmp_path / "object.npy"
    np.save(file, {})  # type: ignore[arg-type]
    whole = file.read_bytes()
    file.write_bytes(whole[: whole.index(b"\n") + 1] + b"\x80\x05" + code)
    tracemalloc.start()
    with pytest.raises(UserError, match=r"is not an \.npy file of plain data"):
        read_npy(file)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50e6


@pytest.mark.parametrize("name", ["adj_mat_1.npy", "task_duration_1.npy"])
def test_any_bytes_in_the_published_layout_give_a_workload_or_the_error(name: str, tmp_path: Path) -> None:
    folder = published(read_parquet(written(job(), tmp_path)), tmp_path / "tpch")
    file, rng = folder / "2g" / name, np.random.default_rng(1)
    whole = file.read_bytes()
    for trial in range(250):
        body = bytearray(whole[: rng.integers(len(whole))] if trial % 5 == 0 else whole)
        for place in rng.integers(0, max(len(body), 1), 2 if body else 0):
            body[place] = rng.integers(256)
        file.write_bytes(bytes(body))
        try:
            read_workload(folder)
        except UserError as error:
            assert str(folder) in str(error)
    file.unlink()
    with pytest.raises(UserError, match=f"{name} is missing beside"):
        read_workload(folder)


# fetch ----------------------------------------------------------------------------------------------------------------


def archive(folder: Path, file: Path) -> str:
    """The folder as a tar archive of the published repository."""
    with tarfile.open(file, "w:gz", compresslevel=1) as tar:
        tar.add(folder, "decima-sim-0/spark_env/tpch")
        note = tarfile.TarInfo("decima-sim-0/README.md")
        note.size = 4
        tar.addfile(note, io.BytesIO(b"note"))
    return str(file)


def test_fetch_brings_the_published_profiles(data_dir: Path, tmp_path: Path) -> None:
    real = read_parquet(data_dir / "cjs" / "tpch.parquet")
    assert content_sha256(real) == fetching.SHA256
    url = archive(published(real, tmp_path / "tpch"), tmp_path / "decima.tar.gz")
    path = fetch("tpch", str(tmp_path / "data"), url=url)
    assert path == tmp_path / "data" / "cjs" / "tpch.parquet" and list(path.parent.iterdir()) == [path]
    same(read_workload(path), read_workload(data_dir / "cjs" / "tpch.parquet"))
    assert fetch("tpch", str(tmp_path / "data"), url="http://127.0.0.1:9/never-asked") == path
    assert fetch("tpch", str(tmp_path / "other"), url=str(tmp_path / "tpch")).is_file()


def test_without_a_network_fetch_says_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = "http://127.0.0.1:9/decima.tar.gz"
    with pytest.raises(SystemExit) as ended:
        main(["fetch", "tpch", "--data_dir", str(tmp_path / "data"), "--url", url])
    assert ended.value.code == 2 and not (tmp_path / "data").exists()
    first, cure = capsys.readouterr().err.splitlines()
    assert first.startswith(f"error: cannot download {url}: ") and first.endswith("Connection refused")
    assert "Max retries" not in first and "copy of the archive on this machine with --url" in cure


def test_fetch_refuses_other_profiles_and_keeps_nothing(tmp_path: Path) -> None:
    folder = published(read_parquet(written(job(), tmp_path)), tmp_path / "tpch")
    with pytest.raises(UserError, match="checksum of tpch does not match"):
        fetch("tpch", str(tmp_path / "data"), url=archive(folder, tmp_path / "one.tar.gz"))
    for file in folder.glob("*/adj_mat*"):
        file.rename(file.with_suffix(".txt"))
    for file in folder.glob("*/task*"):
        file.unlink()
    with pytest.raises(UserError, match="holds no TPC-H profiles"):
        fetch("tpch", str(tmp_path / "data"), url=archive(folder, tmp_path / "two.tar.gz"))
    assert not list((tmp_path / "data").glob("**/*"))


def test_the_checksum_depends_on_every_part(tmp_path: Path) -> None:
    profiles = read_parquet(written(job(), tmp_path))
    known = {content_sha256(profiles)}
    for name in ("queries", "durations", "levels"):
        other = dataclasses.replace(profiles, **{name: getattr(profiles, name) + 1})
        known.add(content_sha256(other))
    known.add(content_sha256(dataclasses.replace(profiles, sizes=np.array(["5g"]))))
    known.add(content_sha256(dataclasses.replace(profiles, children=profiles.children - 1)))
    assert len(known) == 6
