import json
import random
import shutil

import numpy as np
import pytest
import torch

from evidence_ft import checkpoints
from evidence_ft.checkpoints import RandomState, ResumeError
from evidence_ft.files import RunFileError


def write(directory, step, keep=2, scale=1.0):
    tensors = {"model": {"w": torch.arange(6.0).view(2, 3) * scale}, "optimizer": {"w/step": torch.tensor(float(step))}}
    return checkpoints.write(directory, step, {"lr": 0.1, "seen": [1, 2]}, tensors, keep=keep)


def names_in(directory):
    return sorted(path.name for path in directory.iterdir())


def test_what_was_written_is_read(tmp_path):
    path = write(tmp_path, 12)
    found = checkpoints.read(path)
    assert (found.step, found.state, path.name) == (12, {"lr": 0.1, "seen": [1, 2]}, "step-00000012")
    assert torch.equal(found.tensors["model"]["w"], torch.arange(6.0).view(2, 3))
    assert found.tensors["optimizer"]["w/step"].item() == 12


def test_tensors_that_share_memory_are_written_whole(tmp_path):
    both = torch.arange(6.0)
    path = checkpoints.write(tmp_path, 1, {}, {"model": {"a": both[:3], "b": both[3:], "c": both.view(2, 3).T}}, keep=1)
    found = checkpoints.read(path).tensors["model"]
    assert torch.equal(found["b"], torch.tensor([3.0, 4.0, 5.0]))
    assert torch.equal(found["c"], both.view(2, 3).T)


def test_only_the_newest_are_kept(tmp_path):
    for step in (5, 10, 100):
        write(tmp_path, step, keep=2)
    assert names_in(tmp_path) == ["step-00000010", "step-00000100"]
    assert checkpoints.all_in(tmp_path)[-1] == tmp_path / "step-00000100"


def test_a_checkpoint_that_is_not_there_is_named_with_what_is(tmp_path):
    with pytest.raises(
        RunFileError, match=r"no checkpoint .*gone/checkpoints/x; there is no folder .*checkpoints either"
    ):
        checkpoints.read(tmp_path / "gone" / "checkpoints" / "x")
    write(tmp_path / "checkpoints", 5)
    with pytest.raises(RunFileError, match=r"no checkpoint .*step-00000007; there are '.*step-00000005'"):
        checkpoints.read(tmp_path / "checkpoints" / "step-00000007")
    with pytest.raises(RunFileError, match=r"is no checkpoint: it has no state\.json; there are '.*step-00000005'"):
        checkpoints.read(tmp_path)


def test_what_a_training_was_begun_with_is_read_back(tmp_path):
    assert checkpoints.begun_with(tmp_path) is None
    checkpoints.begin(tmp_path / "checkpoints", {"seed": 0})
    assert checkpoints.begun_with(tmp_path / "checkpoints") == {"seed": 0}
    (tmp_path / "checkpoints" / "settings.json").write_text("{")
    with pytest.raises(RunFileError, match=r"settings\.json is damaged"):
        checkpoints.begun_with(tmp_path / "checkpoints")
    checkpoints.remove_all(tmp_path / "checkpoints")
    assert not (tmp_path / "checkpoints").exists()


def test_a_checkpoint_of_the_same_step_stays(tmp_path):
    write(tmp_path, 5)
    path = write(tmp_path, 5, scale=2.0)
    assert checkpoints.read(path).tensors["model"]["w"][0, 1] == 1.0
    assert names_in(tmp_path) == ["step-00000005"]


def test_a_copy_of_a_checkpoint_is_nobodys_business(tmp_path):
    write(tmp_path, 1)
    for name in ("step-00000001-backup", "step-mine"):
        shutil.copytree(tmp_path / "step-00000001", tmp_path / name)
    write(tmp_path, 2, keep=1)
    checkpoints.remove_after(tmp_path, 1)
    assert names_in(tmp_path) == ["step-00000001-backup", "step-mine"]


def test_where_there_is_none_there_is_no_latest(tmp_path):
    assert checkpoints.all_in(tmp_path) == []
    assert checkpoints.read_latest(tmp_path / "nowhere") is None


class Crash(BaseException):
    """The process is gone."""


@pytest.mark.parametrize("moment", ["save_file", "sha256_of", "_to_disk", "_remove"])
def test_a_crash_at_any_moment_leaves_whole_checkpoints_and_the_next_one_clears_up(tmp_path, monkeypatch, moment):
    write(tmp_path, 1, keep=1)

    def crash(*arguments, **options):
        raise Crash

    monkeypatch.setattr(checkpoints, moment, crash)
    with pytest.raises(Crash):
        write(tmp_path, 2, keep=1)
    monkeypatch.undo()
    for path in checkpoints.all_in(tmp_path):
        checkpoints.read(path)
    # `_remove` comes when the new one is in place, all others before.
    assert checkpoints.read_latest(tmp_path).step == (2 if moment == "_remove" else 1)
    write(tmp_path, 3, keep=1)
    assert names_in(tmp_path) == ["step-00000003"]


def test_a_crash_while_an_old_one_is_removed_does_not_leave_half_of_it(tmp_path, monkeypatch):
    write(tmp_path, 1, keep=1)

    def half(path):
        (path / "state.json").unlink()
        raise Crash

    monkeypatch.setattr(checkpoints.shutil, "rmtree", half)
    with pytest.raises(Crash):
        write(tmp_path, 2, keep=1)
    assert [checkpoints.read(path).step for path in checkpoints.all_in(tmp_path)] == [2]


