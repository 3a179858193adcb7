"""Which encoding unmarked text is in: the one in which it reads most like a language that is written in it.

Every candidate decodes a sample. A letter costs the bits that its frequency in a language gives it, more where it is
odd (a capital inside a word, two alphabets in one word); the cheapest text wins. Confidence is how far the others are
behind, and how much dearer the text is than its language should be; charset-normalizer's measure of mess has to agree.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, lru_cache
from typing import NamedTuple

ALPHABETS = {  # letters outside of ASCII, the most frequent first
    "ru": "оеаинтсрвлкмдпуяыьгзбчйхжшюцщэфъё",
    "uk": "оанивіерткслудмпяьзгбчйхїцжюшєщфґ",
    "bg": "аиоентрсвлкдпмзгбуъячцщжйшхюфь",
    "sr": "аоиенртсјувдкмплзгбчшћжцњхђљфџ",
    "be": "аніелоысркятпдцьвмзубўэчгшйхжюёф",
    "mk": "аоиетнрсвдкплмујзгбчшцжхќњѓфљџѕ",
    "kk": "аеынтірлдсқмокбуйғпзгшжңөәүұвияхэчцюфһщёьъ",
    "el": "αοιετσνρηπκυλμςόάίέήγδωχθύφβώξζψϊϋΐΰ",
    "he": "יוהלאתרבשמנםחדקפעכסטצגןזךץף\u05b0\u05b4\u05b7\u05b8\u05bc\u05b6\u05b5",
    "ar": "اليمنوتربعدهفسكقحجشطةصخىأذضغئزءإثظؤآ\u064b\u064e\u0651\u0650\u064f\u0652",
    "fa": "ایرندمهتوبشسکزگفخلقپعجحطصضچغذظثءآئأژيك",
    "th": "านรอก่เง้ยมวลีทตสัดหบคปิขจแไใพ์ชุู็ะำผืโถณซึธศษภฟญฉฮๆฐฎ๊๋ฝฤฆ",
    "en": "éïèöñüçáóâêíä",
    "de": "üäößéàè",
    "fr": "éàèêçâîùôûïœëüö",
    "es": "óíáéñúüç",
    "pt": "ãçáéíõóêàúâôü",
    "it": "èàòùìéî",
    "nl": "ëïéèöüá",
    "af": "êëôéûïîöáèü",
    "sv": "äöåé",
    "da": "øæåéöäü",
    "fi": "äöåšž",
    "is": "áíðéþóæöúý",
    "ca": "àóèéíçòúïü·",
    "pl": "łężąśćóńźé",
    "cs": "íáěéřžýčšůúťďňó",
    "sk": "áíčžéýúšľťôňóďäĺŕ",
    "hu": "áéöóőíüúű",
    "hr": "šžčćđé",
    "ro": "ăîâşţșț",
    "tr": "ıişüğöçâîû",
    "et": "äõüöšž",
    "lv": "āīēšņļūžčķģ",
    "lt": "ėšųžįąūčę",
    "eo": "ĉŭĝŝĵĥ",
    "mt": "ħżġċàùòìè",
    "vi": "đưàơáâôêăéíóùãạ\u0301\u0300\u0303\u0309\u0323ếạộảềấầủợậìệọúốịớẩứừổẽểờụỉẫựễồẻắặỗữởằẹẵỏửũỹỳỷõ",
}
COMMON = {  # the most frequent characters of scripts that have thousands
    "zh": "的一是不了在人有我他这中大来上国个到说们为子和你地出道也时年得就那要下以生会自着去之过家学对可她里后"
    "小么心多天而能好都然没日于起还发成事只作当想看文无开手十用主行方又如前所本见经头面公同三已老从动两长"
    "知",
    "zh-Hant": "的一是不了在人有我他這中大來上國個到說們為子和你地出道也時年得就那要下以生會自著去之過家學對可她裡後"
    "小麼心多天而能好都然沒日於起還發成事只作當想看文無開手十用主行方又如前所本見經頭面公同三已老從動兩長"
    "知",
    "ja": "のいにしたとてをはるがでなかっれらもさりこあくうきんまけすせそだどちつめよやみえわろほおばべびぶじず"
    "ごげぎぐゃゅょンーイスルトラリアドクシレタロジプフサマ日一人大本年中出",
    "ko": "이다는에의을고가하지은로를한사기도리서어자나인아있들으만시수대그해보정일라면게과부스여니했것주전장요"
    "제없안우상소공동문",
}
WESTERN = "en de fr es pt it nl af sv da fi is ca et"
CENTRAL = "pl cs sk hu hr ro de"
BALTIC = "et lv lt"
CYRILLIC = "ru uk bg sr be mk"
CANDIDATES = {  # Python's name (of the larger set where one holds another): languages, and bits against it beforehand
    "cp1252": (WESTERN, 0),
    "cp1251": (CYRILLIC, 4),
    "gb18030": ("zh zh-Hant", 4),
    "cp932": ("ja", 4),
    "euc_jp": ("ja", 6),
    "cp949": ("ko", 4),
    "big5hkscs": ("zh-Hant", 4),
    "cp1250": (CENTRAL, 4),
    "kz1048": ("kk", 8),
    "ptcp154": ("kk", 10),
    "cp1253": ("el", 4),
    "cp1254": ("tr", 5),
    "cp1255": ("he", 4),
    "cp1256": ("ar fa", 4),
    "cp1257": (BALTIC, 5),
    "cp1258": ("vi", 5),
    "cp874": ("th", 4),
    "koi8_r": ("ru", 6),
    "koi8_u": ("uk", 7),
    "iso8859_2": (CENTRAL, 5),
    "iso8859_3": ("eo mt", 6),
    "iso8859_4": (BALTIC, 9),
    "iso8859_5": (CYRILLIC, 8),
    "iso8859_6": ("ar", 7),
    "iso8859_7": ("el", 5),
    "iso8859_8": ("he", 6),
    "iso8859_9": ("tr", 6),
    "iso8859_13": (BALTIC, 7),
    "iso8859_15": (WESTERN, 5),
    "mac_roman": (WESTERN, 10),
    "mac_cyrillic": (CYRILLIC, 14),
    "mac_latin2": (CENTRAL, 12),
    "mac_greek": ("el", 12),
    "mac_turkish": ("tr", 12),
    "mac_iceland": ("is", 13),
    "cp866": ("ru", 6),
    "cp1125": ("uk", 9),
    "cp855": ("ru bg sr mk", 12),
    "cp850": (WESTERN, 9),
    "cp437": (WESTERN, 10),
    "cp852": (CENTRAL, 9),
    "cp737": ("el", 9),
    "cp869": ("el", 12),
    "cp857": ("tr", 10),
    "cp862": ("he", 10),
    "cp775": (BALTIC, 10),
    "cp860": ("pt", 13),
    "cp861": ("is", 13),
    "cp865": ("da", 12),
    "johab": ("ko", 12),
}
ALL_LANGUAGES = " ".join([*ALPHABETS, *COMMON])
WIDE_CANDIDATES = ("utf-16-le", "utf-16-be"), ("utf-32-le", "utf-32-be")
MARKS = {  # bits
    **dict.fromkeys("’“”–—…«»،", 3.0),
    **dict.fromkeys("‘„\xa0؟\u200c", 5.0),
    **dict.fromkeys("•°€£№¿־؛״ـ", 6.0),
    **dict.fromkeys("¡º·§©®±×µ²´‚‹›׳\xad\u200e\u200f", 8.0),
    **dict.fromkeys("ª™½−¢¥¼¾³÷†‰", 10.0),
}
BEFORE_LETTERS = frozenset("“‘„‚«‹¿¡»›°µ•\xa0\u200e\u200f")  # marks that may touch the word after them
AFTER_LETTERS = frozenset("”“’‘»›«‹…–—®™ºª²³،؟؛\xa0\u200e\u200f")
INSIDE_WORDS = frozenset("’–—·\xad\u200c״׳־ـ")
FULL_WIDTH = frozenset("，。、：；！？（）「」『』《》〈〉【】・～ー\u3000“”‘’…—")
FULL_WIDTH_BITS, RARE_BITS, FOREIGN_BITS, CONTROL_BITS, ASCII_BITS = 3.0, 9.0, 13.0, 16.0, 5.0
FRAME_BITS = 2.0  # of lines drawn around text, each part beside its like
CAPITAL_BITS, ALONE_BITS, TOUCH_BITS, ODD_BITS = 2.0, 3.0, 4.0, 6.0  # more, by where a character stands
AMONG_CAPITALS_BITS = 0.25
FALL = 0.01  # how frequent the last letter of an alphabet is, relative to the first one
EVIDENCE = 0.5  # part of the bits that counts: neighbouring letters are no independent witnesses
ALIKE = 0.02  # part of the characters in which two readings may differ before one speaks against the other
EXCESS_BITS, SHORT_EXCESS_BITS = 2.5, 4.0  # n characters may cost so much more than a language's mean: A + B / sqrt(n)
IDEOGRAPH_EXCESS_BITS = 3.5  # A, where a character has two bytes
MAX_MESS = 0.2  # charset-normalizer's own limit
SAMPLE_BYTES, N_SAMPLES = 4096, 8  # looked at, in parts
BEFORE_BYTES = 24  # of a part before its first byte beyond ASCII
QUICK_BYTES = 512  # on which all candidates compete
N_QUICK, N_LANGUAGES = 6, 3  # readings, and languages in each, that compete on the whole sample then
WHITE_SPACE = re.compile(rb"[ \n]")
BEYOND_ASCII = re.compile(rb"[\x80-\xff]")
UNUSUAL = re.compile(r"(?s)(?<=(.))([^\t\n\v\f\r -~])(?=(.))")  # with its neighbours
MAX_CONFIDENCE = 0.99


SAME = "same"  # class of a neighbour that is the same character


class Guess(NamedTuple):
    """An encoding by Python's name, and how sure it is: 0 to 1."""

    encoding: str
    confidence: float


