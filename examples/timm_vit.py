"""A ViT of timm, initialised in place, and a short training on 300 handwritten digits.

python examples/timm_vit.py        (pip install 'convinit[train]' timm)
"""

import timm
import torch
import torch.nn.functional as F

import convinit
from convinit.train import batches, load_digits_split

torch.manual_seed(0)
digits = load_digits_split(num_train=300)
images = F.interpolate(digits.train_images, size=(32, 32), mode="bilinear")
images = (images - images.mean()) / images.std()

model = timm.create_model(
    "vit_tiny_patch16_224", img_size=32, patch_size=4, in_chans=1, num_classes=10, embed_dim=96, depth=4
)
report = convinit.init_vit_(model, images=images[:32])
print(report)

# In one call: convinit.adapters.timm.create_model("vit_tiny_patch16_224", ...).
# For timm's train.py: convinit.adapters.timm.register("vit_tiny_patch16_224").

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
