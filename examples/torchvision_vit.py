"""A ViT of torchvision, initialised in place, and a short training on 300 handwritten digits.

python examples/torchvision_vit.py        (pip install 'convinit[train]' torchvision)
"""

import torch
import torch.nn.functional as F
from torchvision.models import VisionTransformer

import convinit
from convinit.train import batches, load_digits_split

torch.manual_seed(0)
digits = load_digits_split(num_train=300)
images = F.interpolate(digits.train_images, size=(32, 32), mode="bilinear")
images = (images - images.mean()) / images.std()
images = images.expand(-1, 3, -1, -1)  # torchvision's ViT takes three channels

model = VisionTransformer(
    image_size=32, patch_size=4, num_layers=4, num_heads=4, hidden_dim=96, mlp_dim=192, num_classes=10
)
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
