"""SimpleViT of vit-pytorch, initialised in place, and a short training on 300 handwritten digits.

python examples/vit_pytorch_simple_vit.py        (pip install 'convinit[train]' vit-pytorch)
"""

import torch
import torch.nn.functional as F
from vit_pytorch import SimpleViT

import convinit
from convinit.train import batches, load_digits_split

torch.manual_seed(0)
digits = load_digits_split(num_train=300)
images = F.interpolate(digits.train_images, size=(32, 32), mode="bilinear")
images = (images - images.mean()) / images.std()

model = SimpleViT(
    image_size=32, patch_size=4, channels=1, num_classes=10, dim=96, depth=4, heads=4, dim_head=24,
    mlp_dim=192,
)  # fmt: skip
report = convinit.init_vit_(model, images=images[:32])
print(report)

optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
for epoch in range(3):
    losses = []
    for pixels, labels in batches(images, digits.train_labels, 20, shuffle=True):
        loss = F.cross_entropy(model(pixels), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"epoch {epoch}: loss {sum(losses) / len(losses):.3f}")
