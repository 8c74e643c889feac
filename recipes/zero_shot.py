"""Zero-shot: a pre-trained model with prompts, judged by what it predicts and by what it looks at.

    accelerate launch recipes/zero_shot.py                                           # the embedded default
    accelerate launch recipes/zero_shot.py --config configs/own_data.yaml --data.file my/labels.csv
    accelerate launch recipes/zero_shot.py --method.templates clip_7                 # seven prompts a class, averaged

Nothing is trained. Writes runs/<run.name>/comparison.{html,md,json}.
"""

from pathlib import Path

from evidence_ft import experiment

CONFIGS = Path(__file__).resolve().parents[1] / "configs"

if __name__ == "__main__":
    experiment.main(CONFIGS / "shapes.yaml", __doc__, method="zero_shot", arms=("zero_shot",))
