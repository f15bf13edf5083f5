"""`python tests/transformers_suite/compare.py`: what passes for our BLIP-2 and for transformers' own, as a table."""

import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree


HERE = Path(__file__).parent
OUTCOMES = ["passed", "skipped", "failed"]


def outcomes(file):
    """{(class, test): outcome} of a file of suites."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", str(HERE / file), "-q", "-p", "no:cacheprovider", "-o", "addopts="]
        done = subprocess.run([*command, f"--junitxml={report}"], capture_output=True, text=True)
        if not report.exists():
            raise RuntimeError(f"pytest wrote no report: {done.stdout[-2000:]}{done.stderr[-2000:]}")
        found = {}
        for case in ElementTree.parse(report).iter("testcase"):
            children = {child.tag for child in case}
            outcome = "failed" if children & {"failure", "error"} else "skipped" if "skipped" in children else "passed"
            name = case.get("classname").rpartition(".")[2], case.get("name").partition(" ")[0]
            # a test whose subtests failed is reported once for each
            found[name] = max(outcome, found.get(name, outcome), key=OUTCOMES.index)
    return found


def table(results):
    """Markdown: a row for each class, a column for each of `results` ({title: outcomes})."""
    lines = [f"| {' | '.join(['passed / skipped / failed', *results])} |", "|---" * (len(results) + 1) + "|"]
    classes = list(dict.fromkeys(name for found in results.values() for name, _ in found))
    for row in [*classes, "all"]:
        cells = [row]
        for found in results.values():
            counts = Counter(outcome for (name, _), outcome in found.items() if row in (name, "all"))
            cells.append(" / ".join(str(counts[outcome]) for outcome in OUTCOMES))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def compare():
    """(our outcomes, transformers' own)."""
    return outcomes("test_our_blip2.py"), outcomes("their_blip2.py")


def passes_there_only(ours, theirs):
    return sorted(name for name, outcome in theirs.items() if outcome == "passed" != ours.get(name))


if __name__ == "__main__":
    ours, theirs = compare()
    print(table({"blip2_hf": ours, "transformers": theirs}))
    print("pass there only:", passes_there_only(ours, theirs) or "none")
