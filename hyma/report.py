"""A report: its records, and the figures and the page that are drawn from the records and from nothing else.

    python -m hyma.report report/          # draws the figures and report.html of a folder again

The page is the template `report.html` beside this file, with its style and its few lines of script. Figures are in
`hyma/figures.py`, each once.
"""

if __name__ == "__main__":
    from hyma import before_main  # noqa: F401  what a signal does while torch is imported

import argparse
import base64
import hashlib
from pathlib import Path

import jinja2
import markupsafe

from hyma.answer import describe_choice, format_number, result_of_primary, teraflop
from hyma.costs import cost_ratio
from hyma.evaluation import compared_with_random, method_rows, ranking_rows
from hyma.figures import FIRST_SCREEN, draw_figure, save_figures
from hyma.files import atomic_file, run_script, write_text
from hyma.gallery import gallery_queries
from hyma.metrics import METRICS
from hyma.plotting import to_png, to_svg
from hyma.records import Records, save_records
from hyma.tasks import KINDS
from vlm import BadInput


def save_report(folder, result, gallery, results):
    """Saves an evaluation's records in a folder and draws figures and page from them.

    result: an EvaluationResult. gallery: its Gallery. results: what results.json holds besides methods and page.
    """
    methods = method_rows(result)
    tables = {"ranking.csv": ranking_rows(result), "selectors.csv": methods}
    if gallery.rows:
        tables["gallery.csv"] = gallery.rows
    tables_of_figures, figures = save_figures(result)
    images = [f"{facts['name']}.png" for facts in figures]
    results = results | {"methods": methods, "page": page_facts(result, figures, gallery)}
    save_records(folder, tables | tables_of_figures, gallery.thumbnails, images, results)
    draw_report(folder)


def page_facts(result, figures, gallery):
    """What the page shows and no table has: the "page" of results.json."""
    base = result.costs[result.oracle.name]
    ratios = {}
    for name, cost in result.costs.items():
        ratios[name] = {
            "flops_equal_batch": cost_ratio(cost, base, "flops_equal_batch"),
            "flops_with_embedding": cost_ratio(cost, base, "flops_with_embedding"),
        }
    tasks = []
    for place, task in enumerate(result.tasks):
        facts = {
            "name": task.name,
            "kind": task.kind,
            "headline": KINDS[task.kind].headline,
            "counted": task.counted,
            "protocol": task.protocol,
            "chance": task.chance,
            "than_random": compared_with_random(result_of_primary(result, place)),
        }
        tasks.append(facts)
    chosen = result.pairs[result.chosen]
    return {
        "chosen": list(chosen),
        "primary": result.primary.name,
        "chosen_by_truth": not result.primary.trained,  # of connectors alone
        "connector": str(result.primary.runs[0].connector(*chosen)),
        "oracle_seeds": len(result.oracle.runs),
        "resamples": result.resamples,
        "metrics": METRICS,
        "tasks": tasks,
        "times_oracle": ratios,  # a method's FLOPs in those of the oracle
        "figures": figures,
        "gallery": gallery.facts,
    }


def draw_report(folder):
    """Draws every figure and report.html of a folder from its records. Raises BadInput for a record that is damaged."""
    records = Records(folder)
    if "chosen_by_truth" not in records.page:
        raise BadInput(f"{folder}: was made by an earlier version of evaluate.py; run that again")
    figures = []
    for facts in records.page["figures"]:
        drawing, caption, section = draw_figure(records, facts)
        with atomic_file(records.path(f"{facts['name']}.png")) as file:
            file.write(to_png(drawing))
        shown = {
            "svg": markupsafe.Markup(to_svg(drawing)),
            "caption": caption,
            "width": int(drawing.get_figwidth() * 96),  # CSS pixels
            "section": section,
        }
        figures.append(facts | shown)
    write_text(records.folder / "report.html", render_page(records, figures))


def render_page(records, figures):
    """The page's HTML. figures: what results.json says of each, and its "svg", "caption", "width" and "section"."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"format_number": format_number, "teraflop": teraflop, "script_source": script_source}
    environment.globals |= {"describe_choice": describe_choice, "FIRST_SCREEN": FIRST_SCREEN}
    rows_of_task = {}
    for row in records.method_rows:
        rows_of_task.setdefault(row["task"], []).append(row)
    return environment.get_template("report.html").render(
        results=records.results,
        page=records.page,
        rows_of_task=rows_of_task,
        ranking=records.ranking(),
        figures=figures,
        queries=gallery_queries(records),
    )


def script_source(script):
    """How the page's policy names the only script that may run in it: nothing that a caption or a name holds ever can."""
    digest = hashlib.sha256(script.encode()).digest()
    return markupsafe.Markup(f"'sha256-{base64.b64encode(digest).decode()}'")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a report folder that evaluate.py wrote")
    folder = parser.parse_args().folder
    draw_report(folder)
    print(f"report: {folder / 'report.html'}")


if __name__ == "__main__":
    run_script(main)
