"""The program of DeepMAD, its mutations and its two solvers."""

from __future__ import annotations

import math
from random import Random

import pytest

from convatlas.design.deepmad.evolution import Mutation, Population
from convatlas.design.deepmad.program import PUBLISHED_PROGRAMS, SPACES, Program, falls, repair, round_channels
from convatlas.design.deepmad.relaxation import climb, neighbours, relax
from convatlas.networks import model_config
from convatlas.networks.deepmad import CONV, Block, check_structure, make_structure

INIT = make_structure(
    "SuperResK1KXK1", 16, ((32, 3, 2, 1, 16), (32, 3, 2, 1, 16), (48, 3, 1, 1, 16), (64, 3, 2, 1, 24))
)
SMALL = Program(image_size=32, flops=5e6, params=5e4, rho=0.5, weights=(1, 1, 1, 8))
FULL = SPACES["k1kxk1"]


# -- program -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLISHED_PROGRAMS)
def test_the_authors_begin_within_their_budgets(name: str):
    found = PUBLISHED_PROGRAMS[name]
    program = Program(image_size=found.image_size, flops=found.flops, params=found.params, rho=found.rho)
    init = SPACES[found.space].init
    assert program.violation(init) is None
    assert program.evaluate(init) == program.objective(init)
    published = model_config(f"deepmad_{name}").structure  # type: ignore[attr-defined]
    assert published[-1].out_channels == found.last or published[-1].kind == FULL.kind
    assert program.objective(published) > program.objective(init)


def test_violations_are_told():
    assert SMALL.violation(INIT) is None
    assert SMALL.excess(INIT) == 0
    cases = {"flops": 1e5, "params": 1e4, "rho": 0.1, "layers": 12}
    for name, limit in cases.items():
        program = Program(image_size=32, weights=SMALL.weights, **{name: limit})  # type: ignore[arg-type]
        value = program.used(INIT)[name][0]
        assert program.violation(INIT) == f"{name} is {value:.6g}, the budget is {limit:.6g}"
        assert program.evaluate(INIT) is None
        assert program.excess(INIT) == pytest.approx(math.log(value / limit))
    fallen = repair((*INIT[:2], INIT[2]._replace(out_channels=24), *INIT[3:]), 32)
    assert falls(fallen) == 2
    assert SMALL.violation(fallen) == "channels fall from 32 to 24 at block 2"
    assert SMALL.evaluate(fallen) is None


def test_channels_are_rounded_half_to_even():
    assert [round_channels(x) for x in (1, 11.9, 12, 20, 28, 100.3)] == [8, 8, 16, 16, 32, 104]
    assert [round_channels(x, adaptive=True) for x in (100, 128, 150, 256, 300, 333.3)] == [96, 128, 144, 256, 288, 320]


def test_repair_chains_channels_shrinks_kernels_and_is_idempotent():
    blocks = [Block(CONV, 3, 8, 3, 2), *(Block(FULL.kind, 8, 16, 5, 2, 2, 8) for _ in range(4))]
    repaired = repair(blocks, 32)
    check_structure(repaired)
    assert [block.kernel_size for block in repaired] == [3, 5, 5, 1, 1]
    assert repair(repaired, 32) == repaired
    assert repair(blocks, 1)[-1].kernel_size == 1


