"""The 2-D wave equation by finite elements: a solver, random scenes with inclusions, and data sets of both.

u_tt = div(c^2 grad u) + f on [0, lx] x [0, ly] with the density 1, on a mesh of 4-node bilinear quadrilaterals (Q4)
with 2 x 2 Gauss points and lumped mass, in time by central differences. Fields are values at nodes (..., ny + 1,
nx + 1), y first; speeds are those of elements (..., ny, nx).
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from convatlas.errors import unknown

__all__ = [
    "Boundary",
    "RickerSource",
    "WaveFEM2d",
    "WaveSequences",
    "element_stiffness",
    "field_energy",
    "gaussian_bump",
    "random_speed",
    "wave_dataset",
]

#: What happens at the borders: values are 0, the field is free, or waves leave (first order: exact when they come
#: straight).
Boundary = Literal["dirichlet", "neumann", "absorbing"]

#: Corners of an element in the order of its nodes, as offsets (y, x), and in natural coordinates (x, y).
_OFFSETS = ((0, 0), (0, 1), (1, 1), (1, 0))
_CORNERS = ((-1, -1), (1, -1), (1, 1), (-1, 1))
_POWER_ITERATIONS = 60


@dataclass(frozen=True)
class RickerSource:
    """A force A (1 - 2 a^2) exp(-a^2), a = pi f (t - t0), on one node.

    Attributes:
        amplitude: A.
        frequency: f, where its spectrum is largest.
        delay: t0, when it is largest.
        node: (row, column) of the node.
    """

    amplitude: float
    frequency: float
    delay: float
    node: tuple[int, int]

    def at(self, time: float) -> float:
        """The force at a time."""
        square = (math.pi * self.frequency * (time - self.delay)) ** 2
        return self.amplitude * (1 - 2 * square) * math.exp(-square)


def element_stiffness(hx: float, hy: float, dtype: torch.dtype = torch.float64) -> Tensor:
    """Integral of grad N^T grad N over an element of hx x hy with c = 1: (4, 4), by 2 x 2 Gauss points."""
    total = torch.zeros(4, 4, dtype=torch.float64)
    corners = torch.tensor(_CORNERS, dtype=torch.float64)
    point = 1 / math.sqrt(3)
    for x in (-point, point):
        for y in (-point, point):
            by_x = corners[:, 0] * (1 + corners[:, 1] * y) / 4 * 2 / hx
            by_y = corners[:, 1] * (1 + corners[:, 0] * x) / 4 * 2 / hy
            total += (torch.outer(by_x, by_x) + torch.outer(by_y, by_y)) * hx * hy / 4
    return total.to(dtype)


class WaveFEM2d:
    """The solver; scenes of one mesh are solved at once, as leading axes of c2 and of the fields.

    Args:
        nx, ny: elements along x and y.
        lx, ly: size of the domain.
        c2: squared speed of the elements, a number or (..., ny, nx).
        boundary: of all borders.
        dt: time step; by default ``cfl`` * min(h) / max(c).
        cfl: Courant number of the default.
        source: force on a node; without, only the initial field moves.

    Raises:
        ValueError: a size or c2 is not positive, c2 has another shape, the source lies outside, or dt is unstable.
        UnknownName: there is no such boundary.
    """

    def __init__(
        self,
        nx: int,
        ny: int,
        lx: float = 1.0,
        ly: float = 1.0,
        *,
        c2: float | Tensor = 1.0,
        boundary: Boundary = "dirichlet",
        dt: float | None = None,
        cfl: float = 0.5,
        source: RickerSource | None = None,
    ) -> None:
        if boundary not in get_args(Boundary):
            raise unknown("boundary", boundary, get_args(Boundary))
        if nx < 2 or ny < 2:
            raise ValueError(f"nx and ny must be at least 2, got {nx} and {ny}")
        if not (lx > 0 and ly > 0 and cfl > 0):
            raise ValueError(f"lx, ly and cfl must be positive, got {lx:g}, {ly:g} and {cfl:g}")
        speeds = torch.as_tensor(c2)
        speeds = speeds if speeds.is_floating_point() else speeds.double()
        if speeds.dim() and speeds.shape[-2:] != (ny, nx):
            raise ValueError(f"c2 must be one number or (..., {ny}, {nx}), got {tuple(speeds.shape)}")
        if not bool(((speeds > 0) & speeds.isfinite()).all()):
            raise ValueError("c2 must be positive everywhere")
        if source is not None and not (0 <= source.node[0] <= ny and 0 <= source.node[1] <= nx):
            raise ValueError(f"source must lie on a node below ({ny + 1}, {nx + 1}), got {source.node}")
        self.nx, self.ny, self.boundary, self.source = nx, ny, boundary, source
        self.spacing = (lx / nx, ly / ny)
        self.uniform = not speeds.dim()
        if self.uniform and not isinstance(c2, Tensor):
            speeds = speeds.double()
        self.c2 = speeds if speeds.dim() else speeds.expand(ny, nx)
        self.dt = cfl * min(self.spacing) / math.sqrt(float(speeds.max())) if dt is None else float(dt)
        limit = 2 / self.highest_frequency()
        if not 0 < self.dt < limit:
            raise ValueError(f"unstable time step: dt={self.dt:g} exceeds the limit {limit:g}")

    # Matrices

    @cached_property
    def element_stiffness(self) -> Tensor:
        """Stiffness of an element with c = 1, (4, 4)."""
        return element_stiffness(*self.spacing, dtype=self.c2.dtype).to(self.c2.device)

    @cached_property
    def mass(self) -> Tensor:
        """Lumped mass of the nodes (ny + 1, nx + 1): a quarter of each element around."""
        hx, hy = self.spacing
        share = self.c2.new_full((1, 1, self.ny, self.nx), hx * hy / 4)
        return F.conv_transpose2d(share, share.new_ones(1, 1, 2, 2))[0, 0]

    @cached_property
    def damping(self) -> Tensor:
        """Damping of the nodes (..., ny + 1, nx + 1): c times the half edges around a node of an absorbing border."""
        hx, hy = self.spacing
        damping = self.c2.new_zeros(*self.c2.shape[:-2], self.ny + 1, self.nx + 1)
        if self.boundary == "absorbing":
            speed = self.c2.sqrt()
            for edge in (0, -1):
                damping[..., edge, :-1] += speed[..., edge, :] * hx / 2
                damping[..., edge, 1:] += speed[..., edge, :] * hx / 2
                damping[..., :-1, edge] += speed[..., :, edge] * hy / 2
                damping[..., 1:, edge] += speed[..., :, edge] * hy / 2
        return damping

    @cached_property
    def inside(self) -> Tensor:
        """1 at the nodes that move, 0 at those that Dirichlet's condition holds, (ny + 1, nx + 1)."""
        free = self.boundary != "dirichlet"
        return F.pad(self.c2.new_ones(self.ny - 1, self.nx - 1), (1, 1, 1, 1), value=float(free))

    def stiffness(self) -> Tensor:
        """The stiffness assembled, a sparse CSR matrix (N, N) with N = (ny + 1) (nx + 1), x inner.

        Raises:
            ValueError: there are several scenes.
        """
        if self.c2.dim() > 2:
            raise ValueError(f"a stiffness is assembled for one scene, got {tuple(self.c2.shape[:-2])}")
        numbers = torch.arange((self.ny + 1) * (self.nx + 1), device=self.c2.device).view(self.ny + 1, self.nx + 1)
        nodes = torch.stack([numbers[y : y + self.ny, x : x + self.nx] for y, x in _OFFSETS], dim=-1).view(-1, 4)
        values = self.c2.reshape(-1, 1, 1) * self.element_stiffness
        places = torch.stack([nodes[:, :, None].expand(-1, 4, 4), nodes[:, None].expand(-1, 4, 4)]).flatten(1)
        shape = (numbers.numel(), numbers.numel())
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse", UserWarning)  # torch tells that its sparse matrices are young
            # Elements that share two nodes add up.
            matrix = torch.sparse_coo_tensor(places, values.flatten(), shape, check_invariants=False)
            return matrix.coalesce().to_sparse_csr()

    def apply_stiffness(self, u: Tensor) -> Tensor:
        """K u of a field (..., ny + 1, nx + 1) without the matrix: element by element, or by a stencil where c is one.

        Raises:
            ValueError: u has another size.
        """
        self._check(u, "u")
        if self.uniform:
            return self._stencil(u)
        corners = torch.stack([u[..., y : y + self.ny, x : x + self.nx] for y, x in _OFFSETS], dim=-1)
        forces = (corners @ self.element_stiffness) * self.c2[..., None]
        result = u.new_zeros(forces.shape[:-3] + u.shape[-2:])
        for corner, (y, x) in enumerate(_OFFSETS):
            result[..., y : y + self.ny, x : x + self.nx] += forces[..., corner]
        return result

    def _stencil(self, u: Tensor) -> Tensor:
        """Nine points. At a border the mirrored field has the same forces once more, so half of them count."""
        k = self.element_stiffness
        stencil = k.new_zeros(3, 3)
        for a, (y, x) in enumerate(_OFFSETS):
            for b, (y2, x2) in enumerate(_OFFSETS):
                stencil[1 + y2 - y, 1 + x2 - x] += k[a, b]
        images = F.pad(u.reshape(-1, 1, *u.shape[-2:]), (1, 1, 1, 1), mode="reflect")
        forces = F.conv2d(images, (self.c2.flatten()[0] * stencil)[None, None]).view(u.shape)
        hx, hy = self.spacing
        return forces * (self.mass / (hx * hy))

    def highest_frequency(self) -> float:
        """The largest angular frequency of the mesh, by power iteration; time steps must be below 2 over it."""
        generator = torch.Generator().manual_seed(0)
        shape = (*self.c2.shape[:-2], self.ny + 1, self.nx + 1)
        u = torch.randn(shape, generator=generator, dtype=self.c2.dtype).to(self.c2.device) * self.inside
        largest = 0.0
        for _ in range(_POWER_ITERATIONS):
            forces = self.apply_stiffness(u) * self.inside
            quotient = (u * forces).sum((-2, -1)) / (self.mass * u * u).sum((-2, -1))
            largest = float(quotient.max())
            u = forces / self.mass
            u = u / u.abs().amax((-2, -1), keepdim=True)
        return math.sqrt(largest)

    # Time

    def run(
        self,
        steps: int,
        u0: Tensor | None = None,
        v0: Tensor | None = None,
        *,
        every: int = 1,
        assembled: bool = False,
    ) -> Tensor:
        """The fields (..., 1 + steps // every, ny + 1, nx + 1) at times 0, every * dt, 2 * every * dt, ...

        Args:
            steps: time steps.
            u0, v0: field and velocity at time 0; zeros when left out.
            every: steps between two fields that are kept.
            assembled: use the assembled matrix instead of the elements; the same up to rounding.

        Raises:
            ValueError: steps is negative, every smaller than 1, or a field has another size.
        """
        if steps < 0 or every < 1:
            raise ValueError(f"steps must be at least 0 and every at least 1, got {steps} and {every}")
        rest = self.c2.new_zeros(*self.c2.shape[:-2], self.ny + 1, self.nx + 1)
        given = {"u0": u0, "v0": v0}
        for name, field in given.items():
            if field is not None:
                self._check(field, name)
        u = self.inside * (rest if u0 is None else u0.to(rest))
        velocity = self.inside * (rest if v0 is None else v0.to(rest))
        matrix = self.stiffness() if assembled else None
        dt, mass, damping = self.dt, self.mass, self.damping

        def stiffness(field: Tensor) -> Tensor:
            if matrix is None:
                return self.apply_stiffness(field)
            return (matrix @ field.reshape(-1, mass.numel()).T).T.reshape(field.shape)

        acceleration = -(stiffness(u) + damping * velocity) / mass
        before = self.inside * (u - dt * velocity + dt**2 / 2 * acceleration)
        frames = [u]
        for step in range(steps):
            force = -stiffness(u)
            if self.source is not None:
                force[(..., *self.source.node)] += self.source.at(step * dt)
            after = dt**2 * force + 2 * mass * u - (mass - dt / 2 * damping) * before
            u, before = self.inside * after / (mass + dt / 2 * damping), u
            if (step + 1) % every == 0:
                frames.append(u)
        return torch.stack(frames, dim=-3)

    def energy(self, u: Tensor, v: Tensor) -> Tensor:
        """Kinetic and potential energy v^T M v / 2 + u^T K u / 2 of fields (..., ny + 1, nx + 1) and velocities."""
        return ((self.mass * v * v).sum((-2, -1)) + (u * self.apply_stiffness(u)).sum((-2, -1))) / 2

    def _check(self, field: Tensor, name: str) -> None:
        if field.shape[-2:] != (self.ny + 1, self.nx + 1):
            raise ValueError(f"{name} must be (..., {self.ny + 1}, {self.nx + 1}), got {tuple(field.shape)}")


