"""Pages that open without a network: templates filled in, with figures and their script in the page."""

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.graph_objects import Figure
from plotly.offline import get_plotlyjs


def render(template: str, **values: Any) -> str:
    """A page of the template, by its name, with plotly's script. Raises jinja2's UndefinedError for a missing value."""
    templates = Environment(
        loader=PackageLoader("bae_lens.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return templates.get_template(f"{template}.html.jinja").render(plotly=Markup(get_plotlyjs()), **values)


def embed(figure: Figure, name: str) -> Markup:
    """A figure with a fixed id, so that the same figure gives the same page; plotly does not escape the id."""
    config = {"responsive": True, "displayModeBar": False}
    return Markup(figure.to_html(full_html=False, include_plotlyjs=False, div_id=f"figure-{name}", config=config))
