"""Weighted nearest neighbours on frozen features (Wu et al., arXiv:1805.01978; the monitor of MoCo's CIFAR demo).

Each query looks up its k most similar rows of the bank (the labelled training set); a neighbour votes for its class
with weight e^(similarity / temperature), and the class with the most weight wins. Nothing is trained, nothing is tuned.

Ties. Equal similarities at the k-th place: `torch.topk` keeps one of them, the same one in every run on one machine; in
practice these are duplicates of one image. Equal class scores: the lower class number wins. A class without a vote is
never counted as found, so that top-5 with k = 1 is top-1 and not luck.
"""

# Q queries, N rows of the bank, F feature width, C classes, k neighbours
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import normalize

from fastssl import dist
from fastssl.evaluate.accuracy import place_of
from fastssl.evaluate.features import Features
from fastssl.evaluate.per_class import predicted_class

QUERY_CHUNK = 256
BANK_CHUNK = 65536  # 256 x 65536 float32 similarities are 64 MiB, whatever the size of the bank


@dataclass(frozen=True)
class KnnAccuracy:
    """Accuracies are fractions of the queries; k is what was used, at most the size of the bank.

    predicted   int64 (Q,) the class of each query, on the CPU
    """

    k: int
    temperature: float
    top1: float
    top5: float
    predicted: Tensor = field(repr=False, compare=False)


def knn(
    queries: Features,
    bank: Features,
    *,
    num_classes: int,
    ks: Sequence[int] = (10, 20, 100, 200),
    temperatures: Sequence[float] = (0.07,),
    device: torch.device | str = "cpu",
    between: Callable[[], None] = lambda: None,
) -> list[KnnAccuracy]:
    """Top-1 and top-5 of the queries for every k and temperature, from one search for neighbours.

    Every rank is given all queries and the whole bank, takes a share of the query chunks, and returns the same result.
    The bank may stay in host memory: it is sent to `device` a chunk at a time. `between` is called equally often on all
    ranks, and may end the search by an exception.
    Raises ValueError if a k is under 1 or a temperature under 0.01 (e^(1 / temperature) nears the end of float64).
    """
    for k in ks:
        if k < 1:
            raise ValueError(f"evaluator.k holds {k}, but must hold numbers of neighbours, 1 or more")
    for temperature in temperatures:
        if not temperature >= 0.01:
            raise ValueError(f"evaluator.temperature holds {temperature}, but must hold numbers of 0.01 or more")
    clamped = list(dict.fromkeys(min(k, len(bank)) for k in ks))  # two k beyond a small bank are one and the same
    chunks = torch.arange(len(queries)).split(QUERY_CHUNK)
    mine, rounds = chunks[dist.rank() :: dist.world()], -(-len(chunks) // dist.world())
    rows = torch.cat(mine) if mine else torch.empty(0, dtype=torch.long)
    similarities, indices = nearest(
        queries.features[rows], bank.features, max(clamped), device=device, rounds=rounds, between=between
    )
    votes, truth = bank.labels[indices], queries.labels[rows]

    cases = [(k, temperature) for k in clamped for temperature in temperatures]
    hits = torch.zeros(len(cases), 2, dtype=torch.float64)
    predicted = torch.zeros(len(cases), len(queries), dtype=torch.long)  # each rank fills its own rows
    for chunk in torch.arange(len(rows)).split(QUERY_CHUNK):
        for case, (k, temperature) in enumerate(cases):
            scores = class_scores(similarities[chunk, :k], votes[chunk, :k], num_classes, temperature)
            scores = scores.masked_fill(scores == 0, torch.nan)  # no vote, no place
            place = place_of(scores, truth[chunk])
            hits[case] += torch.stack([(place < 1).sum(), (place < 5).sum()])
            predicted[case, rows[chunk]] = predicted_class(scores)
    share = (dist.all_gather(hits[None].to(device)).sum(0) / len(queries)).tolist()
    predicted = dist.all_reduce_sum(predicted.to(device)).cpu()
    return [KnnAccuracy(*case, share[i][0], share[i][1], predicted[i]) for i, case in enumerate(cases)]


def nearest(
    queries: Tensor,
    bank: Tensor,
    k: int,
    *,
    device: torch.device | str = "cpu",
    query_chunk: int = QUERY_CHUNK,
    bank_chunk: int = BANK_CHUNK,
    rounds: int = 0,
    between: Callable[[], None] = lambda: None,
) -> tuple[Tensor, Tensor]:
    """The k rows of `bank` (N, F) with the largest cosine similarity to each of `queries` (Q, F).

    Returns similarities and row numbers, both (Q, k), most similar first, on the CPU. Needs k <= N. The bank passes
    once: for each chunk of it the best k so far are merged with the chunk's own. `between` is called before each chunk
    of queries, and for each chunk of the bank at least `rounds` times.
    """
    assert 1 <= k <= len(bank)
    best = torch.full((len(queries), k), -torch.inf, dtype=queries.dtype, device=device)
    rows = torch.zeros((len(queries), k), dtype=torch.long, device=device)
    queries = normalize(queries.to(device), dim=1)
    for first in range(0, len(bank), bank_chunk):
        part = normalize(bank[first : first + bank_chunk].to(device), dim=1)
        for _ in range(-(-len(queries) // query_chunk), rounds):
            between()
        for q in range(0, len(queries), query_chunk):
            between()
            here = slice(q, q + query_chunk)
            found, place = (queries[here] @ part.T).topk(min(k, len(part)), dim=1)
            merged = torch.cat([best[here], found], dim=1)
            merged_rows = torch.cat([rows[here], place + first], dim=1)
            best[here], keep = merged.topk(k, dim=1)
            rows[here] = merged_rows.gather(1, keep)
    return best.cpu(), rows.cpu()


def class_scores(similarities: Tensor, votes: Tensor, num_classes: int, temperature: float) -> Tensor:
    """Sum of e^(similarity / temperature) of each query's neighbours by class: (Q, k), (Q, k) -> (Q, C), float64."""
    weights = (similarities.double() / temperature).exp()
    return torch.zeros(len(votes), num_classes, dtype=torch.float64).scatter_add_(1, votes, weights)
