"""LoRA: low-rank adapters in both towers, beside zero-shot.

    accelerate launch recipes/lora.py                                              # the embedded default
    accelerate launch recipes/lora.py --config configs/own_data.yaml --data.file my/labels.csv
    accelerate launch recipes/lora.py --method.objective ft --method.lora.rank 4   # under a linear classifier

With the evidence loss: recipes/lora_evidence.py.
"""

from pathlib import Path

from evidence_ft import experiment

CONFIGS = Path(__file__).resolve().parents[1] / "configs"

if __name__ == "__main__":
    experiment.main(CONFIGS / "shapes.yaml", __doc__, method="lora", arms=("zero_shot", "baseline"))
