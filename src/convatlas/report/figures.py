"""The figures of a report as inline SVG, and its pictures as PNG.

Every colour becomes a CSS variable of the page (with the colour itself as fallback), so that one drawing serves light
and dark pages. Text stays text, in the page's font.
"""

from __future__ import annotations

import base64
import io
import math
import re
import textwrap
import warnings
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from PIL import Image

from convatlas.report.parts import Bars, Heatmap, Lines, Scatter, column_text, printable

__all__ = ["Drawing", "draw", "line_style", "picture"]

_INK, _MUTED, _FAINT, _RULE = "#222222", "#5c6068", "#9a9ea6", "#dfe1e5"
# Okabe and Ito's colours, which colour-blind readers tell apart; yellow and black do not show on every page.
_SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_DASHES = ((), (5, 2), (1.5, 1.5), (6, 2, 1.5, 2))
_HEAT = (0, 114, 178)
_VARIABLES = {
    _INK: "--ink",
    _MUTED: "--muted",
    _FAINT: "--faint",
    _RULE: "--rule",
    "#fefefe": "--on-heat",
    **{colour: f"--c{index}" for index, colour in enumerate(_SERIES, start=1)},
}

_WIDTH = 4.0  # inches: such a drawing reads well at a phone's width and at half a desktop page
_STEPS = (1, 2, 5, 10)  # ticks stand at these multiples of a power of ten
_LABELLED = 30  # most rows or columns with a name each
_ANNOTATED = 16  # most rows or columns with a number in each cell
_DRAWN = 250  # most rows or columns drawn; larger matrices are reduced to blocks
_LONGEST_SIDE = 800  # pixels of a picture
_SETTINGS = {
    "axes.axisbelow": True,
    "axes.edgecolor": _FAINT,
    "axes.labelcolor": _MUTED,
    "axes.labelsize": 9,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": _MUTED,
    "axes.titlelocation": "left",
    "axes.titlesize": 9,
    "font.size": 9,
    "grid.color": _RULE,
    "lines.linewidth": 1.8,
    "svg.fonttype": "none",
    "text.color": _INK,
    "text.parse_math": False,
    "xtick.color": _FAINT,
    "xtick.labelcolor": _MUTED,
    "xtick.labelsize": 8.5,
    "ytick.color": _FAINT,
    "ytick.labelcolor": _MUTED,
    "ytick.labelsize": 8.5,
    "ytick.left": False,
}


class Drawing(NamedTuple):
    """An SVG element; ``wide`` if it needs a page's whole width; ``note`` says what the drawing leaves out."""

    svg: str
    wide: bool = False
    note: str = ""


def draw(part: Lines | Scatter | Bars | Heatmap, prefix: str) -> Drawing | None:
    """Draw one figure; its ids begin with ``prefix``. None if it has nothing to show."""
    with style.context(["default", {**_SETTINGS, "svg.hashsalt": prefix}]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph", category=UserWarning)  # the browser has its own fonts
        match part:
            case Lines():
                drawn = _lines(part)
            case Scatter():
                drawn = _scatter(part)
            case Bars():
                drawn = _bars(part)
            case Heatmap():
                drawn = _heatmap(part)
        if drawn is None:
            return None
        figure, wide, note = drawn
        buffer = io.StringIO()
        no_metadata: dict[str, Any] = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    return Drawing(_inline(buffer.getvalue(), prefix, printable(_describe(part))), wide, note)


def _describe(part: Lines | Scatter | Bars | Heatmap) -> str:
    """What a figure shows, for those who cannot see it."""
    match part:
        case Lines():
            return f"{part.title}: {part.y_label} against {part.x_label}, for {', '.join(part.series)}"
        case Scatter():
            return f"{part.title}: {part.y_label} against {part.x_label}, of {', '.join(part.points)}"
        case Bars():
            texts = column_text(list(part.values.values()))
            values = ", ".join(f"{name} {text}" for name, text in zip(part.values, texts, strict=True))
            return f"{part.title}: {part.y_label}: {values}"
        case Heatmap():
            rows, columns = np.shape(part.values)
            return f"{part.title}: {part.y_label} ({rows}) against {part.x_label} ({columns})"


def line_style(index: int) -> tuple[str, str]:
    """Colour variable and SVG dash pattern of the series number ``index``, from 0."""
    return f"--c{index % len(_SERIES) + 1}", " ".join(f"{length * 1.8:g}" for length in _dashes(index))


def picture(pixels: npt.NDArray[np.uint8]) -> tuple[str, int, int]:
    """A uint8 image ``(H, W)`` or ``(H, W, 3)`` as a PNG data URI, with the width and height it was reduced to."""
    image = Image.fromarray(pixels)
    image.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}", image.width, image.height


