"""Search hyper-parameters: many short training runs, a random grid or TPE, pruned by their early epochs.

python tune.py --data data/demo.yaml --cfg models/yolov5-spd-n.yaml --imgsz 160 --epochs 20 --trials 30
python tune.py --name exp --trials 60        (continues the same study; start it several times to share the work)
"""

import csv
import math
import sys
import warnings
from collections.abc import Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.core.config import config_dict, config_from_kwargs, find_option, given_options, option, parse_config, run_cli
from utils.core.errors import UserError
from utils.core.files import atomic_write, nearest, project_file
from utils.core.interrupts import StopRequest
from utils.core.log import LOGGER
from utils.core.yamls import dump_yaml, load_yaml
from utils.data.spec import load_data
from utils.engine.tasks.classify import METRICS as CLASSIFIER
from utils.engine.tasks.detect import METRICS as DETECTOR
from utils.engine.training.search import Range, TrainingRun, load_space, plot_parallel
from utils.engine.training.settings import TrainConfig

HERE = Path(__file__).resolve().parent
SAMPLERS = ("tpe", "random-grid")
LARGEST_GRID = 4096  # above this, grid points are drawn at random instead of being listed and dealt out
METRICS = ("fitness", *(n.removeprefix("metrics/") for n in (*DETECTOR, *CLASSIFIER) if n.startswith("metrics/")))
SWITCH = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}  # values of a switch
PER_PROCESS = ("trials", "device", "workers", "project", "name")  # what a process that joins a study may set


@dataclass(frozen=True)
class TuneConfig:
    """Options of tune.py; those of a study are kept in its folder and hold for every process that joins it."""

    data: str = option("data/demo.yaml", "data YAML")
    cfg: str = option("", "model YAML")
    weights: str = option("", "checkpoint to start every trial from")
    hyp: list[str] = option([], "hyper-parameters that are not searched: a YAML and/or key=value", nargs="+")
    space: str = option("data/hyps/space.yaml", "YAML of what is searched: ranges or lists of values")
    sampler: str = option("tpe", "how trials are chosen", choices=SAMPLERS)
    trials: int = option(30, "finished trials that the study shall have, over all processes")
    prune: bool = option(True, "end a trial whose epoch is below the median of the earlier ones")
    prune_after: int = option(3, "epochs that every trial gets")
    metric: str = option("fitness", "what is maximized: fitness or a column of results.csv (AP_S, mAP_0.5, ...)")
    epochs: int = option(30, "epochs of a trial")
    imgsz: int = option(640, "image size in pixels", aliases=("img", "img_size"))
    batch_size: int = option(16, "images per step", aliases=("batch",))
    device: str = option("", "cpu, mps, or GPU numbers")
    workers: int = option(8, "loader processes")
    seed: int = option(0, "seed of the search and of every trial")
    train_args: list[str] = option([], "further options of train.py as key=value, e.g. optimizer=AdamW", nargs="+")
    project: str = option("runs/tune", "folder of studies")
    name: str = option("exp", "name of the study; an existing one is continued")

    def __post_init__(self) -> None:
        if self.trials < 1 or self.epochs < 1 or self.prune_after < 1:
            raise UserError("--trials, --epochs and --prune-after must be 1 or more")
        if self.metric not in METRICS:
            raise UserError(f"--metric {self.metric}; expected {', '.join(METRICS)}{nearest(self.metric, METRICS)}")
        for pair in self.train_args:
            train_flags(pair)


def train_flags(pair: str) -> list[str]:
    """key=value as arguments of train.py; a switch is its flag or nothing."""
    key, equals, value = pair.partition("=")
    if not equals:
        raise UserError(f"--train-args {pair}; expected key=value, e.g. optimizer=AdamW")
    flag = f"--{find_option(TrainConfig, key).name.replace('_', '-')}"
    if find_option(TrainConfig, key).default is not False:  # every switch of train.py is off by default
        return [flag, value]
    if value.lower() not in SWITCH:
        raise UserError(f"--train-args {pair}; {flag} is a switch, expected {key}=true or {key}=false")
    return [flag] if SWITCH[value.lower()] else []


@dataclass(frozen=True)
class TuneReport:
    """The study's folder, its best hyper-parameter file, that trial's metric and the number of finished trials."""

    folder: Path
    best_hyp: Path
    value: float
    trials: int


class TrialFailed(RuntimeError):
    """A training run ended with an error."""


