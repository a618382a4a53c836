"""Images, sounds and what brings them to the text are no sequences: a batch of several adapters is refused there."""

from __future__ import annotations

import pytest
import torch
import transformers
from adapters import one_thread, pooled
from torch import nn

from lora_kernels import LoraValueError
from lora_kernels.serving.layers import scattered

__all__ = ["one_thread"]
SIZES = {"vocab_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 48}


class TwoTowers(nn.Module):
    def __init__(self):
        super().__init__()
        self.vision_tower, self.text = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x, images):
        return self.text(x) + self.vision_tower(images).mean(0)


def test_images_are_not_sequences(tmp_path):
    """Two images may both be of the second sequence."""
    model, x, images = TwoTowers().eval(), torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    other = pytest.raises(LoraValueError, match="vision_tower: in the tower of another modality")
    with pooled(model, tmp_path / "both", ["text", "vision_tower"]) as pool, pool.batch(["a", "b"]), other:
        model(x, images)
    with pooled(model, tmp_path / "text", ["text"]) as pool, pool.batch(["a", "b"]):
        model(x, images)


def test_a_pool_of_a_tower_alone(tmp_path):
    """Where the model embeds text beside it, two images may be of one sequence; where it does not, they are the sequences."""
    model, x, images = TwoTowers().eval(), torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    with pooled(model, tmp_path / "tower", ["vision_tower"], target_modules=["vision_tower"]) as pool, pool.batch(["a", "b"]):
        model(x, images)
    model.embed_tokens = nn.Embedding(4, 8)
    other = pytest.raises(LoraValueError, match="vision_tower: in the tower of another modality")
    with pooled(model, tmp_path / "both", ["vision_tower"], target_modules=["vision_tower"]) as pool, pool.batch(["a", "b"]), other:
        model(x, images)


@pytest.mark.parametrize(
    ("names", "towers"),
    [
        (["model.language_model.layers.0.q_proj", "model.encoder.layers.0.q_proj", "model.projector.linear"], 2),
        (["model.encoder.layers.0.q_proj", "model.decoder.layers.0.q_proj", "model.projector.linear"], 0),
        (["model.layers.0.q_proj", "model.embed_tokens_extend.audio_embed.up_proj"], 1),
        (["language_model.layers.0.q_proj", "mlp1.1"], 1),
        (["text_model.layers.0.q_proj", "visual_projection"], 1),
        (["encoder.layer.0.query", "embeddings.visual_projection", "mlp1"], 0),
    ],
    ids=["granite_speech", "encoder-decoder", "phi4_multimodal", "internvl", "clip", "visual_bert"],
)
def test_towers_by_their_place(names, towers):
    model = nn.Module()
    for name in names:
        at = model
        for part in name.split("."):
            at.add_module(part, getattr(at, part, nn.Module()))
            at = getattr(at, part)
    assert [*scattered(model, names)] == names[1 : 1 + towers]


@pytest.mark.parametrize("images", [(2, 1, 0), (0, 1, 2)], ids=lambda images: "-".join(map(str, images)) + "-images")
def test_a_projector_of_images_is_no_part_of_the_text(tmp_path, images):
    """LLaVA's projector gets three images for three sequences, which are not one of each."""
    torch.manual_seed(0)
    text = transformers.LlamaConfig(**SIZES)
    parts = {name: SIZES[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")}
    vision = transformers.CLIPVisionConfig(**parts, image_size=8, patch_size=4)
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=60, image_seq_length=4)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    ids = torch.randint(3, 60, (3, 10))
    for row, count in enumerate(images):
        ids[row, : 4 * count] = 60
    inputs = {"input_ids": ids, "pixel_values": torch.randn(3, 3, 8, 8)}
    projector = pytest.raises(LoraValueError, match="multi_modal_projector.linear_1: in the tower of another modality")
    modules = ["linear_1", "down_proj"]
    with pooled(model, tmp_path / "both", modules) as pool, pool.batch(["a", None, "b"]), projector:
        model(**inputs)
    with pooled(model, tmp_path / "text", ["down_proj"]) as pool, pool.batch(["a", None, "b"]):
        model(**inputs)