# -- the four kinds ----------------------------------------------------------------------------------------------------

_Drawn = tuple[Figure, bool, str] | None


def _lines(part: Lines) -> _Drawn:
    wide = bool(part.bands)
    figure, axes = _axes(2 * _WIDTH if wide else _WIDTH, 2.5)
    shown: list[float] = []
    steps: list[float] = []
    for index, (name, (given_x, given_y)) in enumerate(part.series.items()):
        if name in part.bands:
            axes.fill_between(*part.bands[name], color=_SERIES[index % len(_SERIES)], alpha=0.2, linewidth=0)
        x, y = np.array(given_x), np.array(given_y)
        y[~np.isfinite(y) | ((y <= 0) if part.log_y else False)] = np.nan
        seen = np.isfinite(x) & np.isfinite(y) & ((x > 0) if part.log_x else True)
        shown += y[seen].tolist()
        steps += x[seen].tolist()
        few = np.count_nonzero(seen) <= 20
        (line,) = axes.plot(x, y, color=_SERIES[index % len(_SERIES)], marker="o" if few else None, markersize=3.5)
        if dashes := _dashes(index):
            line.set_dashes(dashes)
    if not shown:
        return None
    axes.margins(x=0.02)
    axes.grid(axis="y")
    axes.spines["left"].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=_STEPS, integer=all(step == round(step) for step in steps)))
    axes.xaxis.set_major_formatter(FuncFormatter(_tick))
    if part.log_x:
        _log_axis(axes, "x", steps)
    if part.log_y:
        _log_axis(axes, "y", shown)
    else:
        axes.yaxis.set_major_locator(MaxNLocator(6, steps=_STEPS))
        axes.yaxis.set_major_formatter(FuncFormatter(_tick))
    _name_axes(axes, part.x_label, part.y_label)
    return figure, wide, ""


def _scatter(part: Scatter) -> _Drawn:
    points = {
        name: (x, y)
        for name, (x, y) in part.points.items()
        if math.isfinite(x) and math.isfinite(y) and (x > 0 or not part.log_x)
    }
    if not points:
        return None
    figure, axes = _axes(_WIDTH, 2.9)
    x, y = np.array(list(points.values())).T
    front = [points[name] for name in part.front if name in points]
    axes.plot(*zip(*front, strict=True), color=_SERIES[0], linewidth=1.2) if front else None
    filled = [_SERIES[0] if name in part.front or not part.front else "none" for name in points]
    axes.scatter(x, y, s=34, facecolors=filled, edgecolors=_SERIES[0], linewidths=1.2)
    axes.margins(0.16, 0.16)
    axes.grid(axis="both")
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=_STEPS))
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=_STEPS))
    axes.xaxis.set_major_formatter(FuncFormatter(_tick))
    axes.yaxis.set_major_formatter(FuncFormatter(_tick))
    if part.log_x:
        _log_axis(axes, "x", x.tolist())
    _name_axes(axes, part.x_label, part.y_label)
    figure.draw_without_rendering()  # fixes the layout, which the places of the labels depend on
    missing = _label_points(axes, points)
    notes = []
    if missing:
        notes.append(f"Names without room: {', '.join(missing)}.")
    if left_out := [name for name in part.points if name not in points]:
        notes.append(f"Not shown, for want of a place on the axes: {', '.join(left_out)}.")
    return figure, False, " ".join(notes)


