"""VOC's average precision typed from the devkit's definition, in fractions: precision and recall of every prefix."""

from fractions import Fraction


def curve(scores, positive, num_positive):
    """(recall, precision) after each entry of the list sorted by falling score, the first of equals first."""
    ranked = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    points, hits = [], 0
    for place, i in enumerate(ranked, start=1):
        hits += bool(positive[i])
        points.append((Fraction(hits, int(num_positive)), Fraction(hits, place)))
    return points


def eleven_point(points):
    """VOC 2007: the mean over t = 0, 0.1, ..., 1 of the largest precision at a recall of t or more, 0 if none."""
    total = Fraction(0)
    for tenth in range(11):
        total += max((p for r, p in points if r >= Fraction(tenth, 10)), default=Fraction(0))
    return float(total / 11)


def area(points):
    """VOC 2010: 0 and 1 put around recall, 0 and 0 around precision, made falling from the right, then summed."""
    recall = [Fraction(0), *(r for r, _ in points), Fraction(1)]
    precision = [Fraction(0), *(p for _, p in points), Fraction(0)]
    for i in reversed(range(len(precision) - 1)):
        precision[i] = max(precision[i], precision[i + 1])
    return float(sum((recall[i] - recall[i - 1]) * precision[i] for i in range(1, len(recall))))


def without_difficult(scores, labels):
    """Scores and truth of the entries that are not -1."""
    kept = [(score, label == 1) for score, label in zip(scores, labels) if label != -1]
    return [score for score, _ in kept], [truth for _, truth in kept]