def open_study(config: TuneConfig, folder: Path, space: dict[str, Range]) -> Any:
    """The Optuna study in `folder`/study.db. A process that died is noticed by its heartbeat and its trial redone."""
    try:
        import optuna
    except ImportError:
        raise UserError("tune.py needs the package optuna, which is not installed; pip install optuna") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        storage = optuna.storages.RDBStorage(
            f"sqlite:///{folder / 'study.db'}",
            engine_kwargs={"connect_args": {"timeout": 60}},
            heartbeat_interval=15,
            grace_period=60,
            heartbeat_stale_trial_callback=optuna.storages.RetryHeartbeatStaleTrialCallback(max_retry=2),
        )
    known = {name for name in optuna.get_all_study_names(storage)}
    seed = config.seed if "tune" not in known else None  # a process that joins must not repeat the first one's draws
    sampler: Any = optuna.samplers.TPESampler(seed=seed, n_startup_trials=8)
    if config.sampler == "random-grid":
        grids = {name: part.grid() for name, part in space.items()}
        small = math.prod(len(grid) for grid in grids.values()) <= LARGEST_GRID
        sampler = optuna.samplers.GridSampler(grids, seed) if small else optuna.samplers.RandomSampler(seed)
    pruner: Any = optuna.pruners.NopPruner()
    if config.prune:
        pruner = optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=config.prune_after - 1)
    return optuna.create_study(
        storage=storage, study_name="tune", direction="maximize", sampler=sampler, pruner=pruner, load_if_exists=True
    )


def suggest(trial: Any, space: dict[str, Range], sampler: str) -> dict[str, float]:
    """The hyper-parameters of a trial."""
    values = {}
    for name, part in space.items():
        if sampler == "random-grid" or part.values:
            values[name] = trial.suggest_categorical(name, part.grid())
        else:
            values[name] = trial.suggest_float(name, part.low, part.high, log=part.log)
    return values


def train_command(config: TuneConfig, folder: Path, values: dict[str, float]) -> list[str]:
    """The command line of one trial."""
    options: dict[str, Any] = {
        "data": config.data,
        "cfg": config.cfg,
        "weights": config.weights,
        "epochs": config.epochs,
        "imgsz": config.imgsz,
        "batch-size": config.batch_size,
        "device": config.device,
        "workers": config.workers,
        "seed": config.seed,
        "project": folder.parent,
        "name": folder.name,
    }
    command = [sys.executable, str(HERE / "train.py"), "--exist-ok", "--noplots"]
    for key, value in options.items():
        command += [f"--{key}", str(value)] if str(value) else []
    for pair in config.train_args:
        command += train_flags(pair)
    return [*command, "--hyp", *config.hyp, *(f"{name}={value:.6g}" for name, value in values.items())]


def run_trial(config: TuneConfig, folder: Path, space: dict[str, Range], trial: Any, stop: StopRequest) -> float:
    """Train once and report every epoch; the result is the best epoch's metric."""
    import optuna

    stop.check()
    values = suggest(trial, space, config.sampler)
    run = TrainingRun(train_command(config, folder / f"trial{trial.number}", values), folder / f"trial{trial.number}",
                      config.metric)  # fmt: skip
    best = -math.inf
    try:
        for epoch, value in run.epochs(stop):
            best = max(best, value)
            trial.report(value, epoch)
            if epoch + 1 < config.epochs and trial.should_prune():
                LOGGER.info(f"trial {trial.number}: pruned after epoch {epoch} at {config.metric} {value:.4f}")
                raise optuna.TrialPruned
    finally:
        run.stop()
    if run.problem() or best == -math.inf:
        raise TrialFailed(run.problem() or "no epoch was finished")
    shown = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
    LOGGER.info(f"trial {trial.number}: {config.metric} {best:.4f} with {shown}")
    return best


def join(config: TuneConfig, given: Set[str]) -> tuple[TuneConfig, Path]:
    """The study's folder and its settings: written by the first process, read by those that join or continue.

    An option that is `given` and differs from the study's is refused.
    """
    folder = Path(config.project) / config.name
    folder.mkdir(parents=True, exist_ok=True)
    settings = folder / "study.yaml"
    if settings.is_file():
        stored, asked = load_yaml(settings), config_dict(config)
        fixed = [name for name in asked if name in given and name not in PER_PROCESS]
        other = [name for name in fixed if asked[name] != stored.get(name)]
        if other:
            told = ", ".join(f"--{name.replace('_', '-')} {asked[name]} (there {stored.get(name)})" for name in other)
            raise UserError(
                f"{told} differs from the study in {settings}; leave it out to continue that study, or start another "
                "one with --name"
            )
        return config_from_kwargs(TuneConfig, **{**stored, **{name: asked[name] for name in PER_PROCESS}}), folder
    if not (config.cfg or config.weights):
        raise UserError("nothing to train: give --cfg models/yolov5-spd-n.yaml, or --weights, or both")
    load_space(project_file(config.space, "--space file", "data/hyps", "space*.yaml"))
    load_data(config.data)  # a study is not begun with what no trial could read
    dump_yaml(settings, config_dict(config))
    return config, folder


