"""Linear probe: a linear classifier on frozen features, beside zero-shot.

    accelerate launch recipes/lp.py                                           # the embedded default
    accelerate launch recipes/lp.py --config configs/own_data.yaml --data.file my/labels.csv
    accelerate launch recipes/lp.py --method.head random                      # start from a random layer

With the evidence loss: recipes/lp_evidence.py.
"""

from pathlib import Path

from evidence_ft import experiment

CONFIGS = Path(__file__).resolve().parents[1] / "configs"

if __name__ == "__main__":
    experiment.main(CONFIGS / "shapes.yaml", __doc__, method="lp", arms=("zero_shot", "baseline"))
