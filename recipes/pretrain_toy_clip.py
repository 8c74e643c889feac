"""Pre-train `toy_clip`, the small CLIP that comes with the package, on captioned shapes without the shortcut.

    python recipes/pretrain_toy_clip.py --output src/evidence_ft/assets/toy_clip

A ViT of 4 blocks on 8 x 8 patches and a text transformer of 2 blocks, contrastively trained on generated images and
captions such as "a red star at the top left". It never sees a tag. The result is in open_clip's own layout and loads
as `local-dir:<output>`. One thread, so that the same seed gives the same weights on the same machine whatever else runs
there; about a quarter of an hour.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import open_clip
import torch
import tyro
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from evidence_ft.contrastive import contrastive_loss
from evidence_ft.datasets import shapes

COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
HUES = (0.0, 0.08, 0.16, 0.33, 0.5, 0.63, 0.77, 0.9)
TEMPLATES = (
    "a photo of a {name}",
    "a {colour} {name}",
    "a photo of a {colour} {name}",
    "a {name} at the {place}",
    "a {colour} {name} at the {place}",
)
CONTEXT_LENGTH, VOCABULARY, MEAN_AND_STD = 16, 400, [0.5, 0.5, 0.5]


@dataclass(frozen=True)
class Config:
    """How long to train, and where the model goes."""

    output: Path
    """folder for the model, in open_clip's layout"""
    images: int = 30_000
    """images drawn once, before training"""
    epochs: int = 8
    """passes over the images; captions are drawn anew in each"""
    batch_size: int = 64
    """images, and captions, in a contrastive batch"""
    learning_rate: float = 1e-3
    """peak of the warm-up and cosine schedule"""
    seed: int = 20_241_217
    """of images, captions and weights; images of `shapes` come from other seeds"""


def caption(generator: np.random.Generator, label: int, hue: float, centre: tuple[float, float]) -> str:
    distance = np.abs((np.asarray(HUES) - hue + 0.5) % 1 - 0.5)
    x, y = centre
    place = f"{'top' if y < 0.5 else 'bottom'} {'left' if x < 0.5 else 'right'}"
    # Most captions say no more than the shape: colours and places are learnt much sooner, and would crowd it out.
    template = TEMPLATES[0 if generator.uniform() < 0.8 else generator.integers(len(TEMPLATES))]
    return template.format(name=shapes.CLASS_NAMES[label], colour=COLOURS[distance.argmin()], place=place)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE over the captions' words: small, and no text is out of its vocabulary."""
    words = [*shapes.CLASS_NAMES, *COLOURS, "top left", "top right", "bottom left", "bottom right"]
    texts = [template.format(name=w, colour=w, place=w) for template in TEMPLATES for w in words]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 1,
        special_tokens=["<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    # open_clip's text tower reads the token of the highest id, so the end of the text comes last.
    tokenizer.add_special_tokens(["<end>"])
    end = tokenizer.token_to_id("<end>")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A <end>", special_tokens=[("<end>", end)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>")


def main(config: Config) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(config.seed)
    generator = np.random.default_rng(config.seed)
    config.output.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(config.output)
    model_config = {
        "embed_dim": 64,
        "vision_cfg": {
            "image_size": shapes.SIZE,
            "patch_size": 8,
            "width": 96,
            "head_width": 24,
            "layers": 4,
        },
        "text_cfg": {
            "context_length": CONTEXT_LENGTH,
            "vocab_size": len(tokenizer),
            "width": 64,
            "heads": 2,
            "layers": 2,
            "hf_tokenizer_name": "toy_clip",
        },
    }
    preprocessing = {
        "mean": MEAN_AND_STD,
        "std": MEAN_AND_STD,
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    }
    layout = {"model_cfg": model_config, "preprocess_cfg": preprocessing}
    (config.output / "open_clip_config.json").write_text(json.dumps(layout, indent=1) + "\n")

    model = open_clip.CLIP(**model_config, output_dict=False)
    # At open_clip's own 0.02 all short captions start out alike, and the loss stays where it is for thousands of steps.
    torch.nn.init.normal_(model.token_embedding.weight, std=0.5)
    data = shapes.Shapes("plain", config.images, config.seed)
    drawings = [data.draw(row) for row in tqdm(range(config.images), desc="drawing")]
    pixels = torch.from_numpy(np.stack([np.asarray(drawing.image) for drawing in drawings])).permute(0, 3, 1, 2)
    tokenize = open_clip.tokenizer.HFTokenizer(config.output, context_length=CONTEXT_LENGTH)

    decayed = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    others = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.98))
    steps = config.epochs * (config.images // config.batch_size)

    def rate(step: int) -> float:
        return min(step / 200, 0.5 * (1 + math.cos(math.pi * step / steps)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    with tqdm(total=steps, desc="pre-training") as bar:
        for _ in range(config.epochs):
            order = generator.permutation(config.images)[: steps // config.epochs * config.batch_size]
            for rows in order.reshape(-1, config.batch_size):
                texts = [caption(generator, data.labels[i], drawings[i].hue, drawings[i].centre) for i in rows]
                images: Tensor = pixels[rows].float() / 127.5 - 1
                loss = contrastive_loss(
                    model.encode_image(images), model.encode_text(tokenize(texts)), model.logit_scale.exp()
                )
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                with torch.no_grad():
                    model.logit_scale.clamp_(max=math.log(100))
                bar.set_postfix(loss=f"{loss.item():.3f}")
                bar.update()
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, config.output / "open_clip_model.safetensors")
    print(f"wrote {config.output}")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
