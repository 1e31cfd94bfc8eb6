"""Exact values of arithmetic expressions, by fractions. No input hangs or raises.

    expression = term (("+" | "-") term)*
    term       = signed (("*" | "/" | implicit multiplication) signed)*
    signed     = ("+" | "-") signed | power
    power      = atom ("^" signed)?
    atom       = number ["%"] | "(" expression ")" | "sqrt" atom | letter

A letter or an irrational root is a symbol. Two expressions with symbols are compared by their
values at one pseudorandom point: equal expressions have equal values there, and different ones
differ except with a probability of about degree / 2^61 (Schwartz 1980, Zippel 1979).
"""

import hashlib
import math
import re
from fractions import Fraction
from functools import lru_cache

MAX_CHARS = 200
MAX_DEPTH = 30
MAX_BITS = 8000  # of a value's numerator and denominator; longer ones are not worked out
MAX_EXPONENT = 100

_TOKEN = re.compile(
    r"\s*(?:(\d+(?:,\d{3})+(?:\.\d+)?(?![\d,])|\d+(?:\.\d+)?|\.\d+)|(sqrt)|([^\W\d_])(?![^\W\d_])"
    r"|(\*\*|[-+*/^()%]))"
)

_PI = re.compile(r"(?<![^\W\d_])pi(?![^\W\d_])")
_LETTERS_AFTER_NUMBER = re.compile(r"(?<=[\d)])[^\W\d_]{2,3}(?![^\W\d_(])")  # 2ab is 2a*b


class _NoExpressionError(Exception):
    """The text is no expression, or one too large to work out."""


def evaluate(text: str) -> tuple[Fraction, bool] | None:
    """The value of `text`, and whether it holds symbols; None where it is no expression."""
    if len(text) > MAX_CHARS:
        return None
    if text.isdecimal():
        return number(text), False
    try:
        reader = _Reader(_tokens(text))
        value = reader.expression(0)
        return (value, reader.has_symbols) if reader.at_end() else None
    except (_NoExpressionError, ZeroDivisionError):
        return None


@lru_cache(maxsize=4096)  # the completions of a group share most of theirs
def number(digits: str) -> Fraction:
    """The value of digits as they are written, such as "1,250" or ".5"."""
    digits = digits.replace(",", "")
    return Fraction(int(digits) if digits.isdecimal() else digits)


def _tokens(text: str) -> list[str]:
    tokens, place = [], 0
    text = _PI.sub("π", text.rstrip())
    text = _LETTERS_AFTER_NUMBER.sub(lambda match: "*".join(match[0]), text)
    while place < len(text):
        match = _TOKEN.match(text, place)
        if match is None:
            raise _NoExpressionError
        tokens.append(match[0].strip().replace(",", "").replace("**", "^"))
        place = match.end()
    return tokens


class _Reader:
    """Recursive descent over tokens; one method for each line of the grammar."""

    def __init__(self, tokens: list[str]):
        self.tokens, self.place, self.has_symbols = tokens, 0, False

    def at_end(self) -> bool:
        return self.place == len(self.tokens)

    def _take(self, *wanted: str) -> str | None:
        if not self.at_end() and self.tokens[self.place] in wanted:
            self.place += 1
            return self.tokens[self.place - 1]
        return None

    def expression(self, depth: int) -> Fraction:
        value = self._term(depth)
        while sign := self._take("+", "-"):
            other = self._term(depth)
            value = _small(value + other if sign == "+" else value - other)
        return value

    def _term(self, depth: int) -> Fraction:
        value = self._signed(depth)
        while True:
            if sign := self._take("*", "/"):
                other = self._signed(depth)
            elif not self.at_end() and self._multiplies_unsaid():
                sign, other = "*", self._power(depth)
            else:
                return value
            value = _small(value * other if sign == "*" else value / other)

    def _multiplies_unsaid(self) -> bool:
        """ "2x", "2(x + 1)", "(a)(b)"; but "x2", "a b" and "2 3" are no multiplications."""
        before, here = self.tokens[self.place - 1], self.tokens[self.place]
        after_number = before[-1].isdecimal() or before == ")"
        return after_number and (here == "(" or here[0].isalpha())

    def _signed(self, depth: int) -> Fraction:
        if depth > MAX_DEPTH:
            raise _NoExpressionError
        if sign := self._take("+", "-"):
            value = self._signed(depth + 1)
            return -value if sign == "-" else value
        return self._power(depth)

    def _power(self, depth: int) -> Fraction:
        base = self._atom(depth)
        if not self._take("^"):
            return base
        exponent = self._signed(depth + 1)
        if exponent.denominator != 1 or abs(exponent) > MAX_EXPONENT:
            raise _NoExpressionError
        return _small(base ** int(exponent))

    def _atom(self, depth: int) -> Fraction:
        if depth > MAX_DEPTH or self.at_end():
            raise _NoExpressionError
        token = self.tokens[self.place]
        self.place += 1
        if token == "(":
            value = self.expression(depth + 1)
            if not self._take(")"):
                raise _NoExpressionError
            return value
        if token == "sqrt":
            outer, self.has_symbols = self.has_symbols, False
            root = self._root(self._atom(depth + 1))
            self.has_symbols |= outer
            return root
        if token[0].isalpha():
            return self._symbol(token)
        if token[0].isdecimal() or token[0] == ".":
            value = _small(number(token))
            return value / 100 if self._take("%") else value
        raise _NoExpressionError

    def _symbol(self, name: str) -> Fraction:
        self.has_symbols = True
        digest = hashlib.sha256(name.encode("utf-8", "replace")).digest()
        return Fraction(int.from_bytes(digest[:8], "big") >> 3)

    def _root(self, value: Fraction) -> Fraction:
        """Squares are taken out of a root, so that sqrt(8) is 2 sqrt(2)."""
        if value < 0 or self.has_symbols:
            return self._symbol(f"sqrt {value}")
        # sqrt(a / b) = sqrt(a b) / b
        inside, outside = value.numerator * value.denominator, Fraction(1, value.denominator)
        root = math.isqrt(inside)
        if root * root == inside:
            return root * outside
        for factor in range(2, min(root, 1000) + 1):
            while inside % factor**2 == 0:
                inside, outside = inside // factor**2, outside * factor
        return outside * self._symbol(f"sqrt {inside}")


def _small(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
        raise _NoExpressionError
    return value
