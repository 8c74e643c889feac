"""ALBEF and BLIP as published: the names and shapes in their files, and what they compute, in plain torch."""

import math

import torch
import torch.nn.functional as F


def linear(name, inputs, outputs):
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def norm(name, width):
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def vision_transformer(name, width, depth, patch, grid):
    shapes = {
        f"{name}.cls_token": (1, 1, width),
        f"{name}.pos_embed": (1, grid * grid + 1, width),
        f"{name}.patch_embed.proj.weight": (width, 3, patch, patch),
        f"{name}.patch_embed.proj.bias": (width,),
    }
    for block in range(depth):
        at = f"{name}.blocks.{block}"
        shapes |= norm(f"{at}.norm1", width)
        shapes |= linear(f"{at}.attn.qkv", width, 3 * width)
        shapes |= linear(f"{at}.attn.proj", width, width)
        shapes |= norm(f"{at}.norm2", width)
        shapes |= linear(f"{at}.mlp.fc1", width, 4 * width)
        shapes |= linear(f"{at}.mlp.fc2", 4 * width, width)
    return shapes | norm(f"{name}.norm", width)


def bert(name, width, depth, vocabulary, positions, *, crossed, seen, types):
    """``crossed``: the layers with cross attention to tokens of width ``seen``."""
    shapes = {
        f"{name}.embeddings.position_ids": (1, positions),
        f"{name}.embeddings.word_embeddings.weight": (vocabulary, width),
        f"{name}.embeddings.position_embeddings.weight": (positions, width),
    }
    if types:
        shapes[f"{name}.embeddings.token_type_embeddings.weight"] = (types, width)
    shapes |= norm(f"{name}.embeddings.LayerNorm", width)
    for layer in range(depth):
        at = f"{name}.encoder.layer.{layer}"
        kinds = {"attention": width} | ({"crossattention": seen} if layer in crossed else {})
        for kind, keys in kinds.items():
            shapes |= linear(f"{at}.{kind}.self.query", width, width)
            shapes |= linear(f"{at}.{kind}.self.key", keys, width)
            shapes |= linear(f"{at}.{kind}.self.value", keys, width)
            shapes |= linear(f"{at}.{kind}.output.dense", width, width)
            shapes |= norm(f"{at}.{kind}.output.LayerNorm", width)
        shapes |= linear(f"{at}.intermediate.dense", width, 4 * width)
        shapes |= linear(f"{at}.output.dense", 4 * width, width)
        shapes |= norm(f"{at}.output.LayerNorm", width)
    return shapes


def language_head(name, width, vocabulary):
    return {
        f"{name}.predictions.bias": (vocabulary,),
        **linear(f"{name}.predictions.transform.dense", width, width),
        **norm(f"{name}.predictions.transform.LayerNorm", width),
        **linear(f"{name}.predictions.decoder", width, vocabulary),
    }


