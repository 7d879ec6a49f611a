"""What a figure shows: its texts, and whether they meet."""

from matplotlib.figure import Figure
from matplotlib.text import Text


def shown_texts(figure: Figure) -> list[Text]:
    """Every text of the figure that is drawn; tick labels outside their axis' limits are not."""
    texts = [*figure.texts, *(text for legend in figure.legends for text in legend.get_texts())]
    for axes in figure.axes:
        texts += [*axes.texts, axes.title, axes.xaxis.label, axes.yaxis.label]
        legend = axes.get_legend()
        texts += legend.get_texts() if legend is not None else []
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            texts += [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high and axes.axison]
    return [text for text in texts if text.get_visible() and text.get_text()]


def meeting(figure: Figure) -> list[tuple[str, str]]:
    """Pairs of texts that overlap, and texts that the figure's edge cuts off, paired with nothing."""
    figure.draw_without_rendering()
    boxes = [(text.get_text(), text.get_window_extent()) for text in shown_texts(figure)]
    found = [(a, b) for place, (a, one) in enumerate(boxes) for b, two in boxes[place + 1 :] if one.overlaps(two)]
    width, height = figure.bbox.width, figure.bbox.height
    cut = [(text, "") for text, box in boxes if box.x0 < -1 or box.y0 < -1 or box.x1 > width + 1 or box.y1 > height + 1]
    return found + cut
