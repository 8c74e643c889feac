"""What the evidence loss costs: time of a training step against a step without any trace, as ratios in one run.

    python benchmarks/step_cost.py --checkpoint toy_clip

Variants take turns, so that a machine that slows down slows all of them; the median over rounds is printed. Memory is
the peak that torch allocated on a GPU; on a CPU it is not measured.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import tyro

from evidence_ft.alignments import outside_mass
from evidence_ft.backbones import open_clip
from evidence_ft.heatmaps import gradient_attention
from evidence_ft.methods import flcp
from evidence_ft.training import EvidenceTerm, TrainingStep
from evidence_ft.types import OBJECT, Batch


@dataclass(frozen=True)
class Config:
    """What is measured, and how often."""

    checkpoint: str = "toy_clip"
    """as in the settings of an experiment"""
    batch_size: int = 32
    """images in a step"""
    rounds: int = 7
    """measured steps of each variant, after one that is not"""


def main(config: Config) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    encoder = open_clip.load(config.checkpoint).to(device).train()
    tuning = flcp.prepare(encoder, [f"class {number}" for number in range(10)], flcp.Config())
    generator = torch.Generator().manual_seed(0)
    size = encoder.preprocessing.size
    masks = torch.zeros(config.batch_size, *size, dtype=torch.uint8)
    masks[:, : size[0] // 2, : size[1] // 2] = OBJECT
    labels = torch.arange(config.batch_size) % 10
    batch = Batch(torch.randn(config.batch_size, 3, *size, generator=generator), labels, masks, labels)
    batch = Batch(*(column.to(device) for column in batch))
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-6)

    def plain() -> torch.Tensor:
        return tuning.objective(encoder.image_tower(batch.images), batch.labels)[0]

    def traced(layers: object, weight: float) -> Callable[[], torch.Tensor]:
        step = TrainingStep(tuning, EvidenceTerm(gradient_attention.heatmap, outside_mass.loss, layers, weight))
        return lambda: step(batch).total

    variants: dict[str, Callable[[], torch.Tensor]] = {
        "no trace": plain,
        "weight 0, last block": traced([-1], 0.0),
        "weight 1, last block": traced([-1], 1.0),
        "weight 0, all blocks": traced("all", 0.0),
        "weight 1, all blocks": traced("all", 1.0),
    }
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    peak = dict.fromkeys(variants, 0)
    for number in range(config.rounds + 1):
        for name, loss in variants.items():
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
                torch.cuda.synchronize()
            began = time.perf_counter()
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()
            if device == "cuda":
                torch.cuda.synchronize()
                peak[name] = torch.cuda.max_memory_allocated()
            if number:
                seconds[name].append(time.perf_counter() - began)
    reference = statistics.median(seconds["no trace"])
    print(f"{config.checkpoint}, batch {config.batch_size}, {device}, torch {torch.__version__}")
    for name, times in seconds.items():
        ratios = sorted(value / reference for value in times)
        memory = f"  memory {peak[name] / max(peak['no trace'], 1):.2f}" if device == "cuda" else ""
        print(f"{name:22} time {statistics.median(ratios):.2f}  ({ratios[0]:.2f} to {ratios[-1]:.2f}){memory}")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
