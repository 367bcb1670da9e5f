"""Rebuild the tables and figures of the pages from what was recorded; no number is typed by hand.

python -m experiments.report        (what `make results` runs)
"""

import re
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments import bench, figures, ledger
from experiments.bench_tables import TABLES
from experiments.figures import Row, numbers
from experiments.plans import FIGURES, ROOT, Experiment, all_experiments, command
from utils.core.config import option, parse_config, run_cli
from utils.core.errors import UserError
from utils.core.files import atomic_write
from utils.core.log import LOGGER
from utils.core.yamls import load_yaml

LATENCY = "ms/image"
MEASURED_COSTS = {"images_per_second": "training images/s", "memory": "training MB", "ms": LATENCY}
SPEED = ("train_step", "inference", "loader", "loader_memory", "index", "slices")  # benchmarks of the page's last table
PAIR = """The scene in which {b} is furthest ahead of {a}: objects blue, right detections green, wrong ones red, missed
objects yellow. `python -m experiments.run` puts it here from what `compare.py` draws.

![where {b} finds what {a} misses](figures/{picture})"""
HEADLINES = {
    "drawn_scenes": "drawn scenes, 160 px, from scratch",
    "small_objects": "DeepPCB, 256 px, from scratch",
    "small_objects_finetune": "DeepPCB, 256 px, from the official weights",
}
HEADLINE_RUNS = ("yolov5n", "yolov5-spd-n", "yolov5n-matched", "yolov5n-p2")
PAGES = ("docs/results.md", "docs/conversion.md", "README.md")


@dataclass(frozen=True)
class ReportConfig:
    """Options of experiments.report."""

    output: str = option(str(ROOT), f"folder of the pages ({', '.join(PAGES)}) whose blocks are rewritten")
    results: str = option(str(ledger.RESULTS), "CSV of runs")
    differences: str = option(str(ledger.DIFFERENCES), "CSV of paired differences")
    benchmarks: str = option(str(bench.RECORD), "results of the benchmarks, a line of JSON each")


@dataclass(frozen=True)
class Record:
    """Everything that was measured."""

    results: Sequence[Row]
    differences: Sequence[Row]
    benchmarks: Mapping[str, Mapping[str, Any]]

    def costs(self, model: str, imgsz: str) -> Mapping[str, Any]:
        """What the benchmark `costs` found for a network at a size; empty where it was not measured."""
        rows = self.benchmarks.get("costs", {}).get("rows", ())
        return next((r for r in rows if (r["model"], str(r["imgsz"])) == (model, imgsz)), {})


def mean_spread(rows: Sequence[Row], column: str, digits: int = 3) -> str:
    """`0.306 ± 0.004` over seeds; one value alone without spread; a dash for none."""
    values = numbers(rows, column)
    if not values:
        return "–"
    middle = f"{statistics.fmean(values):.{digits}f}"
    return f"{middle} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else middle


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table."""
    body = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in body)


def runs_of(experiment: Experiment, results: Sequence[Row]) -> dict[str, list[Row]]:
    """The recorded rows by run, in the file's order; an empty list where nothing was run."""
    rows = [row for row in results if row["experiment"] == experiment.name]
    return {run.name: [row for row in rows if row["run"] == run.name] for run in experiment.runs}


def cost_columns(
    experiment: Experiment, runs: Mapping[str, Sequence[Row]], record: Record
) -> dict[str, dict[str, float]]:
    """What the runs that were carried out cost: {column: {run: value}}; columns without a value are left out."""
    networks = {run.name: Path(run.train["cfg"]).stem for run in experiment.runs}
    columns: dict[str, dict[str, float]] = {}
    for name, rows in runs.items():
        if not rows:
            continue
        measured = record.costs(networks[name], rows[0]["imgsz"])
        known = {"GFLOPs": numbers(rows, "gflops")[0]}
        known |= {title: measured[key] for key, title in MEASURED_COSTS.items() if key in measured}
        for title, value in known.items():
            columns.setdefault(title, {})[name] = value
    return columns


def results_table(runs: Mapping[str, Sequence[Row]], costs: Mapping[str, Mapping[str, float]]) -> str:
    """A row per run: accuracy as mean and spread over the seeds, and what it costs."""
    every = [row for rows in runs.values() for row in rows]
    metrics = [m for m in ledger.METRICS if m in ("AP", "AP50", "AP_S", "top1", "f1") and numbers(every, m)]
    metrics = metrics or ["AP", "AP50", "AP_S"]
    head = ["run", "seeds", *("F1" if metric == "f1" else metric for metric in metrics), "parameters", *costs]
    lines = []
    for name, rows in runs.items():
        if not rows:
            lines.append([name, "not run", *["–"] * (len(head) - 2)])
            continue
        cells = [mean_spread(rows, metric) for metric in metrics]
        cells.append(f"{numbers(rows, 'parameters')[0]:,.0f}")
        for title, values in costs.items():
            cells.append(f"{values[name]:.{2 if title == 'GFLOPs' else 1}f}" if name in values else "–")
        lines.append([name, str(len(rows)), *cells])
    return markdown(head, lines)