def tune(config: TuneConfig, given: Set[str]) -> TuneReport:
    """Run trials until the study has as many as asked for, then write what was found; `given`: see `join`."""
    config, folder = join(config, given)
    space = load_space(project_file(config.space, "--space file", "data/hyps", "space*.yaml"))
    study = open_study(config, folder, space)
    import optuna

    finished = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED)
    failures: list[str] = []
    stop = StopRequest()  # an exception between two trials would leave Optuna's heartbeat running for ever

    def objective(trial: Any) -> float:
        try:
            value = run_trial(config, folder, space, trial, stop)
        except TrialFailed as error:
            failures.append(str(error))
            LOGGER.warning(f"trial {trial.number} failed: {error}")
            if len(failures) == 3:
                told = f"three trials in a row failed, the last with '{error}'; see {folder}/trial*/train.log"
                raise UserError(told) from error
            raise
        failures.clear()
        return value

    def keep(study: Any, _: Any) -> None:
        write_trials(config, folder, study.get_trials(states=finished), list(space))

    LOGGER.info(f"study {folder}: {len(study.get_trials(states=finished))} of {config.trials} trials finished")
    if len(study.get_trials(states=finished)) < config.trials:
        enough = optuna.study.MaxTrialsCallback(config.trials, states=finished)
        with stop:
            study.optimize(objective, callbacks=[enough, keep], catch=(TrialFailed,))
    return write_results(config, folder, study.get_trials(states=finished), list(space))


def write_results(config: TuneConfig, folder: Path, trials: Sequence[Any], names: Sequence[str]) -> TuneReport:
    """trials.csv, best_hyp.yaml and parallel_coordinates.png, and what they say in a line."""
    best = write_trials(config, folder, trials, names)
    if best is None:
        raise UserError(f"{folder}: no trial ran to its end; see trial*/train.log there")
    picture, path = folder / "parallel_coordinates.png", folder / "best_hyp.yaml"
    plot_parallel([(t.params, best_epoch(t)) for t in trials], names, config.metric, picture)
    value = best_epoch(best)
    LOGGER.info(f"best of {len(trials)}: trial {best.number}, {config.metric} {value:.4f}\nhyper-parameters: {path}")
    LOGGER.info(f"picture: {picture}")
    return TuneReport(folder, path, value, len(trials))


def write_trials(config: TuneConfig, folder: Path, trials: Sequence[Any], names: Sequence[str]) -> Any:
    """trials.csv and best_hyp.yaml of the trials so far; the best that ran to its end, or None."""
    with atomic_write(folder / "trials.csv", "w") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["trial", "state", "epochs", config.metric, *names])
        for t in trials:
            facts = [t.number, t.state.name.lower(), len(t.intermediate_values), f"{best_epoch(t):.6g}"]
            table.writerow([*facts, *(t.params[name] for name in names)])
    best = max((t for t in trials if t.state.name == "COMPLETE"), key=best_epoch, default=None)
    if best is not None:
        dump_yaml(folder / "best_hyp.yaml", load_yaml(folder / f"trial{best.number}" / "hyp.yaml"))
    return best


def best_epoch(trial: Any) -> float:
    """The metric of a trial's best epoch."""
    return max(trial.intermediate_values.values(), default=-math.inf)


def run(**kwargs: Any) -> TuneReport:
    """Search from Python: the keywords are the flags, `tune.run(cfg="models/yolov5-spd-n.yaml", trials=10)`."""
    return tune(config_from_kwargs(TuneConfig, **kwargs), given_options(TuneConfig, kwargs))


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    argv = list(sys.argv[1:] if argv is None else argv)
    tune(parse_config(TuneConfig, argv, "tune.py", __doc__ or ""), given_options(TuneConfig, argv))
    return 0


if __name__ == "__main__":
    run_cli(main)
