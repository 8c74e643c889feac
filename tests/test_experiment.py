import json

import numpy as np
import pytest
import torch
from PIL import Image

from evidence_ft.config import ConfigError, parse
from evidence_ft.experiment import arm_config, run
from evidence_ft.images import DataError
from evidence_ft.runs import RunRecord
from evidence_ft.training import TrainingError

SMALL = {
    "run": {"name": "small", "device": "cpu"},
    "data": {"format": "shapes", "train_images": 32, "test_images": 24, "test_splits": ["test"]},
    "training": {"learning_rate": 1e-3, "epochs": 1, "batch_size": 16},
    "evaluation": {"gallery": 2},
}


def small(tmp_path, **sections):
    tree = {key: {**SMALL.get(key, {}), **sections.get(key, {})} for key in {*SMALL, *sections}}
    tree["run"] = {**tree["run"], "directory": str(tmp_path)}
    return parse(tree)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs")
    return run(small(directory))


def test_three_arms_leave_everything_a_report_needs(finished):
    for arm in ("zero_shot", "baseline", "evidence"):
        record = RunRecord.read(finished / arm)
        assert record.read_outcomes(finished / arm, "test").n == 24
        assert record.data["test"].annotated == 24
        assert (finished / arm / "config.yaml").is_file()
        assert (finished / arm / "gallery" / "test.safetensors").is_file()
    for name in ("comparison.json", "comparison.md", "comparison.html"):
        assert (finished / name).stat().st_size > 0
    numbers = json.loads((finished / "comparison.json").read_text())["arms"]
    assert set(numbers) == {"zero_shot", "baseline", "evidence"}
    keys = {"n", "accuracy", "PT", "IR", "RR", "mean_RMA", "empty_heatmaps", "swapped_accuracy"}
    assert keys <= set(numbers["evidence"]["test"])


def test_all_arms_start_from_the_same_weights_and_trained_ones_move(finished):
    records = {arm: RunRecord.read(finished / arm) for arm in ("zero_shot", "baseline", "evidence")}
    assert len({record.model["sha256"] for record in records.values()}) == 1
    trained = {records[arm].model["fine_tuned_sha256"] for arm in ("baseline", "evidence")}
    assert len(trained | {records["zero_shot"].model["sha256"]}) == 3


def test_saved_weights_are_those_that_were_evaluated(finished):
    from evidence_ft.backbones import open_clip as backbone

    record = RunRecord.read(finished / "evidence")
    assert backbone.load(str(finished / "evidence" / "model")).fingerprint() == record.model["fine_tuned_sha256"]


def test_the_record_says_that_the_loss_was_alive(finished):
    assert RunRecord.read(finished / "evidence").training["first_evidence_to_task_gradient_ratio"] > 0
    assert RunRecord.read(finished / "baseline").training["first_evidence_to_task_gradient_ratio"] is None
    assert RunRecord.read(finished / "zero_shot").training is None


def test_the_config_of_an_arm_reproduces_it_bit_for_bit(finished, tmp_path):
    record = RunRecord.read(finished / "evidence")
    again = run(parse({**record.config, "run": {**record.config["run"], "directory": str(tmp_path)}}))
    assert RunRecord.read(again / "evidence").model == record.model
    assert RunRecord.read(again / "evidence").results == record.results


def test_an_arm_that_is_run_again_replaces_nothing_that_was_written(finished):
    before = (finished / "zero_shot" / "run.json").read_bytes()
    run(small(finished.parent, run={"arms": ["zero_shot"]}))
    assert (finished / "replaced" / "zero_shot-1" / "run.json").read_bytes() == before
    assert set(json.loads((finished / "comparison.json").read_text())["arms"]) == {"zero_shot", "baseline", "evidence"}


def test_arms_differ_in_nothing_but_what_makes_them(tmp_path):
    config = small(tmp_path, evidence={"weight": 2.0})
    baseline, evidence = (arm_config(config, arm).model_dump() for arm in ("baseline", "evidence"))
    assert baseline["evidence"].pop("weight") == 0
    assert evidence["evidence"].pop("weight") == 2
    assert baseline["run"].pop("arms") == ("baseline",)
    assert evidence["run"].pop("arms") == ("evidence",)
    assert baseline == evidence