def albef(
    image=768,
    text=768,
    depth=12,
    layers=12,
    patch=16,
    grid=16,
    vocabulary=30522,
    positions=512,
    features=256,
    queue=65536,
):
    """Names and shapes in ALBEF.pth; the defaults are its sizes."""
    shapes = {"temp": (), "image_queue": (features, queue), "text_queue": (features, queue), "queue_ptr": (1,)}
    for twin in ("", "_m"):
        shapes |= vision_transformer(f"visual_encoder{twin}", image, depth, patch, grid)
        crossed = range(layers // 2, layers)
        name = f"text_encoder{twin}"
        shapes |= bert(f"{name}.bert", text, layers, vocabulary, positions, crossed=crossed, seen=image, types=2)
        shapes |= language_head(f"{name}.cls", text, vocabulary)
        shapes |= linear(f"vision_proj{twin}", image, features) | linear(f"text_proj{twin}", text, features)
    return shapes | linear("itm_head", text, 2)


def albef_for_retrieval(**sizes):
    """Names and shapes in mscoco.pth: BERT bare, and a queue of rows more."""
    shapes = {name.replace("bert.", ""): shape for name, shape in albef(**sizes).items() if ".cls." not in name}
    return shapes | {"idx_queue": (1, shapes["image_queue"][1])}


def blip(
    image=768,
    text=768,
    depth=12,
    layers=12,
    patch=16,
    grid=14,
    vocabulary=30524,
    positions=512,
    features=256,
    queue=57600,
):
    """Names and shapes in model_base.pth; the defaults are its sizes."""
    shapes = {"temp": (), "image_queue": (features, queue), "text_queue": (features, queue), "queue_ptr": (1,)}
    sizes = {"crossed": range(layers), "seen": image, "types": 0}
    for twin in ("", "_m"):
        shapes |= vision_transformer(f"visual_encoder{twin}", image, depth, patch, grid)
        shapes |= bert(f"text_encoder{twin}", text, layers, vocabulary, positions, **sizes)
        shapes |= linear(f"vision_proj{twin}", image, features) | linear(f"text_proj{twin}", text, features)
    shapes |= bert("text_decoder.bert", text, layers, vocabulary, positions, **sizes)
    return shapes | language_head("text_decoder.cls", text, vocabulary) | linear("itm_head", text, 2)


def blip_for_retrieval(**sizes):
    """Names and shapes in model_base_retrieval_coco.pth: no decoder, and a queue of rows more."""
    shapes = {name: shape for name, shape in blip(**sizes).items() if not name.startswith("text_decoder.")}
    shapes["ptr_queue"] = shapes.pop("queue_ptr")
    return shapes | {"idx_queue": (1, shapes["image_queue"][1])}


def random_state(shapes, seed=0):
    """Tensors of these shapes, none of them close to what a fresh model would have."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes.items():
        if name.endswith(("position_ids", "idx_queue", "queue_ptr", "ptr_queue")):
            state[name] = torch.arange(shape[-1]).expand(shape).clone()
        elif name == "temp":
            state[name] = torch.tensor(0.045)
        else:
            state[name] = 0.2 * torch.randn(shape, generator=generator) + (".norm" in name or "LayerNorm" in name)
    return state


def attend(query, key, value, heads, mask=None):
    """Attention of Vaswani et al. 2017, head by head, of ``(N, W)``; ``mask``: tokens that may be looked at."""
    width = query.shape[-1] // heads
    mixed = []
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        scores = query[:, part] @ key[:, part].T / width**0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        mixed.append(scores.softmax(-1) @ value[:, part])
    return torch.cat(mixed, -1)


def read_image(state, image, heads):
    """Dosovitskiy et al. 2021: normalised before each part and at the end; features ``(F,)`` of one image."""

    def layer(name, x):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def normed(name, x):
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps=1e-6)

    kernel = state["visual_encoder.patch_embed.proj.weight"]
    width, _, patch, _ = kernel.shape
    patches = [
        (kernel * image[:, top : top + patch, left : left + patch]).sum((1, 2, 3))
        for top in range(0, image.shape[1], patch)
        for left in range(0, image.shape[2], patch)
    ]
    embedded = torch.stack(patches) + state["visual_encoder.patch_embed.proj.bias"]
    x = torch.cat([state["visual_encoder.cls_token"][0], embedded]) + state["visual_encoder.pos_embed"][0]
    block = 0
    while f"visual_encoder.blocks.{block}.norm1.weight" in state:
        at = f"visual_encoder.blocks.{block}"
        q, k, v = layer(f"{at}.attn.qkv", normed(f"{at}.norm1", x)).split(width, -1)
        x = x + layer(f"{at}.attn.proj", attend(q, k, v, heads))
        x = x + layer(f"{at}.mlp.fc2", F.gelu(layer(f"{at}.mlp.fc1", normed(f"{at}.norm2", x))))
        block += 1
    return layer("vision_proj", normed("visual_encoder.norm", x)[0])


def read_text(state, ids, heads, layers, name):
    """Devlin et al. 2019: normalised after each part; features ``(F,)`` of one text, which has no padding."""

    def layer(name, x):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def normed(name, x):
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps=1e-12)

    at = f"{name}.embeddings"
    x = state[f"{at}.word_embeddings.weight"][ids] + state[f"{at}.position_embeddings.weight"][: len(ids)]
    if f"{at}.token_type_embeddings.weight" in state:
        x = x + state[f"{at}.token_type_embeddings.weight"][0]
    x = normed(f"{at}.LayerNorm", x)
    for index in range(layers):
        at = f"{name}.encoder.layer.{index}"
        q, k, v = (layer(f"{at}.attention.self.{part}", x) for part in ("query", "key", "value"))
        x = normed(
            f"{at}.attention.output.LayerNorm", x + layer(f"{at}.attention.output.dense", attend(q, k, v, heads))
        )
        inner = F.gelu(layer(f"{at}.intermediate.dense", x))
        x = normed(f"{at}.output.LayerNorm", x + layer(f"{at}.output.dense", inner))
    return layer("text_proj", x[0])


def bicubic(row, count):
    """Keys 1981 with a = -0.75, along the first axis: samples at the centres of ``count`` cells, borders repeated."""

    def weight(distance, a=-0.75):
        if distance < 1:
            return (a + 2) * distance**3 - (a + 3) * distance**2 + 1
        return a * (distance**3 - 5 * distance**2 + 8 * distance - 4) if distance < 2 else 0.0

    samples = []
    for cell in range(count):
        place = (cell + 0.5) * len(row) / count - 0.5
        near = range(math.floor(place) - 1, math.floor(place) + 3)
        samples.append(sum(weight(abs(place - at)) * row[min(max(at, 0), len(row) - 1)] for at in near))
    return torch.stack(samples)


def with_positions_for(state, side):
    """The state with positions for another grid: interpolated down the columns, then along the rows."""
    positions = state["visual_encoder.pos_embed"][0]
    old = math.isqrt(len(positions) - 1)
    columns = bicubic(positions[1:].reshape(old, old, -1), side)
    grid = bicubic(columns.transpose(0, 1), side).transpose(0, 1)
    return state | {"visual_encoder.pos_embed": torch.cat([positions[:1], grid.flatten(0, 1)])[None]}
