"""Give command lines to vLLM's own parser and engine; runs in an environment of vLLM.

Standard input: {"models": {directory: config.json}, "lines": [[name, argv, whole], …]}, argv without the program.
Of a line that is checked whole, the engine's own checks of model and length run too. Standard output, last line:
{"version", "parsers" (names of tool-call parsers), "environment" (variables it reads), "problems": {name: text},
"lengths": {name: tokens}}.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1", VLLM_LOGGING_LEVEL="ERROR")

import vllm
from vllm import envs
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.tool_parsers import ToolParserManager
from vllm.utils.argparse_utils import FlexibleArgumentParser

try:
    from vllm.entrypoints.common.cli_args import make_arg_parser, validate_parsed_serve_args  # 0.33
except ImportError:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args  # 0.32


def problem_of(parser: FlexibleArgumentParser, argv: list[str], whole: bool, lengths: list) -> str | None:
    """Return what vLLM has against a command line, or None."""
    heard = io.StringIO()
    try:
        with contextlib.redirect_stderr(heard):
            arguments = parser.parse_args(argv)
            validate_parsed_serve_args(arguments)
            engine = AsyncEngineArgs.from_cli_args(arguments)
            if whole:
                lengths.append(engine.create_model_config().max_model_len)
    except SystemExit:
        return heard.getvalue()[-500:]
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:1500]
    return None


def main() -> None:
    """Check every line."""
    parser = make_arg_parser(FlexibleArgumentParser())
    problems, lengths = {}, {}
    asked = json.load(sys.stdin)
    for directory, config in asked["models"].items():
        Path(directory).mkdir(parents=True, exist_ok=True)
        (Path(directory) / "config.json").write_text(json.dumps(config))
    for name, argv, whole in asked["lines"]:
        found: list[int] = []
        problem = problem_of(parser, argv, whole, found)
        if problem is not None:
            problems[name] = problem
        if found:
            lengths[name] = found[0]
    parsers = sorted(ToolParserManager.list_registered())
    answer = {
        "version": vllm.__version__,
        "parsers": parsers,
        "environment": sorted(envs.environment_variables),
        "problems": problems,
        "lengths": lengths,
    }
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
