"""Figures of a page as PNG, where SVG is not taken: the few shapes that ours are made of, drawn by Pillow."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from html.parser import HTMLParser
from importlib import resources
from itertools import pairwise
from typing import Any, NamedTuple

SCALE = 2  # pixels a unit of a page
PLOT_WIDTH, PLOT_HEIGHT = 640, 280
PLOT_MARGIN = 62, 44, 20, 56  # left, above, right, below: for what is written outside of a plot
MAP_WIDTH, MAPS_IN_A_ROW, MAP_NAME, MAP_GAP = 150, 4, 20, 12
EM = {"tick": 12, "axis": 12, "label": 12, "choice": 10}
FILLED = {"cell": 1.0, "mark": 1.0, "spread": 0.2, "ground": 1.0}  # classes of what is no line, and how opaque it is
WIDTHS = {"line": 2.0, "mean": 2.5, "bar": 10.0, "ring": 2.0}  # of strokes; all others: 1
INKS = {"grid": "rule", "reference": "ink", "tick": "soft", "axis": "ink", "label": "ink", "choice": "ink"}
VOID = {"input", "meta", "br"}  # elements of HTML without an end


class Picture(NamedTuple):
    """A figure's title and its picture."""

    title: str
    png: bytes
    width: int
    height: int


class Node:
    """An element of a figure."""

    def __init__(self, tag: str, attributes: Mapping[str, str | None]) -> None:
        self.tag = tag
        self.attributes = {name: value or "" for name, value in attributes.items()}
        self.kinds = self.attributes.get("class", "").split()
        self.children: list[Node] = []
        self.words = ""

    def get(self, name: str, otherwise: str = "0") -> str:
        """An attribute."""
        return self.attributes.get(name, otherwise)

    def find(self, tag: str) -> Iterator[Node]:
        """All elements of a kind inside, the outermost alone."""
        for child in self.children:
            if child.tag == tag:
                yield child
            else:
                yield from child.find(tag)


