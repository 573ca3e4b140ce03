"""Videos: JSON, size files, and the generator."""

import json
from pathlib import Path

import numpy as np
import pytest

from netllm_pl.errors import UserError
from tasks.adaptive_bitrate.videos import PUBLISHED_LADDER, generated_video, make_video, read_video

VIDEO = {
    "bitrate_kbps": [300, 900],
    "chunk_s": 2,
    "chunk_bytes": [[75_000, 80_000, 70_000], [225_000, 200_000, 210_000]],
}


def video_file(tmp_path: Path, **videos: object) -> Path:
    path = tmp_path / "videos.json"
    path.write_text(json.dumps(videos))
    return path


def test_json_video(tmp_path: Path) -> None:
    path = video_file(tmp_path, mine=VIDEO)
    video = read_video(path)
    assert (video.name, video.chunk_s, video.ladder_kbps.tolist()) == ("mine", 2.0, [300, 900])
    assert np.array_equal(video.chunk_bytes, np.array(VIDEO["chunk_bytes"]).T)
    assert video.chunk_bytes.dtype == np.int64 and video.chunk_bytes.flags.c_contiguous
    path = video_file(tmp_path, mine=VIDEO, other=VIDEO | {"bitrate_kbps": [1, 2]})
    assert read_video(path, "other").ladder_kbps.tolist() == [1, 2]
    with pytest.raises(UserError, match="holds 2 videos; name one of mine, other"):
        read_video(path)
    with pytest.raises(UserError, match=r"unknown video 'mien'\. Did you mean 'mine'"):
        read_video(path, "mien")
    assert read_video(video_file(tmp_path, **VIDEO)).name == "videos", "one alone is called like its file"


def test_published_videos(data_dir: Path, tmp_path: Path) -> None:
    for name, ratio in (("video1", 1.0), ("video2", 1.2)):
        video = read_video(data_dir / "abr" / "videos.json", name)
        assert video.chunk_bytes.shape == (49, 6) and video.ladder_kbps.tolist() == list(PUBLISHED_LADDER)
        nominal = video.ladder_kbps * 500.0
        np.testing.assert_allclose((video.chunk_bytes / nominal).mean(0), ratio, atol=0.03)
        folder = tmp_path / name
        folder.mkdir()
        for level, sizes in enumerate(video.chunk_bytes.T):
            (folder / f"video_size_{level}").write_text("\n".join(map(str, sizes)) + "\n")
        again = read_video(folder)
        assert again.name == name and again.chunk_s == 4.0
        assert np.array_equal(again.chunk_bytes, video.chunk_bytes)
        assert np.array_equal(again.ladder_kbps, video.ladder_kbps)


def test_size_files_with_another_ladder(tmp_path: Path) -> None:
    for level in range(3):
        (tmp_path / f"video_size_{level}").write_text(f"{level + 1}000\n{level + 1}500\n")
    with pytest.raises(UserError, match=r"has 3 levels, .*; write the video as JSON, with bitrate_kbps"):
        read_video(tmp_path)
    video = read_video(tmp_path, "short", ladder_kbps=[1, 2, 3], chunk_s=1.5)
    assert (video.name, video.chunk_s) == ("short", 1.5)
    assert video.chunk_bytes.tolist() == [[1000, 2000, 3000], [1500, 2500, 3500]]
    (tmp_path / "video_size_1").write_text("2000\n2.5\n")
    with pytest.raises(UserError, match=r"video_size_1, line 2: '2.5'; expected a whole number of bytes"):
        read_video(tmp_path, ladder_kbps=[1, 2, 3])
    (tmp_path / "video_size_1").rename(tmp_path / "video_size_7")
    with pytest.raises(UserError, match="has 3 size files, but video_size_1 is missing"):
        read_video(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chunk_bytes": [[1, 2], [3, 0]]}, r"chunk_bytes, level 1\[1\] is 0; expected a positive whole number"),
        ({"chunk_bytes": [[1, 2], [3, 2.5]]}, r"level 1\[1\] is 2.5"),
        ({"chunk_bytes": [[1, 2], ["x", 2]]}, r"chunk_bytes, level 1 is \['x', 2\]; expected a list"),
        ({"chunk_bytes": [[1, 2], [3]]}, r"levels have \[2, 1\] chunks; expected the same number"),
        ({"chunk_bytes": [[1], [3]]}, r"at least 2"),
        ({"chunk_bytes": [[1, 2]]}, r"chunk_bytes has 1 lists; expected 2, one a bitrate"),
        ({"chunk_bytes": 5}, r"chunk_bytes has no lists"),
        ({"bitrate_kbps": [900, 300]}, r"bitrate_kbps is \[900, 300\]; expected ascending"),
        ({"bitrate_kbps": []}, r"bitrate_kbps is \[\]; expected a list of bitrates"),
        ({"bitrate_kbps": "300"}, r"bitrate_kbps is 300; expected a list"),
        ({"bitrate_kbps": [-1, 300]}, r"bitrate_kbps\[0\] is -1"),
        ({"chunk_s": 0}, r"chunk_s is 0; expected seconds above 0"),
        ({"chunk_s": "4"}, r"chunk_s is 4"),
    ],
)
def test_bad_videos(tmp_path: Path, change: dict[str, object], message: str) -> None:
    path = video_file(tmp_path, mine=VIDEO | change)
    with pytest.raises(UserError, match=message) as error:
        read_video(path)
    assert str(error.value).startswith(f"{path}, video mine")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "expected an object of videos by name"),
        ('{"a": 1}', "expected an object of videos by name"),
        (json.dumps({"a": VIDEO | {"chunk_length": 2}}), "unknown key 'chunk_length'.*chunk_s.*video a"),
        ('{"chunk_s": 4}', "v.json, video v: missing bitrate_kbps, chunk_bytes; found chunk_s"),
        ('{"a": {"chunk_s": 4}}', "missing bitrate_kbps, chunk_bytes; found chunk_s"),
    ],
)
def test_bad_json(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "v.json").write_text(text)
    with pytest.raises(UserError, match=message):
        read_video(tmp_path / "v.json")


def test_bad_video_paths(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"video path .*nowhere does not exist"):
        read_video(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no size files"):
        read_video(tmp_path)
    (tmp_path / "v.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not JSON"):
        read_video(tmp_path / "v.json")


def test_generated_video_varies_around_nominal() -> None:
    video = generated_video(0)
    assert np.array_equal(video.chunk_bytes, generated_video(0).chunk_bytes)
    assert not np.array_equal(video.chunk_bytes, generated_video(1).chunk_bytes)
    ratio = video.chunk_bytes / (video.ladder_kbps * 500.0)
    assert video.chunk_bytes.shape == (49, 6) and ratio.min() > 0.6 and ratio.max() < 1.5
    assert np.abs(ratio.mean(0) - 1).max() < 0.06 and (ratio.std(0) > 0.05).all()
    assert np.corrcoef(ratio.T).min() > 0.7  # what is hard to code is so at all levels
    assert (np.diff(video.chunk_bytes, axis=1) > 0).all()


def test_a_video_needs_a_level() -> None:
    with pytest.raises(UserError, match="video mine: bitrate_kbps"):
        make_video("mine", [], [], 4.0)
