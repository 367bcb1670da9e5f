"""The house rules: who may import whom, where third parties live, and what no file may do."""

import ast
import functools
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from utils.core.config import build_parser

ROOT = Path(__file__).resolve().parent.parent
LAYERS = {"utils.core": 0, "utils.ops": 1, "models": 2, "utils.data": 2, "utils.engine": 3, "models.backends": 3}
ENGINE = (
    "speed",
    "options",
    "figures",
    "inference",
    "evaluation",
)  # each knows those before it, training and tasks all
SCRIPTS = 4  # every top-level file, and the programs in benchmarks/ and experiments/
ONLY_IN = {
    "torch.distributed": "utils/core/dist.py",
    "safetensors": "utils/core/checkpoint.py",
    "onnx": "models/backends/",
    "onnxruntime": "models/backends/",
    "onnxscript": "models/backends/",
    "openvino": "models/backends/",
    "nncf": "models/backends/",
    "tensorrt": "models/backends/",
    "torch.utils.tensorboard": "utils/engine/training/sinks.py",
    "tensorboard": "utils/engine/training/sinks.py",
    "wandb": "utils/engine/training/sinks.py",
    "mlflow": "utils/engine/training/sinks.py",
    "optuna": "tune.py",
    "trackers": "utils/engine/inference/tracking.py",
}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "pickle.load", "pickle.loads"}
FORBIDDEN_IMPORTS = {"pickle", "dill", "cloudpickle", "marshal", "shelve", "requests", "urllib.request", "pip"}
HARMLESS_NAMES = {"pickle.UnpicklingError"}  # an exception that torch.load raises
NETWORK_ALLOWED = {"utils/data/download.py"}  # the only file that may fetch, and only on --download


@functools.cache
def sources() -> tuple[tuple[str, ast.Module], ...]:
    found = []
    for folder in ("", "models", "utils", "benchmarks", "experiments"):
        files = ROOT.glob("*.py") if not folder else (ROOT / folder).rglob("*.py")
        for path in sorted(files):
            found.append((path.relative_to(ROOT).as_posix(), ast.parse(path.read_text(encoding="utf-8"), str(path))))
    return tuple(found)


def room(module: str) -> str | None:
    """The room of a dotted module name; top-level files and folders without a layer are rooms of their own."""
    return max((name for name in LAYERS if f"{module}.".startswith(f"{name}.")), key=len, default=None)


