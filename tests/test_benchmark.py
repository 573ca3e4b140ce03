"""The benchmark: what its file holds, that its ratios are of the numbers beside them, and how it measures."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaModel

from netllm_pl import benchmark, timing
from netllm_pl.benchmark import leaves
from netllm_pl.cli import main
from netllm_pl.errors import UserError
from netllm_pl.task import NetTask
from netllm_pl.timing import Work, latency, look_up, measure

ROOT = Path(__file__).parent.parent
TINY = ["--backbone", str(ROOT / "configs" / "llm" / "tiny_random.yaml")]
CHUNKS, REPEATS = 10, 2
STREAMING = [
    "--config", str(ROOT / "configs" / "adaptive_bitrate.yaml"),
    "--data.init_args.synthetic={traces: 6, duration_s: 60}", f"--data.init_args.rules={{chunks: {CHUNKS}}}",
    "--data.init_args.experience.episodes=24", "--data.init_args.batch_size=8", "--data.init_args.window=20",
    "--trainer.accelerator", "cpu", "--repeats", str(REPEATS), "--quick",
]  # fmt: skip
VIEWPORTS = [
    "--config", str(ROOT / "configs" / "viewport_prediction.yaml"),
    "--data.init_args.synthetic={videos: 6, users: 6, seconds: 30}", "--model.init_args.vision=null",
    "--trainer.accelerator", "cpu", "--repeats", "1", "--quick",
]  # fmt: skip


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder of this module's own, which holds the cache too."""
    folder = tmp_path_factory.mktemp("benchmark")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NETLLM_CACHE", str(folder / "cache"))
        yield folder


@pytest.fixture(scope="module")
def streaming(cached: Path) -> Any:
    """What the file says of a task that acts."""
    main(["benchmark", *STREAMING, *TINY, "--out", str(cached / "new" / "streaming.json"), "--debug"])
    assert [file.name for file in (cached / "new").iterdir()] == ["streaming.json"]
    return json.loads((cached / "new" / "streaming.json").read_text())


# The file -------------------------------------------------------------------------------------------------------------


def test_all_that_is_asked_of_a_task_that_acts_is_measured(streaming: Any) -> None:
    measured = dict(leaves(streaming))
    for place in (
        "training.samples_per_s", "training.tokens_per_s", "training.tflop_per_s", "training.first_step_s",
        "training.peak_memory_gb", "decision.streaming.median_ms", "decision.streaming.p99_ms",
        "decision.full_recomputation.median_ms", "published_style.training.samples_per_s",
        "published_style.decision.median_ms", "published_style.decision.p99_ms",
        "rollout.decisions_per_s", "ceilings.matmul_tflop_per_s",
        "ceilings.copy_gb_per_s", "works.plain_python_1_session.steps_per_s", "works.simulator_1_session.steps_per_s",
        "works.simulator_100_sessions.steps_per_s", "works.simulator_1000_sessions.steps_per_s",
        "works.robust_mpc.decisions_per_s", "works.hindsight.labels_per_s",
    ):  # fmt: skip
        assert 0 < measured[place] < math.inf, place
    assert all(math.isfinite(value) for value in measured.values() if isinstance(value, float))
    about = streaming["environment"]
    assert about["torch"] == torch.__version__ and about["torch_threads"] == torch.get_num_threads() == 1
    assert about["device"] and about["cpus_usable"] >= 1 and about["device_type"] == "cpu"
    assert streaming["settings"]["trainer"] == {"accelerator": "cpu", "gradient_clip_val": 1.0}
    config = streaming["settings"]["config"]
    assert config["data"]["init_args"]["rules"]["chunks"] == CHUNKS
    assert config["model"]["init_args"]["backbone"]["lora"]["rank"] == 4


def test_ratios_are_of_the_numbers_beside_them(streaming: Any) -> None:
    expected = {
        "training_to_matmul",
        "recomputation_to_streaming",
        "decision_to_weights_read",
        "training_to_published",
        "published_decision_to_streaming",
        "rollout_to_published",
    } | {f"simulator_{n}_session{'s' * (n > 1)}_to_plain_python_1_session" for n in (1, 100, 1000)}
    assert set(streaming["ratios"]) == expected
    for entry in streaming["ratios"].values():
        assert entry["ratio"] == pytest.approx(look_up(streaming, entry["of"]) / look_up(streaming, entry["to"]))
    plain = streaming["ratios"]["simulator_100_sessions_to_plain_python_1_session"]
    assert plain["of"] == "works.simulator_100_sessions.steps_per_s"
    assert plain["to"] == "works.plain_python_1_session.steps_per_s"


