"""Formatting of numbers, names and images, in the terminal and on a page."""

from base64 import b64encode

from markupsafe import Markup, escape


def lower_is_better(name: str) -> bool:
    """Return True if lower values of a metric are better; its name may have any prefix."""
    return name.endswith(("median_rank", "ece", "perplexity", "mse", "loss"))


def is_share(name: str) -> bool:
    """Return True if a metric lies between 0 and 1, as all do except ranks, losses and correlations."""
    return not name.endswith(("median_rank", "perplexity", "mse", "loss", "matthews", "pearson", "spearman"))


def number(value: float) -> str:
    """Format a share with three decimals, a small one with two significant digits, a rank with one decimal."""
    if 0 < abs(value) < 0.00995:
        return f"{value:.2g}"
    return f"{value:.3f}" if abs(value) <= 1 else f"{value:,.1f}"


def change(value: float) -> str:
    """Format a difference with its sign and three decimals, or one significant digit if it is smaller."""
    if abs(value) < 1e-9:  # Rounding makes equal values differ by this little.
        return "0"
    if abs(value) < 0.0005:
        return f"{value:+.1g}"
    return f"{value:+.3f}" if abs(value) < 1 else f"{value:+,.1f}"


def figure(value: float) -> str:
    """Format a number of 100 or more, or a whole one, without decimals, and any other with two."""
    return f"{value:,.0f}" if value == round(value) or abs(value) >= 100 else f"{value:,.2f}"


def percent(share: float) -> str:
    """Format a share in percent."""
    return f"{100 * share:.2g}%" if share < 0.1 else f"{100 * share:.0f}%"


def breakable(name: str) -> Markup:
    """Escape a name and allow a line break after each underscore, which narrow screens need."""
    return escape(name).replace("_", Markup("_<wbr>"))


def uri(picture: bytes) -> str:
    """Return a PNG or JPEG as a data URI, so that the page contains the image itself."""
    kind = "png" if picture.startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64,{b64encode(picture).decode()}"
