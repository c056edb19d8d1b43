"""Average precision as PASCAL VOC defines it, by area and by eleven points, and without interpolation.

Everingham et al., IJCV 2010, and the devkits: VOC 2007 averages the interpolated precision at eleven recalls, 2010 and
later take the area under the whole interpolated curve. Images or detections of equal score keep their order, as in the
devkit; scikit-learn's average_precision_score takes them together, and is `uninterpolated` where no scores are equal.
One departure: whether a recall of k/10 is reached is decided in whole numbers, where the devkit's 0:0.1:1 misses a
recall of exactly 3/10 by one rounding.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class AveragePrecision:
    """Three averages of one ranking, each in [0, 1]."""

    area: float
    eleven_point: float
    uninterpolated: float


def average_precision(scores: npt.ArrayLike, labels: npt.ArrayLike) -> AveragePrecision:
    """Of images ranked by score (N,); labels (N,): 1 positive, 0 negative, -1 difficult, which is passed over.

    Raises ValueError if there is no positive.
    """
    scores, labels = np.asarray(scores, np.float64), np.asarray(labels)
    judged = labels != -1
    order = np.argsort(-scores[judged], kind="stable")
    hits = (labels[judged] == 1)[order]
    return of_ranking(hits, int(hits.sum()))


def of_ranking(hits: npt.NDArray[np.bool_], num_positives: int) -> AveragePrecision:
    """Of a ranking, best first: whether each entry is a hit, and how many hits there could be (detections miss some).

    Raises ValueError if num_positives is 0.
    """
    if num_positives < 1:
        raise ValueError("average precision is not defined where nothing is positive")
    found = np.cumsum(hits)
    precision = found / np.arange(1, len(hits) + 1)
    interpolated = np.maximum.accumulate(precision[::-1])[::-1]  # the best at this recall or a higher one
    reached = [interpolated[10 * found >= k * num_positives][:1] for k in range(11)]
    return AveragePrecision(
        area=float(interpolated[hits].sum() / num_positives),
        eleven_point=float(sum(p.sum() for p in reached) / 11),
        uninterpolated=float(precision[hits].sum() / num_positives),
    )
