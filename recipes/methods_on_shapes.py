"""Every method, with and without evidence alignment, in one table.

    python recipes/methods_on_shapes.py --workers 2                         # everything: 1.5 hours on two cores
    python recipes/methods_on_shapes.py --methods flcp lora --seeds 0
    python recipes/methods_on_shapes.py --report-only                       # the table again, from what was run
    python recipes/methods_on_shapes.py --config configs/white_blood_cells.yaml --seeds 0 \
        --runs runs/methods_on_white_blood_cells --output reports/methods_on_white_blood_cells

Methods and their settings are those under `methods` in the configuration. Arms that have finished with the same
settings are kept, interrupted ones are continued; what was run with other settings moves to `replaced`. The table is
made from the run records and outcomes alone: `results.json` (means over seeds), `table.md`, and `README.md` with the
settings.
"""

import logging
import math
import multiprocessing
import os
import signal
import statistics
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import numpy as np
import torch
import tyro

from evidence_ft import experiment
from evidence_ft.checkpoints import flattened
from evidence_ft.config import Arm, ExperimentConfig, parse, read
from evidence_ft.files import to_json, write_atomically
from evidence_ft.interruption import Interrupted
from evidence_ft.metrics import percentile_interval, replicate
from evidence_ft.outcomes import Outcomes
from evidence_ft.report import ARM_ORDER
from evidence_ft.runs import RECORD_FILE, RunRecord

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
ARMS: Mapping[str, tuple[Arm, ...]] = {
    "zero_shot": ("baseline",),
    "tip_adapter": ("baseline",),
    **dict.fromkeys(("flcp", "ft", "lora"), ("baseline", "evidence", "swap", "evidence_swap")),
}
"""Of the methods that train nothing, and of those that also have the arms with swapped backgrounds."""
TRAINED: tuple[Arm, ...] = ("baseline", "evidence")
"""Of all other methods."""
RATES = {"accuracy": "Accuracy", "PT": "PT", "IR": "IR", "RR": "RR", "swapped_accuracy": "Swapped background"}
IN_RECORDS = {"RR": "RR_share"}  # where a record has another name for a rate
HOW_TO_READ = """\
Each cell is the mean over seeds ± its standard deviation over seeds, with a 95 % interval in brackets. The interval is
a bootstrap of the test images (10,000 draws, the same for all arms and seeds, so differences are paired) around the
mean of the seeds that were run: it covers the choice of test images, not that of seeds, which the deviation shows.

Accuracy is over all images; PT = RR / (RR + RW), IR = RR / (RR + WR) and RR are over those with evidence in view;
swapped background is the accuracy with each object on the background of an image of another class. Arm evidence has
the evidence loss, swap background-swap augmentation, evidence_swap both."""
NOTHING, MINUS = "\N{EN DASH}", "\N{MINUS SIGN}"


@dataclass(frozen=True)
class Command:
    """What is run, and where it goes."""

    config: Path = CONFIGS / "shapes.yaml"
    """data, model and settings; methods are those under `methods`"""
    methods: tuple[str, ...] = ()
    """some of them; all by default"""
    seeds: tuple[int, ...] = (0, 1, 2)
    """of training"""
    runs: Path = Path("runs/methods_on_shapes")
    """folder of the runs: <method>/seed<k>/<arm>"""
    output: Path = Path("reports/methods_on_shapes")
    """folder of the table"""
    workers: int = 1
    """runs at a time, each on one core if there are several"""
    report_only: bool = False
    """run nothing"""


# Running


class Job(NamedTuple):
    """All arms of one method and seed."""

    config: Path
    runs: Path
    method: str
    seed: int


def settings_of(job: Job) -> ExperimentConfig[Any, Any]:
    file = read(job.config)
    # A method that the file names for all would be run under every name; a section of `methods` may name its own.
    file["method"] = {key: value for key, value in (file.get("method") or {}).items() if key != "name"}
    tree = parse(file, str(job.config), method=job.method).model_dump()
    arms = ARMS.get(job.method, TRAINED)
    tree["run"] |= {"directory": job.runs / job.method, "name": f"seed{job.seed}", "seed": job.seed, "arms": arms}
    tree["training"]["background_swap"] = tree["training"]["background_swap"] if "swap" in arms else 0.0
    return parse(tree, str(job.config))


class Failure(NamedTuple):
    """What went wrong in a job, and whether it was only asked to stop."""

    message: str
    interrupted: bool


