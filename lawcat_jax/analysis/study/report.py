"""A study's results as Markdown and pictures; nothing in them comes from anywhere but ``results.json``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lawcat_jax.analysis.study.results import NOT_RUN, result
from lawcat_jax.errors import UserError
from lawcat_jax.files import atomic_file
from lawcat_jax.tasks.figures import plot_lengths, plot_rows, short
from lawcat_jax.tasks.registry import task_named

Results = Mapping[str, Any]
Row = Mapping[str, Any]
Section = tuple[str, str, list[Row]]
"""(title, a word for file names, rows): a table of every task that its rows are measured by, and pictures of some."""

BEGIN, END = "<!-- study:begin {} -->", "<!-- study:end -->"
_BLOCK = re.compile(r"<!-- study:begin (\S+) -->\n(.*?)<!-- study:end -->", re.DOTALL)
_RULE = (
    "A claim is decided only where the 95 % interval of the difference of the two shares (Newcombe's hybrid score interval, both "
    "rows' samples of all named cells together) does not contain 0. Rows answer the same prompts, which the interval, made for "
    "independent samples, does not use: it is rather too wide. It knows nothing of how much another training seed would change."
)


def sections(results: Results) -> list[Section]:
    """The groups of rows that are shown together: the headline with the teacher; then, for each row that others refer to,
    the ablations and the baselines beside it."""
    rows: list[Row] = results["rows"]
    found: list[Section] = [("Headline", "headline", [row for row in rows if row["group"] in ("headline", "teacher")])]
    for reference in dict.fromkeys(row["reference"] for row in rows if row["reference"]):
        own = [row for row in rows if row["name"] == reference]
        for group, title in (("ablation", "Ablations"), ("baseline", "Baselines")):
            more = [row for row in rows if row["group"] == group and row["reference"] == reference]
            if more:
                found.append((f"{title}, beside {own[0]['title']}", f"{group}s_{reference}", [*own, *more]))
    return found


def markdown(results: Results, folder: str = "") -> str:
    """The tables, from level-3 headings down. ``folder`` is put before the pictures' names."""
    lines: list[str] = []
    for title, word, rows in sections(results):
        compared = rows if word == "headline" else rows[1:]  # a reference alone is no comparison
        shown = [(key, measure) for key, measure in results["measures"].items() if _has(measure, compared)]
        if not shown:
            continue
        lines += [f"### {title}", ""]
        if notes := [f"{row['title']}: {row['note']}." for row in rows if row["note"]]:
            lines += [*notes, ""]
        for key, measure in shown:
            lines += [f"**{measure['title']}**", "", *_table(measure, rows), ""]
            if _drawn(measure, rows):
                lines += [f"![{measure['title']}]({folder}{_picture(results, word, key)})", ""]
    lines += _seeds(results)
    if results["claims"]:
        lines += ["### Claims", "", _RULE, "", *_claims(results), ""]
    if results["costs"]:
        lines += ["### What it took", "", *_costs(results), ""]
    if missing := [row["title"] for row in results["rows"] if not _measured(results, row)]:
        lines += [f"Not run: {'; '.join(missing)}.", ""]
    return "\n".join(lines).rstrip("\n") + "\n"


def pictures(results: Results) -> list[str]:
    """Names of the pictures that :func:`markdown` names."""
    return [
        _picture(results, word, key)
        for _, word, rows in sections(results)
        for key, measure in results["measures"].items()
        if _drawn(measure, rows)
    ]


def draw(results: Results, folder: Path) -> list[str]:
    """Draw every picture that :func:`markdown` names into the folder; returns their names.

    Raises:
      UserError: a file cannot be written.
    """
    names = []
    for title, word, rows in sections(results):
        for key, measure in results["measures"].items():
            if not _drawn(measure, rows):
                continue
            filled = _filled(measure, rows)
            names.append(_picture(results, word, key))
            task = task_named(measure["task"])
            values = {
                row["title"]: {
                    int(x): result(measure["task"], cell) for x, cell in measure["rows"][row["name"]]["pooled"].items()
                }
                for row in filled
            }
            heading = f"{measure['title']}\n{title}"
            if len(filled) > 6 and task.percent:  # curves would cover one another
                plot_rows(folder / names[-1], task, values, title=heading)
            else:
                length = results["training_length"]
                plot_lengths(folder / names[-1], task, values, title=heading, training_length=length)
    return names


def write(results: Results, folder: Path) -> None:
    """``results.md`` and its pictures.

    Raises:
      UserError: a file cannot be written.
    """
    draw(results, folder)
    date = f"Measured until {results['date']}." if results["date"] else "Nothing was measured."
    with atomic_file(folder / "results.md") as out:
        out.write(f"# {results['title']}\n\n{date}\n\n{markdown(results)}")


def blocks(page: str) -> list[tuple[str, str]]:
    """(path of the results, text) of each generated block of a page."""
    return _BLOCK.findall(page)


def filled(page: str, name: str, text: str) -> str:
    """The page with the text in the block of the results at ``name``, a path beside the page.

    Raises:
      UserError: the page has no such block.
    """
    begin = BEGIN.format(name)
    found = next((m for m in _BLOCK.finditer(page) if m[1] == name), None)
    if found is None:
        raise UserError(f"the page has no lines {begin!r} and {END!r} to put the tables between")
    return f"{page[: found.start()]}{begin}\n{text}{END}{page[found.end() :]}"


