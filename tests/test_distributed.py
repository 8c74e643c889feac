"""Two processes with four images each are one process with eight."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from evidence_ft.alignments import outside_mass
from evidence_ft.distributed import gather, gather_with_grad, mean_over_defined, num_processes
from evidence_ft.heatmaps import gradient_attention
from evidence_ft.methods import flcp
from evidence_ft.training import EvidenceTerm, TrainingStep
from evidence_ft.types import Batch
from tests.conftest import build_encoder


def test_alone_every_reduction_is_plain_torch(generator):
    rows = torch.randn(3, 2, generator=generator, requires_grad=True)
    assert num_processes() == 1
    assert gather(rows) is rows
    assert gather_with_grad(rows) is rows


def test_what_is_undefined_has_no_weight():
    values = torch.tensor([1.0, torch.nan, 4.0], requires_grad=True)
    mean = mean_over_defined(values)
    mean.backward()
    assert mean.item() == 2.5
    assert values.grad.tolist() == [0.5, 0.0, 0.5]


def test_where_nothing_is_defined_the_mean_is_zero_and_has_a_gradient():
    values = torch.full((3,), torch.nan, requires_grad=True)
    mean = mean_over_defined(values)
    mean.backward()
    assert mean.item() == 0
    assert values.grad.tolist() == [0, 0, 0]


def eight_images() -> Batch:
    """Three of them without evidence, so that processes hold different numbers of annotated images."""
    generator = torch.Generator().manual_seed(3)
    masks = (torch.rand(8, 32, 48, generator=generator) > 0.7).to(torch.uint8)
    masks[[0, 1, 6]] = 0
    labels = torch.tensor([0, 1, 2, 0, 1, 1, 0, 2])
    return Batch(torch.randn(8, 3, 32, 48, generator=generator), labels, masks, torch.arange(8))


def gradients_of(batch: Batch) -> dict[str, torch.Tensor]:
    """Gradients of one step as Accelerate takes it, on as many processes as there are."""
    accelerator = Accelerator(cpu=True)
    # In double precision, so that what is compared is the algorithm and not the order of its sums.
    encoder = build_encoder("native").double()
    tuning = flcp.prepare(encoder, ["cat", "dog", "fox"], flcp.Config())
    step = TrainingStep(tuning, EvidenceTerm(gradient_attention.heatmap, outside_mass.loss, "all", weight=2.0))
    wrapped = accelerator.prepare(step)
    mine = slice(accelerator.process_index, None, accelerator.num_processes)
    local = Batch(*(column[mine] for column in batch))
    losses = wrapped(local._replace(images=local.images.double()))
    accelerator.backward(losses.total)
    return {name: parameter.grad for name, parameter in step.named_parameters()}


@pytest.mark.slow
def test_two_processes_with_four_images_give_the_gradients_of_one_with_eight(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__, str(tmp_path)],
        check=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1]), "OMP_NUM_THREADS": "1"},
    )
    together = torch.load(tmp_path / "gradients.pt", weights_only=True)
    alone = gradients_of(eight_images())
    assert set(together) == set(alone)
    for name, expected in alone.items():
        difference = (together[name] - expected).norm() / expected.norm().clamp(min=1e-12)
        assert difference < 1e-6, f"{name}: {difference:.1e}"


if __name__ == "__main__":
    found = gradients_of(eight_images())
    if torch.distributed.get_rank() == 0:
        torch.save(found, f"{sys.argv[1]}/gradients.pt")
    torch.distributed.destroy_process_group()
