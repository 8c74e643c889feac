"""FLCP with evidence alignment, beside its baseline and zero-shot.

    accelerate launch recipes/flcp_evidence.py                                          # the embedded default
    accelerate launch recipes/flcp_evidence.py --config configs/white_blood_cells.yaml  # your images and masks
    accelerate launch recipes/flcp_evidence.py --run.arms baseline                      # one arm alone

Runs zero-shot, FLCP (evidence weight 0) and FLCP with the evidence loss from the same start and seed, evaluates each on
every test split, and writes runs/<run.name>/comparison.{html,md,json}.
"""

from pathlib import Path

from evidence_ft import experiment

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


def main() -> None:
    experiment.main(CONFIGS / "flcp_evidence.yaml", __doc__)


if __name__ == "__main__":
    main()
