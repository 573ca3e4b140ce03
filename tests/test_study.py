"""Studies: what their files may say, that commands run once and in order, and that reports say what was measured."""

import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from matplotlib.image import imread
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from netllm_pl import cli
from netllm_pl.cli import main
from netllm_pl.errors import UserError
from netllm_pl.evaluate import Metric, summarise
from netllm_pl.parsing import Parser
from netllm_pl.study.plan import OVERLAYS, Plan, Run, find, merged, read
from netllm_pl.study.runner import Runner, data_of
from netllm_pl.study.sharing import shared

ROOT = Path(__file__).parent.parent
NIGHTLY = os.environ.get("NETLLM_NIGHTLY", "0") != "0"
SHIPPED = sorted((ROOT / "configs" / "study").glob("*.yaml"))
SMALL = "--data.init_args.synthetic {videos: 6, users: 6, seconds: 20} --data.init_args.eval_batch_size 512"
STUDY: dict[str, Any] = {
    "title": "Which one",
    "seeds": [0, 1],
    "names": {
        "S": "--seed_everything {seed} --data.init_args.seed {seed}",
        "DATA": f"--config {ROOT}/configs/viewport_prediction.yaml",
        "SMALL": SMALL.replace("{", "'{").replace("}", "}'"),
        "FIT": f"fit --config {ROOT}/configs/baselines/viewport_prediction_gru.yaml {{S}} {{SMALL}} --figures false "
        f"--config {ROOT}/configs/overlays/smoke.yaml",
    },
    "runs": {
        "gru": "{FIT}",
        "wide": {"command": "{FIT} --model.init_args.width 64", "seeds": [0], "x": 64, "line": "GRU"},
    },
    "parts": {
        "viewports": {
            "options": "{DATA} {SMALL}",
            "settings": {"near": "", "far": "--data.init_args.horizon 30"},
            "policies": ["static,ridge", "gru", "wide/last.ckpt"],
            "reference": "gru",
            "figures": ["bars", "cdf", "box", "curve", "progress"],
            "x": "log width",
        }
    },
    "labels": {"ridge": "linear on motion"},
    "quick": {"seeds": [0], "runs": {"wide": None}},
}


