"""Full fine-tuning of the image tower under a linear classifier, beside zero-shot.

    accelerate launch recipes/ft.py                                           # the embedded default
    accelerate launch recipes/ft.py --config configs/own_data.yaml --data.file my/labels.csv
    accelerate launch recipes/ft.py --method.name lp_ft                       # LP-FT: fit the classifier first
    accelerate launch recipes/ft.py --evaluation.interpolation 0.5            # WiSE-FT: half way back to zero-shot

With the evidence loss: recipes/ft_evidence.py.
"""

from pathlib import Path

from evidence_ft import experiment

CONFIGS = Path(__file__).resolve().parents[1] / "configs"

if __name__ == "__main__":
    experiment.main(CONFIGS / "shapes.yaml", __doc__, method="ft", arms=("zero_shot", "baseline"))
