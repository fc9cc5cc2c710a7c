"""Opening a report page in a browser, at a view and with what the view should show."""

HOSTILE = [
    "<img src=x onerror=alert(1)>",
    "</script><script>alert(2)</script>",
    "\u202e",
    "\x00",
    " $",
    "漢",
    "🙂",
    "\n",
]


def visit(tab, run, address):
    tab.goto("about:blank")
    tab.goto(f"{(run / 'report.html').as_uri()}#{address}")
    tab.wait_for_selector("html[data-ready]")
