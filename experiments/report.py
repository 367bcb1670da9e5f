"""Rebuild the tables and figures of docs/results.md, and the README's models; no number is typed by hand.

python -m experiments.report        (what `make results` runs)
"""

import math
import re
import statistics
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments import bench, ledger
from experiments.plans import ROOT, Experiment, all_experiments, command
from utils.core.config import option, parse_config, run_cli
from utils.core.errors import UserError
from utils.core.files import atomic_write
from utils.core.log import LOGGER
from utils.core.yamls import load_yaml

Row = Mapping[str, str]


@dataclass(frozen=True)
class ReportConfig:
    """Options of experiments.report."""

    page: str = option("docs/results.md", "page whose blocks between `begin NAME` and `end NAME` are rewritten")
    readme: str = option("README.md", "page with the table of models; empty: leave it")
    results: str = option(str(ledger.RESULTS), "CSV of runs")
    differences: str = option(str(ledger.DIFFERENCES), "CSV of paired differences")


def numbers(rows: Sequence[Row], column: str) -> list[float]:
    """The values of a column that are there."""
    return [float(row[column]) for row in rows if row.get(column)]


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


def run_names(experiment: Experiment) -> list[str]:
    """Names of the runs, each once, in the file's order."""
    return list(dict.fromkeys(run.name for run in experiment.runs))


def results_table(experiment: Experiment, rows: Sequence[Row]) -> str:
    """A row per run: accuracy as mean and spread over the seeds, and what it costs."""
    metrics = [m for m in ledger.METRICS if m in ("AP", "AP50", "AP_S", "top1", "f1") and numbers(rows, m)]
    metrics = metrics or ["AP", "AP50", "AP_S"]
    titles = ["F1" if metric == "f1" else metric for metric in metrics]
    head = ["run", "seeds", *titles, "parameters", "GFLOPs", "training, min", "ms/image"]
    lines = []
    for name in run_names(experiment):
        own = [row for row in rows if row["run"] == name]
        if not own:
            lines.append([name, "not run", *["–"] * (len(head) - 2)])
            continue
        cells = [mean_spread(own, metric) for metric in metrics]
        parameters = f"{numbers(own, 'parameters')[0]:,.0f}"
        costs = [
            f"{numbers(own, 'gflops')[0]:.2f}",
            mean_spread(own, "train_minutes", 1),
            mean_spread(own, "ms_per_image", 1),
        ]
        lines.append([name, str(len(own)), *cells, parameters, *costs])
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
                lines.append([f"{b} − {a}", metric, f"{statistics.fmean(numbers(own, 'difference')):+.3f}", spans])
    if not lines:
        return "" if not experiment.compare else "Paired differences: not run."
    return markdown(["difference", "metric", "mean over seeds", "95 % interval of each seed (paired bootstrap)"], lines)


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


def experiment_block(experiment: Experiment, results: Sequence[Row], differences: Sequence[Row], figures: Path) -> str:
    """Everything about one experiment."""
    rows = [row for row in results if row["experiment"] == experiment.name]
    own = [row for row in differences if row["experiment"] == experiment.name]
    parts = [f"**{experiment.question}**", results_table(experiment, rows), difference_table(experiment, own)]
    if rows:
        for draw in (draw_bars, draw_costs):
            picture = draw(experiment, rows, figures)
            if picture is not None:
                parts.append(f"![{experiment.name}: {picture.stem}](figures/{picture.name})")
    return "\n\n".join(part for part in (*parts, provenance(rows)) if part)


def _axes(width: float, count: int = 1) -> tuple:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, 3.4), layout="constrained")
    return figure, figure.subplots(1, count, squeeze=False)[0]


def _main_metric(rows: Sequence[Row]) -> str:
    return next((m for m in ("AP_S", "AP", "top1") if numbers(rows, m)), "AP")


def draw_bars(experiment: Experiment, rows: Sequence[Row], folder: Path) -> Path | None:
    """Bars of AP_S (or top-1), with a dot per seed: the paper's Fig. 1."""
    metric = _main_metric(rows)
    names = [name for name in run_names(experiment) if numbers([r for r in rows if r["run"] == name], metric)]
    if not names:
        return None
    figure, (plot,) = _axes(max(4.0, 1.1 * len(names) + 1))
    for x, name in enumerate(names):
        values = numbers([row for row in rows if row["run"] == name], metric)
        plot.bar(x, statistics.fmean(values), color="tab:green" if "spd" in name else "tab:gray", width=0.65)
        plot.scatter([x] * len(values), values, color="black", s=10, zorder=3)
    plot.set_xticks(range(len(names)), [n.replace("yolov5", "v5") for n in names], rotation=20, ha="right", fontsize=8)
    plot.set_ylabel(metric)
    path = folder / f"{experiment.name}_bars.png"
    figure.savefig(path, dpi=120)
    return path


