"""Codebooks: where codes begin, how they learn, and how those that nobody needs are revived."""

from __future__ import annotations

import pytest
import torch
from rounding import SAME_IN_FLOAT64
from torch import Tensor

from hgad_fast.modules import codebook as codebooks
from hgad_fast.modules.codebook import DEAD_BELOW, DECAY, EPSILON, Codebook


def clusters(count: int, each: int = 20, dim: int = 5, seed: int = 0) -> Tensor:
    """Return (count * each, dim) vectors in clusters that are far apart; vector i is of cluster i % count."""
    generator = torch.Generator().manual_seed(seed)
    centres = 100 * torch.nn.functional.one_hot(torch.arange(count), max(dim, count))[:, :dim].float()
    return centres.repeat(each, 1) + 0.1 * torch.randn(count * each, dim, generator=generator)


def row_of(vectors: Tensor, codes: Tensor) -> list[list[int]]:
    """Return for each code (K, D) which of the vectors (N, D) equal it to the bit."""
    return [(vectors == code).all(1).nonzero().flatten().tolist() for code in codes]


def state_of(book: Codebook) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in book.state_dict().items()}


# ---- seeding


def test_codes_are_seeded_on_vectors_far_apart() -> None:
    book = Codebook(5, 5)
    vectors = clusters(5)
    for seed in range(5):
        book.seed(vectors, seed)
        rows = row_of(vectors, book.codes())
        assert all(len(row) == 1 for row in rows)
        assert sorted(row[0] % 5 for row in rows) == list(range(5))  # one in each cluster
        assert torch.equal(book.embed_avg, book.embed) and torch.equal(book.cluster_size, torch.ones(5))
        assert int(book.updates) == 0


def test_where_vectors_are_few_codes_repeat_some_of_them() -> None:
    book = Codebook(4, 7)
    vectors = torch.randn(3, 4)
    book.seed(vectors, 0)
    rows = row_of(vectors, book.codes())
    assert all(len(row) == 1 for row in rows) and {row[0] for row in rows} == {0, 1, 2}
    book.seed(vectors[:1], 0)
    assert torch.equal(book.codes(), vectors[:1].expand(7, -1))


def test_every_different_vector_gets_a_code_where_there_are_enough() -> None:
    different = torch.randn(4, 3)
    vectors = different[torch.tensor([0] * 90 + [1] * 5 + [2] * 4 + [3])]
    book = Codebook(3, 4)
    for seed in range(5):
        book.seed(vectors, seed)
        assert {tuple(code) for code in book.codes().tolist()} == {tuple(row) for row in different.tolist()}
    book = Codebook(3, 6)
    book.seed(vectors, 0)
    assert {tuple(code) for code in book.codes().tolist()} == {tuple(row) for row in different.tolist()}


def test_seeding_depends_on_its_seed_alone() -> None:
    vectors = torch.randn(200, 4)
    books = [Codebook(4, 9) for _ in range(4)]
    for number, (book, seed) in enumerate(zip(books, (3, 3, 4, 3 + 2**32), strict=True)):
        torch.manual_seed(number)
        before = torch.get_rng_state()
        book.seed(vectors, seed)
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(books[0].embed, books[1].embed)
    assert not torch.equal(books[0].embed, books[2].embed)
    assert torch.equal(books[0].embed, books[3].embed)  # seeds of a configuration reach 2**63, and NumPy's 2**32


def test_of_very_many_vectors_some_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codebooks, "SEED_ROWS", 50)
    vectors = clusters(4, each=100)
    book = Codebook(5, 4)
    book.seed(vectors, 0)
    rows = row_of(vectors, book.codes())
    assert sorted(row[0] % 4 for row in rows) == list(range(4))


def test_seeding_a_codebook_of_another_precision_keeps_the_vectors() -> None:
    book, vectors = Codebook(4, 3).double(), torch.randn(20, 4, dtype=torch.float64)
    book.seed(vectors, 0)
    assert book.embed.dtype == torch.float64 and all(len(row) == 1 for row in row_of(vectors, book.codes()))


# ---- learning


def test_codes_are_moving_averages_of_their_vectors() -> None:
    """VQ-VAE, appendix A.1, written down again in float64; codes nobody took keep their place but for epsilon."""
    book = Codebook(3, 4, revive=False).double()
    vectors = torch.randn(2, 10, 3, dtype=torch.float64)
    book.seed(vectors[0], 0)
    book.cluster_size.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    book.embed_avg.mul_(book.cluster_size)
    before = state_of(book)
    codes = before["embed"].T
    nearest = torch.cdist(vectors.flatten(0, 1), codes).argmin(1)
    result = book.train()(vectors)
    assert torch.equal(result.indices.flatten(), nearest) and torch.equal(result.codes, codes)
    counts = torch.bincount(nearest, minlength=4).double()
    sums = torch.stack([vectors.flatten(0, 1)[nearest == k].sum(0) for k in range(4)], 1)
    size = DECAY * before["cluster_size"] + (1 - DECAY) * counts
    average = DECAY * before["embed_avg"] + (1 - DECAY) * sums
    smoothed = size.sum() * (size + EPSILON) / (size.sum() + 4 * EPSILON)
    expected = {"cluster_size": size, "embed_avg": average, "embed": average / smoothed}
    for name, tensor in expected.items():
        torch.testing.assert_close(getattr(book, name), tensor, rtol=SAME_IN_FLOAT64, atol=SAME_IN_FLOAT64, msg=name)
    assert int(book.updates) == 1


