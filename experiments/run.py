"""Run experiments in order, each finished run at once a row of results.csv; what is recorded is not run again.

python -m experiments.run                                   all of them, from where they stopped
python -m experiments.run experiments/small_objects.yaml    one file
python -m experiments.run --only yolov5-spd-n --list        what there is and what is missing
python -m experiments.run --smoke                           each run for one tiny epoch on drawn data
"""

import contextlib
import importlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from experiments import ledger
from experiments.plans import FIGURES, ROOT, Experiment, Run, all_experiments, command, flags, relative
from utils.core.config import option, parse_config, run_cli
from utils.core.errors import UserError
from utils.core.log import LOGGER

SMOKE_TRAIN = {"epochs": 1, "imgsz": 64, "batch-size": 4, "workers": 0, "device": "cpu", "noplots": True}
SHARED_OPTIONS = (
    "iou-thres",
    "iou-thrs",
    "max-dets",
    "area-bins",
    "area-from",
    "slice",
    "overlap",
)  # val.py, compare.py
SMOKE_VAL = {"batch-size": 4, "workers": 0, "device": "cpu", "noplots": True}


@dataclass(frozen=True)
class RunConfig:
    """Options of experiments.run."""

    files: list[str] = option([], "experiment files; default: all", nargs="*")
    only: str = option("", "runs whose name contains this")
    seeds: list[int] = option([], "only these seeds", nargs="+")
    list: bool = option(False, "show what is recorded and what is missing, run nothing")
    smoke: bool = option(False, "one tiny epoch of everything on drawn data; records nothing in the repository")
    project: str = option("runs/experiments", "folder of the runs")


