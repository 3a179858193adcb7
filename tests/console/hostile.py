"""Texts that would break a terminal."""

HOSTILE = [
    "\x1b[2J\x1b]0;title\x07\x9b31m\x00\x7f",
    "\u202eevil\u202c \u2066isolate\u2069 \u200fmark",
    "e" + "\u0301" * 5000,
    "👩‍👩‍👧‍👦" * 400 + "🏳️‍🌈🇩🇪❤️",
    "小猫" * 3000,
    "x" * 100_000,
    "\r\n\t\v\f\x1c\u2028\u2029\x85" * 50,
    "\ud800\udfff\ufeff\u00ad\ufffe",
    "\u1100" * 50 + "\u1161" * 200,
    "a\u200b" * 900,
]