class _Reading(NamedTuple):
    """A sample in one encoding."""

    bits: float
    against: float  # bits of them that the encoding has beforehand
    encoding: str
    language: str
    n: int  # characters that were judged
    text: str


def guess_encoding(data: bytes) -> Guess:
    """The encoding of text that is not UTF-8; `data` begins with a whole character."""
    samples = _samples(data)
    share = max(1, QUICK_BYTES // len(samples))
    quick = sorted(_readings([sample[:share] for sample in samples], CANDIDATES))
    texts = list(dict.fromkeys(reading.text for reading in quick))[:N_QUICK]
    likely: dict[str, tuple[str, float]] = {}
    for reading in quick:
        languages, against = likely.get(reading.encoding, ("", CANDIDATES[reading.encoding][1]))
        if reading.text in texts and languages.count(" ") < N_LANGUAGES:
            likely[reading.encoding] = f"{languages} {reading.language}", against
    return _judge(sorted(_readings(samples, likely)))


def guess_wide(head: bytes) -> Guess:
    """The byte order and width of UTF-16 or UTF-32 by the beginning of a file that has no mark."""
    if len(head) < 4 or len(head) % 2:
        return Guess("utf-16-le", 0.0)
    head = head[: min(len(head) // 4 * 4, SAMPLE_BYTES)]
    orders = (dict.fromkeys(pair, (ALL_LANGUAGES, 0.0)) for pair in WIDE_CANDIDATES)
    return max((_judge(sorted(_readings([head], pair))) for pair in orders), key=lambda guess: guess.confidence)


def _samples(data: bytes) -> list[bytes]:
    """Lines with bytes that are not ASCII from all over `data`, cut at white space, which is never half a character."""
    samples: list[bytes] = []
    end, size = 0, SAMPLE_BYTES // N_SAMPLES
    for number in range(N_SAMPLES):
        start = max(end, number * len(data) // N_SAMPLES)
        apart = WHITE_SPACE.search(data, start) if start else None
        found = BEYOND_ASCII.search(data, start if apart is None else apart.end())
        if found is None or (start and apart is None):
            continue
        start = max(apart.end() if apart else 0, found.start() - BEFORE_BYTES)
        end = start + size
        cut = max(data.rfind(b" ", start, end), data.rfind(b"\n", start, end))
        end = cut if cut > found.start() and end < len(data) else end
        samples.append(data[start:end])
    return samples


def _readings(samples: Sequence[bytes], candidates: Mapping[str, tuple[str, float]]) -> Iterator[_Reading]:
    """The reading in each encoding and language."""
    for encoding, (languages, against) in candidates.items():
        text = "\n".join(sample.decode(encoding, "replace") for sample in samples)
        seen = _in_context(text)
        n = seen.total()
        prior = against + ASCII_BITS * (len(text) - n)
        for language in languages.split():
            yield _Reading(_cost(seen, language) + prior, against, encoding, language, n, text)


def _judge(readings: Sequence[_Reading]) -> Guess:
    """The first of the readings, which are sorted, and the confidence in it."""
    best = readings[0]
    others = {reading.text: reading.bits for reading in reversed(readings) if not _alike(best, reading)}
    against = sum(2 ** (EVIDENCE * (best.bits - bits)) for bits in others.values())
    n = max(best.n, 1)
    mean = (best.bits - ASCII_BITS * (len(best.text) - best.n)) / n
    allowed = IDEOGRAPH_EXCESS_BITS if best.language in COMMON else EXCESS_BITS
    excess = mean - _expected_bits(best.language) - allowed - SHORT_EXCESS_BITS / math.sqrt(n)
    plausible = 1 / (1 + 4 ** min(excess, 100))
    if _mess(best.text) > MAX_MESS:
        plausible /= 4
    same = (reading for reading in readings if reading.text == best.text)  # in the commonest encoding of them
    encoding = min(same, key=lambda reading: reading.against).encoding
    return Guess(encoding, min(MAX_CONFIDENCE, plausible / (1 + against)))


def _alike(a: _Reading, b: _Reading) -> bool:
    return len(a.text) == len(b.text) and sum(map(str.__ne__, a.text, b.text)) <= ALIKE * a.n


def _mess(text: str) -> float:
    """charset-normalizer's measure: 0 clean, 1 a mess."""
    from charset_normalizer import from_bytes

    match = from_bytes(text.encode("utf-8", "replace"), cp_isolation=["utf_8"], threshold=1.0).best()
    return 1.0 if match is None else match.chaos


def _in_context(text: str) -> Counter[tuple[str, str, str]]:
    """How often (class before, character, class after) occurs, of what is not ordinary ASCII."""
    seen: Counter[tuple[str, str, str]] = Counter()
    for (before, char, after), count in Counter(UNUSUAL.findall(f" {text} ")).items():
        kinds = (SAME if other == char else _class_of(other) for other in (before, after))
        seen[next(kinds), char, next(kinds)] += count
    return seen


@cache
def _class_of(char: str) -> str:
    """space, control, frame, mark, digit, or a letter: ASCII or its script (LATIN, …) and lower, upper or letter."""
    category = unicodedata.category(char)
    if char in " \t\n\r\f\v":
        return "space"
    if category in ("Cc", "Cn", "Co", "Cs") or char == "\ufffd":
        return "control"
    if "\u2500" <= char <= "\u259f":
        return "frame"
    if category[0] not in "LM":
        return "digit" if category == "Nd" else "mark"
    script = "ASCII" if char.isascii() else unicodedata.name(char, "").split(" ")[0].split("-")[0]
    return f"{script} { ({'Lu': 'upper', 'Ll': 'lower'}.get(category, 'letter')) }"


@lru_cache(2**16)
def _cost_of(language: str, before: str, char: str, after: str) -> float:
    cost = _ideograph_cost if language in COMMON else _letter_cost
    return cost(_bits(language), language, before, char, after)


def _cost(seen: Counter[tuple[str, str, str]], language: str) -> float:
    """Bits that a language needs for the characters of a text."""
    return sum(count * _cost_of(language, *where) for where, count in seen.items())


def _ideograph_cost(bits: Mapping[str, float], language: str, before: str, char: str, after: str) -> float:
    kind = _class_of(char)
    if kind == "control":
        return CONTROL_BITS
    if char in FULL_WIDTH:
        return FULL_WIDTH_BITS + TOUCH_BITS * (before + after).count("ASCII")
    apart = TOUCH_BITS if after == "space" and kind != "mark" and language != "ko" else 0.0  # words are not set apart
    return bits.get(char, MARKS.get(char, CONTROL_BITS) + 3) + apart


def _letter_cost(bits: Mapping[str, float], language: str, before: str, char: str, after: str) -> float:
    kind = _class_of(char)
    if kind == "control":
        return CONTROL_BITS
    if kind == "frame":
        if SAME in (before, after):
            return FRAME_BITS
        return RARE_BITS + TOUCH_BITS * sum(" " in other or other == "digit" for other in (before, after))
    own = bits.get(char.lower() if len(char.lower()) == 1 else "i")  # of İ it is two
    if own is None and kind == "mark":
        return MARKS.get(char, FOREIGN_BITS) + TOUCH_BITS * _touches(before, char, after)
    script, _, case = kind.partition(" ")
    if own is None:
        fits = script in (_script(language), "COMBINING") and not (case == "upper" and before.endswith("lower"))
        return RARE_BITS if fits else FOREIGN_BITS
    inside_small = case == "upper" and before.endswith("lower")
    inside_capitals = case == "lower" and before.endswith("upper") and after.endswith("upper")
    if inside_small or inside_capitals:
        own += ODD_BITS
    elif case == "upper":
        own += AMONG_CAPITALS_BITS if before.endswith("upper") or after.endswith("upper") else CAPITAL_BITS
    neighbours = [
        other.partition(" ")[0] for other in (before, after) if other not in ("space", "mark", "frame", "control")
    ]
    if script != "COMBINING":
        at_home = (script, SAME, "COMBINING", "ASCII" if script == "LATIN" else "")
        own += sum(TOUCH_BITS if other == "digit" else ODD_BITS for other in neighbours if other not in at_home)
    if char == "ς" and " " in after:  # it ends words
        own += ODD_BITS
    if before == after == SAME:  # no word has a letter three times
        own += ODD_BITS
    alone = script == "LATIN" and (not neighbours or before.startswith("LATIN"))  # not among plain letters
    return own + ALONE_BITS if alone else own


def _touches(before: str, char: str, after: str) -> int:
    """On how many sides a mark touches a letter as it does not use to."""
    left, right = " " in before, " " in after
    if left and right:
        return 0 if char in INSIDE_WORDS else 2
    return (left and char not in AFTER_LETTERS) + (right and char not in BEFORE_LETTERS)


@cache
def _script(language: str) -> str:
    return _class_of(ALPHABETS[language][0]).partition(" ")[0]


@cache
def _bits(language: str) -> dict[str, float]:
    """What each character of a language costs."""
    if language in ALPHABETS:
        return _falling(ALPHABETS[language], FALL, 0.93)
    frequent, other = _ideographs(language)
    costs = {char: -math.log2(0.02 / len(other)) for char in other}
    costs |= {char: -math.log2(0.45 / len(frequent)) for char in frequent}
    return costs | _falling(COMMON[language], 0.03, 0.5)


def _falling(chars: str, fall: float, total: float) -> dict[str, float]:
    """Bits of characters whose frequencies fall evenly and make up `total`."""
    chars = "".join(dict.fromkeys(chars))
    weights = [fall ** (i / len(chars)) for i in range(len(chars))]
    return {char: -math.log2(weight * total / sum(weights)) for char, weight in zip(chars, weights, strict=True)}


def _ideographs(language: str) -> tuple[str, str]:
    """Those in use and the rarer ones, as the national standards divide them."""
    if language == "zh":
        return _rows("gb2312", 0xB0, 0xD7), _rows("gb2312", 0xD8, 0xF7)
    if language == "zh-Hant":
        return _rows("big5", 0xA4, 0xC6), _rows("big5", 0xC9, 0xF9)
    if language == "ja":
        half_width = "".join(map(chr, range(0xFF61, 0xFFA0)))
        return _rows("euc_jp", 0xA4, 0xA5) + _rows("euc_jp", 0xB0, 0xCF), half_width + _rows("euc_jp", 0xD0, 0xF4)
    return _rows("euc_kr", 0xB0, 0xC8), "".join(map(chr, range(0xAC00, 0xD7A4)))


def _rows(encoding: str, first: int, last: int) -> str:
    """The characters whose two bytes begin with `first` to `last`."""
    pairs = (bytes([a, b]) for a in range(first, last + 1) for b in range(0x40, 0xFF))
    return "".join(char for char in (pair.decode(encoding, "ignore") for pair in pairs) if not char.isascii())


@cache
def _expected_bits(language: str) -> float:
    """The mean over a text of the language."""
    costs = _bits(language).values()
    return sum(cost * 2**-cost for cost in costs) / sum(2**-cost for cost in costs)
