"""Adapters on frozen features, beside zero-shot: CLIP-Adapter, Tip-Adapter, Tip-Adapter-F.

    accelerate launch recipes/adapter.py                                                # the embedded default
    accelerate launch recipes/adapter.py --config configs/own_data.yaml --data.file my/labels.csv
    accelerate launch recipes/adapter.py --method.name tip_adapter                      # trains nothing
    accelerate launch recipes/adapter.py --method.name tip_adapter --method.fine-tune   # Tip-Adapter-F
    accelerate launch recipes/adapter.py --run.arms baseline evidence                   # and with the evidence loss

The default is CLIP-Adapter. Both towers are frozen: the evidence loss can turn the direction a score grows along, but
not make the image tower look elsewhere.
"""

from pathlib import Path

from evidence_ft import experiment

CONFIGS = Path(__file__).resolve().parents[1] / "configs"

if __name__ == "__main__":
    experiment.main(CONFIGS / "shapes.yaml", __doc__, method="clip_adapter", arms=("zero_shot", "baseline"))