def write_study(file: Path, **changes: Any) -> Path:
    file.write_text(yaml.safe_dump(merged(STUDY, changes)))
    return file


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study that has been run, and its report."""
    folder = tmp_path_factory.mktemp("study")
    options = ["--run_dir", str(folder / "home"), "--out", str(folder / "out"), "--jobs", "0"]
    main(["study", str(write_study(folder / "which.yaml")), *options])
    return folder


def test_the_report_holds_means_over_seeds_and_paired_differences(study: Path) -> None:
    table = pd.read_csv(study / "out" / "which.csv")
    assert set(table["setting"]) == {"near", "far"} and set(table["part"]) == {"viewports"}
    place = study / "home" / "evaluations" / "viewports" / "near"
    gru, others = (pd.read_parquet(place / name / "episodes.parquet") for name in ("gru", "static_ridge"))
    first, second = (frame.reset_index(drop=True) for _, frame in gru.groupby("policy"))
    mean = first.assign(mae_deg=(first["mae_deg"] + second["mae_deg"]) / 2, policy="gru")
    ridge = others[others["policy"] == "ridge"]
    expected = summarise(pd.concat([ridge, mean]), [Metric("mae_deg", "mae_deg")], ["ridge", "gru"]).iloc[1]
    near = table[(table["setting"] == "near") & (table["metric"] == "mae_deg")].set_index("policy")
    assert near.loc["gru", ["mean", "low", "high"]].tolist() == pytest.approx(
        expected[["mean", "low", "high"]].tolist(), rel=1e-4
    )
    gain = near.loc["ridge", ["gain", "gain_low", "gain_high"]].tolist()
    assert gain == pytest.approx(expected[["paired_mean", "paired_low", "paired_high"]].tolist(), rel=1e-4)
    assert near["seeds"].to_dict() == {"gru": 2, "static": 1, "ridge": 1, "wide/last.ckpt": 1}
    assert near["n"].eq(len(first)).all()


def test_the_page_says_first_who_wins(study: Path) -> None:
    text = (study / "out" / "which.md").read_text()
    table = pd.read_csv(study / "out" / "which.csv")
    near = table[(table["setting"] == "near") & (table["metric"] == "mae_deg")].set_index("policy")
    verdict = next(line for line in text.splitlines() if line.startswith("* near: `gru` "))
    parts = dict(map(_side, _sides(verdict)))
    for policy in ("static", "ridge", "wide/last.ckpt"):
        row = near.loc[policy]
        how = "beats" if row["gain_low"] > 0 else "loses to" if row["gain_high"] < 0 else "ties with"
        called = "linear on motion" if policy == "ridge" else f"`{policy}`"
        assert called in parts[how], (policy, verdict)
    assert "| linear on motion | 1 |" in text and "| **`gru`** | 2 |" in text
    assert f"python -m netllm_pl study {study / 'which.yaml'}\n" in text and "| `wide` | 1 | cpu | 2 |" in text


def _sides(verdict: str) -> list[str]:
    return [part.strip(" .") for part in verdict.partition("`gru` ")[2].split(";")]


def _side(text: str) -> tuple[str, str]:
    how = next(how for how in ("beats", "loses to", "ties with") if text.startswith(how))
    return how, text[len(how) :]


def test_pictures_lie_beside_the_page_and_in_tensorboard(study: Path) -> None:
    assert imread(study / "out" / "which.png").shape[1] > 900
    events = EventAccumulator(str(study / "home" / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    assert events.Tags()["images"] == ["study/viewports"]


def test_remarks_stay_when_the_report_is_written_again(study: Path, tmp_path: Path) -> None:
    """Below the heading under which they stood; where that is gone, on top. Writing again changes nothing more."""
    page = tmp_path / "which.md"
    remarks = {
        name: f"<!-- remark -->\nAbout {name}.\n\n* more\n<!-- end of remark -->" for name in ("top", "cost", "gone")
    }
    parts = ["# Which network?", remarks["top"], "old", "## Cost", "old", remarks["cost"], "## Gone", remarks["gone"]]
    page.write_text("\n\n".join(parts))
    again = ["study", str(study / "which.yaml"), "--run_dir", str(study / "home"), "--out", str(tmp_path), "--report"]
    main(again)
    text = page.read_text()
    sections = {section.partition("\n")[0]: section for section in re.split("^(?=## )", text, flags=re.M)}
    title = text.partition("\n")[0]
    assert remarks["top"] in sections[title] and remarks["gone"] in sections[title]
    assert sections["## Cost"].startswith(f"## Cost\n\n{remarks['cost']}\n\n|")
    without = re.sub("<!-- remark -->.*?<!-- end of remark -->\n\n", "", text, flags=re.S)
    assert without == (study / "out" / "which.md").read_text()
    main(again)
    assert page.read_text() == text


def test_the_report_keeps_all_parts_and_tells_of_some_seeds(study: Path, tmp_path: Path) -> None:
    """The first part's picture is called as the study; a part that is asked for alone leaves the others in the page."""
    again = {
        **STUDY["parts"]["viewports"], "seeds": [1], "settings": {"near": ""}, "main": "ms", "extra": ["lost"],
        "figures": ["bars", "extra"], "policies": ["static,gru"],
    }  # fmt: skip
    file = write_study(tmp_path / "which.yaml", parts={"zoomed": again}, labels={"wide/last.ckpt": "a wide one"})
    home = tmp_path / "home"
    shutil.copytree(study / "home", home)
    place = home / "evaluations" / "zoomed" / "near" / "static_gru"
    place.mkdir(parents=True)
    names = {"static": "static", str(home / "runs" / "gru_1" / "best.ckpt"): "gru"}
    parts = [study / "home" / "evaluations" / "viewports" / "near" / folder for folder in ("static_ridge", "gru")]
    frame = pd.concat([pd.read_parquet(part / "episodes.parquet") for part in parts])
    frame["policy"] = frame["policy"].str.replace(str(study / "home"), str(home))
    frame = frame[frame["policy"].isin(names)].assign(ms=2.0, lost=lambda one: one["policy"].map({"static": 0.5}))
    frame.to_parquet(place / "episodes.parquet")
    for part in (study / "home" / "evaluations" / "viewports").glob("*/*/episodes.parquet"):
        moved = pd.read_parquet(part)
        moved["policy"] = moved["policy"].str.replace(str(study / "home"), str(home))
        moved.to_parquet(home / part.relative_to(study / "home"))
    main(["study", str(file), "--run_dir", str(home), "--out", str(tmp_path), "--report", "--parts", "zoomed"])
    assert {path.name for path in tmp_path.glob("*.png")} == {"which.png", "which_zoomed.png"}
    table = pd.read_csv(tmp_path / "which.csv")
    own = table[table["part"] == "zoomed"].set_index(["policy", "metric"])
    assert set(table["part"]) == {"viewports", "zoomed"} and own.loc[("gru", "ms"), "mean"] == 2
    assert ("static", "lost") in own.index and ("gru", "lost") not in own.index and own["seeds"].eq(1).all()
    text = (tmp_path / "which.md").read_text()
    assert "| a wide one | 1 | cpu | 2 |" in text and "`ms`, less is better; mean over seeds" in text


