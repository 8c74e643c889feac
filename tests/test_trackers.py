import pytest
from accelerate import Accelerator

from evidence_ft import trackers


def test_a_tracker_that_does_not_exist_is_answered_with_those_that_do():
    with pytest.raises(ValueError, match=r"no tracker 'wandbb'; did you mean 'wandb'\? there are .*'tensorboard'"):
        trackers.check(["wandbb"])


def test_a_tracker_that_is_not_installed_is_named_with_its_package(monkeypatch):
    monkeypatch.setattr(trackers, "get_available_trackers", lambda: ["mlflow"])
    trackers.check(["mlflow"])
    with pytest.raises(ValueError, match=r"'comet_ml' is not installed: pip install comet-ml, .* installed: 'mlflow'"):
        trackers.check(["mlflow", "comet_ml"])


def test_a_tracker_that_is_stopped_is_finished_and_forgotten():
    class Tracker:
        finished = 0

        def finish(self):
            self.finished += 1

    accelerator, tracker = Accelerator(cpu=True), Tracker()
    accelerator.trackers = [tracker]
    trackers.stop(accelerator)
    assert (tracker.finished, accelerator.trackers) == (1, [])
