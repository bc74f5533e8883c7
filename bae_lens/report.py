"""A comparison as one HTML page that opens without a network."""

from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.graph_objects import Figure
from plotly.offline import get_plotlyjs

from bae_lens import plots
from bae_lens.harvest import write_text
from bae_lens.results import TABLE, Comparison

REPORT_FILE = "report.html"


def write_report(comparison: Comparison, folder: Path) -> Path:
    """Writes `report.html`, with its scripts inlined, and returns its path."""
    templates = Environment(loader=PackageLoader("bae_lens", "."), autoescape=True, undefined=StrictUndefined)
    html = templates.get_template("report.html.jinja").render(
        comparison=comparison,
        table=TABLE,
        plotly=Markup(get_plotlyjs()),
        quality_by_bits=_embed(plots.quality_by_bits(comparison)),
        firing_frequencies=_embed(plots.firing_frequencies(comparison)),
        loss_curves=_embed(plots.training_curves(comparison, "mse_loss", "squared error per token")),
        l0_curves=_embed(plots.training_curves(comparison, "l0", "features that fire per token")),
    )
    path = folder / REPORT_FILE
    write_text(path, html)
    return path


def _embed(figure: Figure) -> Markup:
    return Markup(
        figure.to_html(full_html=False, include_plotlyjs=False, config={"responsive": True, "displayModeBar": False})
    )
