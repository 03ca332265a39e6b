"""Hierarchical graph network of CIGPose (arXiv 2603.09418, section 3.3; upstream `HGNNModule`).

Messages along the skeleton, gated by an attention whose messages run between semantic groups. No loop over edges,
groups or keypoints: the map W [x_i, x_j - x_i] of an edge is (Wa - Wb) x_i + Wb x_j, made once per node and gathered
per edge; groups are one matrix. On a GPU, where adding at an index is done in any order, edges are matrices too, so
that the same numbers give the same bits.

B samples, N nodes (K keypoints or G groups), C channels, E directed edges.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cigpose.keypoints import KeypointSet


def normalize_rows(norm: nn.Module, x: Tensor) -> Tensor:
    """Batch norm over all rows: (..., C) -> the same."""
    return norm(x.flatten(0, -2)).view_as(x)


def directed_edges(edges: Iterable[tuple[int, int]]) -> Tensor:
    """Both directions of undirected edges, (2, E) int64: row 0 the receiver, ascending, row 1 the sender."""
    both = sorted(pair for a, b in edges for pair in ((a, b), (b, a)))
    return torch.tensor(both, dtype=torch.int64).reshape(-1, 2).T.contiguous()


def group_membership(groups: Iterable[tuple[int, ...]], num_keypoints: int) -> Tensor:
    """Which keypoint is in which group, (K, G) float32 of 0 and 1."""
    columns = [torch.zeros(num_keypoints).index_fill(0, torch.tensor(group), 1.0) for group in groups]
    return torch.stack(columns, dim=1)


def incidence(ends: Tensor, num_nodes: int) -> Tensor:
    """Which edge ends where: (E,) node of each edge -> (E, N) float32 of 0 and 1."""
    return F.one_hot(ends, num_nodes).float()


def sums_in_any_order(x: Tensor) -> bool:
    """Whether adding at an index depends on the order in which threads come, on the device of `x`.

    Of an exported network nobody knows the device, and few runtimes add at an index in float16.
    """
    return x.is_cuda or torch.compiler.is_exporting()


class EdgeConv(nn.Module):
    """Sum of the messages SiLU(BN(W [x_i, x_j - x_i])) of all neighbours j of node i."""

    receiver: Tensor
    sender: Tensor
    receiver_matrix: Tensor
    sender_matrix: Tensor

    def __init__(self, channels: int, num_nodes: int, edges: Tensor) -> None:
        super().__init__()
        # Upstream's layers, for the names in the state dict; the convolution's weight is used by hand.
        self.conv = nn.Sequential(nn.Conv2d(2 * channels, channels, 1, bias=False), nn.BatchNorm1d(channels))
        self.register_buffer("receiver", edges[0].clone(), persistent=False)  # (E,)
        self.register_buffer("sender", edges[1].clone(), persistent=False)  # (E,)
        self.register_buffer("receiver_matrix", incidence(edges[0], num_nodes), persistent=False)  # (E, N)
        self.register_buffer("sender_matrix", incidence(edges[1], num_nodes), persistent=False)  # (E, N)
        self.has_edges = edges.shape[1] > 0
        if not self.has_edges:  # e.g. the only group of a small keypoint set: nothing to learn, no statistics
            self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C); a node without edges gets zeros."""
        if not self.has_edges:
            return x * 0  # part of the graph: data-parallel training wants a gradient for the layers before
        weight = cast(Tensor, self.conv[0].weight).flatten(1)  # (C, 2 C)
        own, difference = weight.chunk(2, dim=1)  # (C, C) each
        at_receiver = F.linear(x, own - difference)  # (B, N, C)
        at_sender = F.linear(x, difference)  # (B, N, C)
        if sums_in_any_order(x):
            to_receiver, to_sender = self.receiver_matrix.to(at_sender.dtype), self.sender_matrix.to(at_sender.dtype)
            edges = to_receiver @ at_receiver + to_sender @ at_sender  # (B, E, C)
            return to_receiver.T @ F.silu(normalize_rows(self.conv[1], edges))  # (B, N, C)
        edges = at_receiver.index_select(1, self.receiver) + at_sender.index_select(1, self.sender)  # (B, E, C)
        messages = F.silu(normalize_rows(self.conv[1], edges))
        return torch.zeros_like(at_receiver).index_add(1, self.receiver, messages)  # (B, N, C)


class GroupAttention(nn.Module):
    """A gate per keypoint and channel, from messages between the groups it belongs to and all others."""

    mean_matrix: Tensor
    gate_matrix: Tensor

    def __init__(self, channels: int, membership: Tensor) -> None:
        super().__init__()
        num_groups = membership.shape[1]
        complete = [(i, j) for i in range(num_groups) for j in range(i)]
        reduced = channels // 4
        self.conv_down_linear = nn.Linear(channels, reduced)
        self.bn_down = nn.BatchNorm1d(reduced)
        self.edge_conv_groups = EdgeConv(reduced, num_groups, directed_edges(complete))
        self.aggregate_linear = nn.Linear(reduced, channels)
        self.register_buffer("mean_matrix", (membership / membership.sum(0)).T.contiguous(), persistent=False)  # (G, K)
        share = membership / membership.sum(1, keepdim=True).clamp(min=1)
        self.register_buffer("gate_matrix", share, persistent=False)  # (K, G)

    def forward(self, x: Tensor) -> Tensor:
        """(B, K, C) -> gates (B, K, C), between 0 and 1; 0 for a keypoint in no group."""
        x = F.silu(normalize_rows(self.bn_down, self.conv_down_linear(x)))  # (B, K, C / 4)
        groups = self.mean_matrix.to(x.dtype) @ x  # (B, G, C / 4)
        groups = self.aggregate_linear(self.edge_conv_groups(groups)).sigmoid()  # (B, G, C)
        return self.gate_matrix.to(groups.dtype) @ groups


class HGNN(nn.Module):
    """Graph layers over the keypoints of a set."""

    def __init__(self, channels: int, num_layers: int, keypoints: KeypointSet) -> None:
        super().__init__()
        edges = directed_edges(keypoints.edges)
        membership = group_membership(keypoints.groups, len(keypoints))
        self.conv_input = nn.Linear(channels, channels)
        self.bn_input = nn.BatchNorm1d(channels)
        self.edgeconv_layers = nn.ModuleList(EdgeConv(channels, len(keypoints), edges) for _ in range(num_layers))
        self.attention_modules = nn.ModuleList(GroupAttention(channels, membership) for _ in range(num_layers))
        self.bn_layers = nn.ModuleList(nn.BatchNorm1d(channels) for _ in range(num_layers))

    def forward(self, x: Tensor) -> Tensor:
        """(B, K, C) -> the same. In training mode every call moves the running statistics of all batch norms."""
        x = F.silu(normalize_rows(self.bn_input, self.conv_input(x)))
        for edge_conv, attention, norm in zip(
            self.edgeconv_layers, self.attention_modules, self.bn_layers, strict=True
        ):
            update = normalize_rows(norm, edge_conv(x))
            x = F.silu(update * attention(update) + x)
        return x
