"""Linear probe with evidence alignment, beside its baseline and zero-shot.

    accelerate launch recipes/lp_evidence.py                                           # the embedded default
    accelerate launch recipes/lp_evidence.py --config configs/own_data.yaml --data.file my/labels.csv
    accelerate launch recipes/lp_evidence.py --run.arms baseline                       # one arm alone

Runs zero-shot, the probe (evidence weight 0) and the probe with the evidence loss from the same start and seed,
evaluates each on every test split, and writes runs/<run.name>/comparison.{html,md,json}. The tower is frozen: the
evidence loss can turn the classifier, but not make the tower look elsewhere.
"""

from pathlib import Path

from evidence_ft import experiment

CONFIGS = Path(__file__).resolve().parents[1] / "configs"

if __name__ == "__main__":
    experiment.main(CONFIGS / "shapes.yaml", __doc__, method="lp", arms=("zero_shot", "baseline", "evidence"))
