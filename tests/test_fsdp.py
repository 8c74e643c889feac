"""Sharded over two processes with four images each (FSDP2), a step is that of one process with eight."""

import os
import subprocess
import sys
from contextlib import nullcontext
from unittest import mock

import pytest
import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor

from evidence_ft.alignments import outside_mass
from evidence_ft.distributed import (
    inner_gradient,
    laid_out_like,
    mean_over_processes,
    num_processes,
    shard,
    unshard,
    unsharded,
    whole,
)
from evidence_ft.heatmaps import gradient_attention
from evidence_ft.methods import flcp, ft
from evidence_ft.training import EvidenceTerm, TrainingStep, probe_gradients
from evidence_ft.types import Batch
from tests.conftest import build_encoder

pytestmark = pytest.mark.slow

CASES = {
    "flcp": (flcp, flcp.Config(), "all"),
    "flcp, last block": (flcp, flcp.Config(), [-1]),
    "flcp, middle block": (flcp, flcp.Config(train_logit_scale=False), [1]),
    "flcp, adapters": (flcp, flcp.Config(vision="lora", text="lora"), "all"),
    "ft": (ft, ft.Config(), "all"),
    "ft, frozen tower": (ft, ft.Config(vision="frozen"), [-1]),
}

COMBINATIONS = [*((case, "native") for case in CASES), ("flcp", "timm"), ("flcp, middle block", "timm")]


def build_step(case: str, kind: str = "native") -> TrainingStep:
    method, config, layers = CASES[case]
    with torch.random.fork_rng():
        torch.manual_seed(7)
        tuning = method.prepare(build_encoder(kind), ["cat", "dog", "fox"], config)
        for name, parameter in tuning.encoder.named_parameters():
            if "lora_B" in name:  # zero at the start, and then half of the gradients are
                torch.nn.init.normal_(parameter, std=0.1)
    step = TrainingStep(tuning, EvidenceTerm(gradient_attention.heatmap, outside_mass.loss, layers, weight=2.0))
    # In double precision, so that what is compared is the algorithm and not the order of its sums.
    return step.double().train()


def eight_images(kind: str = "native") -> Batch:
    """Three of them without evidence, so that processes hold different numbers of annotated images."""
    generator = torch.Generator().manual_seed(3)
    size = {"native": (32, 48), "timm": (160, 160)}[kind]
    masks = (torch.rand(8, *size, generator=generator) > 0.7).to(torch.uint8)
    masks[[0, 1, 6]] = 0
    images = torch.randn(8, 3, *size, generator=generator, dtype=torch.float64)
    return Batch(images, torch.tensor([0, 1, 2, 0, 1, 1, 0, 2]), masks, torch.arange(8))


def own_images(batch: Batch) -> Batch:
    rank = torch.distributed.get_rank() if num_processes() > 1 else 0
    return Batch(*(column[rank :: num_processes()] for column in batch))


def gradients_of(step: TrainingStep) -> dict[str, torch.Tensor]:
    return {name: whole(value.grad) for name, value in step.named_parameters() if value.grad is not None}


def steps_of_adamw(step: TrainingStep, batch: Batch, accelerator: Accelerator) -> list[float]:
    """Three optimizer steps of two accumulated batches each, with Accelerate; the norms of their gradients."""
    scalars = [value for value in step.parameters() if value.requires_grad and value.ndim == 0]
    others = [value for value in step.parameters() if value.requires_grad and value.ndim > 0]
    optimizer = torch.optim.AdamW([{"params": others}, {"params": scalars}], lr=1e-3)
    # Accelerate finds the shards of an optimizer's parameters by their address, and those of empty shards are alike.
    sharded = any(isinstance(value, DTensor) for value in step.parameters())
    wrapped = step if sharded else accelerator.prepare(step)
    optimizer = accelerator.prepare_optimizer(optimizer)
    norms = []
    for _ in range(3):
        with accelerator.no_sync(wrapped):
            accelerator.backward(wrapped(batch).total / 2)
        accelerator.backward(wrapped(batch._replace(images=batch.images.flip(-1))).total / 2)
        norms.append(whole(accelerator.clip_grad_norm_(wrapped.parameters(), 1.0)).item())
        optimizer.step()
        optimizer.zero_grad()
    return norms


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """What the two processes found."""
    path = tmp_path_factory.mktemp("fsdp") / "found.pt"
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__, str(path)],
        check=True,
        timeout=600,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
    )
    return torch.load(path, weights_only=True)


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    assert set(found) == set(expected)
    for name, value in expected.items():
        difference = (found[name] - value).norm() / value.norm().clamp(min=1e-12)
        assert difference < tolerance, f"{name}: {difference:.1e}"


@pytest.mark.parametrize(("case", "kind"), COMBINATIONS)
def test_gradients_are_those_of_one_process_with_all_images(together, case, kind):
    step = build_step(case, kind)
    step(eight_images(kind)).total.backward()
    assert_same(together[f"gradients {case} {kind}"], gradients_of(step), 1e-9)


def test_gradients_with_recomputed_blocks_are_the_same(together):
    assert_same(together["gradients recomputed"], together["gradients flcp, last block native"], 1e-12)


def test_gradients_with_evidence_on_some_images_are_the_mean_of_those_of_the_processes(together):
    assert_same(together["gradients sub-batch"], together["gradients sub-batch, not sharded"], 1e-9)


def test_every_process_holds_half_of_every_parameter(together):
    for name, (held, rows) in together["rows"].items():
        assert held <= (rows + 1) // 2, name


