"""The README's pictures: a real run of its first command, and the published race.

    python tests/bench/pictures.py [--max-time 4m] [--only live_screen|race|report|web_page ...]

The live screen is what a terminal shows when most of the run is done, drawn by Rich; the race is the chart of its page;
the report and the page with the model in it are photographed by headless Chromium. Needs Chromium in PATH and the extra
dev; Linux or macOS.
"""

import argparse
import base64
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from nnx_cli.reporting import charts, race_page
from nnx_cli.system.text import size

HERE = Path(__file__).parent
PICTURES = HERE / "pictures"
COLUMNS, LINES = 100, 30
SHOWN_AT = re.compile(r"^ *[78]\d\.\d % ━", re.M)  # the bar of the run when the picture is taken
MOST_BYTES = 150_000
RACE, COURSE = HERE / "races" / "bpe-time.json", ("time_s", "val_bits_per_byte")
WIDTH, HEIGHT, LEGEND_COLUMNS = 800, 400, 110
PLOT = 'x="72" y="88" width="700" height="252" overflow="visible"'
PROMPT = "The statement"
WRITE = "opened.then(() => {{ prompt.value = {!r}; part('count').value = 90; primary.click(); }})"
WRITTEN = "stopping === null && written.length > 0"
CHOOSE = "text.querySelectorAll('.t')[14].click()"


def train(max_time: str) -> Text:
    """Train in the current folder as the README's first command does; returns what the terminal showed on the way."""
    sys.path.append(str(HERE.parent / "console"))
    from terminal import Terminal

    terminal = Terminal(["-m", "nnx_cli", "train", "--model", "nyx", "--max-time", max_time], COLUMNS, LINES)
    shown = None
    while terminal.process.poll() is None:
        terminal.read(lambda text: True, seconds=1.0)
        if shown is None and SHOWN_AT.search(terminal.text()):
            shown = drawn(terminal.screen)
    said = terminal.text()
    terminal.close()
    if terminal.process.returncode or shown is None:
        raise SystemExit(f"no picture of the run:\n{said}")
    return shown


def drawn(screen: Any) -> Text:
    """What a screen shows, in its colours."""
    text = Text()
    for y in range(screen.lines):
        for x in range(screen.columns):
            cell = screen.buffer[y][x]
            text.append(cell.data, looks(cell))
        text.append("\n")
    return text


def looks(cell: Any) -> str:
    """Rich's words for the looks of a cell."""
    colour = {"default": "", "brown": "yellow"}.get(cell.fg, cell.fg)
    named = re.sub("^bright", "bright_", colour)
    parts = [f"#{colour}" if re.fullmatch("[0-9a-f]{6}", colour) else named]
    parts += ["bold"] * cell.bold + ["italic"] * cell.italics + ["reverse"] * cell.reverse
    return " ".join(filter(None, parts))


def live_screen(shown: Text) -> bytes:
    """The screen of a terminal as Rich draws it."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
    console.print(shown, end="")
    return console.export_svg(title="nnx train --model nyx").encode()


def race() -> bytes:
    """The chart of a race's page as a picture of its own: its plot, its legend and the page's style."""
    told = json.loads(RACE.read_text(encoding="utf-8"))
    competitors = race_page._competitors(told)
    title, about = race_page.COURSES[COURSE]
    figure = race_page._course(told, competitors, *COURSE, title, about)
    heading = f"{title}: {told['data'].split('/')[-1]}, {told['device']}, mean of {told['settings']['seeds']} seeds"
    plot = re.search(r"<div class=plot>(<svg.*?</svg>)</div>", figure, re.S)[1]
    plot = re.sub(r"(=)([\w.%-]+)(?=[\s/>])", r'\1"\2"', plot.replace("height=280", PLOT, 1))
    style = (Path(race_page.__file__).parent / "page.css").read_text(encoding="utf-8")
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="system-ui, sans-serif">',
        f'<style>{style}</style><rect class="ground" width="{WIDTH}" height="{HEIGHT}" rx="8"/>',
        f'<text class="axis" x="20" y="26" font-weight="bold">{heading}</text>',
    ]
    for number, each in enumerate(competitors):
        mark = f'<path class="mark" transform="translate(18 0)" d="{charts.SHAPES[number]}"/>'
        line = f'<path class="{charts._style(number)}" d="M1 0H35"/>{mark}'
        name = f'<text class="label" x="42" y="4">{each.label}</text>'
        parts.append(f'<g class="c{number}" transform="translate({20 + LEGEND_COLUMNS * number} 46)">{line}{name}</g>')
    return "\n".join([*parts, plot, "</svg>\n"]).encode()


def photographed(path: Path, width: int, height: int, scripts: tuple[str, ...] = (), until: str = "") -> bytes:
    """A page as headless Chromium shows it, after scripts have run and a condition holds."""
    sys.path.append(str(HERE.parent))
    from chromium import Chromium

    with tempfile.TemporaryDirectory() as profile:
        browser = Chromium(Path(profile))
        try:
            page = browser.open(path, width, height)
            page("document.documentElement.style.scrollbarWidth = 'none'")
            for number, script in enumerate(scripts):
                page(script)
                while number == 0 and until and not page(until):
                    time.sleep(0.2)
            return base64.b64decode(page.call("Page.captureScreenshot", format="png")["data"])
        finally:
            browser.close()


def web_page(run: Path) -> bytes:
    """The page with the model in it, as it has written something and a token was chosen."""
    command = [
        sys.executable,
        "-m",
        "nnx_cli",
        "export",
        str(run),
        "--format",
        "html",
        "--out",
        "model.html",
        "--quiet",
    ]
    subprocess.run(command, check=True)
    return photographed(Path("model.html"), 1000, 760, (WRITE.format(PROMPT), CHOOSE), WRITTEN)


def main() -> None:
    """Make the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ("live_screen", "race", "report", "web_page")
    parser.add_argument("--max-time", default="4m", help="of the run")
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    options = parser.parse_args()
    made: dict[str, bytes] = {}
    if "race" in options.only:
        made["race.svg"] = race()
    if {*options.only} - {"race"}:
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            shown, run = train(options.max_time), Path("weights/nyx-python-docs")
            if "live_screen" in options.only:
                made["live_screen.svg"] = live_screen(shown)
            if "report" in options.only:
                made["report.png"] = photographed(run / "report.html", 1100, 1000)
            if "web_page" in options.only:
                made["web_page.png"] = web_page(run)
            os.chdir(HERE)
    PICTURES.mkdir(exist_ok=True)
    for name, picture in made.items():
        print(f"{PICTURES / name}: {size(len(picture))}")
        if len(picture) > MOST_BYTES:
            raise SystemExit(f"{name} is larger than {size(MOST_BYTES)}")
        (PICTURES / name).write_bytes(picture)


if __name__ == "__main__":
    main()