def test_the_numbers_agree_with_each_other(streaming: Any) -> None:
    measured = dict(leaves(streaming))
    for place, value in measured.items():
        if place.endswith("_range"):
            assert value[0] <= measured[place.removesuffix("_range")] <= value[1], place
    training, model = streaming["training"], streaming["model"]
    assert training["batch_samples"] == 8 and training["tokens_per_sample"] == 40, "two tokens for each of 20 steps"
    assert training["samples_per_s"] == pytest.approx(8 * training["steps_per_s"])
    assert training["tokens_per_s"] == pytest.approx(40 * training["samples_per_s"])
    layers, learned = 2 * (4 * 32 * 32 + 3 * 32 * 64 + 2 * 32) + 32, 2 * 2 * (4 * 32 + 32 * 4)  # LoRA on q and v
    assert model["backbone_parameters"] == layers + learned
    flop = 4 * layers + 6 * learned
    assert training["tflop_per_s"] == pytest.approx(training["tokens_per_s"] * flop / 1e12)
    for kind in streaming["decision"].values():
        assert kind["measured"] == REPEATS * (CHUNKS - 1) and kind["median_ms"] <= kind["p99_ms"]
    read = 1000 * model["backbone_gb"] / streaming["ceilings"]["copy_gb_per_s"]
    assert streaming["ceilings"]["weights_read_ms"] == pytest.approx(read)


def test_a_task_that_predicts_is_measured_by_its_predictions(cached: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["benchmark", *VIEWPORTS, *TINY, "--out", str(cached / "viewports.json"), "--debug"])
    found = json.loads((cached / "viewports.json").read_text())
    assert found["works"] == {} and "decision" not in found and "rollout" not in found
    assert set(found["ratios"]) == {"training_to_matmul", "prediction_to_weights_read"} | {
        "training_to_published", "published_prediction_to_single",
    }  # fmt: skip
    assert found["training"]["tokens_per_sample"] == 30, "10 samples of history, 20 queries"
    assert found["prediction"]["single"]["measured"] == 10
    batched = found["prediction"]["batched"]
    assert batched["batch_samples"] > 1 and batched["predictions_per_s"] > 0
    printed = capsys.readouterr().out
    assert "training.samples_per_s" in printed and "viewports.json" in printed
    assert "prediction.single.median_ms / ceilings.weights_read_ms = " in printed


def test_parts_are_chosen_and_larger_batches_and_four_bits_measured_where_asked(cached: Path) -> None:
    shape = "{hidden_size: 64, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2, vocab_size: 8}"
    words = ["--model.init_args.backbone", f"{{name: llama, pretrained: false, config: {shape}, layers: null}}"]
    words += ["--model.init_args.backbone.checkpointing", "0.5", "--parts", "batches, quantised"]
    layout = ["--config", str(ROOT / "configs" / "overlays" / "adaptive_bitrate" / "published_tokens.yaml")]
    words += ["--data.init_args.batch_size=2", "--data.init_args.rules={chunks: 22}", "--data.init_args.window=20"]
    main(["benchmark", *STREAMING, *layout, *words, "--out", str(cached / "parts.json"), "--debug"])
    found = json.loads((cached / "parts.json").read_text())
    assert set(found) == {"format", "environment", "settings", "model", "batches", "quantised", "ratios"}
    assert found["model"]["tokens_as_published"] == "with --config " + layout[1].removeprefix(f"{ROOT}/")
    by_batch = found["batches"]["by_batch"]
    assert [entry["batch_samples"] for entry in by_batch.values()] == [2, 8, 24] == list(map(int, by_batch))
    assert found["batches"]["best"] == max(by_batch.values(), key=lambda entry: float(entry["samples_per_s"]))
    assert by_batch["2"]["tokens_per_sample"] == 160, "eight tokens for each of 20 steps"
    assert by_batch["2"]["recompilations"] == 0
    four = found["quantised"]
    assert four["training"]["batch_samples"] == 4 and four["decision"]["median_ms"] > 0


# The regression file --------------------------------------------------------------------------------------------------


def test_the_regression_file_holds_the_ratios_of_the_files_beside_it() -> None:
    """Each is of two numbers of its file."""
    folder = ROOT / "docs" / "results" / "benchmark"
    kept = json.loads((folder / benchmark.RATIOS).read_text())
    assert kept == benchmark.regression(folder) and len(kept) >= 2
    for name, kept_ratios in kept.items():
        measured = json.loads((folder / f"{name}.json").read_text())
        assert kept_ratios and kept_ratios.keys() == measured["ratios"].keys()
        for entry in measured["ratios"].values():
            assert entry["ratio"] == pytest.approx(look_up(measured, entry["of"]) / look_up(measured, entry["to"]))


