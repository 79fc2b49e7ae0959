"""A latency chart as inline SVG: rate against milliseconds, logarithmic, a colour a server.

Duty: draw curves; colours are the page's variables --s0, --s1, --s2, --dim and --line, so that the
chart follows light and dark. Comes in from `cellc.report`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT = 820, 380
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 200, 20, 48
_LABEL_GAP = 17


@dataclass(frozen=True)
class Curve:
    """Latencies in ms of one server at each rate (requests a second)."""

    name: str
    rates: Sequence[float]
    p50: Sequence[float]
    p90: Sequence[float]


@dataclass(frozen=True)
class _Scale:
    rate: float  # largest
    low: int  # decades
    high: int

    def x(self, rate: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * rate / self.rate

    def y(self, ms: float) -> float:
        share = (math.log10(ms) - self.low) / (self.high - self.low)
        return _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * share


def latency_chart(curves: Sequence[Curve]) -> str:
    """The chart; latencies of 0 are drawn as 1 us."""
    scale = _scale(curves)
    label = "Latency in milliseconds against requests a second, one line a server"
    return "\n".join(
        [
            f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" role="img" '
            f'aria-label="{label}" font-size="13">',
            *_axes(scale),
            *(_line(scale, curve, i) for i, curve in enumerate(curves)),
            *_names(scale, curves),
            "</svg>",
        ]
    )


def _scale(curves: Sequence[Curve]) -> _Scale:
    values = [max(v, 1e-3) for curve in curves for v in (*curve.p50, *curve.p90)]
    low = math.floor(math.log10(min(values)))
    high = max(low + 1, math.ceil(math.log10(max(values))))
    return _Scale(max(rate for curve in curves for rate in curve.rates), low, high)


def _axes(scale: _Scale) -> Iterator[str]:
    for decade in range(scale.low, scale.high + 1):
        y = scale.y(10**decade)
        yield (
            f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" '
            'stroke="var(--line)"/>'
        )
        yield _text(_LEFT - 8, y + 4, f"{10**decade:g} ms", "end")
    bottom = _HEIGHT - _BOTTOM
    for i in range(5):
        rate = scale.rate * i / 4
        yield _text(scale.x(rate), bottom + 20, f"{rate:,.0f}", "middle")
    yield _text((_LEFT + _WIDTH - _RIGHT) / 2, bottom + 40, "requests a second", "middle")


def _line(scale: _Scale, curve: Curve, number: int) -> str:
    colour = f"var(--s{number % 3})"
    parts = []
    for values, dash in ((curve.p50, ' stroke-dasharray="4 4"'), (curve.p90, "")):
        places = [
            (scale.x(rate), scale.y(max(ms, 1e-3)))
            for rate, ms in zip(curve.rates, values, strict=True)
        ]
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>'
        )
        name = escape(f"{curve.name}, {'p50' if dash else 'p90'}")
        parts += [
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"><title>{name} at '
            f"{rate:,.0f}/s: {ms:.2f} ms</title></circle>"
            for (x, y), rate, ms in zip(places, curve.rates, values, strict=True)
        ]
    return "\n".join(parts)


def _names(scale: _Scale, curves: Sequence[Curve]) -> Iterator[str]:
    """Each curve's name at its end, moved down where two would overlap."""
    last = -math.inf
    ends = sorted((scale.y(max(c.p90[-1], 1e-3)), i) for i, c in enumerate(curves))
    for y, i in ends:
        last = max(y + 4, last + _LABEL_GAP)
        yield _text(_WIDTH - _RIGHT + 10, last, curves[i].name, "start", f"var(--s{i % 3})")


def _text(x: float, y: float, text: str, anchor: str, colour: str = "var(--dim)") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">'
        f"{escape(text)}</text>"
    )