def damage(path, file):
    content = bytearray((path / file).read_bytes())
    content[-1] ^= 1
    (path / file).write_bytes(content)


def test_a_damaged_checkpoint_is_named_with_its_file(tmp_path):
    path = write(tmp_path, 3)
    damage(path, "model.safetensors")
    with pytest.raises(RunFileError, match=r"step-00000003 is damaged: model\.safetensors is not the file"):
        checkpoints.read(path)
    (path / "model.safetensors").unlink()
    with pytest.raises(RunFileError, match=r"step-00000003 is damaged: model\.safetensors: .*No such file"):
        checkpoints.read(path)
    (path / "state.json").write_text('{"format_version": 1')
    with pytest.raises(RunFileError, match=r"step-00000003 is damaged: state\.json"):
        checkpoints.read(path)
    (path / "state.json").write_text(json.dumps({"format_version": 9}))
    with pytest.raises(RunFileError, match="format_version 9, expected 1"):
        checkpoints.read(path)
    with pytest.raises(RunFileError, match=r"is no checkpoint: it has no state\.json"):
        checkpoints.read(tmp_path)


def test_instead_of_a_damaged_checkpoint_the_one_before_is_read_with_a_warning(tmp_path, caplog):
    write(tmp_path, 3)
    damage(write(tmp_path, 6), "optimizer.safetensors")
    assert checkpoints.read_latest(tmp_path).step == 3
    assert "step-00000006 is damaged" in caplog.text


def test_where_all_checkpoints_are_damaged_nothing_starts_over_in_silence(tmp_path):
    for step in (3, 6):
        damage(write(tmp_path, step), "model.safetensors")
    with pytest.raises(RunFileError, match=r"no checkpoint .*step-00000006 .*step-00000003 .*remove the folder"):
        checkpoints.read_latest(tmp_path)


def test_checkpoints_after_a_step_can_be_removed(tmp_path):
    for step in (3, 6, 9):
        write(tmp_path, step, keep=3)
    checkpoints.remove_after(tmp_path, 6)
    assert names_in(tmp_path) == ["step-00000003", "step-00000006"]


def test_every_difference_in_settings_is_named(tmp_path):
    then, now = {"a": 1, "b": [1, 2], "c": None}, {"a": 1, "b": [1, 3], "d": "x"}
    with pytest.raises(ResumeError, match=r"b was \[1, 2\], is \[1, 3\]; c was None, is not set; d was .*'x'"):
        checkpoints.check_settings(tmp_path, then, now)


def test_weights_of_another_model_are_refused(tmp_path):
    weight = torch.zeros(2, 3)
    with pytest.raises(ResumeError, match="lacks 'w' and also has 'v'"):
        checkpoints.copy_into({"w": weight}, {"v": weight}, tmp_path)
    with pytest.raises(ResumeError, match=r"w is \(3, 2\), expected \(2, 3\)"):
        checkpoints.copy_into({"w": weight}, {"w": weight.T}, tmp_path)


def test_an_optimizer_with_another_ones_state_takes_the_same_steps():
    def fitted(weights, steps, optimizer=None):
        optimizer = optimizer or torch.optim.AdamW([{"params": [weights["b"]]}, {"params": [weights["a"]]}], lr=0.1)
        for step in range(steps):
            optimizer.zero_grad()
            ((weights["a"] - step).square().sum() + weights["b"].pow(4).sum()).backward()
            optimizer.step()
        return optimizer

    def start():
        return {"a": torch.ones(2, requires_grad=True), "b": torch.ones(3, requires_grad=True)}

    whole, first, second = start(), start(), start()
    kept = checkpoints.optimizer_state(fitted(first, steps=3), first)
    assert set(kept) == {f"{name}/{key}" for name in "ab" for key in ("step", "exp_avg", "exp_avg_sq")}
    with torch.no_grad():
        for name, value in second.items():
            value.copy_(first[name])
    resumed = fitted(second, steps=0)
    checkpoints.load_optimizer_state(resumed, second, kept)
    fitted(whole, steps=2, optimizer=fitted(whole, steps=3))
    fitted(second, steps=2, optimizer=resumed)
    assert all(torch.equal(whole[name], second[name]) for name in whole)


def test_a_hash_tells_names_types_shapes_and_values_apart():
    ones = torch.ones(2, 3)
    variants = [{"w": ones}, {"v": ones}, {"w": ones.T}, {"w": ones.int()}, {"w": 2 * ones}, {"w": torch.tensor(1.0)}]
    assert len({checkpoints.hash_of(tensors) for tensors in variants}) == len(variants)
    assert checkpoints.hash_of({"w": torch.ones(3, 2).T}) == checkpoints.hash_of({"w": ones})


def draws():
    """From every global source, in a way that depends on all of its state."""
    numpy = np.random.standard_normal(), np.random.random()  # noqa: NPY002
    return torch.rand(3).tolist(), numpy, random.gauss(0, 1), random.random()


def test_every_global_source_of_randomness_goes_on_where_it_was():
    cpu = torch.device("cpu")
    before = RandomState.capture(cpu)
    draws()  # normal draws come in pairs: now each source holds one back
    tree = json.loads(json.dumps(RandomState.capture(cpu).to_json()))
    expected = draws()
    assert draws() != expected
    RandomState.from_json(tree).restore(cpu)
    assert draws() == expected
    before.restore(cpu)