# -- scenes and data ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class WaveSequences:
    """Waves in several scenes on square cells.

    Attributes:
        fields: (S, T, H, W), a field for each of T times.
        speed: (S, H, W), at the same nodes.
        interval: time between two fields.
        spacing: distance of two nodes.
        parameters: (S, 3), of scenes without inclusions: x and y of the source in [0, 1], and the speed.
    """

    fields: Tensor
    speed: Tensor
    interval: float = 1.0
    spacing: float = 1.0
    parameters: Tensor | None = None

    def __len__(self) -> int:
        return len(self.fields)

    def subset(self, rows: list[int]) -> WaveSequences:
        """Some of the scenes."""
        parameters = None if self.parameters is None else self.parameters[rows]
        return WaveSequences(self.fields[rows], self.speed[rows], self.interval, self.spacing, parameters)


def gaussian_bump(height: int, width: int, centre: Tensor, radius: float) -> Tensor:
    """exp(-r^2 / (2 radius^2)) on nodes of [0, 1]^2 around centres (..., 2) as (x, y): (..., height, width)."""
    y = torch.linspace(0, 1, height, dtype=centre.dtype, device=centre.device)[:, None]
    x = torch.linspace(0, 1, width, dtype=centre.dtype, device=centre.device)
    square = (x - centre[..., 0, None, None]) ** 2 + (y - centre[..., 1, None, None]) ** 2
    return (-square / (2 * radius**2)).exp()