def imports(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """(dotted name, line) of everything imported; `from a import b` gives `a.b`, so that a package's parts are seen."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"line {node.lineno}: relative import"
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def inside(name: str, package: str) -> bool:
    return f"{name}.".startswith(f"{package}.")


def engine_place(name: str) -> int:
    """The place of a file or module of the engine in its order."""
    part = re.split(r"[./]", name)[2]
    return ENGINE.index(part) if part in ENGINE else len(ENGINE)


def layer_problems(file: str, tree: ast.Module, scripts: set[str]) -> Iterator[str]:
    mine = room(file.removesuffix(".py").replace("/", "."))
    for name, line in imports(tree):
        if mine is not None and name.split(".")[0] in scripts:
            yield f"{file}:{line} imports the program {name}"
        other = room(name)
        if mine and other and other != mine and LAYERS[other] >= LAYERS[mine]:
            yield f"{file}:{line} {mine} (layer {LAYERS[mine]}) imports {name} (layer {LAYERS[other]})"
        if mine == other == "utils.engine" and engine_place(name) > engine_place(file):
            yield f"{file}:{line} imports {name}, which comes after it in the engine"


def third_party_problems(file: str, tree: ast.Module) -> Iterator[str]:
    for name, line in imports(tree):
        homes = [home for package, home in ONLY_IN.items() if inside(name, package)]
        if homes and not file.startswith(homes[0]):
            yield f"{file}:{line} imports {name}; that belongs in {homes[0]}"
        forbidden = name not in HARMLESS_NAMES and any(inside(name, package) for package in FORBIDDEN_IMPORTS)
        if forbidden and file not in NETWORK_ALLOWED:
            yield f"{file}:{line} imports {name}"


def safety_problems(file: str, tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            if dotted(node.func) in FORBIDDEN_CALLS:
                yield f"{file}:{node.lineno} calls {dotted(node.func)}"
            for keyword in node.keywords:
                value = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
                if (keyword.arg, value) in {("shell", True), ("weights_only", False), ("allow_pickle", True)}:
                    yield f"{file}:{node.lineno} passes {keyword.arg}={value}"
        elif isinstance(node, ast.ExceptHandler):
            broad = node.type is None or dotted(node.type) in {"Exception", "BaseException"}
            if broad and not any(isinstance(part, ast.Raise) for part in ast.walk(node)):
                yield f"{file}:{node.lineno} catches everything and goes on"


def test_layers_and_third_parties() -> None:
    scripts = {path.stem for path in ROOT.glob("*.py")} | {"benchmarks", "experiments", "tests"}
    problems = []
    for file, tree in sources():
        problems += [*layer_problems(file, tree, scripts), *third_party_problems(file, tree)]
    assert not problems, "\n".join(problems)


def test_nothing_is_executed_from_data() -> None:
    problems = [problem for file, tree in sources() for problem in safety_problems(file, tree)]
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize(
    ("file", "code"),
    [
        ("utils/core/x.py", "from utils.ops.boxes import box_iou"),
        ("utils/ops/x.py", "import utils.data.index"),
        ("models/x.py", "from utils.data import index"),
        ("utils/engine/x.py", "from models import backends"),
        ("models/backends/x.py", "import utils.engine.evaluation.validate"),
        ("utils/engine/x.py", "import train"),
        ("utils/engine/figures/x.py", "from utils.engine.inference import predict"),
        ("utils/engine/evaluation/x.py", "import utils.engine.training.ema"),
    ],
)
def test_layer_rule_bites(file: str, code: str) -> None:
    assert list(layer_problems(file, ast.parse(code), {"train"}))


@pytest.mark.parametrize(
    ("file", "code"),
    [
        ("utils/engine/x.py", "def f():\n    import onnxruntime"),
        ("utils/core/x.py", "from torch import distributed"),
        ("train.py", "import optuna"),
        ("utils/data/x.py", "import pickle"),
    ],
)
def test_third_party_rule_bites(file: str, code: str) -> None:
    assert list(third_party_problems(file, ast.parse(code)))


@pytest.mark.parametrize("code", ["eval('1')", "run('ls', shell=True)", "try:\n    pass\nexcept Exception:\n    pass"])
def test_safety_rule_bites(code: str) -> None:
    assert list(safety_problems("x.py", ast.parse(code)))


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))]
CODE = re.compile(r"^```.*?^```", re.M | re.S)


def anchors(page: Path) -> set[str]:
    """What `page#...` may name: its headings as GitHub spells them, and explicit ids."""
    text = page.read_text(encoding="utf-8")
    headings = re.findall(r"^#+ +(.+)$", CODE.sub("", text), re.M)
    named = {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}
    return named | set(re.findall(r'<a id="([^"]+)">', text))


def test_documents_name_existing_files() -> None:
    """Every relative link leads to a file, and to a heading of it, that exist; README.md leads to every document."""
    for page in PAGES:
        text = CODE.sub("", page.read_text(encoding="utf-8"))
        for target, anchor in re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)\)", text):
            if "://" not in target and not target.startswith("mailto:"):
                file = page.parent / target if target else page
                assert file.exists(), f"{page.name} links to {target}, which does not exist"
                assert not anchor or anchor in anchors(file), f"{page.name}: {file.name} has no heading #{anchor}"
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        assert f"](docs/{page.name})" in readme, f"README.md does not link docs/{page.name}"


def test_documents_name_existing_flags() -> None:
    """Every flag behind the name of a verb in a code block is one of that verb's options, or the beginning of one."""
    for page in PAGES:
        code = "\n".join(CODE.findall(page.read_text(encoding="utf-8"))).replace("\\\n", " ")
        for command in re.split(r"\n|&&|;", re.sub(r"(^|\s)#.*", "", code, flags=re.M)):
            verb, _, rest = command.partition(".py ")
            verb = verb.rpartition(" ")[2]
            if (ROOT / f"{verb}.py").is_file():
                for flag in re.findall(r"(?<!\S)--[\w-]+", rest):
                    known = any(own.startswith(flag) for own in verb_flags(verb))
                    assert known, f"{page.name}: {verb}.py has no {flag}"


@functools.cache
def verb_flags(verb: str) -> set[str]:
    module = importlib.import_module(verb)
    config = getattr(module, f"{verb.split('_')[0].title()}Config")
    return {flag for action in build_parser(config, verb)._actions for flag in action.option_strings}
