"""The rules of the house, checked from the source: who imports whom, what is public and described, what stays out."""

from __future__ import annotations

import ast
import graphlib
import importlib
import importlib.util
import inspect
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import convatlas
from convatlas import catalog

PACKAGE = Path(convatlas.__file__).parent
ROOT = PACKAGE.parents[1]

#: Top-level modules and folders, from the bottom up. Those of one row stand beside each other and do not import each
#: other; those of one set are one room.
FLOORS: list[list[set[str]]] = [
    [{"errors", "files", "allocator"}],
    [{"catalog"}, {"report"}, {"data"}, {"ops"}],
    [{"weights"}],
    [{"nn", "surgery", "cost", "hooks", "export"}],
    [{"networks"}],
    *([{room}] for room in ("training", "robustness", "analysis", "design", "ondevice")),
    [
        {room}
        for room in (
            *("recognition", "detection", "segmentation", "restoration", "generation"),
            *("audio", "series", "geometry", "physics", "graph"),
        )
    ],
    [{"experiments"}, {"bench"}],
    [{"cli"}],
]
LARGEST_FILE = 600
#: Networks that others stand on, and the parts that all share.
SHARED_NETWORKS = {"base", "registry", "resnet", "sequence_classifier", "mobilenet", "vgg", "convnext", "vit", "unet"}
#: What takes long to import or need not be installed.
HEAVY = {"torch", "lightning", "torchmetrics", "matplotlib", "jinja2", "sklearn", "skimage", "huggingface_hub"}
#: What experiments on one kind of data share.
SHARED_EXPERIMENTS = {"small_training"}
#: The measuring that every benchmark shares.
SHARED_BENCHMARKS = {"ratio"}


