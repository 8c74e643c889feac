"""FLCP: fine-tune like CLIP pre-training, beside zero-shot.

    accelerate launch recipes/flcp.py                                           # the embedded default
    accelerate launch recipes/flcp.py --config configs/own_data.yaml --data.file my/labels.csv
    accelerate launch recipes/flcp.py --method.text frozen                      # train the image tower alone

With the evidence loss: recipes/flcp_evidence.py.
"""

from pathlib import Path

from evidence_ft import experiment

CONFIGS = Path(__file__).resolve().parents[1] / "configs"

if __name__ == "__main__":
    experiment.main(CONFIGS / "shapes.yaml", __doc__, method="flcp", arms=("zero_shot", "baseline"))