def draw_costs(experiment: Experiment, rows: Sequence[Row], folder: Path) -> Path | None:
    """Accuracy against GFLOPs and against latency, the control among the points."""
    metric = _main_metric(rows)
    costs = [(column, label) for column, label in (("gflops", "GFLOPs"), ("ms_per_image", "ms per image, batch 1"))
             if numbers(rows, column)]  # fmt: skip
    if not costs:
        return None
    figure, plots = _axes(4.2 * len(costs), len(costs))
    for plot, (column, label) in zip(plots, costs, strict=True):
        for name in run_names(experiment):
            own = [row for row in rows if row["run"] == name and row.get(metric) and row.get(column)]
            if own:
                place = statistics.fmean(numbers(own, column)), statistics.fmean(numbers(own, metric))
                plot.scatter(*place, color="tab:green" if "spd" in name else "tab:gray", s=36)
                plot.annotate(name.replace("yolov5", "v5"), place, (4, 4), textcoords="offset points", fontsize=7)
        plot.set(xlabel=label, ylabel=metric)
        plot.margins(0.2)
        plot.grid(alpha=0.3)
    path = folder / f"{experiment.name}_costs.png"
    figure.savefig(path, dpi=120)
    return path


def coco_table(results: Sequence[Row]) -> str:
    """The paper's Table 4 beside this project's own COCO-2017 runs, which are empty until somebody has run them."""
    lines = []
    for name, published in load_yaml(ROOT / "experiments" / "published.yaml")["coco_val2017"].items():
        own = [row for row in results if row["experiment"] == "coco2017" and row["run"] == name]
        mine = [mean_spread(own, m) if own else "not yet run" for m in ("AP", "AP_S")]
        lines.append([name, f"{published['AP']}", f"{published['AP_S']}", f"{published['ms']}", *mine])
    return markdown(["model", "AP (paper)", "AP_S (paper)", "ms (paper)", "AP (here)", "AP_S (here)"], lines)


def speed_block(names: Collection[str]) -> str:
    """What these benchmarks found, as recorded."""
    parts = []
    for name, found in ((n, f) for n, f in bench.read(bench.RECORD).items() if n in names):
        origin = f"`{found['command']}`, commit {found['commit']}, {found['hardware']}, {found['software']}"
        parts.append(f"{origin}\n\n{markdown(*bench.table(name, found))}")
    return "\n\n".join(parts) or "Not run: `make bench`."


def missing_block(experiments: Sequence[Experiment], results: Sequence[Row]) -> str:
    """What is planned and not recorded, with the command that runs it."""
    done = {(row["experiment"], row["run"], row["seed"]) for row in results}
    lines = []
    for experiment in experiments:
        missing = [run for run in experiment.runs if run.key not in done]
        if missing:
            names = ", ".join(dict.fromkeys(f"{run.name} (seed {run.seed})" for run in missing))
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


def write_page(path: Path, blocks: Mapping[str, Callable[[], str]]) -> None:
    """Rewrite the blocks of a page in place."""
    page = fill(path.read_text(encoding="utf-8"), blocks)
    with atomic_write(path, "w") as file:
        file.write(page)


def report(config: ReportConfig) -> Path:
    """Rewrite the page."""
    if config.readme:
        write_page(ROOT / config.readme, {"models": model_table})
    path = ROOT / config.page
    results, differences = ledger.read(Path(config.results)), ledger.read(Path(config.differences))
    figures = path.parent / "figures"
    figures.mkdir(exist_ok=True)
    experiments = all_experiments()
    blocks: dict[str, Callable[[], str]] = {"coco2017": lambda: coco_table(results)}
    blocks["coco_cost"] = lambda: speed_block(["coco_cost"])
    blocks["speed"] = lambda: speed_block([name for name in bench.NAMES if name != "coco_cost"])
    blocks["missing"] = lambda: missing_block(experiments, results)
    for e in experiments:
        blocks[e.name] = lambda e=e: experiment_block(e, results, differences, figures)
    write_page(path, blocks)
    minutes = sum(value for value in numbers(results, "train_minutes") if not math.isnan(value))
    LOGGER.info(f"{path}: {len(results)} runs, {minutes / 60:.1f} hours of training")
    return path


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    report(
        parse_config(ReportConfig, list(sys.argv[1:] if argv is None else argv), "experiments.report", __doc__ or "")
    )
    return 0


if __name__ == "__main__":
    run_cli(main)
