"""Texts that break pages which take them for markup."""

HOSTILE = [
    "</style><script>document.title = 'broken'</script>",
    '"><img src=x onerror="document.title=1"><svg onload=alert(1)>',
    "' onmouseover='alert(1)",
    "<!-- <iframe src=//example.org></iframe>",
    "</title></pre></details><h1>$title ${body} &lt; &amp;",
    "a\x00b\x1b[31m\x07\r\n\u202egnp.exe \u2066 \ud800 \udcff",
    "x" * 3000,
]


def tags(whole):
    """The names of all elements of a page, and of attributes that run or fetch something."""
    from html.parser import HTMLParser

    found = set()

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attrs):
            found.add(tag)
            found.update(
                name
                for name, value in attrs
                if name.startswith("on")
                or name in ("src", "style", "srcset")
                or (name == "href" and not value.startswith("#"))  # what stands on the page itself
            )

    Reader().feed(whole)
    return found


OURS = set(
    """html head meta title style body main footer h1 h2 h3 p section div figure figcaption svg desc path line circle
    rect g use text ul li span details summary table caption thead tbody tr th td dl dt dd pre mark
    input label""".split()
)
