"""Template -> page. The one place where HTML is made; everything in it is escaped."""

import math
import unicodedata
from typing import Any


def render(**context: Any) -> str:
  """page.html.j2 with `title` and the sections that are given; the others are left out."""
  import jinja2  # Only pages need it.

  def shown(value: Any) -> Any:
    """Whatever a name or a text holds, none of its characters acts on the page unseen."""
    plain_text = isinstance(value, str) and not hasattr(value, "__html__")
    return _escaped(value, keep="\n\t") if plain_text else value

  environment = jinja2.Environment(
    loader=jinja2.PackageLoader("dpr_jax.report", "."),
    autoescape=True,
    finalize=shown,
    undefined=jinja2.ChainableUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  return environment.get_template("page.html.j2").render(**context)


def visible(text: Any, spaces: bool = False) -> str:
  """Text in which nothing is hidden: control and direction characters as escapes.

  Args:
    spaces: also show every space, newline and tab; else only spaces at the ends.
  """
  text = str(text)
  if not spaces:
    body = text.strip(" ")
    left = len(text) - len(text.lstrip(" "))
    if not body:
      return "·" * len(text)
    return "·" * left + _escaped(body, keep="\n\t") + "·" * (len(text) - left - len(body))
  return _escaped(text, {" ": "·", "\n": "↵", "\t": "⇥"})


def _escaped(text: str, symbols: dict[str, str] | None = None, keep: str = "") -> str:
  symbols = symbols or {}
  out = []
  for c in text:
    hidden = unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
    joiner = c in "\u200c\u200d\ufe0f"  # parts of emoji and of several scripts.
    if c in symbols:
      out.append(symbols[c])
    elif hidden and not joiner and c not in keep:
      out.append(c.encode("unicode_escape").decode("ascii"))
    else:
      out.append(c)
  return "".join(out)


def finite(x: Any) -> bool:
  """Whether x is a number that can be shown."""
  return isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)


def number(x: Any, digits: int = 3, sign: bool = False) -> str:
  """A number at a fixed number of decimals, with a true minus; an en dash where there is none."""
  if not finite(x):
    return "–"
  text = f"{x:+,.{digits}f}" if sign else f"{x:,.{digits}f}"
  if not text.strip("+-0.,"):  # -0.00 and +0.00 are 0.
    text = text.lstrip("+-")
  return text.replace("-", "\u2212")


def significant(x: Any, digits: int = 3) -> str:
  """A number at `digits` significant digits, for values of unknown size."""
  if not finite(x):
    return "–"
  if x == 0:
    return "0"
  size = math.floor(math.log10(abs(x)))
  if -4 <= size < 7:
    return number(x, max(0, digits - 1 - size))
  mantissa, _, power = f"{x:.{digits - 1}e}".partition("e")
  raised = str(int(power)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
  return f"{mantissa} × 10{raised}".replace("-", "\u2212")


def plain(x: Any) -> str:
  """A setting as it was written: 0.5, 1, 0.0001."""
  return f"{x:g}" if finite(x) else "–"


def duration(seconds: Any) -> str:
  """12 s, 3 min 20 s, 2 h 05 min."""
  if not finite(seconds):
    return "–"
  whole = round(seconds)
  if whole < 60:
    return f"{number(seconds, 1 if seconds < 10 else 0)} s"
  if whole < 3600:
    return f"{whole // 60} min {whole % 60:02d} s"
  return f"{whole // 3600:,} h {whole % 3600 // 60:02d} min"


def count(n: Any) -> str:
  """1,234 as it is, 1.23 million beyond a hundred thousand."""
  if not finite(n):
    return "–"
  for size, word in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
    if abs(n) >= size:
      return f"{significant(n / size)} {word}"
  return f"{n:,.0f}"
