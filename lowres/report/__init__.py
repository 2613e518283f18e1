"""`lowres report`: one HTML page about one run or several.

charts  what is drawn, as data
tables  what is told in tables
page    the HTML file
assets  the script and the look of the page, and the library that draws
"""

from lowres.report.page import REPORT, page, write_report

__all__ = ["REPORT", "page", "write_report"]