def difference_table(experiment: Experiment, rows: Sequence[Row]) -> str:
    """B minus A: the mean over seeds, and each seed's interval, in the order of the seeds."""
    rows = sorted(rows, key=lambda row: int(row["seed"]))
    lines = []
    for a, b in experiment.pairs():
        for metric in ("AP", "AP50", "AP_S"):
            own = [row for row in rows if (row["a"], row["b"], row["metric"]) == (a, b, metric)]
            if own:
                spans = "; ".join(f"{float(r['low']):+.3f} to {float(r['high']):+.3f}" for r in own if r["low"])
                middle = f"{statistics.fmean(numbers(own, 'difference')):+.3f}"
                lines.append([f"{b} − {a}", metric, ", ".join(row["seed"] for row in own), middle, spans])
    if not lines:
        return "" if not experiment.compare else "Paired differences: not run."
    return markdown(["difference", "metric", "seeds", "mean", "95 % interval of each seed (paired bootstrap)"], lines)


def provenance(rows: Sequence[Row]) -> str:
    """Hardware, software, commits and the command of each run."""
    if not rows:
        return ""
    machines = sorted({f"{row['hardware']}; {row['software']}" for row in rows})
    commits = sorted({row["commit"] for row in rows})
    lines = [f"# {row['run']}, seed {row['seed']}\n{row['command']}" for row in rows]
    commands = "\n".join(lines)
    facts = f"Measured on {' and '.join(machines)}; commit {', '.join(commits)}."
    return f"{facts}\n\n<details><summary>Commands</summary>\n\n```\n{commands}\n```\n</details>"


def experiment_block(experiment: Experiment, record: Record, folder: Path) -> str:
    """Everything about one experiment; its figures are written to `folder`."""
    runs = runs_of(experiment, record.results)
    costs = cost_columns(experiment, runs, record)
    own = [row for row in record.differences if row["experiment"] == experiment.name]
    parts = [f"**{experiment.question}**", results_table(runs, costs), difference_table(experiment, own)]
    drawn = {name: rows for name, rows in runs.items() if rows}
    if drawn:
        plotted = {title: values for title, values in costs.items() if title in ("GFLOPs", LATENCY)}
        pictures = [
            figures.bars(drawn, folder / f"{experiment.name}_bars.png"),
            figures.accuracy_against(plotted, drawn, folder / f"{experiment.name}_costs.png"),
        ]
        parts += [f"![{experiment.name}: {path.stem}](figures/{path.name})" for path in pictures]
    if experiment.picture and (FIGURES / experiment.picture_name).is_file():
        a, b = experiment.compare[0]
        parts += [PAIR.format(a=a, b=b, picture=experiment.picture_name)]
    return "\n\n".join(part for part in (*parts, provenance([r for rows in runs.values() for r in rows])) if part)


def coco_table(results: Sequence[Row]) -> str:
    """The paper's Table 4 beside this project's own COCO-2017 runs, which are empty until somebody has run them."""
    lines = []
    for name, published in load_yaml(ROOT / "experiments" / "published.yaml")["coco_val2017"].items():
        own = [row for row in results if row["experiment"] == "coco2017" and row["run"] == name]
        percent = [{m: str(100 * float(row[m])) for m in ("AP", "AP_S")} for row in own]
        mine = [mean_spread(percent, m, 1) if own else "not yet run" for m in ("AP", "AP_S")]
        lines.append([name, f"{published['AP']}", f"{published['AP_S']}", f"{published['ms']}", *mine])
    return markdown(["model", "AP (paper)", "AP_S (paper)", "ms (paper)", "AP (here)", "AP_S (here)"], lines)


def benchmark_block(record: Record, *names: str) -> str:
    """What these benchmarks found, as recorded."""
    parts = []
    for name in names:
        found = record.benchmarks.get(name)
        if found is None:
            parts.append(f"Not run: `python -m experiments.bench {name}`.")
            continue
        origin = f"`{found['command']}`, commit {found['commit']}, {found['hardware']}, {found['software']}"
        parts.append(f"{origin}\n\n{markdown(*TABLES[name](found))}")
    return "\n\n".join(parts)


