"""`init_vit_` on several processes: real ones, with gloo."""

from __future__ import annotations

import os
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import convinit

WORLD = 2

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="PyTorch has no gloo here"
)


class ViT(nn.Module):
    """Encoder layers on a learned position embedding, as `init_vit_` takes them by hand."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(16, 32)
        self.pos = nn.Parameter(torch.randn(24, 32))
        layer = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.encoder(self.embed(x) + self.pos)


def initialise(model: nn.Module, pos: torch.Tensor) -> convinit.InitReport:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        generator = torch.Generator().manual_seed(3)
        images = torch.randn(2, 24, 16, generator=torch.Generator().manual_seed(4))
        return convinit.init_vit_(model, grid_size=(4, 6), pos_embed=pos, images=images, generator=generator)


def expected() -> dict[str, torch.Tensor]:
    model = ViT()
    initialise(model, model.pos)
    return model.state_dict()


def on_every_rank(rank: int, folder: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD)
    try:
        torch.manual_seed(rank)  # the ranks' own random states differ
        for model in (nn.parallel.DistributedDataParallel(ViT()), sharded(ViT())):
            inner = getattr(model, "module", model)
            with pytest.raises(ValueError, match="generator must be given"):
                convinit.init_vit_(model, grid_size=(4, 6), pos_embed=inner.pos)
            report = initialise(model, inner.pos)
            assert torch.cat([record.peak for record in report.records]).mean() > 0.65
            for name, value in expected().items():
                mine = inner.state_dict()[name]
                mine = mine.full_tensor() if inner is model else mine
                torch.testing.assert_close(mine, value, msg=name)
                everywhere = [torch.empty_like(mine) for _ in range(WORLD)]
                dist.all_gather(everywhere, mine)
                assert torch.equal(*everywhere), name
            model(torch.randn(2, 24, 16)).square().mean().backward()  # it still trains
        dist.barrier()
    finally:
        dist.destroy_process_group()


def sharded(model: ViT) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (WORLD,))
    for layer in model.encoder.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def test_ddp_and_fsdp2_set_the_same_weights_on_all_ranks(tmp_path):
    mp.spawn(on_every_rank, args=(str(tmp_path),), nprocs=WORLD)
