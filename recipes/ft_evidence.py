"""Full fine-tuning with evidence alignment, beside its baseline and zero-shot.

    accelerate launch recipes/ft_evidence.py                                              # the embedded default
    accelerate launch recipes/ft_evidence.py --config configs/own_data.yaml --data.file my/labels.csv
    accelerate launch recipes/ft_evidence.py --run.arms baseline evidence swap evidence_swap
    accelerate launch recipes/ft_evidence.py --evaluation.interpolation 0.5               # WiSE-FT: half way back

Runs zero-shot, full fine-tuning (evidence weight 0) and the same with the evidence loss from one start and seed,
evaluates each on every test split, and writes runs/<run.name>/comparison.{html,md,json}.
"""

from pathlib import Path

from evidence_ft import experiment

CONFIGS = Path(__file__).resolve().parents[1] / "configs"

if __name__ == "__main__":
    experiment.main(CONFIGS / "shapes.yaml", __doc__, method="ft", arms=("zero_shot", "baseline", "evidence"))
