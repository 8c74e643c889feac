"""FLCP with evidence alignment, beside its baseline and zero-shot.

    accelerate launch recipes/flcp_evidence.py                                          # the embedded default
    accelerate launch recipes/flcp_evidence.py --config configs/own_data.yaml --data.file my/labels.csv
    accelerate launch recipes/flcp_evidence.py --run.arms baseline                      # one arm alone
    accelerate launch recipes/flcp_evidence.py --run.arms baseline evidence swap evidence_swap
    torchrun --nproc-per-node 2 recipes/flcp_evidence.py --run.device cpu              # two processes

Runs zero-shot, FLCP (evidence weight 0) and FLCP with the evidence loss from the same start and seed, evaluates each on
every test split, and writes runs/<run.name>/comparison.{html,md,json}. Arm swap is the baseline with background-swap
augmentation, evidence_swap has both. Stopped by Ctrl-C or SIGTERM, the same command with --run.resume continues.
"""

from pathlib import Path

from evidence_ft import experiment

CONFIGS = Path(__file__).resolve().parents[1] / "configs"

if __name__ == "__main__":
    experiment.main(CONFIGS / "shapes.yaml", __doc__, method="flcp", arms=("zero_shot", "baseline", "evidence"))
