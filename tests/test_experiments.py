"""The experiments: files that are checked, a record that is appended to and never repeated, a page made from it."""

import csv
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from experiments import bench, ledger, report, run
from experiments.bench_tables import TABLES
from experiments.plans import Experiment, all_experiments, flags, load_experiment
from utils.core.errors import UserError


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


MINIMAL = (
    "question: Which?\ndata: d.yaml\ntrain: {imgsz: 64, epochs: 1}\nmodels: {a: {cfg: a.yaml}, b: {cfg: b.yaml}}\n"
)


def row(experiment: str, name: str, seed: int, ap: float) -> dict:
    return {"experiment": experiment, "run": name, "model": name, "seed": seed, "AP": ap, "AP50": ap, "AP_S": ap,
            "parameters": 1000, "gflops": 1.5, "imgsz": 256, "train_minutes": 2.0, "commit": "c",
            "hardware": "h", "software": "s", "command": f"python train.py --name {name}"}  # fmt: skip


ORIGIN = {"command": "python x.py", "commit": "c", "hardware": "h", "software": "s"}


def copy_pages(root: Path, folder: Path) -> None:
    for name in report.PAGES:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text((root / name).read_text())


def test_all_files_are_valid_and_their_models_exist(root: Path) -> None:
    experiments = all_experiments()
    assert {"small_objects", "low_resolution"} <= {experiment.name for experiment in experiments}
    for experiment in experiments:
        for one in experiment.runs:
            assert (root / one.train["cfg"]).is_file(), one
            assert {"imgsz", "epochs", "data"} <= set(one.train)


def test_small_objects_has_its_controls_and_three_seeds(root: Path) -> None:
    experiment = load_experiment(root / "experiments" / "small_objects.yaml")
    assert {one.seed for one in experiment.runs} == {0, 1, 2}
    assert {"yolov5n", "yolov5-spd-n", "yolov5n-matched"} <= set(experiment.models)
    recipes = {str({k: v for k, v in one.train.items() if k != "cfg"}) for one in experiment.runs}
    assert len(recipes) == 1, "equal recipe"


def test_runs_are_the_product_of_seeds_values_and_models(tmp_path: Path) -> None:
    text = MINIMAL + "seeds: [3, 4]\nvary: {imgsz: [64, 96]}\ncompare: [[a, b]]\n"
    experiment = load_experiment(write(tmp_path / "x.yaml", text))
    assert len(experiment.runs) == 8 and len({one.key for one in experiment.runs}) == 8
    assert list(experiment.pairs()) == [("a@64", "b@64"), ("a@96", "b@96")]
    args = experiment.runs[-1].train_args(tmp_path)
    assert args[args.index("--imgsz") + 1] == "96" and args[args.index("--seed") + 1] == "4"


def test_no_epochs_measure_weights_as_they_convert(tmp_path: Path) -> None:
    text = "question: Which?\ndata: d.yaml\ntrain: {imgsz: 64, epochs: 0, weights: w.pt}\nval: {data: v.yaml}\n"
    experiment = load_experiment(write(tmp_path / "x.yaml", text + "models: {a: {cfg: a.yaml}, b: {epochs: 2}}\n"))
    as_it_is, trained = experiment.runs
    program, args = as_it_is.make(tmp_path)
    assert program == "convert.py" and {"--weights", "--cfg", "--output"} <= set(args) and "--epochs" not in args
    assert trained.make(tmp_path)[0] == "train.py"
    for one in experiment.runs:
        args = one.val_args(tmp_path)
        assert args.count("--data") == 1 and args[args.index("--data") + 1].endswith("/v.yaml")
        assert args[args.index("--weights") + 1] == os.path.relpath(one.best(tmp_path))


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ("colour: red", "unknown key"),
        ("compare: [[a, c]]", "names 'c'"),
        ("vary: {a: [1], b: [2]}", "one option"),
        ("compare: [[a, b]]", "different 'imgsz'"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, more: str, told: str) -> None:
    text = MINIMAL.replace("{cfg: b.yaml}", "{cfg: b.yaml, imgsz: 96}")
    with pytest.raises(UserError, match=told):
        load_experiment(write(tmp_path / "x.yaml", text + more))


