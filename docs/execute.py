"""Run the tutorials on full sizes and store what they show in the notebooks.

    python docs/execute.py [NOTEBOOK ...]

It takes about ten minutes and needs a Chromium (or the browser that BROWSER names) for the pictures. What is stored is
what a reader sees without running anything, in an editor, in the repository and on the site: text, tables, and every
plot and interactive view as one small picture. A picture shows everywhere, and needs no script as plotly's JSON would.
"""

import ast
import base64
import contextlib
import io
import json
import os
import pprint
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

NOTEBOOKS = sorted((Path(__file__).parents[1] / "tutorials").glob("[0-9]*.ipynb"))
WIDTH, HEIGHT = 760, 450  # of a plot that does not say
LARGE = 30_000  # HTML with more characters than this brings scripts along: it is stored as a picture


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def cells(path: Path, kind: str) -> list[dict[str, Any]]:
    return [cell for cell in read(path)["cells"] if cell["cell_type"] == kind]


def run(source: str, name: str, namespace: dict[str, Any]) -> tuple[str, Any]:
    """Run a cell: what it prints, and the value of its last line where that is an expression."""
    tree = ast.parse(source, name)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(tree, name, "exec"), namespace)
        value = (
            eval(compile(ast.Expression(last.value), name, "eval"), namespace) if isinstance(last, ast.Expr) else None
        )
    return printed.getvalue(), value


def shown(value: Any) -> dict[str, str]:
    """What a notebook shows of a value, by kind: its text, its HTML, and the HTML of a plot or an interactive view."""
    if hasattr(value, "to_plotly_json"):
        height, width = int(value.layout.height or HEIGHT), int(value.layout.width or WIDTH)
        value.update_layout(height=height, width=width)
        return {"view": value.to_html(include_plotlyjs=True, config={"displayModeBar": False})}
    text = pprint.pformat(value, width=110, compact=True) if isinstance(value, list | tuple | dict) else str(value)
    html = value._repr_html_() if hasattr(value, "_repr_html_") else ""
    if len(html) <= LARGE:
        return {"text": text} | ({"html": html} if html else {})
    # A page is drawn as it is: in the frame that a notebook gives it, a screenshot would come too early.
    return {"text": text, "view": value.to_page().to_html() if hasattr(value, "to_page") else html}


def picture(html: str, folder: Path) -> str:
    """A screenshot of a page, cut to what is on it, with few colours; as base64."""
    from PIL import Image, ImageChops

    page, shot = folder / "page.html", folder / "shot.png"
    blank = (
        "" if html.startswith("<!") else '<meta charset="utf-8"><style>body { margin: 0; background: white }</style>'
    )
    page.write_text(blank + html, encoding="utf-8")
    options = "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking hide-scrollbars"
    options += " disable-component-update disable-sync virtual-time-budget=8000"
    where = [f"--user-data-dir={folder / 'profile'}", f"--window-size={WIDTH + 20},1400", f"--screenshot={shot}"]
    browser = os.environ.get("BROWSER", "chromium")
    subprocess.run(
        [browser, *(f"--{option}" for option in options.split()), *where, page.as_uri()],
        check=True,
        capture_output=True,
        timeout=120,
    )
    image = Image.open(shot).convert("RGB")
    box = ImageChops.difference(image, Image.new("RGB", image.size, "white")).getbbox() or (0, 0, *image.size)
    small = io.BytesIO()
    image.crop((0, 0, image.width, min(box[3] + 8, image.height))).quantize(48).save(small, "PNG", optimize=True)
    return base64.b64encode(small.getvalue()).decode()


def outputs(printed: str, value: Any, count: int, folder: Path) -> list[dict[str, Any]]:
    """A cell's outputs in the notebook format; folders of this machine are called /tmp/bilens."""
    made: list[dict[str, Any]] = []
    if printed:
        made.append({"output_type": "stream", "name": "stdout", "text": lines(printed, folder)})
    if value is not None:
        found = shown(value)
        data: dict[str, Any] = {}
        if "view" in found:
            data["image/png"] = picture(found["view"], folder)
        if "html" in found:
            data["text/html"] = lines(found["html"], folder)
        if "text" in found:
            data["text/plain"] = lines(found["text"], folder)
        made.append({"output_type": "execute_result", "execution_count": count, "metadata": {}, "data": data})
    return made


def lines(text: str, folder: Path) -> list[str]:
    return text.replace(str(folder), "/tmp/bilens").splitlines(keepends=True)


def execute(path: Path) -> None:
    """Run a notebook in a temporary folder and write it with its outputs."""
    notebook, namespace = read(path), {"__name__": "__main__"}
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        tempfile.tempdir = folder
        for count, cell in enumerate((cell for cell in notebook["cells"] if cell["cell_type"] == "code"), 1):
            printed, value = run("".join(cell["source"]), f"{path.name}[{count}]", namespace)
            cell |= {"execution_count": count, "outputs": outputs(printed, value, count, Path(folder))}
        tempfile.tempdir = None
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    for notebook_path in [Path(given).resolve() for given in sys.argv[1:] or NOTEBOOKS]:
        execute(notebook_path)
        print(f"{notebook_path.name}: {notebook_path.stat().st_size / 1e3:.0f} kB")
