"""Processes that are ended while they train, resumed until they are done, and compared with one that was left alone.

Run as a script, this file is a nursery: it loads torch once, forks a process for each attempt at training and ends it
as told. A fork takes a tenth of a second, the start of Python with torch many.
"""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils import DistributedType
from safetensors.torch import load_file, save_file

from evidence_ft import checkpoints
from evidence_ft.interruption import Interrupted
from evidence_ft.runs import read_steps
from evidence_ft.trainer import Trainer
from evidence_ft.trainer_config import TrainerConfig
from evidence_ft.transforms import Augmentation
from tests.noise import Stop, cross_entropy_tuning, in_double, make_inputs, make_step, weights_of

CONFIG = TrainerConfig(
    learning_rate=1e-3,
    schedule="cosine",
    epochs=10,
    batch_size=2,
    gradient_accumulation=2,
    ema=0.9,
    augmentation=Augmentation(),
    weighting={"kind": "ratio", "target": 0.3, "smoothing": 0.5},
    probe_every=3,
    evidence_images=1,
    checkpoint_every=2,
)
STEPS = 30
"""Ten epochs of three."""


def train(directory: Path, num_workers: int = 0) -> None:
    """Start or resume, whichever it is, and leave a hash of the weights behind."""
    torch.manual_seed(5)
    step = make_step()
    step.encoder.image_tower.register_forward_hook(lambda tower, _, out: F.dropout(out, 0.2, tower.training))
    config = CONFIG.model_copy(update={"num_workers": num_workers})
    inputs = make_inputs(step.encoder, config.augmentation)
    fitted = Trainer(config, Accelerator(cpu=True), directory).fit(step, inputs, seed=0, resume=True)
    assert fitted.steps == STEPS
    digest = hashlib.sha256()
    for parameter in step.parameters():
        digest.update(parameter.detach().numpy().tobytes())
    (directory / "weights.sha256").write_text(digest.hexdigest())


