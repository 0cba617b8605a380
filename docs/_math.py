"""Formulas as MathML at build time: no script, no font and no network when the page is read."""

from __future__ import annotations

import html
import re
import xml.etree.ElementTree as ElementTree

from latex2mathml.converter import convert

_FORMULA = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">'
    r"(?:\\\((?P<inline>.*?)\\\)|\\\[(?P<block>.*?)\\\])"
    r"</(?P=tag)>",
    re.DOTALL,
)
_FUNCTION = re.compile(r"<m[io]>([A-Za-z]{2,})</m[io]>")
_ARGUMENT = re.compile(
    r"(<mi>[A-Za-z]{2,}</mi>)(?=<m(?:i|n|sub|sup|subsup|frac|over|text|row><mi)>)"
)


class FormulaError(ValueError):
    """A formula uses something that the converter does not know."""


def to_mathml(latex: str, *, block: bool = False) -> str:
    r"""Convert one formula.

    The converter passes unknown commands and alignment marks through as text; here they are errors.
    """
    source = " ".join(latex.split())
    # `aligned` is a two-column array under another name, which is the one the converter knows.
    source = re.sub(r"\\begin\{aligned\}", r"\\begin{array}{rl}", source)
    source = source.replace(r"\end{aligned}", r"\end{array}")
    # Words are kept as they are, so an escaped underscore in them has to lose its backslash here.
    source = re.sub(r"\\text\w*\{[^{}]*\}", lambda words: words[0].replace(r"\_", "_"), source)
    try:
        mathml = convert(source, display="block" if block else "inline")
        text = "".join(ElementTree.fromstring(mathml).itertext())
    except Exception as error:  # whatever the converter raises
        raise FormulaError(f"cannot render ${latex}$: {type(error).__name__}: {error}") from error
    if "\\" in text or "&" in text:
        raise FormulaError(f"cannot render ${latex}$: {text!r} was not understood.")
    # Function names are identifiers, and need a thin space before an argument without brackets.
    mathml = _FUNCTION.sub(r"<mi>\1</mi>", mathml)
    # Browsers align the cells of a formula by style, no longer by attribute.
    mathml = re.sub(r'columnalign="(\w+)"', r'style="text-align: \1"', mathml)
    mathml = _ARGUMENT.sub(r'\1<mspace width="0.167em" />', mathml)
    return mathml.replace("<math ", f'<math alttext="{html.escape(source)}" ', 1)


def render_formulas(content: str) -> str:
    """Replace every formula of a page."""

    def replace(found: re.Match[str]) -> str:
        block = found["block"] is not None
        latex = html.unescape(found["block"] if block else found["inline"])
        tag = found["tag"]
        return f'<{tag} class="formula">{to_mathml(latex, block=block)}</{tag}>'

    return _FORMULA.sub(replace, content)
