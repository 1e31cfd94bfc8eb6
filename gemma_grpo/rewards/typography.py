"""Text without typography: one kind of minus, digit, fraction and bracket; LaTeX as plain text."""

import re
import unicodedata
from functools import lru_cache

_CHARS = {
    **dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2212\ufe63\uff0d", "-"),
    **dict.fromkeys("\u00d7\u00b7\u22c5\u2219\u2217", "*"),
    **dict.fromkeys("“”„«»", '"'),
    **dict.fromkeys("‘’`", "'"),
    **{"\u00f7": "/", "\u2044": "/", "\u2215": "/", "\u221a": "sqrt", "\u2264": "<="},
    **{"\u2265": ">=", "\u2260": "!=", "\u200b": " "},  # a zero-width space is still a space
}
_SUPERSCRIPTS = re.compile("[\u2070\u00b9\u00b2\u00b3\u2074-\u2079\u207a\u207b]+")

_SYMBOLS = {
    "times": "*",
    "cdot": "*",
    "ast": "*",
    "div": "/",
    "pm": "±",
    "pi": "π",
    "infty": "∞",
    "cup": "∪",
    "cap": "∩",
    "leq": "<=",
    "le": "<=",
    "geq": ">=",
    "ge": ">=",
    "neq": "!=",
    "ne": "!=",
    "degree": "°",
    "circ": "°",
    "euro": "€",
    "pounds": "£",
    "quad": " ",
    "qquad": " ",
    **dict.fromkeys(("left", "right", "displaystyle", "big", "Big"), ""),
}
_SYMBOL = re.compile(r"\\([a-zA-Z]+)(?![a-zA-Z]) ?")
_CONTENT = re.compile(
    r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mathsf|mbox|hbox|boxed|fbox|emph|"
    r"operatorname|mathbb|ensuremath)\s*\{([^{}]*)\}"
)
_FRACTION = re.compile(r"\\[cdt]?frac\s*(?:\{([^{}]*)\}|(\d))\s*(?:\{([^{}]*)\}|(\d))")
_ROOT = re.compile(r"\\sqrt\s*(?:\{([^{}]*)\}|(\d))")
_EXPONENT = re.compile(r"\^\s*\{([^{}]*)\}")
_WRAPPED = re.compile(r"(?<![\w)])(\*\*|__|`)(?=\S)([^*`]*?)(?<=\S)\1(?![\w(])")  # **bold**, `code`
_MARKS = '*" \t\r\n'


def plain(text: str) -> str:
    """`text` as ASCII as far as that is possible, without LaTeX, quotes and marks at its ends.

    Characters that nobody sees (byte order and direction marks, joiners) are gone. Digits of
    another script become 0-9, but only where the text has one script: a mixture stays as it is.
    """
    if not text.isascii():
        text = _ascii_digits("".join(map(_plain_char, _SUPERSCRIPTS.sub(_raised, text))))
    if "\\" in text or "{" in text or "~" in text or "$" in text:
        text = _without_latex(text)
    text = _WRAPPED.sub(r"\2", text)
    text = " ".join(text.split()).strip(_MARKS).rstrip(",;:? ").strip(_MARKS)
    # A single quote counts only with its other half: A' is not A.
    return text[1:-1].strip(_MARKS) if len(text) > 1 and text[0] == text[-1] == "'" else text


@lru_cache(maxsize=4096)
def _plain_char(char: str) -> str:
    """NFKC one character at a time, because NFKC reads "1½" as 11/2."""
    if char in _CHARS:
        return _CHARS[char]
    if unicodedata.category(char) == "Cf" or "\ufe00" <= char <= "\ufe0f":
        return ""
    normal = unicodedata.normalize("NFKC", char)
    kind = unicodedata.decomposition(char).partition(" ")[0]
    if kind == "<fraction>":
        return " " + normal.replace("\u2044", "/")
    return "_" + normal if kind == "<sub>" else normal


def _raised(match: re.Match[str]) -> str:
    return "^" + unicodedata.normalize("NFKC", match[0]).replace("\u2212", "-")


def _ascii_digits(text: str) -> str:
    zeros = {ord(char) - unicodedata.decimal(char) for char in text if char.isdecimal()}
    if len(zeros) != 1 or zeros == {ord("0")}:
        return text
    return "".join(str(unicodedata.decimal(char)) if char.isdecimal() else char for char in text)


def _without_latex(text: str) -> str:
    for code, meaning in ((r"\{", "\x01"), (r"\}", "\x02"), ("{,}", ","), (r"\!", "")):
        text = text.replace(code, meaning)
    text = re.sub(r"\\[,;: ]|(?<=[\w}])~(?=[\w\\])|\\[()\[\]]", " ", text)
    text = re.sub(r"\^\s*\{?\s*\\circ\s*\}?", "°", text)
    for _ in range(10):  # from the inside out, ten levels of braces
        before = text
        text = _CONTENT.sub(r" \1", text)
        text = _ROOT.sub(lambda match: f"sqrt({match[1] or match[2]})", text)
        text = _EXPONENT.sub(lambda match: "^" + _bracketed(match[1]), text)
        text = _FRACTION.sub(_fraction, text)
        if text == before:
            break
    text = _SYMBOL.sub(lambda match: _SYMBOLS.get(match[1], match[0]), text)
    text = _without_dollars(text.strip())
    text = text.replace(r"\$", "$").replace(r"\%", "%")
    return text.replace("\x01", "{").replace("\x02", "}")


def _fraction(match: re.Match[str]) -> str:
    top, bottom = (match[1] or match[2] or "").strip(), (match[3] or match[4] or "").strip()
    return f" {_bracketed(top)}/{_bracketed(bottom)}"


def _bracketed(text: str) -> str:
    return text.strip() if re.fullmatch(r"\s*-?\d+\s*|\s*[a-z]\s*", text) else f"({text.strip()})"


def _without_dollars(text: str) -> str:
    """`text` without LaTeX's dollars around the whole, or around its end ("it is: $5$")."""
    return re.sub(r"(?<![\\$\w])(\$\$?)([^$]+)(?<!\\)\1(?=[.\s]*$)", r"\2", text)