def modules() -> dict[str, Path]:
    """Every module of the package by its name below it; the package itself is ''."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(part for part in parts if part != "__init__")] = path
    return found


MODULES = modules()
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}
each_module = pytest.mark.parametrize("name", sorted(MODULES), ids=lambda name: name or "convatlas")


def imports(name: str, *, for_types: bool = True) -> Iterator[str]:
    """The modules of the package that a module imports, anywhere in its source; with or without those for types."""
    branches = (node for node in ast.walk(TREES[name]) if isinstance(node, ast.If))
    types = {inner for node in branches if ast.unparse(node.test) == "TYPE_CHECKING" for inner in ast.walk(node)}
    for node in ast.walk(TREES[name]):
        if node in types and not for_types:
            continue
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: imports are absolute"
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            targets = [target if target.removeprefix("convatlas.") in MODULES else str(node.module) for target in whole]
            if node.module == "convatlas" and {alias.name for alias in node.names} == {"__version__"}:
                targets = []
        else:
            continue
        for target in targets:
            if target == "convatlas" or target.startswith("convatlas."):
                yield target.removeprefix("convatlas").removeprefix(".")


def place(name: str) -> tuple[int, int]:
    """Floor and room of a module."""
    top = name.partition(".")[0]
    for floor, rooms in enumerate(FLOORS):
        for room, names in enumerate(rooms):
            if top in names:
                return floor, room
    raise AssertionError(f"{top!r} stands on no floor: give it one in FLOORS of {Path(__file__).name}")


# Imports


@pytest.mark.parametrize("name", sorted(set(MODULES) - {""}))
def test_imports_run_downwards(name: str):
    floor, room = place(name)
    for target in imports(name):
        assert target, f"convatlas.{name} imports from the package itself: name the module"
        below, beside = place(target)
        assert below < floor or (below, beside) == (floor, room), f"convatlas.{name} must not import convatlas.{target}"


def test_there_are_no_circles():
    graph = {name: set(imports(name, for_types=False)) for name in MODULES if name}
    order = list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError
    assert set(graph) <= set(order)


def test_systems_do_not_import_each_other():
    owners: dict[str, set[str]] = {}
    for slug, card in catalog.cards().items():
        for module in card.modules:
            owners.setdefault(module, set()).add(slug)
    for name in MODULES:
        for target in imports(name):
            mine, theirs = owners.get(name, set()), owners.get(target, set())
            shared = target.removeprefix("networks.") in SHARED_NETWORKS
            assert not mine or not theirs or mine & theirs or shared, (
                f"convatlas.{name} is of {mine}, convatlas.{target} of {theirs}: what two share moves down a floor"
            )


@pytest.mark.parametrize("room", ["experiments", "bench", "networks"])
def test_files_of_one_room_stand_alone(room: str):
    shared = {"networks": SHARED_NETWORKS, "experiments": SHARED_EXPERIMENTS, "bench": SHARED_BENCHMARKS}
    allowed = shared[room]
    for name in MODULES:
        folder, _, own = name.partition(".")
        if folder != room or not own:
            continue
        for target in imports(name):
            other = target.removeprefix(f"{room}.").partition(".")[0]
            if target.startswith(f"{room}.") and other != own.partition(".")[0]:
                assert other in allowed, f"convatlas.{name} must not import convatlas.{target}"


def test_every_folder_has_a_tenant():
    for folder in PACKAGE.rglob("*"):
        if folder.is_dir() and folder.name != "__pycache__":
            tenants = {path.name for path in folder.iterdir()} - {"__init__.py", "__pycache__"}
            assert tenants, f"{folder.relative_to(ROOT)} is empty"


# Files and names


@each_module
def test_file_is_short_and_described(name: str):
    text = MODULES[name].read_text(encoding="utf-8")
    assert len(text.splitlines()) <= LARGEST_FILE, "make it a folder of files named by content"
    assert ast.get_docstring(TREES[name]), "say what the module holds"


def defined(tree: ast.Module) -> tuple[set[str], set[str]]:
    """Names that a module binds at its top level, and the public functions and classes among them."""
    bound, public = set(), set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            bound.add(node.name)
            public |= {node.name} - {name for name in (node.name,) if name.startswith("_")}
        elif isinstance(node, ast.Import | ast.ImportFrom):
            bound |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            bound |= {item.id for target in targets for item in ast.walk(target) if isinstance(item, ast.Name)}
    return bound, public


@each_module
def test_all_is_exact(name: str):
    bound, public = defined(TREES[name])
    listed = catalog.public_names(name) if name else tuple(convatlas.__all__)
    assert len(set(listed)) == len(listed)
    assert public <= set(listed), "public functions and classes belong in __all__, others begin with an underscore"
    if name:
        assert set(listed) <= bound, "__all__ names what is not there"
    else:
        assert all(getattr(convatlas, entry) is not None for entry in listed)


@each_module
def test_public_names_are_documented_and_typed(name: str):
    module = importlib.import_module(f"convatlas.{name}".rstrip("."))
    for listed in catalog.public_names(name):
        thing = getattr(module, listed)
        if getattr(thing, "__module__", None) != module.__name__:
            continue
        if inspect.isfunction(thing):
            check_function(listed, thing)
        elif inspect.isclass(thing):
            assert thing.__doc__, f"{listed} has no docstring"
            assert not thing.__doc__.startswith(f"{listed}("), f"{listed} has only the docstring that dataclass makes"
            for method, entry in vars(thing).items():
                function = entry.fget if isinstance(entry, property) else getattr(entry, "__func__", entry)
                if not inspect.isfunction(function) or function.__module__ != module.__name__:
                    continue
                if method == "__init__" or not method.startswith("_"):
                    described = inspect.getdoc(getattr(thing, method)) or method == "__init__"
                    check_function(f"{listed}.{method}", function, described=bool(described))


def check_function(label: str, function: object, *, described: bool | None = None) -> None:
    inner = inspect.unwrap(function)  # type: ignore[arg-type]
    assert inner.__doc__ if described is None else described, f"{label} has no docstring"
    signature = inspect.signature(inner)
    for parameter in signature.parameters.values():
        typed = parameter.annotation is not inspect.Parameter.empty or parameter.name in ("self", "cls")
        assert typed, f"{label}: {parameter.name} has no type"
    assert signature.return_annotation is not inspect.Signature.empty, f"{label} has no return type"


@each_module
def test_library_neither_prints_nor_asserts(name: str):
    for node in ast.walk(TREES[name]):
        assert not isinstance(node, ast.Assert), f"line {node.lineno}: raise an error that says what is expected"
        printed = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
        assert not printed or name.startswith("cli"), f"line {node.lineno}: only the command line prints"


def text_files() -> list[Path]:
    """Every file of the repository that people read."""
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    try:
        names = subprocess.run(listing, cwd=ROOT, capture_output=True, check=True, text=True).stdout.split("\0")
    except (OSError, subprocess.CalledProcessError):  # an unpacked archive
        folders = ("src", "tests", "docs", "benchmarks", "examples")
        names = [*(path.name for path in ROOT.glob("*.*")), *(str(p) for f in folders for p in (ROOT / f).rglob("*.*"))]
    kinds = {".py", ".md", ".toml", ".json", ".yaml", ".yml", ".txt", ".j2", ".html", ".cfg", ".typed", ""}
    files = [ROOT / name for name in names if name and Path(name).suffix in kinds]
    return [path for path in files if path.is_file() and "__pycache__" not in path.parts]


# Brackets keep the patterns from finding themselves.
UNFINISHED = re.compile(r"\b(TOD[O]|FIXM[E]|XX[X])\b")
MACHINE_PATH = re.compile(r"(?<![\w.:/-])/(wor[k]|hom[e]|tm[p]|Users)/\w")
WORKSHOP = re.compile(
    r"(?<!user-)\bagen[t]s?\b|\bclaud[e]\b|\banthropi[c]\b|\bchatgp[t]\b|\bcopilo[t]\b|golden shee[t]|shared/system[s]"
    r"|\b(DESIG[N]|BRIE[F])\.md",
    re.IGNORECASE,
)


@pytest.mark.parametrize(
    "pattern", [UNFINISHED, MACHINE_PATH, WORKSHOP], ids=["unfinished", "machine_path", "workshop"]
)
def test_text_is_free_of(pattern: re.Pattern[str]):
    found = []
    for path in text_files():
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            if match := pattern.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {match[0]}")
    assert not found, "\n".join(found)


# What an import costs


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a piece of Python in a fresh process that finds this source."""
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    return subprocess.run([sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True)


LOADED = "import sys; print('LOADED', *sorted({name.partition('.')[0] for name in sys.modules}))"


def loaded(code: str, *arguments: str) -> set[str]:
    """The top-level packages that a piece of Python has imported when it ends."""
    result = python(f"import atexit; atexit.register(lambda: exec({LOADED!r}))\n{code}", *arguments)
    assert result.returncode == 0, result.stderr
    return set(result.stdout.splitlines()[-1].split()[1:])


@pytest.mark.parametrize(
    "code",
    [
        "import convatlas",
        "import convatlas.catalog",
        "import convatlas.report",
        "import convatlas.errors, convatlas.files",
    ],
)
def test_import_is_light(code: str):
    assert not loaded(code) & HEAVY


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["--version"],
        ["list"],
        ["list", "--available", "--json"],
        ["show", "inceptionnext"],
        ["show", "eca", "--json"],
        ["bench"],
        *([verb, "--help"] for verb in ("list", "show", "bench", "inspect", "export", "convert", "reproduce")),
    ],
    ids=" ".join,
)
def test_commands_that_only_tell_are_light(words: list[str]):
    code = "import sys; from convatlas.cli.main import main; sys.exit(main(sys.argv[1:]))"
    assert not loaded(code, *words) & HEAVY