@pytest.mark.parametrize("training", [True, False])
def test_commitment_is_a_mean_and_pulls_vectors_to_their_codes(training: bool) -> None:
    book = Codebook(3, 4, revive=False).double().train(training)
    x = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    result = book(x)
    codes = result.codes[result.indices]
    assert not codes.requires_grad
    expected = (x - codes).square().mean()
    torch.testing.assert_close(result.commitment, expected, rtol=SAME_IN_FLOAT64, atol=0)
    (gradient,) = torch.autograd.grad(result.commitment, x)
    torch.testing.assert_close(gradient, 2 * (x.detach() - codes) / 30, rtol=SAME_IN_FLOAT64, atol=SAME_IN_FLOAT64)


def test_in_evaluation_mode_nothing_is_learnt() -> None:
    book = Codebook(3, 4).eval()
    before = state_of(book)
    book(torch.randn(2, 5, 3))
    assert all(torch.equal(tensor, before[name]) for name, tensor in state_of(book).items())


def test_codes_that_were_handed_out_stay_as_they_were() -> None:
    book = Codebook(3, 4).train()
    result = book(torch.randn(2, 5, 3))
    copied = result.codes.clone()
    book(torch.randn(2, 5, 3))
    assert torch.equal(result.codes, copied) and not torch.equal(book.codes(), copied)


def test_perplexity_counts_codes_in_use() -> None:
    book = Codebook(3, 8)
    for sizes, expected in (
        ([0.0] * 8, 1.0),
        ([5.0] + [0.0] * 7, 1.0),
        ([2.0] * 8, 8.0),
        ([3.0, 3.0, 3.0] + [0.0] * 5, 3.0),
    ):
        book.cluster_size.copy_(torch.tensor(sizes))
        assert float(book.double().perplexity()) == pytest.approx(expected, rel=SAME_IN_FLOAT64)


# ---- revival


def far_from_data(revive: bool, dead: tuple[int, ...] = (1, 3)) -> tuple[Codebook, Tensor]:
    """Return a codebook of which some codes are far from all vectors and have been so for long, and the vectors."""
    book = Codebook(5, 6, revive=revive)
    vectors = clusters(4, each=6).view(4, 6, 5)
    book.seed(vectors.flatten(0, 1), 0)
    for k in dead:
        book.embed[:, k] = book.embed_avg[:, k] = 1e4
        book.cluster_size[k] = DEAD_BELOW / 10
    return book.train(), vectors


def test_dead_codes_move_to_vectors_of_the_batch_with_all_they_hold() -> None:
    revived, vectors = far_from_data(revive=True)
    left, _ = far_from_data(revive=False)
    revived(vectors)
    left(vectors)
    rows = vectors.flatten(0, 1)
    for k in range(6):
        if k in (1, 3):
            assert row_of(rows, revived.embed[:, k][None])[0]
            assert torch.equal(revived.embed_avg[:, k], revived.embed[:, k]) and revived.cluster_size[k] == 1
            assert not row_of(rows, left.embed[:, k][None])[0]
        else:  # the others keep their bits
            assert torch.equal(revived.embed[:, k], left.embed[:, k])
            assert torch.equal(revived.embed_avg[:, k], left.embed_avg[:, k])
            assert revived.cluster_size[k] == left.cluster_size[k]


def test_a_revived_code_finds_vectors() -> None:
    book, vectors = far_from_data(revive=True)
    assert not torch.isin(torch.tensor([1, 3]), book(vectors).indices).any()
    assert torch.isin(torch.tensor([1, 3]), book(vectors).indices).any()


def test_what_is_drawn_differs_between_codes_and_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not between runs: it depends on code and number of batches alone."""
    monkeypatch.setattr(codebooks, "DEAD_BELOW", 1e9)
    drawn = []
    vectors = torch.randn(8, 500, 5)
    for _ in range(2):
        book = Codebook(5, 40)
        book.seed(vectors[0], 0)
        for _ in range(3):
            book.train()(vectors)
            drawn.append(book.embed.clone())
    rows = [tuple(row) for sample in drawn[:3] for row in sample.T.tolist()]
    assert len(set(rows)) > 0.9 * len(rows)
    known = {tuple(row) for row in vectors.flatten(0, 1).tolist()}
    assert set(rows) <= known
    assert all(torch.equal(a, b) for a, b in zip(drawn[:3], drawn[3:], strict=True))


def test_several_processes_draw_what_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images are shared out in turn; each process knows its own rows, and the sum over processes has them all."""
    book, vectors = far_from_data(revive=True)
    whole = Codebook(5, 6)
    whole.load_state_dict(book.state_dict())
    whole._revive(vectors, torch.tensor(24.0))
    expected = state_of(whole)
    parts: list[Tensor] = []
    for rank in range(3):
        monkeypatch.setattr(codebooks, "process_count", lambda: 3)
        monkeypatch.setattr(codebooks, "process_rank", lambda rank=rank: rank)
        monkeypatch.setattr(codebooks, "summed", lambda x: parts.append(x) or x)
        one = Codebook(5, 6)
        one.load_state_dict(book.state_dict())
        one._revive(vectors[rank::3], torch.tensor(24.0))
    monkeypatch.setattr(codebooks, "summed", lambda x: sum(parts))
    book._revive(vectors[0::3], torch.tensor(24.0))
    for name, tensor in state_of(book).items():
        assert torch.equal(tensor, expected[name]), name
