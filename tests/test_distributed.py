"""Two processes with four images each are one process with eight, in whatever precision, however they are launched."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.state import AcceleratorState

from evidence_ft.alignments import outside_mass
from evidence_ft.distributed import gather, gather_with_grad, mean_over_defined, num_processes
from evidence_ft.heatmaps import gradient_attention
from evidence_ft.methods import flcp, ft
from evidence_ft.training import EvidenceTerm, TrainingStep
from evidence_ft.types import Batch
from tests.conftest import build_encoder

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))
METHODS = {
    "flcp": (flcp, flcp.Config(loss="softmax")),
    "flcp with sigmoid": (flcp, flcp.Config(loss="sigmoid")),
    "ft": (ft, ft.Config()),
}
"""Losses over the features of all processes, and one over each image alone."""


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


def gradients_of(
    method: str, dtype: torch.dtype, precision: str = "no", loss: str = "total", heatmap=gradient_attention.heatmap
) -> dict[str, torch.Tensor]:
    """Gradients of one step as Accelerate takes it, on as many processes as there are."""
    AcceleratorState._reset_state()  # else the precision is that of the first accelerator in this process
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    encoder = build_encoder("native")
    if method == "flcp with sigmoid":
        encoder.model.logit_bias = torch.nn.Parameter(torch.tensor(-10.0))
    module, config = METHODS[method]
    tuning = module.prepare(encoder, ["cat", "dog", "fox"], config)
    step = TrainingStep(tuning, EvidenceTerm(heatmap, outside_mass.loss, "all", weight=2.0))
    wrapped = accelerator.prepare(step.to(dtype).train())
    mine = slice(accelerator.process_index, None, accelerator.num_processes)
    local = Batch(*(column[mine] for column in eight_images()))
    losses = wrapped(local._replace(images=local.images.to(dtype)))
    accelerator.backward(getattr(losses, loss))
    AcceleratorState._reset_state()
    return {name: parameter.grad for name, parameter in step.named_parameters() if parameter.grad is not None}


def joined(gradients: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([gradient.flatten() for gradient in gradients.values()])


def launch(*arguments: str, **environment: str) -> str:
    """Run a Python module in a process of its own, and return what it prints."""
    paths = os.pathsep.join([str(ROOT), *sys.path])
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        check=True,
        timeout=600,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        text=True,
    ).stdout


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """Gradients that two processes found, by method."""
    path = tmp_path_factory.mktemp("ddp") / "gradients.pt"
    launch("torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__, str(path))
    return torch.load(path, weights_only=True)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_two_processes_with_four_images_give_the_gradients_of_one_with_eight(together, method):
    # In double precision, so that what is compared is the algorithm and not the order of its sums.
    alone = gradients_of(method, torch.float64)
    assert set(together[method]) == set(alone)
    for name, expected in alone.items():
        difference = (together[method][name] - expected).norm() / expected.norm().clamp(min=1e-12)
        assert difference < 1e-6, f"{name}: {difference:.1e}"


@pytest.mark.slow
def test_two_processes_in_bfloat16_pull_where_one_in_float32_does(together):
    alone = joined(gradients_of("flcp", torch.float32))
    assert torch.cosine_similarity(joined(together["flcp in bfloat16"]), alone, dim=0) > 0.95


@pytest.mark.parametrize("method", METHODS)
def test_the_evidence_gradient_in_bfloat16_points_where_that_in_float32_does(method):
    exact = joined(gradients_of(method, torch.float32, loss="evidence"))
    mixed = joined(gradients_of(method, torch.float32, "bf16", loss="evidence"))
    assert torch.cosine_similarity(mixed, exact, dim=0) > 0.95
    assert mixed.norm().item() == pytest.approx(exact.norm().item(), rel=0.1)


def test_evidence_is_computed_in_float32_while_the_tower_is_not():
    seen = []

    def heatmap(trace, score, *, create_graph):
        heat = gradient_attention.heatmap(trace, score, create_graph=create_graph)
        seen.extend([trace.attention[0].dtype, heat.dtype, torch.is_autocast_enabled("cpu")])
        return heat

    gradients_of("flcp", torch.float32, "bf16", heatmap=heatmap)
    assert seen == [torch.bfloat16, torch.float32, False]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_reads_its_configurations(path):
    config = load_config_from_file(str(path))
    assert config.num_processes == (1 if path.stem in ("cpu", "single_gpu") else 2)
    assert config.use_cpu == path.stem.startswith("cpu")
    assert str(path.relative_to(ROOT)) in path.read_text()  # how it is launched


def test_there_is_a_configuration_for_every_machine():
    assert [path.stem for path in CONFIGS] == ["cpu", "cpu_two_processes", "fsdp2", "multi_gpu", "single_gpu"]


@pytest.mark.slow
def test_two_processes_on_the_cpu_are_launched_as_documented(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from pathlib import Path\n"
        "from accelerate import Accelerator\n"
        "accelerator = Accelerator()\n"
        "found = f'{accelerator.num_processes} {accelerator.device.type}'\n"
        "(Path(__file__).parent / f'{accelerator.process_index}.txt').write_text(found)\n"
    )
    config = ROOT / "configs" / "accelerate" / "cpu_two_processes.yaml"
    arguments = ["--config_file", str(config), "--main_process_port", "0", str(script)]
    launch("accelerate.commands.launch", *arguments, ACCELERATE_USE_CPU="true")
    assert {path.name: path.read_text() for path in tmp_path.glob("*.txt")} == {"0.txt": "2 cpu", "1.txt": "2 cpu"}


if __name__ == "__main__":
    found = {method: gradients_of(method, torch.float64) for method in METHODS}
    found["flcp in bfloat16"] = gradients_of("flcp", torch.float32, "bf16")
    if torch.distributed.get_rank() == 0:
        torch.save(found, sys.argv[1])
    torch.distributed.destroy_process_group()
