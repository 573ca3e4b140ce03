"""Streaming sessions and experience as a data module: traces, videos and rules by name or path, or built-in ones.

Shapes: N sessions, T chunks that a policy chose, B samples in a batch, W steps of a window.
"""

import hashlib
from collections.abc import Collection, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import pandas as pd

from netllm_pl.episodes import DecisionData, check_split
from netllm_pl.errors import UserError, at_least, unknown
from netllm_pl.evaluate import Metric
from netllm_pl.experience import Pool
from netllm_pl.paths import data_root, weights_folder, weights_of
from netllm_pl.recording import Experience
from netllm_pl.rollout import Rollout
from netllm_pl.timing import Work
from tasks.adaptive_bitrate.baselines import NAMES, PENSIEVES, build
from tasks.adaptive_bitrate.noise import NoisySimulator
from tasks.adaptive_bitrate.planning import Hindsight, OfflineOptimal
from tasks.adaptive_bitrate.published_pool import read_published
from tasks.adaptive_bitrate.simulator import Rules, Simulator, Traces, Video
from tasks.adaptive_bitrate.splits import all_traces, check_traces, named_traces, named_video
from tasks.adaptive_bitrate.synthetic import SyntheticTraces
from tasks.adaptive_bitrate.traces import with_starts

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OPTIMAL = "offline_optimal"
CHUNK_COLUMNS = ("chunk", "bitrate", "buffer_s", "rebuffer_s", "chunk_bytes", "delay_ms", "sleep_ms", "reward")


