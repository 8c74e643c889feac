"""Tiny random models and generated images; nothing is downloaded."""

from functools import cache
from pathlib import Path

import open_clip
import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer

from evidence_ft.backbones.open_clip import OpenClipEncoder

torch.set_num_threads(1)  # for models of this size a second thread costs more than it brings

TEXT = {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
MODELS = {
    # Sizes differ pairwise, so that a swapped axis cannot pass: 3 heads, 4 x 6 tokens, width 24, 10 features.
    "native": {
        "embed_dim": 10,
        "vision_cfg": {"image_size": [32, 48], "patch_size": 8, "width": 24, "head_width": 8, "layers": 3},
        "text_cfg": TEXT,
    },
    "timm": {
        "embed_dim": 10,
        "vision_cfg": {"timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": "linear", "image_size": 160},
        "text_cfg": TEXT,
    },
}


@cache
def tokenizer() -> SimpleTokenizer:
    """Reading its vocabulary takes longer than building the rest."""
    return SimpleTokenizer(context_length=12)


def build_encoder(kind: str = "native", seed: int = 0) -> OpenClipEncoder:
    """A random open_clip model behind our protocol, in evaluation mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = open_clip.CLIP(**MODELS[kind])
    size = MODELS[kind]["vision_cfg"]["image_size"]
    size = tuple(size) if isinstance(size, list) else (size, size)
    open_clip.factory.set_model_preprocess_cfg(model, {"size": size, "mean": (0.5,) * 3, "std": (0.5,) * 3})
    encoder = OpenClipEncoder(model, tokenizer(), {"model_cfg": MODELS[kind]}, f"tiny-{kind}")
    return encoder.eval()


@pytest.fixture(autouse=True)
def _same_random_numbers_whatever_ran_before():
    """Some parts draw from PyTorch's global generator, as `nn.Linear` does: no test may depend on its neighbours."""
    torch.manual_seed(0)


@pytest.fixture(params=sorted(MODELS))
def encoder(request: pytest.FixtureRequest) -> OpenClipEncoder:
    return build_encoder(request.param)


@pytest.fixture
def native_encoder() -> OpenClipEncoder:
    return build_encoder("native")


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of the real model and images, where there is one."""
    folder = Path(__file__).resolve().parents[1] / "../shared/real"
    if not folder.is_dir():
        pytest.skip("the real model and images are not here")
    return folder
