"""What holds for all methods: what is trained learns, what is frozen stays, and the head's state is all there is."""

import pytest
import torch

from evidence_ft.methods import clip_adapter, coop, flcp, ft, lora, lp, lp_ft, tip_adapter, zero_shot
from tests.conftest import build_encoder
from tests.methods.fitting import NAMES, fit, losses, parameters, random_batch, read_training_set, snapshot, trained

METHODS = {
    "zero_shot": (zero_shot, zero_shot.Config()),
    "tip_adapter": (tip_adapter, tip_adapter.Config()),
    "lp": (lp, lp.Config()),
    "lp-random": (lp, lp.Config(head="random")),
    "flcp": (flcp, flcp.Config()),
    "flcp-7": (flcp, flcp.Config(templates=("a {}", "the {}", "my {}"))),
    "flcp-vision": (flcp, flcp.Config(text="frozen", train_logit_scale=False)),
    "flcp-text": (flcp, flcp.Config(vision="frozen")),
    "ft": (ft, ft.Config()),
    "lp_ft": (lp_ft, lp_ft.Config(l2=1e-3)),
    "lora-flcp": (lora, lora.Config()),
    "lora-ft": (lora, lora.Config(objective="ft")),
    "coop": (coop, coop.Config()),
    "coop-specific": (coop, coop.Config(init="random", context_length=3, class_specific=True)),
    "clip_adapter": (clip_adapter, clip_adapter.Config()),
    "tip_adapter_f": (tip_adapter, tip_adapter.Config(fine_tune=True)),
}
TRAINING = [name for name in METHODS if name not in ("zero_shot", "tip_adapter")]
FROZEN_TOWERS = {
    "lp": {"head.weight"},
    "lp-random": {"head.weight"},
    "coop": {"head.vectors"},
    "coop-specific": {"head.vectors"},
    "clip_adapter": {"head.down.weight", "head.up.weight"},
    "tip_adapter_f": {"head.keys"},
}
"""Of methods that train nothing below the features: what the gradient of their score depends on."""