class _Reader(HTMLParser):
    """Makes a tree of a figure."""

    def __init__(self) -> None:
        super().__init__()
        self.open = [Node("", {})]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        node = Node(tag, dict(attrs))
        self.open[-1].children.append(node)
        if tag not in VOID:
            self.open.append(node)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open[-1].children.append(Node(tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if len(self.open) > 1 and self.open[-1].tag == tag:
            self.open.pop()

    def handle_data(self, data: str) -> None:
        self.open[-1].words += data.replace("\u2423", "_")  # a blank, for which Pillow's font has no sign


def picture_of(figure: str) -> Picture | None:
    """What a figure shows, as a PNG; None where it has no picture."""
    from PIL import Image, ImageDraw

    reader = _Reader()
    reader.feed(figure)
    root = reader.open[0]
    pictures = [svg for svg in root.find("svg") if svg.get("role") == "img"]
    if not pictures:
        return None
    title = next((heading.words for heading in root.find("h3")), "figure")
    sizes = [_size(svg) for svg in pictures]
    across = min(MAPS_IN_A_ROW, len(pictures))
    beside, below = (MAP_GAP, MAP_NAME) if "map" in pictures[0].kinds else (0, 0)
    cell = max(width for width, _ in sizes) + beside, max(height for _, height in sizes) + below
    whole = cell[0] * across, cell[1] * -(-len(pictures) // across)
    image = Image.new("RGB", (round(whole[0] * SCALE), round(whole[1] * SCALE)), _colours()["paper"])
    canvas = _Canvas(image, ImageDraw.Draw(image))
    for number, svg in enumerate(pictures):
        corner = _Frame(cell[0] * (number % across), cell[1] * (number // across), 1.0, 1.0, *sizes[number])
        _draw_picture(canvas, svg, corner)
    data = io.BytesIO()
    image.save(data, "PNG")
    return Picture(title, data.getvalue(), *image.size)


@cache
def _colours() -> dict[str, str]:
    """The colours of a light page, by their names."""
    style = resources.files("nnx_cli.reporting").joinpath("page.css").read_text(encoding="utf-8")
    return dict(re.findall(r"--(\w+): (#\w{6})", style.partition("@media")[0]))


def _numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"-?[\d.]+", text)]


def _size(svg: Node) -> tuple[float, float]:
    """Of a picture, with what is written around it, in units of a page."""
    if "map" in svg.kinds:
        *_, width, height = _numbers(svg.get("viewbox"))
        return MAP_WIDTH, MAP_WIDTH * height / width
    if "heat" in svg.kinds:
        return float(svg.get("width")), float(svg.get("height"))
    left, above, right, below = PLOT_MARGIN
    return left + PLOT_WIDTH + right, above + PLOT_HEIGHT + below


def _draw_picture(canvas: _Canvas, svg: Node, corner: _Frame) -> None:
    """Draw a picture and its name, or what the lines of a plot are."""
    if "map" not in svg.kinds and "heat" not in svg.kinds:
        plot = replace(corner, x=corner.x + PLOT_MARGIN[0], y=corner.y + PLOT_MARGIN[1])
        plot = replace(plot, width=PLOT_WIDTH, height=PLOT_HEIGHT)
        for child in svg.children:
            canvas.draw(child, plot)
        at = plot.x
        inner = [path for part in svg.find("svg") for path in part.find("path") if "line" in path.kinds]
        for line in [*inner, *(line for line in svg.find("line") if "reference" in line.kinds)]:
            name = next((title.words for title in line.find("title")), "")
            at += canvas.write(name, at, corner.y + 10, canvas.colour(line, 1.0)) + 16
        return
    canvas.draw(svg, corner)
    if "map" in svg.kinds:
        name = next((title.words.rpartition(", ")[2] for title in svg.find("title")), "")
        canvas.write(name, corner.x, corner.y + corner.height + 9, _colours()["soft"])


@dataclass(frozen=True)
class _Frame:
    """A coordinate system: where its origin lies in the picture, how large its units are, and how many it has."""

    x: float
    y: float
    x_unit: float
    y_unit: float
    width: float
    height: float

    def place(self, x: str | float, y: str | float) -> tuple[float, float]:
        """A point of it, given in its units or in percent."""
        return self.x + _length(x, self.width) * self.x_unit, self.y + _length(y, self.height) * self.y_unit

    def inner(self, svg: Node) -> _Frame:
        """That of an <svg> inside."""
        x, y = self.place(svg.get("x"), svg.get("y"))
        width = _length(svg.get("width", "100%"), self.width) * self.x_unit
        height = _length(svg.get("height", "100%"), self.height) * self.y_unit
        box = _numbers(svg.get("viewbox", "")) or [0, 0, width / self.x_unit, height / self.y_unit]
        return _Frame(x, y, width / box[2], height / box[3], box[2], box[3])


def _length(value: str | float, whole: float) -> float:
    if isinstance(value, str) and value.endswith("%"):
        return float(value[:-1]) / 100 * whole
    return float(value)


class _Canvas:
    """An image that shapes are drawn on, in units of a page."""

    def __init__(self, image: Any, draw: Any) -> None:
        self.image = image
        self.pen = draw

    def draw(self, node: Node, frame: _Frame) -> None:
        """Draw an element, and what is in it."""
        shape = getattr(self, f"_draw_{node.tag}", None)
        if shape is not None:
            shape(node, frame)

    def _draw_svg(self, node: Node, frame: _Frame) -> None:
        for child in node.children:
            self.draw(child, frame.inner(node))

    def _draw_g(self, node: Node, frame: _Frame) -> None:
        """A group, which is the strip of a film: its last picture, where the window is."""
        children = node.children
        if "strip" in node.kinds:
            children = [child for child in children if child.tag == "g"][-1].children
        for child in children:
            self.draw(child, frame)

    def _draw_rect(self, node: Node, frame: _Frame) -> None:
        left, top = frame.place(0, 0)
        right, bottom = frame.place(node.get("width"), node.get("height"))
        self._fill([(left, top), (right, top), (right, bottom), (left, bottom)], _colours()["paper"])

    def _draw_line(self, node: Node, frame: _Frame) -> None:
        ends = [frame.place(node.get(f"x{end}"), node.get(f"y{end}")) for end in (1, 2)]
        self._stroke(ends, node, 0.25 if "bar" in node.kinds else 1.0)

    def _draw_circle(self, node: Node, frame: _Frame) -> None:
        radius, (x, y) = float(node.get("r")), frame.place(0, 0)
        box = [(x - radius) * SCALE, (y - radius) * SCALE, (x + radius) * SCALE, (y + radius) * SCALE]
        self.pen.ellipse(box, outline=self.colour(node, 1.0), width=round(WIDTHS["ring"] * SCALE))

    def _draw_path(self, node: Node, frame: _Frame) -> None:
        opacity = next((FILLED[kind] for kind in node.kinds if kind in FILLED), None)
        for points in _outlines(node.get("d", "")):
            placed = [frame.place(x, y) for x, y in points]
            if opacity is None:
                self._stroke(placed, node, 1.0)
            else:
                self._fill(placed, self.colour(node, opacity * float(node.get("fill-opacity", "1"))))

    def _draw_text(self, node: Node, frame: _Frame) -> None:
        em = next((EM[kind] for kind in node.kinds if kind in EM), 12)
        moved = re.search(r"translate\(([^)]*)\)", node.get("transform", ""))
        x, y = frame.place(*(_numbers(moved[1]) if moved else (node.get("x"), node.get("y"))))
        down, right = (_length_of_text(node.get(name), em) for name in ("dy", "dx"))
        ink = _colours()[next((INKS[kind] for kind in node.kinds if kind in INKS), "ink")]
        if "rotate(-90)" in node.get("transform", ""):
            self._write_upwards(node.words, x + down, y, ink, em)
        else:
            self.write(node.words, x + right, y + down - 0.35 * em, ink, em, node.get("text-anchor", "start"))

    def colour(self, node: Node, opacity: float) -> tuple[int, ...]:
        """The colour of an element's class, as it looks on white."""
        named = next((kind for kind in node.kinds if re.fullmatch(r"c\d", kind)), None)
        named = named or next((INKS[kind] for kind in node.kinds if kind in INKS), "c0")
        parts = [int(_colours()[named][at : at + 2], 16) for at in (1, 3, 5)]
        return tuple(round(255 - (255 - part) * opacity) for part in parts)

    def _stroke(self, points: Sequence[tuple[float, float]], node: Node, opacity: float) -> None:
        width = next((WIDTHS[kind] for kind in node.kinds if kind in WIDTHS), 1.0)
        for pair in pairwise(points):
            ends = [(x * SCALE, y * SCALE) for x, y in pair]
            self.pen.line(ends, fill=self.colour(node, opacity), width=round(width * SCALE))

    def _fill(self, points: Sequence[tuple[float, float]], colour: Any) -> None:
        if len(points) > 2:
            self.pen.polygon([(round(x * SCALE), round(y * SCALE)) for x, y in points], fill=colour)

    def write(self, text: str, x: float, y: float, ink: Any, em: int = 12, anchor: str = "start") -> float:
        """Write a line whose middle is at `y`; returns how wide it is."""
        font, side = _font(em), {"start": "l", "middle": "m", "end": "r"}[anchor]
        self.pen.text((x * SCALE, y * SCALE), text, fill=ink, font=font, anchor=f"{side}m")
        return float(font.getlength(text)) / SCALE

    def _write_upwards(self, text: str, x: float, y: float, ink: str, em: int) -> None:
        """Write a line that begins at a point and goes up."""
        from PIL import Image, ImageDraw

        font = _font(em)
        line = Image.new("L", (round(font.getlength(text)) + 1, round(1.5 * em * SCALE)), 0)
        ImageDraw.Draw(line).text((0, line.height / 2), text, fill=255, font=font, anchor="lm")
        line = line.rotate(90, expand=True)
        self.image.paste(ink, (round(x * SCALE - 1.1 * em * SCALE), round(y * SCALE) - line.height), line)


@cache
def _font(em: int) -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(em * SCALE)


def _length_of_text(value: str, em: int) -> float:
    return float(value.removesuffix("em")) * (em if value.endswith("em") else 1)


def _outlines(path: str) -> Iterator[list[tuple[float, float]]]:
    """The lines of a path: what moves, goes on, or is half a circle."""
    points: list[tuple[float, float]] = []
    for command, rest in re.findall(r"([A-Za-z])([^A-Za-z]*)", path):
        numbers, (x, y) = _numbers(rest), points[-1] if points else (0.0, 0.0)
        if command == "M":
            if points:
                yield points
            points = [(numbers[0], numbers[1])]
        elif command == "L":
            points.append((numbers[0], numbers[1]))
        elif command == "l":
            points.append((x + numbers[0], y + numbers[1]))
        elif command in "hHvV":
            points.append({"h": (x + numbers[0], y), "v": (x, y + numbers[0]), "V": (x, numbers[0])}[command])
        elif command == "a":
            half = numbers[5] / 2
            points += [(x + half, y - half if numbers[4] else y + half), (x + numbers[5], y + numbers[6])]
    if points:
        yield points
