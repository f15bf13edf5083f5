"""`python -m blip2_hf.cli`: the command `blip2-hf`."""

from . import main


main()
