"""What `python -m netllm_pl study` does."""

import os
import shlex
from dataclasses import dataclass
from pathlib import Path

from netllm_pl.errors import Terminated, UserError
from netllm_pl.progress import say
from netllm_pl.study.plan import OVERLAYS, Plan, find, read
from netllm_pl.study.runner import Runner, data_of
from netllm_pl.study.sharing import shared

RESULTS = Path("docs/results")
QUICK = "Quick: a few steps, and tiny random layers for language models; shows that the study runs, and nothing else."
GENERATED = "On generated data: this says nothing about real ones."


@dataclass(frozen=True)
class Options:
    """The command line.

    Attributes:
        name: A study in configs/study, or a file.
        run_dir: Folder of the runs; null is below runs/study.
        out: Folder of the report; null is docs/results, or that of the runs.
        parts: Names of parts, separated by commas; null takes all.
        trained: RUN=PATH,... of what is trained already.
        jobs: Commands side by side; null is 1, with quick 0.
        generated: Take generated data.
        quick: Take small sizes and generated data.
        data_dir: Folder of the data sets.
        report: Run nothing.
        list: Run nothing, and print what would be run.
    """

    name: str
    run_dir: Path | None = None
    out: Path | None = None
    parts: str | None = None
    trained: str | None = None
    jobs: int | None = None
    generated: bool = False
    quick: bool = False
    data_dir: str | None = None
    report: bool = False
    list: bool = False


def run(options: Options) -> None:
    """Run a study and write its report.

    Raises:
        UserError: The study is not well described, or some of its commands failed; the report tells of the others.
    """
    file = find(options.name)
    overlays = OVERLAYS if options.quick else OVERLAYS[:1] if options.generated else ()
    study = read(file, overlays)
    name = file.stem
    home = options.run_dir or Path("runs") / "study" / (f"{name}-quick" if options.quick else name)
    parts = None if options.parts is None else [part.strip() for part in options.parts.split(",")]
    trained = _trained(options.trained)
    environment = dict(os.environ) | ({} if options.data_dir is None else {"NETLLM_DATA": options.data_dir})
    found = shared(study, home, trained, data_of(environment))
    plan = Plan(study, home, found, parts)
    jobs = (0 if options.quick else 1) if options.jobs is None else options.jobs
    if jobs < 0:
        raise UserError(f"--jobs is {jobs}; it must be at least 0, which runs all in this process")
    runner = Runner(plan.jobs, home, jobs, options.data_dir)
    if options.list:
        for job in runner.open().values():
            print(shlex.join(["python", "-m", "netllm_pl", *job.words]))
        return
    for run_name in sorted(found.keys() - trained.keys()):
        say(f"{run_name}: {found[run_name]} is the same")
    failed: list[str] = []
    if not options.report:
        try:
            failed = runner.run()
        except (KeyboardInterrupt, Terminated) as stop:
            raise type(stop)("stopped; the same command goes on from here") from None
    from netllm_pl.study.report import write

    warning = QUICK if options.quick else GENERATED if options.generated else ""
    out = options.out or (home if warning else RESULTS)
    option = "--quick" if options.quick else "--generated" if options.generated else ""
    # Of parts that were not asked for, too: what an earlier command measured stays in the report.
    command = f"python -m netllm_pl study {options.name} {option}".strip()
    written = write(Plan(study, home, found), name, out, warning, command)
    print(f"wrote {', '.join(file.name for file in written)} in {out}")
    if failed:
        raise UserError(f"{len(failed)} commands failed, the same command tries again:\n" + "\n".join(failed[:5]))


def _trained(text: str | None) -> dict[str, str]:
    found: dict[str, str] = {}
    for pair in filter(None, (text or "").split(",")):
        name, equals, path = pair.partition("=")
        if not equals or not path:
            raise UserError(f"--trained {pair}: give RUN=PATH, such as llm=runs/llm_{{seed}}")
        found[name.strip()] = os.path.expanduser(path.strip())
    return found