def run_job(job: Job) -> Failure | None:
    """Run what has not been run."""
    logging.basicConfig(level=logging.INFO, format=f"{job.method}, seed {job.seed}: %(message)s", force=True)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        config = settings_of(job)
        states = {arm: experiment.arm_state(config, arm) for arm in config.run.arms}
        stale = [arm for arm, state in states.items() if state == "other"]
        to_run = [arm for arm, state in states.items() if state in ("new", "interrupted")]
        for arms, resume in ((stale, False), (to_run, True)):
            if arms:
                experiment.run_arms(parse(_with(config, arms=tuple(arms), resume=resume)))
    except (*experiment.MENDABLE, Interrupted) as error:
        return Failure(f"{job.method}, seed {job.seed}: {error}", isinstance(error, Interrupted))
    return None


def _with(config: ExperimentConfig[Any, Any], **run: Any) -> dict[str, Any]:
    tree = config.model_dump()
    tree["run"] |= run
    if not set(tree["run"]["arms"]) & {"swap", "evidence_swap"}:
        tree["training"]["background_swap"] = 0.0
    return tree


def run_all(jobs: Sequence[Job], workers: int) -> list[Failure]:
    """Run all jobs, until one is interrupted; what went wrong."""
    if workers == 1:
        return _until_interrupted(map(run_job, jobs))
    # Read when a worker imports torch. Two runs that share all cores are slower than one after the other.
    os.environ["OMP_NUM_THREADS"] = "1"
    return run_apart(run_job, jobs, workers)


def run_apart(function: Callable[[Job], Failure | None], jobs: Sequence[Job], workers: int) -> list[Failure]:
    """Each job in a process of its own, some at a time; a signal that ends this process ends those that run."""
    context = multiprocessing.get_context("spawn")
    waiting, failures, running = list(jobs), [], {}
    with _handing_on(running) as asked_to_stop:
        while running or (waiting and not asked_to_stop()):
            while waiting and len(running) < workers and not asked_to_stop():
                job, (receiving, sending) = waiting.pop(0), context.Pipe(duplex=False)
                process = context.Process(target=_report, args=(function, job, sending))
                process.start()
                sending.close()
                running[process] = (job, receiving)
                if asked_to_stop():  # while it started
                    process.terminate()
            wait([process.sentinel for process in running], timeout=1)
            for process in [process for process in running if not process.is_alive()]:
                job, receiving = running.pop(process)
                failure = _outcome(job, process, receiving, asked_to_stop())
                failures += [failure] if failure else []
                if failure and failure.interrupted:
                    waiting = []
        if waiting:
            failures.append(Failure(f"stopped before {len(waiting)} job(s) had begun", interrupted=True))
    return failures


def _report(function: Callable[[Job], Failure | None], job: Job, sending: Connection) -> None:
    try:
        sending.send(function(job))
    except KeyboardInterrupt:
        sending.send(Failure(f"{job.method}, seed {job.seed}: interrupted", interrupted=True))


def _outcome(job: Job, process: BaseProcess, receiving: Connection, stopped: bool) -> Failure | None:
    try:
        return receiving.recv()
    except EOFError:
        return Failure(f"{job.method}, seed {job.seed}: its process ended with {process.exitcode}", stopped)


