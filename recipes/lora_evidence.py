"""LoRA with evidence alignment, beside its baseline and zero-shot.

    accelerate launch recipes/lora_evidence.py                                           # the embedded default
    accelerate launch recipes/lora_evidence.py --config configs/own_data.yaml --data.file my/labels.csv
    accelerate launch recipes/lora_evidence.py --method.objective ft                     # under a linear classifier

Runs zero-shot, LoRA (evidence weight 0) and LoRA with the evidence loss from the same start and seed, evaluates each on
every test split, and writes runs/<run.name>/comparison.{html,md,json}.
"""

from pathlib import Path

from evidence_ft import experiment

CONFIGS = Path(__file__).resolve().parents[1] / "configs"

if __name__ == "__main__":
    experiment.main(CONFIGS / "shapes.yaml", __doc__, method="lora", arms=("zero_shot", "baseline", "evidence"))
