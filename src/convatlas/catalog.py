"""What convatlas holds, answered from data and file names: nothing here imports torch or the code it describes.

`cards.toml` has one card per published system. Names that a user types (models, tasks, experiments) are looked up in
the package's own source by reading it, so a new file is in the catalogue by being there.
"""

from __future__ import annotations

import ast
import importlib
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from convatlas.errors import Unsupported, unknown

__all__ = [
    "DESIGNS",
    "LAYERS",
    "METHODS",
    "TASKS",
    "Card",
    "Paper",
    "bench_module",
    "benchmarks",
    "card",
    "cards",
    "experiment_module",
    "model_module",
    "models",
    "public_names",
    "resolve",
]

_PACKAGE = Path(__file__).parent

#: Task name on the command line -> "module:class" below the package.
TASKS: dict[str, str] = {
    "camouflage": "robustness.camouflage:Camouflage",
    "denoising": "restoration.denoising:Denoising",
    "field-forecasting": "physics.field_forecasting:FieldForecasting",
    "illuminant": "restoration.illuminant_estimation:IlluminantEstimation",
    "lidar-detection": "geometry.lidar_detection:LidarDetection",
    "forecasting": "series.forecasting:Forecasting",
    "operator-learning": "physics.operator_learning:OperatorLearning",
    "point-recognition": "geometry.point_clouds:PointRecognition",
    "point-segmentation": "geometry.point_clouds:PointSegmentation",
    "poisson": "physics.poisson:Poisson",
    "pretraining": "recognition.pretraining:Pretraining",
    "recognition": "recognition.task:Recognition",
    "separation": "audio.separation:Separation",
    "sequences": "recognition.sequences:SequenceRecognition",
    "skeletons": "recognition.skeletons:Skeletons",
    "super-resolution": "restoration.super_resolution:SuperResolution",
    "video-delivery": "restoration.stdo:VideoDelivery",
    "volume-super-resolution": "restoration.volume_super_resolution:VolumeSuperResolution",
    "waves": "physics.wave:Waves",
}

#: Name of a training method, as the setting ``methods`` takes it -> "module:class" below the package.
METHODS: dict[str, str] = {
    "adversarial": "training.adversarial:Adversarial",
    "additive_margin": "training.additive_margin:AdditiveMargin",
    "token_labelling": "training.token_labelling:TokenLabelling",
    "cosine_restarts": "training.cosine_restarts:CosineRestarts",
    "density": "training.density:DensityTraining",
    "learned_filters": "training.filter_learning:LearnedFilters",
    "orthogonality": "training.orthogonality:Orthogonality",
    "token_schedule": "training.progressive_tokens:TokenSchedule",
    "spark": "training.spark:SparK",
    "sam": "training.sam:SharpnessAware",
    "tract": "training.tract:TrAct",
}

#: Layer for any network, as the setting ``layer`` takes it -> "module:class" below the package, of a layer that keeps
#: the shape of what it gets; for a conv-like layer one for each number of position axes that there is.
LAYERS: dict[str, str | dict[int, str]] = {
    "coordinate_attention": "nn.mixers.ela:CoordinateAttention",
    "cross_d_conv": {2: "nn.conv.cross_d_conv:CrossDConv2d"},
    "deform_conv": {2: "nn.conv.deform_conv:DeformConv2d"},
    "eca": "nn.mixers.eca:ECA",
    "ela": "nn.mixers.ela:ELA",
    "fdconv": {2: "nn.conv.fdconv:FDConv2d"},
    "finite_difference": {dims: f"nn.conv.finite_difference:FiniteDifferenceConv{dims}d" for dims in (1, 2, 3)},
    "hypercomplex": {dims: f"nn.conv.hypercomplex:PHConv{dims}d" for dims in (1, 2, 3)},
    "im2win": {2: "nn.conv.im2win:Im2winConv2d"},
    "one_way": {dims: f"nn.conv.one_way:OneWayConv{dims}d" for dims in (1, 2, 3)},
    "quaternion": {dims: f"nn.conv.hypercomplex:QuaternionConv{dims}d" for dims in (1, 2, 3)},
    "squeeze_excite": "nn.mixers.squeeze_excite:SqueezeExcite",
    "ulsam": "nn.mixers.ulsam:ULSAM",
    "weighted_conv": {dims: f"nn.conv.weighted_conv:WeightedConv{dims}d" for dims in (1, 2, 3)},
}

#: Method of design on the command line -> "module:class" below the package.
DESIGNS: dict[str, str] = {
    "as_vit": "design.as_vit:TrainingFreeSearch",
    "deepmad": "design.deepmad:ArchitectureSearch",
}


@dataclass(frozen=True)
class Paper:
    """A publication: title, year of its first version, arXiv identifier and venue where there is one."""

    title: str
    year: int
    arxiv: str | None = None
    venue: str | None = None