def attempt(directory: Path, num_workers: int = 0) -> int:
    """Train in a process and process group of its own."""
    child = os.fork()
    if child:
        os.setpgid(child, child)
        return child
    code = 1
    try:
        train(directory, num_workers)
        code = 0
    except Interrupted as interrupted:
        code = interrupted.exit_code
    except Exception:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def exit_code_of(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def logged(directory: Path) -> int:
    """How many steps the log has."""
    metrics = directory / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def end_after(child: int, directory: Path, steps: int, number: int, delay: float = 0.0) -> int:
    """Signal the process when the log has that many steps, unless it ends before; its exit code."""
    while logged(directory) < steps and not os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        time.sleep(0.001)
    time.sleep(delay)
    os.killpg(child, number)
    return exit_code_of(child)


def kill_often(directory: Path, kills: int, seed: int) -> list[list[str]]:
    """Trainings that are killed at random moments and resumed: the name of each, and what its directory held."""
    dice = random.Random(seed)
    trainings: list[list[str]] = []
    while kills:
        own = directory / f"training-{len(trainings)}"
        own.mkdir()
        story = [own.name]
        while not (own / "weights.sha256").exists():
            found = checkpoints.all_in(own / "checkpoints")
            begins = int(found[-1].name.removeprefix("step-")) if found else 0
            # Steps that were logged after the checkpoint are in the log already: then it dies while it starts.
            steps = begins + dice.randrange(1, 6)
            child = attempt(own)
            if kills and steps < STEPS:
                code = end_after(child, own, steps, signal.SIGKILL, delay=dice.uniform(0, 0.1))
            else:
                code = exit_code_of(child)
            assert code in (0, -signal.SIGKILL)
            kills -= code == -signal.SIGKILL
            story.append(check_readable(own, code))
        trainings.append(story)
    return trainings


def check_readable(directory: Path, code: int) -> str:
    """Every checkpoint is whole and every line of the log a step."""
    found = [checkpoints.read(path).step for path in checkpoints.all_in(directory / "checkpoints")]
    steps = [int(record["step"]) for record in read_steps(directory / "metrics.jsonl")] if logged(directory) else []
    assert steps == list(range(1, len(steps) + 1))
    assert not found or found[-1] <= len(steps)
    return f"exit {code} after step {len(steps)} with checkpoints {found}"


def nursery(*arguments: object) -> str:
    finished = subprocess.run(
        [sys.executable, __file__, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=1800,
        env=environment(),
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    return finished.stdout


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def compare(directory: Path, kills: int, seed: int) -> None:
    trainings = json.loads(nursery("kill", directory, kills, seed).splitlines()[-1])
    expected = (directory / "whole" / "weights.sha256").read_text()
    assert sum(entry.startswith("exit -9") for story in trainings for entry in story) == kills
    whole = (directory / "whole" / "metrics.jsonl").read_text()
    for name, *story in trainings:
        assert (directory / name / "weights.sha256").read_text() == expected, story
        assert (directory / name / "metrics.jsonl").read_text() == whole, story


@pytest.mark.slow
def test_a_training_that_is_killed_twice_ends_with_the_weights_of_one_that_was_not(tmp_path):
    compare(tmp_path, kills=2, seed=0)


@pytest.mark.slow
@pytest.mark.kill
def test_trainings_that_are_killed_twenty_times_end_with_the_weights_of_one_that_was_not(tmp_path):
    compare(tmp_path, kills=20, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "num_workers"), [(signal.SIGTERM, 1), (signal.SIGINT, 0)])
def test_a_process_group_that_is_told_to_stop_exits_with_a_code_of_its_own_and_can_be_resumed(
    tmp_path, number, num_workers
):
    # To the whole group, as schedulers and terminals do it, processes that load images included.
    code, steps, checkpoint = json.loads(nursery("stop", tmp_path, int(number), num_workers).splitlines()[-1])
    assert code == 75
    assert 4 <= steps < STEPS
    assert checkpoint == f"step-{steps:08d}"
    assert logged(tmp_path) == STEPS


def sharding_accelerator() -> Accelerator:
    """Accelerate shards on GPUs alone, and takes the plugin for an ordinary run of several processes on CPUs."""
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    accelerator.state.distributed_type, accelerator.state.fsdp_plugin = DistributedType.FSDP, plugin
    return accelerator


def two_processes(directory: Path, *, sharded: bool = False) -> None:
    """One of two processes that train together; a signal to one of them stops both."""
    accelerator = sharding_accelerator() if sharded else Accelerator(cpu=True)
    rank = accelerator.process_index
    step = make_step(tune=cross_entropy_tuning).double()
    inputs = in_double(make_inputs(step.encoder))
    config = TrainerConfig(
        learning_rate=1e-3,
        epochs=4,
        batch_size=4 // accelerator.num_processes,
        gradient_accumulation=2,
        max_gradient_norm=0.5,
        ema=0.5,
        watch_every=2,
    )
    callbacks = [Stop(3)] if rank == 1 and not (directory / "checkpoints").exists() else []
    accelerator.wait_for_everyone()  # before the first one writes a checkpoint
    try:
        panel = in_double(make_inputs(step.encoder))
        Trainer(config, accelerator, directory, callbacks).fit(step, inputs, seed=0, resume=True, panel=panel)
        save_file(weights_of(step), directory / f"weights-{rank}.safetensors")
    except Interrupted as interrupted:
        (directory / f"interrupted-{rank}").write_text(str(interrupted.checkpoint))
    finally:
        accelerator.end_training()


def launch_two(directory: Path, task: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__]
    subprocess.run([*command, task, str(directory)], check=True, timeout=900, env=environment())


@pytest.mark.slow
@pytest.mark.parametrize("task", ["together", "sharded"])
def test_two_processes_train_as_one_does_and_stop_and_resume_together(tmp_path, task):
    launch_two(tmp_path / "two", task)
    checkpoint = tmp_path / "two" / "checkpoints" / "step-00000003"
    assert {(tmp_path / "two" / f"interrupted-{rank}").read_text() for rank in range(2)} == {str(checkpoint)}
    launch_two(tmp_path / "two", task)
    (tmp_path / "one").mkdir()
    two_processes(tmp_path / "one")
    alone = load_file(tmp_path / "one" / "weights-0.safetensors")
    for rank in range(2):
        together = load_file(tmp_path / "two" / f"weights-{rank}.safetensors")
        for name, expected in alone.items():
            torch.testing.assert_close(together[name], expected, msg=name)
    alone, together = (read_steps(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    assert together == [pytest.approx(step, rel=1e-5) for step in alone]


def main(task: str, directory: Path, *numbers: int) -> None:
    directory.mkdir(exist_ok=True)
    if task in ("together", "sharded"):
        two_processes(directory, sharded=task == "sharded")
    elif task == "stop":
        number, num_workers = numbers
        code = end_after(attempt(directory, num_workers), directory, 4, number)
        found = [code, logged(directory), [path.name for path in checkpoints.all_in(directory / "checkpoints")][-1]]
        assert exit_code_of(attempt(directory)) == 0
        sys.stdout.write(f"\n{json.dumps(found)}\n")
    else:
        (directory / "whole").mkdir()
        assert exit_code_of(attempt(directory / "whole")) == 0
        sys.stdout.write(f"\n{json.dumps(kill_often(directory, *numbers))}\n")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:]))
