"""A denoiser of one's own, calibrated by `calibrate` and by a loop of one's own: python examples/03_your_own_dit.py"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import diffcr_compile
from diffcr_compile import CalibrationConfig

BUDGET, STEPS, WIDTH, HEADS = 0.7, 60, 48, 4


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 96), nn.GELU(), nn.Linear(96, WIDTH))
        self.shift = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        parts = self.qkv(self.norm(x) + self.shift(condition)[:, None]).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in parts)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(x)


class Denoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(8, WIDTH), nn.Linear(WIDTH, 8)
        self.time, self.blocks = nn.Linear(WIDTH, WIDTH), nn.ModuleList(Block() for _ in range(4))

    def forward(self, tokens: Tensor, timestep: Tensor) -> Tensor:  # (B, 64, 8) and (B,) in 0..1000 -> (B, 64, 8)
        angles = timestep[:, None] * torch.exp(-9.2 * torch.linspace(0, 1, WIDTH // 2))
        x, condition = self.embed(tokens), self.time(torch.cat([angles.sin(), angles.cos()], dim=-1))
        for block in self.blocks:
            x = block(x, condition)
        return self.head(x)


def distance(model: nn.Module, dense: nn.Module, batch: dict[str, Tensor]) -> Tensor:  # relative to the dense output
    target = dense(**batch).detach()
    return F.mse_loss(model(**batch), target) / target.square().mean()


def learn(model: nn.Module, dense: nn.Module, batches: list[dict[str, Tensor]]) -> None:
    """Any optimiser, any loss; `budget_loss` pulls the ratios, and the table follows them."""
    with diffcr_compile.learning(model) as learnable:
        ratios = {"params": [learnable.ratios], "lr": 0.02, "weight_decay": 0.0}
        optimizer = torch.optim.AdamW([{"params": list(model.parameters())}, ratios], lr=3e-4)
        for step in range(STEPS):
            loss = distance(model, dense, batches[step % len(batches)])
            (loss + 10 * diffcr_compile.budget_loss(model, BUDGET - 0.02)).backward()  # the nearest bins may cost more
            optimizer.step()
            optimizer.zero_grad()


def main() -> None:
    torch.manual_seed(0)
    dense = Denoiser().eval()
    steps = torch.tensor([125.0, 375.0, 625.0, 875.0] * 3)  # a batch in each timestep region, in turn
    batches = [{"tokens": torch.randn(4, 64, 8), "timestep": step.expand(4)} for step in steps]
    ours, yours = (diffcr_compile.transform(copy.deepcopy(dense), example_inputs=batches[0]) for _ in range(2))
    config = CalibrationConfig(steps=STEPS, learning_rate=6e-4, ratio_learning_rate=5e-3, ramp=0.25)
    diffcr_compile.calibrate(ours, batches, budget=BUDGET, config=config)
    learn(yours, dense, batches)
    for name, model in {"calibrate": ours, "own loop": yours}.items():
        share, loss = diffcr_compile.cost(model).share, sum(distance(model, dense, batch).item() for batch in batches)
        print(f"{name}: share {share:.4f} (budget {BUDGET}), distance from dense {loss / len(batches):.4f}")
        print(diffcr_compile.ratios(model).numpy())


if __name__ == "__main__":
    main()
