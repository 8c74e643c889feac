import pytest
import torch
from accelerate import Accelerator
from torch import nn

from evidence_ft.backgrounds import SwappedBackgrounds
from evidence_ft.classifier import Classifier
from evidence_ft.datasets import shapes
from evidence_ft.evaluation import choose_panel, evaluate, explain_panel
from evidence_ft.evidence import HeatmapError
from evidence_ft.heatmaps import gradient_attention
from evidence_ft.samples import Subset
from evidence_ft.transforms import ModelInputs, SampleTransform
from evidence_ft.types import Preprocessing
from tests import by_definition
from tests.conftest import build_encoder
from tests.noise import NAMES, Noise

PREPROCESSING = Preprocessing((32, 48), (0.5,) * 3, (0.5,) * 3)


@pytest.fixture
def classifier(native_encoder):
    torch.manual_seed(0)
    return Classifier(native_encoder.image_tower, nn.Linear(10, 3), NAMES)


def inputs_of(dataset):
    return ModelInputs(dataset, SampleTransform(PREPROCESSING), seed=0)


def outcomes_of(classifier, dataset, **options):
    return evaluate(
        classifier, inputs_of(dataset), gradient_attention.heatmap, accelerator=Accelerator(cpu=True), **options
    )


def test_the_table_holds_what_one_image_at_a_time_gives(classifier):
    dataset = Noise(7)
    outcomes = outcomes_of(classifier, dataset, batch_size=3)
    assert outcomes.sample_ids == tuple(dataset.sample_ids)
    inputs = inputs_of(dataset)
    for row in range(7):
        batch = inputs[row]
        trace = classifier.tower.trace(batch.images[None])
        logits = classifier.head(trace.features)[0]
        assert outcomes.predictions[row] == logits.argmax()
        torch.testing.assert_close(outcomes.confidence[row], logits.softmax(0).max().detach())
        if dataset.mask_sources[row] == "none":
            assert outcomes.rma[row].isnan()
            assert outcomes.mask_share[row].isnan()
            continue
        gradients = torch.autograd.grad(logits[dataset.labels[row]], trace.attention)
        attentions = [attention[0] for attention in trace.attention]
        heatmap = by_definition.generic_attention_attribution(attentions, [gradient[0] for gradient in gradients])
        mask = torch.zeros(4, 6)
        mask[1:3, 1:4] = 1
        assert outcomes.rma[row].item() == pytest.approx(by_definition.rma(heatmap[1:].reshape(4, 6), mask), abs=1e-4)
        assert outcomes.mask_share[row].item() == pytest.approx(6 / 24)


def test_the_predicted_class_can_be_explained_instead(classifier):
    dataset = Noise(12)
    by_label, by_prediction = (outcomes_of(classifier, dataset, explain=explain) for explain in ("label", "prediction"))
    right = by_label.correct & ~by_label.rma.isnan()
    wrong = ~by_label.correct & ~by_label.rma.isnan()
    assert right.any()
    assert wrong.any()
    torch.testing.assert_close(by_label.rma[right], by_prediction.rma[right])
    assert not torch.allclose(by_label.rma[wrong], by_prediction.rma[wrong])


def test_swapped_predictions_are_those_on_the_swapped_images(classifier):
    dataset = Noise(9)
    outcomes = outcomes_of(classifier, dataset, swap_seed=3)
    swapped = SwappedBackgrounds(dataset, seed=3)
    column = outcomes.table.column("swapped_prediction").to_pylist()
    inputs = inputs_of(swapped)
    for position, row in enumerate(swapped.rows):
        logits = classifier.head(classifier.tower(inputs[position].images[None]))
        assert column[row] == logits.argmax()
    assert [row for row, value in enumerate(column) if value is None] == [2, 5, 8]  # no mask


def test_the_batch_size_changes_nothing(classifier):
    one, all_at_once = (outcomes_of(classifier, Noise(7), batch_size=size) for size in (1, 7))
    for column in ("sample_id", "label", "prediction", "mask_source", "swapped_prediction"):
        assert one.table.column(column).equals(all_at_once.table.column(column))
    torch.testing.assert_close(one.rma, all_at_once.rma, equal_nan=True, rtol=1e-4, atol=1e-5)


def test_a_saved_and_loaded_model_gives_the_same_table(tmp_path):
    from evidence_ft.backbones import open_clip as backbone
    from evidence_ft.methods import zero_shot

    dataset = Subset(shapes.Shapes("test", 16), range(16))
    tables = []
    for encoder in (build_encoder("native"), None):
        if encoder is None:
            encoder = backbone.load(str(tmp_path))
        else:
            encoder.save(tmp_path)
        tuning = zero_shot.prepare(encoder, dataset.class_names, zero_shot.Config())
        tables.append(outcomes_of(tuning.classifier(), dataset).table)
    assert tables[0].equals(tables[1])


def test_nothing_of_the_tower_is_changed(classifier):
    before = {name: value.clone() for name, value in classifier.tower.state_dict().items()}
    classifier.tower.requires_grad_(False)
    outcomes_of(classifier, Noise(4))
    assert all(torch.equal(before[name], value) for name, value in classifier.tower.state_dict().items())
    assert not any(parameter.requires_grad for parameter in classifier.tower.parameters())


def test_a_panel_takes_classes_in_turn_and_shows_the_map_that_is_judged(classifier):
    dataset = Noise(9)
    rows = choose_panel(dataset.labels, 4)
    assert rows == [0, 1, 2, 3]
    panel = explain_panel(classifier, inputs_of(dataset), gradient_attention.heatmap, rows)
    assert panel.images.shape == (4, 3, 32, 48)
    assert panel.heatmaps.shape == (4, 4, 6)
    outcomes = outcomes_of(classifier, dataset)
    shares = [by_definition.rma(h, m) for h, m in zip(panel.heatmaps[:2], _on_grid(panel.masks[:2]), strict=True)]
    assert shares == pytest.approx(outcomes.rma[:2].tolist(), abs=1e-4)


def _on_grid(masks):
    return masks.float().reshape(-1, 4, 8, 6, 8).mean(dim=(2, 4))


def test_what_is_no_heatmap_is_named_before_it_is_a_result(classifier):
    def signed(trace, score, *, create_graph):
        return -torch.ones(len(trace.features), *trace.grid)

    inputs = inputs_of(Noise(3))
    with pytest.raises(HeatmapError, match="the heatmap returned values down to -1"):
        evaluate(classifier, inputs, signed, accelerator=Accelerator(cpu=True))
    with pytest.raises(HeatmapError, match="the heatmap returned values down to -1"):
        explain_panel(classifier, inputs, signed, [0, 1])
