"""How figures, names and pictures are written, in the terminal and on a page."""

from base64 import b64encode

from markupsafe import Markup, escape


def less_is_better(name: str) -> bool:
    """Whether a metric, whatever its prefix, measures what is wrong."""
    return name.endswith(("median_rank", "ece", "perplexity", "mse", "loss"))


def is_share(name: str) -> bool:
    """Whether a metric lies between 0 and 1, as all do but ranks, losses and correlations."""
    return not name.endswith(("median_rank", "perplexity", "mse", "loss", "matthews", "pearson", "spearman"))


def number(value: float) -> str:
    """Shares with three decimals, small ones with two digits that count, ranks with one decimal."""
    if 0 < abs(value) < 0.01:
        return f"{value:.2g}"
    return f"{value:.3f}" if abs(value) <= 1 else f"{value:,.1f}"


def change(value: float) -> str:
    """A difference with its sign: three decimals, more where there would be nothing to see."""
    if abs(value) < 1e-9:  # what rounding leaves of equal figures
        return "0"
    if abs(value) < 0.0005:
        return f"{value:+.1g}"
    return f"{value:+.3f}" if abs(value) < 1 else f"{value:+,.1f}"


def figure(value: float) -> str:
    """Whole numbers as such, others with two decimals while they are small."""
    return f"{value:,.0f}" if value == round(value) or abs(value) >= 100 else f"{value:,.2f}"


def percent(share: float) -> str:
    """A share in percent."""
    return f"{100 * share:.2g}%" if share < 0.1 else f"{100 * share:.0f}%"


def breakable(name: str) -> Markup:
    """May go on in a new line after an underscore, as on a phone it must."""
    return escape(name).replace("_", Markup("_<wbr>"))


def uri(picture: bytes) -> str:
    """A PNG or JPEG to stand in the page itself."""
    kind = "png" if picture.startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64,{b64encode(picture).decode()}"
