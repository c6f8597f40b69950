# PYTHON_ARGCOMPLETE_OK
"""Fine-tune and score a BERT-family model on a GLUE task, bias terms only (BitFit) or otherwise.

    python run_glue.py --output-path out/rte --task-name rte --fine-tune-type bitfit

This file parses the flags and returns the exit status; `bitfit.cli.experiment` does the work.
Invalid input ends with status 2 and one line.
"""

from bitfit.signals import catch_signals, exit_with_status

if __name__ == "__main__":
    catch_signals("run_glue.py")

import logging
import shlex
import sys
from contextlib import suppress
from pathlib import Path

import utils
from bitfit.artifacts import run_folder
from bitfit.cli import exit_status, experiment
from bitfit.cli.bias_term_listing import list_bias_terms, parse_listing
from bitfit.distributed import Ranks
from bitfit.options import RunOptions, parse_args
from utils import Diverged, RankLost, UserError


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit status; print one line if it did not succeed."""
    description = __doc__.splitlines()[0]
    if listing := parse_listing(description, argv):
        return exit_status.run_cli("run_glue.py", lambda _: list_bias_terms(listing))
    options, ranks = parse_args(description, argv), Ranks()
    resume = resume_command(options, ranks, sys.argv[1:] if argv is None else argv)
    level = logging.WARNING if options.quiet else logging.INFO
    utils.setup_logging(*[logging.ERROR, f"rank {ranks.rank}: "] if ranks.rank else [level])

    if warning := experiment.learning_rate_warning(options):
        utils.LOGGER.warning(warning)

    def write_message(message: str, error: BaseException, status: int) -> None:
        """Write the last line once for all ranks; other ranks log their separate errors."""
        known_to_all = isinstance(error, (Diverged, RankLost)) or getattr(error, "shared", False)
        if ranks.rank and not known_to_all and status <= 128:
            utils.LOGGER.error(message.partition(": ")[2])
        utils.print_once(message, at_once=status > 128)

    return exit_status.run_cli(
        "run_glue.py",
        lambda signals: experiment.run(options, signals, ranks),
        after_signal=f"; to go on: {resume}",
        after_error=f"; saved checkpoints are kept; when that is corrected, go on with: {resume}",
        less_memory=" (a lower --max-tokens needs less)",
        write_message=write_message,
        is_finished=lambda: is_finished(options),
    )


def resume_command(options: RunOptions, ranks: Ranks, argv: list[str]) -> str:
    """Return the command that continues this one."""
    words = ["run_glue.py", *argv, *["--resume"] * (not options.resume)]
    return f"{ranks.launch_command} {shlex.join(words)}"


def is_finished(options: RunOptions) -> bool:
    """Return whether the output folder says that nothing is left to do."""
    with suppress(UserError):
        return not options.push_to_hub and run_folder.is_run_finished(Path(options.output_path))
    return False


if __name__ == "__main__":
    exit_with_status(main())