def missing_block(experiments: Sequence[Experiment], record: Record) -> str:
    """What is planned and not recorded, with the command that runs it."""
    done = {(row["experiment"], row["run"], row["seed"]) for row in record.results}
    lines = []
    for experiment in experiments:
        missing = [f"{run.name} (seed {run.seed})" for run in experiment.runs if run.key not in done]
        missing += experiment.missing_pairs(record.differences)
        if missing:
            names = ", ".join(missing)
            call = command("-m experiments.run", [f"experiments/{experiment.name}.yaml"])
            lines.append(f"- {experiment.name}: {names}. `{call}`")
    return "\n".join(lines) or "Everything that is planned has been run."


def model_table() -> str:
    """The README's table: costs measured now, accuracy as published."""
    import info
    from utils.core.config import config_from_kwargs

    published = load_yaml(ROOT / "experiments" / "published.yaml")["coco_val2017"]
    lines = []
    for name in [f"{family}{size}" for size in "nsmlx" for family in ("yolov5", "yolov5-spd-", "yolov5-spdconv-")]:
        path = ROOT / "models" / f"{name}.yaml"
        if path.is_file():
            summary = info.measure(config_from_kwargs(info.InfoConfig, cfg=str(path), imgsz=[640]))
            known = published.get(name, {})
            costs = [f"{summary.parameters:,}", f"{summary.gflops:.1f}", f"{summary.saved / 1e6:.0f}"]
            lines.append([name, *costs, str(known.get("AP", "–")), str(known.get("AP_S", "–"))])
    head = ["model", "parameters", "GFLOPs", "MB kept in training, 1 image", "AP (published)", "AP_S (published)"]
    return markdown(head, lines)


def headline_table(experiments: Sequence[Experiment], record: Record) -> str:
    """The README's summary: AP of the networks that are compared, an experiment a row."""
    lines = []
    for experiment in experiments:
        if experiment.name in HEADLINES:
            runs = runs_of(experiment, record.results)
            cells = [mean_spread(runs.get(name, []), "AP") for name in HEADLINE_RUNS]
            lines.append([HEADLINES[experiment.name], *cells])
    return markdown(["AP, mean ± deviation over seeds", *HEADLINE_RUNS], lines)


def fill(page: str, blocks: Mapping[str, Callable[[], str]]) -> str:
    """The page with each block between its markers replaced; a marker without a block, or the reverse, is an error."""
    found = re.findall(r"<!-- begin (\S+) -->", page)
    if set(found) != set(blocks) or len(found) != len(set(found)):
        raise UserError(f"the page has the blocks {', '.join(found)}; expected {', '.join(blocks)}, each once")
    for name, make in blocks.items():
        pattern = rf"(<!-- begin {re.escape(name)} -->\n).*?(<!-- end {re.escape(name)} -->)"
        text = make()
        page, count = re.subn(pattern, lambda m, text=text: f"{m[1]}\n{text}\n\n{m[2]}", page, flags=re.DOTALL)
        if count != 1:
            raise UserError(f"block {name} of the page has no `<!-- end {name} -->`")
    return page


def report(config: ReportConfig) -> list[Path]:
    """Rewrite the blocks of all pages; returns the pages."""
    root = Path(config.output)
    record = Record(
        ledger.read(Path(config.results)), ledger.read(Path(config.differences)), bench.read(Path(config.benchmarks))
    )
    folder = root / "docs" / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    experiments = all_experiments()
    results: dict[str, Callable[[], str]] = {
        e.name: lambda e=e: experiment_block(e, record, folder) for e in experiments
    }
    results["coco2017"] = lambda: coco_table(record.results)
    results["coco_cost"] = lambda: benchmark_block(record, "coco_cost")
    results["costs"] = lambda: benchmark_block(record, "costs")
    results["speed"] = lambda: benchmark_block(record, *SPEED)
    results["missing"] = lambda: missing_block(experiments, record)
    blocks: list[Mapping[str, Callable[[], str]]] = [
        results,
        {"architectures": lambda: benchmark_block(record, "architectures")},
        {"models": model_table, "headline": lambda: headline_table(experiments, record)},
    ]
    pages = [root / page for page in PAGES]
    for path, own in zip(pages, blocks, strict=True):
        text = fill(path.read_text(encoding="utf-8"), own)
        with atomic_write(path, "w") as file:
            file.write(text)
    LOGGER.info(f"{len(record.results)} runs: {', '.join(map(str, pages))}")
    return pages


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    report(
        parse_config(ReportConfig, list(sys.argv[1:] if argv is None else argv), "experiments.report", __doc__ or "")
    )
    return 0


if __name__ == "__main__":
    run_cli(main)