def _label_points(axes: Axes, points: dict[str, tuple[float, float]]) -> list[str]:
    """Write each point's name beside it where it covers nothing; return the names that found no place."""
    figure = axes.figure
    scale = figure.dpi / 72
    size = 8.5 * scale
    centres = {name: axes.transData.transform(point) for name, point in points.items()}
    frame = axes.get_window_extent()
    radius = 3.5 * scale
    taken = [(x - radius, y - radius, x + radius, y + radius) for x, y in centres.values()]
    missing = []
    for name, (x, y) in centres.items():
        text = _cut(name, 32)
        width, height = 0.56 * size * len(text), 1.15 * size
        for across, up in ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1)):
            gap = radius + (3 * scale if up == 0 else scale)
            left = x + across * gap + (across - 1) / 2 * width
            bottom = y + up * gap + (up - 1) / 2 * height
            box = (left, bottom, left + width, bottom + height)
            inside = frame.x0 <= box[0] and box[2] <= figure.bbox.x1 and frame.y0 <= box[1] and box[3] <= frame.y1
            if inside and not any(_overlap(box, other) for other in taken):
                axes.annotate(
                    text,
                    points[name],
                    (across * gap / scale, up * gap / scale),
                    textcoords="offset points",
                    ha=("right", "center", "left")[across + 1],
                    va=("top", "center", "bottom")[up + 1],
                    size=8.5,
                    annotation_clip=False,
                ).set_in_layout(False)
                taken.append(box)
                break
        else:
            missing.append(name)
    return missing


