"""ConvNeXt V2 and FCMAE in idiomatic PyTorch, the peer of `experiments.benchmarks.steps`.

It has the same network, number of visible patches and AdamW. The memory format is channels-last, so that the
permutations around LayerNorm copy nothing. Masked pixels are set to zero around every depthwise convolution,
as in the official dense fine-tuning code and in masked-dense ports of FCMAE. The weights keep PyTorch's
default initialisation, because the time does not depend on them.
"""

import itertools

import torch
from torch import nn
from torch.nn import functional

from cnx2_jax.models import VARIANTS


class GRN(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(dim))
        self.beta = nn.Parameter(torch.zeros(dim))

    def forward(self, x, visible):  # [B, H, W, C]
        held = x if visible is None else x * visible
        norm = torch.linalg.vector_norm(held, dim=(1, 2), keepdim=True)
        return x + self.gamma * (x * (norm / (norm.mean(dim=-1, keepdim=True) + 1e-6))) + self.beta


class Block(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1 = nn.Linear(dim, 4 * dim)
        self.grn = GRN(4 * dim)
        self.pwconv2 = nn.Linear(4 * dim, dim)

    def forward(self, x, visible=None):  # x [B, C, H, W], visible [B, 1, H, W]
        y = x if visible is None else x * visible
        y = self.dwconv(y)
        last = None
        if visible is not None:
            y = y * visible
            last = visible.permute(0, 2, 3, 1)
        y = self.norm(y.permute(0, 2, 3, 1))
        y = self.pwconv2(self.grn(functional.gelu(self.pwconv1(y)), last))
        return x + y.permute(0, 3, 1, 2)


class ChannelNorm(nn.LayerNorm):
    def forward(self, x):  # [B, C, H, W]
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Encoder(nn.Module):
    def __init__(self, variant):
        super().__init__()
        depths, dims = VARIANTS[variant].depths, VARIANTS[variant].dims
        stem = nn.Sequential(nn.Conv2d(3, dims[0], 4, stride=4), ChannelNorm(dims[0], eps=1e-6))
        self.downsample_layers = nn.ModuleList([stem])
        for fine, coarse in itertools.pairwise(dims):
            self.downsample_layers.append(
                nn.Sequential(ChannelNorm(fine, eps=1e-6), nn.Conv2d(fine, coarse, 2, stride=2))
            )
        self.blocks = nn.ModuleList()
        for depth, dim in zip(depths, dims, strict=True):
            self.blocks.extend(Block(dim) for _ in range(depth))
        self.depths = depths

    def forward(self, x, visible=None):  # x [B, 3, H, W], visible [B, 1, H/32, W/32]
        blocks = iter(self.blocks)
        for stage, (down, depth) in enumerate(zip(self.downsample_layers, self.depths, strict=True)):
            x = down(x)
            held = visible
            if visible is not None:
                scale = 2 ** (3 - stage)
                held = visible.repeat_interleave(scale, dim=2).repeat_interleave(scale, dim=3)
            if stage == 0 and held is not None:
                x = x * held
            for block in itertools.islice(blocks, depth):
                x = block(x, held)
        return x


class Classifier(nn.Module):
    """An encoder, the mean over positions, LayerNorm and a linear head."""

    def __init__(self, variant, num_classes=1000):
        super().__init__()
        self.encoder = Encoder(variant)
        self.norm = nn.LayerNorm(VARIANTS[variant].dims[-1], eps=1e-6)
        self.head = nn.Linear(VARIANTS[variant].dims[-1], num_classes)

    def forward(self, x):
        return self.head(self.norm(self.encoder(x).mean(dim=(2, 3))))


class FCMAE(nn.Module):
    """Masked-dense FCMAE, whose forward pass returns the loss."""

    def __init__(self, variant, mask_ratio=0.6, decoder_dim=512):
        super().__init__()
        self.encoder = Encoder(variant)
        self.proj = nn.Conv2d(VARIANTS[variant].dims[-1], decoder_dim, 1)
        self.mask_token = nn.Parameter(torch.zeros(1, decoder_dim, 1, 1))
        self.decoder = Block(decoder_dim)
        self.pred = nn.Conv2d(decoder_dim, 32 * 32 * 3, 1)
        self.mask_ratio = mask_ratio

    def forward(self, images):  # [B, 3, H, W]
        batch, _, height, width = images.shape
        rows, columns = height // 32, width // 32
        kept = int(rows * columns * (1 - self.mask_ratio))
        rank = torch.rand(batch, rows * columns, device=images.device).argsort(dim=1).argsort(dim=1)
        visible = (rank < kept).float().reshape(batch, 1, rows, columns)

        x = self.proj(self.encoder(images, visible))
        x = x * visible + self.mask_token * (1 - visible)
        prediction = self.pred(self.decoder(x)).permute(0, 2, 3, 1)

        patches = images.reshape(batch, 3, rows, 32, columns, 32).permute(0, 2, 4, 3, 5, 1)
        patches = patches.reshape(batch, rows, columns, -1)
        variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
        error = (prediction - (patches - mean) / (variance + 1e-6).sqrt()).square().mean(dim=-1)
        hidden = 1 - visible[:, 0]
        return (error * hidden).sum() / hidden.sum()
