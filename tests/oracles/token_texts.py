"""2,400 varied texts for tokenizers, by one recipe that the oracle's script and the suite share.

Words and turns of many languages and scripts, code, numbers, tables and mark-up, runs of spaces,
newlines and tabs, emoji with joiners, words that are none, any characters of Unicode at all, and
what looks like a special token.
"""

import random

WORDS = (
    "the quick brown fox jumps over it; Tom has twelve pens and buys seven more, doesn't he? "
    "Antidisestablishmentarianism isn't floccinaucinihilipilification. e.g. U.S.A. co-operate "
    "naïve façade Ærøskøbing Straße Übermäßigkeit für niño mañana ça œuvre žluťoučký kůň úpěl "
    "Zażółć gęślą jaźń İstanbul ığdır Ελλάδα ψωμί Москва объём щёлочь Київ ґанок "
    "शिक्षा नमस्ते ความรัก "
    "ไทย தமிழ் తెలుగు ಕನ್ನಡ മലയാളം বাংলা မြန်မာ "
    "ភាសាខ្មែរ ქართული հայերեն አማርኛ שלום עולם "
    "مرحبا بالعالم خوشحالم 漢字 東京都 你好世界 繁體中文 こんにちは "
    "カタカナ ｶﾀｶﾅ 안녕하세요 한국어 ᏣᎳᎩ ᐃᓄᒃᑎᑐᑦ 𝔉𝔯𝔞𝔨𝔱𝔲𝔯 𓀀𓂀 "
    "hello HELLO hELLO HelloWorld snake_case camelCase kebab-case SCREAMING_CASE x1y2z3 "
    "http://example.org/a?b=c&d=%20 user@example.org C:\\dir\\file.txt ./a/b.py #tag @name"
).split(" ")
NUMBERS = (
    "0 7 42 1234567890 3.14159 -17 1e-6 1,234,567.89 $5.20 50% 12:30 1/2 ½ ² x³ Ⅷ ٣٤ १२ ０１２ 007 "
    "12+34=46 9*(8-7)/6 2^10 10⁻⁶ 5°C №3 1st 0x1F"
).split(" ")
CODE = (
    "def f(x):\n    return x ** 2\n",
    "for (int i = 0; i < n; ++i) {\n\t\tsum += a[i];\n\t}\n",
    '{"name": "Ann", "ids": [1, 2, null], "ok": true}',
    "SELECT a.b, COUNT(*) FROM t AS a WHERE x <> 'y' GROUP BY 1;",
    "<div class='a'><p>text<br/></p></div><table><tr><td>1</td></tr></table>",
    "# Title\n\n- item\n- **bold** _it_\n\n```py\nprint('hi')\n```\n",
    "\\frac{1}{2} \\sum_{i=1}^{n} x_i^2 \\leq \\alpha",
    "a\r\nb\rc\u0085d\u2028e\u2029f\x0bg\x0ch",
    "if x>=3 and y!=4: pass  # ok",
)
EMOJI = (
    "🙂 🚀 👩\u200d👩\u200d👧\u200d👦 🏳\ufe0f\u200d🌈 🇫🇷 👍🏽 ❤\ufe0f ☃ ✓ ♞ 🀄 "
    "e\u0301 n\u0303 \u212b \u00c5 ﬁ \u200b \u00a0 \ufeff \u00ad \u202e \ufffd \U0010fffe"
).split(" ")
LOOKALIKES = (
    "<start_of_turn> <end_of_turn> <unused0> <unused99> <unk > <bos > </s> <mask> [multimodal] "
    "<0x41> <0xE2> <start_of_turn>user <|endoftext|> [INST] <table> </td> <strong> <end_of_image> "
    "\u2581 a\u2581b"
).split(" ")
CONTROLS = ("<bos>", "<eos>", "<pad>", "<unk>")
LONG_RUN = 32  # spaces; a vocabulary of Gemma's has pieces of up to 31


def make_texts() -> list[str]:
    """The texts; the same ones wherever and whenever they are made."""
    draw = random.Random(2026)

    def any_character() -> str:
        while True:
            code = draw.choice((0x250, 0x3000, 0xFFFF, 0x10FFFF))
            character = chr(draw.randrange(1, code))
            if not "\ud800" <= character <= "\udfff":
                return character

    def nonsense() -> str:
        return "".join(
            draw.choice("abcdefghijklmnopqrstuvwxyzäé'-") for _ in range(draw.randint(1, 18))
        )

    def run(longest: int) -> str:
        return draw.choice(" \n\t") * draw.randint(1, longest)

    def sentence(parts: tuple[str, ...] | list[str], longest: int) -> str:
        glue = draw.choice((" ", " ", " ", "", "  ", "\n", ", "))
        return glue.join(draw.choice(parts) for _ in range(draw.randint(1, longest)))

    kinds = (
        lambda: sentence(WORDS, 14),
        lambda: sentence(WORDS + NUMBERS, 14),
        lambda: sentence(NUMBERS, 12),
        lambda: sentence(CODE, 3),
        lambda: sentence(EMOJI, 8),
        lambda: sentence(WORDS + EMOJI + LOOKALIKES, 10),
        lambda: sentence([nonsense() for _ in range(8)], 8),
        lambda: "".join(any_character() for _ in range(draw.randint(1, 24))),
        lambda: sentence([draw.choice(WORDS) + run(12) for _ in range(5)], 6),
        lambda: run(40) + draw.choice(WORDS) + run(40),
        lambda: "".join(draw.choice(" \n\tab.▁<>") for _ in range(draw.randint(1, 60))),
        lambda: sentence(WORDS, 4) + draw.choice(CONTROLS) + sentence(WORDS, 4),
    )
    return ["", *(kinds[i % len(kinds)]() for i in range(2399))]
