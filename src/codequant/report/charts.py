"""Charts as inline SVG: small, crisp at any size, and in the colours of the page's theme (CSS variables).

A chart is 460 units wide, so that its text is still legible where a phone shrinks it to 330 pixels. Every function
returns markup that holds nothing but numbers and text that it has escaped itself.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape

from markupsafe import Markup

WIDTH = 460
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 10, 36  # room for the axes
COLORS = 6  # of lines: --s0 ... --s5; further lines are dashed
LEVELS = 9  # colours of a heat map: --heat-0 ... --heat-8

Format = Callable[[float], str]


def percent(value: float) -> str:
    """0.01234 -> "1.2%", with as many digits as tell neighbouring ticks apart."""
    return f"{100 * value:.3g}%"


def plain(value: float) -> str:
    """12000 -> "12k"."""
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{suffix}"
    return f"{value:.3g}"


def linear_ticks(high: float, count: int = 4) -> list[float]:
    """0 and multiples of 1, 2 or 5 times a power of ten that reach `high`, about `count` of them."""
    if not high > 0:
        return [0.0, 1.0]
    raw = high / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    return [i * step for i in range(math.ceil(high / step - 1e-9) + 1)]


def lines(
    series: Mapping[str, Sequence[float | None]],
    x_label: str,
    y_label: str,
    form: Format,
    ticks: Sequence[str] = (),
    dots: bool = True,
) -> Markup:
    """A line per series over 0, 1, 2, ...; None leaves a gap. ticks: what to write under the points, else numbers."""
    height = 230
    count = max(map(len, series.values()))
    values = [v for line in series.values() for v in line if v is not None]
    marks = linear_ticks(max(values, default=1.0))
    scale_y = (height - TOP - BOTTOM) / marks[-1]

    def x(i: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (i + 0.5) / count

    def y(v: float) -> float:
        return height - BOTTOM - v * scale_y

    parts = [_y_axis(marks, y, form), _x_axis(count, x, height - BOTTOM, ticks)]
    for number, (name, line) in enumerate(series.items()):
        path, pen = "", "M"
        for i, v in enumerate(line):
            if v is None:
                pen = "M"
                continue
            path += f"{pen}{x(i):.1f} {y(v):.1f}"
            pen = "L"
        parts.append(f'<path class="line {_style(number)}" d="{path}"/>')
        radius = 3.2 if count <= 40 else 1.8
        for i, v in enumerate(line if dots else ()):
            if v is not None:
                where = ticks[i] if ticks else str(i)
                parts.append(
                    f'<circle class="dot {_style(number)}" cx="{x(i):.1f}" cy="{y(v):.1f}" r="{radius}">'
                    f"<title>{escape(name)}, {escape(x_label)} {escape(where)}: {form(v)}</title></circle>"
                )
    parts.append(_labels(x_label, y_label, height))
    return _legend(list(series)) + _svg(height, f"{y_label} by {x_label}", parts)


def bars(values: Sequence[float | None], x_label: str, y_label: str, form: Format) -> Markup:
    """A bar per value over 0, 1, 2, ..."""
    height, count = 200, len(values)
    marks = linear_ticks(max((v for v in values if v is not None), default=1.0))
    scale_y = (height - TOP - BOTTOM) / marks[-1]
    pitch = (WIDTH - LEFT - RIGHT) / count
    width = min(40.0, pitch * 0.72)

    def x(i: float) -> float:
        return LEFT + pitch * (i + 0.5)

    def y(v: float) -> float:
        return height - BOTTOM - v * scale_y

    parts = [_y_axis(marks, y, form), _x_axis(count, x, height - BOTTOM)]
    for i, v in enumerate(values):
        if v is not None:
            parts.append(
                f'<rect class="bar" x="{x(i) - width / 2:.1f}" y="{y(v):.1f}" width="{width:.1f}" '
                f'height="{max(0.0, v * scale_y):.1f}"><title>{escape(x_label)} {i}: {form(v)}</title></rect>'
            )
    parts.append(_labels(x_label, y_label, height))
    return _svg(height, f"{y_label} by {x_label}", parts)


def heat_map(rows: Sequence[Sequence[float | None]], x_label: str, y_label: str, form: Format) -> Markup:
    """A cell per value, rows from the top; None stays empty. One path per colour keeps thousands of cells small."""
    columns = max(map(len, rows))
    cell_w = (WIDTH - LEFT - RIGHT) / columns
    cell_h = min(26.0, max(5.0, 300 / len(rows)))
    height = TOP + len(rows) * cell_h + BOTTOM
    values = [v for row in rows for v in row if v is not None]
    low, high = min(values, default=0.0), max(values, default=1.0)
    width_of_level = (high - low) / LEVELS or 1.0
    paths = [""] * LEVELS
    for r, row in enumerate(rows):
        for c, v in enumerate(row):
            if v is not None:
                level = min(LEVELS - 1, int((v - low) / width_of_level))
                paths[level] += (
                    f"M{LEFT + c * cell_w:.1f} {TOP + r * cell_h:.1f}h{cell_w:.2f}v{cell_h:.2f}h-{cell_w:.2f}z"
                )
    parts = [f'<path style="fill:var(--heat-{level})" d="{path}"/>' for level, path in enumerate(paths) if path]
    for r in _some(len(rows), max(1, int((height - TOP - BOTTOM) // 14))):
        parts.append(
            f'<text class="tick" text-anchor="end" x="{LEFT - 6}" y="{TOP + (r + 0.5) * cell_h + 4:.1f}">{r}</text>'
        )
    parts.append(_x_axis(columns, lambda i: LEFT + (i + 0.5) * cell_w, height - BOTTOM, line=False))
    parts.append(_labels(x_label, y_label, height))
    scale = "".join(f'<i style="background:var(--heat-{level})"></i>' for level in range(LEVELS))
    legend = Markup(f'<p class="legend ramp">{form(low)}<span>{scale}</span>{form(high)}</p>')
    return legend + _svg(height, f"{y_label} against {x_label}", parts)


def density(x: Sequence[float], heights: Sequence[float], marks: Sequence[float], x_label: str) -> Markup:
    """An area over x, ascending, with a vertical line at each of `marks`."""
    height = 190
    first, last, top = x[0], x[-1], max(heights) or 1.0

    def px(v: float) -> float:
        return LEFT / 2 + (WIDTH - LEFT / 2 - RIGHT) * (v - first) / (last - first)

    def py(v: float) -> float:
        return height - BOTTOM - v / top * (height - TOP - BOTTOM - 14)

    outline = "".join(f"L{px(a):.1f} {py(b):.1f}" for a, b in zip(x, heights))
    base = f"{height - BOTTOM:.1f}"
    parts = [f'<path class="area" d="M{px(first):.1f} {base}{outline}L{px(last):.1f} {base}z"/>']
    parts += [
        f'<path class="centroid" d="M{px(m):.1f} {base}V{TOP}"><title>level at {m:.3g}</title></path>'
        for m in marks
        if first <= m <= last
    ]
    parts.append(f'<path class="axis" d="M{px(first):.1f} {base}H{px(last):.1f}"/>')
    for v in range(math.ceil(first), math.floor(last) + 1):
        parts.append(f'<text class="tick" text-anchor="middle" x="{px(v):.1f}" y="{height - BOTTOM + 14}">{v}</text>')
    parts.append(_labels(x_label, "", height))
    return _svg(height, f"density by {x_label}", parts)


def _svg(height: float, name: str, parts: Sequence[str]) -> Markup:
    return Markup(
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(name)}">{"".join(parts)}</svg>'
    )


def _style(number: int) -> str:
    return f"s{number % COLORS}" + " dashed" * (number >= COLORS)


def _legend(names: Sequence[str]) -> Markup:
    if len(names) < 2:
        return Markup("")
    entries = (f'<span><b class="{_style(n)}"></b>{escape(name)}</span>' for n, name in enumerate(names))
    return Markup(f'<p class="legend">{"".join(entries)}</p>')


def _labels(x_label: str, y_label: str, height: float) -> str:
    middle, centre = (TOP + height - BOTTOM) / 2, (LEFT + WIDTH - RIGHT) / 2
    label = '<text class="label" text-anchor="middle"'
    below = f'{label} x="{centre:.0f}" y="{height - 5:.0f}">{escape(x_label)}</text>'
    beside = f'{label} transform="translate(11 {middle:.0f}) rotate(-90)">{escape(y_label)}</text>'
    return below + beside * bool(y_label)


def _y_axis(marks: Sequence[float], y: Callable[[float], float], form: Format) -> str:
    return "".join(
        f'<path class="grid" d="M{LEFT} {y(m):.1f}H{WIDTH - RIGHT}"/>'
        f'<text class="tick" text-anchor="end" x="{LEFT - 6}" y="{y(m) + 4:.1f}">{form(m)}</text>'
        for m in marks
    )


def _x_axis(count: int, x: Callable[[float], float], base: float, ticks: Sequence[str] = (), line: bool = True) -> str:
    axis = f'<path class="axis" d="M{LEFT} {base:.1f}H{WIDTH - RIGHT}"/>' if line else ""
    return axis + "".join(
        f'<text class="tick" text-anchor="middle" x="{x(i):.1f}" y="{base + 14:.1f}">'
        f"{escape(ticks[i]) if ticks else i}</text>"
        for i in _some(count, 12)
    )


def _some(count: int, most: int) -> range:
    """Numbers 0, s, 2 s, ... below count, at most `most` of them, s being 1, 2, 5, 10, 20, ..."""
    steps = (m * 10**e for e in range(9) for m in (1, 2, 5))
    return range(0, count, next(s for s in steps if math.ceil(count / s) <= most))