def _overlap(a: Sequence[float], b: Sequence[float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _bars(part: Bars) -> _Drawn:
    values = list(part.values.values())
    finite = [value if math.isfinite(value) else 0.0 for value in values]
    if not any(map(math.isfinite, values)):
        return None
    names = ["\n".join(textwrap.wrap(printable(name), 24, max_lines=2, placeholder="\u2026")) for name in part.values]
    figure, axes = _axes(_WIDTH, 0.5 + sum(0.4 if "\n" in name else 0.28 for name in names))
    rows = range(len(values))
    axes.barh(rows, finite, height=0.62, color=_SERIES[0])
    longest = max(map(abs, finite)) or 1.0
    for row, value, text in zip(rows, finite, column_text(values), strict=True):
        axes.annotate(
            text,
            (value, row),
            (4 if value >= 0 else -4, 0),
            textcoords="offset points",
            ha="left" if value >= 0 else "right",
            va="center",
            size=8.5,
        )
    axes.set_xlim(min(0.0, min(finite) - 0.3 * longest), max(0.0, max(finite) + 0.2 * longest))
    axes.set_ylim(len(values) - 0.5, -0.5)
    axes.set_yticks(rows, names)
    axes.tick_params(axis="y", labelcolor=_INK)
    axes.xaxis.set_visible(False)
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.axvline(0, color=_FAINT, linewidth=0.8)
    _name_axes(axes, "", part.y_label)
    return figure, False, ""


def _heatmap(part: Heatmap) -> _Drawn:
    values = np.asarray(part.values, dtype=float)
    finite = values[np.isfinite(values)]
    if not finite.size:
        return None
    rows, columns = values.shape
    most = max(rows, columns)
    low, high = min(0.0, float(finite.min())), float(finite.max())
    share = np.sqrt(np.clip((values - low) / ((high - low) or 1.0), 0, 1))

    row_names = [_cut(name, 18) for name in part.row_labels] if rows <= _LABELLED else []
    column_names = [_cut(name, 18) for name in part.column_labels] if columns <= _LABELLED else []
    annotated = part.annotate and most <= _ANNOTATED
    width = _WIDTH + 0.17 * max(0, (most if most <= _LABELLED else 0) - 10)
    left = 0.45 + 0.07 * max(map(len, row_names), default=4)
    upright = max(map(len, column_names), default=0) * 0.085 > (width - left) / columns
    below = 0.5 + (0.07 * max(map(len, column_names), default=0) if upright else 0.1)
    cell = (width - left - (0.0 if annotated else 0.7)) / columns
    figure, axes = _axes(width, min(max(cell * rows, 0.6), 1.5 * width) + below + 0.25)

    down, across = math.ceil(rows / _DRAWN), math.ceil(columns / _DRAWN)
    drawn = _largest(share, down, across)
    heat = np.zeros((*drawn.shape, 4), dtype=np.uint8)
    heat[..., :3] = _HEAT
    heat[..., 3] = _strength(drawn)
    extent = (-0.5, heat.shape[1] * across - 0.5, heat.shape[0] * down - 0.5, -0.5)
    axes.imshow(heat, interpolation="none", aspect="auto", extent=extent)
    axes.set_xlim(-0.5, columns - 0.5)
    axes.set_ylim(rows - 0.5, -0.5)
    axes.spines[:].set_visible(True)
    axes.spines[:].set_color(_RULE)
    axes.tick_params(length=0)
    for axis, names in ((axes.xaxis, column_names), (axes.yaxis, row_names)):
        if names:
            axis.set_ticks(range(len(names)), names)
        else:
            axis.set_major_locator(MaxNLocator(6, integer=True))
    if upright:
        axes.tick_params(axis="x", labelrotation=90)
    if annotated:
        _write_numbers(axes, np.asarray(part.values), share, cell)
    else:
        _colour_scale(figure, axes, low, high)
    _name_axes(axes, part.x_label, part.y_label)
    note = f"Each dot shows the largest of {down} \u00d7 {across} values." if down * across > 1 else ""
    return figure, width > 5.5, note


def _write_numbers(axes: Axes, values: npt.NDArray[Any], share: npt.NDArray[np.float64], cell: float) -> None:
    whole = not np.issubdtype(values.dtype, np.floating) or bool(np.all(values == np.round(values)))
    form = ".0f" if whole else ".2f" if np.nanmax(np.abs(values)) >= 0.1 else ".2g"
    texts = [[f"{value:{form}}" for value in row] for row in values.astype(float)]
    size = min(9.0, cell * 72 / (0.75 * max(len(text) for row in texts for text in row)))
    for (row, column), strength in np.ndenumerate(share):
        if np.isnan(strength):
            continue
        colour = "#fefefe" if strength > 0.8 else _FAINT if values[row, column] == 0 else _INK
        axes.text(column, row, texts[row][column], size=size, color=colour, ha="center", va="center_baseline")


def _colour_scale(figure: Figure, axes: Axes, low: float, high: float) -> None:
    ramp = np.zeros((64, 1, 4), dtype=np.uint8)
    ramp[..., :3] = _HEAT
    ramp[:, 0, 3] = _strength(np.linspace(1, 0, len(ramp)))
    scale = axes.inset_axes((1.03, 0.0, 0.035, 1.0))
    scale.imshow(ramp, interpolation="none", aspect="auto", extent=(0, 1, 0, 1))
    scale.xaxis.set_visible(False)
    scale.yaxis.tick_right()
    scale.tick_params(length=0)
    scale.spines[:].set_visible(True)
    scale.spines[:].set_color(_RULE)
    # Colour grows with the square root: half way up stands a quarter of the range.
    scale.set_yticks((0.0, 0.5, 1.0), [_tick(float(f"{low + part * (high - low):.3g}")) for part in (0.0, 0.25, 1.0)])


def _strength(share: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Opacity, 0 to 255, of a share of the range; the smallest share above zero can still be seen."""
    seen: npt.NDArray[np.float64] = np.rint(np.where(share > 0, 255 * (0.1 + 0.9 * share), 0))
    return seen


def _largest(values: npt.NDArray[np.float64], down: int, across: int) -> npt.NDArray[np.float64]:
    """The largest value of each block of ``down`` x ``across`` values; the last blocks may be smaller."""
    rows, columns = values.shape
    padded = np.pad(values, ((0, -rows % down), (0, -columns % across)), constant_values=np.nan)
    blocks = padded.reshape(padded.shape[0] // down, down, padded.shape[1] // across, across)
    largest: npt.NDArray[np.float64] = np.fmax.reduce(np.fmax.reduce(blocks, axis=3), axis=1)
    return largest


# -- axes --------------------------------------------------------------------------------------------------------------


def _axes(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def _name_axes(axes: Axes, x_label: str, y_label: str) -> None:
    # The name of the y axis stands above it, level: a phone's screen has no width to spare.
    axes.set_title(_cut(y_label, 60))
    axes.set_xlabel(_cut(x_label, 60))


def _log_axis(axes: Axes, which: str, values: Iterable[float]) -> None:
    axis = axes.yaxis if which == "y" else axes.xaxis
    axes.set_yscale("log") if which == "y" else axes.set_xscale("log")
    logs = [math.log10(value) for value in values]
    subs = (1.0, 2.0, 5.0) if max(logs) - min(logs) < 2.5 else (1.0,)
    axis.set_major_locator(LogLocator(subs=subs, numticks=8))
    axis.set_major_formatter(FuncFormatter(_tick))
    axis.set_minor_formatter(NullFormatter())
    axis.set_tick_params(which="minor", length=0)


def _tick(value: float, _: int | None = None) -> str:
    """A short number: 0.25, 100, 25k, 3.2M."""
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if limit <= abs(value) < 1e13:
            return f"{value / (1e3 if suffix == 'k' else limit):.6g}{suffix}".replace("-", "\u2212")
    return f"{value:.6g}".replace("e-0", "e-").replace("e+", "e").replace("-", "\u2212")


def _cut(text: str, length: int) -> str:
    line = printable(text).replace("\n", " ").replace("\t", " ")
    return line if len(line) <= length else line[: length - 1] + "\u2026"


def _dashes(index: int) -> tuple[float, ...]:
    return _DASHES[index // len(_SERIES) % len(_DASHES)]


# -- SVG ---------------------------------------------------------------------------------------------------------------


def _inline(svg: str, prefix: str, name: str) -> str:
    """``svg`` as an element of a page: no prolog, no style sheet, no font, own ids, colours as variables."""
    root = ElementTree.fromstring(svg)
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', svg))
    for parent in root.iter():
        for child in list(parent):
            if child.tag.endswith("}style"):
                parent.remove(child)
    for node in root.iter():
        node.tag = node.tag.rpartition("}")[2]
        given = dict(node.attrib)
        node.attrib.clear()
        for key, value in given.items():
            key = key.rpartition("}")[2]
            if key == "id":
                if value not in used:
                    continue
                value = prefix + value
            elif key == "href" and value.startswith("#"):
                value = f"#{prefix}{value[1:]}"
            elif key == "href":
                value = "".join(value.split())
            elif key == "style":
                value = re.sub(r"\s*font-family:[^;]*;?", "", value)
                value = re.sub(r"#[0-9a-f]{6}", _variable, value)
            elif key == "d":
                value = " ".join(value.split())
            elif key == "transform" and value.startswith("rotate(-0 "):
                continue
            node.set(key, value.replace("url(#", f"url(#{prefix}"))
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    root.attrib.update({"xmlns": "http://www.w3.org/2000/svg", "role": "img", "aria-label": name})
    return ElementTree.tostring(root, encoding="unicode")


def _variable(match: re.Match[str]) -> str:
    name = _VARIABLES.get(match[0])
    return f"var({name}, {match[0]})" if name else match[0]