def test_nothing_runs_twice(study: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "COMMANDS", {"study": cli.COMMANDS["study"]})
    plan = Plan(read(study / "which.yaml"), study / "home")
    assert not (study / "home" / "runs" / "gru_0" / "summary.csv").exists(), "fit leaves its own table out"
    assert len(plan.jobs) == 9 and Runner(plan.jobs, study / "home", 0).run() == []
    assert "9 of 9 commands are done already" in capsys.readouterr().out
    main(["study", str(study / "which.yaml"), "--run_dir", str(study / "home"), "--list"])
    assert capsys.readouterr().out == ""


def test_an_interrupted_training_goes_on(study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed behind its first step; beside it, the evaluations of what it makes are out of date."""
    steps: list[list[str]] = []
    killed: list[str] = []

    def command(name: str, words: list[str]) -> None:
        steps.append([name, *words])
        if name == "evaluate":
            (place := Path(words[words.index("--out") + 1])).mkdir(parents=True, exist_ok=True)
            (place / "episodes.parquet").write_bytes(b"")
            return
        (run := Path(words[words.index("--run_dir") + 1])).mkdir(parents=True, exist_ok=True)
        if not killed:
            killed.append(name)
            (run / "last.ckpt").touch()
            raise KeyboardInterrupt

    monkeypatch.setattr(cli, "COMMANDS", {**cli.COMMANDS, "fit": command, "evaluate": command})
    plan = Plan(read(write_study(tmp_path / "which.yaml")), tmp_path / "home")
    runner = Runner(plan.jobs, tmp_path / "home", 0)
    with pytest.raises(KeyboardInterrupt):
        runner.run()
    record = runner.record("gru_0")
    assert record is not None and record.code is None
    assert runner.run() == []
    assert steps[1] == [*steps[0], "--ckpt_path", str(tmp_path / "home" / "runs" / "gru_0" / "last.ckpt")]
    assert len(steps) == 1 + 9
    del steps[:]
    wide = tmp_path / "home" / "runs" / "wide_0"
    (wide / "begun").touch()
    (tmp_path / "home" / "jobs" / "wide_0.json").unlink()
    assert runner.run() == [] and [step[0] for step in steps] == ["fit", "evaluate", "evaluate"]
    assert not (wide / "begun").exists(), "a training without a checkpoint begins anew"


def test_another_command_is_not_taken_for_the_one_that_ran(study: Path, tmp_path: Path) -> None:
    changed = write_study(tmp_path / "which.yaml", runs={"wide": {"command": "{FIT} --model.init_args.width 32"}})
    with pytest.raises(SystemExit):
        main(["study", str(changed), "--run_dir", str(study / "home"), "--list"])
    with pytest.raises(UserError, match=r"wide_0 was made by another command \(64 there, 32 now\); remove .*wide_0 to"):
        Runner(Plan(read(changed), study / "home").jobs, study / "home").open()


def test_what_is_trained_already_is_taken(study: Path, tmp_path: Path) -> None:
    runs = study / "home" / "runs"
    given = {"gru": str(runs / "gru_{seed}"), "wide": str(runs / "wide_0" / "last.ckpt")}
    plan = Plan(read(study / "which.yaml"), tmp_path / "home", given)
    assert {job.words[0] for job in plan.jobs.values()} == {"evaluate"}
    found = {policy.name: policy.weights for policy in plan.policies(plan.parts["viewports"])}
    assert found["gru"] == {seed: str(runs / f"gru_{seed}" / "best.ckpt") for seed in (0, 1)}
    assert found["wide/last.ckpt"] == {0: given["wide"]}


def test_what_another_study_has_made_is_taken(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same commands from the same data, of all seeds, that this study has not begun itself."""
    home, which, here = study / "another", read(study / "which.yaml"), data_of(os.environ)
    runs = study / "home" / "runs"
    expected = {"gru": str(runs / "gru_{seed}"), "wide": str(runs / "wide_{seed}")}
    assert shared(which, home, {}, here) == expected
    given = {"gru": "elsewhere/gru_{seed}"}
    assert shared(which, home, given, here) == {**expected, **given}
    assert shared(which, home, {}, "/other/data") == {}
    assert shared(which, study / "home", {}, here) == {}
    changed = replace(which, runs={**which.runs, "wide": Run("{FIT} --model.init_args.width 32")})
    assert shared(changed, home, {}, here) == {"gru": expected["gru"]}
    assert shared(replace(which, seeds=[0, 1, 2]), home, {}, here) == {"wide": expected["wide"]}
    (home / "runs" / "wide_0").mkdir(parents=True)
    assert shared(which, home, {}, here) == {"gru": expected["gru"]}
    shutil.rmtree(home)
    said: list[str] = []
    monkeypatch.setattr("netllm_pl.study.main.say", said.append)
    main(["study", str(study / "which.yaml"), "--run_dir", str(home), "--out", str(study / "again"), "--jobs", "0"])
    assert sorted(said) == [f"gru: {expected['gru']} is the same", f"wide: {expected['wide']} is the same"]
    first, second = (pd.read_csv(study / out / "which.csv") for out in ("out", "again"))
    pd.testing.assert_frame_equal(first, second)
    shutil.rmtree(home)


def test_shipped_studies_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NETLLM_DATA", "")
    for name in ("pretraining", "online_rl", "unseen"):
        study, home = read(find(name)), tmp_path / name
        runner = Runner(Plan(study, home, shared(study, home, {}, "")).jobs, home)
        for job in runner.jobs.values():
            if job.words[0] in ("fit", "collect"):
                job.folder.mkdir(parents=True)
                (job.folder / ("best.ckpt" if job.words[0] == "fit" else "manifest.json")).touch()
                runner._note(job, 0, 1.0)
    for name, expected in {
        "online_rl": {"pool", "offline"},
        "unseen": {"vp_llm", "pensieve"},
        "data_efficiency": {"pool", "llm_100", "random_100", "abr_100", "mlp_100"},
        "adaptation_cost": {"lora", "heads"},
        "prompts": {"heads", "heads_30"},
        "one_backbone": {"pool"},
    }.items():
        home = tmp_path / name
        if away := home.is_dir():
            (home / "runs").rename(tmp_path / "away")
        found = shared(read(find(name)), home, {}, "")
        assert found.keys() >= expected, name
        assert all(f"{home}/" not in place for place in found.values())
        if away:
            (tmp_path / "away").rename(home / "runs")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"runs": {"gru": "train it"}}, "runs.gru: unknown command 'train'"),
        ({"runs": {"gru": "fit {S} {nothing}"}}, "runs.gru: unknown name 'nothing'"),
        ({"runs": {"gru": "fit {S} {wide}"}}, "runs.gru needs wide, which must stand above it"),
        ({"runs": {"gru": {"command": "fit", "seeds": [1, 2]}}}, "runs.gru has 2 seeds, and no {seed}"),
        ({"runs": {"gru": {"comand": "fit"}}}, "comand"),
        ({"names": {"S": "{S}"}}, "names.S of the study names itself"),
        (
            {"parts": {"viewports": {"reference": "grus"}}},
            "parts.viewports: unknown reference 'grus'. Did you mean 'gru'",
        ),
        ({"parts": {"viewports": {"shown": ["x"]}}}, "parts.viewports: unknown shown 'x'"),
        ({"parts": {"viewports": {"figures": ["pie"]}}}, "figures"),
        ({"title": None}, "title"),
        ({"seeds": "many"}, "seeds is 'many'; expected"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        Plan(read(write_study(tmp_path / "which.yaml", **changes)), tmp_path)
    assert message in str(error.value) and str(error.value).count("\n") == 0


def test_mistakes_of_the_command_line_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(write_study(tmp_path / "which.yaml"))
    (tmp_path / "text.yaml").write_text("just words")
    for words, message in (
        ([file, "--parts", "x"], "unknown part 'x'. Known: viewports."),
        ([file, "--trained", "gru"], "give RUN=PATH"),
        ([file, "--trained", "nobody=x"], "unknown run 'nobody'"),
        ([file, "--jobs", "-1"], "--jobs is -1"),
        (["unsen"], "unknown study 'unsen'. Did you mean 'unseen'?"),
        ([str(tmp_path / "none.yaml")], "no file"),
        ([str(tmp_path / "text.yaml")], "text.yaml holds no keys"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["study", *words, "--run_dir", str(tmp_path / "home")])
        told = capsys.readouterr().err
        assert stop.value.code == 2 and message in told, told


def test_overlays_change_what_they_name() -> None:
    tree = {"a": 1, "b": {"c": [1, 2], "d": 3}, "e": {"f": 1}}
    assert merged(tree, {"b": {"c": [5], "g": 6}, "e": None}) == {"a": 1, "b": {"c": [5], "d": 3, "g": 6}}
    assert tree["e"] == {"f": 1}


@pytest.mark.parametrize("overlays", [(), OVERLAYS[:1], OVERLAYS], ids=lambda names: "+".join(names) or "real")
@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_shipped_studies_make_a_plan(file: Path, overlays: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    plan = Plan(read(file, overlays), Path("runs/study/some"))
    files = {word for job in plan.jobs.values() for word in job.words if word.startswith("configs/")}
    assert plan.parts and files and all(Path(word).is_file() for word in files)
    assert all(set(job.needs) <= set(plan.jobs) for job in plan.jobs.values())
    if len(overlays) == len(OVERLAYS):
        assert len(plan.jobs) < 60, "quick is not quick"


@pytest.mark.skipif(not NIGHTLY, reason="minutes each; NETLLM_NIGHTLY=1 runs it")
@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_shipped_studies_run_when_quick(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    main(["study", file.stem, "--quick", "--run_dir", str(tmp_path / "home"), "--out", str(tmp_path / "out")])
    assert len(pd.read_csv(tmp_path / "out" / f"{file.stem}.csv"))


def test_commands_of_shipped_studies_are_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By the parser that would run them: one command of all that have the same options."""
    monkeypatch.chdir(ROOT)

    class Read(BaseException):
        pass

    original = Parser.read

    def stop(self: Parser, words: Any) -> Any:
        original(self, words)
        raise Read

    monkeypatch.setattr(Parser, "read", stop)
    plans = [Plan(read(file, overlays), tmp_path) for file in SHIPPED for overlays in ((), OVERLAYS)]
    jobs = [job for plan in plans for job in plan.jobs.values()]
    like = {tuple(word for word in job.words if word.startswith(("--", "configs/"))): job for job in jobs}
    for job in like.values() if NIGHTLY else list(like.values())[::8]:
        with pytest.raises(Read):
            main([*job.words, "--debug"])