@dataclass(frozen=True)
class Card:
    """One published system: its papers, what it is for, the modules it consists of and what they offer.

    Module names are relative to the package: ``home`` is the main one, ``modules`` are all that must exist for the
    system to be available.
    """

    slug: str
    papers: tuple[Paper, ...]
    kinds: tuple[str, ...]
    purpose: str
    home: str
    modules: tuple[str, ...]
    offers: tuple[str, ...]

    @property
    def title(self) -> str:
        """Title of the first paper."""
        return self.papers[0].title

    @property
    def year(self) -> int:
        """Year of the first paper."""
        return self.papers[0].year

    @property
    def available(self) -> bool:
        """Whether every module of the system is part of this version."""
        return all(_source(module) is not None for module in self.modules)

    @property
    def models(self) -> tuple[str, ...]:
        """Model names that the system's modules define, for `create_model`."""
        return tuple(name for module in self.modules if module.startswith("networks.") for name in _variants(module))

    @property
    def benchmarks(self) -> tuple[str, ...]:
        """Names of the benchmarks among the system's modules, for ``convatlas bench``."""
        return tuple(module.removeprefix("bench.") for module in self.modules if module.startswith("bench."))

    def public(self) -> dict[str, tuple[str, ...]]:
        """What a user imports: public names of the system's modules, without tables, experiments and benchmarks."""
        tables = {"VARIANTS", "PUBLISHED"}
        own = [module for module in self.modules if not module.startswith(("experiments.", "bench."))]
        names = {module: tuple(name for name in public_names(module) if name not in tables) for module in own}
        return {f"convatlas.{module}": listed for module, listed in names.items() if listed}

    def as_dict(self) -> dict[str, Any]:
        """The card as plain data, for JSON."""
        papers = [{key: value for key, value in vars(paper).items() if value is not None} for paper in self.papers]
        return {
            "slug": self.slug,
            "papers": papers,
            "kinds": list(self.kinds),
            "purpose": self.purpose,
            "home": f"convatlas.{self.home}",
            "modules": [f"convatlas.{module}" for module in self.modules],
            "offers": list(self.offers),
            "available": self.available,
            "models": list(self.models) if self.available else [],
        }


@cache
def cards() -> dict[str, Card]:
    """Every card by its slug, in alphabetical order."""
    table = tomllib.loads((_PACKAGE / "cards.toml").read_text(encoding="utf-8"))
    return {
        slug: Card(
            slug=slug,
            papers=tuple(Paper(**paper) for paper in entry["papers"]),
            kinds=tuple(entry["kinds"]),
            purpose=entry["purpose"],
            home=entry["home"],
            modules=tuple(entry["modules"]),
            offers=tuple(entry["offers"]),
        )
        for slug, entry in sorted(table.items())
    }


def card(slug: str) -> Card:
    """The card of one system.

    Raises:
        UnknownName: there is no such system; the message offers the nearest names.
    """
    if slug not in cards():
        raise unknown("system", slug, cards())
    return cards()[slug]


@cache
def models() -> dict[str, str]:
    """Every model name -> the module (relative to the package) whose `VARIANTS` table defines it."""
    table: dict[str, str] = {}
    for path in sorted((_PACKAGE / "networks").rglob("*.py")):
        module = ".".join(path.relative_to(_PACKAGE).with_suffix("").parts).removesuffix(".__init__")
        table.update(dict.fromkeys(_variants(module), module))
    return table


def model_module(name: str) -> str:
    """The full module name that defines the model ``name``.

    Raises:
        UnknownName: there is no such model; the message offers the nearest names.
    """
    if name not in models():
        raise unknown("model", name, models())
    return f"convatlas.{models()[name]}"


def experiment_module(slug: str) -> str:
    """The full module name of the experiment that tests the claims of one system.

    Raises:
        UnknownName: there is no such system.
        Unsupported: the system is not part of this version yet.
    """
    module = f"experiments.{card(slug).slug}"
    if _source(module) is None:
        raise Unsupported(f"{slug} is not part of this version; 'convatlas list --available' shows what is")
    return f"convatlas.{module}"


@cache
def benchmarks() -> dict[str, str]:
    """Every benchmark by name, with the first sentence of its file."""
    found = {}
    for path in sorted((_PACKAGE / "bench").glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if any(isinstance(node, ast.FunctionDef) and node.name == "run" for node in tree.body):
            found[path.stem] = (ast.get_docstring(tree) or "").partition("\n")[0]
    return found


def bench_module(name: str) -> str:
    """The full module name of a benchmark.

    Raises:
        UnknownName: there is no such benchmark; the message offers the nearest names.
    """
    if name not in benchmarks():
        raise unknown("benchmark", name, benchmarks())
    return f"convatlas.bench.{name}"


def resolve(target: str) -> Any:
    """Import ``"module:name"`` below the package and return the named object."""
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(f"convatlas.{module}"), name)


def public_names(module: str) -> tuple[str, ...]:
    """The names in ``__all__`` of a module given relative to the package, read without importing it."""
    value = _assigned(module, "__all__")
    if not isinstance(value, ast.List | ast.Tuple):
        return ()
    return tuple(str(item.value) for item in value.elts if isinstance(item, ast.Constant))


def _variants(module: str) -> tuple[str, ...]:
    value = _assigned(module, "VARIANTS")
    if not isinstance(value, ast.Dict):
        return ()
    return tuple(str(key.value) for key in value.keys if isinstance(key, ast.Constant))


def _source(module: str) -> Path | None:
    stem = _PACKAGE.joinpath(*module.split("."))
    return next((path for path in (stem.with_suffix(".py"), stem / "__init__.py") if path.is_file()), None)


@cache
def _assigned(module: str, name: str) -> ast.expr | None:
    """The expression that a module assigns to a top-level name, read from its source."""
    path = _source(module)
    text = path.read_text(encoding="utf-8") if path else ""
    if name not in text:
        return None
    for node in ast.parse(text).body:
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(isinstance(target, ast.Name) and target.id == name for target in targets):
                return node.value
    return None
