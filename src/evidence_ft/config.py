"""What an experiment can be told, read strictly from YAML and dotted flags.

Data sets and methods bring their own `Config`; which one applies is decided by ``data.format`` and
``method.name``: the name of a file in ``datasets`` and ``methods``, or the dotted path of a module elsewhere. All is
checked before anything is loaded: an unknown key, a wrong type or a bad choice is one error that names the dotted key.
"""

import argparse
import importlib
import pkgutil
import sys
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Generic, Literal, NamedTuple, TypeVar, get_args

import tyro
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from evidence_ft.training import TrainerConfig

Arm = Literal["zero_shot", "baseline", "evidence"]
D = TypeVar("D", bound=BaseModel)
M = TypeVar("M", bound=BaseModel)


class ConfigError(ValueError):
    """A setting that cannot be; the message names its dotted key and where it was read."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class RunConfig(_Section):
    """What is run, and where it is written."""

    name: str = Field("quickstart", pattern=r"^\w[\w.-]*$", description="folder of the run")
    directory: Path = Field(Path("runs"), description="folder of all runs")
    seed: int = Field(0, ge=0, description="of training: order of images, augmentation")
    arms: tuple[Arm, ...] = Field(
        ("zero_shot", "baseline", "evidence"), min_length=1, description="what is run, then compared"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto is what accelerate launch chose")

    @field_validator("arms")
    @classmethod
    def _each_once(cls, arms: tuple[Arm, ...]) -> tuple[Arm, ...]:
        return tuple(dict.fromkeys(arms))


class ModelConfig(_Section):
    """What is fine-tuned."""

    backbone: str = Field("open_clip", description="file in evidence_ft/backbones, or a dotted module path")
    checkpoint: str = Field(
        "toy_clip",
        description="toy_clip, hf-hub:<owner>/<name>, local-dir:<folder>, or <architecture>/<tag or file>",
    )


class EvidenceConfig(_Section):
    """The evidence loss of the regularised arm."""

    heatmap: str = Field("gradient_attention", description="file in evidence_ft/heatmaps, or a dotted module path")
    layers: tuple[int, ...] | Literal["all"] = Field(
        "all", description="blocks the heatmap is made from; negative numbers count from the end"
    )
    alignment: str = Field("outside_mass", description="file in evidence_ft/alignments, or a dotted module path")
    weight: float = Field(1.0, ge=0, description="of the evidence loss; 0 makes the evidence arm a baseline")


class EvaluationConfig(_Section):
    """How all arms are judged; apart from how one of them was trained."""

    heatmap: str = Field("gradient_attention", description="file in evidence_ft/heatmaps, or a dotted module path")
    layers: tuple[int, ...] | Literal["all"] = Field("all", description="blocks the heatmap is made from")
    explain: Literal["label", "prediction"] = Field("label", description="class whose score is explained")
    threshold: float = Field(0.5, gt=0, le=1, description="RMA from which evidence is valid")
    batch_size: int = Field(64, gt=0, description="images per process")
    gallery: int = Field(12, ge=0, description="test images shown with their heatmaps, per split")
    swap_seed: int = Field(0, ge=0, description="which background goes to which object")


class ExperimentConfig(_Section, Generic[D, M]):
    """Everything that decides an experiment."""

    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig()
    data: D
    method: M
    evidence: EvidenceConfig = EvidenceConfig()
    training: TrainerConfig = TrainerConfig()
    evaluation: EvaluationConfig = EvaluationConfig()


_EXPORTS = {
    "alignments": ("loss",),
    "backbones": ("load",),
    "datasets": ("Config", "load"),
    "heatmaps": ("heatmap",),
    "methods": ("Config", "prepare"),
}


def component(family: str, name: str) -> ModuleType:
    """The module that a name stands for: a file of the family, or any module at a dotted path.

    Raises:
        ConfigError: no such module, or one that does not export what its family does.

    Example:
        >>> component("alignments", "outside_mass").__name__
        'evidence_ft.alignments.outside_mass'
    """
    path = name if "." in name else f"evidence_ft.{family}.{name}"
    try:
        module = importlib.import_module(path)
    except ModuleNotFoundError as error:
        if not f"{path}.".startswith(f"{error.name}."):
            raise  # the module is there; something it imports is not
        package = importlib.import_module(f"evidence_ft.{family}")
        known = sorted(module.name for module in pkgutil.iter_modules(package.__path__))
        near = get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(
            f"no {family} named {name!r}; {hint}there are {', '.join(known)}, or a dotted path to a module of yours"
        ) from error
    missing = [export for export in _EXPORTS[family] if not hasattr(module, export)]
    if missing:
        raise ConfigError(f"module {path!r} is no member of {family}: it has no {' and no '.join(missing)}")
    return module


def parse(tree: dict[str, Any], source: str = "config") -> ExperimentConfig[Any, Any]:
    """A nested mapping to a checked configuration.

    Args:
        tree: as read from YAML.
        source: named in errors.

    Raises:
        ConfigError: one line per complaint, each with its dotted key.
    """
    kind = _config_class(tree, source)
    try:
        config = kind.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(_complaints(error, kind, source))) from error
    component("backbones", config.model.backbone)
    component("heatmaps", config.evidence.heatmap)
    component("heatmaps", config.evaluation.heatmap)
    component("alignments", config.evidence.alignment)
    return config


def read(path: Path) -> dict[str, Any]:
    """A YAML file to a nested mapping.

    Raises:
        ConfigError: no file, no YAML, or no mapping.
    """
    try:
        tree = yaml.safe_load(path.expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read config {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {error}") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} holds a {type(tree).__name__}, expected sections such as 'training:'")
    return tree


def dump(config: ExperimentConfig[Any, Any]) -> str:
    """The resolved configuration as YAML that `parse` reads back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, width=110)