class Runner:
    """Carries out runs and keeps the record."""

    def __init__(self, config: RunConfig) -> None:
        self.config, self.project = config, (ROOT / config.project)
        self.results, self.differences, self.figures = ledger.RESULTS, ledger.DIFFERENCES, FIGURES
        if config.smoke:
            self.project = self.project / "smoke"
            self.results, self.differences = self.project / "results.csv", self.project / "differences.csv"
            self.figures = self.project / "figures"

    def recorded(self) -> set[tuple[str, str, str]]:
        """Keys of the rows that exist."""
        return {(row["experiment"], row["run"], row["seed"]) for row in ledger.read(self.results)}

    def make(self, run: Run) -> float:
        """Train (or continue, or convert) a run's weights; the minutes of a whole training, else NaN."""
        folder = run.folder(self.project)
        folder.mkdir(parents=True, exist_ok=True)
        program, args = run.make(self.project)
        last, note, asked = folder / "train" / "weights" / "last.pt", folder / "command.txt", command(program, args)
        begun = last.is_file() and not self.config.smoke
        if begun and not (note.is_file() and note.read_text(encoding="utf-8") == asked):
            raise UserError(f"{folder} was begun by another command than '{asked}'; move that folder away")
        note.write_text(asked, encoding="utf-8")
        started = time.monotonic()
        self.execute(program, ["--resume", relative(last)] if begun else args, folder)
        trained = program == "train.py" and not begun  # a part is not the whole
        return (time.monotonic() - started) / 60 if trained else float("nan")

    def carry_out(self, run: Run) -> None:
        """Make the weights, validate, record."""
        folder = run.folder(self.project)
        (program, make_args), val_args = run.make(self.project), run.val_args(self.project)
        commit = ledger.commit()
        minutes = self.make(run)
        detector = not run.model.startswith("resnet")
        self.execute("val.py", [*val_args, *(["--save-json"] if detector else [])], folder)
        row = {
            "experiment": run.experiment, "run": run.name, "model": run.model, "seed": run.seed,
            "imgsz": run.train["imgsz"], "epochs": run.train["epochs"], "train_minutes": minutes,
            **self.metrics(folder), **self.size(run),
            "commit": commit, "finished": time.strftime("%Y-%m-%d %H:%M"),
            "hardware": ledger.hardware(run.train.get("device", "")), "software": ledger.software(),
            "command": " && ".join((command(program, make_args), command("val.py", val_args))),
        }  # fmt: skip
        ledger.append(self.results, ledger.RESULT_COLUMNS, row)

    def execute(self, program: str, args: Sequence[str], folder: Path) -> None:
        """Run a verb in the repository with its output in log.txt; in this process when it is only for smoke."""
        log = folder / "log.txt"
        with open(log, "a", encoding="utf-8") as file:
            file.write(f"$ {command(program, args)}\n")
            file.flush()
            if self.config.smoke:
                with contextlib.chdir(ROOT), contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
                    code = importlib.import_module(Path(program).stem).main(list(args))
            else:
                whole = [sys.executable, program, *args]
                code = subprocess.run(whole, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, check=False).returncode
        if code:
            lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            raise UserError(f"{program} ended with code {code}: {lines[-1]} (see {log})")

    @staticmethod
    def metrics(folder: Path) -> dict[str, float]:
        """The columns of metrics.json that are recorded."""
        found = json.loads((folder / "val" / "metrics.json").read_text(encoding="utf-8"))
        values = {key: found.get(ledger.IN_METRICS_JSON.get(key, key)) for key in ledger.METRICS}
        return {key: float(value) for key, value in values.items() if value is not None}

    def size(self, run: Run) -> dict[str, float]:
        """Parameters, and GFLOPs at the run's size."""
        import info
        from utils.core.config import config_from_kwargs

        best = str(run.best(self.project))
        summary = info.measure(config_from_kwargs(info.InfoConfig, cfg=best, imgsz=[run.train["imgsz"]]))
        return {"parameters": summary.parameters, "gflops": summary.gflops}

    def compare(self, experiment: Experiment, a: Run, b: Run) -> None:
        """The paired bootstrap of two recorded runs of one seed, one row per metric."""
        rows = ledger.read(self.differences)
        if any(
            (r["experiment"], r["a"], r["b"], r["seed"]) == (experiment.name, a.name, b.name, str(a.seed)) for r in rows
        ):
            return
        for run in (a, b):
            if not run.best(self.project).is_file():
                LOGGER.info(f"  {run.name} seed {run.seed}: its weights are gone; made again for the comparison")
                self.make(run)
        weights = [relative(run.best(self.project)) for run in (a, b)]
        folder = self.project / experiment.name / f"{a.name}-{b.name}-s{a.seed}"
        folder.mkdir(parents=True, exist_ok=True)
        args = ["--weights", *weights, "--data", a.val_data, "--labels", a.name, b.name, "--imgsz"]
        args += [str(a.train["imgsz"]), "--project", relative(folder), "--name", "compare", "--exist-ok"]
        args += flags({key: value for key, value in a.val.items() if key in SHARED_OPTIONS})
        if self.config.smoke:
            args += ["--replicates", "20", "--pictures", "1", "--workers", "0", "--device", "cpu"]
        self.execute("compare.py", args, folder)
        found = json.loads((folder / "compare" / "compare.json").read_text(encoding="utf-8"))
        shown = next((name for name in found["pictures"] if "_B_better_" in name), None)
        if experiment.picture and shown and a.seed == min(run.seed for run in experiment.runs):
            self.figures.mkdir(exist_ok=True)
            shutil.copyfile(folder / "compare" / "pairs" / shown, self.figures / experiment.picture_name)
        for metric, interval in found["difference"].items():
            row = {
                "experiment": experiment.name, "a": a.name, "b": b.name, "seed": a.seed, "metric": metric,
                "a_value": _number(found["A"].get(metric)), "b_value": _number(found["B"].get(metric)),
                "difference": _number(interval["difference"]), "low": _number(interval["low"]),
                "high": _number(interval["high"]), "commit": ledger.commit(),
                "finished": time.strftime("%Y-%m-%d %H:%M"),
            }  # fmt: skip
            ledger.append(self.differences, ledger.DIFFERENCE_COLUMNS, row)


