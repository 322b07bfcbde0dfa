"""Processes: who does what, and sums and tensors that are the same in all of them."""

from dataclasses import asdict

import pytest
import torch

from bilens._core import parallel
from bilens.sae import evaluate_saes
from tests.processes import run_in_processes
from tests.random_saes import make_sae


def test_one_process_is_everything():
    """Without a launcher: all items, the tensor itself, and nothing is waited for."""
    with parallel.processes():
        assert (parallel.rank(), parallel.world_size(), parallel.is_main()) == (0, 1, True)
        assert list(parallel.share("abc")) == ["a", "b", "c"]
        parallel.barrier()
        x = torch.rand(3)
        assert parallel.gather_tensors(x)[0] is x
        assert parallel.sum_over_processes(x) is x
    assert parallel.local_device() is None


def check_three() -> None:
    with parallel.processes():
        rank = parallel.rank()
        assert parallel.world_size() == 3
        assert parallel.is_main() == (rank == 0)
        assert list(parallel.share(range(8))) == list(range(rank, 8, 3))
        with parallel.processes():  # joined already: stays joined after
            pass
        assert parallel.world_size() == 3
        # Of different lengths, one of them empty.
        parts = parallel.gather_tensors(torch.arange(2 * rank).reshape(rank, 2))
        assert [part.tolist() for part in parts] == [[], [[0, 1]], [[0, 1], [2, 3]]]
        # Float addition does not associate: (1e8 + 1) - 1e8 differs from (1e8 - 1e8) + 1. In the order of the ranks.
        terms = torch.tensor([1e8, 1.0, -1e8])
        total = parallel.sum_over_processes(terms[rank])
        assert total == (terms[0] + terms[1]) + terms[2]
        assert total.shape == ()
        parallel.barrier()
    assert parallel.world_size() == 1


def test_three_processes():
    assert run_in_processes(3, check_three) == [0, 0, 0]


def test_two_processes_evaluate_as_one(text_model, texts):
    """Both get the scores of one; the sums of the batches are added in another order, in float64."""
    saes = {
        "in": make_sae("topk", "blocks.0.ln2.hook_normalized"),
        "out": make_sae("jumprelu", "blocks.1.hook_mlp_out", seed=1),
    }
    one = evaluate_saes(text_model, saes, texts[::9], batch_size=7)

    def check():
        found = evaluate_saes(text_model, saes, texts[::9], batch_size=7)
        assert found.n_tokens == one.n_tokens
        for score, expected in zip(found.scores, one.scores, strict=True):
            for key, value in asdict(expected).items():
                wanted = value if isinstance(value, str) else pytest.approx(value, rel=1e-12)
                assert asdict(score)[key] == wanted, key

    assert run_in_processes(2, check) == [0, 0]