def test_blocks_of_both_towers_are_gathered_one_by_one(together):
    assert together["units"] == [
        "FSDPTrainingStep",
        *["FSDPResidualAttentionBlock"] * 3,  # of the image tower; the text tower's only block goes with the rest
    ]


def test_without_the_context_the_backward_pass_meets_parameters_that_are_gone(together):
    assert "storage of size 0" in together["without inner_gradient"]


@pytest.mark.parametrize("case", ["flcp", "ft"])  # with a trained scalar, and without
def test_training_with_accumulation_and_clipping_ends_at_the_weights_of_one_process(together, case):
    step = build_step(case)
    norms = steps_of_adamw(step, eight_images(), Accelerator(cpu=True))
    assert together[f"norms {case}"] == pytest.approx(norms)
    assert_same(together[f"trained {case}"], step.state_dict(), 1e-8)


def test_the_probe_measures_what_one_process_measures(together):
    step = build_step("flcp")
    assert together["probe"] == pytest.approx(tuple(probe_gradients(step, eight_images())))


def test_outside_the_step_one_process_alone_can_use_the_model(together):
    encoder = build_step("flcp").encoder
    images = eight_images().images
    torch.testing.assert_close(together["features"], encoder.image_tower(images).detach())
    assert_same(together["state"], dict(encoder.state_dict()), 1e-15)


def test_after_looking_training_goes_on_in_shards(together):
    assert together["whole still"]  # after a look within the look
    assert together["sharded again"]
    assert_same(together["gradients after looking"], together["gradients flcp native"], 1e-12)


def test_shards_are_put_together_and_taken_apart_again(together):
    assert together["taken apart"]


def test_a_model_is_sharded_once(together):
    assert "load the model anew" in together["sharded twice"]


def test_on_one_process_nothing_is_sharded():
    step = build_step("flcp")
    before = dict(step.named_parameters())
    with inner_gradient(step), unsharded(step):
        pass
    unshard(step)
    assert all(value is before[name] for name, value in step.named_parameters())
    tensor = torch.ones(2)
    assert whole(tensor) is tensor
    assert laid_out_like(tensor, torch.zeros(2)) is tensor


def sharded_step(case: str, kind: str = "native") -> TrainingStep:
    step = build_step(case, kind)
    shard(step)
    return step


def find_out() -> dict[str, object]:
    """On each of two processes; the same on both."""
    found: dict[str, object] = {}
    for case, kind in COMBINATIONS:
        step = sharded_step(case, kind)
        step(own_images(eight_images(kind))).total.backward()
        found[f"gradients {case} {kind}"] = gradients_of(step)
    batch = own_images(eight_images())

    step = sharded_step("flcp, last block")
    step.encoder.image_tower.set_checkpointing(True)
    step(batch).total.backward()
    found["gradients recomputed"] = gradients_of(step)

    for name, step in {"": sharded_step("flcp"), ", not sharded": build_step("flcp")}.items():
        torch.manual_seed(5)
        step(batch, explain_at_most=2).total.backward()
        gradients = gradients_of(step)
        found[f"gradients sub-batch{name}"] = (
            {key: mean_over_processes(value) for key, value in gradients.items()} if name else gradients
        )

    step = sharded_step("flcp")
    found["rows"] = {
        name: (len(value.to_local()), len(value))
        for name, value in step.named_parameters()
        if isinstance(value, DTensor)
    }
    found["units"] = [type(part).__name__ for part in step.modules() if type(part).__name__.startswith("FSDP")]
    with unsharded(step):
        found["probe"] = tuple(probe_gradients(step, batch))
        found["state"] = {name: value.clone() for name, value in step.encoder.state_dict().items()}
        if torch.distributed.get_rank() == 0:
            with torch.no_grad():
                found["features"] = step.encoder.image_tower(eight_images().images)
            step.encoder.image_tower.trace(batch.images)
        with unsharded(step):
            pass
        found["whole still"] = not any(isinstance(value, DTensor) for value in step.parameters())
    found["sharded again"] = all(isinstance(value, DTensor) for value in step.parameters() if value.ndim)
    step(batch).total.backward()
    found["gradients after looking"] = gradients_of(step)
    weight = step.encoder.image_tower.blocks()[0].attn.in_proj_weight
    again = laid_out_like(whole(weight), weight)
    found["taken apart"] = isinstance(again, DTensor) and torch.equal(again.to_local(), weight.to_local())

    # Accelerate shards on GPUs alone, and takes the plugin for an ordinary run of several processes on CPUs.
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    accelerator.state.distributed_type, accelerator.state.fsdp_plugin = DistributedType.FSDP, plugin
    for case in ("flcp", "ft"):
        step = sharded_step(case)
        found[f"norms {case}"] = steps_of_adamw(step, batch, accelerator)
        unshard(step)
        found[f"trained {case}"] = {name: value.clone() for name, value in step.state_dict().items()}
    try:
        shard(step)
    except ValueError as error:
        found["sharded twice"] = str(error)

    step = sharded_step("flcp")
    with mock.patch("evidence_ft.training.inner_gradient", nullcontext):
        losses = step(batch)
    try:
        losses.total.backward()
    except RuntimeError as error:
        found["without inner_gradient"] = str(error)
    return found


if __name__ == "__main__":
    torch.distributed.init_process_group("gloo")
    results = find_out()
    if torch.distributed.get_rank() == 0:
        torch.save(results, sys.argv[1])
    torch.distributed.destroy_process_group()
