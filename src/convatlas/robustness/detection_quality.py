"""How well detectors tell attacks from benign images: accuracy, false acceptance and rejection, areas under curves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from convatlas.errors import DataError
from convatlas.report import Cell, Lines, Part, Section, Table
from convatlas.robustness.decamouflage import METRICS, Decamouflage, Detection, Direction

__all__ = ["area_under_curve", "detection_sections", "error_rates", "roc_curve"]


def error_rates(benign: Sequence[bool], attack: Sequence[bool]) -> dict[str, float]:
    """Accuracy, false acceptance rate (attacks taken for benign) and false rejection rate, as shares.

    Args:
        benign: of each benign image, whether it was taken for an attack.
        attack: the same of each attack. What has no images is NaN.
    """
    accepted, rejected = len(attack) - sum(attack), sum(benign)
    total = len(benign) + len(attack)
    return {
        "accuracy": 1 - (accepted + rejected) / total if total else math.nan,
        "FAR": accepted / len(attack) if attack else math.nan,
        "FRR": rejected / len(benign) if benign else math.nan,
    }


def area_under_curve(benign: npt.ArrayLike, attack: npt.ArrayLike, direction: Direction = "above") -> float:
    """The share of pairs of an attack and a benign image in which the attack's score lies further out; ties count half.

    This is the area under `roc_curve`. NaN where a kind has no scores.
    """
    good, bad = np.sort(_numbers(benign)), _numbers(attack)
    if not len(good) or not len(bad):
        return math.nan
    below = (np.searchsorted(good, bad, "left") + np.searchsorted(good, bad, "right")) / 2
    share = float(below.mean() / len(good))
    return share if direction == "above" else 1 - share


def roc_curve(
    benign: npt.ArrayLike, attack: npt.ArrayLike, direction: Direction = "above"
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Share of benign images rejected, and of attacks found, for every threshold from the strictest on; from 0 to 1.

    Raises:
        DataError: a kind has no scores.
    """
    sign = 1.0 if direction == "above" else -1.0
    good, bad = np.sort(sign * _numbers(benign)), np.sort(sign * _numbers(attack))
    if not len(good) or not len(bad):
        raise DataError("benign and attack must hold at least one score each that is a number")
    limits = np.unique(np.concatenate([good, bad]))[::-1]
    shares = [1 - np.searchsorted(scores, limits, "left") / len(scores) for scores in (good, bad)]
    rejected, found = (np.concatenate([[0.0], share]) for share in shares)
    return rejected, found


def detection_sections(detector: Decamouflage, found: Mapping[str, Sequence[tuple[str, Detection]]]) -> list[Section]:
    """Tables of the rates of each method and of the vote, and of the scores; the ROC curves where there are attacks.

    Args:
        detector: with its thresholds.
        found: names and detections of the images, under "benign" and "attack".
    """
    kinds = {kind: [detection for _, detection in found.get(kind, ())] for kind in ("benign", "attack")}
    rates: list[list[Cell]] = []
    for method in (*detector.thresholds, "vote"):
        answers = {
            kind: [
                each.attack if method == "vote" else each.votes[method]
                for each in detections
                if method in each.votes or method == "vote"
            ]
            for kind, detections in kinds.items()
        }
        values = error_rates(answers["benign"], answers["attack"])
        rates.append([method, *(_percent(value) for value in values.values())])
    columns = ["method", "accuracy [%]", "FAR [%]", "FRR [%]"]
    scores: list[list[Cell]] = []
    curves: dict[str, tuple[list[float], list[float]]] = {}
    for method in detector.thresholds:
        values_of = {kind: np.array([each.scores[method] for each in kinds[kind]]) for kind in kinds}
        area = area_under_curve(values_of["benign"], values_of["attack"], METRICS[method])
        if not math.isnan(area):
            shares = roc_curve(values_of["benign"], values_of["attack"], METRICS[method])
            curves[method] = ((100 * shares[0]).tolist(), (100 * shares[1]).tolist())
        moments = [_cell(function(values)) for values in values_of.values() for function in (_mean, _deviation)]
        scores.append([method, _cell(area), *moments])
    caption = "FAR: attacks accepted. FRR: benign images rejected."
    spread = ["method", "ROC AUC", "benign: mean", "benign: sd", "attack: mean", "attack: sd"]
    parts: list[Part] = [Table("Rates", columns, rates, caption), Table("Scores", spread, scores)]
    if curves:
        parts.append(Lines("ROC", "benign images rejected [%]", "attacks found [%]", curves))
    return [Section("Detection", parts)]


def _numbers(scores: npt.ArrayLike) -> npt.NDArray[np.float64]:
    values = np.asarray(scores, np.float64)
    return values[~np.isnan(values)]


def _mean(values: npt.NDArray[np.float64]) -> float:
    values = _numbers(values)
    return float(values.mean()) if len(values) else math.nan


def _deviation(values: npt.NDArray[np.float64]) -> float:
    values = _numbers(values)
    return float(values.std()) if len(values) else math.nan


def _percent(value: float) -> Cell:
    return None if math.isnan(value) else round(100 * value, 2)


def _cell(value: float) -> Cell:
    return None if math.isnan(value) else value
