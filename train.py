"""Train a detector or a classifier.

python train.py --data data/demo.yaml --cfg models/yolov5-spd-n.yaml --imgsz 640 --batch-size 16
torchrun --nproc-per-node 4 train.py --data data/coco.yaml --cfg models/yolov5-spd-s.yaml --batch-size 128 --sync-bn
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from models import Network, build_model
from models.conversion import initialise
from models.weights import LoadedModel, lineage, load_model, unpack_model
from utils.core.checkpoint import load_checkpoint
from utils.core.config import config_dict, config_from_kwargs, given_options, parse_config, run_cli
from utils.core.device import check_gpus, describe, parse_device
from utils.core.dist import Dist, launched, relaunch
from utils.core.errors import UserError
from utils.core.files import project_file
from utils.core.hyp import Hyp, load_hyp
from utils.core.log import LOGGER, quiet
from utils.core.yamls import dump_yaml
from utils.data.download import fetch
from utils.data.spec import DataSpec, load_data
from utils.engine.figures.plots import plot_results
from utils.engine.tasks import Evaluation, Task
from utils.engine.tasks.classify import ClassifyTask
from utils.engine.tasks.detect import DetectTask
from utils.engine.training.autobatch import measure_batch_size
from utils.engine.training.runs import find_resume, open_run, resumed_config
from utils.engine.training.settings import RETIRED, TrainConfig, precision
from utils.engine.training.sinks import Sinks, open_sinks
from utils.engine.training.trainer import EXIT_INTERRUPTED, Interrupted, Trainer, set_determinism

PRESET_HYP = {"v6.0": "hyp.scratch.yaml", "v7.0": "hyp.scratch-low.yaml"}
TASKS = {"detect": DetectTask, "classify": ClassifyTask}


@dataclass(frozen=True)
class TrainResult:
    """What a finished run leaves: its folder and the evaluation of best.pt."""

    folder: Path
    best: Path
    metrics: dict[str, float]
    fitness: float


def read_hyp(config: TrainConfig) -> Hyp:
    """The hyper-parameters of a new run: --hyp, else the preset's file; names of data/hyps are found from anywhere."""
    name = config.hyp_file or PRESET_HYP[config.preset]
    return load_hyp(project_file(name, "--hyp file", "data/hyps", "hyp.*.yaml"), config.hyp_overrides)


def make_model(config: TrainConfig, spec: DataSpec, hyp: Hyp) -> tuple[Network, dict[str, Any]]:
    """A network for the data's classes, from --cfg and/or --weights, and the lineage of those weights."""
    loaded: LoadedModel | None = load_model(config.weights) if config.weights else None
    nc = 1 if config.single_cls else spec.nc
    source: Any = config.cfg or (loaded.model.cfg if loaded else None)
    anchors = round(hyp.anchors) if hyp.anchors else None
    model = build_model(source, nc=nc, anchors=anchors)
    if loaded is not None:
        if model.task != loaded.model.task:
            raise UserError(
                f"--cfg {config.cfg} is for task {model.task}, --weights {config.weights} for {loaded.model.task}; "
                "give a --cfg and --weights of one task"
            )
        for line in initialise(model, loaded):
            LOGGER.info(line)
    return model, lineage(loaded.meta) if loaded else {}


def freeze(model: Network, given: Sequence[int]) -> None:
    """Take layers out of training. --freeze N: the first N layers; --freeze A B C: these layers."""
    for layer in range(given[0]) if len(given) == 1 else given:
        if layer >= len(model.model):
            told = " ".join(map(str, given))
            raise UserError(f"--freeze {told}: the model has the layers 0 to {len(model.model) - 1}, its head last")
        model.model[layer].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(
            f"--freeze leaves nothing to train: the model has the layers 0 to {len(model.model) - 1}, its head last; "
            "freeze fewer"
        )


