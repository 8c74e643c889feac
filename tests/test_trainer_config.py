import pytest
from pydantic import ValidationError

from evidence_ft.trainer_config import TrainerConfig
from evidence_ft.training import TrainingError


@pytest.mark.parametrize(
    "settings", [{"early_stopping": {}}, {"weighting": {"kind": "metric_bound", "target": 0.8}}], ids=str
)
def test_what_needs_evaluations_is_refused_without(settings):
    with pytest.raises(ValidationError, match="needs evaluations while training; set evaluate_every"):
        TrainerConfig(**settings)
    assert TrainerConfig(evaluate_every=5, **settings).evaluate_every == 5


@pytest.mark.parametrize(
    ("images", "processes", "accumulation", "fits"), [(8, 1, 1, True), (8, 2, 1, True), (8, 2, 2, False)]
)
def test_a_step_of_all_processes_and_batches_must_be_filled(images, processes, accumulation, fits):
    config = TrainerConfig(batch_size=4, gradient_accumulation=accumulation)
    if fits:
        config.check_fits(images, processes)
    else:
        with pytest.raises(TrainingError, match=r"8 training images .* set training\.batch_size to at most 2"):
            config.check_fits(images, processes)


def test_where_no_batch_is_small_enough_more_images_are_asked_for():
    with pytest.raises(TrainingError, match=r"3 training images .* on 2 process\(es\); give more images"):
        TrainerConfig(batch_size=4).check_fits(3, 2)
