"""A small MNIST classifier whose features define a Fréchet distance, and the script that trained it.

The weights are in the repository, so evaluation needs no download and gives the same numbers everywhere. To retrain::

    python -m lsgm.evaluation.classifier --data data/mnist --out lsgm/evaluation/weights/mnist_classifier.safetensors

Samples of a model with a Bernoulli likelihood are the *means* of the pixels: gray, but with smoother edges than the
real images they are compared with. The training images are therefore shifted, blurred and binarized at random, so that
the features respond to the shape of a digit more than to the gray levels of its outline.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor, nn
from torch.nn import functional as F

from lsgm.files import atomic

WEIGHTS = Path(__file__).parent / "weights" / "mnist_classifier.safetensors"
FEATURES = 64


class MNISTClassifier(nn.Module):
    """Four convolutions and two linear layers that map 28x28 gray digits to ten logits.

    The 64 features are standardized: each has mean 0 and variance 1 over the 60,000 training images. This fixes the
    scale of the Fréchet distance: the total variance of the real images is 64.
    """

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        widths = [(1, 16, 2), (16, 32, 1), (32, 64, 2), (64, 64, 2)]  # 28 -> 14 -> 14 -> 7 -> 4 pixels
        self.trunk = nn.Sequential(
            *(
                layer
                for inputs, outputs, stride in widths
                for layer in (
                    nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
                    nn.BatchNorm2d(outputs),
                    nn.ReLU(),
                )
            ),
            nn.Flatten(),
            nn.Linear(64 * 4 * 4, FEATURES),
        )
        self.head = nn.Linear(FEATURES, 10)
        self.register_buffer("mean", torch.zeros(FEATURES))
        self.register_buffer("std", torch.ones(FEATURES))

    @classmethod
    def load(cls, path: str | Path = WEIGHTS) -> MNISTClassifier:
        """Load the trained classifier in evaluation mode, on the CPU."""
        model = cls()
        model.load_state_dict(load_file(path))  # stored in half precision, converted to single
        return model.eval().requires_grad_(False)

    def features(self, x: Tensor) -> Tensor:
        """``x`` [N, 1, 28, 28] in [0, 1] -> [N, 64], standardized pre-activations of the last hidden layer."""
        hidden: Tensor = self.trunk(x)
        return (hidden - self.mean) / self.std

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [N, 1, 28, 28] in [0, 1] -> logits [N, 10]."""
        logits: Tensor = self.head(F.relu(self.trunk(x)))
        return logits


def augment(x: Tensor) -> Tensor:
    """Randomly shift, rotate and scale the images ``x`` [B, 1, 28, 28]; blur about half, binarize about a quarter."""
    batch = x.shape[0]
    angle = torch.empty(batch).uniform_(-0.15, 0.15)  # radians
    scale = torch.empty(batch).uniform_(0.9, 1.1)
    theta = torch.stack([scale * angle.cos(), -scale * angle.sin(), scale * angle.sin(), scale * angle.cos()], 1)
    shift = torch.empty(batch, 2, 1).uniform_(-2 / 14, 2 / 14)  # two pixels
    grid = F.affine_grid(torch.cat([theta.view(batch, 2, 2), shift], 2), list(x.shape), align_corners=False)
    x = F.grid_sample(x, grid, align_corners=False)
    mix = torch.rand(batch, 1, 1, 1) * (torch.rand(batch, 1, 1, 1) < 0.5)
    row = torch.tensor([0.25, 0.5, 0.25])
    x = x.lerp(F.conv2d(x, torch.outer(row, row)[None, None], padding=1), mix)
    return torch.where(torch.rand(batch, 1, 1, 1) < 0.25, torch.bernoulli(x.clamp(0, 1)), x)


def train(images: Tensor, labels: Tensor, epochs: int, seed: int = 1, batch: int = 256) -> MNISTClassifier:
    """Train on ``images`` uint8 [N, 1, 28, 28] and ``labels`` [N]; return the model in evaluation mode."""
    torch.manual_seed(seed)
    model = MNISTClassifier()
    steps = epochs * (len(images) // batch)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=5e-3, total_steps=steps)
    start, done = time.perf_counter(), 0
    for epoch in range(epochs):
        order = torch.randperm(len(images))
        for index in order[: len(order) // batch * batch].view(-1, batch):
            loss = F.cross_entropy(model(augment(images[index].float() / 255)), labels[index], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            done += 1
        print(f"epoch {epoch + 1}/{epochs}  loss {loss.item():.3f}  {time.perf_counter() - start:.0f} s", flush=True)
    return model.eval().requires_grad_(False)


def round_and_standardize(model: MNISTClassifier, images: Tensor) -> None:
    """Round the weights to half precision, then set the mean and standard deviation of the features of ``images``."""
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(tensor.half())
    model.mean.zero_()
    model.std.fill_(1)
    features = torch.cat([model.features(chunk.float() / 255) for chunk in images.split(1000)]).double()
    model.mean.copy_(features.mean(0))
    model.std.copy_(features.std(0))


def accuracy(model: MNISTClassifier, images: Tensor, labels: Tensor) -> float:
    """The fraction of ``images`` uint8 [N, 1, 28, 28] that are classified correctly."""
    right = [
        (model(x.float() / 255).argmax(1) == y).sum()
        for x, y in zip(images.split(1000), labels.split(1000), strict=True)
    ]
    return float(torch.stack(right).sum()) / len(images)


def save(model: MNISTClassifier, path: str | Path) -> None:
    """Save the weights in half precision, and the features' mean and standard deviation in single."""
    state = {
        name: tensor.half() if tensor.is_floating_point() and name not in ("mean", "std") else tensor
        for name, tensor in model.state_dict().items()
    }
    with atomic(path) as part:
        part.write_bytes(to_bytes(state))


def main() -> None:
    from lsgm.data.store import ImageStore

    parser = argparse.ArgumentParser(description="Train the MNIST classifier behind the Fréchet distance.")
    parser.add_argument("--data", type=Path, required=True, help="folder that `lsgm prepare` wrote")
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="weights to write (safetensors)")
    parser.add_argument("--epochs", type=int, default=3)
    args = parser.parse_args()
    store = ImageStore(args.data)
    images, labels, test_images, test_labels = (
        torch.from_numpy(np.array(array))
        for split in ("train", "test")
        for array in (store.images(split), store.labels(split))
    )
    model = train(images, labels.long(), args.epochs)
    round_and_standardize(model, images)
    print(f"test accuracy {accuracy(model, test_images, test_labels.long()):.2%}")
    save(model, args.out)


if __name__ == "__main__":
    main()