class TestBadInput:
    """One clear error each, before any weights are loaded and before training starts."""

    @pytest.fixture(autouse=True)
    def nothing_is_loaded(self, monkeypatch):
        from evidence_ft.backbones import open_clip as backbone

        def load(_checkpoint):
            raise AssertionError("weights were loaded before the input was checked")

        monkeypatch.setattr(backbone, "load", load)

    def manifest(self, tmp_path, rows, **settings):
        for name in ("a.png", "b.png"):
            Image.fromarray(np.full((16, 16, 3), 100, np.uint8)).save(tmp_path / name)
            mask = np.zeros((16, 16), np.uint8)
            mask[4:8, 4:8] = 255
            Image.fromarray(mask).save(tmp_path / f"mask_{name}")
        header = "sample_id,image,mask,label,split"
        file = tmp_path / "labels.csv"
        file.write_text("\n".join([header, *rows]) + "\n")
        data = {"format": "manifest", "file": str(file), **settings}
        where = SMALL["run"] | {"directory": str(tmp_path / "runs")}
        return parse({"run": where, "data": data, "training": {"batch_size": 2}})

    GOOD = ("1,a.png,mask_a.png,cat,train", "2,b.png,mask_b.png,dog,train", "3,a.png,mask_a.png,cat,test")

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ("4,nowhere.png,,cat,test", r"nowhere\.png"),
            ("3,b.png,mask_b.png,dog,test", "'3'"),
            ("4,a.png,mask_a.png,,test", "label"),
        ],
    )
    def test_a_manifest_that_contradicts_itself(self, tmp_path, row, message):
        with pytest.raises(DataError, match=message):
            run(self.manifest(tmp_path, [*self.GOOD, row]))

    def test_an_unknown_class(self, tmp_path):
        with pytest.raises(DataError, match="'dog'"):
            run(self.manifest(tmp_path, self.GOOD, classes=["cat", "dogs"]))

    def test_a_corrupt_image_and_how_to_skip_it(self, tmp_path):
        (tmp_path / "broken.png").write_bytes(b"no image")
        rows = [*self.GOOD, "4,broken.png,,cat,test"]
        with pytest.raises(DataError, match=r"(?s)broken\.png.*--data\.on-bad-sample skip"):
            run(self.manifest(tmp_path, rows))

    def test_a_mask_of_another_size(self, tmp_path):
        Image.fromarray(np.full((8, 16), 255, np.uint8)).save(tmp_path / "small.png")
        with pytest.raises(DataError, match="mask"):
            run(self.manifest(tmp_path, [*self.GOOD, "4,a.png,small.png,cat,test"]))

    def test_a_mask_without_foreground(self, tmp_path):
        Image.fromarray(np.zeros((16, 16), np.uint8)).save(tmp_path / "empty.png")
        with pytest.raises(DataError, match=r"reaches|foreground"):
            run(self.manifest(tmp_path, [*self.GOOD, "4,a.png,empty.png,cat,test"]))

    def test_no_mask_in_training_but_an_evidence_loss(self, tmp_path):
        rows = ["1,a.png,,cat,train", "2,b.png,,dog,train", "3,a.png,,cat,test"]
        with pytest.raises(DataError, match=r"no image of split 'train' has a mask"):
            run(self.manifest(tmp_path, rows))

    def test_fewer_training_images_than_a_batch(self, tmp_path):
        config = self.manifest(tmp_path, self.GOOD)
        tree = config.model_dump()
        tree["training"]["batch_size"] = 32
        with pytest.raises(TrainingError, match=r"training\.batch_size to at most 2"):
            run(parse(tree))

    @pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
    def test_a_gpu_where_there_is_none(self, tmp_path):
        with pytest.raises(ConfigError, match=r"run\.device = 'cuda', but torch sees no GPU"):
            run(small(tmp_path, run={"device": "cuda"}))


def test_layers_that_do_not_exist_are_named_before_training(tmp_path):
    with pytest.raises(ConfigError, match=r"evaluation\.layers = \[7\], but the image tower has 4 blocks"):
        run(small(tmp_path, evaluation={"layers": [7]}))
    assert not list(tmp_path.rglob("metrics.jsonl"))


def test_arms_that_were_judged_otherwise_are_refused_before_training(finished):
    with pytest.raises(ConfigError, match=r"baseline holds an arm that was judged .* choose another run\.name"):
        run(small(finished.parent, run={"arms": ["evidence"]}, evaluation={"threshold": 0.7}))


def test_bad_samples_are_skipped_counted_and_listed(tmp_path):
    generator = np.random.default_rng(0)
    rows = ["sample_id,image,mask,label,split"]
    mask = np.zeros((64, 64), np.uint8)
    mask[8:40, 8:40] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    for number in range(8):
        Image.fromarray(generator.integers(0, 256, (64, 64, 3), np.uint8)).save(tmp_path / f"{number}.png")
        label, split = "star" if number % 2 else "ring", "train" if number < 4 else "test"
        rows.append(f"{number},{number}.png,mask.png,{label},{split}")
    (tmp_path / "7.png").write_bytes(b"no image")
    (tmp_path / "labels.csv").write_text("\n".join(rows) + "\n")
    data = {"format": "manifest", "file": str(tmp_path / "labels.csv"), "on_bad_sample": "skip"}
    run_section = {"name": "skipping", "device": "cpu", "directory": str(tmp_path), "arms": ["zero_shot"]}
    directory = run(parse({"run": run_section, "data": data}))
    record = RunRecord.read(directory / "zero_shot")
    assert record.data["test"].n == 3
    assert [sample.sample_id for sample in record.data["test"].skipped] == ["7"]
    assert "7" not in record.read_outcomes(directory / "zero_shot", "test").sample_ids