def prepared(name, seed=0):
    module, config = METHODS[name]
    encoder = build_encoder("native", seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return module.prepare(encoder, NAMES, config)


def ready(name):
    """Prepared, with the training set read and a batch to train on."""
    tuning = prepared(name)
    batch = random_batch(tuning.encoder)
    read_training_set(tuning, batch)
    return tuning, batch


def tower_names(tuning):
    mine = {id(parameter) for parameter in tuning.encoder.image_tower.parameters()}
    return {name for name, parameter in parameters(tuning).items() if id(parameter) in mine}


def test_each_method_trains_what_it_says():
    found = {name: prepared(name) for name in METHODS}
    linear = {"head.weight", "head.bias"}
    for name, expected in {
        "zero_shot": set(),
        "tip_adapter": set(),
        "lp": linear,
        "lp-random": linear,
        "coop": {"head.vectors"},
        "coop-specific": {"head.vectors"},
        "clip_adapter": {"head.down.weight", "head.up.weight"},
        "tip_adapter_f": {"head.keys"},
        "flcp": set(parameters(found["flcp"])),
        "flcp-vision": tower_names(found["flcp-vision"]),
        "flcp-text": set(parameters(found["flcp-text"])) - tower_names(found["flcp-text"]),
        "ft": tower_names(found["ft"]) | linear,
        "lp_ft": tower_names(found["lp_ft"]) | linear,
    }.items():
        assert set(trained(found[name])) == expected, name
        assert found[name].trains == bool(expected)


@pytest.mark.parametrize(
    ("name", "others"), [("lora-flcp", {"model.logit_scale"}), ("lora-ft", {"head.weight", "head.bias"})]
)
def test_lora_trains_adapters_and_little_else(name, others):
    tuning = prepared(name)
    adapters = {each for each in trained(tuning) if ".lora_" in each}
    assert set(trained(tuning)) - adapters == others
    of_text = adapters - tower_names(tuning)
    assert adapters - of_text
    assert bool(of_text) == (name == "lora-flcp")


@pytest.mark.parametrize("name", TRAINING)
def test_what_is_frozen_stays_as_it_is_bit_by_bit_and_all_else_moves(name):
    tuning, batch = ready(name)
    moving = {id(parameter) for parameter in trained(tuning).values()}
    shared = {**tuning.encoder.state_dict(keep_vars=True), **tuning.head.state_dict(prefix="head.", keep_vars=True)}
    before = snapshot(tuning)
    fit(tuning, batch, steps=5)
    after = snapshot(tuning)
    assert set(after) == set(before)
    moved = {each for each in before if not torch.equal(before[each], after[each])}
    assert moved == {each for each, tensor in shared.items() if id(tensor) in moving}


@pytest.mark.parametrize("name", TRAINING)
def test_every_trained_parameter_receives_a_gradient_of_the_task(name):
    tuning, batch = ready(name)
    if name.startswith("lora"):
        fit(tuning, batch, steps=1)  # until B has left zero, A has no gradient
    task, _ = losses(tuning, batch)
    task.backward()
    without = [each for each, parameter in trained(tuning).items() if parameter.grad is None]
    assert without == []
    unmoved = [each for each, parameter in trained(tuning).items() if not parameter.grad.any()]
    assert unmoved == []


@pytest.mark.parametrize("name", FROZEN_TOWERS)
def test_the_evidence_loss_reaches_the_head_on_frozen_towers(name):
    tuning, batch = ready(name)
    _, evidence = losses(tuning, batch)
    evidence.backward()
    reached = {
        each for each, parameter in trained(tuning).items() if parameter.grad is not None and parameter.grad.any()
    }
    assert reached == FROZEN_TOWERS[name]


@pytest.mark.parametrize("name", ["flcp", "flcp-vision", "ft", "lp_ft", "lora-flcp", "lora-ft"])
def test_the_evidence_loss_reaches_every_block_of_a_trained_tower(name):
    tuning, batch = ready(name)
    fit(tuning, batch, steps=1)
    for parameter in parameters(tuning).values():
        parameter.grad = None
    _, evidence = losses(tuning, batch)
    evidence.backward()
    for block in tuning.encoder.image_tower.blocks():
        learning = [parameter for parameter in block.parameters() if parameter.requires_grad]
        assert any(parameter.grad is not None and parameter.grad.any() for parameter in learning)


@pytest.mark.parametrize("name", FROZEN_TOWERS)
def test_a_head_can_be_trained_on_evidence_alone(name):
    tuning, batch = ready(name)
    optimizer = torch.optim.AdamW(trained(tuning).values(), lr=1e-2)
    history = []
    for _ in range(15):
        optimizer.zero_grad()
        _, evidence = losses(tuning, batch)
        evidence.backward()
        optimizer.step()
        history.append(evidence.item())
    assert history[-1] < history[0]


@pytest.mark.parametrize("name", TRAINING)
def test_a_batch_is_learned(name):
    tuning, batch = ready(name)
    history = fit(tuning, batch, steps=20, learning_rate=1e-2)
    assert max(history[-3:]) < history[0]


@pytest.mark.parametrize("name", METHODS)
def test_the_state_of_the_head_is_all_that_a_method_adds(name):
    tuning, batch = ready(name)
    if tuning.trains:
        fit(tuning, batch, steps=3, learning_rate=1e-2)
    anew = prepared(name, seed=1)  # other weights, and no training set is read
    anew.head.load_state_dict(tuning.head.state_dict())
    anew.encoder.load_state_dict(tuning.encoder.state_dict())
    with torch.no_grad():
        found, expected = (each.classifier().head(each.encoder.image_tower(batch.images)) for each in (anew, tuning))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", METHODS)
def test_the_classifier_keeps_tower_and_class_names(name):
    tuning = prepared(name)
    classifier = tuning.classifier()
    assert classifier.class_names == NAMES
    assert classifier.tower is tuning.encoder.image_tower


@pytest.mark.parametrize(
    "name", ["flcp", "flcp-text", "lp", "ft", "lora-flcp", "lora-ft", "coop", "tip_adapter", "tip_adapter_f"]
)
def test_before_training_the_classifier_is_the_zero_shot_one(name, generator):
    features = torch.randn(5, 10, generator=generator)
    expected = prepared("zero_shot").classifier().head(features)
    torch.testing.assert_close(prepared(name).classifier().head(features), expected)


@pytest.mark.parametrize("name", TRAINING)
def test_a_method_makes_no_difference_between_names_with_spaces_and_underscores(name):
    module, config = METHODS[name]
    with torch.random.fork_rng():
        states = []
        for second in ("sea_lion", "sea lion"):
            torch.manual_seed(0)
            tuning = module.prepare(build_encoder(), ["cat", second, "dog"], config)
            states.append(tuning.classifier().head(torch.ones(1, 10)))
    assert torch.equal(*states)


@pytest.mark.parametrize("name", METHODS)
def test_settings_read_back_what_they_write(name):
    module, config = METHODS[name]
    assert module.Config.model_validate(config.model_dump(mode="json")) == config
