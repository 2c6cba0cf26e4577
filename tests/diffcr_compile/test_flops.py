"""Counting FLOPs: torch's counter with every form of attention."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from diffcr_compile.flops import attention_flops, count_flops

B, H, N, S, D = 2, 3, 5, 7, 8


def test_fused_attention_is_counted() -> None:
    query, key = torch.randn(B, H, N, D), torch.randn(B, H, S, D)
    with count_flops() as counter, torch.no_grad():
        F.scaled_dot_product_attention(query, key, key)
    assert counter.get_total_flops() == 4 * B * H * N * S * D
    assert attention_flops(counter) == counter.get_total_flops()


def test_products_with_parameters_do_not_attend() -> None:
    with count_flops() as counter, torch.no_grad():
        torch.nn.Linear(D, 4)(torch.randn(N, D))
    assert counter.get_total_flops() == 2 * N * D * 4
    assert attention_flops(counter) == 0


def test_written_out_attention_attends() -> None:
    query = torch.randn(B, N, D)
    with count_flops() as counter, torch.no_grad():
        (query @ query.transpose(1, 2)).softmax(-1) @ query
    assert attention_flops(counter) == 4 * B * N * N * D