def test_a_run_that_another_command_began_is_not_continued(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(run, "ROOT", tmp_path)
    (plan,) = load_experiment(write(tmp_path / "x.yaml", MINIMAL)).runs[:1]
    runner = run.Runner(run.RunConfig())
    executed: list = []
    monkeypatch.setattr(runner, "execute", lambda program, args, folder: executed.append(list(args)))
    runner.make(plan)
    last = plan.folder(runner.project) / "train" / "weights" / "last.pt"
    last.parent.mkdir(parents=True)
    last.touch()
    runner.make(plan)
    assert executed[1][0] == "--resume" and executed[0][0] != "--resume"
    with pytest.raises(UserError, match="begun by another command"):
        runner.make(replace(plan, train={**plan.train, "epochs": 5}))


def test_what_is_missing_is_listed_and_typos_are_told(monkeypatch, tmp_path: Path, capsys, root: Path) -> None:
    monkeypatch.setattr(ledger, "RESULTS", tmp_path / "none.csv")
    monkeypatch.setattr(ledger, "DIFFERENCES", tmp_path / "none.csv")
    plan = str(root / "experiments" / "small_objects.yaml")
    assert run.main([plan, "--list"]) == 0
    told = capsys.readouterr().out
    assert "missing: yolov5n-p2 (seed 2)" in told
    assert "missing: the paired difference yolov5-spd-n − yolov5n-p2 (seed 0, 1, 2)" in told
    with pytest.raises(UserError, match="no run has 'yolov8' in its name"):
        run.main([plan, "--list", "--only", "yolov8"])


def test_missing_pairs(tmp_path: Path) -> None:
    experiment = load_experiment(write(tmp_path / "x.yaml", MINIMAL + "seeds: [0, 1]\ncompare: [[a, b]]\n"))
    recorded = [{"experiment": "x", "a": "a", "b": "b", "seed": "0"}]
    assert experiment.missing_pairs(recorded) == ["the paired difference b − a (seed 1)"]


def test_flags() -> None:
    assert flags({"a": 1, "b": [1, 2], "c": True, "d": False, "e": ""}) == ["--a", "1", "--b", "1", "2", "--c"]


def test_ledger_appends_at_once_and_refuses_other_columns(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    for seed in (0, 1):
        ledger.append(path, ledger.RESULT_COLUMNS, row("x", "a", seed, 0.25))
        assert len(ledger.read(path)) == seed + 1
    assert ledger.read(path)[1]["AP"] == "0.25"
    with pytest.raises(UserError, match="other columns"):
        ledger.append(path, ("a", "b"), {"a": 1})


def test_recorded_rows_have_the_columns_of_today(root: Path) -> None:
    for path, columns in ((ledger.RESULTS, ledger.RESULT_COLUMNS), (ledger.DIFFERENCES, ledger.DIFFERENCE_COLUMNS)):
        if path.is_file():
            with open(path, newline="", encoding="utf-8") as file:
                assert tuple(next(csv.reader(file))) == columns
            for one in ledger.read(path):
                assert one["commit"] and all("\0" not in value for value in one.values())


def test_page_is_made_from_the_record(monkeypatch: pytest.MonkeyPatch, root: Path, tmp_path: Path) -> None:
    monkeypatch.setattr(report, "model_table", lambda: "the models")  # which takes its time
    copy_pages(root, tmp_path)
    results, differences, benchmarks = tmp_path / "r.csv", tmp_path / "d.csv", tmp_path / "b.jsonl"
    for seed, ap in ((0, 0.30), (1, 0.32)):
        ledger.append(results, ledger.RESULT_COLUMNS, row("small_objects", "yolov5n", seed, ap))
        ledger.append(results, ledger.RESULT_COLUMNS, row("small_objects", "yolov5-spd-n", seed, ap + 0.05))
    difference = {"experiment": "small_objects", "a": "yolov5n", "b": "yolov5-spd-n", "seed": 0, "metric": "AP",
                  "difference": 0.05, "low": 0.01, "high": 0.09}  # fmt: skip
    ledger.append(differences, ledger.DIFFERENCE_COLUMNS, difference)
    cost = {"model": "yolov5n", "imgsz": 256, "images_per_second": 21.5, "memory": 600.0, "ms": 12.25}
    benchmarks.write_text(
        json.dumps({"benchmark": "costs", "rows": [cost, {**cost, "imgsz": 224, "ms": 99.0}], **ORIGIN})
    )
    config = report.ReportConfig(str(tmp_path), str(results), str(differences), str(benchmarks))
    page, conversion, readme = report.report(config)
    text = page.read_text()
    assert "0.310 ± 0.014" in text, "mean and sample deviation of 0.30 and 0.32"
    assert "+0.010 to +0.090" in text and "python train.py --name yolov5n" in text
    assert "| yolov5n-matched | not run |" in text
    row_of = [line for line in text.splitlines() if line.startswith("| yolov5n | 2 |")]
    assert row_of == [
        "| yolov5n | 2 | 0.310 ± 0.014 | 0.310 ± 0.014 | 0.310 ± 0.014 | 1,000 | 1.50 | 21.5 | 600.0 | 12.2 |"
    ]
    assert "Not run: `python -m experiments.bench architectures`." in conversion.read_text()
    assert "the models" in readme.read_text()
    assert "yolov5n-matched (seed 0)" in text.split("## Not run")[1]
    assert len(list((tmp_path / "docs" / "figures").glob("small_objects_*.png"))) == 2
    assert report.report(config)[0].read_text() == text, "rebuilding changes nothing"


@pytest.mark.slow
def test_pages_of_the_repository_are_up_to_date(root: Path, tmp_path: Path) -> None:
    copy_pages(root, tmp_path)
    for made, name in zip(report.report(report.ReportConfig(output=str(tmp_path))), report.PAGES, strict=True):
        assert made.read_text() == (root / name).read_text(), "run `make results`"


def test_unknown_block_is_refused() -> None:
    with pytest.raises(UserError, match="expected a"):
        report.fill("<!-- begin b -->\n<!-- end b -->", {"a": lambda: ""})


def smoke(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *args: str) -> list[dict[str, str]]:
    assert run.main([*args, "--smoke", "--project", str(tmp_path)]) == 0
    return ledger.read(tmp_path / "smoke" / "results.csv")


def test_smoke_run_is_recorded_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, root: Path) -> None:
    args = [str(root / "experiments" / "low_resolution.yaml"), "--only", "yolov5n@160"]
    (found,) = smoke(monkeypatch, tmp_path, *args)
    assert found["run"] == "yolov5n@160" and found["AP"] and "train.py" in found["command"]
    assert int(found["parameters"]) > 1e6 and float(found["train_minutes"]) > 0
    assert all(found[key] for key in ("precision", "recall", "f1"))
    assert smoke(monkeypatch, tmp_path, *args) == [found], "a recorded run is not run again"


@pytest.mark.parametrize("experiment", all_experiments(), ids=lambda experiment: experiment.name)
def test_smoke_of_each(experiment: Experiment, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, root: Path) -> None:
    rows = smoke(monkeypatch, tmp_path, str(root / "experiments" / f"{experiment.name}.yaml"))
    assert {found["run"] for found in rows} == {one.name for one in experiment.runs}
    pairs = {(one["a"], one["b"]) for one in ledger.read(tmp_path / "smoke" / "differences.csv")}
    assert pairs == set(experiment.pairs())


def test_weights_that_are_gone_are_made_again_for_a_comparison(monkeypatch, tmp_path: Path) -> None:
    text = "{imgsz: 64, epochs: 1}\nmodels: {a: {cfg: models/yolov5n.yaml}, b: {cfg: models/yolov5n.yaml}}\n"
    plan = write(tmp_path / "two.yaml", f"question: Which?\ndata: d.yaml\ntrain: {text}compare: [[a, b]]\n")
    rows = smoke(monkeypatch, tmp_path, str(plan))
    differences = tmp_path / "smoke" / "differences.csv"
    assert len(rows) == 2 and differences.is_file()
    differences.unlink()
    (tmp_path / "smoke" / "two" / "a-s0" / "train" / "weights" / "best.pt").unlink()
    assert smoke(monkeypatch, tmp_path, str(plan)) == rows and ledger.read(differences)


# ------------------------------------------------------------------------------------------------- benchmarks
def test_benchmarks_are_all_known(root: Path) -> None:
    files = {path.stem for path in (root / "benchmarks").glob("*.py")} - {"classic", "__init__"}
    assert files == set(TABLES) - {"coco_cost"}  # which is train_step again


def test_a_benchmark_is_run_and_recorded_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bench, "RECORD", tmp_path / "benchmarks.jsonl")
    monkeypatch.setattr(bench, "arguments", lambda name: ["500"])
    for _ in range(2):
        assert bench.main(["index"]) == 0
    found = bench.read(bench.RECORD)
    assert list(found) == ["index"] and found["index"]["files"] == 500 and found["index"]["commit"]
    head, lines = TABLES["index"](found["index"])
    assert [len(line) for line in lines] == [len(head)] * 3
    page = report.benchmark_block(report.Record([], [], found), "index")
    assert "python benchmarks/index.py 500" in page and "| cached start |" in page


