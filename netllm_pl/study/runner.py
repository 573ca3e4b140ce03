"""Runs the commands of a study: each once, those that were interrupted from where they were, several side by side."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from netllm_pl.errors import Terminated, UserError
from netllm_pl.paths import atomic, locked
from netllm_pl.progress import in_words, say
from netllm_pl.run_folder import LAST
from netllm_pl.study.plan import Job

POLL_S = 0.1


@dataclass(frozen=True)
class Record:
    """What is known of a command that ran.

    Attributes:
        words: The command line.
        code: What it exited with; None if it was cut off.
        seconds: How long it took, in all its parts.
        ended: When it ended, in seconds since 1970.
        data: Where data sets lay; empty is where commands look by themselves. Old records do not say.
    """

    words: list[str]
    code: int | None
    seconds: float
    ended: float
    data: str | None = None


def data_of(environment: Mapping[str, str]) -> str:
    """Where data sets lie for commands with this environment; empty is where they look by themselves."""
    folder = environment.get("NETLLM_DATA", "")
    return folder and os.path.abspath(os.path.expanduser(folder))


class _Going:
    """A command that runs in another process."""

    def __init__(self, job: Job, words: Sequence[str], log: IO[str], environment: Mapping[str, str]) -> None:
        self.job, self.log, self.began = job, log, time.time()
        command = [sys.executable, "-m", "netllm_pl", *words]
        # In a group of its own: a terminal's Ctrl-C would reach it beside the SIGTERM that it gets from here.
        self.process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )


class Runner:
    """Runs jobs.

    Args:
        jobs: All of a study, each behind those that it needs.
        home: Folder of the study, for logs and for what is known of commands that ran.
        parallel: How many run side by side, in processes of their own; 0 runs one after the other in this process.
        data_dir: Folder of the data sets, for all commands; null is that of the environment.
    """

    def __init__(self, jobs: Mapping[str, Job], home: Path, parallel: int = 1, data_dir: str | None = None) -> None:
        self.jobs, self.home, self.parallel = jobs, home, parallel
        self.environment = dict(os.environ) | ({} if data_dir is None else {"NETLLM_DATA": data_dir})
        if parallel > 1:
            self.environment.setdefault("OMP_NUM_THREADS", "1")

    def run(self) -> list[str]:
        """Run what is not done.

        Returns:
            A line for each job that failed, and for those that need it.

        Raises:
            KeyboardInterrupt: Ctrl-C; or Terminated, after SIGTERM. What ran has stopped behind a checkpoint.
            UserError: A job has run with another command, or another process runs this study.
        """
        self.home.mkdir(parents=True, exist_ok=True)
        with locked(self.home) as alone:
            if alone is False:
                raise UserError(
                    f"another process runs the study in {self.home}; wait for it, or give another --run_dir"
                )
            open_jobs = self.open()
            self.total, self.done = len(open_jobs), 0
            if len(open_jobs) < len(self.jobs):
                say(f"{len(self.jobs) - len(open_jobs)} of {len(self.jobs)} commands are done already")
            return self._run(open_jobs)

    def open(self) -> dict[str, Job]:
        """Return the jobs that are not done, or whose input has been made again since.

        Raises:
            UserError: One has run with another command, whose result is not thrown away unasked.
        """
        found: dict[str, Job] = {}
        for name, job in self.jobs.items():
            record = self.record(name)
            changed = record is not None and record.words != list(job.words)
            if record is not None and changed and job.words[0] != "evaluate" and job.folder.exists():
                pairs = ((record.words, job.words), (job.words, record.words))
                then, now = (" ".join(word for word in one if word not in other) or "nothing" for one, other in pairs)
                raise UserError(
                    f"{name} was made by another command ({then[:200]} there, {now[:200]} now); remove {job.folder} to "
                    "make it again, or give another --run_dir"
                )
            if record is None or record.code != 0 or not job.folder.exists() or self._stale(job, record, found):
                found[name] = job
        return found

    def _stale(self, job: Job, record: Record, found: Mapping[str, Job]) -> bool:
        if record.words != list(job.words) or any(need in found for need in job.needs):
            return True
        needed = [self.record(need) for need in job.needs]
        weights = [Path(word) for word in ",".join(job.words).split(",") if word.endswith(".ckpt")]
        times = [r.ended for r in needed if r is not None] + [w.stat().st_mtime for w in weights if w.exists()]
        return job.words[0] == "evaluate" and max(times, default=0.0) > record.ended

    def record(self, name: str) -> Record | None:
        """What is known of a job; None if it never began."""
        file = self._file("jobs", name, ".json")
        try:
            return Record(**json.loads(file.read_text()))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError) as error:
            raise UserError(f"{file} is broken; remove it, and the command runs again") from error

    def log(self, name: str) -> Path:
        """File with what a job printed."""
        return self._file("logs", name, ".log")

    def _file(self, kind: str, name: str, suffix: str) -> Path:
        return self.home / kind / f"{name.replace('/', '-').replace(',', '+')[:150]}{suffix}"

    def _run(self, waiting: dict[str, Job]) -> list[str]:
        failed: dict[str, str] = {}
        going: list[_Going] = []
        try:
            while waiting or going:
                for name, job in list(waiting.items()):
                    broken = [need for need in job.needs if need in failed]
                    if broken:
                        failed[name] = f"{name} needs {broken[0]}"
                        del waiting[name]
                    elif len(going) < max(1, self.parallel) and not self._blocked(job, waiting, going):
                        del waiting[name]
                        if self.parallel:
                            going.append(self._start(job))
                        else:
                            self._ended(job, *self._here(job), failed)
                for one in [one for one in going if one.process.poll() is not None]:
                    going.remove(one)
                    one.log.close()
                    self._ended(one.job, one.process.returncode, one.began, failed)
                if going:
                    time.sleep(POLL_S)
        except (KeyboardInterrupt, Terminated):
            self._stop(going)
            raise
        return list(failed.values())

    @staticmethod
    def _blocked(job: Job, waiting: Mapping[str, Job], going: Sequence[_Going]) -> bool:
        if going and (job.alone or any(one.job.alone for one in going)):
            return True
        unfinished = {*waiting, *(one.job.name for one in going)}
        return any(need in unfinished for need in job.needs)

    def _begin(self, job: Job) -> tuple[list[str], IO[str]]:
        """Clear away what cannot be gone on with; return the command line, and where its output goes."""
        words, record = list(job.words), self.record(job.name)
        last = job.folder / LAST
        if job.words[0] == "fit" and last.is_file():
            words += ["--ckpt_path", str(last)]
        elif job.words[0] in ("fit", "benchmark") or record is None or record.words != words or record.code == 0:
            # All that lies there is of this study: a training without a checkpoint, or what is out of date.
            shutil.rmtree(job.folder, ignore_errors=True)
        spent = record.seconds if record is not None and "--ckpt_path" in words else 0.0
        self._note(job, None, spent)
        self.done += 1
        say(f"[{self.done}/{self.total}] {job.name}: {shlex.join(['python', '-m', 'netllm_pl', *words])}")
        log = self.log(job.name)
        log.parent.mkdir(parents=True, exist_ok=True)
        return words, log.open("a")

    def _start(self, job: Job) -> _Going:
        words, log = self._begin(job)
        return _Going(job, words, log, self.environment)

    def _here(self, job: Job) -> tuple[int, float]:
        """Run a job in this process; return what it exits with, and when it began."""
        from netllm_pl.cli import main

        words, log = self._begin(job)
        began, before = time.time(), dict(os.environ)
        os.environ.update(self.environment)
        try:
            with log, redirect_stdout(log), redirect_stderr(log):
                main(words)
            return 0, began
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
            if code in (128 + signal.SIGINT, 128 + signal.SIGTERM):
                self._note(job, None, self._spent(job) + time.time() - began)
                raise (KeyboardInterrupt if code == 128 + signal.SIGINT else Terminated) from None
            return code, began
        finally:
            os.environ.clear()
            os.environ.update(before)

    def _ended(self, job: Job, code: int, began: float, failed: dict[str, str]) -> None:
        seconds = time.time() - began
        self._note(job, code, self._spent(job) + seconds)
        if code == 0:
            say(f"{job.name}: done in {in_words(seconds)}")
            return
        lines = self.log(job.name).read_text(errors="replace").strip().splitlines() or ["it printed nothing"]
        failed[job.name] = f"{job.name}: {lines[-1][:300]} ({self.log(job.name)})"
        say(f"{job.name} failed: {lines[-1][:300]}")

    def _spent(self, job: Job) -> float:
        record = self.record(job.name)
        return 0.0 if record is None else record.seconds

    def _note(self, job: Job, code: int | None, seconds: float) -> None:
        record = Record(list(job.words), code, round(seconds, 2), time.time(), data_of(self.environment))
        with atomic(self._file("jobs", job.name, ".json")) as file:
            file.write_text(json.dumps(asdict(record)) + "\n")

    def _stop(self, going: Sequence[_Going]) -> None:
        """Let what runs end behind a checkpoint."""
        for one in going:
            one.process.terminate()
        for one in going:
            one.process.wait()
            one.log.close()
            self._note(one.job, None, self._spent(one.job) + time.time() - one.began)
