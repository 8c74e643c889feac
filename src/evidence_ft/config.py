"""What an experiment can be told, read strictly from YAML and dotted flags.

Data sets and methods bring their own `Config`; which one applies is decided by ``data.format`` and
``method.name``: the name of a file in ``datasets`` and ``methods``, or the dotted path of a module elsewhere. All is
checked before anything is loaded: an unknown key, a wrong type or a bad choice is one error that names the dotted key.

A file can serve several methods: what stands under ``methods.<name>``, such as a learning rate, is laid over the rest
where that method is run, and nowhere else.
"""

import argparse
import importlib
import pkgutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, make_dataclass
from difflib import get_close_matches
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Generic, Literal, NamedTuple, TypeVar, get_args

import tyro
import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator
from pydantic.fields import FieldInfo

from evidence_ft.complaints import complaints
from evidence_ft.installation import InstallationError, explained
from evidence_ft.trainer_config import TrainerConfig

Arm = Literal["zero_shot", "baseline", "evidence", "swap", "evidence_swap"]
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
    seed: int = Field(0, ge=0, description="of training: order of images, augmentation, heads, held-out images")
    arms: tuple[Arm, ...] = Field(
        ("zero_shot", "baseline", "evidence"),
        min_length=1,
        description="what is run, then compared; swap is the baseline with background-swap augmentation",
    )
    validation_share: float = Field(
        0.0, ge=0, lt=1, description="of the training images of each class, held out for evaluations while training"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto is what accelerate launch chose")
    threads: int | None = Field(
        None, gt=0, description="of the CPU, per process; sums, and so results, differ a little with their number"
    )
    resume: bool = Field(False, description="keep finished arms, and continue the one that was interrupted")
    report_to: tuple[str, ...] = Field((), description="trackers, such as tensorboard, wandb, trackio or mlflow")

    @field_validator("arms")
    @classmethod
    def _each_once(cls, arms: tuple[Arm, ...]) -> tuple[Arm, ...]:
        return tuple(dict.fromkeys(arms))


class ModelConfig(_Section):
    """What is fine-tuned."""

    backbone: str = Field("open_clip", description="file in evidence_ft/backbones, or a dotted module path")
    checkpoint: str = Field(
        "toy_clip",
        description="hf-hub:<owner>/<name>, local-dir:<folder>; of open_clip also toy_clip and "
        "<architecture>/<tag or file>, of timm_vit timm:<name>, of albef and hf_blip the authors' files, such as "
        "ALBEF.pth@384",
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
    interpolation: float = Field(
        1.0, ge=0, le=1, description="share of the tuned weights in what is judged and saved; the rest is the start's"
    )


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
        InstallationError: a library that it needs is missing, or torchvision does not fit torch.

    Example:
        >>> component("alignments", "outside_mass").__name__
        'evidence_ft.alignments.outside_mass'
    """
    path = name if "." in name else f"evidence_ft.{family}.{name}"
    with explained(path):
        try:
            module = importlib.import_module(path)
        except ModuleNotFoundError as error:
            if not f"{path}.".startswith(f"{error.name}."):
                raise  # the module is there; something it imports is not
            known = _names(family)
            near = get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ConfigError(
                f"no {family} named {name!r}; {hint}there are {', '.join(known)}, or a dotted path to a module of yours"
            ) from error
    missing = [export for export in _EXPORTS[family] if not hasattr(module, export)]
    if missing:
        raise ConfigError(f"module {path!r} is no member of {family}: it has no {' and no '.join(missing)}")
    return module


def _names(family: str) -> list[str]:
    package = importlib.import_module(f"evidence_ft.{family}")
    return sorted(module.name for module in pkgutil.iter_modules(package.__path__))


def parse(tree: Mapping[str, Any], source: str = "config", *, method: str | None = None) -> ExperimentConfig[Any, Any]:
    """A nested mapping to a checked configuration.

    Args:
        tree: as read from YAML.
        source: named in errors.
        method: whose section under ``methods`` counts, where the tree itself names no ``method.name``.

    Raises:
        ConfigError: one line per complaint, each with its dotted key.
    """
    tree = _for_method(tree, method, source)
    kind = _config_class(tree, source)
    try:
        config = kind.model_validate(tree)
    except ValidationError as error:
        raise _config_error(error, kind, source) from error
    component("backbones", config.model.backbone)
    component("heatmaps", config.evidence.heatmap)
    component("heatmaps", config.evaluation.heatmap)
    component("alignments", config.evidence.alignment)
    return config


def _for_method(tree: Mapping[str, Any], method: str | None, source: str) -> dict[str, Any]:
    """The tree with its section for one method laid over the rest, and that method named in it."""
    sections = _section(tree, "methods", source)
    for name in sections:
        own = _section(_section(sections, name, f"{source}: methods"), "method", f"{source}: methods.{name}")
        _component_of("methods", own.get("name", name), f"{source}: methods.{name}")
    chosen = _section(tree, "method", source).get("name", method or _SECTIONS["method"].default)
    rest = {key: values for key, values in tree.items() if key != "methods"}
    laid = _laid_over(rest, sections.get(chosen, {}) if isinstance(chosen, str) else {})
    laid["method"] = {"name": chosen, **_section(laid, "method", source)}
    return laid


def _laid_over(tree: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    laid = dict(tree)
    for key, value in top.items():
        below = laid.get(key)
        if isinstance(below, Mapping) and isinstance(value, Mapping):
            value = _laid_over(below, value)
        laid[key] = value
    return laid


def _section(tree: Mapping[str, Any], name: str, source: str) -> dict[str, Any]:
    values = tree.get(name)
    if values is None:
        return {}
    if not isinstance(values, Mapping):
        raise ConfigError(f"{source}: {name} is {values!r}, expected a section with keys")
    return dict(values)


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
    default: Path,
    description: str,
    arguments: Sequence[str] | None = None,
    *,
    method: str | None = None,
    arms: Sequence[Arm] | None = None,
) -> ExperimentConfig[Any, Any]:
    """YAML plus dotted flags: ``--config my.yaml --evidence.weight 0``.

    ``--print-config`` prints the resolved configuration and exits; ``--help`` lists every flag of the chosen data
    format and method.

    Args:
        default: configuration without ``--config``.
        description: shown by ``--help``.
        arguments: the command line's by default.
        method: ``method.name`` where neither the file nor a flag says otherwise.
        arms: ``run.arms``, likewise.

    Raises:
        SystemExit: 0 after ``--help`` or ``--print-config``, 2 after a complaint.
    """
    try:
        arguments = sys.argv[1:] if arguments is None else arguments
        return _parse_command_line(default, description, arguments, method, arms)
    except (ConfigError, InstallationError) as error:
        sys.stderr.write(f"{error}\n")
        raise SystemExit(2) from error


def _parse_command_line(
    default: Path, description: str, arguments: Sequence[str], method: str | None, arms: Sequence[Arm] | None
) -> ExperimentConfig[Any, Any]:
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
        key = _SECTIONS[section].key
        values = _section(tree, section, source)
        if name is not None and name != values.get(key):
            # Another kind has other keys; what stands there without naming a kind holds for all.
            tree[section] = {key: name} if key in values else {**values, key: name}
            replaced.append(section)
    tree = _for_method(tree, method, source)
    if arms is not None:
        tree["run"] = {"arms": tuple(arms), **_section(tree, "run", source)}
    kind = _config_class(tree, source)
    _check_flags(arguments, kind)
    blanks = {section: missing for section in replaced if (missing := _missing(kind, section, tree[section]))}
    defaults = _with_blanks(kind, tree, blanks, source) if blanks else parse(tree, source)
    unchecked = _unchecked(defaults)
    fields: Any = type(unchecked)  # known at run time only

    @dataclass
    class Command:
        config: Annotated[Path, tyro.conf.arg(help="YAML file; flags win over it")] = first.config
        print_config: Annotated[bool, tyro.conf.arg(help="print the resolved configuration and exit")] = False
        experiment: Annotated[fields, tyro.conf.arg(name="")] = field(default_factory=lambda: unchecked)

    command, rest = tyro.cli(Command, args=arguments, description=description, return_unknown_args=True)
    if rest:
        raise ConfigError(f"command line: {_superfluous(rest[0], arguments, kind)}")
    chosen = asdict(command.experiment)
    for section in _left_out(defaults):
        if not _mentions(arguments, section):
            _set(chosen, section, None)
    config = parse(chosen, "command line")
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


def _config_class(tree: dict[str, Any], source: str) -> type[ExperimentConfig[Any, Any]]:
    """The configuration whose ``data`` and ``method`` have the fields of the named kinds."""
    kind: Any = ExperimentConfig
    classes: list[type[BaseModel]] = []
    for section, kinds in _SECTIONS.items():
        values = _section(tree, section, source)
        name = values.setdefault(kinds.key, kinds.default)
        tree[section] = values
        classes.append(_component_of(kinds.family, name, f"{source}: {section}.{kinds.key}").Config)
    chosen: type[ExperimentConfig[Any, Any]] = kind[tuple(classes)]
    return chosen


def _component_of(family: str, name: Any, source: str) -> ModuleType:
    if not isinstance(name, str):
        raise ConfigError(f"{source} is {name!r}, expected a name such as {next(iter(_names(family)))!r}")
    try:
        return component(family, name)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error


def _missing(kind: type[ExperimentConfig[Any, Any]], section: str, values: Mapping[str, Any]) -> list[str]:
    """What a section cannot do without and does not have."""
    return [n for n, field in _fields_of(kind, section).model_fields.items() if field.is_required() and n not in values]


def _fields_of(kind: type[ExperimentConfig[Any, Any]], section: str) -> type[BaseModel]:
    fields = kind.model_fields[section].annotation
    if not (isinstance(fields, type) and issubclass(fields, BaseModel)):
        raise TypeError(f"{section} of {kind} is no model")
    return fields


def _with_blanks(
    kind: type[ExperimentConfig[Any, Any]], tree: dict[str, Any], blanks: Mapping[str, Sequence[str]], source: str
) -> ExperimentConfig[Any, Any]:
    """Defaults in which what some sections cannot do without is left for the flags to fill."""
    base = parse({key: value for key, value in tree.items() if key not in blanks}, source)
    filled = {
        section: _fields_of(kind, section).model_construct(**{**tree[section], **dict.fromkeys(missing, tyro.MISSING)})
        for section, missing in blanks.items()
    }
    return kind.model_construct(**{**{name: getattr(base, name) for name in kind.model_fields}, **filled})


def _config_error(error: ValidationError, kind: type[BaseModel], source: str) -> ConfigError:
    known = list(_keys(kind))

    def key_of(path: Sequence[int | str]) -> str:
        parts = [str(part) for part in path]
        length = next((n for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in known), 0)
        key, rest = ".".join(parts[:length]), parts[length:]
        if key and not any(other.startswith(f"{key}.") for other in known):
            # Members of a union appear in the path by their type; they are no keys.
            rest = [part for part in rest if part.isdigit()]
        return ".".join([key, *rest] if key else rest)

    found = complaints(error, key_of=key_of, of_unknown=lambda key: _unknown(key, known))
    return ConfigError("\n".join(f"{source}: {complaint}" for complaint in found))


def _unknown(key: str, known: Sequence[str]) -> str:
    near = _nearest(key, known)
    return f"unknown key {key!r}; {f'did you mean {near!r}?' if near else '--help lists what there is'}"


def _nearest(key: str, known: Sequence[str]) -> str | None:
    """What was meant by a key that does not exist: by its initials, by its last part elsewhere, or by its letters.

    Example:
        >>> known = ["training.learning_rate", "training.epochs", "evidence.weight"]
        >>> [_nearest(key, known) for key in ("training.lr", "epochs", "evidence.wieght", "colour")]
        ['training.learning_rate', 'training.epochs', 'evidence.weight', None]
    """
    section, _, name = key.rpartition(".")
    beside = [other for other in known if other.rpartition(".")[0] == section]
    for among in (beside, known):
        for other in among:
            last = other.rpartition(".")[2]
            if name in (last, "".join(word[0] for word in last.split("_"))):
                return other
    near = get_close_matches(key, beside, n=1, cutoff=0.8) or get_close_matches(key, known, n=1, cutoff=0.5)
    return near[0] if near else None


def _keys(kind: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every dotted key of a configuration, sections included."""
    for name, setting in kind.model_fields.items():
        yield f"{prefix}{name}"
        if section := _section_of(setting):
            yield from _keys(section, f"{prefix}{name}.")


def _section_of(setting: FieldInfo) -> type[BaseModel] | None:
    """The model of a field that is a section, even if it may be left out."""
    options = (setting.annotation, *get_args(setting.annotation))
    return next((option for option in options if isinstance(option, type) and issubclass(option, BaseModel)), None)


# Flags


def _unchecked(values: BaseModel) -> Any:
    """The same fields with the same defaults, as a dataclass that checks nothing.

    A flag may need another one, so nothing can be checked before all have been read. Sections that are left out are
    there with their own defaults, because a flag may set a key of theirs.
    """
    fields: list[Any] = []
    for name, setting in type(values).model_fields.items():
        value, section = getattr(values, name), _section_of(setting)
        annotation: Any = setting.annotation
        if section is not None:
            value = _unchecked(section() if value is None else value)
            annotation = type(value)
        described = Annotated[annotation, tyro.conf.arg(help=setting.description)]
        fields.append((name, described, field(default_factory=partial(_itself, value))))
    return make_dataclass(type(values).__name__, fields)()


def _itself(value: Any) -> Any:
    return value


def _left_out(values: BaseModel, prefix: str = "") -> Iterator[str]:
    """Dotted keys of sections that are None."""
    for name, setting in type(values).model_fields.items():
        value = getattr(values, name)
        if value is None and _section_of(setting):
            yield f"{prefix}{name}"
        if isinstance(value, BaseModel):
            yield from _left_out(value, f"{prefix}{name}.")


def _flags(arguments: Sequence[str]) -> Iterator[tuple[str, str, list[str]]]:
    """Each flag as it was written, its dotted key, and what follows it."""
    starts = [position for position, argument in enumerate(arguments) if argument.startswith("--")]
    for start, end in pairwise([*starts, len(arguments)]):
        flag, _, value = arguments[start].partition("=")
        values = [value] if "=" in arguments[start] else []
        yield flag, flag.removeprefix("--").replace("-", "_"), [*values, *arguments[start + 1 : end]]


def _mentions(arguments: Sequence[str], section: str) -> bool:
    return any(key.startswith(f"{section}.") for _, key, _ in _flags(arguments))


def _check_flags(arguments: Sequence[str], kind: type[BaseModel]) -> None:
    """Flags that do not exist, and values that cannot be, in one error that names them all."""
    known, wrong = list(_keys(kind)), []
    others = ("config", "print_config")
    for flag, key, values in _flags(arguments):
        section, _, name = key.rpartition(".")
        positive = f"{section}.{name.removeprefix('no_')}"
        if key in ("help", "h", *others, "no_print_config"):
            continue
        setting = _setting(kind, positive)
        if key not in known and (setting is None or setting.annotation is not bool):
            spelt = [f"--{other}".replace("_", "-") for other in (*others, *known)]
            near = _nearest(key, [*others, *known])
            hint = f"did you mean {spelt[[*others, *known].index(near)]!r}?" if near else "--help lists what there is"
            wrong.append(f"unknown key {flag!r}; {hint}")
        elif setting is None or _section_of(setting):
            wrong.append(
                f"{flag} is a section; set its keys, such as --{_first_of(known, key)}, or all of it in the YAML"
            )
        elif setting.annotation is not bool and (complaint := _complaint(setting, key, values)):
            wrong.append(complaint)
    if wrong:
        raise ConfigError("\n".join(f"command line: {each}" for each in wrong))


def _first_of(known: Sequence[str], section: str) -> str:
    return next(key for key in known if key.startswith(f"{section}.")).replace("_", "-")


def _setting(kind: type[BaseModel], key: str) -> FieldInfo | None:
    name, _, rest = key.partition(".")
    setting = kind.model_fields.get(name)
    if setting is None or not rest:
        return setting
    section = _section_of(setting)
    return None if section is None else _setting(section, rest)


def _complaint(setting: FieldInfo, key: str, values: Sequence[str]) -> str | None:
    """What is wrong with the values of a flag by themselves, if anything."""
    annotation: Any = setting.annotation
    checked: TypeAdapter[Any] = TypeAdapter(Annotated[annotation, setting])
    first = [None if value == "None" else value for value in values[:1]]
    complaint = None
    for candidate in (*first, list(values)):
        try:
            checked.validate_python(candidate)
        except ValidationError as error:
            found = complaints(error, key_of=lambda _: key)[0]
            if complaint is None or complaint.endswith("expected a list"):  # then what is wrong with its entries
                complaint = found if values else found.replace(f"{key} = []", f"{key} has no value")
        else:
            return None
    return complaint


def _superfluous(word: str, arguments: Sequence[str], kind: type[BaseModel]) -> str:
    for flag, key, values in _flags(arguments):
        section, _, name = flag.rpartition(".")
        setting = _setting(kind, key)
        is_switch = setting is not None and setting.annotation is bool
        if word in values[0 if is_switch else 1 :]:
            takes = f"a switch takes none: {flag} or {section}.no-{name}" if is_switch else "it takes one"
            return f"{word!r} after {flag} is one value too many; {takes}"
    return f"{word!r} is no flag; write --evidence.weight 0"


def _set(tree: dict[str, Any], key: str, value: Any) -> None:
    *path, last = key.split(".")
    for name in path:
        tree = tree[name]
    tree[last] = value
