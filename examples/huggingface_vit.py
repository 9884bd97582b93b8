"""A Hugging Face ViT with convinit's weights and attention, and a short training on 300 handwritten digits.

python examples/huggingface_vit.py        (pip install 'convinit[train]' 'transformers>=5')
"""

import torch
import torch.nn.functional as F
from transformers import ViTConfig, ViTForImageClassification

import convinit
from convinit.adapters.transformers import register_attention
from convinit.train import batches, load_digits_split

torch.manual_seed(0)
digits = load_digits_split(num_train=300)
images = F.interpolate(digits.train_images, size=(32, 32), mode="bilinear")
images = (images - images.mean()) / images.std()

config = ViTConfig(
    image_size=32, patch_size=4, num_channels=1, hidden_size=96, num_hidden_layers=4, num_attention_heads=4,
    intermediate_size=192, num_labels=10,
)  # fmt: skip
model = ViTForImageClassification(config)
report = convinit.init_vit_(model, images=images[:32])
print(report)

register_attention()  # backend="triton" asks for the fused kernels on a GPU
model.set_attn_implementation("convinit")

optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
for epoch in range(3):
    losses = []
    for pixels, labels in batches(images, digits.train_labels, 20, shuffle=True):
        loss = model(pixel_values=pixels, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"epoch {epoch}: loss {sum(losses) / len(losses):.3f}")
