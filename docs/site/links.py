"""Check the built site without a network: each link, anchor and image must lead to something in it.

python docs/site/links.py SITE
"""

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Page(HTMLParser):
    """The ids of a page, what it refers to, and its images without an alternative text."""

    def __init__(self, path):
        super().__init__()
        self.ids, self.links, self.without_alt, self.hosts = set(), [], [], set()
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids |= {attrs[key] for key in ("id", "name") if attrs.get(key)}
        loads = tag in ("img", "script", "source", "iframe") or (tag == "link" and attrs.get("rel") != "canonical")
        address = attrs.get("src") or attrs.get("href") if tag != "base" else None
        if address:
            self.links.append(address)
            if loads and urlsplit(address).netloc:
                self.hosts.add(address)
        if tag == "img" and not attrs.get("alt"):
            self.without_alt.append(attrs.get("src", "?"))


def problems(site):
    """Sentences about what is wrong in a built site."""
    pages = {path.resolve(): Page(path) for path in sorted(Path(site).rglob("*.html"))}
    found = []
    for path, page in pages.items():
        name = path.relative_to(Path(site).resolve())
        found += [f"{name} loads {address}" for address in sorted(page.hosts)]
        found += [f"{name} shows {image} without alternative text" for image in page.without_alt]
        for address in dict.fromkeys(page.links):
            parts = urlsplit(address)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if target.is_dir():
                target /= "index.html"
            if not target.is_file():
                found.append(f"{name} links {address}, which does not exist")
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].ids | {"", "top"}:
                found.append(f"{name} links {address}, which has no such anchor")
    return found


if __name__ == "__main__":
    sys.exit("\n".join(problems(sys.argv[1])) or 0)