def test_benchmarks_without_their_data_are_skipped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("YOLOV5_SPD_DATA", str(tmp_path))
    monkeypatch.setattr(bench, "RECORD", tmp_path / "benchmarks.jsonl")
    assert bench.main(["slices"]) == 0 and not bench.RECORD.exists()
    with pytest.raises(UserError, match="no benchmark 'lodaer'.*loader"):
        bench.main(["lodaer"])


@pytest.mark.parametrize(
    ("name", "found"),
    [
        (
            "train_step",
            {"results": [{"model": "m", "variant": "v", "images_per_second": 2.0, "ratio": 1.5, "memory": 9.0}]},
        ),
        ("coco_cost", {"results": [{"model": "m", "images_per_second": 2.0, "memory": 9.0, "epoch_hours": 16.4}]}),
        ("inference", {"ms": {"m": {"a": 2.0}}, "speedup": {"m": {"a": 1.0}}, "spd_to_plain": {"m": {"a": 1.5}}}),
        ("inference", {"ms": {"m": {"a": 2.0}}, "speedup": {"m": {"a": 1.0}}, "spd_to_plain": {"m": {}}}),
        ("loader", {"images_per_second": {"cached": {"classic": 1.0, "fast": 2.0, "ratio": 2.0}}}),
        ("loader_memory", {"MiB a worker": 12.0, "growth": {"0 workers": 1.0, "4 workers": 1.01}}),
        ("costs", {"rows": [{"model": "m", "imgsz": 64, "images_per_second": 2.0, "memory": 9.0, "ms": 3.0}]}),
        (
            "architectures",
            {
                "rows": [
                    {
                        "model": "m",
                        "imgsz": [97, 130],
                        "sites": 3,
                        "skipped": ["a: b"],
                        "parameters": 100,
                        "conv-spd": {"added": 1, "difference": 1e-7},
                        "spd-conv": {"added": 2, "difference": 0.0},
                    }
                ]
            },
        ),
        ("slices", {"rows": [{"slice": 0, "recall": 0.1, "AP50": 0.2, "seconds": 3.0}]}),
    ],
)
def test_benchmark_tables_have_full_lines(name: str, found: dict) -> None:
    head, lines = TABLES[name](found)
    assert lines and all(len(line) == len(head) for line in lines)
