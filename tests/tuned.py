"""Every method on a small model, its trained weights moved as training would move them."""

import torch
from accelerate import Accelerator

from evidence_ft.backbones import open_clip as backbone
from evidence_ft.classifier import FineTuning
from evidence_ft.evaluation import evaluate
from evidence_ft.heatmaps import gradient_attention
from evidence_ft.methods import clip_adapter, coop, flcp, ft, lora, lp, lp_ft, tip_adapter, zero_shot
from evidence_ft.saved_model import BaseModelRef, save_model
from evidence_ft.transforms import ModelInputs, SampleTransform
from tests.in_memory import InMemory

CLASSES = ("cat", "dog")
TUNED = {
    "zero_shot": (zero_shot, zero_shot.Config()),
    "lp": (lp, lp.Config()),
    "lp, random": (lp, lp.Config(head="random")),
    "flcp": (flcp, flcp.Config()),
    "flcp, image tower": (flcp, flcp.Config(text="frozen")),
    "flcp, LoRA in the text tower": (flcp, flcp.Config(vision="frozen", text="lora")),
    "ft": (ft, ft.Config()),
    "ft, LoRA": (ft, ft.Config(vision="lora")),
    "lora on flcp": (lora, lora.Config()),
    "lora on flcp, fixed scale": (lora, lora.Config(train_logit_scale=False)),
    "lora on ft": (lora, lora.Config(objective="ft")),
    "coop": (coop, coop.Config()),
    "coop, each class": (coop, coop.Config(init="random", context_length=2, class_specific=True)),
    "clip_adapter": (clip_adapter, clip_adapter.Config()),
    "tip_adapter": (tip_adapter, tip_adapter.Config()),
    "tip_adapter, trained": (tip_adapter, tip_adapter.Config(fine_tune=True)),
    "lp_ft": (lp_ft, lp_ft.Config()),
}


class Tuned:
    """A method on a base model, its trained weights moved as training would move them."""

    def __init__(self, base, name):
        encoder = backbone.load(base)
        self.base = BaseModelRef.of(encoder)
        method, self.config = TUNED[name]
        self.tuning: FineTuning = method.prepare(encoder, CLASSES, self.config)
        generator = torch.Generator().manual_seed(3)
        if self.tuning.read_training_set is not None:
            width = encoder.encode_text(["a"]).shape[1]
            self.tuning.read_training_set(torch.randn(6, width, generator=generator), torch.arange(6) % 2)
        with torch.no_grad():
            for part in (encoder, self.tuning.head):
                for parameter in part.parameters():
                    if parameter.requires_grad:
                        parameter += 0.05 * torch.randn(parameter.shape, generator=generator)

    def save(self, folder, **changes):
        arguments = {"class_names": CLASSES, "method_config": self.config, "base": self.base} | changes
        save_model(folder, self.tuning, **arguments)
        return folder


def outcomes(tuning):
    inputs = ModelInputs(InMemory(12, size=(48, 32)), SampleTransform(tuning.encoder.preprocessing), seed=0)
    table = evaluate(tuning.classifier(), inputs, gradient_attention.heatmap, accelerator=Accelerator(cpu=True))
    return table.table.to_pydict()
