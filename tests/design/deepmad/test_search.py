"""DeepMAD's search as a user runs it: from budgets to a network that can be trained."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from convatlas.design.deepmad import ArchitectureSearch
from convatlas.design.deepmad.program import PUBLISHED_PROGRAMS, SPACES
from convatlas.errors import DataError, UnknownName
from convatlas.networks import create_model, model_config
from convatlas.networks.deepmad import load_structure, make_structure, save_structure
from convatlas.training.measure import count_parameters
from convatlas.training.run import from_mapping, to_mapping

SMALL: dict[str, Any] = {"flops": 1e8, "params": 1e6, "image_size": 32, "candidates": 600, "population": 32}


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVATLAS_PROGRESS", "0")


@pytest.mark.parametrize("space", SPACES)
def test_what_is_found_can_be_built_and_is_within_the_budgets(space: str, tmp_path: Path):
    search = ArchitectureSearch(space=space, **SMALL)  # type: ignore[arg-type]
    report = search.run(tmp_path)
    structure = load_structure(tmp_path / "structure.txt")
    assert search.program().violation(structure) is None
    assert {block.kind for block in structure[1:5]} == {SPACES[space].kind}
    settings = yaml.safe_load((tmp_path / "train.yaml").read_text())
    assert settings["model"] == "deepmad"
    assert settings["image_size"] == 32
    model = create_model(settings["model"], num_classes=0, **settings["options"])
    assert count_parameters(model) <= 1e6
    assert model.config.structure == structure
    trace = json.loads((tmp_path / "state.json").read_text())["trace"]
    assert trace[0][0] == 0
    assert trace[-1][0] == 600
    assert trace[-1][1] > trace[0][1]
    assert "600 candidates" in report.summary
    assert (tmp_path / "report.html").stat().st_size > 1000


def test_the_relaxation_is_another_solver():
    search = ArchitectureSearch(**{**SMALL, "solver": "relaxation", "starts": 1})
    state = search.start()
    assert not search.progress(state).finished
    state = search.step(json.loads(json.dumps(state)))
    assert search.progress(state).finished
    assert search.program().violation(search.found(state)) is None
    assert state["best"][0] > state["first"][0]
    assert "1 starts of the solver" in search.report(state).summary


def test_processes_exchange_their_populations():
    alone = ArchitectureSearch(**{**SMALL, "workers": 2})
    state = alone.step(alone.start())  # one after the other, without processes
    assert alone.progress(state).done == 600
    first, second = state["islands"]
    assert first["members"] == second["members"]
    assert first["random"] != second["random"]
    assert first["evaluated"] == second["evaluated"] == 300


@pytest.mark.slow
def test_processes_change_nothing():
    search = ArchitectureSearch(**{**SMALL, "workers": 2})
    expected = search.step(search.start())
    with search.workplace():
        assert search.step(search.start()) == expected


def test_the_late_phase_begins_where_it_is_told():
    search = ArchitectureSearch(**{**SMALL, "minor_after": 200})
    state = search.start()
    done = []
    while not search.progress(state).finished:
        state = search.step(state)
        done.append(search.progress(state).done)
    assert done == [200, 600]
    assert search.found(state) != ArchitectureSearch(**SMALL).found(_end(ArchitectureSearch(**SMALL)))


def _end(search: ArchitectureSearch) -> dict[str, Any]:
    state = search.start()
    while not search.progress(state).finished:
        state = search.step(state)
    return state


def test_budgets_of_published_networks():
    for name, published in PUBLISHED_PROGRAMS.items():
        search = ArchitectureSearch(like=name)
        program = search.program()
        assert (program.flops, program.params, program.rho) == (published.flops, published.params, published.rho)
        assert program.image_size == published.image_size
        assert program.weights == (1, 1, 1, 1, 8)
        assert search.first()[-1].out_channels == published.last or published.last is None
    narrower = ArchitectureSearch(like="r18", params=5e6, rho=math.inf, image_size=160).program()
    assert (narrower.flops, narrower.params, narrower.rho, narrower.image_size) == (1.82e9, 5e6, math.inf, 160)
    other = ArchitectureSearch(like="r18", space="k1dwk1")
    assert (other.program().rho, other.chosen_space().kind) == (0.5, "SuperResK1DWK1")


def test_a_structure_file_to_begin_with(tmp_path: Path):
    save_structure(model_config("deepmad_r50").structure, tmp_path / "r50.txt")  # type: ignore[attr-defined]
    search = ArchitectureSearch(like="r50", init=str(tmp_path / "r50.txt"), candidates=0)
    assert search.found(search.start()) == load_structure(tmp_path / "r50.txt")
    assert "score 48884.5 after 0 candidates" in search.run().summary
    tight = ArchitectureSearch(like="r18", init=str(tmp_path / "r50.txt"))
    with pytest.raises(ValueError, match=r"init must be within the budgets: flops is 4\.08726e\+09, the budget is"):
        tight.start()
    with pytest.raises(ValueError, match="init must be made of SuperResK1DWSEK1, got SuperResK1KXK1; choose its space"):
        ArchitectureSearch(like="29m", init=str(tmp_path / "r50.txt")).start()
    (tmp_path / "none.txt").write_text("nothing")
    with pytest.raises(DataError, match=r"none\.txt is not a structure file"):
        ArchitectureSearch(like="r50", init=str(tmp_path / "none.txt")).start()


def test_stages_and_weights_follow_the_structure(tmp_path: Path):
    short = make_structure("SuperResK1KXK1", 8, ((16, 3, 2, 1, 8), (32, 3, 2, 1, 8)))
    save_structure(short, tmp_path / "short.txt")
    search = ArchitectureSearch(**{**SMALL, "init": str(tmp_path / "short.txt"), "rho": 1.0})
    assert search.program(short).weights == (1, 1, 8)
    assert search.start()["first"][0] > 0
    search = ArchitectureSearch(**{**SMALL, "init": str(tmp_path / "short.txt"), "rho": 1.0, "weights": (1, 1, 1, 8)})
    with pytest.raises(ValueError, match="3 stages but 4 weights"):
        search.start()


def test_scores_of_a_file(tmp_path: Path):
    save_structure(model_config("deepmad_r18").structure, tmp_path / "r18.txt")  # type: ignore[attr-defined]
    report = ArchitectureSearch(like="r18").score(str(tmp_path / "r18.txt"))
    assert report.summary.startswith("Objective 32085.397; not within the budgets: flops is 1.83732e+09")
    assert "Their sum is 32120.203; less 10 Q = 34.807" in report.to_json()
    assert (
        ArchitectureSearch()
        .score(str(tmp_path / "r18.txt"))
        .summary.endswith("not within the budgets: channels fall from 1024 to 672 at block 5.")
    )


def test_settings_survive_a_round_trip():
    search = ArchitectureSearch(like="29m", weights=(1, 2, 3, 4, 5), rho=0.4, workers=3)
    assert to_mapping(from_mapping(ArchitectureSearch, to_mapping(search))) == to_mapping(search)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"like": "r19"}, "unknown published network 'r19': did you mean r18"),
        ({"space": "k1"}, "unknown space 'k1'"),
        ({"solver": "ga"}, "unknown solver 'ga'"),
        ({"flops": -1.0}, r"flops must be positive, got -1\.0"),
        ({"candidates": -1}, "candidates must be at least 0, got -1"),
        ({"workers": 0}, "workers must be at least 1, got 0"),
        ({"weights": ()}, r"weights must be finite numbers, one for each stage, got \(\)"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, Any], message: str):
    with pytest.raises((ValueError, UnknownName), match=message):
        ArchitectureSearch(**settings)


def test_impossible_searches_are_named():
    with pytest.raises(ValueError, match="give a budget: flops, params or like"):
        ArchitectureSearch().start()
    with pytest.raises(ValueError, match="no structure within the budgets was found; at the nearest one"):
        ArchitectureSearch(params=1e3).start()
    with pytest.raises(ValueError, match="image_size must be at least the total stride, 32, got 16"):
        ArchitectureSearch(params=5e6, image_size=16).start()