def test_torchvision_and_torchaudio_are_not_installed():
    # A build of either that does not match torch keeps lightning and torchmetrics from being imported.
    for package in ("torchvision", "torchaudio"):
        assert importlib.util.find_spec(package) is None, f"the tests must prove that {package} is not needed"


@pytest.mark.slow
def test_torchvision_and_torchaudio_are_not_needed():
    code = """
import importlib.abc, sys

class Forbid(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torchvision", "torchaudio"):
            raise AssertionError(f"{name} was imported")

sys.meta_path.insert(0, Forbid())
import convatlas.networks, convatlas.recognition.task
convatlas.create_model("eca_mobilenet_v2")
print("fine")
"""
    result = python(code)
    assert result.stdout.strip() == "fine", result.stderr


def test_torchvision_and_torchaudio_are_in_no_list_of_requirements():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [
        *project["dependencies"],
        *(line for extra in project["optional-dependencies"].values() for line in extra),
    ]
    pinned = (ROOT / "constraints.txt").read_text().splitlines()
    assert not [line for line in [*wanted, *pinned] if line.startswith(("torchvision", "torchaudio"))]


# Catalogue


def test_available_systems_can_be_imported():
    available = [card for card in catalog.cards().values() if card.available]
    for card in available:
        for module in card.modules:
            assert importlib.import_module(f"convatlas.{module}").__doc__


def test_cards_name_modules_on_a_floor():
    for card in catalog.cards().values():
        floors = [place(module)[0] for module in card.modules]
        assert floors == sorted(floors), f"{card.slug}: modules stand lower floors first"


def test_variants_read_from_source_are_those_of_the_module():
    seen: dict[str, str] = {}
    for module in sorted(set(catalog.models().values())):
        table = importlib.import_module(f"convatlas.{module}").VARIANTS
        names = [name for name, home in catalog.models().items() if home == module]
        assert list(table) == names, module
        for name in table:
            assert seen.setdefault(name, module) == module, f"{name} is defined twice"
    for name in MODULES:
        if name.startswith("networks."):
            variants = getattr(importlib.import_module(f"convatlas.{name}"), "VARIANTS", {})
            assert set(variants) <= {model for model, home in catalog.models().items() if home == name}, name


def test_tasks_resolve():
    for target in catalog.TASKS.values():
        assert inspect.isclass(catalog.resolve(target)), target