def test_other_files_are_no_regression(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text('{"format": 0}')
    with pytest.raises(UserError, match=r"other\.json is no benchmark of format 1; measure it again"):
        benchmark.regression(tmp_path)


# The command line -----------------------------------------------------------------------------------------------------


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the command would measure; nothing is."""
    calls: list[Any] = []
    monkeypatch.setattr(benchmark, "run", lambda *given: calls.append(given))
    return calls


def test_weights_are_drawn_when_asked(built: list[Any], tmp_path: Path) -> None:
    shape = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    LlamaModel(shape).save_pretrained(tmp_path / "model")
    words = ["benchmark", *VIEWPORTS, "--out", str(tmp_path / "x.json")]
    words += ["--model.init_args.backbone", f"{{name: {tmp_path / 'model'}, layers: null}}"]
    main([*words, "--debug"])
    main([*words, "--random_weights", "true", "--debug"])
    main([*words, "--random-weights", "--debug"])
    own, drawn, again = (call[0].backbone for call in built)
    assert drawn.fingerprint == again.fingerprint
    assert own.config.pretrained and not drawn.config.pretrained
    assert own.fingerprint != drawn.fingerprint
    assert [weight.shape for weight in own.parameters()] == [weight.shape for weight in drawn.parameters()]


def test_what_is_given_reaches_the_measurement(built: list[Any], tmp_path: Path) -> None:
    words = ["benchmark", *VIEWPORTS, *TINY, "--out", str(tmp_path / "x.json")]
    main([*words, "--repeats", "null", "--trainer.precision", "bf16-mixed"])
    main([*words, "--repeats", "7"])
    assert built[0][3:5] == (2, True), "two repeats with --quick"
    assert built[0][7] == [part for part in benchmark.PARTS if part not in benchmark.MORE] and built[0][9]
    assert built[0][5]["precision"] == "bf16-mixed" and built[0][5]["max_steps"] == 800
    assert built[1][3:5] == (7, True) and built[1][0].backbone.config.name == "llama"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--repeats", "0"], "--repeats is 0; it must be at least 1"),
        (["--out", "."], "give the path of a file"),
        (["--parts", "training,rolout"], "unknown part 'rolout'"),
        (["--out", str(Path(__file__) / "x.json")], "give the path of a file"),
        (["--backbone", "configs/llm/none.yaml"], "none.yaml does not exist"),
        (["--config", str(ROOT / "configs" / "baselines" / "viewport_prediction_gru.yaml")], "unknown key"),
    ],
)
def test_mistakes_are_named_before_anything_is_measured(
    words: list[str], message: str, built: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["benchmark", *VIEWPORTS, *TINY, "--out", str(tmp_path / "x.json"), *words])
    assert stop.value.code == 2 and message in capsys.readouterr().err and not built


def test_drawn_weights_need_a_backbone(built: list[Any], tmp_path: Path) -> None:
    gru = str(ROOT / "configs" / "baselines" / "viewport_prediction_gru.yaml")
    words = ["--config", gru, "--random_weights", "true", "--out", str(tmp_path / "x.json")]
    with pytest.raises(UserError, match="ViewportGRU has no backbone; leave out --random_weights"):
        main(["benchmark", *words, "--debug"])


@pytest.mark.parametrize(
    ("option", "message"), [(["--trainer.precision", "12"], "trainer: "), ([], "ran out of memory; give a smaller")]
)
def test_nothing_is_written_when_training_fails(
    option: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*given: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(NetTask, "training_step", fail)
    with pytest.raises(UserError, match=message):
        main(["benchmark", *VIEWPORTS, *TINY, *option, "--out", str(tmp_path / "x.json"), "--debug"])
    assert not list(tmp_path.glob("*.json"))


# Timing ---------------------------------------------------------------------------------------------------------------


def test_latency_is_the_median_and_what_one_in_a_hundred_exceeds() -> None:
    times = [k / 1000 for k in range(1, 201)]
    assert latency(times[::-1]) == {"median_ms": 100.5, "p99_ms": 198.0, "measured": 200}
    assert latency([0.002]) == {"median_ms": 2.0, "p99_ms": 2.0, "measured": 1}


def test_works_are_measured_in_turn_and_the_first_run_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, order = [0.0], []
    costs = {"a": iter([100.0, *[1.0] * 4, *[2.0] * 2, *[4.0]]), "b": iter([100.0, 8.0, 8.0, 16.0])}

    def work(name: str) -> Work:
        def go() -> int:
            order.append(name)
            clock[0] += next(costs[name])
            return 10

        return Work("steps", go)

    monkeypatch.setattr(timing, "now", lambda wait=True: clock[0])
    found = measure({name: work(name) for name in "ab"}, repeats=3, least_s=4.0)
    assert "".join(order) == "ab" + "aaaab" + "aab" + "ab"
    assert found["a"] == {"steps_per_s": 5.0, "steps_per_s_range": [2.5, 10.0]}
    assert found["b"] == {"steps_per_s": 1.25, "steps_per_s_range": [0.625, 1.25]}
