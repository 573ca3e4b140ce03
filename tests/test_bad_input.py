"""A user's mistake gives one or two lines that name the thing and the cure, and exit code 2."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from netllm_pl.cli import main
from netllm_pl.errors import UserError
from netllm_pl.parsing import Parser, explain
from netllm_pl.sources import files_first

Complain = Callable[..., str]
SPLITS = {name: {"videos": [place], "users": [place]} for place, name in enumerate(("train", "valid", "test"), 1)}
CLASSES = {"model": "ViewportPrediction", "data": "ViewportPredictionData"}


@pytest.fixture
def complain(capsys: pytest.CaptureFixture[str]) -> Complain:
    """Run a command that must fail by a mistake of the user; return the message."""

    def run(*words: str) -> str:
        with pytest.raises(SystemExit) as caught:
            main(words)
        text = capsys.readouterr().err
        message = text[text.index("error: ") :].strip()
        assert caught.value.code == 2, text
        assert "Traceback" not in text
        assert len(message.splitlines()) <= 2 and len(message) <= 450, message
        return message

    return run


def samples() -> pd.DataFrame:
    """Traces of three videos by three viewers, 24 s at 5 Hz; degrees."""
    rows = [(video, user, step / 5) for video in (1, 2, 3) for user in (1, 2, 3) for step in range(120)]
    frame = pd.DataFrame(rows, columns=["video", "user", "t"])
    angles = np.random.default_rng(0).normal(size=(len(frame), 3)).astype(np.float32)
    return frame.assign(roll=angles[:, 0], pitch=angles[:, 1], yaw=angles[:, 2])


def saved(folder: Path, frame: pd.DataFrame) -> str:
    frame.to_parquet(folder / "traces.parquet", index=False)
    return str(folder / "traces.parquet")


def config(folder: Path, **data: Any) -> str:
    """Write a config with a tiny random language model and the given arguments of the data."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 64}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    backbone = {"name": "llama", "pretrained": False, "config": sizes | heads, "dtype": "float32", "lora": {"rank": 2}}
    tree = {
        "model": {"class_path": CLASSES["model"], "init_args": {"backbone": backbone, "optimizer": {"lr": 1e-3}}},
        "data": {"class_path": CLASSES["data"], "init_args": {"splits": SPLITS, "trim_tail": 20} | data},
        "trainer": {"accelerator": "cpu", "max_steps": 1, "limit_val_batches": 1, "enable_progress_bar": False},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    return str(folder / "config.yaml")


def edited(path: str, old: str, new: str) -> str:
    text = Path(path).read_text()
    assert old in text
    Path(path).write_text(text.replace(old, new, 1))
    return path


@pytest.fixture
def evaluate(complain: Complain, tmp_path: Path) -> Complain:
    """Evaluate one baseline on the given arguments of the data; return the message."""

    def run(policy: str = "static", **data: Any) -> str:
        return complain(
            "evaluate", "--config", config(tmp_path, **data), "--policies", policy, "--out", str(tmp_path / "out")
        )

    return run


# Data -----------------------------------------------------------------------------------------------------------------


def test_good_data_is_evaluated_and_the_model_of_the_config_is_not_built(tmp_path: Path) -> None:
    words = ["--policies", "static", "--out", str(tmp_path / "out")]
    path = edited(config(tmp_path, dataset=saved(tmp_path, samples())), "name: llama", "name: /nowhere")
    main(["evaluate", "--config", path, *words])
    assert (tmp_path / "out" / "summary.csv").is_file()


def test_a_missing_column(evaluate: Complain, tmp_path: Path) -> None:
    message = evaluate(dataset=saved(tmp_path, samples().drop(columns="yaw")))
    assert "traces.parquet: missing column yaw; found video, user, t, roll, pitch" in message


@pytest.mark.parametrize("value", ["nan", "inf", "null"])
def test_a_value_that_is_no_number(evaluate: Complain, tmp_path: Path, value: str) -> None:
    columns = {name: column.to_numpy().copy() for name, column in samples().items()}
    columns["pitch"][130] = np.nan if value == "null" else float(value)
    table = {name: pa.array(column, from_pandas=value == "null") for name, column in columns.items()}
    pq.write_table(pa.table(table), tmp_path / "traces.parquet")
    message = evaluate(dataset=str(tmp_path / "traces.parquet"))
    assert f"column 'pitch' is {value} in row 130 (video 1, user 2)" in message
    assert "repair or drop" in message


def test_a_column_of_the_wrong_type(evaluate: Complain, tmp_path: Path) -> None:
    message = evaluate(dataset=saved(tmp_path, samples().astype({"yaw": str})))
    assert re.search(r"column 'yaw' is (large_)?string; expected numbers \(degrees\)", message)


def test_a_truncated_file(evaluate: Complain, tmp_path: Path) -> None:
    path = Path(saved(tmp_path, samples()))
    path.write_bytes(path.read_bytes()[:-500])
    message = evaluate(dataset=str(path))
    assert "traces.parquet: not a whole Parquet file" in message and "copy it again" in message


def test_a_data_set_that_is_not_there(evaluate: Complain, tmp_path: Path) -> None:
    message = evaluate(dataset="jin2022", splits=None, data_dir=str(tmp_path / "nowhere"))
    assert "nowhere/viewport/jin2022.parquet does not exist" in message
    assert "fetch jin2022" in message and "NETLLM_DATA" in message


def test_an_unknown_data_set(evaluate: Complain) -> None:
    message = evaluate(dataset="jin2021")
    assert "unknown dataset 'jin2021'. Did you mean 'jin2022'? Known: jin2022, synthetic, wu2017." in message


def test_a_split_without_labels(evaluate: Complain, tmp_path: Path) -> None:
    splits = SPLITS | {"test": {"videos": [3], "users": []}}
    assert "splits.test.users: is empty" in evaluate(dataset=saved(tmp_path, samples()), splits=splits)


def test_a_split_whose_labels_do_not_occur(evaluate: Complain, tmp_path: Path) -> None:
    splits = SPLITS | {"test": {"videos": [9], "users": [3]}}
    message = evaluate(dataset=saved(tmp_path, samples()), splits=splits)
    assert "videos 9 are in no trace of the data; known: 1, 2, 3" in message


def test_a_split_that_no_trace_falls_into(evaluate: Complain, tmp_path: Path) -> None:
    frame = samples().query("not (video == 3 and user == 3)")
    assert "is empty: no trace has one of its videos" in evaluate(dataset=saved(tmp_path, frame))


def test_an_unknown_split(evaluate: Complain, tmp_path: Path) -> None:
    message = evaluate(dataset=saved(tmp_path, samples()), splits={"tset": SPLITS["test"]})
    assert "unknown split 'tset'. Did you mean 'test'? Known: test, train, valid." in message


def test_a_mistake_in_a_part_that_evaluate_ignores_is_not_blamed(complain: Complain, tmp_path: Path) -> None:
    path = edited(config(tmp_path, dataset=saved(tmp_path, samples())), "  class_path: ViewportPrediction\n", "")
    message = complain("evaluate", "--config", path, "--policies", "static", "--data.init_args.batch_size", "many")
    assert "data.batch_size is 'many'; expected int" in message


def test_missing_splits(evaluate: Complain, tmp_path: Path) -> None:
    message = evaluate(dataset=saved(tmp_path, samples()), splits=None)
    assert "data.splits is missing" in message and "splits: {test:" in message


def test_overlapping_splits(evaluate: Complain, tmp_path: Path) -> None:
    splits = SPLITS | {"valid": {"videos": [2, 3], "users": [2, 3]}}
    message = evaluate(dataset=saved(tmp_path, samples()), splits=splits)
    assert "splits valid and test share video 3, user 3; move it to one of them" in message


def test_a_history_longer_than_the_traces(evaluate: Complain, tmp_path: Path) -> None:
    message = evaluate(dataset=saved(tmp_path, samples()), history=110)
    assert "history 110 + horizon 20 does not fit: the longest trace has 120 samples; shorten them" in message


def test_a_setting_out_of_range(evaluate: Complain) -> None:
    assert "data.history is 0; it must be at least 1" in evaluate(history=0)
    message = evaluate(dataset="synthetic", splits=None, synthetic={"videos": 1})
    assert "synthetic.videos: 1 is too small; expected 3 or more" in message


# Policies and checkpoints ---------------------------------------------------------------------------------------------


def test_an_unknown_policy(evaluate: Complain, tmp_path: Path) -> None:
    message = evaluate("statik", dataset=saved(tmp_path, samples()))
    assert "unknown policy 'statik'. Did you mean 'static'?" in message
    assert "linear, ridge, static, velocity" in message


def test_a_missing_checkpoint(evaluate: Complain, tmp_path: Path) -> None:
    message = evaluate("nowhere/best.ckpt", dataset=saved(tmp_path, samples()))
    assert "checkpoint nowhere/best.ckpt does not exist" in message and "run folder" in message


def test_a_broken_checkpoint(evaluate: Complain, tmp_path: Path) -> None:
    (tmp_path / "broken.ckpt").write_bytes(b"PK\x03\x04 not much of a checkpoint")
    message = evaluate(str(tmp_path / "broken.ckpt"), dataset=saved(tmp_path, samples()))
    assert "broken.ckpt cannot be read: it is broken or no checkpoint of netllm_pl" in message


def test_a_folder_that_export_did_not_write(evaluate: Complain, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    message = evaluate(str(tmp_path / "empty"), dataset=saved(tmp_path, samples()))
    assert "empty holds no config.yaml" in message and "export" in message


def test_a_checkpoint_of_another_backbone_task_or_size(complain: Complain, tmp_path: Path) -> None:
    settings = config(tmp_path, dataset=saved(tmp_path, samples()))
    main(["fit", "--config", settings, "--run_dir", str(tmp_path / "run")])
    words = ["--config", settings, "--run_dir", str(tmp_path), "--ckpt_path", str(tmp_path / "run" / "last.ckpt")]
    other = complain("test", *words, "--model.init_args.backbone.seed", "1")
    assert "the checkpoint belongs to another backbone" in other and "Set model.backbone" in other
    size = complain("test", *words, "--model.init_args.horizon", "10", "--data.init_args.horizon", "10")
    assert "use the model settings it was trained with" in size
    task = ["--model", "ViewportGRU", "--ckpt_path", str(tmp_path / "run" / "last.ckpt"), "--run_dir", str(tmp_path)]
    message = complain("test", *task, "--data", "ViewportPredictionData", "--trainer.accelerator", "cpu")
    assert "of task ViewportPrediction, not ViewportGRU; change model.class_path" in message


# Configuration --------------------------------------------------------------------------------------------------------


def test_a_missing_config(complain: Complain, tmp_path: Path) -> None:
    config(tmp_path)
    message = complain("fit", "--config", str(tmp_path / "confg.yaml"))
    assert f"{tmp_path}/confg.yaml does not exist; did you mean {tmp_path}/config.yaml?" in message


def test_broken_yaml(complain: Complain, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("model:\n  class_path: [a\ndata: b\n")
    for command in ("fit", "evaluate"):
        assert "bad.yaml, line 3, column 5: broken YAML" in complain(command, "--config", str(tmp_path / "bad.yaml"))


@pytest.mark.parametrize("text", ["just words", "- 1\n- 2\n"])
def test_yaml_that_holds_no_settings(complain: Complain, tmp_path: Path, text: str) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    message = complain("fit", "--config", str(tmp_path / "bad.yaml"))
    assert "bad.yaml: holds no settings; expected keys such as model:" in message


def test_no_model_and_no_data(complain: Complain) -> None:
    message = complain("fit")
    assert "missing: --data, --model; give --config" in message and "ViewportPrediction" in message
    assert "missing: --policies" in complain("evaluate", "--data", "ViewportPredictionData")


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("ViewportPrediction\n", "ViewportPredicton\n",
         "unknown task 'ViewportPredicton'. Did you mean 'ViewportPrediction'?"),
        ("PredictionData", "PredictonData",
         "unknown data module 'ViewportPredictonData'. Did you mean 'ViewportPredictionData'?"),
        ("class_path: ViewportPrediction\n", "class: ViewportPrediction\n",
         "unknown key of model 'class'. Did you mean 'class_path'?"),
        ("  class_path: ViewportPrediction\n", "", "model.class_path is missing; known: "),
        ("optimizer:", "optimzer:", "unknown key of model 'optimzer'. Did you mean 'optimizer'? Known: backbone, "),
        ("dtype:", "dtpe:", "unknown key of model.backbone 'dtpe'. Did you mean 'dtype'? Known: attention, "),
        ("rank:", "rnk:", "unknown key of model.backbone.lora 'rnk'. Did you mean 'rank'? Known: alpha, "),
        ("trim_tail:", "trim_tial:", "unknown key of data 'trim_tial'. Did you mean 'trim_tail'?"),
        ("max_steps:", "max_step:", "unknown key of trainer 'max_step'. Did you mean 'max_steps'?"),
        ("trainer:", "trainr:", "unknown key 'trainr'. Did you mean 'trainer'? Known: ckpt_path, costs, data"),
        ("trim_tail: 20", "trim_tail: many", "data.trim_tail is 'many'; expected int"),
        ("rank: 2", "rank: big", "model.backbone.lora.rank is 'big'; expected int"),
        ("lr: 0.001", "lr: fast", "model.optimizer.lr is 'fast'; expected float"),
        ("float32", "float31",
         "model.backbone.dtype is 'float31'; expected one of 'auto', 'float32', 'bfloat16', 'float16'"),
        ("max_steps: 1", "max_steps: few", "trainer.max_steps is 'few'; expected int"),
    ],
)  # fmt: skip
def test_a_misspelt_class_key_or_value_in_a_file(
    complain: Complain, tmp_path: Path, old: str, new: str, expected: str
) -> None:
    path = edited(config(tmp_path), old, new)
    message = complain("fit", "--config", path)
    assert expected in message
    assert path in message or "class_path is missing" in message


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--modle", "x"], "command line: unknown key 'modle'. Did you mean 'model'?"),
        (["--trainer.max_epoch", "1"], "command line: unknown key of trainer 'max_epoch'. Did you mean 'max_epochs'?"),
        (["--model", "ViewportGRUU"], "unknown task 'ViewportGRUU'. Did you mean 'ViewportGRU'?"),
        (["--model.backbone.layrs=2"], "command line: unknown key of model.backbone 'layrs'. Did you mean 'layers'?"),
        (["--model.init_args.objective", "l3"], "command line: model.objective is 'l3'; expected one of 'l1', 'mse'"),
        (["--data.init_args.batch_size", "many"], "command line: data.batch_size is 'many'; expected int"),
        (["--model.init_args.backbone", "none.yaml"], "config file none.yaml does not exist"),
        (["--model.init_args.backbone", "gpt2"], "or keys with values, such as --model.backbone.name gpt2"),
        (["--data.init_args.synthetic", "big"], "data.synthetic is 'big'; expected a file that exists, or keys"),
        (["--trainer.callbacks+=Nonsense"], "trainer.callbacks: no class is called 'Nonsense'"),
        (["--seed_everything", "x"], "seed_everything is 'x'; expected bool or int"),
        (["--seed_everything", "-1"], "seed_everything is -1; it must lie between 0 and 4294967295"),
        (["--save_every", "0"], "save_every is 0; it must be at least 1"),
        (["--model.optimizer.lr", "-1"], "optimizer.lr is -1.0; it must be at least 0"),
        (["--model.backbone.lora.rank", "0"], "backbone.lora.rank is 0; it must be at least 1"),
        (["--model.backbone.lora.dropout", "1"], "backbone.lora.dropout is 1.0; it must be at least 0 and below 1"),
        (["--trainer.max_steps", "-5"], "trainer: `max_steps` must be a non-negative integer or -1"),
        (
            ["--data.class_path", "AdaptiveBitrateData"],
            "has no column history, which the model reads; take those of its",
        ),
        (["--model.class_path", "netllm_pl.toy.Gone"], "model: Gone cannot be made of what is given: module"),
        (["stray"], "unknown option stray"),
    ],
)
def test_a_mistake_on_the_command_line(complain: Complain, tmp_path: Path, words: list[str], expected: str) -> None:
    assert expected in complain("fit", "--config", config(tmp_path), *words)


