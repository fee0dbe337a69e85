"""The page of `potstill inspect --html`: one self-contained file, a pure function of the data in inspect_data.py."""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import Any

from potstill.launch.inspect.data import data_json
from potstill.launch.inspect.script import SCRIPT
from potstill.launch.inspect.style import STYLE

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<header>
<h1>{title}</h1>
<details><summary>stores</summary><dl>{about}</dl></details>
</header>
<div class="bar">
<div class="rows" role="group" aria-label="rows">
{previous}<button type="button" id="previous" aria-label="previous row">&#8249;</button>
<select id="row" aria-label="row"></select>
<button type="button" id="next" aria-label="next row">&#8250;</button>{following}
</div>
<label class="by">shade by <select id="quantity"></select></label>
<div id="legend" aria-hidden="true"><div class="ramp"></div><div class="ticks"></div></div>
</div>
<main>
<div>
<p id="summary"></p>
<p id="masks" hidden><span class="t masked">Pale, underlined</span> text is read, but not trained on.</p>
<p id="note"></p>
<section id="text" tabindex="0" role="group" aria-label="tokens of the row" aria-describedby="keys"></section>
</div>
<aside id="panel" aria-live="polite" aria-label="what was expected at the token">
<div class="token"><span class="shown"></span><span class="where"></span></div>
<p class="truth"></p>
<p class="now"></p>
<table class="facts"><tbody></tbody></table>
<div class="list" tabindex="0" aria-label="candidates"></div>
</aside>
</main>
<footer id="keys">
Each token is shaded by what was predicted for it from the tokens before it in its document. Point at a token
to look, click or tap to keep it. Keys: <kbd>&#8592;</kbd> <kbd>&#8594;</kbd> token by token,
<kbd>&#8593;</kbd> <kbd>&#8595;</kbd> line by line, <kbd>Home</kbd> <kbd>End</kbd>, <kbd>Page Up</kbd>
<kbd>Page Down</kbd> row by row. &#183; stands for a token that ends inside a character.
</footer>
<noscript>This page needs its own script (it loads nothing): please allow it.</noscript>
<script type="application/json" id="data">{data}</script>
<script>{script}</script>
</body>
</html>
"""


def render_page(data: Mapping[str, Any], *, previous: str | None = None, following: str | None = None) -> str:
    """The page as HTML. `previous` and `following` are the neighbouring pages, if each row has its own."""
    about = "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>" for name, value in data["about"])
    return PAGE.format(
        title=html.escape(data["title"]),
        style=STYLE,
        about=about,
        previous=_link(previous, "&#171;", "page of the row before"),
        following=_link(following, "&#187;", "page of the row after"),
        data=data_json(data),
        script=SCRIPT,
    )


def _link(target: str | None, sign: str, label: str) -> str:
    return "" if target is None else f'<a href="{html.escape(target)}" aria-label="{label}">{sign}</a>'
