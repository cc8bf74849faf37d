"""The order of the data is a function of seed and epoch; random states can be kept."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from convatlas.training.sampling import (
    EpochSampler,
    ShareSampler,
    mixed_seed,
    random_states,
    restore_random_states,
)

Batches = list[list[tuple[int, int]]]


def epoch(number: int, length: int = 23, batch_size: int = 4, seed: int = 0, **options: int) -> Batches:
    sampler = EpochSampler(length, batch_size, seed, **options)
    sampler.set_epoch(number)
    return list(sampler)


def indices(batches: Batches) -> list[int]:
    return [index for batch in batches for index, _ in batch]


def test_every_epoch_is_another_permutation():
    orders = [indices(epoch(number)) for number in range(5)]
    assert all(sorted(order) == list(range(23)) for order in orders)
    assert len({tuple(order) for order in orders}) == 5
    assert indices(epoch(2)) == orders[2]
    assert indices(epoch(2, seed=1)) != orders[2]


def test_every_sample_gets_another_seed_in_every_epoch_and_run():
    seeds = [seed for run in (0, 1) for number in range(3) for batch in epoch(number, seed=run) for _, seed in batch]
    assert len(set(seeds)) == len(seeds) == 2 * 3 * 23
    assert min(seeds) >= 0


def test_seed_and_epoch_do_not_stand_for_each_other():
    assert indices(epoch(1, seed=0)) != indices(epoch(0, seed=1))


def test_batches_have_their_size_and_the_last_one_the_rest():
    assert [len(batch) for batch in epoch(0)] == [4, 4, 4, 4, 4, 3]
    assert [len(batch) for batch in epoch(0, drop_last=True)] == [4, 4, 4, 4, 4]
    assert [len(batch) for batch in epoch(0, length=24)] == [4] * 6
    assert [len(batch) for batch in epoch(0, length=3)] == [3]


def test_a_single_sample_left_over_is_left_out_of_the_epoch():
    left_out = []
    for number in range(8):
        batches = epoch(number, length=9)
        assert [len(batch) for batch in batches] == [4, 4]
        left_out += set(range(9)) - set(indices(batches))
    assert len(left_out) == 8
    assert len(set(left_out)) > 3
    assert len(EpochSampler(9, 4, 0)) == 2
    # Where batches have one sample anyway, or it is the only one, it stays.
    assert [len(batch) for batch in epoch(0, length=3, batch_size=1)] == [1, 1, 1]
    assert [len(batch) for batch in epoch(0, length=1)] == [1]


@pytest.mark.parametrize("length", [1, 4, 5, 23, 24, 25])
def test_the_length_is_that_of_the_iteration(length: int):
    for batch_size in (1, 2, 4, 100):
        for options in ({}, {"world_size": 3}):
            sampler = EpochSampler(length, batch_size, 0, **options)
            assert len(sampler) == len(list(sampler))


@pytest.mark.parametrize("skipped", [0, 1, 3, 6])
def test_starting_later_skips_exactly_what_was_seen_and_only_once(skipped: int):
    sampler = EpochSampler(23, 4, 7)
    sampler.start_at(2, skipped)
    assert list(sampler) == epoch(2, seed=7)[skipped:]
    sampler.set_epoch(3)
    assert list(sampler) == epoch(3, seed=7)
    assert len(sampler) == 6


@pytest.mark.parametrize(("length", "world_size"), [(24, 3), (23, 3), (2, 5), (25, 2)])
def test_ranks_share_an_epoch_in_equal_parts(length: int, world_size: int):
    parts = [indices(epoch(1, length=length, rank=rank, world_size=world_size)) for rank in range(world_size)]
    share = -(-length // world_size)
    kept = share - (share % 4 == 1 and share > 1)
    assert [len(part) for part in parts] == [kept] * world_size
    flat = [index for part in parts for index in part]
    repeated = len(flat) - len(set(flat))
    assert repeated <= share * world_size - length  # only what pads the epoch
    if kept == share:
        assert set(flat) == set(range(length))


def test_repeats_stand_side_by_side_with_seeds_of_their_own():
    batches = epoch(0, length=24, batch_size=6, repeats=3)
    assert [len(batch) for batch in batches] == [6] * 4
    order = indices(batches)
    assert len(set(order)) == 8
    assert order == [index for index in order[::3] for _ in range(3)]
    assert len({seed for batch in batches for _, seed in batch}) == 24
    assert set(order) != set(indices(epoch(1, length=24, batch_size=6, repeats=3)))
    ranks = [indices(epoch(0, length=24, batch_size=4, rank=rank, world_size=3, repeats=3)) for rank in range(3)]
    assert ranks[0] == ranks[1] == ranks[2] == order[::3]


def test_an_order_of_ones_own_is_followed_and_resumed():
    def order(number: int, generator: torch.Generator) -> torch.Tensor:
        return number + 10 * torch.randperm(6, generator=generator)

    def batches(start: int) -> Batches:
        sampler = EpochSampler(6, 2, seed=0, order=order)
        sampler.start_at(3, start)
        return list(sampler)

    assert sorted(indices(batches(0))) == [3, 13, 23, 33, 43, 53]
    assert batches(2) == batches(0)[2:]
    assert len({seed for batch in batches(0) for _, seed in batch}) == 6


def test_no_batch_at_all_is_refused():
    with pytest.raises(ValueError, match="0 samples are too few for a batch of 4 on each of 1 devices"):
        EpochSampler(0, 4, 0)
    with pytest.raises(ValueError, match="3 samples are too few"):
        EpochSampler(3, 4, 0, drop_last=True)


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("length", [1, 7, 9, 24])
def test_every_validation_sample_belongs_to_one_process(length: int, world_size: int):
    shares = [ShareSampler(length, 3, rank=rank, world_size=world_size) for rank in range(world_size)]
    batches = [list(share) for share in shares]
    assert {len(each) for each in batches} == {len(share) for share in shares} == {len(batches[0])}
    own = [each[: share.own] for share, each in zip(shares, batches, strict=True)]
    assert sorted(index for each in own for batch in each for index in batch) == list(range(length))
    assert all(0 < len(batch) <= 3 for each in batches for batch in each)
    assert all(len(each) - len(mine) <= 1 for mine, each in zip(own, batches, strict=True))


def test_a_seed_depends_on_every_number_and_their_order():
    seeds = {
        mixed_seed(0),
        mixed_seed(2),
        mixed_seed(0, 1),
        mixed_seed(1, 0),
        mixed_seed(0, 1, 2),
        mixed_seed(2**63 - 1),
    }
    assert len(seeds) == 6
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_random_states_bring_back_every_generator():
    def draw() -> tuple[float, ...]:
        gaussian = (random.gauss(0, 1), float(np.random.standard_normal()))
        return (*gaussian, random.random(), float(np.random.random()), *torch.rand(3).tolist())

    random.gauss(0, 1)  # both keep a second Gaussian number for the next call
    np.random.standard_normal()
    states = random_states()
    first = draw()
    assert draw() != first
    restore_random_states(states)
    assert draw() == first


def test_random_states_survive_a_file_that_runs_no_code(tmp_path):
    torch.save(random_states(), tmp_path / "states.pt")
    expected = torch.rand(2).tolist(), random.random(), np.random.random()
    restore_random_states(torch.load(tmp_path / "states.pt", weights_only=True))
    assert (torch.rand(2).tolist(), random.random(), np.random.random()) == expected
