"""Where every head looks before, while and after a ViT of vit-pytorch learns 1,000 handwritten digits.

python examples/watch_training.py OUT        (pip install 'convinit[train]' vit-pytorch)

Writes OUT/filters.png and OUT/drift.png.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from vit_pytorch import SimpleViT

import convinit
from convinit import viz
from convinit.train import batches, load_digits_split

out = Path(sys.argv[1])
torch.manual_seed(0)
digits = load_digits_split(num_train=1000)
images = F.interpolate(digits.train_images, size=(32, 32), mode="bilinear")
images = (images - images.mean()) / images.std()

model = SimpleViT(
    image_size=32, patch_size=4, channels=1, num_classes=10, dim=64, depth=4, heads=4, dim_head=16,
    mlp_dim=128,
)  # fmt: skip
report = convinit.init_vit_(model, images=images[:32])
monitor = convinit.DriftMonitor(report, every=10)

optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
for epoch in range(12):
    for pixels, labels in batches(images, digits.train_labels, 32, shuffle=True):
        loss = F.cross_entropy(model(pixels), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        monitor.step()
    print(f"epoch {epoch}: last loss {loss.item():.3f}, mean peak {monitor.history.peak[-1].mean():.3f}")

out.mkdir(parents=True, exist_ok=True)
viz.model_filters(report, monitor.start).savefig(out / "filters.png", dpi=110)
viz.drift(monitor.history).savefig(out / "drift.png", dpi=110)
