"""CoOp: learn the words around the class names, beside zero-shot.

    accelerate launch recipes/prompt.py                                           # the embedded default
    accelerate launch recipes/prompt.py --config configs/own_data.yaml --data.file my/labels.csv
    accelerate launch recipes/prompt.py --method.class-specific                   # a context for each class
    accelerate launch recipes/prompt.py --run.arms baseline evidence              # and with the evidence loss

Both towers are frozen: the evidence loss can turn the text features, but not make the image tower look elsewhere.
"""

from pathlib import Path

from evidence_ft import experiment

CONFIGS = Path(__file__).resolve().parents[1] / "configs"

if __name__ == "__main__":
    experiment.main(CONFIGS / "shapes.yaml", __doc__, method="coop", arms=("zero_shot", "baseline"))
