"""The finite-element solver of the wave equation: its matrices, known waves, energy, borders, data and files."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from convatlas.data.wave_fem import (
    RickerSource,
    WaveFEM2d,
    element_stiffness,
    field_energy,
    gaussian_bump,
    random_speed,
    wave_dataset,
)
from convatlas.data.wave_files import read_sequences, sequences_digest, write_sequences
from convatlas.errors import DataError, UnknownName

BOUNDARIES = ("dirichlet", "neumann", "absorbing")


def _scene(**options: object) -> WaveFEM2d:
    c2 = 0.5 + torch.rand(6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return WaveFEM2d(5, 6, 1.0, 0.9, c2=c2, **options)  # type: ignore[arg-type]


def _grid(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    line = torch.linspace(0, 1, n + 1, dtype=torch.float64)
    return line[:, None], line


def test_elements_are_those_of_the_formula():
    square = torch.tensor([[4, -1, -2, -1], [-1, 4, -1, -2], [-2, -1, 4, -1], [-1, -2, -1, 4]], dtype=torch.float64) / 6
    torch.testing.assert_close(element_stiffness(0.3, 0.3), square)
    oblong = element_stiffness(0.2, 0.5)
    torch.testing.assert_close(oblong, oblong.mT)
    torch.testing.assert_close(oblong.sum(0), torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-14)
    x = torch.tensor([0, 0.2, 0.2, 0], dtype=torch.float64)
    assert float(x @ oblong @ x) == pytest.approx(0.2 * 0.5)  # |grad x|^2 over the element


def test_stiffness_is_symmetric_and_knows_linear_fields():
    solver = _scene()
    matrix = solver.stiffness().to_dense()
    torch.testing.assert_close(matrix, matrix.mT)
    torch.testing.assert_close(matrix.sum(0), torch.zeros(42, dtype=torch.float64), rtol=0, atol=1e-13)
    uniform = WaveFEM2d(5, 6, 1.0, 0.9, c2=2.0)
    linear = (2 * torch.arange(6.0) + 3 * torch.arange(7.0)[:, None]).double()
    assert uniform.apply_stiffness(linear)[1:-1, 1:-1].abs().max() < 1e-12
    assert float(solver.mass.sum()) == pytest.approx(0.9)
    assert float(solver.mass[0, 0]) == pytest.approx(float(solver.mass[3, 3]) / 4)


@pytest.mark.parametrize("c2", ["uniform", "varying"])
def test_matrix_free_is_the_matrix(c2: str):
    solver = _scene() if c2 == "varying" else WaveFEM2d(5, 6, 1.0, 0.9, c2=1.7)
    u = torch.randn(3, 7, 6, dtype=torch.float64)
    expected = (solver.stiffness() @ u.flatten(1).T).T.view_as(u)
    torch.testing.assert_close(solver.apply_stiffness(u), expected)
    start = u[0]
    torch.testing.assert_close(solver.run(9, start, assembled=True), solver.run(9, start))


def test_standing_wave_and_order_of_convergence():
    errors = []
    for n in (16, 32):
        y, x = _grid(n)
        solver = WaveFEM2d(n, n, dt=0.5 / n)
        mode = torch.sin(math.pi * x) * torch.sin(math.pi * y)
        steps = n
        exact = mode * math.cos(math.sqrt(2) * math.pi * steps * solver.dt)
        errors.append(float((solver.run(steps, mode)[-1] - exact).abs().max()))
    assert errors[1] < 0.01
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.1)


def test_plane_wave_travels_at_its_speed():
    n, speed = 128, 1.5
    solver = WaveFEM2d(n, 2, 1.0, 2 / n, c2=speed**2, boundary="neumann")
    x = torch.linspace(0, 1, n + 1, dtype=torch.float64).expand(3, -1)
    pulse = (-(((x - 0.3) / 0.05) ** 2)).exp()
    v0 = speed * 2 * (x - 0.3) / 0.05**2 * pulse  # moves to the right
    steps = round(0.2 / solver.dt)
    final = solver.run(steps, pulse, v0)[-1, 1]
    centre = float((final * x[0]).sum() / final.sum())
    assert (centre - 0.3) / (steps * solver.dt) == pytest.approx(speed, rel=0.01)


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_energy_stays_or_leaves(boundary: str):
    n = 24
    solver = WaveFEM2d(n, n, boundary=boundary, c2=random_speed(n, n).double() ** 2)
    start = gaussian_bump(n + 1, n + 1, torch.tensor([0.5, 0.4], dtype=torch.float64), 0.1)
    fields = solver.run(150, start)
    velocity = (fields[2:] - fields[:-2]) / (2 * solver.dt)
    energy = solver.energy(fields[1:-1], velocity)
    if boundary == "absorbing":
        assert float(energy[-1]) < 0.05 * float(energy[0])
    else:
        assert float((energy / energy[0] - 1).abs().max()) < 0.01
    assert (boundary == "dirichlet") == (not fields[:, 0].any() and not fields[:, :, -1].any())


def test_scenes_are_solved_at_once():
    c2 = torch.stack([torch.full((5, 4), value, dtype=torch.float64) for value in (0.5, 2.0)])
    both = WaveFEM2d(4, 5, c2=c2, dt=0.05)
    start = torch.randn(2, 6, 5, dtype=torch.float64)
    together = both.run(6, start, every=2)
    assert together.shape == (2, 4, 6, 5)
    for scene in range(2):
        alone = WaveFEM2d(4, 5, c2=c2[scene], dt=0.05).run(6, start[scene])[::2]
        torch.testing.assert_close(together[scene], alone)
    with pytest.raises(ValueError, match="a stiffness is assembled for one scene"):
        both.stiffness()


def test_source_and_initial_velocity_add_up():
    source = RickerSource(0.5, 3.0, 0.2, (3, 2))
    assert source.at(0.2) == 0.5
    driven, free = _scene(dt=0.04, source=source), _scene(dt=0.04)
    u0, v0 = torch.randn(2, 7, 6, dtype=torch.float64)
    torch.testing.assert_close(driven.run(12, u0, v0), driven.run(12) + free.run(12, u0, v0))
    one_step = free.run(1, v0=v0)[1]
    torch.testing.assert_close(one_step, free.dt * v0 * free.inside)


def test_unstable_steps_and_bad_arguments_are_told():
    limit = 2 / WaveFEM2d(16, 16).highest_frequency()
    assert limit == pytest.approx(1 / 16, rel=0.02)
    with pytest.raises(ValueError, match=r"unstable time step: dt=0.07 exceeds the limit 0.06"):
        WaveFEM2d(16, 16, dt=0.07)
    for arguments, message in (
        ({"nx": 1, "ny": 4}, "nx and ny must be at least 2, got 1 and 4"),
        ({"nx": 4, "ny": 4, "lx": -1}, "lx, ly and cfl must be positive"),
        ({"nx": 4, "ny": 4, "c2": torch.ones(4, 5)}, r"c2 must be one number or \(..., 4, 4\), got \(4, 5\)"),
        ({"nx": 4, "ny": 4, "c2": -1.0}, "c2 must be positive everywhere"),
        ({"nx": 4, "ny": 4, "source": RickerSource(1, 1, 1, (5, 0))}, "source must lie on a node"),
    ):
        with pytest.raises(ValueError, match=message):
            WaveFEM2d(**arguments)  # type: ignore[arg-type]
    with pytest.raises(UnknownName, match="unknown boundary 'periodic'"):
        WaveFEM2d(4, 4, boundary="periodic")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"u0 must be \(..., 5, 5\), got \(4, 4\)"):
        WaveFEM2d(4, 4).run(1, torch.zeros(4, 4))
    with pytest.raises(ValueError, match="size must be at least 3, got 2"):
        wave_dataset(1, 2)


@pytest.mark.parametrize("source", ["bump", "ricker"])
def test_data_set(source: str):
    data = wave_dataset(2, 12, frames=6, source=source, interval=0.04, seed=3)  # type: ignore[arg-type]
    assert data.fields.shape == (2, 6, 12, 12)
    assert data.speed.shape == (2, 12, 12)
    assert 0.5 <= float(data.speed.min()) < float(data.speed.max()) <= 2
    assert float(data.fields.abs().max()) == pytest.approx(1.0, rel=0.15)
    assert sequences_digest(data) == sequences_digest(
        wave_dataset(2, 12, frames=6, source=source, interval=0.04, seed=3)
    )  # type: ignore[arg-type]
    energy = field_energy(data.fields, data.speed, data.interval, data.spacing)
    assert energy.shape == (2, 5)
    assert float((energy / energy[:, :1] - 1).abs().max()) < 0.15  # of differences over many steps
    plain = wave_dataset(2, 12, frames=2, inclusions=0, seed=3)
    assert plain.parameters is not None
    torch.testing.assert_close(plain.speed, plain.parameters[:, 2, None, None].expand(-1, 12, 12))


def test_files_are_read_back_and_checked(tmp_path: Path):
    data = wave_dataset(2, 8, frames=3, inclusions=0)
    write_sequences(tmp_path / "waves.npz", data)
    again = read_sequences(tmp_path / "waves.npz")
    assert sequences_digest(again) == sequences_digest(data)
    assert (again.interval, again.spacing) == (data.interval, data.spacing)
    assert torch.equal(again.parameters, data.parameters)  # type: ignore[arg-type]
    fields = np.zeros((2, 3, 4, 5))
    np.savez(tmp_path / "one.npz", fields=fields[0], speed=2.0)
    assert read_sequences(tmp_path / "one.npz").speed.unique().tolist() == [2.0]
    for held, message in (
        ({"fields": fields}, "must hold fields and speed; it holds fields"),
        ({"fields": fields, "speed": np.ones((4, 4))}, r"speed must be \(2, 4, 5\), got \(4, 4\)"),
        ({"fields": fields[0, 0], "speed": 1.0}, r"fields must be \(scenes, times, H, W\)"),
        ({"fields": fields + np.nan, "speed": 1.0}, "fields holds NaN or infinite values"),
        ({"fields": fields, "speed": 0.0}, "speed must be positive"),
        ({"fields": fields, "speed": 1.0, "interval": [1, 2]}, "interval must be one positive number"),
        ({"fields": fields, "speed": 1.0, "parameters": np.ones((3, 1))}, r"parameters must be \(2, P\), got \(3, 1\)"),
    ):
        np.savez(tmp_path / "bad.npz", **held)  # type: ignore[arg-type]
        with pytest.raises(DataError, match=message):
            read_sequences(tmp_path / "bad.npz")
    (tmp_path / "text.npz").write_text("no archive")
    for name, message in (("text.npz", "cannot be read as an .npz file"), ("none.npz", "does not exist")):
        with pytest.raises(DataError, match=message):
            read_sequences(tmp_path / name)
