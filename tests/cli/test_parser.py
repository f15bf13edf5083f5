"""The face of the command: help, groups, guesses, spellings, exit codes."""

import configparser
import platform
import re
import shlex
import subprocess
import sys
from importlib.metadata import version

import pytest
from paths import REPOSITORY

import blip2_hf
from blip2_hf.cli import main, make_parser
from blip2_hf.cli._common import _GROUP_OF
from blip2_hf.cli._parser import at_least_zero, number, probability
from blip2_hf.jobs.errors import tell_errors


PARSER = make_parser()
SUBPARSERS = next(action for action in PARSER._actions if action.choices).choices
TRAININGS = ("finetune", "pretrain")
# Options that are another thing in each command, and those whose defaults differ
OTHER_IN_EACH = {
    *("--output", "--overwrite", "--model", "--index", "--prompt", "--preset", "--seed", "--text-column"),
    *("--vision-model", "--language-model", "--vision-feature-layer", "--id-column", "--dtype", "--rerank"),
}
OTHER_DEFAULTS = {
    *("--batch-size", "--rows-per-shard", "--top-p", "--max-new-tokens", "--held-out", "--num-workers"),
    *("--question-column", "--answer-column", "--port"),
}
HEAVY = ("torch", "transformers", "datasets", "numpy", "PIL", "huggingface_hub", "accelerate", "peft", "pandas")


def options_of(command: str) -> dict:
    """The options of a command, by their names."""
    return {action.option_strings[-1]: action for action in SUBPARSERS[command]._actions if action.option_strings}


def refusal(arguments: list[str], capsys) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    return message


def stem(text: str) -> str:
    """What an option is, without its default and examples."""
    return re.split(r"[;,(]| such as", text, maxsplit=1)[0].strip()


def test_options_that_commands_share_have_the_same_words_and_defaults():
    seen = {}
    for command in SUBPARSERS:
        for name, action in options_of(command).items():
            if name in OTHER_IN_EACH or (command in TRAININGS and name in ("--batch-size", "--device")):
                continue
            default = None if name in OTHER_DEFAULTS else action.default
            first = seen.setdefault(name, (stem(action.help), default, command))
            assert (stem(action.help), default) == first[:2], f"{name} of {command} and {first[2]}"


def test_the_column_of_captions_has_two_names():
    for name in ("--text-column=x", "--caption_column=x"):
        assert PARSER.parse_args(["finetune", "data", "--model", "m", "--output", "o", name]).text_column == "x"
        assert PARSER.parse_args(["evaluate", "caption", "--model", "m", "--output", "o", name]).caption_column == "x"


@pytest.mark.parametrize("command", SUBPARSERS)
def test_every_option_is_in_a_group_and_every_group_in_its_place(command):
    parser = SUBPARSERS[command]
    grouped = {name for group in parser.groups.values() for a in group._group_actions for name in a.option_strings}
    assert options_of(command).keys() - grouped == {"--help"}
    titles = [line.removesuffix(":") for line in parser.format_help().splitlines() if line.endswith(":")]
    titles = [title for title in titles if title in parser.groups]
    assert titles and titles == [title for title in PARSER_GROUPS if title in titles]


def test_the_table_of_groups_has_no_other_options():
    assert {*_GROUP_OF} <= {name for command in SUBPARSERS for name in options_of(command)} | {"--lemmatize"}


PARSER_GROUPS = [*SUBPARSERS["caption"].groups]


@pytest.mark.parametrize("command", SUBPARSERS)
def test_every_help_ends_with_a_line_that_can_be_run(command):
    text = SUBPARSERS[command].format_help()
    line = text.rstrip().splitlines()[-1]
    program, *arguments = shlex.split(line)
    assert (program, arguments[0]) == ("blip2-hf", command)
    assert callable(PARSER.parse_args(arguments).run)