def parse_command_line(
    default: Path, description: str, arguments: Sequence[str] | None = None
) -> ExperimentConfig[Any, Any]:
    """YAML plus dotted flags: ``--config my.yaml --evidence.weight 0``.

    ``--print-config`` prints the resolved configuration and exits; ``--help`` lists every flag of the chosen data
    format and method.

    Args:
        default: configuration without ``--config``.
        description: shown by ``--help``.
        arguments: the command line's by default.

    Raises:
        SystemExit: 0 after ``--help`` or ``--print-config``, 2 after a complaint.
    """
    try:
        return _parse_command_line(default, description, sys.argv[1:] if arguments is None else arguments)
    except ConfigError as error:
        sys.stderr.write(f"{error}\n")
        raise SystemExit(2) from error


def _parse_command_line(default: Path, description: str, arguments: Sequence[str]) -> ExperimentConfig[Any, Any]:
    # The flags depend on the data format and the method, so those are looked up first.
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--config", type=Path, default=default)
    early.add_argument("--data.format", dest="data")
    early.add_argument("--method.name", dest="method")
    first, _ = early.parse_known_args(list(arguments))
    source = str(first.config)
    tree = read(first.config)
    replaced: list[str] = []
    for section, name in (("data", first.data), ("method", first.method)):
        if name is not None and name != _kind_of(tree, section, source):
            tree[section] = {_SECTIONS[section].key: name}  # another kind has other keys
            replaced.append(section)
    kind = _config_class(tree, source)
    defaults = _with_blanks(kind, tree, replaced, source) if replaced else parse(tree, source)

    fields: Any = kind  # known at run time only

    class Command(BaseModel):
        config: Annotated[Path, Field(description="YAML file; flags win over it")] = first.config
        print_config: Annotated[bool, Field(description="print the resolved configuration and exit")] = False
        experiment: Annotated[fields, tyro.conf.arg(name="")] = defaults

    command, unknown = tyro.cli(
        Command,
        args=arguments,
        description=description,
        return_unknown_args=True,
        config=(tyro.conf.AvoidSubcommands,),
    )
    if unknown:
        if not unknown[0].startswith("-"):
            raise ConfigError(f"command line: {unknown[0]!r} is no flag; write --evidence.weight 0")
        flags = {f"--{key}".replace("_", "-") for key in ("config", "print_config", *_keys(kind))}
        named = [argument for argument in unknown if argument.startswith("-")]
        raise ConfigError("\n".join(_unknown(argument, sorted(flags), "command line") for argument in named))
    chosen: BaseModel = command.experiment
    config = parse(chosen.model_dump(), "command line")
    if command.print_config:
        sys.stdout.write(dump(config))
        raise SystemExit(0)
    return config