def random_speed(
    height: int,
    width: int,
    inclusions: int = 2,
    *,
    speeds: tuple[float, float] = (0.5, 2.0),
    generator: torch.Generator | None = None,
) -> Tensor:
    """Speed at nodes (height, width): 1, but in elliptic inclusions another one, drawn evenly."""
    speed = torch.ones(height, width)
    y, x = torch.linspace(0, 1, height)[:, None], torch.linspace(0, 1, width)
    for _ in range(inclusions):
        draw = torch.rand(6, generator=generator).tolist()
        centre, axes, angle = draw[:2], (0.08 + 0.17 * draw[2], 0.08 + 0.17 * draw[3]), math.pi * draw[4]
        along = (x - centre[0]) * math.cos(angle) + (y - centre[1]) * math.sin(angle)
        across = (y - centre[1]) * math.cos(angle) - (x - centre[0]) * math.sin(angle)
        inner = (along / axes[0]) ** 2 + (across / axes[1]) ** 2 < 1
        speed[inner] = speeds[0] + (speeds[1] - speeds[0]) * draw[5]
    return speed


def wave_dataset(
    count: int,
    size: int = 32,
    *,
    frames: int = 24,
    inclusions: int = 2,
    boundary: Boundary = "dirichlet",
    source: Literal["bump", "ricker"] = "bump",
    interval: float = 0.05,
    radius: float = 0.08,
    seed: int = 0,
) -> WaveSequences:
    """Solve the wave equation on the unit square in random scenes.

    Args:
        count: scenes.
        size: nodes along each side.
        frames: fields of each scene.
        inclusions: in each scene; with 0 each scene has one random speed of its own, and ``parameters`` tells it.
        boundary: of all borders.
        source: an initial Gaussian bump, or a Ricker force; then the fields begin when it is over.
        interval: time between two fields; solved with as many steps as are stable.
        radius: of the bump; a Ricker force has waves about as long.
        seed: of the scenes.

    Raises:
        ValueError: a number is too small, or there is no such source.
        UnknownName: there is no such boundary.
    """
    for name, value, least in (
        ("count", count, 1),
        ("size", size, 3),
        ("frames", frames, 1),
        ("inclusions", inclusions, 0),
    ):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if source not in ("bump", "ricker"):
        raise unknown("source", source, ("bump", "ricker"))
    if not (interval > 0 and radius > 0):
        raise ValueError(f"interval and radius must be positive, got {interval:g} and {radius:g}")
    generator = torch.Generator().manual_seed(seed)
    centre = 0.2 + 0.6 * torch.rand(count, 2, generator=generator, dtype=torch.float64)
    own = 0.5 + 1.5 * torch.rand(count, generator=generator)
    scenes = [random_speed(size, size, inclusions, generator=generator) for _ in range(count)]
    speed = torch.stack(scenes) if inclusions else own[:, None, None].expand(-1, size, size).clone()
    c2 = F.avg_pool2d(speed.double().square()[:, None], 2, 1)[:, 0]
    elements = size - 1
    every = math.ceil(interval * float(c2.max().sqrt()) * elements / 0.5)
    steps, dt = (frames - 1) * every, interval / every
    place: dict[str, object] = {"boundary": boundary, "dt": dt}
    if source == "bump":
        solver = WaveFEM2d(elements, elements, c2=c2, **place)  # type: ignore[arg-type]
        fields = solver.run(steps, gaussian_bump(size, size, centre, radius), every=every)
    else:
        frequency = 1 / (math.pi * radius)
        quiet = math.ceil(2 / frequency / interval)
        runs = []
        for scene, (x, y) in zip(c2, centre.tolist(), strict=True):
            node = (round(y * elements), round(x * elements))
            force = RickerSource(1.0, frequency, 1 / frequency, node)
            solver = WaveFEM2d(elements, elements, c2=scene, source=force, **place)  # type: ignore[arg-type]
            runs.append(solver.run(steps + quiet * every, every=every)[quiet:])
        fields = torch.stack(runs)
        fields = fields / fields.flatten(1).abs().amax(1).clamp_min(1e-30)[:, None, None, None]
    parameters = None if inclusions else torch.cat([centre.float(), own[:, None]], dim=1)
    return WaveSequences(fields.float(), speed, interval, 1 / elements, parameters)


