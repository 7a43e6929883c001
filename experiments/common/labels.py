"""The names of lines beside their ends, in the place of a legend."""

from __future__ import annotations

from statistics import fmean

from matplotlib.axes import Axes


def label_ends(axes: Axes, size: float = 9) -> None:
    """Write each line's label beside its last point, in its colour; labels of lines that end together stand apart.

    Call it when scales and limits are set.
    """
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()  # after which the size of the axes is known
    gap = 1.2 * size / (axes.get_window_extent().height * 72 / figure.dpi)
    to_axes = axes.transData + axes.transAxes.inverted()
    lines = [line for line in axes.lines if not str(line.get_label()).startswith("_")]
    ends = sorted((*to_axes.transform(line.get_xydata()[-1]), i) for i, line in enumerate(lines))
    while ends:
        together = [end for end in ends if end[0] - ends[0][0] < 0.1]
        ends = ends[len(together) :]
        x = together[-1][0] + 0.015
        together.sort(key=lambda end: end[1])
        for y, (_, _, i) in zip(_apart([y for _, y, _ in together], gap), together, strict=True):
            style = {"color": lines[i].get_color(), "transform": axes.transAxes, "va": "center", "fontsize": size}
            axes.text(x, y, str(lines[i].get_label()), **style)
    axes.spines[["top", "right"]].set_visible(False)


def _apart(heights: list[float], gap: float) -> list[float]:
    """Return ascending heights, moved as little as leaves a gap between each two."""
    groups: list[list[float]] = []
    for height in heights:
        groups.append([height])
        while len(groups) > 1 and fmean(groups[-1]) - fmean(groups[-2]) < gap * len(groups[-2] + groups[-1]) / 2:
            groups[-2:] = [groups[-2] + groups[-1]]
    return [fmean(group) + gap * (i - (len(group) - 1) / 2) for group in groups for i in range(len(group))]