def train(config: TrainConfig, dist: Dist, given: set[str]) -> TrainResult:
    """One run from start, or from a checkpoint, to the evaluation of its best weights."""
    checkpoint, path = None, find_resume(config, dist)
    if path is not None:
        checkpoint = load_checkpoint(path)
        config = resumed_config(config, checkpoint, path, given)
    set_determinism(config.deterministic, dist.device, config.seed)
    spec = load_data(config.data)
    if config.download:
        dist.main_first(lambda: fetch(spec))
        spec = load_data(config.data)  # class names may stand in what was fetched
    spec.require("train")
    if checkpoint is not None and path is not None:
        hyp, folder = Hyp(**checkpoint["train"]["hyp"]), path.resolve().parent.parent
        loaded = unpack_model(checkpoint, path)
        model, origin = loaded.model, lineage(loaded.meta)
    else:
        hyp, folder = read_hyp(config), None
        model, origin = make_model(config, spec, hyp)
        if config.batch_size == -1:
            fits = measure_batch_size(model, config.imgsz, dist.device, precision(config.amp, dist.device))
            config = replace(config, batch_size=dist.broadcast(fits) * dist.world_size)
    freeze(model, config.freeze)
    task: Task = TASKS[model.task](model, spec, config, hyp, dist)  # type: ignore[index]
    try:
        folder = folder or open_run(config, dist)
        trainer = Trainer(task, config, hyp, dist, folder, origin)
        if checkpoint is not None:
            trainer.restore(checkpoint)
            LOGGER.info(f"resuming {path} at epoch {trainer.progress.epoch}, step {trainer.progress.step}")
        fit(trainer, dist)
        return finish(task, dist, folder, config)
    finally:
        task.close()


def fit(trainer: Trainer, dist: Dist) -> None:
    """The training loop between opening and closing the loggers."""
    sinks = start(trainer, describe(dist.device)) if dist.is_main else Sinks([])
    try:
        trainer.fit(sinks)
    finally:
        sinks.close()


def start(trainer: Trainer, machine: str) -> Sinks:
    """Write what the run is, print what follows from it, open the loggers."""
    config, folder, schedule = trainer.config, trainer.folder, trainer.schedule
    dump_yaml(folder / "opt.yaml", config_dict(config))
    dump_yaml(folder / "hyp.yaml", config_dict(trainer.hyp))
    if not config.noplots and trainer.progress.epoch == trainer.progress.step == 0:
        trainer.task.start_pictures(folder)
    LOGGER.info(
        f"{machine}; {trainer.dist.world_size} process(es), batch {config.batch_size}, "
        f"{schedule.steps_per_epoch} steps an epoch, {schedule.accumulate} batches an optimizer step, warm-up "
        f"{schedule.warmup_steps} steps, weight decay {schedule.weight_decay:g}, seed {config.seed}, "
        f"{config.amp} precision"
    )
    LOGGER.info(f"run folder: {folder}")
    columns = [f"train/{name}_loss" for name in trainer.task.loss_names]
    columns += [*trainer.task.metric_names, "x/lr0", "x/lr1", "x/lr2"]
    return open_sinks(folder, columns, trainer.progress.epoch, config.loggers, config_dict(config))


def finish(task: Task, dist: Dist, folder: Path, config: TrainConfig) -> TrainResult:
    """Evaluate best.pt as it is stored, on all ranks, and draw the curves."""
    dist.barrier()
    best = folder / "weights" / "best.pt"
    model = load_model(best, device=dist.device).model
    result: Evaluation = task.evaluate(model, dist, folder=folder)
    if dist.is_main:
        if not config.noplots:
            plot_results(folder / "results.csv")
        LOGGER.info(f"\n{best} (as stored):\n{result.table}\nresults saved to {folder}")
    return TrainResult(folder, best, dict(result.metrics), result.fitness)


def run(**options: Any) -> TrainResult:
    """Train from Python: the keywords are the flags, `run(data="data/demo.yaml", cfg="yolov5-spd-n", epochs=3)`."""
    return launch(config_from_kwargs(TrainConfig, **options), given_options(TrainConfig, options))


def launch(config: TrainConfig, given: set[str]) -> TrainResult:
    """Join the process group, train, leave it."""
    dist = Dist.start(config.device, config.timeout)
    quiet(dist.is_main)
    try:
        return train(config, dist, given)
    finally:
        dist.stop()


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    argv = list(sys.argv[1:] if argv is None else argv)
    config = parse_config(TrainConfig, argv, "train.py", __doc__ or "", RETIRED)
    gpus = parse_device(config.device)
    if isinstance(gpus, list) and len(gpus) > 1 and not launched():
        check_gpus(config.device, gpus)
        relaunch(len(gpus), argv)
    try:
        launch(config, given_options(TrainConfig, argv))
    except Interrupted:
        LOGGER.info("interrupted; a checkpoint was written, continue with --resume")
        return EXIT_INTERRUPTED
    return 0


if __name__ == "__main__":
    run_cli(main)