def field_energy(fields: Tensor, speed: Tensor, interval: float = 1.0, spacing: float = 1.0) -> Tensor:
    """Energy between each two successive fields (..., T, H, W) of waves: (..., T - 1).

    The velocity is their difference over the interval; the potential energy is the mean of theirs.

    Args:
        fields: on square cells.
        speed: (..., H, W), at the nodes.
        interval: time between two fields.
        spacing: distance of two nodes.

    Raises:
        ValueError: there are fewer than two fields, or the sizes differ.
    """
    if fields.dim() < 3 or fields.shape[-3] < 2 or fields.shape[-2:] != speed.shape[-2:]:
        raise ValueError(
            f"fields must be (..., T, H, W) with T of at least 2 and speed (..., H, W), got {tuple(fields.shape)} and "
            f"{tuple(speed.shape)}"
        )
    *leading, height, width = speed.shape
    c2 = F.avg_pool2d(speed.double().square().reshape(-1, 1, height, width), 2, 1).view(*leading, height - 1, width - 1)
    u = fields.double()
    k = element_stiffness(1.0, 1.0).to(u.device)
    corners = torch.stack([u[..., y : height - 1 + y, x : width - 1 + x] for y, x in _OFFSETS], dim=-1)
    potential = ((corners @ k * corners).sum(-1) * c2[..., None, :, :]).sum((-2, -1)) / 2
    mass = F.conv_transpose2d(u.new_full((1, 1, height - 1, width - 1), spacing**2 / 4), u.new_ones(1, 1, 2, 2))[0, 0]
    velocity = u.diff(dim=-3) / interval
    kinetic = (mass * velocity * velocity).sum((-2, -1)) / 2
    return kinetic + (potential[..., 1:] + potential[..., :-1]) / 2
