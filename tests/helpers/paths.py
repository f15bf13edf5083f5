"""Where things are in the repository."""

from pathlib import Path


REPOSITORY = Path(__file__).parents[2]
EXAMPLES, DOCS = REPOSITORY / "examples", REPOSITORY / "docs"
HELPERS, FIXTURES = Path(__file__).parent, Path(__file__).parents[1] / "fixtures"
