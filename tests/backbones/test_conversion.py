"""One CLIP in the layouts of open_clip and of transformers, by way of the key map of transformers' own conversion."""

import open_clip
import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

from evidence_ft.backbones.hf_clip import HfClipEncoder
from evidence_ft.backbones.open_clip import OpenClipEncoder
from evidence_ft.classifier import prompt_classifier
from evidence_ft.evidence import mask_to_grid, relevance_mass_accuracy
from evidence_ft.heatmaps import gradient_attention
from evidence_ft.metrics import rationality

NAMES = ["cat", "dog", "red circle"]
SIZES = {
    "embed_dim": 10,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 40, "patch_size": 8, "width": 24, "head_width": 8, "layers": 3},
    "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
}
PLAIN = {
    "logit_scale": "logit_scale",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
}
TRANSPOSED = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}
BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}
TOWERS = {"visual.transformer.resblocks": ("vision_model", 3), "transformer.resblocks": ("text_model", 2)}


def names_in_blocks():
    """Pairs of (open_clip's name, transformers' name), and (fused name, names of its three parts)."""
    plain, fused = {}, {}
    for theirs, (tower, depth) in TOWERS.items():
        for layer in range(depth):
            for kind in ("weight", "bias"):
                block = f"{tower}.encoder.layers.{layer}"
                plain |= {f"{theirs}.{layer}.{a}.{kind}": f"{block}.{b}.{kind}" for a, b in BLOCK.items()}
                parts = [f"{block}.self_attn.{part}_proj.{kind}" for part in "qkv"]
                fused[f"{theirs}.{layer}.attn.in_proj_{kind}"] = parts
    return PLAIN | plain, fused


def to_transformers(state):
    plain, fused = names_in_blocks()
    converted = {name: state[of_open_clip] for of_open_clip, name in plain.items()}
    converted |= {name: state[of_open_clip].T for of_open_clip, name in TRANSPOSED.items()}
    for of_open_clip, parts in fused.items():
        converted |= dict(zip(parts, state[of_open_clip].chunk(3), strict=True))
    return converted


def to_open_clip(state):
    plain, fused = names_in_blocks()
    converted = {of_open_clip: state[name] for of_open_clip, name in plain.items()}
    converted |= {of_open_clip: state[name].T for of_open_clip, name in TRANSPOSED.items()}
    return converted | {
        of_open_clip: torch.cat([state[name] for name in parts]) for of_open_clip, parts in fused.items()
    }


@pytest.fixture(scope="module")
def of_open_clip():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = open_clip.CLIP(**SIZES)
    open_clip.factory.set_model_preprocess_cfg(model, {"size": 40, "mean": (0.5,) * 3, "std": (0.5,) * 3})
    return OpenClipEncoder(model, SimpleTokenizer(context_length=20), {"model_cfg": SIZES}, "").eval()


@pytest.fixture(scope="module")
def of_transformers(of_open_clip):
    simple = of_open_clip.tokenizer
    merges = [pair for pair, _ in sorted(simple.bpe_ranks.items(), key=lambda item: item[1])]
    vocabulary = {
        {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}.get(token, token): index
        for token, index in simple.encoder.items()
    }
    tower = {"hidden_act": "quick_gelu"}
    config = CLIPConfig(
        projection_dim=10,
        vision_config=tower
        | {"image_size": 40, "patch_size": 8, "hidden_size": 24, "intermediate_size": 96}
        | {"num_hidden_layers": 3, "num_attention_heads": 3},
        text_config=tower
        | {"hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        | {"max_position_embeddings": 20},
    )
    model = CLIPModel(config)
    missing, unexpected = model.load_state_dict(to_transformers(of_open_clip.model.state_dict()), strict=False)
    assert not unexpected
    assert not [name for name in missing if "position_ids" not in name]
    processor = CLIPImageProcessor(size={"shortest_edge": 40}, crop_size=40, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    return HfClipEncoder(model, CLIPTokenizer(vocab=vocabulary, merges=merges), processor, "").eval()


def test_there_and_back_is_where_it_began(of_open_clip):
    state = of_open_clip.model.state_dict()
    again = to_open_clip(to_transformers(state))
    assert set(again) == {name for name in state if name != "attn_mask"}
    assert all(torch.equal(again[name], state[name]) for name in again)


def test_back_from_transformers_open_clip_reads_it(of_open_clip, of_transformers):
    of_open_clip.model.load_state_dict(to_open_clip(of_transformers.weights()), strict=True)


def test_texts_have_the_same_features(of_open_clip, of_transformers):
    texts = [f"A photo of a {name}, isn't it?" for name in NAMES]
    torch.testing.assert_close(
        of_transformers.encode_text(texts), of_open_clip.encode_text(texts), rtol=1e-5, atol=1e-6
    )
    context = of_open_clip.embed_words("a photo of a")
    torch.testing.assert_close(of_transformers.embed_words("a photo of a"), context)
    torch.testing.assert_close(
        of_transformers.encode_with_context(NAMES, context),
        of_open_clip.encode_with_context(NAMES, context),
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.parametrize("layers", [[-1], [0, 2], "all"])
def test_images_have_the_same_heatmaps_and_the_same_rationality(of_open_clip, of_transformers, layers):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(24, 3, 40, 40, generator=generator)
    labels = torch.randint(3, (24,), generator=generator)
    masks = torch.zeros(24, 40, 40, dtype=torch.uint8)
    masks[:, :24] = 1
    found = []
    for encoder in (of_open_clip, of_transformers):
        classifier = prompt_classifier(encoder, NAMES, "a photo of a {}")
        trace = encoder.image_tower.trace(images, layers)
        heatmaps = gradient_attention.heatmap(trace, classifier.score_of(labels), create_graph=False)
        mass = relevance_mass_accuracy(heatmaps, mask_to_grid(masks, trace.grid))
        correct = classifier.head(trace.features).argmax(dim=1) == labels
        found.append((trace.features, heatmaps / heatmaps.amax(dim=(1, 2), keepdim=True), mass, correct))
    (features, heatmaps, mass, correct), (of_hf, heatmaps_of_hf, mass_of_hf, correct_of_hf) = found
    torch.testing.assert_close(of_hf, features, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(heatmaps_of_hf, heatmaps, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mass_of_hf, mass, rtol=1e-4, atol=1e-5)
    assert torch.equal(correct_of_hf, correct)
    assert 0 < correct.sum() < len(correct)
    threshold = mass.median().item() + 1e-4
    ours, theirs = (rationality(c, m, threshold=threshold) for c, m in ((correct, mass), (correct_of_hf, mass_of_hf)))
    assert (ours.PT, ours.IR) == (theirs.PT, theirs.IR)
