"""Decisions for a long time take as much memory and time in the end as in the beginning.

`NETLLM_SOAK_S=3600 pytest tests/test_soak.py` streams for an hour; `tests/soak.py` does so by command.
"""

import os
from pathlib import Path

import pandas as pd
import pytest
from soak import Line, growth, main

SECONDS = float(os.environ.get("NETLLM_SOAK_S", "0"))


def line(number: int, memory_mb: float, cpu_ms: float, task: str = "adaptive_bitrate") -> Line:
    return Line(60.0 * number, task, number, 100, memory_mb, 5.0, 9.0, cpu_ms)


def test_what_grows_is_told_and_what_does_not_is_not() -> None:
    flat = [line(k, 500 + k % 2, 3 + 0.2 * (k % 3)) for k in range(60)]
    assert growth([line(0, 300, 9), *flat]) == []
    assert growth([line(0, 300, 9), *flat, line(99, 900, 90)]) == [], "one line is no growth"
    (told,) = growth([line(k, 500 + 0.5 * k, 3) for k in range(60)])
    assert told == "adaptive_bitrate: memory_mb grew from 503.750 to 526.250"
    slower = [line(k, 500, 3 + 0.05 * k, "job_scheduling") for k in range(60)]
    assert growth([*flat, *slower]) == ["job_scheduling: cpu_p10_ms grew from 3.375 to 5.625"]


@pytest.mark.skipif(not SECONDS, reason="takes as long as NETLLM_SOAK_S says")
def test_streaming_stays_flat() -> None:
    main(["--seconds", str(SECONDS), "--every", str(max(1.0, SECONDS / 60))])


def test_a_soak_streams_both_tasks_and_writes_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("soak.LATENCY", 100.0)  # of two lines nothing can be told
        patch.setattr("soak.MEMORY", (100.0, 0.0))
        main(["--seconds", "1", "--every", "0.5", "--out", str(tmp_path / "soak.csv")])
    table = pd.read_csv(tmp_path / "soak.csv")
    assert set(table["task"]) == {"adaptive_bitrate", "job_scheduling"} and len(table) >= 2
    assert (table["decisions"] > 0).all() and (table["memory_mb"] > 50).all()
    assert (table["median_ms"] <= table["p99_ms"]).all() and capsys.readouterr().out.endswith("nothing grew\n")
