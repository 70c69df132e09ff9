"""The centroid head of the edge drafter: clusters of tokens, and the matrix that picks the promising ones."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from transformers import Gemma4AssistantForCausalLM, Gemma4ForCausalLM

from .drafting import RoundsInParallel, read_with_target, shifted


@torch.no_grad()
def balanced_clusters(points: Tensor, clusters: int, iterations: int = 12) -> Tensor:
    """Balanced k-means by direction: ``[V]`` token ids ordered by cluster, ``V / clusters`` in each."""
    points = F.normalize(points, dim=-1)
    capacity = points.shape[0] // clusters
    centers = points[torch.randperm(points.shape[0], generator=torch.Generator().manual_seed(0))[:clusters]]
    assignment = torch.zeros(points.shape[0], dtype=torch.long)
    for _ in range(iterations):
        similarity = points @ centers.T
        # The surest tokens choose first; a full cluster is closed to those who come later.
        room = torch.full((clusters,), capacity)
        for token in similarity.max(-1).values.argsort(descending=True).tolist():
            cluster = int(similarity[token].masked_fill(room == 0, -torch.inf).argmax())
            assignment[token] = cluster
            room[cluster] -= 1
        sums = torch.zeros_like(centers).index_add_(0, assignment, points)
        centers = F.normalize(sums, dim=-1)
    return assignment.argsort(stable=True)


def train_centroids(
    drafter: Gemma4AssistantForCausalLM,
    target: Gemma4ForCausalLM,
    draw_batch: Callable[[], tuple[Tensor, Tensor]],
    steps: int,
) -> None:
    """Cluster the output embedding, then teach the centroid matrix alone which cluster the drafter's choice is in."""
    head = drafter.masked_embedding
    embedding = drafter.lm_head.weight.detach()
    ordering = balanced_clusters(embedding, head.num_centroids)
    cluster_of = torch.empty_like(ordering)
    cluster_of[ordering] = torch.arange(len(ordering)) // head.vocab_size_per_centroid
    head.token_ordering.copy_(ordering)
    frozen = copy.deepcopy(drafter).requires_grad_(False)
    means = embedding[ordering].view(head.num_centroids, -1, drafter.hidden_size).mean(1)
    head.centroids.weight.requires_grad_(True).data.copy_(means)
    optimizer = torch.optim.AdamW(head.centroids.parameters(), lr=0.003, weight_decay=0.0)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.003 * (1 - step / steps)
        tokens, wanted = draw_batch()
        with torch.no_grad():
            view = read_with_target(target, tokens)
            rounds = RoundsInParallel(frozen, target, view)
            steps_states = [rounds.step(shifted(tokens, 1 + draft, rounds.queries)) for draft in range(3)]
            state = torch.cat([states[wanted[:, 1:]] for states in steps_states])
            full = frozen.lm_head(state).softmax(-1)
            mass = torch.zeros(len(full), head.num_centroids).index_add_(1, cluster_of, full)
            wished = cluster_of[full.argmax(-1)]
        scores = head.centroids(state)
        log_probabilities = scores.log_softmax(-1)
        loss = -(mass * log_probabilities).sum(-1).mean() + F.cross_entropy(scores, wished)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 50 == 0:
            top = scores.topk(head.centroid_intermediate_top_k).indices
            kept = (top == wished[:, None]).any(-1).float().mean()
            print(f"centroids step {step + 1} loss {loss.item():.3f} kept {kept.item():.4f}", flush=True)