def _has(measure: Mapping[str, Any], rows: Iterable[Row]) -> bool:
    return bool(_filled(measure, rows))


def _filled(measure: Mapping[str, Any], rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if measure["rows"].get(row["name"], {}).get("pooled")]


def _drawn(measure: Mapping[str, Any], rows: Iterable[Row]) -> bool:
    """Whether there is something to compare; tasks of a family have tables only, or there would be ten pictures."""
    return len(_filled(measure, rows)) > 1 and not task_named(measure["task"]).family


def _measured(results: Results, row: Row) -> bool:
    return any(_has(measure, [row]) for measure in results["measures"].values())


def _picture(results: Results, section: str, key: str) -> str:
    """Name of the picture of a section and a table."""
    measure = results["measures"][key]
    same = [other for other, value in results["measures"].items() if value["task"] == measure["task"]]
    number = f"_{same.index(key) + 1}" if len(same) > 1 else ""
    return f"{results['study']}_{section}_{measure['task']}{number}.png"


def _table(measure: Mapping[str, Any], rows: Sequence[Row]) -> list[str]:
    """Rows that have numbers, by length."""
    filled = _filled(measure, rows)
    lengths = sorted({int(x) for row in filled for x in measure["rows"][row["name"]]["pooled"]})
    body = []
    for row in filled:
        cells = measure["rows"][row["name"]]["pooled"]
        trained = "–" if row["steps"] is None else " + ".join(f"{count:,}" for count in row["steps"])
        numbers = [_cell(measure["task"], cells.get(str(x))) for x in lengths]
        counts = sorted({cell["n"] for cell in cells.values()})
        samples = "–".join(f"{count:,}" for count in dict.fromkeys((counts[0], counts[-1])))
        body.append([row["title"], trained, samples, *numbers])
    unit = "n" if task_named(measure["task"]).percent else "tokens"
    return _lines(["student", "steps, stage 1 + 2", unit, *map(short, lengths)], body)


def _cell(task: str, cell: Mapping[str, Any] | None) -> str:
    if cell is None:
        return "–"
    if not task_named(task).percent:
        return f"{cell['perplexity']:.2f}"
    low, high = cell["interval"]
    return f"{100 * cell['accuracy']:.0f} [{100 * low:.0f}, {100 * high:.0f}]"


def _seeds(results: Results) -> list[str]:
    """Of rows with several seeds: each seed alone."""
    lines = []
    for row in results["rows"]:
        for measure in results["measures"].values():
            by_seed = measure["rows"].get(row["name"], {}).get("seeds", {})
            if len(by_seed) < 2:
                continue
            lengths = sorted({int(x) for cells in by_seed.values() for x in cells})
            body = [
                [seed, *(_cell(measure["task"], cells.get(str(x))) for x in lengths)] for seed, cells in by_seed.items()
            ]
            lines += [f"**{row['title']}, each seed alone: {measure['title']}**", ""]
            lines += [*_lines(["seed", *map(short, lengths)], body), ""]
    return ["### Seeds", "", *lines] if lines else []


def _claims(results: Results) -> list[str]:
    titles = {row["name"]: row["title"] for row in results["rows"]}
    body = []
    for claim in results["claims"]:
        rows = f"{titles[claim['a']]} {claim['expected']} {titles[claim['b']]}"
        numbers, difference = "–", "–"
        if claim["verdict"] != NOT_RUN:
            shares = [100 * claim[f"hits_{x}"] / claim[f"n_{x}"] for x in "ab"]
            numbers = f"{shares[0]:.0f} % of {claim['n_a']}, {shares[1]:.0f} % of {claim['n_b']}"
            low, high = claim["interval"]
            difference = f"{100 * claim['difference']:+.0f} [{100 * low:+.0f}, {100 * high:+.0f}]"
        cells = "; ".join(claim["cells"])
        body.append([claim["text"], claim["source"], rows, cells, numbers, difference, claim["verdict"]])
    head = ["claim", "source", "expected", "cells", "right answers", "difference, points", "verdict"]
    return _lines(head, body)


def _costs(results: Results) -> list[str]:
    body = []
    for cost in results["costs"]:
        name = cost["run"] + (f" (after {', '.join(cost['after'])})" if cost["after"] else "")
        versions = ", ".join(f"{package} {version}" for package, version in cost["versions"].items())
        body.append(
            [
                name,
                f"{cost['steps']:,}",
                f"{cost['tokens']:,}",
                f"{cost['minutes']:.1f}",
                f"{cost['evaluation_minutes']:.1f}",
                ", ".join(cost["devices"]) or "–",
                f"{cost['commit'][:10]}; {versions}",
            ]
        )
    head = ["run", "steps", "tokens read", "minutes", "minutes of evaluation", "device", "commit, versions"]
    text = (
        "Tokens include padding; minutes are wall clock, with start and compilation, also where runs shared a device."
    )
    return [text, "", *_lines(head, body)]


def _lines(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *body)]