@pytest.mark.parametrize("command", ["", *SUBPARSERS])
def test_a_help_imports_nothing_heavy(command):
    code = (
        "import atexit, sys; from blip2_hf.cli import main\n"
        f"atexit.register(lambda: print([name for name in {HEAVY} if name in sys.modules]))\n"
        f"main({[*command.split(), '--help']})"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.splitlines()[-1] == "[]"


def test_the_version(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    program, python, packages = capsys.readouterr().out.splitlines()
    assert stopped.value.code == 0 and program == f"blip2-hf {blip2_hf.__version__}"
    assert python == f"Python {platform.python_version()} on {platform.platform()}"
    settings = configparser.ConfigParser()
    settings.read(REPOSITORY / "setup.cfg")
    required = {line.partition(">=")[0] for line in settings["options"]["install_requires"].split()}
    assert dict(package.split() for package in packages.split(", ")) == {name: version(name) for name in required}


def test_the_version_tells_what_is_missing(capsys, monkeypatch):
    monkeypatch.setattr("blip2_hf.cli._version.PACKAGES", ("torch", "nothing-of-this-name"))
    with pytest.raises(SystemExit):
        main(["--version"])
    (*_, packages) = capsys.readouterr().out.splitlines()
    assert packages == f"torch {version('torch')}, nothing-of-this-name is not installed"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "COMMAND"),
        ("capiton photos --model m", "'capiton' was given, one of .* was expected. Did you mean caption?"),
        ("caption photos --modle m", "there is no option --modle. Did you mean --model?"),
        ("caption photos --modle=m", "there is no option --modle. Did you mean --model?"),
        ("caption photos --model m --max_new_token 3", "no option --max_new_token. Did you mean --max-new-tokens?"),
        ("caption photos --model m --zzz", "there is no option --zzz. See blip2-hf caption --help"),
        ("caption photos --model m --dtype bfloat", "'bfloat' was given, one of bfloat16, .* Did you mean bfloat16?"),
        ("evaluate coco-captions --model m --output o", "one of coco-caption, .* Did you mean coco-caption?"),
        ("index photos more --model m", "'more' was given, and nothing like it is expected"),
        ("caption photos", "required: --model"),
        # A name that is cut short is none: it would change its meaning with a new option
        ("caption photos --mod m", "there is no option --mod."),
    ],
)
def test_what_was_meant(line, message, capsys):
    assert re.search(message.replace("?", r"\?"), refusal(line.split(), capsys))


@pytest.mark.parametrize("spelling", ["--batch-size 3", "--batch_size 3", "--batch-size=3", "--batch_size=3"])
def test_both_spellings(spelling):
    options = PARSER.parse_args(["caption", "photos", "--model", "m", *spelling.split()])
    assert options.batch_size == 3


def test_values_are_left_as_they_are():
    line = ["caption", "photos", "--model", "my_model", "--prompt", "--a picture_of", "--generate", "num_beams=2"]
    options = PARSER.parse_args(line)
    assert (options.model, options.prompt, options.generate) == ("my_model", "--a picture_of", [("num_beams", 2)])


def test_what_training_hands_on():
    line = [
        "finetune",
        "photos",
        "--model",
        "m",
        "--output",
        "o",
        "--batch_size",
        "2",
        "--lr_scheduler_type",
        "linear",
    ]
    options, _ = PARSER.parse_known_args(line)
    assert options.batch_size == 2 and options.rest == ["--lr_scheduler_type", "linear"]


@pytest.mark.parametrize(
    ("parse", "text", "value"),
    [
        (at_least_zero, "0", 0),
        (at_least_zero, "-1", "'-1' was given, a whole number of at least 0 was expected"),
        (at_least_zero, "1.5", "'1.5' was given, a whole number of at least 0 was expected"),
        (probability, "1", 1.0),
        (probability, "0", "'0' was given, a number of more than 0 and at most 1 was expected"),
        (probability, "nan", "'nan' was given"),
        (number(float), "-2.5", -2.5),
        (number(float), "much", "'much' was given, a number was expected"),
    ],
)
def test_numbers(parse, text, value):
    if isinstance(value, str):
        with pytest.raises(Exception, match=value):
            parse(text)
    else:
        assert parse(text) == value


def test_the_end_of_a_script(capsys):
    def run(error: BaseException) -> SystemExit:
        with pytest.raises(SystemExit) as stopped, tell_errors("train.py"):
            raise error
        return stopped.value

    assert run(ValueError("no column 'x'.")).code == "train.py: no column 'x'."
    assert (
        run(FileNotFoundError(2, "No such file or directory", "a.csv")).code
        == "train.py: a.csv: No such file or directory."
    )
    assert "memory ran out" in run(RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")).code
    assert run(KeyboardInterrupt()).code == 130 and capsys.readouterr().err == "train.py: stopped.\n"
    # A fault of the code keeps its traceback
    for fault in (KeyError("x"), RuntimeError("shapes differ")):
        with pytest.raises(type(fault)), tell_errors("train.py"):
            raise fault
