import re
from pathlib import Path

import pytest
import yaml

from evidence_ft.config import ConfigError, component, dump, parse, parse_command_line, read

CONFIGS = sorted((Path(__file__).resolve().parents[1] / "configs").glob("*.yaml"))
DEFAULT = Path(__file__).resolve().parents[1] / "configs" / "shapes.yaml"
METHODS = ("zero_shot", "lp", "flcp", "ft", "lora", "coop", "clip_adapter", "tip_adapter", "lp_ft")


def command_line(*arguments, default=DEFAULT, **choices):
    return parse_command_line(default, "A recipe.", arguments, **choices)


def test_there_are_configs_to_check():
    assert {path.stem for path in CONFIGS} >= {"shapes", "own_data", "tiny_imagenet_boxes", "white_blood_cells"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_parses_its_names_resolve_and_it_opens_with_its_command(path):
    config = parse(read(path), str(path))
    assert parse(yaml.safe_load(dump(config))) == config
    assert path.read_text().startswith("# accelerate launch recipes/flcp_evidence.py")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_serves_every_method(path):
    for method in {*METHODS, *read(path).get("methods", {})}:
        config = parse(read(path), str(path), method=method)
        assert config.method.name == {"tip_adapter_f": "tip_adapter", "wise_ft": "ft"}.get(method, method)
        assert parse(yaml.safe_load(dump(config))) == config


SERVING_METHODS = {
    "method": {"templates": "a cell of {}"},
    "training": {"epochs": 3, "learning_rate": 1e-5},
    "methods": {
        "lp": {"training": {"learning_rate": 0.1}, "method": {"head": "random"}},
        "probe_of_prompts": {"method": {"name": "lp"}, "run": {"arms": ["baseline"]}},
    },
}


class TestMethods:
    """What stands under ``methods`` counts for that method alone."""

    def test_is_laid_over_the_rest(self):
        config = parse(SERVING_METHODS, method="lp")
        assert (config.method.name, config.method.head) == ("lp", "random")
        assert config.method.templates == ("a cell of {}",)
        assert (config.training.epochs, config.training.learning_rate) == (3, 0.1)

    def test_is_ignored_for_others(self):
        config = parse(SERVING_METHODS, method="ft")
        assert (config.method.name, config.training.learning_rate) == ("ft", 1e-5)
        assert parse(SERVING_METHODS).method.name == "flcp"

    def test_can_be_a_variant_of_a_method(self):
        config = parse(SERVING_METHODS, method="probe_of_prompts")
        assert (config.method.name, config.method.head, config.run.arms) == ("lp", "zero_shot", ("baseline",))

    def test_the_method_that_a_file_names_wins(self):
        tree = SERVING_METHODS | {"method": {"name": "lp"}}
        assert parse(tree, method="ft").training.learning_rate == 0.1

    def test_is_chosen_by_a_flag(self, tmp_path):
        file = tmp_path / "mine.yaml"
        file.write_text(yaml.safe_dump(SERVING_METHODS))
        config = command_line("--config", str(file), "--method.name", "lp", "--training.epochs", "5", method="ft")
        assert (config.method.name, config.training.learning_rate, config.training.epochs) == ("lp", 0.1, 5)
        assert config.method.templates == ("a cell of {}",)
        assert command_line("--config", str(file), method="ft").method.name == "ft"

    @pytest.mark.parametrize(
        ("methods", "message"),
        [
            ({"lpp": {}}, "my.yaml: methods.lpp: no methods named 'lpp'; did you mean 'lp'?"),
            ({"mine": {"method": {"name": "lpp"}}}, "my.yaml: methods.mine: no methods named 'lpp'"),
            ({"lp": 3}, "my.yaml: methods: lp is 3, expected a section with keys"),
            ({"flcp": {"trainin": {}}}, "unknown key 'trainin'; did you mean 'training'?"),
            (["lp"], "my.yaml: methods is ['lp'], expected a section"),
        ],
    )
    def test_mistakes_are_named(self, methods, message):
        with pytest.raises(ConfigError, match=re.escape(message)):
            parse({"methods": methods}, "my.yaml")


def test_a_file_wins_over_what_a_recipe_presets_and_flags_win_over_both(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("run: {arms: [evidence]}\nmethod: {name: ft}\n")
    choices = {"method": "lp", "arms": ("zero_shot", "baseline")}
    assert command_line(**choices).run.arms == ("zero_shot", "baseline")
    assert command_line(**choices).method.name == "lp"
    config = command_line("--config", str(file), **choices)
    assert (config.run.arms, config.method.name) == (("evidence",), "ft")
    config = command_line("--config", str(file), "--run.arms", "swap", "--method.name", "lora", **choices)
    assert (config.run.arms, config.method.name) == (("swap",), "lora")


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_its_flags(method):
    config = command_line("--method.templates", "the {}", "--run.seed", "3", method=method)
    assert (config.method.templates, config.run.seed) == (("the {}",), 3)


def test_flags_win_over_the_file():
    config = command_line("--evidence.weight", "0", "--evidence.layers", "-1", "-2", "--run.arms", "baseline")
    assert config.evidence.weight == 0
    assert config.evidence.layers == (-1, -2)
    assert config.run.arms == ("baseline",)
    assert config.data.format == "shapes"


def test_dashes_and_underscores_are_the_same():
    assert command_line("--data.on-bad-sample", "skip").data.on_bad_sample == "skip"
    assert command_line("--data.on_bad_sample", "skip").data.on_bad_sample == "skip"


class TestSectionsThatAreLeftOut:
    """``training.early_stopping`` is None unless something is set in it."""

    def test_are_there_once_a_flag_sets_one_of_their_keys(self):
        config = command_line("--training.early-stopping.metric", "PT", "--training.evaluate-every", "5")
        assert (config.training.early_stopping.metric, config.training.early_stopping.patience) == ("PT", 3)
        assert command_line("--training.evaluate-every", "5").training.early_stopping is None

    def test_come_back_by_a_flag_where_the_file_leaves_them_out(self, tmp_path):
        file = tmp_path / "mine.yaml"
        file.write_text("training: {augmentation: null}\n")
        assert command_line("--config", str(file)).training.augmentation is None
        assert (
            command_line("--config", str(file), "--training.augmentation.no-flip").training.augmentation.flip is False
        )


def test_all_mistakes_on_the_command_line_are_named_at_once(capsys):
    with pytest.raises(SystemExit):
        command_line("--training.lr", "1", "--training.epochs", "ten")
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_a_config_file_replaces_the_default(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("training: {learning_rate: 1e-4}\nrun: {name: mine}\n")
    config = command_line("--config", str(file), "--run.seed", "3")
    assert config.training.learning_rate == 1e-4  # YAML 1.1 reads 1e-4 as text
    assert (config.run.name, config.run.seed) == ("mine", 3)


def test_another_data_format_brings_its_own_flags():
    config = command_line("--data.format", "manifest", "--data.file", "labels.csv", "--data.mask-threshold", "0.25")
    assert config.data.file == Path("labels.csv")
    assert config.data.mask_threshold == 0.25


def test_what_another_data_format_cannot_do_without_is_asked_for(capsys):
    with pytest.raises(SystemExit) as stopped:
        command_line("--data.format", "manifest")
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    assert "--data.file" in captured.err + captured.out


def test_print_config_prints_what_parses_back(capsys):
    with pytest.raises(SystemExit) as stopped:
        command_line("--print-config", "--evidence.weight", "0.5")
    assert stopped.value.code == 0
    assert parse(yaml.safe_load(capsys.readouterr().out)) == command_line("--evidence.weight", "0.5")


def test_help_names_flags_with_their_meaning(capsys):
    with pytest.raises(SystemExit) as stopped:
        command_line("--help")
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    for part in ("A recipe.", "--evidence.weight", "--data.train-images", "--print-config", "of the evidence loss"):
        assert part in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--evidence.wieght", "0"], "unknown key '--evidence.wieght'; did you mean '--evidence.weight'?"),
        (["--data.format", "cocoo"], "data.format: no datasets named 'cocoo'; did you mean 'coco'?"),
        (["--method.name", "flpc"], "method.name: no methods named 'flpc'; did you mean 'flcp'?"),
        (["--evidence.heatmap", "gradcam"], "no heatmaps named 'gradcam'"),
        (["--config", "nowhere.yaml"], "cannot read config nowhere.yaml"),
        (["evidence.weight=0"], "'evidence.weight=0' is no flag; write --evidence.weight 0"),
        (["--training.lr", "1"], "unknown key '--training.lr'; did you mean '--training.learning-rate'?"),
        (["--epochs", "1"], "unknown key '--epochs'; did you mean '--training.epochs'?"),
        (["--training.epochs", "ten"], "command line: training.epochs = 'ten': expected a whole number"),
        (["--training.epochs=0"], "command line: training.epochs = '0': expected more than 0"),
        (["--training.epochs"], "command line: training.epochs has no value: expected a whole number"),
        (["--evaluation.explain", "lable"], "evaluation.explain = 'lable': expected 'label' or 'prediction'"),
        (["--training.augmentation", "None"], "is a section; set its keys, such as --training.augmentation.crop-scale"),
        (["--training.augmentation.flip", "no"], "one value too many; a switch takes none: --training.augmentation.f"),
        (
            ["--run.seed", "2", "--evidence.weight", "1", "2"],
            "'2' after --evidence.weight is one value too many; it takes one",
        ),
        (
            ["--run.arms", "foo"],
            "run.arms = 'foo': expected 'zero_shot', 'baseline', 'evidence', 'swap' or 'e",
        ),
        (["--training.weighting.kind", "ratio"], "command line: training.weighting: kind 'ratio' has no target"),
        (["--training.early-stopping.metric", "PT"], "training: early_stopping needs evaluations while training"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_clear_error(capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        command_line(*arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"evidence": {"wieght": 1}}, "unknown key 'evidence.wieght'; did you mean 'evidence.weight'?"),
        ({"evalution": {}}, "unknown key 'evalution'; did you mean 'evaluation'?"),
        ({"training": {"augmentation": {"flap": True}}}, "did you mean 'training.augmentation.flip'?"),
        ({"training": {"epochs": 3.5}}, "training.epochs = 3.5: expected a whole number"),
        ({"training": {"epochs": "ten"}}, "training.epochs = 'ten': expected a whole number"),
        ({"evidence": {"weight": -1}}, "evidence.weight = -1: expected at least 0"),
        ({"evaluation": {"explain": "lable"}}, "evaluation.explain = 'lable': expected 'label' or 'prediction'"),
        ({"run": {"arms": ["base"]}}, "run.arms.0 = 'base'"),
        ({"run": {"arms": []}}, "run.arms = []"),
        ({"run": {"name": "../up"}}, "run.name = '../up'"),
        ({"run": {"name": ".."}}, "run.name = '..'"),
        ({"method": {"name": "flcp", "templates": "a cell"}}, "expected exactly one {}"),
        ({"method": {"name": "flcp", "templates": "a {x}"}}, "expected exactly one {}"),
        ({"data": {"format": "manifest"}}, "data.file is missing"),
        ({"data": {"format": "shapes", "root": "x"}}, "unknown key 'data.root'"),
        ({"data": {"format": "shapes", "test_splits": ["test", "train"]}}, "split 'train' is both train_split and one"),
        ({"data": {"format": "shapes", "test_splits": ["test", "test"]}}, "test_splits lists a split more than once"),
        (
            {"data": {"format": "shapes", "test_splits": ["tset"]}},
            "shapes has no split 'tset'; choose from train,",
        ),
        (
            {"training": {"early_stopping": {}}},
            "my.yaml: training: early_stopping needs evaluations while training; set",
        ),
        ({"evidence": {"layers": ["top"]}}, "evidence.layers.0 = 'top': expected a whole number"),
        ({"data": {"format": 3}}, "data.format is 3"),
        ({"data": "shapes"}, "data is 'shapes', expected a section"),
        ({"model": {"backbone": "openclip"}}, "did you mean 'open_clip'?"),
        ({"evidence": {"alignment": "outside"}}, "no alignments named 'outside'"),
    ],
)
def test_a_mistake_in_a_file_names_the_dotted_key(tree, message):
    with pytest.raises(ConfigError) as raised:
        parse(tree, "my.yaml")
    assert message in str(raised.value)


def test_all_mistakes_are_named_at_once():
    with pytest.raises(ConfigError) as raised:
        parse({"evidence": {"wieght": 1}, "training": {"epochs": "x"}}, "my.yaml")
    assert len(str(raised.value).splitlines()) == 2
    assert all(line.startswith("my.yaml: ") for line in str(raised.value).splitlines())


@pytest.mark.parametrize(
    ("text", "message"), [("- 1\n", "holds a list"), ("a: [", "is not YAML"), ("!!python/name:os", "is not YAML")]
)
def test_a_file_that_is_no_config_is_refused(tmp_path, text, message):
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read(file)


def test_an_empty_file_is_all_defaults(tmp_path):
    file = tmp_path / "empty.yaml"
    file.write_text("")
    assert parse(read(file)).method.name == "flcp"


def test_names_reach_modules_of_other_packages():
    ours = component("heatmaps", "evidence_ft.heatmaps.gradient_attention")
    assert ours is component("heatmaps", "gradient_attention")
    with pytest.raises(ConfigError, match=r"'tests\.by_definition' is no member of heatmaps: it has no heatmap"):
        component("heatmaps", "tests.by_definition")
    with pytest.raises(ConfigError, match=r"no heatmaps named .tests\.nowhere."):
        component("heatmaps", "tests.nowhere")
