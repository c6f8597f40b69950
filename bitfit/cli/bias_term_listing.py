"""run_glue.py --list-bias-terms."""

import sys
from argparse import Namespace
from collections.abc import Sequence

import utils
from bitfit.model import hub
from bitfit.options import make_parser


def parse_listing(description: str, argv: Sequence[str] | None = None) -> Namespace | None:
    """Return the flags of --list-bias-terms, or None without it."""
    if "--list-bias-terms" not in (sys.argv[1:] if argv is None else argv):
        return None
    parser = make_parser(description)
    for action in parser._actions:
        action.required = False
    return parser.parse_args(argv)


def list_bias_terms(options: Namespace) -> None:
    """Print the bias terms of a model; no weights are loaded."""
    hub.use_local_copies_when_offline(needs_hub=not hub.is_local(options.model_name))
    from bitfit.data.tasks import TASKS
    from bitfit.model.bias_terms import model_of_config, terms_table

    name, added = options.model_name, options.add_biases
    revision, _ = hub.resolve_revision(name, options.model_revision)
    model = model_of_config(name, TASKS["rte"], revision=revision, added=added)
    utils.print_result(terms_table(model))