# -- mutations ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SPACES)
def test_mutations_stay_in_the_space(name: str):
    space, random = SPACES[name], Random(0)
    mutation = Mutation(space=space, image_size=224, layers=120)
    structure, seen = space.init, set()
    for _ in range(2000):
        child = mutation(structure, random)
        check_structure(child)
        assert falls(child) is None
        for index, block in enumerate(child):
            if block.kind == CONV:
                continue
            seen.add((index, block.kernel_size))
            assert block.kernel_size in space.kernels
            assert 1 <= block.depth <= (3 if index == 1 else 120 // 3 // 4)
            assert block.out_channels % 8 == block.bottleneck % 8 == 0
            if not space.expands:
                least = round_channels(block.out_channels / 10)
                assert block == structure[index] or least <= block.bottleneck <= block.out_channels
        least, most = space.stem
        assert least <= child[0].out_channels <= most
        structure = child
    sides = [math.prod(1 / block.stride for block in space.init[:index]) * 224 for index in range(6)]
    assert seen == {(i, k) for i in range(1, 6) for k in space.kernels if 1.5 * k <= sides[i]}


def test_two_blocks_change_at_most_and_the_last_one_if_it_may():
    random = Random(1)
    for mutate_last in (True, False):
        mutation = Mutation(space=FULL, image_size=224, mutate_last=mutate_last)
        changed = set()
        for _ in range(300):
            child = mutation(FULL.init, random)
            own = [
                index
                for index, (old, new) in enumerate(zip(FULL.init, child, strict=True))
                if old[2:] != new[2:]  # input channels follow the block before
            ]
            assert len(own) <= 2
            changed.update(own)
        assert changed == set(range(6 if mutate_last else 5))


def test_the_minor_phase_keeps_kernels_and_depths():
    mutation, random = Mutation(space=FULL, image_size=224), Random(2)
    for _ in range(200):
        child = mutation(FULL.init, random, minor=True)
        assert [(block.kernel_size, block.depth) for block in child] == [(3, 1)] * 6


def test_coarser_rounding():
    mutation, random = Mutation(space=FULL, image_size=224, adaptive_rounding=True), Random(3)
    structure = FULL.init
    for _ in range(500):
        structure = mutation(structure, random)
        for block in structure[1:]:
            for channels in (block.out_channels, block.bottleneck):
                assert channels % 16 == 0 or channels <= 128


# -- evolution ---------------------------------------------------------------------------------------------------------


def population(seed: int = 0, largest: int = 32) -> Population:
    return Population([(SMALL.objective(INIT), INIT)], largest, Random(seed))


def test_every_member_is_within_the_budgets_and_the_best_are_kept():
    ours = population()
    ours.evolve(3000, SMALL, Mutation(space=FULL, image_size=32))
    assert ours.evaluated == 3000
    assert 32 < ours.feasible < 3000
    assert len(ours.members) == len({structure for _, structure in ours.members}) == 32
    for score, structure in ours.members:
        assert SMALL.evaluate(structure) == score
    scores = [score for score, _ in ours.members]
    assert scores == sorted(scores)
    assert scores[-1] > 1.5 * SMALL.objective(INIT)


def test_a_seed_decides_all():
    mutation = Mutation(space=FULL, image_size=32)
    first, second, third = population(), population(), population(1)
    for each in (first, second, third):
        each.evolve(500, SMALL, mutation)
    assert first.state() == second.state() != third.state()


def test_a_restored_population_goes_on_as_if_nothing_had_happened():
    mutation = Mutation(space=FULL, image_size=32)
    whole, stopped = population(), population()
    whole.evolve(800, SMALL, mutation)
    stopped.evolve(300, SMALL, mutation)
    restored = Population.restored(stopped.state())
    restored.evolve(500, SMALL, mutation)
    assert restored.state() == whole.state()


def test_a_member_is_never_there_twice():
    ours = population(largest=2)
    other = SMALL.evaluate(INIT)
    assert other is not None
    ours.insert(other, INIT)
    assert len(ours.members) == 1
    ours.insert(other - 1, INIT[:2])
    ours.insert(other + 1, INIT[:3])
    assert [structure for _, structure in ours.members] == [INIT, INIT[:3]]


# -- relaxation --------------------------------------------------------------------------------------------------------


def test_neighbours_differ_in_one_number():
    for candidate in neighbours(INIT, SMALL, FULL):
        check_structure(candidate)
        assert falls(candidate) is None
        differences = [
            (index, place)
            for index, (old, new) in enumerate(zip(INIT, candidate, strict=True))
            for place in (2, 5, 6)
            if old[place] != new[place]
        ]
        assert len(differences) <= 1  # none where only a kernel changes


def test_climbing_ends_where_no_neighbour_is_better():
    found = climb(INIT, SMALL, FULL)
    best = SMALL.evaluate(found)
    assert best is not None
    assert all((SMALL.evaluate(other) or 0.0) <= best for other in neighbours(found, SMALL, FULL))


def test_climbing_finds_the_budgets_or_says_which_one_is_in_the_way():
    init = repair(FULL.init, 32)
    program = Program(image_size=32, flops=5e6, params=1e5, rho=0.3)
    assert program.violation(init) is not None
    assert program.violation(climb(init, program, FULL, until_feasible=True)) is None
    impossible = Program(image_size=32, params=1e5, rho=0.01)
    with pytest.raises(ValueError, match="no structure within the budgets was found; at the nearest one rho is 0"):
        climb(init, impossible, FULL)


@pytest.mark.parametrize("name", ["k1kxk1", "k1dwk1"])
def test_the_relaxation_beats_a_short_evolution(name: str):
    space, program = SPACES[name], SMALL
    rows = ((16, 3, 2, 1, 64), (24, 3, 2, 1, 96), (32, 3, 2, 1, 128))
    init = INIT if name == "k1kxk1" else make_structure(space.kind, 16, rows)
    found = relax(program, space, init, (0, 0))
    score = program.evaluate(found)
    assert score is not None
    short = Population([(program.objective(init), init)], 256, Random(0))
    short.evolve(500, program, Mutation(space=space, image_size=32))
    assert score > short.members[-1][0] > program.objective(init)
    assert all(isinstance(value, str | int) for block in found for value in block)
