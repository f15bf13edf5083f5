"""The commands of `blip2-hf`, one a file: `add_parser(commands)` tells argparse of its options."""