class AdaptiveBitrateData(DecisionData):
    """Sessions that play a video over bandwidth traces, and experience recorded in them.

    Args:
        traces: ``synthetic`` (generated); ``fcc`` (FCC and HSDPA traces in data_dir/abr, split by the protocol);
            ``fcc_synthetic`` (tested on data_dir/abr/traces_synthetic.parquet); or a path: a folder with train, valid
            and test (each a Parquet file, or a folder of text files), or a single file or folder of traces, whose
            sources are dealt out to the splits.
        protocol: Splits of ``fcc``: no source of a trace in two splits, or as published, where most test traces are
            parts of training traces and all validation traces are training traces.
        video: ``generated``, a name in data_dir/abr/videos.json, a folder of size files, or a JSON file (FILE:NAME if
            it holds several).
        test_traces: Traces to test on, if others; a single file or folder is tested on as a whole.
        test_video: Video to test on, if another.
        valid_starts: Validation sessions on each trace, from starts that are spread over it: few traces choose badly.
        mode: Whether validation and test sessions are as the traces say (fixed), or have random traces, starts and
            noise.
        noise: Standard deviation of the logarithm of a factor on each measured throughput, and its inverse on the time
            of the download, in test sessions: what happens is the same, what policies see is not.
        data_dir: Folder that holds abr/; else NETLLM_DATA, else where `fetch` puts data.
        weights_dir: Folder of the published Pensieve weights (genet.npz, ...); null looks for ``weights`` in and beside
            the data's folder.
        rules: How a session runs and what it is worth.
        synthetic: The generator's settings.
        history: Samples of history in an observation.
        lookahead: Chunks whose sizes are in an observation, from the next one on.
        pool: Folder of training experience that `collect` wrote, or several; null records it as ``experience`` says.
        experience: What to record for training (without a pool), and for the losses of validation and test. Null, for
            learners that play themselves, gives numbers of sessions in place of recorded steps.
        window: Steps of a window of experience.
        stride: Steps between the beginnings of two training windows; null takes the window.
        share: Share of the recorded training episodes that is used.
        sessions: Training sessions of an epoch, for learners that play themselves.
        batch_size: Samples in a training batch, per process.
        eval_batch_size: Samples in a validation or test batch, and sessions played side by side.
        num_workers: Loader processes.
        seed: Seed of the training order.
    """

    baselines: ClassVar[dict[str, Any]] = {name: partial(build, name) for name in (*NAMES, OPTIMAL)}  # see `policy`
    metrics = (
        Metric("qoe", "qoe", better="max"),
        Metric("bitrate_mbps", "bitrate_mbps", better="max"),
        Metric("rebuffer_s", "rebuffer_s"),
        Metric("smoothness_mbps", "smoothness_mbps"),
    )
    compared = ("bba", "robust_mpc")

    def __init__(
        self,
        traces: str = "synthetic",
        protocol: Literal["leak_free", "published"] = "leak_free",
        video: str = "generated",
        test_traces: str | None = None,
        test_video: str | None = None,
        valid_starts: int = 4,
        mode: Literal["fixed", "random"] = "fixed",
        noise: float = 0.0,
        data_dir: str | None = None,
        weights_dir: str | None = None,
        rules: Rules = Rules(),  # noqa: B008  # frozen
        synthetic: SyntheticTraces = SyntheticTraces(),  # noqa: B008  # frozen
        history: int = 10,
        lookahead: int = 5,
        pool: str | list[str] | None = None,
        experience: Experience | None = Experience(),  # noqa: B008  # frozen
        window: int = 20,
        stride: int | None = None,
        share: float = 1.0,
        sessions: int = 10_000,
        batch_size: int = 64,
        eval_batch_size: int = 256,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(
            pool, experience, window, stride, sessions, batch_size, eval_batch_size, num_workers, seed, share
        )
        at_least(1, "data.", history=history, valid_starts=valid_starts)
        at_least(0, "data.", noise=noise)
        if lookahead < 0:
            raise UserError(f"data.lookahead is {lookahead}; it must be at least 0, which shows the next chunk only")
        self.trace_names, self.video_names = (traces, test_traces), (video, test_video)
        self.protocol, self.mode, self.rules, self.synthetic = protocol, mode, rules, synthetic
        if protocol == "published" and traces == "fcc" and test_traces is None:
            self.note = "published splits: test leaks into training"
        self.root, self.weights_dir = data_root(data_dir), weights_dir
        self.history, self.lookahead, self.valid_starts, self.noise = history, lookahead, valid_starts, noise
        self._read: dict[Any, Any] = {}
        for name in filter(None, self.trace_names):  # tell at once what is not there, before a model is built
            check_traces(name, self.root)
        for split in ("train", "test"):
            self.video(split)

    def traces(self, split: str) -> Traces:
        """Return the traces of a split, read once."""
        check_split(split)
        if split not in self._read:
            name, other = self.trace_names
            if split == "test" and other is not None:
                self._read[split] = all_traces(other, self.root, self.synthetic)
            else:
                self._read[split] = named_traces(name, split, self.root, self.protocol == "published", self.synthetic)
        traces: Traces = self._read[split]
        return traces

    def video(self, split: str) -> Video:
        """Return the video of a split, read once."""
        name, other = self.video_names
        name = other if split == "test" and other is not None else name
        if ("video", name) not in self._read:
            self._read["video", name] = named_video(name, self.root)
        video: Video = self._read["video", name]
        return video

    # Playing ----------------------------------------------------------------------------------------------------------

    def simulator(self, split: str, mode: str | None = None) -> Simulator:
        """Return sessions of a split.

        Args:
            split: train, valid or test.
            mode: fixed or random; null takes that of validation and test.
        """
        chosen: Any = mode or self.mode
        traces = self.traces(split)
        if split == "valid" and chosen == "fixed":
            traces = with_starts(traces, self.valid_starts)
        options = (traces, self.video(split), self.rules, chosen, self.history, self.lookahead)
        return NoisySimulator(self.noise, *options) if self.noise and split == "test" else Simulator(*options)

    def policy(self, name: str, split: str = "test") -> Any:
        """Build a policy from its name: a baseline for the video of a split, a checkpoint's path, or a folder."""
        if name == OPTIMAL:
            return OfflineOptimal(self.simulator(split))
        if name in NAMES:
            return build(name, self.video(split), self.rules, weights_folder(self.weights_dir, self.root), self.seed)
        return super().policy(name)

    def made_of(self, names: Collection[str]) -> dict[str, str]:
        """Hashes of checkpoints and of published weights, and the seed of what draws its actions."""
        drawn = {name: str(self.seed) for name in names if name in PENSIEVES}
        return weights_of(names, weights_folder(self.weights_dir, self.root)) | drawn

    def benchmarks(self) -> dict[str, Work]:
        """List the simulator's speed beside plain Python, decisions of RobustMPC, and hindsight labels."""
        from tasks.adaptive_bitrate.speed import works  # imported late: nothing else needs the plain rules

        return works(Simulator(self.traces("test"), self.video("test"), self.rules, "fixed", self.history))

    def label(self, env: Any, values: str) -> Hindsight:
        """Add hindsight values of all levels to each step of a simulator."""
        if values != "hindsight":
            raise unknown("kind of action values", values, ("hindsight",))
        return Hindsight(env)

    def numbers(self, split: str) -> range:
        """Numbers of the traces, one session each."""
        return range(len(self.simulator(split).traces))

    def report(self, played: Rollout, env: Simulator, numbers: Sequence[int], steps: bool) -> dict[str, pd.DataFrame]:
        """Turn what happened into tables.

        Returns:
            ``episodes``: means over chunks that the policy chose, clustered by source of the traces; and with steps
            ``steps``: one row a chunk, the first one of a session too, whose level no policy chose and whose reward
            does not count.
        """
        traces, trace = env.traces, played.start["trace"]
        info = {**played.info, "reward": played.rewards}
        where = {"trace_name": traces.names[trace], "trace": trace}
        means = {
            "qoe": played.rewards,
            "bitrate_mbps": env.ladder[info["bitrate"]] / 1000.0,
            "rebuffer_s": info["rebuffer_s"],
            "smoothness_mbps": info["change_mbps"],
        }
        cluster = np.unique(traces.sources, return_inverse=True)[1][trace]
        about = {"episode": numbers, **where, "source": traces.sources[trace], "cluster": cluster}
        tables = {"episodes": pd.DataFrame(about | {name: values.mean(0) for name, values in means.items()})}
        if steps:
            columns = {
                name: np.concatenate([played.start[name][None], info[name]]).T.ravel()  # session by session
                for name in CHUNK_COLUMNS
            }
            chunks = len(played.rewards) + 1
            repeated = {name: np.repeat(values, chunks) for name, values in where.items()}
            tables["steps"] = pd.DataFrame(repeated | columns)
        return tables

    def figures(self, watched: dict[str, dict[str, pd.DataFrame]]) -> "dict[str, Figure]":
        """Draw a session, and the distribution of QoE."""
        from tasks.adaptive_bitrate.figures import draw_qoe, draw_session  # imported late: matplotlib takes a while

        session = draw_session({name: tables["steps"] for name, tables in watched.items()}, self.simulator("valid"))
        return {"session": session, "qoe": draw_qoe({name: tables["episodes"] for name, tables in watched.items()})}

    # Experience -------------------------------------------------------------------------------------------------------

    def convert(self, file: Path) -> Iterator[Rollout]:
        """Read the episodes of an experience pool that NetLLM's program wrote."""
        return read_published(file, self.history)

    def fitting(self, pool: Pool) -> Pool:
        """Return a pool whose observations look like those of the sessions that are validated and tested on."""
        levels = len(self.video("train").ladder_kbps)
        for name, column, own in (
            ("levels", "next_bytes", levels),
            ("history", "throughput", self.history),
            ("lookahead", "upcoming_mb", self.lookahead),  # 0 does not look at the column
        ):
            found = pool.columns[column].shape[0] if column in pool.columns else own
            if own and found != own:
                cure = "choose its video" if name == "levels" else f"set data.{name} and model.{name} to {found}"
                raise UserError(
                    f"the pool {pool.folder} has {name} {found}, the data {own}; {cure}, or collect another"
                )
        return pool

    def content(self, split: str) -> str:
        """Hash of what sessions depend on."""
        traces, video = self.traces(split), self.video(split)
        arrays = (traces.starts, traces.time_s, traces.bandwidth_mbps, video.ladder_kbps, video.chunk_bytes)
        digest = hashlib.sha256(repr((video.chunk_s, self.rules, self.history, self.lookahead)).encode())
        for array in arrays:
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()