def test_an_own_class_that_cannot_be_imported(complain: Complain, tmp_path: Path) -> None:
    message = complain("fit", "--config", config(tmp_path), "--model", "nowhere.Task")
    assert "nowhere" in message and "model" in message


# The pieces -----------------------------------------------------------------------------------------------------------


def test_no_message_is_long() -> None:
    long = 'Parser key "model":\n  ' + "x" * 5000
    assert len(explain(long)) <= 400


def test_config_files_come_first_and_keep_their_order() -> None:
    words = ["--a", "1", "--config", "x.yaml", "--b=2", "--config=y.yaml", "-c", "z.yaml"]
    assert files_first(words) == ["--config", "x.yaml", "--config=y.yaml", "-c", "z.yaml", "--a", "1", "--b=2"]
    assert files_first(["--config"]) == ["--config"]


class Picky:
    def __init__(self, size: int = 1) -> None:
        if size < 0:
            raise UserError("size is negative; give a positive one")
        if size == 0:
            raise RuntimeError("no size")


@pytest.mark.parametrize(("size", "kind"), [(-1, UserError), (0, RuntimeError)])
def test_what_a_constructor_raises_comes_out_as_it_is(size: int, kind: type[Exception]) -> None:
    parser = Parser()
    parser.add_argument("--it", type=Picky | None)
    parsed = parser.read(["--it", f"{__name__}.Picky", "--it.size", str(size)])
    with pytest.raises(kind, match=r"^(size is negative; give a positive one|no size)$"):
        parser.instantiate(parsed)