def _number(value: Any) -> float:
    return float("nan") if value is None else float(value)


def smoke_version(experiment: Experiment, project: Path) -> Experiment:
    """The same runs, tiny: one seed, one epoch, drawn scenes, no weights from outside."""
    from utils.data.scenes import write_class_folders, write_dataset

    folders = write_class_folders(project / "data" / "classes", train=4, val=2, size=64)
    scenes = write_dataset(project / "data" / "scenes", train=8, val=4, size=64)
    runs = []
    for run in experiment.runs:
        classify = run.model.startswith("resnet")
        data = {"data": relative(folders if classify else scenes), "weights": ""}
        train = {**run.train, **SMOKE_TRAIN, **data, "hyp": [f"nominal_batch={SMOKE_TRAIN['batch-size']}"]}
        val = {key: value for key, value in run.val.items() if key != "data"}
        runs.append(replace(run, train=train, val={**val, **SMOKE_VAL}))
    first = min(run.seed for run in runs)
    return replace(experiment, runs=tuple(run for run in runs if run.seed == first))


def wanted(config: RunConfig, run: Run) -> bool:
    return config.only in run.name and (not config.seeds or run.seed in config.seeds)


def run_all(config: RunConfig) -> list[str]:
    """Carry out what is missing; returns what failed."""
    runner, failures, any_chosen = Runner(config), [], False
    for experiment in all_experiments(config.files):
        if config.smoke:
            experiment = smoke_version(experiment, runner.project)
        chosen = [run for run in experiment.runs if wanted(config, run)]
        done, any_chosen = runner.recorded(), any_chosen or bool(chosen)
        missing = [run for run in chosen if run.key not in done]
        LOGGER.info(f"{experiment.name}: {len(chosen) - len(missing)} of {len(chosen)} runs recorded")
        for run in missing:
            if config.list:
                LOGGER.info(f"  missing: {run.name} (seed {run.seed})")
                continue
            LOGGER.info(f"  {run.name} seed {run.seed}: {command(*run.make(runner.project))}")
            try:
                runner.carry_out(run)
            except UserError as error:
                failures.append(f"{experiment.name} {run.name} seed {run.seed}: {error}")
                LOGGER.warning(f"  failed: {error}")
        if not config.list:
            failures += compare_all(runner, experiment, chosen)
            continue
        for line in experiment.missing_pairs(ledger.read(runner.differences)):
            LOGGER.info(f"  missing: {line}")
    if not any_chosen:
        raise UserError(f"no run has '{config.only}' in its name and one of these seeds; --list shows what there is")
    return failures


def compare_all(runner: Runner, experiment: Experiment, chosen: Sequence[Run]) -> list[str]:
    """Paired differences of those runs whose two sides are recorded; returns what failed."""
    done, failures = runner.recorded(), []
    by_key = {run.key: run for run in chosen if run.key in done}
    for a, b in experiment.pairs():
        for seed in sorted({run.seed for run in chosen}):
            sides = [by_key.get((experiment.name, name, str(seed))) for name in (a, b)]
            if sides[0] is None or sides[1] is None:
                continue
            try:
                runner.compare(experiment, sides[0], sides[1])
            except UserError as error:
                failures.append(f"{experiment.name} {a} against {b}: {error}")
                LOGGER.warning(f"  failed: {error}")
    return failures


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; files may stand without --files. Non-zero when a run failed."""
    args = list(sys.argv[1:] if argv is None else argv)
    if args and not args[0].startswith("-"):
        args.insert(0, "--files")
    failures = run_all(parse_config(RunConfig, args, "experiments.run", __doc__ or ""))
    for line in failures:
        print(f"error: {line}", file=sys.stderr)
    return int(bool(failures))


if __name__ == "__main__":
    run_cli(main)
