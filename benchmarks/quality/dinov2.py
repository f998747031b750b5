"""DINOv2 ViT-S/14 (12 layers of 384, 22 M parameters): a linear probe on Fashion-MNIST.

The probe is a logistic regression on the float32 model's features, the class token and the mean of the patches;
compressed models get the same probe, as a classifier that was trained before compression would. Images are resized
to 112 pixels, 8 x 8 patches. Needs `onnx`.
"""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from quality import assets
from quality.onnx_weights import OnnxWeights
from quality.subject import Scores, Subject

#: Pixels of an image's side.
SIDE = 112
_BATCH = 50
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
#: What the file calls a module of an attention layer, and what `transformers` does.
_RENAMED = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}


def load_model(file: Path) -> nn.Module:
    """The backbone of the ONNX file as `transformers.Dinov2Model`."""
    from transformers import Dinov2Config, Dinov2Model

    weights = OnnxWeights(file, "backbone.")
    state = weights.named
    patches = weights.one((1, 1369, 384))
    of_class = weights.one((1, 1, 384), but=state["embeddings.cls_token"])
    state["embeddings.position_embeddings"] = torch.cat([of_class, patches], 1)
    state["embeddings.mask_token"] = torch.zeros(1, 384)
    config = Dinov2Config(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=518, patch_size=14)
    model = Dinov2Model(config)
    if any("q_proj" in name for name, _ in model.named_parameters()):  # transformers >= 5.2
        for old, new in _RENAMED.items():
            state = {name.replace(old, new): tensor for name, tensor in state.items()}
    model.load_state_dict(state)
    return model.eval()


def subject(train: int = 1500, test: int = 1000, calibration: int = 64) -> Subject:
    """The model, probed on the first `test` images of the test set; calibrated on training images after `train`."""
    data = assets.debian_files(assets.FASHION) / "usr/share/datasets/fashion-mnist"
    model = load_model(assets.wheel_files(assets.DINOV2) / "vit_s_focus.onnx")
    images, labels = _read(data, "train", train + calibration)
    tested, expected = _read(data, "t10k", test)
    probe = Probe(_features(model, images[:train]), labels[:train])

    def evaluate(compressed: nn.Module) -> Scores:
        features = _features(compressed, tested)
        return Scores(float((probe(features) == expected).double().mean()), features)

    return Subject(
        name="DINOv2 ViT-S/14",
        model=model,
        calibration=[{"pixel_values": batch} for batch in _pixels(images[train:]).split(8)],
        evaluate=evaluate,
        metric="Fashion-MNIST, linear probe, accuracy",
        counted=f"{test} images of {SIDE} px; probe on {train}; calibration {calibration} images",
    )


class Probe:
    """Multinomial logistic regression on standardized features, with an L2 penalty."""

    def __init__(self, features: torch.Tensor, labels: torch.Tensor, penalty: float = 100.0) -> None:
        self.mean, self.std = features.mean(0), features.std(0, correction=0).clamp_min(1e-12)
        inputs = (features - self.mean) / self.std
        layer = nn.Linear(features.shape[1], int(labels.max()) + 1)
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
        optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=300, line_search_fn="strong_wolfe")

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(layer(inputs), labels, reduction="sum") + penalty / 2 * layer.weight.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        self.layer = layer

    @torch.inference_mode()
    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        """The class of each row of features."""
        predicted: torch.Tensor = self.layer((features - self.mean) / self.std)
        return predicted.argmax(-1)


@torch.inference_mode()
def _features(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """[n, 768]: the class token and the mean of the patches."""
    rows = []
    for batch in images.split(_BATCH):
        hidden = model(pixel_values=_pixels(batch)).last_hidden_state
        rows.append(torch.cat([hidden[:, 0], hidden[:, 1:].mean(1)], -1))
    return torch.cat(rows).clone()


def _pixels(images: torch.Tensor) -> torch.Tensor:
    """uint8 [n, 28, 28] to what the model takes, float32 [n, 3, SIDE, SIDE]."""
    grey = images.float().div(255)[:, None].expand(-1, 3, -1, -1)
    sized = F.interpolate(grey, size=(SIDE, SIDE), mode="bicubic", align_corners=False).clamp(0, 1)
    mean, std = (torch.tensor(values)[:, None, None] for values in (_MEAN, _STD))
    return (sized - mean) / std


def _read(folder: Path, part: str, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first n images, uint8 [n, 28, 28], and labels, int64 [n]."""
    pixels = gzip.decompress((folder / f"{part}-images-idx3-ubyte.gz").read_bytes())
    labels = gzip.decompress((folder / f"{part}-labels-idx1-ubyte.gz").read_bytes())
    images = np.frombuffer(pixels, np.uint8, offset=16).reshape(-1, 28, 28)[:n]
    return torch.from_numpy(images.copy()), torch.from_numpy(
        np.frombuffer(labels, np.uint8, offset=8)[:n].copy()
    ).long()