class _Kinds(NamedTuple):
    """A section whose fields depend on the kind that is named in it."""

    family: str
    key: str
    default: str


_SECTIONS = {"data": _Kinds("datasets", "format", "shapes"), "method": _Kinds("methods", "name", "flcp")}


def _kind_of(tree: dict[str, Any], section: str, source: str) -> str:
    values = tree.get(section)
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise ConfigError(f"{source}: {section} is {values!r}, expected a section with keys")
    kinds = _SECTIONS[section]
    name = values.get(kinds.key, kinds.default)
    if not isinstance(name, str):
        raise ConfigError(f"{source}: {section}.{kinds.key} is {name!r}, expected a name such as {kinds.default!r}")
    return name


def _config_class(tree: dict[str, Any], source: str) -> type[ExperimentConfig[Any, Any]]:
    """The configuration whose ``data`` and ``method`` have the fields of the named kinds."""
    kind: Any = ExperimentConfig
    classes: list[type[BaseModel]] = []
    for section, kinds in _SECTIONS.items():
        name = _kind_of(tree, section, source)
        tree[section] = {**(tree.get(section) or {}), kinds.key: name}
        try:
            classes.append(component(kinds.family, name).Config)
        except ConfigError as error:
            raise ConfigError(f"{source}: {section}.{kinds.key}: {error}") from error
    chosen: type[ExperimentConfig[Any, Any]] = kind[tuple(classes)]
    return chosen


def _with_blanks(
    kind: type[ExperimentConfig[Any, Any]], tree: dict[str, Any], sections: Sequence[str], source: str
) -> ExperimentConfig[Any, Any]:
    """Defaults in which what the replaced sections cannot do without is left for the flags to fill."""
    base = parse({key: value for key, value in tree.items() if key not in sections}, source)
    filled = {}
    for section in sections:
        fields = kind.model_fields[section].annotation
        if not (isinstance(fields, type) and issubclass(fields, BaseModel)):
            raise TypeError(f"{section} of {kind} is no model")
        missing = {name: tyro.MISSING for name, field in fields.model_fields.items() if field.is_required()}
        filled[section] = fields.model_construct(**missing)
    return kind.model_construct(**{**{name: getattr(base, name) for name in kind.model_fields}, **filled})


def _complaints(error: ValidationError, kind: type[BaseModel], source: str) -> Iterator[str]:
    for detail in error.errors():
        # Members of a union appear in the location by their type; they are no keys.
        path = [str(part) for part in detail["loc"]]
        known = list(_keys(kind))
        while ".".join(path) not in known and not path[-1].isdigit() and ".".join(path[:-1]) in known:
            path.pop()
        key = ".".join(path)
        found = detail["input"]
        if detail["type"] == "extra_forbidden":
            yield _unknown(".".join(str(part) for part in detail["loc"]), known, source)
        elif detail["type"] == "missing":
            yield f"{source}: {key} is missing; it has no default"
        else:
            message = detail["msg"][:1].lower() + detail["msg"][1:]
            yield f"{source}: {key} = {found!r} ({type(found).__name__}): {message}"


def _unknown(key: str, known: Sequence[str], source: str) -> str:
    near = get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else "--help lists what there is"
    return f"{source}: unknown key {key!r}; {hint}"


def _keys(kind: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every dotted key of a configuration, sections included."""
    for name, field in kind.model_fields.items():
        yield f"{prefix}{name}"
        for option in (field.annotation, *get_args(field.annotation)):
            if isinstance(option, type) and issubclass(option, BaseModel):
                yield from _keys(option, f"{prefix}{name}.")