@contextmanager
def _handing_on(running: Collection[BaseProcess]) -> Iterator[Callable[[], bool]]:
    """While open, SIGTERM and Ctrl-C end what is running: it saves its state. A second one kills it."""
    noted: list[int] = []

    def hand_on(number: int, _frame: FrameType | None) -> None:
        noted.append(number)
        for process in list(running):
            if process.is_alive():
                process.terminate() if len(noted) == 1 else process.kill()

    previous = {number: signal.signal(number, hand_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: bool(noted)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _until_interrupted(results: Iterable[Failure | None]) -> list[Failure]:
    failures = []
    for failure in results:
        if failure is not None:
            failures.append(failure)
            if failure.interrupted:
                break
    return failures


# Reading


@dataclass(frozen=True)
class Finished:
    """One arm of one method, by seed."""

    method: str
    arm: str
    records: dict[int, RunRecord]
    outcomes: dict[str, dict[int, Outcomes]]
    """by split, then seed; all with rows in the same order"""


def collect(runs: Path, methods: Sequence[str]) -> list[Finished]:
    """Every finished arm, in the order of the methods and of the report's arms."""
    found = []
    for method in methods:
        for arm in ARM_ORDER:
            records = {
                record.seed: (path.parent, record)
                for path in sorted((runs / method).glob(f"seed*/{arm}/{RECORD_FILE}"))
                if (record := RunRecord.read(path.parent))
            }
            if not records:
                continue
            splits: dict[str, dict[int, Outcomes]] = {}
            for seed, (directory, record) in records.items():
                for split in record.outcomes:
                    outcomes = record.read_outcomes(directory, split)
                    first = next(iter(splits.get(split, {}).values()), outcomes)
                    if set(outcomes.sample_ids) != set(first.sample_ids):
                        raise SystemExit(
                            f"error: {directory} was judged on other images of {split} than the seeds before it, and "
                            "there is no mean of both; run all seeds on the same data, or choose other --runs"
                        )
                    splits.setdefault(split, {})[seed] = outcomes.in_order_of(first.sample_ids)
            found.append(Finished(method, arm, {seed: record for seed, (_, record) in records.items()}, splits))
    return found


def means(finished: Sequence[Finished]) -> dict[str, Any]:
    """What `results.json` holds: method, arm, split, rate to its mean over seeds."""
    results: dict[str, Any] = {}
    for each in finished:
        results.setdefault(each.method, {})[each.arm] = {
            split: {rate: statistics.fmean(by_seed(each, split, rate).values()) for rate in RATES}
            for split in each.outcomes
        }
    return results


def by_seed(finished: Finished, split: str, rate: str) -> dict[int, float]:
    """A rate of each seed, as a share; NaN where it is undefined."""
    values = {seed: record.results[split][IN_RECORDS.get(rate, rate)] for seed, record in finished.records.items()}
    return {seed: math.nan if value is None else float(value) for seed, value in values.items()}


# Writing


class Cell(NamedTuple):
    """A rate or a difference: mean and standard deviation over seeds, and its interval."""

    mean: float
    deviation: float
    low: float
    high: float

    def text(self, *, signed: bool = False) -> str:
        if math.isnan(self.mean):
            return NOTHING
        sign = "+" if signed else ""
        deviation = "" if math.isnan(self.deviation) else f" ± {100 * self.deviation:.1f}"
        interval = "" if math.isnan(self.low) else f" [{100 * self.low:{sign}.1f}, {100 * self.high:{sign}.1f}]"
        return f"{100 * self.mean:{sign}.1f}{deviation}{interval}".replace("-", MINUS)


def cell_of(values: Sequence[float], drawn: Sequence[torch.Tensor]) -> Cell:
    mean = statistics.fmean(values)
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
    interval = percentile_interval(mean, torch.stack(list(drawn)).mean(dim=0))
    return Cell(mean, deviation, interval.low, interval.high)


def rows_of(arms: Sequence[Finished], split: str) -> tuple[list[list[str]], list[list[str]]]:
    """The arms of one method on one split: rows of the table, and rows of the differences from the baseline."""
    first = next(iter(arms[0].outcomes[split].values()))
    threshold = next(iter(arms[0].records.values())).config["evaluation"]["threshold"]
    statistics_of = {
        (each.arm, seed, rate): statistic
        for each in arms
        for seed, outcomes in each.outcomes[split].items()
        for rate, statistic in outcomes.in_order_of(first.sample_ids).ratio_statistics(threshold).items()
        if rate in RATES
    }
    drawn = replicate(statistics_of)  # the same draws of test images for all arms and seeds
    rows, differences = [], []
    baseline = next((each for each in arms if each.arm == "baseline"), None)
    for each in arms:
        seeds = sorted(each.records)
        label = [each.method, each.arm, " ".join(map(str, seeds))]
        rows.append(label.copy())
        for rate in RATES:
            values = by_seed(each, split, rate)
            rows[-1].append(cell_of([*values.values()], [drawn[each.arm, seed, rate] for seed in values]).text())
        if baseline is None or each is baseline:
            continue
        common = [seed for seed in seeds if seed in baseline.records]
        if not common:
            continue
        differences.append([each.method, f"{each.arm} {MINUS} baseline", " ".join(map(str, common))])
        for rate in RATES:
            ours, theirs = by_seed(each, split, rate), by_seed(baseline, split, rate)
            cell = cell_of(
                [ours[seed] - theirs[seed] for seed in common],
                [drawn[each.arm, seed, rate] - drawn["baseline", seed, rate] for seed in common],
            )
            differences[-1].append(cell.text(signed=True))
    return rows, differences


def tables(finished: Sequence[Finished]) -> str:
    """Markdown: for each split the rates, then the differences."""
    methods = list(dict.fromkeys(each.method for each in finished))
    parts = []
    for split in dict.fromkeys(split for each in finished for split in each.outcomes):
        rows, differences = [], []
        for method in methods:
            of_method = rows_of([each for each in finished if each.method == method], split)
            rows += of_method[0]
            differences += of_method[1]
        header = ["Method", "Arm", "Seeds", *RATES.values()]
        parts += [f"## {split}", "Per cent.", markdown(header, rows)]
        if differences:
            parts += ["Difference from the method's baseline, in points.", markdown(header, differences)]
    return "\n\n".join(parts) + "\n"


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    rule = ["---"] * 3 + ["--:"] * (len(header) - 3)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *rows))


def readme(finished: Sequence[Finished], command: str) -> str:
    """The tables with what a reader needs to judge and to repeat them."""
    records = [record for each in finished for record in each.records.values()]
    one = records[0]
    sizes = ", ".join(f"{split} {data.n}" for split, data in one.data.items())
    environments = sorted({f"{r.environment['platform']}, {r.environment['device']}" for r in records})
    commits = sorted({(r.environment["git"] or {}).get("commit", "none")[:12] for r in records})
    made = (
        f"Made by `{command}` from the records of {len(records)} arms. Model {one.model['checkpoint']}; images: "
        f"{sizes}; {'; '.join(environments)}; commits {', '.join(commits)}."
    )
    header = ["Method", "Arm", "Layers", "Weight", "Swap", "Learning rate", "Epochs", "Batch", "Share tuned", "Steps"]
    parts = [
        f"# Every method on {one.config['data']['format']}",
        made,
        HOW_TO_READ,
        *[f"**Warning:** {warning}" for warning in warnings(finished)],
        tables(finished).rstrip(),
        "## Settings",
        markdown([*header, "Seconds"], [settings_row(each) for each in finished]),
    ]
    return "\n\n".join(parts) + "\n"


def settings_row(finished: Finished) -> list[str]:
    record = next(iter(finished.records.values()))
    evidence, training = record.config["evidence"], record.config["training"]
    trained = [record.training or {} for record in finished.records.values()]
    if not trained[0].get("steps"):
        return [finished.method, finished.arm, *[NOTHING] * 9]
    return [
        finished.method,
        finished.arm,
        str(evidence["layers"]),
        f"{evidence['weight']:g}",
        f"{training['background_swap']:g}",
        f"{training['learning_rate']:g}",
        str(training["epochs"]),
        str(training["batch_size"]),
        f"{record.config['evaluation']['interpolation']:g}",
        str(trained[0]["steps"]),
        f"{statistics.fmean(each['seconds'] for each in trained):.0f}",
    ]


def warnings(finished: Sequence[Finished]) -> list[str]:
    """Settings that differ where they should not: between seeds of an arm, and between arms of a method."""
    found = []
    meant = {"evidence.weight", "training.background_swap"}
    by_method: dict[str, Finished] = {}
    for each in finished:
        reference = next(iter(by_method.setdefault(each.method, each).records.values()))
        for record in each.records.values():
            may_differ = set() if record.arm == reference.arm else meant
            ours, theirs = flattened(reference.config), flattened(record.config)
            keys = [
                key
                for key in ours | theirs
                if not key.startswith("run.") and key not in may_differ and ours.get(key) != theirs.get(key)
            ]
            if keys:
                found.append(f"{each.method}, {each.arm}, seed {record.seed} was run with other {', '.join(keys)}.")
    return found


def write_table(finished: Sequence[Finished], output: Path, command: str) -> None:
    write_atomically(output / "results.json", to_json(means(finished)))
    write_atomically(output / "table.md", tables(finished))
    write_atomically(output / "README.md", readme(finished, command))


def command_line(command: Command) -> str:
    """What makes the same table again."""
    words = ["python recipes/methods_on_shapes.py"]
    default = Command()
    changed = {name: value for name, value in asdict(command).items() if value != getattr(default, name)}
    words += [f"--{name} {value}" for name, value in changed.items() if isinstance(value, Path)]
    words += [f"--{name} {' '.join(map(str, value))}" for name, value in changed.items() if isinstance(value, tuple)]
    return " ".join(words)


def main(command: Command) -> None:
    if command.workers < 1:
        raise SystemExit(f"error: workers is {command.workers}; give at least 1")
    known = list(read(command.config).get("methods", {}))
    if unknown := [method for method in command.methods if method not in known]:
        raise SystemExit(f"error: {command.config} has no methods {', '.join(unknown)}; there are {', '.join(known)}")
    failures: list[Failure] = []
    if not command.report_only:
        methods = command.methods or known
        jobs = [Job(command.config, command.runs, method, seed) for seed in command.seeds for method in methods]
        failures = run_all(jobs, command.workers)
        for failure in failures:
            print(failure.message)
        if any(failure.interrupted for failure in failures):
            raise SystemExit(Interrupted.exit_code)
    finished = collect(command.runs, known)
    if not finished:
        raise SystemExit(f"error: no finished arms in {command.runs}")
    write_table(finished, command.output, command_line(command))
    print(tables(finished))
    print((command.output / "README.md").resolve())
    raise SystemExit(1 if failures else 0)


if __name__ == "__main__":
    main(tyro.cli(Command, description=__doc__))
